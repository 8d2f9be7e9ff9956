"""Fused decode attention over segment views: checks, grids and launches. The kernel text is in `decode_triton.py`."""

import functools
import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rotatek_cache.basis import RANK_MULTIPLE
from rotatek_cache.segments import SegmentView
from rotatek_kernels.decode_triton import decode_splits, merge_splits

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Not tuned on hardware yet; chosen so that tiles fit into shared memory and no register spills on sm_80 to sm_100.
PROGRAMS_PER_PROCESSOR = 6  # two waves of the three programs that one processor holds
TOKENS_PER_SPLIT = 256  # below this a split costs more than it brings: it writes and merges G x D_v numbers
TILE_BYTES = 32 * 1024  # Keys and Values of one block of tokens
MAX_GRID = 65535


class Launch(NamedTuple):
    """A kernel with everything that its launch needs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


def decode_attention(query: Tensor, segments: Sequence[SegmentView], scale: float) -> tuple[Tensor, Tensor]:
    """`rotatek_cache.attention.attend` for single queries, fused: one pass over what the segments store.

    A compressed segment is read as it lies, r numbers a Key; the query is projected inside. Segments are paired, a
    compressed with a dense one, into one launch a pair, whose partial states a second kernel merges. Nothing is read
    on the host, so that a step can be captured in a CUDA graph; a row whose length is negative counts as empty.

    Not gained: there is no backward, and float32 runs without tensor cores.

    Args:
        query: ``[B, H_q, 1, D]`` after RoPE; float16, bfloat16 or float32 on a GPU (on the CPU under
            ``TRITON_INTERPRET=1``).
        segments: views of what the cache stores, in the query's dtype, last dimensions contiguous; their KV heads
            divide ``H_q``. Masks are ``[B, 1, max_length]``. Ranks are multiples of 8.
        scale: factor on ``q . k``.

    Returns:
        Output ``[B, 1, H_q, D_v]`` in the query's dtype and natural log-sum-exp ``[B, H_q, 1]`` in float32. A query
        that sees no token has output 0 and log-sum-exp -inf.
    """
    check_arguments(query, segments, scale)
    launches, out, lse = plan(query, segments, scale, _processors(query.device))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(query):
        for launch in launches:
            launch.kernel[launch.grid](**launch.arguments, **launch.options)
    return out[:, None], lse[..., None]


def plan(
    query: Tensor, segments: Sequence[SegmentView], scale: float, processors: int
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches that decode checked arguments, with output ``[B, H_q, D_v]`` and lse ``[B, H_q]`` that they fill."""
    batch, q_heads, _, width = query.shape
    heads, _, value_width = segments[0].values.shape
    group = q_heads // heads
    if query.stride(-1) != 1:
        query = query.contiguous()

    segments = [segment for segment in segments if segment.max_length]
    splits = split_counts(segments, batch * heads, processors)
    total_splits = sum(splits)
    out = _empty((batch, q_heads, value_width), query.dtype, query.device)
    lse = _empty((batch, q_heads), torch.float32, query.device)
    split_out = _empty((batch, heads, total_splits, group, value_width), torch.float32, query.device)
    split_lse = _empty((batch, heads, total_splits, group), torch.float32, query.device)

    # float32 tiles are multiplied without tensor cores, by code that needs twice the registers.
    options = {"num_warps": 8 if query.dtype == torch.float32 else 4, "num_stages": 3, "enable_fp_fusion": True}
    counted = list(zip(segments, splits, strict=True))
    compressed = [(segment, count) for segment, count in counted if _is_compressed(segment)]
    dense = [(segment, count) for segment, count in counted if not _is_compressed(segment)]
    launches = []
    first_split = 0
    pairs = zip_longest(compressed, dense, fillvalue=(None, 0))
    for (compressed_segment, compressed_splits), (dense_segment, dense_splits) in pairs:
        block_n = _block_tokens(query.dtype, max(width, value_width))
        arguments: dict[str, Any] = {
            "query": query,
            "split_out": split_out,
            "split_lse": split_lse,
            **_segment_arguments("compressed", compressed_segment),
            **_basis_arguments(compressed_segment),
            **_segment_arguments("dense", dense_segment),
            "scale": float(scale),
            "compressed_splits": compressed_splits,
            "dense_splits": dense_splits,
            "first_split": first_split,
            "total_splits": total_splits,
            "query_row_stride": query.stride(0),
            "query_head_stride": query.stride(1),
            "G": group,
            "D": width,
            "D_V": value_width,
            "BLOCK_G": _block(group),
            "BLOCK_D": _block(width),
            "BLOCK_DV": _block(value_width),
            "BLOCK_N": block_n,
        }
        arguments["BLOCK_R"] = _block(arguments["RANK"])
        _count_head_strides_in_vectors(arguments)
        grid = (compressed_splits + dense_splits, heads, batch)
        launches.append(Launch(decode_splits, grid, arguments, options))
        first_split += compressed_splits + dense_splits
    merge = {
        "split_out": split_out,
        "split_lse": split_lse,
        "out": out,
        "lse": lse,
        "total_splits": total_splits,
        "G": group,
        "D_V": value_width,
        "BLOCK_DV": _block(value_width),
        "BLOCK_S": 16,
    }
    launches.append(Launch(merge_splits, (q_heads, batch), merge, {**options, "num_warps": 2}))
    return launches, out, lse


