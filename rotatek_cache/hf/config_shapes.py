"""What a model's config tells of the Keys and Values that it is going to cache."""

from dataclasses import dataclass

import torch
from transformers import AutoModel, CacheLayerMixin, DynamicCache, PreTrainedConfig

from rotatek_cache.hf.calls import cache_argument

META = torch.device("meta")


@dataclass(frozen=True)
class StateShape:
    """The shape of what a layer caches of a token: query heads, KV heads, width of Keys and of Values."""

    query_heads: int
    heads: int
    width: int
    value_width: int


def kv_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Read KV heads and head width off a config."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def probe(config: PreTrainedConfig, rows: int, dtype: torch.dtype) -> DynamicCache:
    """Let the text model of a config read two tokens, all on shapes alone, and return what it caches of them.

    Its MLPs are left out: they cache nothing, and a mixture of experts has to know the numbers.

    Raises:
        ValueError: transformers has no such text model, or it cannot be run so.
    """
    text = config.get_text_config(decoder=True)
    try:
        with META:
            model = AutoModel.from_config(text, dtype=dtype)
        for module in model.modules():
            if hasattr(module, "mlp"):
                module.mlp = torch.nn.Identity()
        cache = DynamicCache(config=text)
        with torch.no_grad():
            model(input_ids=torch.zeros(rows, 2, dtype=torch.int64, device=META), **cache_argument(model, cache))
    except (ValueError, RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        raise ValueError(
            f"the text model of '{config.model_type}' cannot be run on shapes alone ({error}): run a prompt and read "
            "cache.nbytes()"
        ) from error
    return cache


def state_shapes(config: PreTrainedConfig, probed: DynamicCache) -> list[StateShape | None]:
    """List the shapes of a model's layers from what it has cached; None is a layer whose state does not grow."""
    heads = config.get_text_config(decoder=True).num_attention_heads
    return [
        StateShape(heads, layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        if isinstance(layer, CacheLayerMixin)
        else None
        for layer in probed.layers
    ]


def dtype_of(config: PreTrainedConfig, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype that `from_pretrained` loads a model with, where none is given."""
    if dtype is not None:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype of torch, got {dtype!r}")
        return dtype
    text = config.get_text_config(decoder=True)
    return getattr(text, "dtype", None) or getattr(config, "dtype", None) or torch.get_default_dtype()
