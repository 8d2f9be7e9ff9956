"""What of a loaded model cannot be served, and whether a basis file belongs to it."""

import logging
import sys

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from rotatek_cache.codecs.basis_file import load_basis
from rotatek_cache.codecs.fingerprint import sample_weight
from rotatek_cache.options import FitOptions
from rotatek_sglang.layout import HeadShape

log = logging.getLogger(__name__)

REFUSED_ATTENTION = {
    "sliding-window layers": lambda layer: layer.sliding_window_size > 0,
    "softcapped logits": lambda layer: layer.logit_cap > 0,
    "cross-attention layers": lambda layer: layer.is_cross_attention,
    "attention that is not causal": lambda layer: layer.attn_type != AttentionType.DECODER,
    "a temperature that grows with the length": lambda layer: layer.xai_temperature_len > 0,
}

WHY = {"sliding-window layers": ("SGLang gives them a pool and slots of their own, which this backend does not read",)}


def check_model(model: torch.nn.Module, on_gpu: bool) -> None:
    """Raise a ValueError that names what the model has and the backend does not do."""
    name = type(model).__name__
    layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
    for what, has in REFUSED_ATTENTION.items():
        if any(has(layer) for layer in layers):
            raise ValueError(
                ": ".join([f"rotatek_sglang does not serve models with {what} ({name})", *WHY.get(what, ())])
            )
    # Those that ask `enable_fused_set_kv_buffer` first are told no (see `plugin.register`).
    sources = [sys.modules[type(module).__module__] for module in model.modules()]
    writers = [source for source in sources if hasattr(source, "create_fused_set_kv_buffer_arg")]
    if on_gpu and not all(hasattr(source, "enable_fused_set_kv_buffer") for source in writers):
        raise ValueError(f"rotatek_sglang does not serve models that write into the KV pool themselves ({name})")


def check_basis(fit: FitOptions, model: torch.nn.Module, heads: HeadShape) -> None:
    """Raise a ValueError if the basis file, where there is one, was calibrated on another model.

    A fingerprint holds some of the Key and Value weights, in the order of their names, as the calibration saw them. Of
    a model that is shared between processes each has the rows of some heads, and checks those.
    """
    if not fit.is_calibrated:
        return
    reason = (
        f"The weights cannot be updated: the basis {fit.basis} was calibrated on those that are served. Calibrate one "
        "on the new weights and start a server with both, or serve without a calibrated basis."
    )
    # SGLang's name for what forbids other weights, however they come.
    model._derived_weight_cache_error = reason  # type: ignore[assignment]  # noqa: SLF001
    samples = {}
    for module in model.modules():
        attention, fused = getattr(module, "attn", None), getattr(module, "qkv_proj", None)
        if not isinstance(attention, RadixAttention) or fused is None:
            continue
        weight = fused.weight
        widths = [
            attention.tp_q_head_num * attention.qk_head_dim,
            attention.tp_k_head_num * attention.qk_head_dim,
            attention.tp_v_head_num * attention.v_head_dim,
        ]
        if not weight.is_floating_point() or weight.shape[0] != sum(widths):
            log.warning("The model's weights are quantised: it is not checked that %s belongs to it", fit.basis)
            return
        _, keys, values = weight.split(widths)
        for name, part in (("k_proj", keys), ("v_proj", values)):
            one_head = part.numel() // heads.kv_heads
            sample = sample_weight(
                part, heads.first_kv_head * one_head, (heads.all_kv_heads or heads.kv_heads) * one_head
            )
            samples[f"layers.{attention.layer_id}.{name}.weight"] = sample
    ordered = [samples[name] for name in sorted(samples)]
    load_basis(fit.basis).check_model(
        torch.cat(ordered) if ordered else torch.zeros(0, dtype=torch.float32, device="cpu")
    )
