"""The two ways in which peers code states: a range for each token, or for each channel of a group of tokens."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rotatek_cache.core.quantization import CodeLayout, TokenCode

SCALE = torch.float16  # of ranges and norms, whatever the states are in


class StateCode(Protocol):
    """The way the Keys, or Values, of a layer are stored."""

    @property
    def block(self) -> int:
        """Tokens that are coded together."""

    def encode(self, states: Tensor) -> tuple[Tensor, ...]:
        """Code states ``[B, H, n, D]``, n a multiple of `block`; parts grow along dimension 2."""

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Rebuild states ``[B, H, n, D]``, float32."""


def rotate(states: Tensor, rotation: Tensor | None) -> Tensor:
    """Rotate states ``[B, H, n, D]`` by ``[D, D]`` or, for each head, ``[H, D, D]``; to float32."""
    return states.float() if rotation is None else states.float() @ rotation


def rotate_back(states: Tensor, rotation: Tensor | None) -> Tensor:
    """Undo `rotate`."""
    return states if rotation is None else states @ rotation.mT


def clipped(states: Tensor, share: float) -> Tensor:
    """Clip each token ``[*, D]`` to its magnitude of rank ``share * D``; a share of 1 clips nothing."""
    width = states.shape[-1]
    rank = int(share * width)
    if rank >= width - 1:
        return states
    most = states.abs().kthvalue(rank + 1, -1, keepdim=True).values
    return states.clamp(-most, most)


@dataclass(frozen=True, eq=False)
class PerToken:
    """Codes with a range for each token and head, which lies beside them.

    Attributes:
        bits: 8, 4 or 2, of a channel.
        width: channels of a head.
        rotation: as in `rotate`, of the states before they are coded.
        clip: as in `clipped`.
    """

    bits: int
    width: int
    rotation: Tensor | None = None
    clip: float = 1.0
    block: int = 1

    @property
    def _code(self) -> TokenCode:
        return TokenCode(self.bits, self.width, SCALE)

    def encode(self, states: Tensor) -> tuple[Tensor, ...]:
        """Code states ``[B, H, n, D]``."""
        return (self._code.pack(clipped(rotate(states, self.rotation), self.clip)),)

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Rebuild states ``[B, H, n, D]``."""
        return rotate_back(self._code.unpack(parts[0]), self.rotation)


@dataclass(frozen=True, eq=False)
class PerChannel:
    """Codes with a range for each channel of a group of tokens.

    Attributes:
        bits: 8, 4 or 2, of a channel.
        width: channels of a head.
        block: tokens of a group.
        rotation: as in `rotate`, of the states before they are coded.
        by_norm: code each token over its own length, which lies beside it.
    """

    bits: int
    width: int
    block: int
    rotation: Tensor | None = None
    by_norm: bool = False

    @property
    def _layout(self) -> CodeLayout:
        return CodeLayout(((self.bits, self.width),))

    def encode(self, states: Tensor) -> tuple[Tensor, ...]:
        """Code states ``[B, H, n, D]``: bytes, ``low`` and ``step`` ``[B, H, n / block, 2, D]``, lengths."""
        rotated = rotate(states, self.rotation)
        norms: tuple[Tensor, ...] = ()
        if self.by_norm:
            norm = rotated.norm(dim=-1, keepdim=True).to(SCALE)
            rotated = rotated / norm.float().clamp_min(torch.finfo(SCALE).tiny)
            norms = (norm,)
        groups = rotated.unflatten(2, (-1, self.block))
        low, high = groups.amin(3), groups.amax(3)
        ranges = torch.stack([low, (high - low) / (2**self.bits - 1)], 3).to(SCALE)
        low, step = ranges.float().split(1, 3)
        codes = ((groups - low) / torch.where(step > 0, step, torch.ones_like(step))).round_()
        codes = codes.clamp_(0, 2**self.bits - 1).to(torch.uint8).flatten(2, 3)
        return self._layout.pack(codes), ranges, *norms

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Rebuild states ``[B, H, n, D]``."""
        packed, ranges, *norms = parts
        low, step = ranges.float().split(1, 3)
        states = (low + step * self._layout.unpack(packed).unflatten(2, (-1, self.block))).flatten(2, 3)
        for norm in norms:
            states = states * norm.float()
        return rotate_back(states, self.rotation)
