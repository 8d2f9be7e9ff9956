"""Check the arguments of the fused attention before anything is launched.

Malformed arguments raise an error that names them. What is well formed and yet not read by a kernel has a reason, on
which `attend` takes the reference instead. What both look at is in `arguments_key`, so that what follows from arguments
that were checked can be kept under it; the scale is checked in each call.
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
KNOWN_CODES = (CodeLayout, HeadCodes, type(None))
USE = "use impl='torch'"


def check_arguments(query: Tensor, segments: Sequence[SegmentView]) -> None:
    """Raise TypeError or ValueError, naming the argument, for what is malformed; nothing is synchronised."""
    _check_tensor("query", query, query)
    if query.dim() != 4 or 0 in query.shape:
        raise ValueError(f"query must be [B, H_q, Q, D], none of them 0, got shape {tuple(query.shape)}")
    if isinstance(segments, SegmentView) or not isinstance(segments, Sequence):
        raise TypeError(f"segments must be a sequence of SegmentView, got {type(segments).__name__}")
    if not segments:
        raise ValueError("segments must hold at least one segment, got none")
    for index, segment in enumerate(segments):
        if not isinstance(segment, SegmentView):
            raise TypeError(f"segments[{index}] must be a SegmentView, got {type(segment).__name__}")
        _check_segment(f"segments[{index}]", segment, query, segments[0])


def unsupported_reason(query: Tensor, segments: Sequence[SegmentView]) -> str | None:
    """Say what of arguments that are not malformed is read by no kernel, naming it; None if they are read."""
    if query.dtype not in DTYPES:
        return f"query must be float16, bfloat16 or float32, got {query.dtype}"
    tensors: dict[str, Tensor | None] = {"query": query}
    for index, segment in enumerate(segments):
        name = f"segments[{index}]"
        tensors |= {f"{name}.{field}": getattr(segment, field) for field in ("keys", "values", "mask")}
        for field in ("basis", "value_basis"):
            basis = getattr(segment, field)
            if basis is not None:
                tensors |= {f"{name}.{field}.{part}": getattr(basis, part) for part in ("B", "delta", "scale")}
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                return f"{name} must not require a gradient: the kernel has no backward; {USE}"
    reasons = (_segment_reason(f"segments[{index}]", segment, query) for index, segment in enumerate(segments))
    return next((reason for reason in reasons if reason is not None), None)


def arguments_key(query: Tensor, segments: Sequence[SegmentView]) -> Hashable:
    """Collect what the checks look at, and all shapes, strides and dtypes.

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
    for state, code in (("keys", segment.key_code), ("values", segment.value_code)):
        _check_storage(f"{name}.{state}", getattr(segment, state), code, query)
    if isinstance(segment.key_code, KNOWN_CODES) and isinstance(segment.value_code, KNOWN_CODES):
        _check_states(name, segment, query, first)
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
    if segment.basis_rows is not None:
        _check_index(f"{name}.basis_rows", segment.basis_rows, query)


def _check_states(name: str, segment: SegmentView, query: Tensor, first: SegmentView) -> None:
    """Check Keys and Values, packed in ways that are known here, against each other and against the query."""
    _check_heads(name, segment, query, first)
    value_width = segment.value_width
    _check_meaning(name, "keys", segment, query.shape[3], query)
    _check_meaning(name, "values", segment, value_width, query)
    if value_width != first.value_width or value_width == 0:
        raise ValueError(
            f"{name}.values must be as wide as those of segments[0] ({first.value_width}), not 0, got {value_width}"
        )


def _check_heads(name: str, segment: SegmentView, query: Tensor, first: SegmentView) -> None:
    heads, q_heads = segment.heads, query.shape[1]
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


def _heads_and_tokens(stored: Tensor, code: Code | None) -> tuple[int, ...]:
    if isinstance(code, HeadCodes):
        return len(code.parts), stored.numel() // sum(code.widths)
    return tuple(stored.shape[:2])


def _check_storage(name: str, tensor: Tensor, code: Code | None, query: Tensor) -> None:
    _check_tensor(name, tensor, query)
    if isinstance(code, HeadCodes):
        if {type(part) for part in code.parts} not in ({Numbers}, {CodeLayout}):
            raise ValueError(f"{name} must hold numbers in all heads or codes in all, got {code.parts}")
        if isinstance(code.parts[0], CodeLayout) and tensor.dtype != torch.uint8:
            raise TypeError(f"{name} must be torch.uint8 where each head has a width of its own, got {tensor.dtype}")
        if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() % sum(code.widths):
            raise ValueError(
                f"{name} must hold its heads one after the other, {sum(code.widths)} elements a token, contiguous in "
                f"one dimension, got shape {tuple(tensor.shape)} and strides {tensor.stride()}"
            )
    elif tensor.dim() != 3:
        raise ValueError(f"{name} must be [H, N, width], got shape {tuple(tensor.shape)}")
    elif isinstance(code, CodeLayout) and (tensor.dtype != torch.uint8 or tensor.shape[-1] != code.token_bytes):
        raise ValueError(
            f"{name} must hold {code.token_bytes} bytes (uint8) a token, packed as {code.blocks}, got "
            f"{tensor.shape[-1]} of {tensor.dtype}"
        )


def _check_slots(name: str, slots: Tensor, query: Tensor) -> None:
    _check_tensor(name, slots, query)
    if slots.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {slots.dtype}")
    if slots.dim() != 2 or slots.shape[0] != query.shape[0]:
        raise ValueError(f"{name} must have shape ({query.shape[0]}, n), got {tuple(slots.shape)}")


