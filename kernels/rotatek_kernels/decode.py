"""Fused attention over segment views: plans and launches of the kernels (`attend_triton.py`, `merge_triton.py`)."""

import functools
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rotatek_cache.core.segments import SegmentView
from rotatek_kernels.attend_triton import attend_splits
from rotatek_kernels.checks import arguments_key, check_arguments, check_scale
from rotatek_kernels.forms import STATE_ALIGN, MergeArguments, SegmentArguments, encode_integer
from rotatek_kernels.merge_triton import merge_splits
from rotatek_kernels.shapes import BlockSizes, SegmentShape, Shapes, shapes_of

SEGMENTS_PER_LAUNCH = 8  # each is a branch of the kernel
TOKENS_PER_SPLIT = 256  # below this a split costs more than it brings: it projects the queries and merges a state
UNIT = STATE_ALIGN.value
REMEMBERED = 1024  # shapes
MAX_GRID = 65535  # programs along the second and third dimension of a grid
MAX_GROUP = 64  # query heads of a KV head


class Launch(NamedTuple):
    """A kernel with everything that its launch needs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


def decode_attention(query: Tensor, segments: Sequence[SegmentView], scale: float) -> tuple[Tensor, Tensor]:
    """`rotatek_cache.attend`, fused: one pass over what the segments store.

    A segment is read as it lies, coefficients as numbers or as codes; the queries are projected inside, and coded
    Values are summed as coefficients, which the merge rotates back once. The segments of a layer share a launch (up to
    `SEGMENTS_PER_LAUNCH` of them), whose partial states a second kernel merges. Nothing is read on the host, so that a
    step can be captured in a CUDA graph; a row whose length is negative counts as empty.

    Not gained: there is no backward, and float32 runs without tensor cores.

    Args:
        query: ``[B, H_q, Q, D]`` after RoPE; float16, bfloat16 or float32 on a GPU (on the CPU under
            ``TRITON_INTERPRET=1``).
        segments: views of what the cache stores: numbers in the query's dtype or packed codes, last dimensions
            contiguous; their KV heads divide ``H_q``. Masks are ``[B, Q, max_length]``. Ranks are multiples of 8.
        scale: factor on ``q . k``.

    Returns:
        Output ``[B, Q, H_q, D_v]`` in the query's dtype and natural log-sum-exp ``[B, H_q, Q]`` in float32. A query
        that sees no token has output 0 and log-sum-exp -inf.

    Raises:
        TypeError, ValueError: an argument is nothing that the kernel can read; nothing was launched then.
    """
    if isinstance(query, Tensor) and query.dim() and query.stride(-1) != 1:
        query = query.contiguous()
    shapes = _checked_shapes(query, segments, scale)
    launches, out, lse = plan(shapes, query, segments, scale, _processors(query.device))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(query):
        for launch in launches:
            launch.kernel[launch.grid](**launch.arguments, **launch.options)
    return out, lse


_REMEMBERED: dict[Hashable, Shapes] = {}
_FORCED: dict[None, BlockSizes] = {}


@contextmanager
def forced_sizes(sizes: BlockSizes) -> Iterator[None]:
    """Attend with these block sizes, whatever the table says (to compare them)."""
    _REMEMBERED.clear()
    _FORCED[None] = sizes
    try:
        yield
    finally:
        _FORCED.clear()
        _REMEMBERED.clear()


def _checked_shapes(query: Tensor, segments: Sequence[SegmentView], scale: float) -> Shapes:
    """`shapes_of` checked arguments. All that checks look at, but the scale, is in the key under which it is kept."""
    try:
        key = arguments_key(query, segments)
        shapes = _REMEMBERED.get(key)
    except (AttributeError, TypeError):
        key = shapes = None  # something is not of its type, which the checks will name
    if shapes is not None:
        check_scale(scale)
        return shapes
    check_arguments(query, segments, scale)
    _check_launch(query, segments[0].heads)
    shapes = shapes_of(query, segments, _FORCED.get(None))
    if key is not None:
        if len(_REMEMBERED) >= REMEMBERED:
            _REMEMBERED.clear()
        _REMEMBERED[key] = shapes
    return shapes


def _check_launch(query: Tensor, heads: int) -> None:
    """What Triton needs besides."""
    if query.device.type != "cuda" and isinstance(attend_splits, triton.runtime.JITFunction):
        raise ValueError(
            f"query must be on a GPU, got {query.device}; on the CPU use impl='cpp' or 'torch', or set "
            "TRITON_INTERPRET=1 before Triton is imported"
        )
    rows, q_heads = query.shape[:2]
    if rows > MAX_GRID or heads > MAX_GRID:
        raise ValueError(f"query must have at most {MAX_GRID} rows and KV heads, got {rows} and {heads}")
    if q_heads // heads > MAX_GROUP:
        raise ValueError(
            f"segments[0].keys must have at least one KV head for {MAX_GROUP} query heads, got {heads} for {q_heads}"
        )


def plan(
    shapes: Shapes, query: Tensor, segments: Sequence[SegmentView], scale: float, processors: int
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches that decode arguments of `shapes`, with output ``[B, Q, H_q, D_v]`` and lse ``[B, H_q, Q]``."""
    batch, q_heads, positions, _ = query.shape
    device, heads = query.device, shapes.heads
    states_of_split = batch * q_heads * positions
    splits = split_counts(
        [(segments[shape.order].max_length, shape.token_bytes) for shape in shapes.segments],
        shapes.programs * processors,
        batch * heads * shapes.tiles,
    )
    total_splits = sum(splits)
    attended, merged, first_split, first_state = [], [], 0, 0
    for shape, count in zip(shapes.segments, splits, strict=True):
        place = (2 * first_split + 3, 2 * count + 3, 2 * first_state + 3)  # `odd` numbers
        attended.append(_segment_arguments(segments[shape.order], shape, place))
        merged.append(_merge_arguments(segments[shape.order], shape, place))
        first_split += count
        first_state += -(-states_of_split * count * shape.form.state_width // UNIT)
    # One allocation for all that only the kernels see: the states, behind them their log-sum-exps.
    states = _empty((first_state * UNIT + states_of_split * total_splits,), torch.float32, device)
    out = _empty((batch, positions, q_heads, shapes.value_width), query.dtype, device)
    lse = _empty((batch, q_heads, positions), torch.float32, device)
    launches = []
    for start in range(0, len(attended), SEGMENTS_PER_LAUNCH):
        part = slice(start, start + SEGMENTS_PER_LAUNCH)
        programs, before = sum(splits[part]), sum(splits[:start])
        integers = (encode_integer(positions), encode_integer(total_splits), encode_integer(first_state), encode_integer(programs), encode_integer(before))
        arguments: dict[str, Any] = {
            "query": query,
            "states": states,
            "segments": tuple(attended[part]),
            "scale": float(scale),
            "integers": integers + shapes.query_strides,
            "FORMS": tuple([shape.form for shape in shapes.segments[part]]),
            **shapes.constants,
        }
        launches.append(Launch(attend_splits, (programs * shapes.tiles, heads, batch), arguments, shapes.options))
    merge: dict[str, Any] = {
        "states": states,
        "out": out,
        "lse": lse,
        "segments": tuple(merged),
        "integers": (encode_integer(positions), encode_integer(total_splits), encode_integer(first_state)),
        "FORMS": tuple([shape.merge_form for shape in shapes.segments]),
        **shapes.merge_constants,
    }
    blocks = -(-shapes.value_width // shapes.merge_constants["BLOCK_DV"])
    launches.append(Launch(merge_splits, (q_heads * positions, batch, blocks), merge, shapes.merge_options))
    return launches, out, lse


def split_counts(segments: Sequence[tuple[int, int]], programs: int, pairs: int) -> list[int]:
    """Number of programs that share each segment's tokens, per (row, KV head, tile of queries).

    Follows from numbers that the host knows: programs are dealt out by the bytes that the segments may hold.

    Args:
        segments: most tokens of a row and bytes of a token, for each segment.
        programs: wanted in all.
        pairs: of rows, KV heads and tiles.
    """
    wanted = -(-programs // pairs)
    total = sum(tokens * size for tokens, size in segments)
    return [
        max(1, min(round(wanted * tokens * size / total), -(-tokens // TOKENS_PER_SPLIT))) for tokens, size in segments
    ]


def _segment_arguments(segment: SegmentView, shape: SegmentShape, place: tuple[int, int, int]) -> SegmentArguments:
    mask, basis = segment.mask, segment.basis
    if mask is None:
        mask_strides = (3, 3)  # `odd` zeros
    else:
        mask_strides = (encode_integer(mask.stride(0)), encode_integer(mask.stride(1)))
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    starts, lengths, rows = segment.starts, segment.lengths, segment.basis_rows
    if not shape.packed_rows:
        starts, lengths, rows = starts.contiguous(), lengths.contiguous(), None if rows is None else rows.contiguous()
    decoder = None if basis is None else basis.B
    return SegmentArguments(
        segment.keys,
        segment.values,
        *shape.heads,
        segment.slots,
        starts,
        lengths,
        mask,
        decoder,
        None if basis is None or decoder is None else basis.delta,
        None if basis is None or decoder is None else basis.scale,
        None if decoder is None else rows,
        place,
        (2 * segment.max_length + 3, *mask_strides, *shape.strides),
        shape.basis_strides,
    )


def _merge_arguments(segment: SegmentView, shape: SegmentShape, place: tuple[int, int, int]) -> MergeArguments:
    basis = segment.value_basis
    if basis is None or basis.B is None:
        return MergeArguments(None, None, None, None, None, place, shape.merge_strides)
    rows = segment.basis_rows
    if rows is not None and not shape.packed_rows:
        rows = rows.contiguous()
    return MergeArguments(basis.B, basis.delta, basis.scale, rows, shape.heads[1], place, shape.merge_strides)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a small number for the interpreter, whose programs run one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
