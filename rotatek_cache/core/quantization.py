"""Codes of coefficients: bit allocation, uniform quantisation per channel or per token, packing.

A coefficient is ``low + step * code``. With ``low`` and ``step`` per channel, frozen when the segment is sealed, both
are folded into the decode basis (`KeyBasis.for_codes`), so that attention multiplies by the bare codes (`CodeLayout`,
`HeadCodes`). Other codes carry what they need with each token and are the peers' (`TokenCode`, SparK's).
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rotatek_cache.core.compiled import steps_for

BITS = (8, 4, 2)
PLAIN_BITS = 16  # what a number that is not coded counts for in a budget: that of half precision
FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0  # largest finite number of FP8
CHANNEL_BLOCK = 8  # channels of one width come in multiples of this
# Shares of the full range tried as clip range; a few outliers should not cost everyone else their resolution.
CLIP_GRID = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
# Of many tokens the full range is one of outliers, and few levels serve best within one and a half deviations.
FINE_CLIP_GRID = (*CLIP_GRID, 0.42, 0.35, 0.3, 0.25)


class Code(Protocol):
    """The way stored numbers of a token become coefficients."""

    @property
    def channels(self) -> int:
        """Coefficients of a token and head, padding included."""

    def unpack(self, packed: Any) -> Tensor:
        """Give the numbers ``[H, ..., channels]`` of what is stored of tokens (with `HeadCodes`, of each head)."""


@dataclass(frozen=True)
class Numbers:
    """Coefficients as they are, `channels` of a token: a head's part of `HeadCodes`."""

    channels: int

    @property
    def token_width(self) -> int:
        """Elements of one token."""
        return self.channels

    def unpack(self, packed: Tensor) -> Tensor:
        """Return `packed` itself."""
        return packed


