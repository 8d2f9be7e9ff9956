"""What in the structure of a model keeps its visual Keys from being compressed, whatever its family."""

import sys
from typing import Any

from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# Layers of a stock cache that stand beside those that are compressed, each with a state of its own kind.
STOCK_LAYERS = ("DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer")

_INDEXED = "sparse-indexed attention: an indexer with Keys of its own picks the tokens that each query sees"
_CROSS = "cross-attention layers: its images' Keys never stand in the prompt"

# Other layers, with what they keep beyond Keys and Values of all tokens.
OTHER_LAYERS = {
    "DynamicIndexedLayer": f"the Keys of {_INDEXED}",
    "LinearAttentionAndFullAttentionLayer": "a convolution's state beside the Keys and Values of the same layer",
}

# Settings of the text model, with what they bring that the compressed decode does not do. The first that is set counts.
SETTINGS = {
    "index_topk": _INDEXED,
    "kv_lora_rank": "multi-head latent attention (MLA): its layers cache one latent vector a token, low-rank already, "
    "from which the Keys of all heads are expanded, so there are no visual Keys of a head to compress",
    "cross_attention_layers": _CROSS,
    "add_cross_attention": _CROSS,
    "attn_logit_softcapping": "a softcap, which bends the logits of attention",
    "attention_sinks": "attention sinks, which take part in the softmax",
}


def obstacle(config: PreTrainedConfig) -> str:
    """Find what keeps the visual Keys of a model with this config from being compressed; "" if nothing does."""
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder or text.is_encoder_decoder:
        return (
            "it is an encoder-decoder: images are read by the encoder, and reach the decoder through cross-attention, "
            "whose Keys never stand in a prompt"
        )
    for name, what in SETTINGS.items():
        value = _setting(text, name)
        if value:
            return f"its text model sets {name}={value}, which brings {what}"
    kinds = [type(layer) for layer in DynamicCache(config=text).layers]
    others = sorted({kind.__name__ for kind in kinds if kind is not DynamicLayer} - set(STOCK_LAYERS))
    if others:
        what = OTHER_LAYERS.get(others[0], "something else than the Keys and Values of all tokens")
        return f"its layers are of kinds that keep {what} ({', '.join(others)})"
    if DynamicLayer not in kinds:
        window = _setting(text, "sliding_window")
        return (
            f"none of its layers sees the whole prompt (sliding_window={window}). If prompts and answers stay below "
            "that window, load it with config.text_config.sliding_window = None"
        )
    return ""


def obstacle_inside(model: PreTrainedModel) -> str:
    """Find what in the modules of a text model keeps it from reading compressed Keys; "" if nothing does.

    Args:
        model: a decoder whose config has no `obstacle`.
    """
    sinks = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "sinks"]
    if sinks:
        return f"its text model has attention sinks ({sinks[0]}), which take part in the softmax"
    # Those with an index of their layer use the cache; a vision encoder may stand below the decoder.
    kinds = {type(m) for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")}
    fixed = sorted(kind.__name__ for kind in kinds if not hasattr(sys.modules[kind.__module__], INTERFACE))
    if fixed:
        return f"{', '.join(fixed)} of its text model computes attention itself, without {INTERFACE} of transformers"
    return ""


INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # through which a module of transformers calls the function that was selected


def _setting(config: PreTrainedConfig, name: str) -> Any:
    """Read a setting of a text config; of one that differs by layer, the first value that is set."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # it differs
        values = (getattr(layer, name, None) for layer in config.per_layer_config)
        return next((value for value in values if value), None)
