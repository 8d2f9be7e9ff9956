"""TurboQuant (arXiv 2504.19874), in the form of least squared error.

A token over its length is rotated at random, so that its coordinates are nearly normal whatever it was, and each is
coded by the levels that are best for a normal distribution; the length lies beside the codes. The authors' rotation is
any orthogonal one, here Hadamard with drawn signs. They spend a bit on an unbiased inner product in another form, and
more bits on channels that stick out in their figures of 2.5 and 3.5 bits; neither is done here.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evals.peers.cache import PeerCache
from evals.peers.codes import SCALE, rotate, rotate_back
from rotatek_cache.core.hadamard import hadamard
from rotatek_cache.core.quantization import CodeLayout

ROUNDS = 1000  # of Lloyd's iteration, which has long converged then


@functools.cache
def normal_levels(bits: int) -> Tensor:
    """Find the ``2 ** bits`` levels of least squared error for a standard normal variable, rising, float32."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    levels = torch.linspace(-2, 2, 2**bits, dtype=torch.float64)
    for _ in range(ROUNDS):
        edges = (levels[1:] + levels[:-1]) / 2
        density = torch.nn.functional.pad(normal.log_prob(edges).exp(), (1, 1))
        below = torch.nn.functional.pad(torch.nn.functional.pad(normal.cdf(edges), (1, 0)), (0, 1), value=1.0)
        levels = -density.diff() / below.diff()
    return levels.float()


@dataclass(frozen=True, eq=False)
class NormalCode:
    """A token's length, and codes of its rotated direction by the levels of a normal distribution."""

    bits: int
    width: int
    rotation: Tensor
    block: int = 1

    @property
    def _layout(self) -> CodeLayout:
        return CodeLayout(((self.bits, self.width),))

    def encode(self, states: Tensor) -> tuple[Tensor, ...]:
        """Code states ``[B, H, n, D]``."""
        norm = states.float().norm(dim=-1, keepdim=True).to(SCALE)
        unit = rotate(states, self.rotation) * self.width**0.5 / norm.float().clamp_min(torch.finfo(SCALE).tiny)
        levels = normal_levels(self.bits)
        codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        return self._layout.pack(codes), norm

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Rebuild states ``[B, H, n, D]``."""
        packed, norm = parts
        unit = normal_levels(self.bits)[self._layout.unpack(packed).long()] / self.width**0.5
        return rotate_back(unit * norm.float(), self.rotation)


def turboquant(config: Any, bits: int = 4) -> PeerCache:
    """Make a cache whose Keys and Values have `bits` a channel, 8, 4 or 2."""
    return PeerCache(config, lambda _, width: (NormalCode(bits, width, hadamard(width, 0)),) * 2)