@dataclass(frozen=True)
class CodeLayout:
    """Widths of the codes of one token: blocks of channels, widest first, packed side by side into bytes.

    Args:
        blocks: (bits, channels) with bits of 8, 4 or 2 falling and channels a multiple of 8. A 4-bit block keeps
            channel j in the low and channel ``j + channels / 2`` in the high half of byte j (2 bits: quarters), so
            that a kernel unpacks into contiguous runs.
    """

    blocks: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        widths = [bits for bits, _ in self.blocks]
        if not self.blocks or any(bits not in BITS for bits in widths) or widths != sorted(set(widths), reverse=True):
            raise ValueError(f"blocks must have bits of 8, 4 or 2, each once and falling, got {self.blocks}")
        if any(channels < 1 or channels % CHANNEL_BLOCK for _, channels in self.blocks):
            raise ValueError(f"blocks must have a multiple of {CHANNEL_BLOCK} channels, got {self.blocks}")

    @classmethod
    def from_bits(cls, bits: Sequence[int]) -> "CodeLayout":
        """Make the layout of bits that fall from channel to channel; channels of 0 bits are left out."""
        return cls(tuple((width, bits.count(width)) for width in BITS if width in bits))

    @property
    def channels(self) -> int:
        """Channels that are kept."""
        return sum(channels for _, channels in self.blocks)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return sum(channels * bits // 8 for bits, channels in self.blocks)

    token_width = token_bytes  # in elements of storage

    def levels(self, device: torch.device) -> Tensor:
        """Give the largest code of each channel, float32 ``[channels]``."""
        return torch.cat(
            [torch.full((n,), 2.0**bits - 1, dtype=torch.float32, device=device) for bits, n in self.blocks]
        )

    def pack(self, codes: Tensor) -> Tensor:
        """Pack uint8 codes ``[..., channels]`` into bytes ``[..., token_bytes]``."""
        packed, start = [], 0
        for bits, channels in self.blocks:
            parts = codes[..., start : start + channels].chunk(8 // bits, -1)
            packed.append(sum((part << (bits * i) for i, part in enumerate(parts)), torch.zeros_like(parts[0])))
            start += channels
        return torch.cat(packed, -1)

    def unpack(self, packed: Tensor) -> Tensor:
        """Unpack bytes ``[..., token_bytes]`` into uint8 codes ``[..., channels]``."""
        codes, start = [], 0
        for bits, channels in self.blocks:
            part = packed[..., start : start + channels * bits // 8]
            codes += [(part >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
            start += channels * bits // 8
        return torch.cat(codes, -1)


@dataclass(frozen=True)
class HeadCodes:
    """A width of its own for each head, none of them padded.

    Storage of N tokens has one dimension: the slots ``[N, width]`` of a head follow those of the head before, so that
    what one head reads lies side by side.
    """

    parts: tuple[CodeLayout | Numbers, ...]

    @functools.cached_property
    def channels(self) -> int:
        """Coefficients of the widest head; the others are padded with zeros when they are read."""
        return max(part.channels for part in self.parts)

    @functools.cached_property
    def widths(self) -> tuple[int, ...]:
        """Elements of a token in each head."""
        return tuple(part.token_width for part in self.parts)

    def split(self, packed: Tensor) -> list[Tensor]:
        """Split the storage by head: views ``[1, N, width]``."""
        tokens = packed.numel() // sum(self.widths)
        heads = packed.split([tokens * width for width in self.widths])
        return [head.view(1, tokens, width) for head, width in zip(heads, self.widths, strict=True)]

    def unpack(self, heads: Sequence[Tensor]) -> Tensor:
        """Unpack ``[R, n, width]`` of each head to ``[H * R, n, channels]``, heads first."""
        numbers = [part.unpack(head) for part, head in zip(self.parts, heads, strict=True)]
        return torch.cat([torch.nn.functional.pad(head, (0, self.channels - head.shape[-1])) for head in numbers])


@dataclass(frozen=True)
class TokenCode:
    """Codes of `bits` with a range per token, stored with it as two numbers of `dtype`: the peer without rotation."""

    bits: int
    channels: int
    dtype: torch.dtype

    @property
    def _layout(self) -> CodeLayout:
        return CodeLayout(((self.bits, self.channels),))

    def pack(self, states: Tensor) -> Tensor:
        """Pack finite states ``[..., channels]`` into bytes ``[..., channels * bits / 8 + 2 numbers]``."""
        wide = torch.promote_types(self.dtype, torch.float32)
        low, high = (extreme(states, -1, keepdim=True).to(wide) for extreme in (torch.amin, torch.amax))
        # Codes are those of the rounded range, which is what reads them.
        scale = torch.cat([low, (high - low) / (2**self.bits - 1)], -1).to(self.dtype)
        low, step = scale.to(wide).split(1, -1)
        codes = ((states.to(wide) - low) / torch.where(step > 0, step, torch.ones_like(step))).round_()
        codes = codes.clamp_(0, 2**self.bits - 1).to(torch.uint8)
        return torch.cat([self._layout.pack(codes), scale.view(torch.uint8)], -1)

    def unpack(self, packed: Tensor) -> Tensor:
        """Unpack states ``[..., channels]``, float32 for half precisions."""
        codes, scale = packed.split([self._layout.token_bytes, 2 * self.dtype.itemsize], -1)
        low, step = as_numbers(scale, self.dtype).split(1, -1)
        return low + step * self._layout.unpack(codes)


def as_numbers(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Read bytes ``[..., n * itemsize]`` as n numbers of `dtype`, in float32 for half precisions."""
    numbers = packed.reshape(-1).view(dtype).view(*packed.shape[:-1], -1)
    return numbers.to(torch.promote_types(dtype, torch.float32))


def modelled_distortion(worth: Tensor, widths: Sequence[int]) -> Tensor:
    """Expect a bit to quarter a coefficient's distortion: ``[n, 1 + widths, channels]`` of its `worth` uncoded."""
    uncoded = worth.double().clamp_min(0)
    return torch.stack([uncoded * 4.0**-width for width in (0, *sorted(widths))], 1)


def allocate_bits(
    worth: Tensor,
    budget: int,
    widths: Sequence[int] = BITS,
    start: Sequence[Sequence[int]] | None = None,
    distortion: Tensor | None = None,
) -> list[list[int]]:
    """Deal bits out by greedy reverse water-filling in blocks over spectra; they sum to at most `budget`.

    The step to another width with the largest drop of distortion per bit spent is taken first, a block of channels at
    a time; bits too few for a step of a block are not spent.

    Args:
        worth: ``[n, channels]``, what the distortion of each coefficient costs (its variance, or a weight times it),
            falling in each of the n spectra, which share the budget; channels a multiple of 8.
        budget: bits per token in all.
        widths: what a channel may have besides nothing.
        start: bits that are given in any case; they count.
        distortion: what is left of the worth at no bits and at each of the widths, rising, ``[n, 1 + widths,
            channels]``; by default a bit quarters it.

    Returns:
        Bits per channel of each spectrum, falling.
    """
    left_over = modelled_distortion(worth, widths) if distortion is None else distortion.double()
    # Running minima keep widths falling within a spectrum whatever rounding did to its order.
    blocks = left_over.unflatten(-1, (-1, CHANNEL_BLOCK)).sum(-1).cummin(1).values
    levels = [0, *sorted(widths)]
    bits = (
        [[0] * blocks.shape[-1] for _ in blocks] if start is None else [list(given[::CHANNEL_BLOCK]) for given in start]
    )
    left = budget // CHANNEL_BLOCK - sum(map(sum, bits))
    steps = [
        (-rate, block, index, high - low)
        for index, spectrum in enumerate(blocks.tolist())
        for block, (low, high, rate) in _falling_steps(spectrum, levels)
        if low >= bits[index][block]
    ]
    # Rates fall from block to block and from step to step, so this order never skips one that must come before.
    for _, block, index, cost in sorted(steps, key=lambda step: step[:2]):
        if cost <= left:
            bits[index][block] += cost
            left -= cost
    return [[width for width in spectrum for _ in range(CHANNEL_BLOCK)] for spectrum in bits]


def _falling_steps(
    spectrum: Sequence[Sequence[float]], levels: Sequence[int]
) -> Iterator[tuple[int, tuple[int, int, float]]]:
    """Yield block, widths and rate of each step, rates made to fall over widths and over blocks.

    Args:
        spectrum: distortion of each block at each level.
        levels: bits, rising from 0.
    """
    before = [float("inf")] * (len(levels) - 1)
    for block, left_over in enumerate(zip(*spectrum, strict=True)):
        rates = [
            (left_over[index] - left_over[index + 1]) / (high - low)
            for index, (low, high) in enumerate(itertools.pairwise(levels))
        ]
        rates = [min(pair) for pair in zip(itertools.accumulate(rates, min), before, strict=True)]
        before = rates
        for (low, high), rate in zip(itertools.pairwise(levels), rates, strict=True):
            yield block, (low, high, rate)


def quantise(
    coefficients: Tensor, layout: CodeLayout, shares: Sequence[float] = CLIP_GRID, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise one row's coefficients, with the clip range of least squared error per channel.

    Args:
        coefficients: ``[H, S, channels]``, finite.
        layout: widths of the codes.
        shares: clip ranges to try, as shares of the full range.
        weight: of each token's squared error, ``[H, S]``; by default all are alike.

    Returns:
        uint8 codes ``[H, S, channels]``, ``low`` and ``step`` ``[H, channels]`` in the coefficients' dtype; constant
        channels have step 0 and their value as `low`.
    """
    levels = layout.levels(coefficients.device).to(coefficients.dtype)
    least, most = coefficients.amin(1), coefficients.amax(1)
    centre, half = (least + most) / 2, (most - least) / 2
    best_error = torch.full_like(half, torch.inf)
    best = torch.ones_like(half)
    for share in shares:
        low, step = centre - share * half, 2 * share * half / levels
        codes = _codes(coefficients, low, step, levels)
        error = (codes * step[:, None] + low[:, None] - coefficients).square()
        error = error.sum(1) if weight is None else (error * weight[..., None]).sum(1)
        better = error < best_error
        best, best_error = torch.where(better, share, best), torch.where(better, error, best_error)
    low, step = centre - best * half, 2 * best * half / levels
    return _codes(coefficients, low, step, levels).to(torch.uint8), low, step


def quantise_packed(rows: Sequence[Tensor], layout: CodeLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise the coefficients ``[H, S, channels]`` of each row as `quantise` does, and pack the codes.

    Returns:
        Bytes ``[H, N, token_bytes]``, row after row; ``low`` and ``step`` ``[H, R, channels]``.
    """
    steps = None if rows[0].dtype != torch.float32 else steps_for(rows[0])
    if steps is None:
        coded = [quantise(row, layout) for row in rows]
        packed = [layout.pack(codes) for codes, _, _ in coded]
        low, step = (torch.stack([part[i] for part in coded], 1) for i in (1, 2))
        return packed[0] if len(packed) == 1 else torch.cat(packed, 1), low, step
    tokens = [row.shape[1] for row in rows]
    stored = torch.empty(len(rows[0]), sum(tokens), layout.token_bytes, dtype=torch.uint8, device="cpu")
    parts = zip(rows, stored.split(tokens, 1), strict=True)
    ranges = [steps.codes(row, layout.blocks, CLIP_GRID, part) for row, part in parts]
    low, step = (torch.stack(part, 1) for part in zip(*ranges, strict=True))
    return stored, low, step


def encode_codes(coefficients: Tensor, low: Tensor, step: Tensor, layout: CodeLayout) -> Tensor:
    """Round to uint8 codes ``[H, S, channels]`` of given ``low`` and ``step [H, channels]``; the rest is clipped."""
    levels = layout.levels(coefficients.device).to(coefficients.dtype)
    return _codes(coefficients, low.to(coefficients), step.to(coefficients), levels).to(torch.uint8)


def middle_codes(code: CodeLayout | HeadCodes | Numbers, device: torch.device) -> Tensor:
    """Find the middle code of each channel's range, ``[channels]`` or, with `HeadCodes`, ``[H, channels]``."""
    if isinstance(code, CodeLayout):
        return code.levels(device) / 2
    if isinstance(code, Numbers):
        return torch.zeros(code.channels, dtype=torch.float32, device=device)
    parts = [middle_codes(part, device) for part in code.parts]
    return torch.stack([torch.nn.functional.pad(part, (0, code.channels - len(part))) for part in parts])


def pack_coefficients(
    coefficients: Tensor, low: Tensor, step: Tensor, code: CodeLayout | HeadCodes | Numbers
) -> Tensor:
    """Pack coefficients ``[H, S, >= channels]`` as `code` says, with ranges ``low`` and ``step [H, channels]``.

    Returns:
        ``[H, S, token_bytes]``, or what `HeadCodes` says.
    """
    if isinstance(code, Numbers):
        return coefficients[..., : code.channels]
    if isinstance(code, CodeLayout):
        return _pack_within(coefficients[..., : code.channels], low, step, code)
    packed = []
    for head, part in enumerate(code.parts):
        own, n = coefficients[head : head + 1, :, : part.channels], part.channels
        if isinstance(part, Numbers):
            packed.append(own.flatten())
        else:
            packed.append(_pack_within(own, low[head : head + 1, :n], step[head : head + 1, :n], part).flatten())
    return torch.cat(packed)


def _pack_within(coefficients: Tensor, low: Tensor, step: Tensor, layout: CodeLayout) -> Tensor:
    """Pack coefficients ``[H, S, channels]`` as codes of given ranges."""
    steps = None if coefficients.dtype != torch.float32 else steps_for(coefficients)
    if steps is None:
        return layout.pack(encode_codes(coefficients, low, step, layout))
    packed = torch.empty(*coefficients.shape[:2], layout.token_bytes, dtype=torch.uint8, device="cpu")
    steps.codes_within(coefficients, low.to(coefficients), step.to(coefficients), layout.blocks, packed)
    return packed


def join_tokens(runs: Sequence[Tensor], code: Code | None) -> Tensor:
    """Join the storage of several runs of tokens, in their order."""
    if len(runs) == 1:
        return runs[0]
    if not isinstance(code, HeadCodes):
        return torch.cat(list(runs), 1)
    heads = zip(*(code.split(run) for run in runs), strict=True)
    return torch.cat([part.flatten() for head in heads for part in head])


def _codes(coefficients: Tensor, low: Tensor, step: Tensor, levels: Tensor) -> Tensor:
    divisor = torch.where(step > 0, step, torch.ones_like(step))[:, None]
    return ((coefficients - low[:, None]) / divisor).round_().clamp_(min=torch.zeros_like(levels), max=levels)
