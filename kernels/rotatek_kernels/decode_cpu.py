"""Fused attention over segment views on a CPU: checks, and what `cpu/attend.cpp` is told of its arguments."""

import functools
import struct
from array import array
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from rotatek_cache.core.attention import UnsupportedError
from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.quantization import Code, CodeLayout, HeadCodes, Numbers
from rotatek_cache.core.segments import SegmentView
from rotatek_kernels import checks, cpu_library
from rotatek_kernels.checks import arguments_key, check_arguments, check_scale
from rotatek_kernels.cpu_layout import (
    TYPES,
    Address,
    Block,
    Double,
    Form,
    Matrix,
    Problem,
    Segment,
    Stored,
    Vector,
    packed,
)

NO_VECTOR = Vector(0, 0, 0)
NO_MATRIX = Matrix(0, 0, -1, 0, 0, 0)
REMEMBERED = 1024  # arguments that were checked


def decode_attention(query: Tensor, segments: Sequence[SegmentView], scale: float) -> tuple[Tensor, Tensor]:
    """Attend as `rotatek_cache.attend` does, fused: one pass over what the segments store, in compiled C++.

    Numbers and codes are read as they lie, pools by their slots; sums are in float32. It runs on as many threads as
    torch does, in a forked process on one. There is no backward.

    Args:
        query: ``[B, H_q, Q, D]`` after RoPE on the CPU; float16, bfloat16 or float32.
        segments: views of what the cache stores: numbers in the query's dtype or packed codes, last dimensions
            contiguous; their KV heads divide ``H_q``. Masks are ``[B, Q, max_length]``. Ranks are multiples of 8.
        scale: factor on ``q . k``.

    Returns:
        Output ``[B, Q, H_q, D_v]`` in the query's dtype and natural log-sum-exp ``[B, H_q, Q]`` in float32. A query
        that sees no token has output 0 and log-sum-exp -inf.

    Raises:
        TypeError, ValueError: an argument is malformed; a row with tokens has some, or a basis, outside of what is
            stored.
        UnsupportedError: there is an `unsupported_reason`.
        RuntimeError: the kernel cannot be compiled here.
    """
    if isinstance(query, Tensor) and query.dim() and query.stride(-1) != 1:
        query = query.contiguous()
    reason = unsupported_reason(query, segments)
    check_scale(scale)
    if reason is not None:
        raise UnsupportedError(reason)
    library = cpu_library.load()
    if library is None:
        raise RuntimeError("impl='cpp' needs a C++ compiler that works, on Linux; use impl='torch'")
    batch, q_heads, queries, width = query.shape
    heads, value_width = segments[0].heads, segments[0].value_width
    out = _empty((batch, queries, q_heads, value_width), query.dtype)
    lse = _empty((batch, q_heads, queries), torch.float32)
    described = packed([_segment(segment) for segment in segments])
    query_row, query_head, query_position, _ = query.stride()
    problem = Problem(
        query.data_ptr(),
        TYPES[query.dtype],
        batch,
        heads,
        q_heads // heads,
        queries,
        width,
        value_width,
        query_row,
        query_head,
        query_position,
        out.data_ptr(),
        lse.data_ptr(),
        cpu_library.threads(),
        _bits(float(scale)),
        len(segments),
        _address(described),
    )
    call = packed([problem])
    outside = library.rotatek_attend(_address(call))
    if outside:
        index, row = divmod(outside // 4, batch)
        raise _outside(segments, index, row, outside % 4)
    return out, lse


def _outside(segments: Sequence[SegmentView], index: int, row: int, what: int) -> ValueError:
    """Make the error of a row for which `Outside` of cpu/storage.h is `what`."""
    segment = segments[index]
    name, start, length = f"segments[{index}]", int(segment.starts[row]), int(segment.lengths[row])
    if what == 1:
        within = "tokens" if segment.slots is None else "slots of a row"
        return ValueError(
            f"{name}.starts and lengths must stay within its {within}, which are {_columns(segment)}, got {start} and "
            f"{length} in row {row}"
        )
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
    """Count the tokens that fit into the segment's storage."""
    code = segment.key_code
    return segment.keys.numel() // sum(code.widths) if isinstance(code, HeadCodes) else segment.keys.shape[1]


def _columns(segment: SegmentView) -> int:
    """Return what starts and lengths have to stay within."""
    return _tokens(segment) if segment.slots is None else segment.slots.shape[1]


_REASONS: dict[Hashable, str | None] = {}


def unsupported_reason(query: Tensor, segments: Sequence[SegmentView]) -> str | None:
    """Say why this kernel does not read arguments that are well formed; None if it does.

    Raises:
        TypeError, ValueError: an argument is malformed.
    """
    try:
        key = arguments_key(query, segments)
        if key in _REASONS:
            return _REASONS[key]
    except (AttributeError, TypeError):
        key = None  # something is not of its type, which the checks will name
    check_arguments(query, segments)
    reason = checks.unsupported_reason(query, segments)
    if reason is None and query.device.type != "cpu":
        reason = f"query must be on the CPU, got {query.device}"
    if key is not None:
        if len(_REASONS) >= REMEMBERED:
            _REASONS.clear()
        _REASONS[key] = reason
    return reason


def _segment(segment: SegmentView) -> Segment:
    mask, place, dtype = segment.mask, 0, torch.float32
    mask_row = mask_query = mask_token = 0
    if mask is not None:
        place, dtype = mask.data_ptr(), mask.dtype
        mask_row, mask_query, mask_token = mask.stride()
    return Segment(
        _stored(segment.keys, segment.key_code, segment.basis),
        _stored(segment.values, segment.value_code, segment.value_basis),
        _vector(segment.starts),
        _vector(segment.lengths),
        _vector(segment.basis_rows),
        _vector(segment.slots),
        _columns(segment),
        segment.max_length,
        place,
        TYPES[dtype],
        mask_row,
        mask_query,
        mask_token,
        _hidden(dtype),
    )


def _vector(vector: Tensor | None) -> Vector:
    if vector is None:
        return NO_VECTOR
    return Vector(vector.data_ptr(), TYPES[vector.dtype], vector.stride(0))


def _matrix(tensor: Tensor | None) -> Matrix:
    if tensor is None:
        return NO_MATRIX
    line = tensor.stride(2) if tensor.dim() == 4 else 0
    return Matrix(tensor.data_ptr(), TYPES[tensor.dtype], tensor.shape[1], tensor.stride(0), tensor.stride(1), line)


def _stored(stored: Tensor, code: Code | None, basis: KeyBasis | None) -> Stored:
    assert code is None or isinstance(code, CodeLayout | HeadCodes)  # as checked
    if isinstance(code, HeadCodes):  # heads one after the other, whose strides follow from their widths
        head_stride, token_stride, tokens = 0, code.widths[0], stored.numel() // sum(code.widths)
    else:
        head_stride, token_stride, tokens = stored.stride(0), stored.stride(1), stored.shape[1]
    _, forms = _forms(code or Numbers(stored.shape[-1]))
    return Stored(
        stored.data_ptr(),
        TYPES[stored.dtype],
        head_stride,
        token_stride,
        tokens,
        len(code.parts) if isinstance(code, HeadCodes) else 1,
        _address(forms),
        _matrix(None if basis is None else basis.B),
        _matrix(None if basis is None or basis.B is None else basis.delta),
        _matrix(None if basis is None or basis.B is None else basis.scale),
    )


@functools.cache
def _forms(code: CodeLayout | HeadCodes | Numbers) -> tuple[list[array], array]:
    """Describe how the heads store a token: the blocks of all heads, which must stay where they are, and the forms."""
    kept, forms, before = [], [], 0
    for part in code.parts if isinstance(code, HeadCodes) else (code,):
        blocks, offset, channel = [], 0, 0
        for bits, channels in part.blocks if isinstance(part, CodeLayout) else ():
            size = channels * bits // 8
            blocks.append(Block(bits, size, offset, channel))
            offset += size
            channel += channels
        kept.append(packed(blocks))
        forms.append(Form(part.token_width, before, part.channels, len(blocks), _address(kept[-1])))
        before += part.token_width
    return kept, packed(forms)


def _address(words: array) -> Address:
    """Return where the words lie, as long as they are kept."""
    return words.buffer_info()[0]


@functools.cache
def _hidden(dtype: torch.dtype) -> Double:
    """Return the number up to which a mask hides, as in `reference_attention`."""
    return _bits(0.0 if dtype == torch.bool else torch.finfo(dtype).min / 2)


def _bits(number: float) -> Double:
    return int(struct.unpack("q", struct.pack("d", number))[0])


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")
