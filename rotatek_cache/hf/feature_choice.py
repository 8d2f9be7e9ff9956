"""What stands in for an attached model's encoding of images: token methods choose from what comes of it."""

import functools
import inspect
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rotatek_cache.hf.encoder_tap import Choice, choose
from rotatek_cache.hf.encoders import encoder_tap, note_packing, token_signal


@functools.cache
def _parameters(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def arguments_of(function: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name."""
    given = _parameters(function).bind_partial(*args, **kwargs).arguments
    more = given.pop("kwargs", {})
    return {**given, **more}


def get_image_features(inner: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the model's method: lets a cache choose from the features, and marks what it drops by zeros."""
    encode = functools.partial(type(inner).get_image_features, inner, *args, **kwargs)
    choosing = inner._rotatek.choosing
    cache = choosing.get(threading.get_ident()) if choosing else None  # a compiler need not look further than here
    if cache is None:
        return encode()
    method, taps = cache.tokens, inner._rotatek.taps
    given = arguments_of(type(inner).get_image_features, inner, *args, **kwargs)
    with encoder_tap(inner, method, given) as tap:
        if tap is not None:
            taps[threading.get_ident()] = tap
        try:
            output = encode()
        finally:
            taps.pop(threading.get_ident(), None)
    features = output.pooler_output
    if isinstance(features, Tensor) and features.ndim != 3:
        raise ValueError(
            f"tokens={method} need the features of each image by itself; '{inner.config.model_type}' gives a tensor "
            f"{list(features.shape)}"
        )
    images = [image for image in features if len(image)]  # Idefics has an empty one for a row without images
    lengths = [len(image) for image in images]
    method, counts = cache.counts_before(inner.config, inner.get_input_embeddings().weight.dtype, lengths)
    choices = choose(method, images, counts, token_signal(tap, inner, given, lengths))
    output.pooler_output = _applied(choices, features, lengths)
    if getattr(output, "deepstack_features", None) is not None:  # Qwen3-VL adds these in later layers
        output.deepstack_features = [_applied(choices, layer, lengths) for layer in output.deepstack_features]
    cache.chosen = True
    if threading.get_ident() in inner._rotatek.threads:  # in a forward, whose positions have been announced
        cache.positions.drop(kept_features(output.pooler_output))
    return output


def _applied(choices: Sequence[Choice], features: Any, lengths: Sequence[int]) -> Any:
    """Features of each image as the choices leave them, one for each that has any, in the form that they had."""
    if isinstance(features, Tensor) and features.ndim == 2:  # one image behind the other, as older transformers have it
        return torch.cat(_applied(choices, features.split(list(lengths)), lengths))
    coming = iter(choices)
    images = [next(coming).apply(image) if len(image) else image for image in features]
    return torch.stack(images) if isinstance(features, Tensor) else type(features)(images)


def pack_image_features(inner: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the model's method: what is heard of the encoder is packed as the features are."""
    pack = functools.partial(type(inner).pack_image_features, inner)
    tap = inner._rotatek.taps.get(threading.get_ident()) if inner._rotatek.taps else None
    if tap is not None:
        arguments = arguments_of(type(inner).pack_image_features, inner, *args, **kwargs)
        note_packing(tap, pack, {name: value for name, value in arguments.items() if name != "self"})
    return pack(*args, **kwargs)


def kept_features(features: Sequence[Tensor]) -> Tensor:
    """bool ``[total]``: which features were not dropped. The mark survives what generate does to features."""
    return torch.cat([(image.flatten(0, -2) != 0).any(-1) for image in features])