def split_counts(segments: Sequence[SegmentView], pairs: int, processors: int) -> list[int]:
    """Number of programs that share each segment's tokens, per (row, KV head) of which there are `pairs`.

    Follows from numbers that the host knows: programs are dealt out by the bytes that the segments may hold.
    """
    per_pair = -(-PROGRAMS_PER_PROCESSOR * processors // pairs)
    numbers = [segment.max_length * (segment.keys.shape[-1] + segment.values.shape[-1]) for segment in segments]
    return [
        max(1, min(round(per_pair * number / sum(numbers)), -(-segment.max_length // TOKENS_PER_SPLIT)))
        for segment, number in zip(segments, numbers, strict=True)
    ]


def check_arguments(query: Tensor, segments: Sequence[SegmentView], scale: float) -> None:
    """Raise TypeError or ValueError, naming the argument, for what the kernel cannot read; nothing is synchronised."""
    _check_tensor("query", query, query)
    if query.dtype not in DTYPES:
        raise TypeError(f"query must be float16, bfloat16 or float32, got {query.dtype}")
    if query.dim() != 4 or 0 in query.shape:
        raise ValueError(f"query must be [B, H_q, 1, D], none of them 0, got shape {tuple(query.shape)}")
    if query.shape[2] != 1:
        raise ValueError(
            f"query must hold one position a row, got {query.shape[2]}: the kernel decodes; use impl='torch' for more"
        )
    if query.shape[0] > MAX_GRID:
        raise ValueError(f"query must have at most {MAX_GRID} rows, got {query.shape[0]}")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if isinstance(segments, SegmentView) or not isinstance(segments, Sequence):
        raise TypeError(f"segments must be a sequence of SegmentView, got {type(segments).__name__}")
    if not segments:
        raise ValueError("segments must hold at least one segment, got none")
    for index, segment in enumerate(segments):
        if not isinstance(segment, SegmentView):
            raise TypeError(f"segments[{index}] must be a SegmentView, got {type(segment).__name__}")
        _check_segment(f"segments[{index}]", segment, query, segments[0])
    if query.device.type != "cuda" and isinstance(decode_splits, triton.runtime.JITFunction):
        raise ValueError(
            f"query must be on a GPU, got {query.device}; on the CPU use impl='torch', or set TRITON_INTERPRET=1 "
            "before Triton is imported"
        )


def _check_segment(name: str, segment: SegmentView, query: Tensor, first: SegmentView) -> None:
    if segment.is_coded:
        raise ValueError(
            f"{name} holds integer codes or coded Values, which this kernel does not read: use impl='torch'"
        )
    if segment.slots is not None:
        raise ValueError(f"{name}.slots scatter its tokens, which this kernel does not read: use impl='torch'")
    batch, q_heads = query.shape[:2]
    for field in ("keys", "values"):
        tensor = getattr(segment, field)
        _check_tensor(f"{name}.{field}", tensor, query)
        if tensor.dim() != 3:
            raise ValueError(f"{name}.{field} must be [H, N, width], got shape {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}.{field} must have the query's dtype {query.dtype}, got {tensor.dtype}")
        _check_contiguous_rows(f"{name}.{field}", tensor)
    heads = segment.keys.shape[0]
    if heads == 0 or q_heads % heads or heads != first.keys.shape[0]:
        raise ValueError(
            f"{name}.keys must have KV heads that divide the query's {q_heads} and are those of segments[0] "
            f"({first.keys.shape[0]}), got {heads}"
        )
    if segment.values.shape[:2] != segment.keys.shape[:2]:
        raise ValueError(
            f"{name}.values must have the heads and tokens of its keys {tuple(segment.keys.shape[:2])}, "
            f"got {tuple(segment.values.shape[:2])}"
        )
    if segment.values.shape[-1] != first.values.shape[-1] or segment.values.shape[-1] == 0:
        raise ValueError(
            f"{name}.values must be as wide as those of segments[0] ({first.values.shape[-1]}), not 0, "
            f"got {segment.values.shape[-1]}"
        )
    for field in ("starts", "lengths"):
        _check_index(f"{name}.{field}", getattr(segment, field), query)
    if isinstance(segment.max_length, bool) or not isinstance(segment.max_length, int):
        raise TypeError(f"{name}.max_length must be an int, got {type(segment.max_length).__name__}")
    if not 0 <= segment.max_length < 2**31:
        raise ValueError(f"{name}.max_length must be in [0, 2**31), got {segment.max_length}")
    if segment.mask is not None:
        _check_tensor(f"{name}.mask", segment.mask, query)
        if segment.mask.dtype != torch.bool and not segment.mask.is_floating_point():
            raise TypeError(f"{name}.mask must be bool or floating point, got {segment.mask.dtype}")
        expected = (batch, 1, segment.max_length)
        if segment.mask.shape != expected:
            raise ValueError(f"{name}.mask must have shape {expected}, got {tuple(segment.mask.shape)}")
    _check_basis(name, segment, query)


def _check_basis(name: str, segment: SegmentView, query: Tensor) -> None:
    batch, _, _, width = query.shape
    heads, _, key_width = segment.keys.shape
    basis = segment.basis
    if basis is None or basis.is_identity:
        if key_width != width:
            raise ValueError(f"{name}.keys must be as wide as the query ({width}) without a basis, got {key_width}")
        return
    decoder = basis.B
    assert decoder is not None  # or it would be the identity
    _check_tensor(f"{name}.basis.B", decoder, query)
    if decoder.dim() != 4 or (decoder.shape[0], *decoder.shape[2:]) != (heads, width, key_width):
        raise ValueError(
            f"{name}.basis.B must be [H, R, D, r] with H {heads}, D {width} and r {key_width}, "
            f"got shape {tuple(decoder.shape)}"
        )
    if key_width == 0 or key_width % RANK_MULTIPLE:
        raise ValueError(
            f"{name}.keys must have a rank that is a multiple of {RANK_MULTIPLE}, got {key_width}; pad it with zeros"
        )
    _check_contiguous_rows(f"{name}.basis.B", decoder)
    if basis.delta is not None:
        _check_tensor(f"{name}.basis.delta", basis.delta, query)
        if basis.delta.shape != decoder.shape[:3]:
            raise ValueError(
                f"{name}.basis.delta must have shape {tuple(decoder.shape[:3])}, got {tuple(basis.delta.shape)}"
            )
        _check_contiguous_rows(f"{name}.basis.delta", basis.delta)
    for field, tensor in (("B", decoder), ("delta", basis.delta)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"{name}.basis.{field} must be float16, bfloat16 or float32, got {tensor.dtype}")
    if segment.basis_rows is not None:
        _check_index(f"{name}.basis_rows", segment.basis_rows, query)
    elif decoder.shape[1] < batch:
        raise ValueError(
            f"{name}.basis_rows must say which of the basis' {decoder.shape[1]} rows the {batch} rows use, got None"
        )


def _check_tensor(name: str, tensor: Any, query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on the query's device {query.device}, got {tensor.device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require a gradient: the kernel has no backward; use impl='torch'")


def _check_contiguous_rows(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")


def _check_index(name: str, tensor: Any, query: Tensor) -> None:
    _check_tensor(name, tensor, query)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
    if tensor.shape != query.shape[:1]:
        raise ValueError(f"{name} must have shape ({query.shape[0]},), got {tuple(tensor.shape)}")


def _is_compressed(segment: SegmentView) -> bool:
    return segment.basis is not None and not segment.basis.is_identity


def _segment_arguments(kind: str, segment: SegmentView | None) -> dict[str, Any]:
    """The arguments of `decode_splits` about what segment `kind` stores; None and 0 where there is none."""
    keys = values = starts = lengths = mask = None
    if segment is not None:
        keys, values = segment.keys, segment.values
        starts, lengths = segment.starts.contiguous(), segment.lengths.contiguous()
        if segment.mask is not None:
            mask = segment.mask[:, 0]
    is_bool = mask is not None and mask.dtype == torch.bool
    return {
        f"{kind}_keys": keys,
        f"{kind}_values": values,
        f"{kind}_starts": starts,
        f"{kind}_lengths": lengths,
        f"{kind}_mask": mask.view(torch.uint8) if mask is not None and is_bool else mask,
        f"{kind}_max_length": 0 if segment is None else segment.max_length,
        f"{kind}_key_head_stride": 0 if keys is None else keys.stride(0),
        f"{kind}_value_head_stride": 0 if values is None else values.stride(0),
        f"{kind}_mask_row_stride": 0 if mask is None else mask.stride(0),
        f"{kind}_mask_stride": 0 if mask is None else mask.stride(1),
        f"{kind.upper()}_KEY_STRIDE": _token_stride(keys),
        f"{kind.upper()}_VALUE_STRIDE": _token_stride(values),
        f"{kind.upper()}_BOOL_MASK": is_bool,
    }


def _basis_arguments(segment: SegmentView | None) -> dict[str, Any]:
    """The arguments of `decode_splits` about a compressed segment's basis."""
    basis = None if segment is None else segment.basis
    decoder = None if basis is None else basis.B
    delta = None if basis is None else basis.delta
    rows = None if segment is None or segment.basis_rows is None else segment.basis_rows.contiguous()
    return {
        "decoder": decoder,
        "delta": delta,
        "basis_rows": rows,
        "decoder_head_stride": 0 if decoder is None else decoder.stride(0),
        "decoder_row_stride": 0 if decoder is None else decoder.stride(1),
        "decoder_stride": 0 if decoder is None else decoder.stride(2),
        "delta_head_stride": 0 if delta is None else delta.stride(0),
        "delta_row_stride": 0 if delta is None else delta.stride(1),
        "RANK": 0 if decoder is None else decoder.shape[-1],
    }


def _token_stride(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    # torch leaves the stride of a dimension of one token arbitrary, and each new one would be a new kernel.
    return tensor.stride(1) if tensor.shape[1] > 1 else tensor.shape[2]


def _count_head_strides_in_vectors(arguments: dict[str, Any]) -> None:
    """Divide the head strides of stored tokens by ALIGN, the largest power of two up to 8 that divides all strides."""
    head_strides = [f"{kind}_{what}_head_stride" for kind in ("compressed", "dense") for what in ("key", "value")]
    token_strides = [f"{kind}_{what}_STRIDE" for kind in ("COMPRESSED", "DENSE") for what in ("KEY", "VALUE")]
    align = math.gcd(RANK_MULTIPLE, *(arguments[name] for name in head_strides + token_strides))
    arguments["ALIGN"] = align
    for name in head_strides:
        arguments[name] //= align


def _block(size: int) -> int:
    """The power of two, at least the 16 of a matrix product, that holds `size`."""
    return max(16, 1 << (size - 1).bit_length()) if size else 16


def _block_tokens(dtype: torch.dtype, width: int) -> int:
    """Tokens of a block, 16 to 64: their dense Keys and Values, each `width` channels, fit into TILE_BYTES."""
    fitting = TILE_BYTES // (2 * _block(width) * dtype.itemsize)
    return min(64, max(16, fitting))


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a small number for the interpreter, whose programs run one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
