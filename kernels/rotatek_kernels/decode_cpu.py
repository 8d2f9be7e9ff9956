"""Fused attention over segment views on a CPU: what `cpu/attend.cpp` is told of its arguments."""

import functools
import struct
from array import array
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.quantization import Code, CodeLayout, HeadCodes, Numbers
from rotatek_cache.core.segments import SegmentView
from rotatek_kernels import cpu_library
from rotatek_kernels.checks import arguments_key, check_arguments, check_scale

# `Type` of cpu/numbers.h: its numbers are the places in this list.
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float64,
)
TYPES = {dtype: place for place, dtype in enumerate(DTYPES)}
REMEMBERED = 1024  # arguments that were found right


def decode_attention(query: Tensor, segments: Sequence[SegmentView], scale: float) -> tuple[Tensor, Tensor]:
    """`rotatek_cache.attend`, fused: one pass over what the segments store, in compiled C++.

    Numbers and codes are read as they lie, pools by their slots; sums are in float32. It runs on as many threads as
    torch does. There is no backward.

    Args:
        query: ``[B, H_q, Q, D]`` after RoPE on the CPU; float16, bfloat16 or float32.
        segments: views of what the cache stores: numbers in the query's dtype or packed codes, last dimensions
            contiguous; their KV heads divide ``H_q``. Masks are ``[B, Q, max_length]``. Ranks are multiples of 8.
        scale: factor on ``q . k``.

    Returns:
        Output ``[B, Q, H_q, D_v]`` in the query's dtype and natural log-sum-exp ``[B, H_q, Q]`` in float32. A query
        that sees no token has output 0 and log-sum-exp -inf.

    Raises:
        TypeError, ValueError: an argument is nothing that the kernel can read; a row with tokens has some, or a basis,
            outside of what is stored.
        RuntimeError: the kernel cannot be compiled here.
    """
    if isinstance(query, Tensor) and query.dim() and query.stride(-1) != 1:
        query = query.contiguous()
    _check(query, segments, scale)
    library = cpu_library.load()
    if library is None:
        raise RuntimeError("impl='cpp' needs a C++ compiler that works, on Linux; use impl='torch'")
    batch, q_heads, queries, width = query.shape
    heads, value_width = segments[0].heads, segments[0].value_width
    out = _empty((batch, queries, q_heads, value_width), query.dtype)
    lse = _empty((batch, q_heads, queries), torch.float32)
    words = [query.data_ptr(), TYPES[query.dtype], batch, heads, q_heads // heads, queries, width, value_width]
    words += [*query.stride()[:3], out.data_ptr(), lse.data_ptr(), torch.get_num_threads(), len(segments)]
    for segment in segments:
        words += _segment(segment)
    described = array("q", words)
    outside = library.rotatek_attend(described.buffer_info()[0], float(scale))
    if outside:
        index, row = divmod(outside // 4, batch)
        raise _outside(segments, index, row, outside % 4)
    return out, lse


def _outside(segments: Sequence[SegmentView], index: int, row: int, what: int) -> ValueError:
    """What to say of a row for which `Outside` of cpu/storage.h is `what`."""
    segment = segments[index]
    name, start, length = f"segments[{index}]", int(segment.starts[row]), int(segment.lengths[row])
    if what == 1:
        said = "starts and lengths must stay within its " + ("tokens" if segment.slots is None else "slots of a row")
        return ValueError(f"{name}.{said}, which are {_columns(segment)}, got {start} and {length} in row {row}")
    if what == 2:
        assert segment.slots is not None
        slots = segment.slots[row, start : start + min(length, segment.max_length)]
        got = f"{int(slots.min())} to {int(slots.max())}"
        return ValueError(f"{name}.slots must be of its tokens, [0, {_tokens(segment)}), got {got} in row {row}")
    assert segment.basis_rows is not None
    bases = min(one.B.shape[1] for one in (segment.basis, segment.value_basis) if one is not None and one.B is not None)
    got = f"{int(segment.basis_rows[row])}"
    return ValueError(f"{name}.basis_rows must be rows of its bases, [0, {bases}), got {got} in row {row}")


def _tokens(segment: SegmentView) -> int:
    """How many the segment has room for."""
    code = segment.key_code
    return segment.keys.numel() // sum(code.widths) if isinstance(code, HeadCodes) else segment.keys.shape[1]


def _columns(segment: SegmentView) -> int:
    """What starts and lengths have to stay within."""
    return _tokens(segment) if segment.slots is None else segment.slots.shape[1]


_FOUND_RIGHT: set[Hashable] = set()


def _check(query: Tensor, segments: Sequence[SegmentView], scale: float) -> None:
    try:
        key = arguments_key(query, segments)
        known = key in _FOUND_RIGHT
    except (AttributeError, TypeError):
        key, known = None, False  # something is not of its type, which the checks will name
    if known:
        check_scale(scale)
        return
    check_arguments(query, segments, scale)
    if query.device.type != "cpu":
        raise ValueError(f"query must be on the CPU, got {query.device}")
    if len(_FOUND_RIGHT) >= REMEMBERED:
        _FOUND_RIGHT.clear()
    _FOUND_RIGHT.add(key)


def _segment(segment: SegmentView) -> list[int]:
    """What `Segment` of cpu/storage.h reads, in its order."""
    mask = segment.mask
    words = _rows(segment.keys, segment.key_code, segment.basis)
    words += _rows(segment.values, segment.value_code, segment.value_basis)
    for vector in (segment.starts, segment.lengths, segment.basis_rows, segment.slots):
        words += (0, 0, 0) if vector is None else (vector.data_ptr(), TYPES[vector.dtype], vector.stride(0))
    words += (_columns(segment), segment.max_length)
    if mask is None:
        words += (0, 0, 0, 0, 0, 0)
    else:
        words += (mask.data_ptr(), TYPES[mask.dtype], *mask.stride(), _hidden(mask.dtype))
    return words


def _rows(stored: Tensor, code: Code | None, basis: KeyBasis | None) -> list[int]:
    """What `Rows` of cpu/storage.h reads, in its order."""
    assert code is None or isinstance(code, CodeLayout | HeadCodes)  # as checked
    if isinstance(code, HeadCodes):  # heads one after the other, whose strides follow from their widths
        place = (0, code.widths[0], stored.numel() // sum(code.widths))
    else:
        place = (stored.stride(0), stored.stride(1), stored.shape[1])
    words = [stored.data_ptr(), TYPES[stored.dtype], *place, *_table(code or Numbers(stored.shape[-1]))]
    for tensor in (None, None, None) if basis is None or basis.B is None else (basis.B, basis.delta, basis.scale):
        if tensor is None:
            words += (0, 0, -1, 0, 0, 0)
        else:
            line = tensor.stride(2) if tensor.dim() == 4 else 0
            words += (tensor.data_ptr(), TYPES[tensor.dtype], tensor.shape[1], *tensor.stride()[:2], line)
    return words


@functools.cache
def _table(code: CodeLayout | HeadCodes | Numbers) -> tuple[int, ...]:
    """How the heads store a token: what `Rows::table` of cpu/storage.h reads."""
    parts = code.parts if isinstance(code, HeadCodes) else (code,)
    words, before = [len(parts)], 0
    for part in parts:
        blocks = part.blocks if isinstance(part, CodeLayout) else ()
        words += (part.token_width, before, part.channels, len(blocks))
        offset = channel = 0
        for bits, channels in blocks:
            size = channels * bits // 8
            words += (bits, size, offset, channel)
            offset += size
            channel += channels
        before += part.token_width
    return tuple(words)


@functools.cache
def _hidden(dtype: torch.dtype) -> int:
    """The bits of the number up to which a mask hides, as in `reference_attention`."""
    bound = 0.0 if dtype == torch.bool else torch.finfo(dtype).min / 2
    return struct.unpack("q", struct.pack("d", bound))[0]


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)
