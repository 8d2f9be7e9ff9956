"""Coefficients, for codecs with a basis: encoded row by row, and stored as numbers, float8 or codes."""

import torch
from torch import Tensor

from rotatek_cache.codecs.interface import StateOptions
from rotatek_cache.core.basis import KeyBasis, coded_delta_dtype, compute_dtype, padded_rank
from rotatek_cache.core.quantization import CHANNEL_BLOCK, FP8, FP8_MOST, CodeLayout, middle_codes, quantise_packed
from rotatek_cache.core.segments import Stored
from rotatek_cache.options import Bits

# Numbers that temporaries are made of at once, in as many heads as fit, at least one: on a CPU and on a GPU, where few
# heads at a time would leave most of it idle.
LARGE, LARGE_ON_GPU = 1 << 22, 1 << 26


def head_groups(states: Tensor) -> list[slice]:
    """Divide the heads of states ``[H, ...]`` into groups that temporaries may be made for at once."""
    most = LARGE_ON_GPU if states.is_cuda else LARGE
    heads = len(states)
    size = max(1, most * heads // max(1, states.numel()))
    return [slice(first, first + size) for first in range(0, heads, size)]


def encode_row(states: Tensor, basis: KeyBasis, row: int, span: tuple[int, int], bits: Bits) -> Tensor:
    """Encode one row of packed states ``[H, N, D]``: coefficients ``[H, S, r]``, wide where they are to be coded."""
    start, length = span
    part = states[:, None, start : start + length]
    dtype = states.dtype if bits is None else compute_dtype(states.dtype)

    def encode(heads: slice) -> Tensor:
        own = basis.select(lambda tensor: tensor[heads, row : row + 1])
        return own.encode(part[heads])[:, 0].to(dtype)

    encoded = [encode(heads) for heads in head_groups(part)]
    return encoded[0] if len(encoded) == 1 else torch.cat(encoded)


def store_coefficients(coefficients: list[Tensor], basis: KeyBasis, bits: Bits) -> Stored:
    """Store each row's coefficients ``[H, S, r]`` with one width for all: as numbers, as float8 or as codes."""
    if bits is None:
        return Stored(coefficients[0] if len(coefficients) == 1 else torch.cat(coefficients, 1), basis.sealed())
    if bits == "fp8":
        most = torch.stack([part.abs().amax(1).to(compute_dtype(part.dtype)) for part in coefficients], 1)  # [H, R, r]
        scale = torch.where(most > 0, most, torch.ones_like(most)) / FP8_MOST
        stored = torch.cat([to_float8(part, scale[:, row]) for row, part in enumerate(coefficients)], 1)
        nothing = torch.zeros_like(scale)
        return Stored(stored, basis.for_codes(nothing, scale, nothing[0, 0]))
    assert isinstance(bits, int)
    return store_codes(coefficients, basis, CodeLayout(((bits, coefficients[0].shape[-1]),)))


def to_float8(coefficients: Tensor, scale: Tensor) -> Tensor:
    """Divide coefficients ``[H, S, r]`` by their scale ``[H, r]`` and round them to float8."""
    return (coefficients.to(scale.dtype) / scale[:, None]).clamp_(-FP8_MOST, FP8_MOST).to(FP8)


def store_codes(coefficients: list[Tensor], basis: KeyBasis, layout: CodeLayout) -> Stored:
    """Store codes with ranges of this segment's own coefficients ``[H, S, r]`` of each row."""
    dtype = coefficients[0].dtype
    packed, low, step = quantise_packed([part.to(compute_dtype(dtype)) for part in coefficients], layout)
    basis = basis.for_codes(low.to(dtype), step.to(dtype), middle_codes(layout, packed.device))
    return Stored(packed, basis, layout)


def kept_of_token(wanted: StateOptions, width: int, dtype: torch.dtype, rank: int | None) -> tuple[int, int]:
    """Count the coefficients of a token of one head, padding included, and their bytes, both at most."""
    if wanted.bits == "auto":
        assert wanted.sparsity is not None
        size = int((1 - wanted.sparsity) * 2 * width)
        return min(width, max(CHANNEL_BLOCK, size * 4)), size  # at 2 bits each
    kept = padded_rank(rank or wanted.rank_for(width) or 1)
    return kept, coefficient_bytes(kept, wanted.bits, dtype)


def coefficient_bytes(channels: int, bits: Bits, dtype: torch.dtype) -> int:
    """Count the bytes of `channels` coefficients of one width."""
    if bits == "fp8":
        return channels
    return channels * dtype.itemsize if bits is None else channels * int(bits) // 8


def delta_bytes(width: int, bits: Bits, dtype: torch.dtype) -> int:
    """Count the bytes of the delta of one head."""
    return width * (dtype if bits is None else coded_delta_dtype(dtype)).itemsize