def _check_mask(name: str, mask: Tensor, max_length: int, query: Tensor) -> None:
    _check_tensor(name, mask, query)
    if mask.dtype not in MASK_DTYPES:
        raise TypeError(f"{name} must be bool or numbers of 16, 32 or 64 bits, got {mask.dtype}")
    expected = (query.shape[0], query.shape[2], max_length)
    if mask.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(mask.shape)}")


def _check_meaning(name: str, state: str, segment: SegmentView, width: int, query: Tensor) -> None:
    """Check the basis of Keys or Values against what is stored of them; `width` is that of the states."""
    field = "basis" if state == "keys" else "value_basis"
    basis, stored = getattr(segment, field), getattr(segment, state)
    code = segment.key_code if state == "keys" else segment.value_code
    columns = stored.shape[-1] if code is None else code.channels
    if basis is None or basis.is_identity:
        if code is not None:
            raise ValueError(f"{name}.{field} must say what the codes of its {state} mean, got no basis")
        if columns != width:
            raise ValueError(f"{name}.{state} must be as wide as the query ({width}) without a basis, got {columns}")
    elif not basis.is_diagonal:
        _check_basis(f"{name}.{field}", basis, (segment.heads, width, columns), segment, query)


def _check_basis(name: str, basis: KeyBasis, shape: tuple[int, int, int], segment: SegmentView, query: Tensor) -> None:
    heads, width, rank = shape
    decoder = basis.B
    assert decoder is not None  # or it would be the identity
    _check_tensor(f"{name}.B", decoder, query)
    if decoder.dim() != 4 or (decoder.shape[0], *decoder.shape[2:]) != shape:
        raise ValueError(
            f"{name}.B must be [H, R, D, r] with H {heads}, D {width} and r {rank}, got shape {tuple(decoder.shape)}"
        )
    for field, expected in (("delta", decoder.shape[:3]), ("scale", (*decoder.shape[:2], rank))):
        tensor = getattr(basis, field)
        if tensor is not None:
            _check_tensor(f"{name}.{field}", tensor, query)
            if tensor.shape != expected:
                raise ValueError(f"{name}.{field} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")
    if segment.basis_rows is None and decoder.shape[1] < query.shape[0]:
        raise ValueError(
            f"{name[: name.index('.')]}.basis_rows must say which of the basis' {decoder.shape[1]} rows the "
            f"{query.shape[0]} rows use, got None"
        )


def _check_tensor(name: str, tensor: Any, query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on the query's device {query.device}, got {tensor.device}")


def _check_index(name: str, tensor: Any, query: Tensor) -> None:
    _check_tensor(name, tensor, query)
    if tensor.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
    if tensor.shape != query.shape[:1]:
        raise ValueError(f"{name} must have shape ({query.shape[0]},), got {tuple(tensor.shape)}")


def _segment_reason(name: str, segment: SegmentView, query: Tensor) -> str | None:
    for state, code, field in (("keys", segment.key_code, "basis"), ("values", segment.value_code, "value_basis")):
        stored, basis = getattr(segment, state), getattr(segment, field)
        reason = _storage_reason(f"{name}.{state}", stored, code, query)
        if reason is None and basis is not None and not basis.is_identity:
            reason = _basis_reason(f"{name}.{field}", basis, f"{name}.{state}")
        if reason is not None:
            return reason
    return None if segment.slots is None else _strides_reason(f"{name}.slots", segment.slots)


def _storage_reason(name: str, stored: Tensor, code: Code | None, query: Tensor) -> str | None:
    numbers = code is None
    if isinstance(code, HeadCodes):
        if any(part.channels % RANK_MULTIPLE for part in code.parts):
            return f"{name} must have multiples of {RANK_MULTIPLE} channels in all heads, got {code.parts}"
        numbers = isinstance(code.parts[0], Numbers)
    elif code is not None and not isinstance(code, CodeLayout):
        return (
            f"{name} must be packed as a CodeLayout or HeadCodes say, got {type(code).__name__}: {USE} for other codes"
        )
    if numbers and stored.dtype != query.dtype:
        return f"{name} must have the query's dtype {query.dtype}, got {stored.dtype}"
    return _strides_reason(name, stored)


def _basis_reason(name: str, basis: KeyBasis, state: str) -> str | None:
    decoder = basis.B
    assert decoder is not None  # or it would be the identity
    if basis.is_diagonal:
        return f"{name} scales channels and rotates nothing, which the kernel does not read: {USE}"
    rank = decoder.shape[-1]
    if rank == 0 or rank % RANK_MULTIPLE:
        return f"{state} must have a rank that is a multiple of {RANK_MULTIPLE}, got {rank}; pad it with zeros"
    for field, tensor in (("B", decoder), ("delta", basis.delta), ("scale", basis.scale)):
        if tensor is None:
            continue
        if tensor is decoder and basis.scale is not None:
            if tensor.dtype != torch.int8:
                return f"{name}.B must be int8 where it has a scale, got {tensor.dtype}"
        elif tensor.dtype not in DTYPES:
            return f"{name}.{field} must be float16, bfloat16 or float32, got {tensor.dtype}"
        reason = _strides_reason(f"{name}.{field}", tensor)
        if reason is not None:
            return reason
    return None


def _strides_reason(name: str, tensor: Tensor) -> str | None:
    if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return None
    return f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}"
