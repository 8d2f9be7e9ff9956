"""Attention over segment views: the reference in torch, which is the specification, and the way to the kernels."""

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from rotatek_cache.core.basis import compute_dtype
from rotatek_cache.core.precision import without_autocast
from rotatek_cache.core.segments import SegmentView

Implementation = Literal["auto", "torch", "triton", "cpp"]

# The kernels are optional, and imported by name where they are dispatched to: the one arrow up.
KERNELS = {"triton": "rotatek_kernels.decode", "cpp": "rotatek_kernels.decode_cpu"}
OLDEST_TRITON = (3, 6)  # of those that the kernels were compiled with

# Up to so many queries per KV head, a CPU reads long Keys up to twice as fast where the Keys are the left factor.
FEW_QUERIES = 8

# Scores of one chunk of queries, in numbers: 256 MiB of float32.
MAX_SCORES = 1 << 26


class UnsupportedError(ValueError):
    """Arguments that the reference reads and a kernel does not."""


def attend(
    query: Tensor,
    segments: Sequence[SegmentView],
    scale: float,
    *,
    impl: Implementation = "auto",
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Compute softmax attention of `query` over all tokens of `segments`, decoded from their coefficients.

    Args:
        query: ``[B, H_q, Q, D]`` after RoPE.
        segments: views of what the cache stores; their KV heads divide ``H_q``.
        scale: factor on ``q . k``.
        impl: "torch" is the reference, "triton" the kernel on CUDA, "cpp" the one on CPUs (errors where they cannot
            run). "auto" is the kernel of the query's device if it can be had (on CUDA where Triton 3.6 or newer is
            installed, on CPUs where Linux has a C++ compiler) and reads all arguments. Else it is the reference.
        return_lse: whether the caller needs the log-sum-exp; None may stand in its place otherwise.

    Returns:
        Output ``[B, Q, H_q, D_v]`` in the query's dtype and natural log-sum-exp ``[B, H_q, Q]`` in float32 (float64
        for float64 queries). A query that sees no token has output 0 and log-sum-exp -inf. Of the implementations
        the reference alone is differentiable, and "auto" takes it where a gradient is required.
    """
    if impl not in ("auto", "torch", *KERNELS):
        raise ValueError(f"impl must be 'auto', 'torch', 'triton' or 'cpp', got {impl!r}")
    if any(segment.is_by_heads for segment in segments):
        return attend_by_heads(
            query, segments, functools.partial(attend, scale=scale, impl=impl, return_lse=return_lse)
        )
    chosen = (_kernel_for(query.device) or "torch") if impl == "auto" else impl
    if chosen != "torch":
        try:
            return importlib.import_module(KERNELS[chosen]).decode_attention(query, segments, scale)
        except UnsupportedError:
            if impl != "auto":
                raise
    return reference_attention(query, segments, scale, return_lse=return_lse)


def attend_by_heads(
    query: Tensor,
    segments: Sequence[SegmentView],
    attend_rows: Callable[[Tensor, Sequence[SegmentView]], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    """Attend where KV heads hold tokens of their own: as over ``H * B`` rows of one head, by `attend_rows`."""
    heads, batch = max(segment.head_rows for segment in segments), query.shape[0]
    folded = query.unflatten(1, (heads, -1)).transpose(0, 1).flatten(0, 1)  # [H * B, G, Q, D]
    # One row of one head each: nothing is left to fold, or to retrieve.
    views = [
        dataclasses.replace(segment.heads_as_rows().retrieved(folded), head_rows=1, chunks=None) for segment in segments
    ]
    out, lse = attend_rows(folded, views)
    out = out.unflatten(0, (heads, batch)).permute(1, 2, 0, 3, 4).flatten(2, 3)
    return out, None if lse is None else lse.unflatten(0, (heads, batch)).transpose(0, 1).flatten(1, 2)


def _kernel_for(device: torch.device) -> Implementation | None:
    """Name the kernel for tensors on `device`, if it can be had."""
    if device.type == "cuda":
        return "triton" if _triton_is_installed() else None
    return "cpp" if device.type == "cpu" and _cpp_is_compiled() else None


@functools.cache
def _triton_is_installed() -> bool:
    if any(importlib.util.find_spec(name) is None for name in ("triton", "rotatek_kernels")):
        return False
    version = importlib.metadata.version("triton").split(".")
    return (int(version[0]), int(version[1])) >= OLDEST_TRITON


@functools.cache
def _cpp_is_compiled() -> bool:
    if importlib.util.find_spec("rotatek_kernels") is None:
        return False
    return importlib.import_module("rotatek_kernels.cpu_library").load() is not None


@without_autocast
def reference_attention(
    query: Tensor, segments: Sequence[SegmentView], scale: float, *, return_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Do as `attend` does, in plain torch. Half-precision operands are computed in float32."""
    if any(segment.is_by_heads for segment in segments):
        attend_rows = functools.partial(reference_attention, scale=scale, return_lse=return_lse)
        return attend_by_heads(query, segments, attend_rows)
    queries = query.shape[2]
    total = max(1, sum(segment.max_length for segment in segments))
    chunk = max(1, MAX_SCORES // (query.shape[0] * query.shape[1] * total))
    parts = [
        _attend_chunk(query[:, :, i : i + chunk], segments, scale, slice(i, i + chunk), return_lse)
        for i in range(0, queries, chunk)
    ]
    if len(parts) == 1:
        return parts[0]
    lse = [part for _, part in parts if part is not None]
    return torch.cat([out for out, _ in parts], 1), torch.cat(lse, 2) if lse else None


def _attend_chunk(
    query: Tensor, segments: Sequence[SegmentView], scale: float, mask_rows: slice, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    batch, q_heads, queries, width = query.shape
    heads = segments[0].heads
    dtype = compute_dtype(query.dtype)
    # Heads first, rows second: then rows of equal length are one batched matmul on the storage as it lies.
    q = (query.to(dtype) * scale).reshape(batch, heads, -1, width).transpose(0, 1)  # [H, B, G * Q, D]
    scores = q.new_empty(*q.shape[:-1], sum(segment.max_length for segment in segments))
    start = 0
    for segment in segments:
        _score(q, segment, queries, mask_rows, scores[..., start : start + segment.max_length])
        start += segment.max_length
    lse = None
    if return_lse or any(segment.mask is not None or not segment.batched for segment in segments):
        lse = scores.logsumexp(-1)
        # Subtracting a finite number in place of -inf leaves rows without any token at weight zero, not NaN.
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp_()
    else:
        weights = scores.softmax(-1)
    out = None
    start = 0
    for segment in segments:
        part = _weighted_values(weights[..., start : start + segment.max_length], segment)
        out = part if out is None else out.add_(part)
        start += segment.max_length
    assert out is not None
    value_width = out.shape[-1]
    out = out.view(heads, batch, q_heads // heads, queries, value_width).permute(1, 3, 0, 2, 4)
    if lse is not None:
        lse = lse.view(heads, batch, q_heads // heads, queries).permute(1, 0, 2, 3).reshape(batch, q_heads, queries)
    return out.reshape(batch, queries, q_heads, value_width).to(query.dtype), lse


def _score(q: Tensor, segment: SegmentView, queries: int, mask_rows: slice, scores: Tensor) -> None:
    """Write the scaled logits of queries ``[H, B, G * Q, D]`` into `scores` ``[H, B, G * Q, max_length]``.

    They are -inf where nothing is to be seen.
    """
    basis = segment.basis
    shift = None
    if basis is not None and not basis.is_identity:
        basis = segment.basis_of_rows(basis)
        shift = basis.logit_shift(q)
        q = basis.project_query(q)
    if segment.batched:
        products = _products(q.flatten(0, 1), segment.batched_keys(q.dtype)).view_as(scores)
        if shift is None or products.requires_grad:  # an `out` takes no part in a gradient
            scores.copy_(products if shift is None else products + shift)
        else:
            torch.add(products, shift, out=scores)
    else:
        scores.fill_(-torch.inf)
        for row, (_, length) in enumerate(segment.row_ranges):
            if length:
                products = _products(q[:, row], segment.row_keys(row, q.dtype))
                scores[:, row, :, :length] = products if shift is None else products + shift[:, row]
    if segment.mask is not None:
        mask = segment.mask[:, mask_rows]  # [B, Q, max_length]
        per_query = scores.unflatten(2, (-1, queries))
        if mask.dtype == torch.bool:
            per_query.masked_fill_(~mask[:, None], -torch.inf)
        else:
            # The lowest finite number stands for "not seen" in such masks; a row of it must give nothing, not a sum.
            hidden = mask <= torch.finfo(mask.dtype).min / 2
            per_query += mask.masked_fill(hidden, -torch.inf)[:, None].to(scores.dtype)


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """Compute ``q . k`` of queries ``[n, M, w]`` and Keys ``[n, N, w]``: ``[n, M, N]``."""
    if queries.shape[1] <= FEW_QUERIES:
        return torch.bmm(keys, queries.mT).mT
    return torch.bmm(queries, keys.mT)


def _weighted_values(weights: Tensor, segment: SegmentView) -> Tensor:
    """Compute ``weights [H, B, G * Q, max_length]`` times the segment's Values: ``[H, B, G * Q, D_v]``.

    Coded Values are summed as coefficients; the sum is rotated back once.
    """
    heads, batch, grouped, _ = weights.shape
    if segment.batched:
        values = segment.batched_values(weights.dtype)
        out = torch.bmm(weights.flatten(0, 1), values).view(heads, batch, grouped, -1)
    else:
        width = segment.values.shape[-1] if segment.value_code is None else segment.value_code.channels
        out = weights.new_zeros(heads, batch, grouped, width)
        for row, (_, length) in enumerate(segment.row_ranges):
            if length:
                out[:, row] = torch.bmm(weights[:, row, :, :length], segment.row_values(row, weights.dtype))
    if segment.value_basis is None:
        return out
    basis = segment.basis_of_rows(segment.value_basis)
    out = basis.rotate_back(out)
    if basis.delta is not None:
        out += weights.sum(-1, keepdim=True) * basis.delta.to(out.dtype)[..., None, :]
    return out


def causal_mask(queries: int, tokens: int, device: torch.device) -> Tensor:
    """Make a bool ``[1, 1, Q, T]`` in which the last query sees all tokens and each earlier one a token less."""
    mask = torch.ones(queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)
    return mask[None, None]


def merge_state(states: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge the attention over a union of disjoint token sets from the states over each.

    Args:
        states: pairs of output ``[B, Q, H_q, D_v]`` and natural log-sum-exp ``[B, H_q, Q]``.

    Returns:
        The merged pair.
    """
    lse = torch.stack([state_lse for _, state_lse in states])
    merged = lse.logsumexp(0)
    weights = (lse - merged.masked_fill(merged == -torch.inf, 0.0)).exp()  # [n, B, H_q, Q]
    outputs = torch.stack([output for output, _ in states])
    out = (outputs.to(weights.dtype) * weights.transpose(2, 3)[..., None]).sum(0)
    return out.to(outputs.dtype), merged
