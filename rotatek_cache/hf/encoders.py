"""How token methods read a family's vision encoder: which of its layers, and the signal of each visual token."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from rotatek_cache.hf.encoder_layouts import Encoder, Encoding
from rotatek_cache.hf.encoder_tap import EncoderTap, tapped
from rotatek_cache.hf.families import FAMILIES
from rotatek_cache.token_pruning.interface import FeatureMethod


@contextlib.contextmanager
def encoder_tap(inner: Any, method: FeatureMethod, given: dict[str, Any]) -> Iterator[EncoderTap | None]:
    """Listen to the encoder layer that a method reads while `get_image_features` is called; None if it reads none.

    That is the layer which the features come from, the last of them where several are put side by side.

    Args:
        inner: the model below the language-modelling head.
        method: the method.
        given: arguments of the call, by name.
    """
    if not method.reads_encoder:
        yield None
        return
    config = inner.config
    encoder = _encoder_of(inner)
    known = sorted(name for name, family in FAMILIES.items() if family.encoder)

    def setting(key: str) -> Any:
        value = given.get(key)
        return getattr(config, key, None) if value is None else value

    name = type(method).__name__
    other = "use a method that needs features only (DivPrune), or one that reads the language model (FastV, VLCache)"
    module: Any = None if encoder is None else getattr(inner, encoder.name, None)
    if encoder is None or module is None:
        raise ValueError(
            f"{name} reads attention of the vision encoder, token by token, and which encoder patches the visual "
            f"tokens of '{config.model_type}' show is not known (it is for {', '.join(known)}): {other}"
        )
    attention = [
        part
        for part in module.modules()
        if type(part).__name__.endswith("Attention") and (hasattr(part, "config") or hasattr(part, "qkv"))
    ]
    if not attention:
        raise ValueError(
            f"{name} reads attention of the vision encoder, and {type(module).__name__} of this model has no attention "
            f"layer that can be read: {other}"
        )
    layers = setting("vision_feature_layer")
    layers = [-1] if layers is None else [layers] if isinstance(layers, int) else list(layers)
    # Hidden states begin with the embeddings.
    layer = max(index if index >= 0 else len(attention) + 1 + index for index in layers)
    if not 1 <= layer <= len(attention):
        raise ValueError(
            f"{name} reads the encoder layer that the features come from; vision_feature_layer="
            f"{setting('vision_feature_layer')} is none of its {len(attention)} attention layers"
        )
    has_class_token = encoder.class_token
    if has_class_token is None:
        has_class_token = setting("vision_feature_select_strategy") == "default"
    with tapped(EncoderTap(attention[layer - 1], has_class_token)) as tap:
        yield tap


def token_signal(tap: EncoderTap | None, inner: Any, given: dict[str, Any], lengths: Sequence[int]) -> Tensor | None:
    """Lay out what a tap heard by visual token ``[total, 2 + k]``; entry i of the features has ``lengths[i]``."""
    if tap is None:
        return None
    encoder = _encoder_of(inner)
    assert encoder is not None  # or there would be no tap
    signal = encoder.layout(tap, Encoding(inner, getattr(inner, encoder.name), given, lengths))
    if len(signal) != sum(lengths):
        raise ValueError(
            f"{inner.config.model_type}: the vision encoder's patches show {len(signal)} visual tokens, the model has "
            f"{sum(lengths)}"
        )
    return signal


def _encoder_of(inner: Any) -> Encoder | None:
    family = FAMILIES.get(inner.config.model_type)
    return None if family is None else family.encoder
