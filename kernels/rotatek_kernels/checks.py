"""What the fused attention can read: checks of its arguments, which name what is wrong before anything is launched.

They are the same for all kernels. What checks look at, but the scale, is in `arguments_key`, so that what follows from
arguments that were found right can be kept under it.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from rotatek_cache.core.basis import RANK_MULTIPLE, KeyBasis
from rotatek_cache.core.quantization import Code, CodeLayout, HeadCodes, Numbers
from rotatek_cache.core.segments import SegmentView

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MASK_DTYPES = (torch.bool, torch.float64, *DTYPES)
INDEX_DTYPES = (torch.int32, torch.int64)
USE = "use impl='torch'"


def check_arguments(query: Tensor, segments: Sequence[SegmentView], scale: float) -> None:
    """Raise TypeError or ValueError, naming the argument, for what the kernel cannot read; nothing is synchronised."""
    _check_tensor("query", query, query)
    if query.dtype not in DTYPES:
        raise TypeError(f"query must be float16, bfloat16 or float32, got {query.dtype}")
    if query.dim() != 4 or 0 in query.shape:
        raise ValueError(f"query must be [B, H_q, Q, D], none of them 0, got shape {tuple(query.shape)}")
    check_scale(scale)
    if isinstance(segments, SegmentView) or not isinstance(segments, Sequence):
        raise TypeError(f"segments must be a sequence of SegmentView, got {type(segments).__name__}")
    if not segments:
        raise ValueError("segments must hold at least one segment, got none")
    for index, segment in enumerate(segments):
        if not isinstance(segment, SegmentView):
            raise TypeError(f"segments[{index}] must be a SegmentView, got {type(segment).__name__}")
        _check_segment(f"segments[{index}]", segment, query, segments[0])


def arguments_key(query: Tensor, segments: Sequence[SegmentView]) -> Hashable:
    """What the checks look at, and all shapes, strides and dtypes.

    Raises:
        AttributeError, TypeError: something is not of its type, which `check_arguments` will name.
    """
    grad = torch.is_grad_enabled()
    rows, positions = query.shape[0], query.shape[2]
    key: list[Any] = [type(segments), grad]
    tensors = [query]
    for segment in segments:
        basis, value_basis, mask, length = segment.basis, segment.value_basis, segment.mask, segment.max_length
        # Lengths and masks differ from step to step: of them the key holds what matters.
        key += [type(segment), segment.key_code, segment.value_code, type(length), length >> 30, length > 0]
        tensors += [segment.keys, segment.values, segment.starts, segment.lengths]
        for optional in (segment.slots, segment.basis_rows):
            key.append(optional is None)
            if optional is not None:
                tensors.append(optional)
        for one in (basis, value_basis):
            held = () if one is None else (one.B, one.delta, one.scale)
            key.append(None if one is None else (type(one), *(tensor is None for tensor in held)))
            tensors += [tensor for tensor in held if tensor is not None]
        if mask is not None:
            right = mask.shape == (rows, positions, length)
            stride = mask.stride(2) if length > 1 else 1
            gradient = mask.requires_grad and grad
            key.append((type(mask), mask.dtype, mask.device, stride, gradient, right or mask.shape))
    key += [(type(t), t.dtype, t.device, t.shape, t.stride(), t.requires_grad and grad) for t in tensors]
    return tuple(key)


def check_scale(scale: float) -> None:
    """Raise TypeError or ValueError unless `scale` is a finite number."""
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def _check_segment(name: str, segment: SegmentView, query: Tensor, first: SegmentView) -> None:
    q_heads, width = query.shape[1], query.shape[3]
    for state, basis in (("basis", segment.basis), ("value_basis", segment.value_basis)):
        if basis is not None and basis.is_diagonal:
            raise ValueError(
                f"{name}.{state} scales channels and rotates nothing, which the kernel does not read: {USE}"
            )
    for state, code in (("keys", segment.key_code), ("values", segment.value_code)):
        _check_storage(f"{name}.{state}", getattr(segment, state), code, query)
    heads = segment.heads
    if heads == 0 or q_heads % heads or heads != first.heads:
        raise ValueError(
            f"{name}.keys must have KV heads that divide the query's {q_heads} and are those of segments[0] "
            f"({first.heads}), got {heads}"
        )
    key_shape, value_shape = (
        _heads_and_tokens(segment.keys, segment.key_code),
        _heads_and_tokens(segment.values, segment.value_code),
    )
    if value_shape != key_shape:
        raise ValueError(f"{name}.values must have the heads and tokens of its keys {key_shape}, got {value_shape}")
    for field in ("starts", "lengths"):
        _check_index(f"{name}.{field}", getattr(segment, field), query)
    if isinstance(segment.max_length, bool) or not isinstance(segment.max_length, int):
        raise TypeError(f"{name}.max_length must be an int, got {type(segment.max_length).__name__}")
    if not 0 <= segment.max_length < 2**30:
        raise ValueError(f"{name}.max_length must be in [0, 2**30), got {segment.max_length}")
    if segment.slots is not None:
        _check_slots(f"{name}.slots", segment.slots, query)
    if segment.mask is not None:
        _check_mask(f"{name}.mask", segment.mask, segment.max_length, query)
    columns = segment.keys.shape[-1] if segment.key_code is None else segment.key_code.channels
    if segment.basis is None or segment.basis.is_identity:
        if segment.key_code is not None:
            raise ValueError(f"{name}.basis must say what the codes of its keys mean, got no basis")
        if columns != width:
            raise ValueError(f"{name}.keys must be as wide as the query ({width}) without a basis, got {columns}")
    else:
        _check_basis(f"{name}.basis", segment.basis, (heads, width, columns), "keys", segment, query)
    columns = segment.values.shape[-1] if segment.value_code is None else segment.value_code.channels
    value_width = columns
    if segment.value_basis is None or segment.value_basis.is_identity:
        if segment.value_code is not None:
            raise ValueError(f"{name}.value_basis must say what the codes of its values mean, got no basis")
    else:
        value_width = segment.value_width
        _check_basis(
            f"{name}.value_basis", segment.value_basis, (heads, value_width, columns), "values", segment, query
        )
    if value_width != first.value_width or value_width == 0:
        raise ValueError(
            f"{name}.values must be as wide as those of segments[0] ({first.value_width}), not 0, got {value_width}"
        )


def _heads_and_tokens(stored: Tensor, code: Code | None) -> tuple[int, ...]:
    if isinstance(code, HeadCodes):
        return len(code.parts), stored.numel() // sum(code.widths)
    return tuple(stored.shape[:2])


def _check_head_storage(name: str, tensor: Tensor, code: HeadCodes, query: Tensor) -> None:
    kinds = {type(part) for part in code.parts}
    if kinds not in ({Numbers}, {CodeLayout}) or any(part.channels % RANK_MULTIPLE for part in code.parts):
        raise ValueError(
            f"{name} must hold numbers in all heads or codes in all, in multiples of {RANK_MULTIPLE} channels, got "
            f"{code.parts}"
        )
    dtype = query.dtype if kinds == {Numbers} else torch.uint8
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} where each head has a width of its own, got {tensor.dtype}")
    if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() % sum(code.widths):
        raise ValueError(
            f"{name} must hold its heads one after the other, {sum(code.widths)} elements a token, contiguous in one "
            f"dimension, got shape {tuple(tensor.shape)} and strides {tensor.stride()}"
        )


def _check_storage(name: str, tensor: Tensor, code: Code | None, query: Tensor) -> None:
    _check_tensor(name, tensor, query)
    if isinstance(code, HeadCodes):
        _check_head_storage(name, tensor, code, query)
        return
    if tensor.dim() != 3:
        raise ValueError(f"{name} must be [H, N, width], got shape {tuple(tensor.shape)}")
    if code is None:
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have the query's dtype {query.dtype}, got {tensor.dtype}")
    elif not isinstance(code, CodeLayout):
        raise TypeError(
            f"{name} must be packed as a CodeLayout or HeadCodes say, got {type(code).__name__}: {USE} for other codes"
        )
    elif tensor.dtype != torch.uint8 or tensor.shape[-1] != code.token_bytes:
        raise ValueError(
            f"{name} must hold {code.token_bytes} bytes (uint8) a token, packed as {code.blocks}, got "
            f"{tensor.shape[-1]} of {tensor.dtype}"
        )
    _check_contiguous_rows(name, tensor)


def _check_slots(name: str, slots: Tensor, query: Tensor) -> None:
    _check_tensor(name, slots, query)
    if slots.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {slots.dtype}")
    if slots.dim() != 2 or slots.shape[0] != query.shape[0]:
        raise ValueError(f"{name} must have shape ({query.shape[0]}, n), got {tuple(slots.shape)}")
    _check_contiguous_rows(name, slots)


def _check_mask(name: str, mask: Tensor, max_length: int, query: Tensor) -> None:
    _check_tensor(name, mask, query)
    if mask.dtype not in MASK_DTYPES:
        raise TypeError(f"{name} must be bool or numbers of 16, 32 or 64 bits, got {mask.dtype}")
    expected = (query.shape[0], query.shape[2], max_length)
    if mask.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(mask.shape)}")


def _check_basis(
    name: str, basis: KeyBasis, shape: tuple[int, int, int], state: str, segment: SegmentView, query: Tensor
) -> None:
    heads, width, rank = shape
    decoder = basis.B
    assert decoder is not None  # or it would be the identity
    _check_tensor(f"{name}.B", decoder, query)
    if decoder.dim() != 4 or (decoder.shape[0], *decoder.shape[2:]) != shape:
        raise ValueError(
            f"{name}.B must be [H, R, D, r] with H {heads}, D {width} and r {rank}, got shape {tuple(decoder.shape)}"
        )
    if rank == 0 or rank % RANK_MULTIPLE:
        raise ValueError(
            f"{name[: name.index('.')]}.{state} must have a rank that is a multiple of {RANK_MULTIPLE}, got {rank}; "
            "pad it with zeros"
        )
    _check_contiguous_rows(f"{name}.B", decoder)
    if basis.delta is not None:
        _check_tensor(f"{name}.delta", basis.delta, query)
        if basis.delta.shape != decoder.shape[:3]:
            raise ValueError(f"{name}.delta must have shape {tuple(decoder.shape[:3])}, got {tuple(basis.delta.shape)}")
        _check_contiguous_rows(f"{name}.delta", basis.delta)
    if basis.scale is not None:
        _check_tensor(f"{name}.scale", basis.scale, query)
        expected = (*decoder.shape[:2], rank)
        if basis.scale.shape != expected:
            raise ValueError(f"{name}.scale must have shape {expected}, got {tuple(basis.scale.shape)}")
        _check_contiguous_rows(f"{name}.scale", basis.scale)
        if decoder.dtype != torch.int8:
            raise TypeError(f"{name}.B must be int8 where it has a scale, got {decoder.dtype}")
    for field, tensor in (("B", decoder), ("delta", basis.delta), ("scale", basis.scale)):
        if tensor is not None and tensor.dtype not in DTYPES and (tensor is not decoder or basis.scale is None):
            raise TypeError(f"{name}.{field} must be float16, bfloat16 or float32, got {tensor.dtype}")
    rows_name = f"{name[: name.index('.')]}.basis_rows"
    if segment.basis_rows is not None:
        _check_index(rows_name, segment.basis_rows, query)
    elif decoder.shape[1] < query.shape[0]:
        raise ValueError(
            f"{rows_name} must say which of the basis' {decoder.shape[1]} rows the {query.shape[0]} rows use, got None"
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
    if tensor.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
    if tensor.shape != query.shape[:1]:
        raise ValueError(f"{name} must have shape ({query.shape[0]},), got {tuple(tensor.shape)}")
