"""Integer codes for coefficients: bit allocation, uniform quantisation per channel, packing.

A coefficient is ``low + step * code`` with ``low`` and ``step`` per channel, frozen when the segment is sealed. Both
are folded into the decode basis (`KeyBasis.for_codes`), so that attention multiplies by the bare codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (8, 4, 2)
CHANNEL_BLOCK = 8  # channels of one width come in multiples of this
# Shares of the full range tried as clip range; a few outliers should not cost everyone else their resolution.
CLIP_GRID = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


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
        """The layout for bits per channel that fall from channel to channel; channels of 0 bits are left out."""
        return cls(tuple((width, bits.count(width)) for width in BITS if width in bits))

    @property
    def channels(self) -> int:
        """Channels that are kept."""
        return sum(channels for _, channels in self.blocks)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token."""
        return sum(channels * bits // 8 for bits, channels in self.blocks)

    def levels(self, device: torch.device) -> Tensor:
        """Largest code of each channel, float32 ``[channels]``."""
        return torch.cat([torch.full((n,), 2.0**bits - 1, device=device) for bits, n in self.blocks])

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 codes ``[..., channels]`` as bytes ``[..., row_bytes]``."""
        packed, start = [], 0
        for bits, channels in self.blocks:
            parts = codes[..., start : start + channels].chunk(8 // bits, -1)
            packed.append(sum((part << (bits * i) for i, part in enumerate(parts)), torch.zeros_like(parts[0])))
            start += channels
        return torch.cat(packed, -1)

    def unpack(self, packed: Tensor) -> Tensor:
        """Bytes ``[..., row_bytes]`` as uint8 codes ``[..., channels]``."""
        codes, start = [], 0
        for bits, channels in self.blocks:
            part = packed[..., start : start + channels * bits // 8]
            codes += [(part >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
            start += channels * bits // 8
        return torch.cat(codes, -1)


def allocate_bits(variance: Tensor, budget: int) -> list[int]:
    """Reverse water-filling in blocks: bits per channel from 8, 4, 2, 0 that sum to at most `budget`.

    Each bit quarters a channel's distortion. Starting from nothing, the step (0 to 2, 2 to 4, 4 to 8 bits) with the
    largest drop of distortion per bit spent is taken, a block of channels at a time.

    Args:
        variance: ``[channels]`` of the coefficients, falling (channels a multiple of 8).
        budget: bits per token in all.

    Returns:
        Bits per channel, falling.
    """
    blocks = variance.double().clamp_min(0).view(-1, CHANNEL_BLOCK).sum(-1).tolist()
    bits = [0] * len(blocks)
    steps = {0: 2, 2: 4, 4: 8}
    left = budget // CHANNEL_BLOCK
    while True:
        options = []
        for index, (energy, now) in enumerate(zip(blocks, bits, strict=True)):
            if now in steps and steps[now] - now <= left and (index == 0 or steps[now] <= bits[index - 1]):
                spent = steps[now] - now
                options.append((energy * (4.0**-now - 4.0 ** -steps[now]) / spent, -index))
        if not options:
            return [width for width in bits for _ in range(CHANNEL_BLOCK)]
        chosen = -max(options)[1]
        left -= steps[bits[chosen]] - bits[chosen]
        bits[chosen] = steps[bits[chosen]]


def quantise(coefficients: Tensor, layout: CodeLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of one row's coefficients, with the clip range of least squared error per channel.

    Args:
        coefficients: ``[H, S, channels]``, finite.
        layout: widths of the codes.

    Returns:
        uint8 codes ``[H, S, channels]``, ``low`` and ``step`` ``[H, channels]`` in the coefficients' dtype; constant
        channels have step 0 and their value as `low`.
    """
    levels = layout.levels(coefficients.device).to(coefficients.dtype)
    least, most = coefficients.amin(1), coefficients.amax(1)
    centre, half = (least + most) / 2, (most - least) / 2
    best_error = torch.full_like(half, torch.inf)
    best = torch.ones_like(half)
    for share in CLIP_GRID:
        low, step = centre - share * half, 2 * share * half / levels
        codes = _codes(coefficients, low, step, levels)
        error = (codes * step[:, None] + low[:, None] - coefficients).square().sum(1)
        better = error < best_error
        best, best_error = torch.where(better, share, best), torch.where(better, error, best_error)
    low, step = centre - best * half, 2 * best * half / levels
    return _codes(coefficients, low, step, levels).to(torch.uint8), low, step


def encode_codes(coefficients: Tensor, low: Tensor, step: Tensor, layout: CodeLayout) -> Tensor:
    """uint8 codes ``[H, S, channels]`` with given ``low`` and ``step [H, channels]``; the rest is clipped."""
    levels = layout.levels(coefficients.device).to(coefficients.dtype)
    return _codes(coefficients, low.to(coefficients), step.to(coefficients), levels).to(torch.uint8)


def _codes(coefficients: Tensor, low: Tensor, step: Tensor, levels: Tensor) -> Tensor:
    divisor = torch.where(step > 0, step, torch.ones_like(step))[:, None]
    return ((coefficients - low[:, None]) / divisor).round_().clamp_(min=torch.zeros_like(levels), max=levels)
