"""Besides decoding: several queries a row, and the fit of a basis in a prefill. Used by `evals.bench.kernel`.

Queries: the kernel projects them and multiplies by coefficients, at 2 r + D products a query and token (the projected
query is two numbers of its dtype); a dense attention takes 2 D, besides rebuilding the Keys. So up to r = D / 2 nothing
is gained by rebuilding, whatever the number of queries; above, the measurement says from how many on.
"""

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from evals.bench.kernel_cuda import TOLERANCE, Clock, Setting, draw, ours_error, relative_error
from rotatek_cache.codecs.sealing import Sealer
from rotatek_cache.core.attention import reference_attention
from rotatek_cache.core.segments import SegmentView
from rotatek_cache.options import FitOptions
from rotatek_kernels.decode import decode_attention

INTERMEDIATE = 14336  # of the feed-forward network of a model of this width (Llama 3 8B, Mistral 7B)


def rebuilt_keys(segment: SegmentView) -> Tensor:
    """Rebuild dense Keys ``[B, H, T, D]`` of a segment whose rows are alike."""
    basis = segment.basis
    assert basis is not None
    rows = segment.keys.unflatten(1, (-1, segment.max_length))  # [H, B, T, r]
    return basis.reconstruct(rows.to(torch.float32)).to(segment.keys.dtype).transpose(0, 1)


def queries_row(setting: Setting, kind: str, queries: int, clock: Clock) -> dict[str, Any]:
    """Time some queries a row over visual tokens: the kernel, and dense attention with and without rebuilding."""
    scale = setting.width**-0.5
    _, (visual, _) = draw(setting, kind)
    query = torch.randn(
        setting.batch, setting.q_heads, queries, setting.width, dtype=setting.dtype, device=setting.device
    )
    error = ours_error(query, [visual], scale)
    if not error < TOLERANCE[setting.dtype]:
        raise SystemExit(
            f"no speed is reported: relative error {error:.3g} of {queries} queries of {kind} at {setting}"
        )
    values = visual.values.unflatten(1, (-1, visual.max_length)).transpose(0, 1)
    keys = rebuilt_keys(visual)
    attention = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=scale, enable_gqa=True)
    flash = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]

    def dense() -> Tensor:
        with sdpa_kernel(flash, set_priority=True):
            return attention(query, keys, values).transpose(1, 2)

    def rebuild() -> Tensor:
        with sdpa_kernel(flash, set_priority=True):
            return attention(query, rebuilt_keys(visual), values).transpose(1, 2)

    expected, _ = reference_attention(query[:1], [replace(visual, batched=False, **_first(visual))], scale)
    if not relative_error(rebuild()[:1], expected) < 4 * TOLERANCE[setting.dtype]:
        raise SystemExit(f"no speed is reported: attention over rebuilt Keys does not agree at {setting}")
    ours = clock.median_ms(functools.partial(decode_attention, query, [visual], scale))
    row = {
        "queries": queries,
        "kind": kind,
        "batch": setting.batch,
        "tokens": setting.tokens,
        "relative error": error,
        "kernel ms": ours,
        "dense ms": clock.median_ms(dense),
        "rebuild, then dense ms": clock.median_ms(rebuild),
    }
    print(
        f"{queries:4d} queries, batch {setting.batch}, {setting.tokens} tokens, {kind}: kernel {ours * 1e3:.1f} us, "
        f"dense {row['dense ms'] * 1e3:.1f}, Keys rebuilt {row['rebuild, then dense ms'] * 1e3:.1f}",
        flush=True,
    )
    return row


def _first(segment: SegmentView) -> dict[str, Tensor]:
    return {
        "starts": segment.starts[:1],
        "lengths": segment.lengths[:1],
        "basis_rows": torch.zeros_like(segment.starts[:1]),
    }


def fit_rows(setting: Setting, ranks: tuple[int, ...], clock: Clock) -> list[dict[str, Any]]:
    """Time the seal of one layer beside that of its prefill, with its parts; a SystemExit where the basis is bad."""
    hidden = setting.q_heads * setting.width
    draws = torch.Generator().manual_seed(setting.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws).to(setting.device, setting.dtype)

    spectrum = torch.logspace(0, -2, setting.width).to(setting.device, setting.dtype)
    keys = normal(setting.kv_heads, setting.tokens, setting.width) * spectrum
    window = normal(1, setting.q_heads, 32, setting.width)
    span = [(0, setting.tokens)]
    layer_ms = clock.median_ms(prefill_layer(setting, hidden))
    rows = []
    for rank in ranks:
        sealer = Sealer(FitOptions(rank=rank, basis="pca"), 0)
        weighted = Sealer(FitOptions(rank=rank), 0)
        stored = sealer.store_keys(keys, span, None, None)
        assert stored.basis is not None
        rest = relative_error(stored.basis.reconstruct(stored.data[:, None].float())[:, 0], keys)
        lost = float((spectrum[rank:].float().square().sum() / spectrum.float().square().sum()).sqrt())
        if not rest < 1.1 * lost + 1e-2:
            raise SystemExit(
                f"no speed is reported: the basis of rank {rank} loses {rest:.3g}, the spectrum {lost:.3g}"
            )
        fit_ms = clock.median_ms(functools.partial(weighted.store_keys, keys, span, window, None))
        rows.append(
            {
                "rank": rank,
                "tokens": setting.tokens,
                "seal ms": fit_ms,
                "prefill of a layer ms": layer_ms,
                "share": fit_ms / layer_ms,
            }
        )
        print(
            f"fit and encode, rank {rank}, {setting.tokens} tokens: {fit_ms * 1e3:.0f} us, "
            f"{fit_ms / layer_ms:.2%} of the prefill of a layer ({layer_ms:.2f} ms)",
            flush=True,
        )
    return rows


def prefill_layer(setting: Setting, hidden: int) -> Any:
    """Make a step that does the large products of one decoder layer's prefill, and its attention."""
    kv = setting.kv_heads * setting.width
    intermediate = INTERMEDIATE * hidden // 4096
    widths = {"qkv": (hidden, hidden + 2 * kv), "out": (hidden, hidden), "up": (hidden, 2 * intermediate)}
    widths["down"] = (intermediate, hidden)

    def weight(shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, dtype=setting.dtype, device=setting.device) / math.sqrt(shape[0])

    weights = {name: weight(shape) for name, shape in widths.items()}
    states = torch.randn(setting.tokens, hidden, dtype=setting.dtype, device=setting.device)

    def step() -> Tensor:
        q, k, v = (states @ weights["qkv"]).split([hidden, kv, kv], -1)
        q, k, v = (part.unflatten(-1, (-1, setting.width)).transpose(0, 1)[None] for part in (q, k, v))
        attention = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        mixed = attention[0].transpose(0, 1).flatten(1) @ weights["out"]
        gate, up = (mixed @ weights["up"]).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up) @ weights["down"]

    return step
