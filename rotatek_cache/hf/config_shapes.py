"""The shapes of Keys and Values that a model's config tells."""

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def state_shapes(config: PreTrainedConfig) -> list[tuple[int, int, int]]:
    """Read off a config, for each layer: query heads, KV heads, head width."""
    text = config.get_text_config(decoder=True)
    for layer in DynamicCache(config=text).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise NotImplementedError(
                f"'{config.model_type}' has cache layers of the kind {type(layer).__name__}, whose state has a shape "
                "that its config does not tell: run a prompt and read cache.nbytes()"
            )
    count = text.num_hidden_layers
    return [(text.num_attention_heads, *kv_shape(config)) for _ in range(count)]


def kv_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Read KV heads and head width off a config."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def dtype_of(config: PreTrainedConfig, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype that `from_pretrained` loads a model with, where none is given."""
    if dtype is not None:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype of torch, got {dtype!r}")
        return dtype
    text = config.get_text_config(decoder=True)
    return getattr(text, "dtype", None) or getattr(config, "dtype", None) or torch.get_default_dtype()
