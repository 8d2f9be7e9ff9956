"""How token methods choose from the features of images before the language model."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotatek_cache.core.precision import attention_dtype, without_autocast
from rotatek_cache.hf.cache import RotateKCache
from rotatek_cache.hf.encoders import encoder_tap, token_signal
from rotatek_cache.token_pruning.interface import FeatureMethod


@dataclass(frozen=True)
class Choice:
    """The tokens that a method chose of one image of n tokens.

    Args:
        kept: bool ``[n]``.
        taken_by: int64 ``[n]``, the kept token that takes each in; -1: none.
    """

    method: FeatureMethod
    kept: Tensor
    taken_by: Tensor | None

    def apply(self, features: Tensor) -> Tensor:
        """Change features ``[n, d]`` to what the language model is to see; a dropped token's are all zero."""
        merged = features if self.taken_by is None else self.method.merged(features, self.taken_by)
        return merged.to(features.dtype) * self.kept[:, None]


@without_autocast
def choose(
    method: FeatureMethod, features: Sequence[Tensor], counts: Sequence[int], signal: Tensor | None
) -> list[Choice]:
    """Choose what stays of each image.

    Args:
        method: chooses for each image by itself.
        features: of each image ``[n, d]``, one for each placeholder.
        counts: how many tokens are to stay of each image.
        signal: what was heard of the encoder, token by token ``[total, 2 + k]``, if the method asked for it.
    """
    lengths = [len(image) for image in features]
    scores: Sequence[Tensor | None] = [None] * len(lengths)
    keys: Sequence[Tensor | None] = scores
    if signal is not None:
        score = signal[:, 0].masked_fill(signal[:, 1] == 0, -torch.inf)  # tokens that show no patch
        scores, keys = score.split(lengths), signal[:, 2:].split(lengths)
    return [
        Choice(method, *method.choose(image, wanted, score_of, keys_of))
        for image, wanted, score_of, keys_of in zip(features, counts, scores, keys, strict=True)
    ]


def choose_features(inner: Any, cache: RotateKCache, given: dict[str, Any], encode: Callable[[], Any]) -> Any:
    """Encode images, let the cache's token method choose from their features, and mark what it drops by zeros.

    Args:
        inner: the attached model below the head.
        cache: it has a `FeatureMethod`.
        given: arguments of `get_image_features`, by name.
        encode: calls it.
    """
    method, taps = cache.tokens, inner._rotatek.taps
    assert isinstance(method, FeatureMethod)
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
    method, counts = cache.counts_before(inner.config, attention_dtype(inner.get_input_embeddings().weight), lengths)
    choices = choose(method, images, counts, without_autocast(token_signal)(tap, inner, given, lengths))
    output.pooler_output = _applied(choices, features, lengths)
    if getattr(output, "deepstack_features", None) is not None:  # Qwen3-VL adds these in later layers
        output.deepstack_features = [_applied(choices, layer, lengths) for layer in output.deepstack_features]
    cache.chosen = True
    if threading.get_ident() in inner._rotatek.threads:  # in a forward, whose positions have been announced
        cache.positions.drop(kept_features(output.pooler_output))
    return output


def _applied(choices: Sequence[Choice], features: Any, lengths: Sequence[int]) -> Any:
    """Change the features of each image as chosen, in the form that they had; an empty image has no choice."""
    if isinstance(features, Tensor) and features.ndim == 2:  # one image behind the other, as older transformers have it
        return torch.cat(_applied(choices, features.split(list(lengths)), lengths))
    coming = iter(choices)
    images = [next(coming).apply(image) if len(image) else image for image in features]
    return torch.stack(images) if isinstance(features, Tensor) else type(features)(images)


def kept_features(features: Sequence[Tensor]) -> Tensor:
    """Find the features that were not dropped: bool ``[total]``. The mark survives what generate does to features."""
    return torch.cat([(image.flatten(0, -2) != 0).any(-1) for image in features])
