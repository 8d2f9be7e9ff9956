"""SparK (arXiv 2508.15212): each token keeps its own channels, those with the largest query norm times Key power.

Unstructured, so there is no basis and no fused decode: Keys are rebuilt to be read. The mask is stored and counted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rotatek_cache.codecs.interface import KeyCodec, Ranges, StateOptions
from rotatek_cache.core.basis import KeyBasis, compute_dtype
from rotatek_cache.core.fitting import KeyStatistics
from rotatek_cache.core.quantization import as_numbers
from rotatek_cache.core.row_layout import integers
from rotatek_cache.core.segments import Stored


def pack_bits(flags: Tensor) -> Tensor:
    """Pack bools ``[..., n]`` into bytes ``[..., ceil(n / 8)]``, the first in the lowest bit."""
    flags = pad(flags.to(torch.uint8), (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (flags << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Unpack the first `count` bools of bytes ``[..., ceil(count / 8)]``."""
    bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten(-2)[..., :count].bool()


@dataclass(frozen=True)
class SparseCode:
    """Tokens of which `rank` of `channels` numbers of `dtype` are kept.

    A token is the kept numbers in channel order, one more for the others, a bit per channel, and, where the others have
    their `signs`, a bit for each of them.
    """

    channels: int
    rank: int
    dtype: torch.dtype
    signs: bool

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        signs = -(-(self.channels - self.rank) // 8) if self.signs else 0
        return (self.rank + 1) * self.dtype.itemsize + -(-self.channels // 8) + signs

    def pack(self, states: Tensor, score: Tensor) -> Tensor:
        """Pack states ``[..., channels]`` into bytes ``[..., token_bytes]``, with the channels of highest `score`."""
        wide = compute_dtype(self.dtype)
        order = score.topk(self.rank, -1).indices.sort(-1).values
        kept = torch.zeros_like(states, dtype=torch.bool).scatter_(-1, order, value=True)
        others = states.to(wide).gather(-1, (~kept).to(torch.uint8).argsort(dim=-1, descending=True, stable=True))
        others = others[..., : self.channels - self.rank]
        if others.shape[-1] == 0:
            rest = others.new_zeros(*others.shape[:-1], 1)
        elif self.signs:
            rest = others.square().mean(-1, keepdim=True).sqrt()
        else:
            rest = others.mean(-1, keepdim=True)
        numbers = torch.cat([states.gather(-1, order).to(self.dtype), rest.to(self.dtype)], -1)
        parts = [numbers.view(torch.uint8), pack_bits(kept)]
        return torch.cat([*parts, pack_bits(others < 0)] if self.signs else parts, -1)

    def unpack(self, packed: Tensor) -> Tensor:
        """Unpack states ``[..., channels]``, in the dtype that half precisions are computed in."""
        numbers_end = (self.rank + 1) * self.dtype.itemsize
        mask_end = numbers_end + -(-self.channels // 8)
        numbers = as_numbers(packed[..., :numbers_end], self.dtype)
        kept = unpack_bits(packed[..., numbers_end:mask_end], self.channels)
        rest = numbers[..., -1:].expand(*kept.shape[:-1], self.channels - self.rank)
        if self.signs:
            negative = unpack_bits(packed[..., mask_end:], self.channels - self.rank)
            rest = torch.where(negative, -rest, rest)
        states = numbers.new_zeros(kept.shape)
        states[kept] = numbers[..., :-1].flatten()
        states[~kept] = rest.flatten()
        return states


@dataclass(frozen=True)
class SparK:
    """Scores ``||q_j|| k_tj^2``; the query norm is over the window and all heads of the group.

    Args:
        signed_mean: read dropped channels as the mean of the token's dropped Keys; by default, as the paper has it, as
            ``sqrt(mean dropped score / ||q_j||)`` with their own signs.
    """

    signed_mean: bool = False

    def code(self, channels: int, rank: int, dtype: torch.dtype) -> SparseCode:
        """Describe how a token is stored."""
        return SparseCode(channels, rank, dtype, signs=not self.signed_mean)

    def basis(self, moment: Tensor | None, dtype: torch.dtype) -> KeyBasis:
        """Make the decoder that takes back what `pack` scales; none where dropped Keys are read as a mean.

        Args:
            moment: second moment of the queries ``[H, R, D, D]``; None weighs all channels alike.
            dtype: of the storage.
        """
        if self.signed_mean or moment is None:
            return KeyBasis()
        return KeyBasis(B=self.weight(moment).rsqrt().to(dtype))

    @staticmethod
    def weight(moment: Tensor) -> Tensor:
        """Divide ``||q_j||`` by its mean, ``[H, R, D]``, floored so that it can be divided by."""
        norm = moment.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        mean = norm.mean(-1, keepdim=True)
        norm = torch.where(mean > 0, norm / mean, torch.ones_like(norm))
        return norm.clamp_min(1e-3)

    def pack(self, keys: Tensor, weight: Tensor | None, code: SparseCode) -> Tensor:
        """Pack one row's Keys ``[H, S, D]`` for channel weights ``[H, D]``.

        With signs, Keys are stored times the root of the weight: what is recovered is one number a token then, and the
        division by ``sqrt(||q_j||)`` is the diagonal decoder's.
        """
        wide = keys.to(compute_dtype(keys.dtype))
        root = None if weight is None else weight.sqrt()[:, None]
        scaled = wide if root is None else wide * root
        return code.pack(wide if self.signed_mean else scaled, scaled.square())


class SparKCodec(KeyCodec):
    """Stores Keys of which each token keeps its own channels; `signed_mean` as in `SparK`."""

    def __init__(self, wanted: StateOptions, *, signed_mean: bool = False) -> None:
        super().__init__(wanted)
        self.method = SparK(signed_mean)

    def stored_bytes(self, tokens: int, width: int, dtype: torch.dtype, rank: int | None = None) -> int:
        """Count the bytes of the tokens and of the channels' weights."""
        code = self.method.code(width, rank or self.wanted.rank_for(width) or 1, dtype)
        return tokens * code.token_bytes + width * dtype.itemsize

    def store(
        self, states: Tensor, ranges: Ranges, queries: Tensor | None = None, valid: Tensor | None = None
    ) -> Stored:
        """Store the best channels of each token."""
        heads, _, width = states.shape
        rank = self.wanted.rank_for(width)
        assert rank is not None
        self.expect_finite(states)
        nothing = states.new_zeros(heads, len(ranges), width, dtype=compute_dtype(states.dtype))
        tokens = integers([length for _, length in ranges], states.device)
        moment = KeyStatistics(nothing, nothing[..., None], tokens, queries, valid).query_moment()
        weight = None if moment is None else self.method.weight(moment)
        code = self.method.code(width, rank, states.dtype)
        packed = [
            self.method.pack(states[:, start : start + length], None if weight is None else weight[:, row], code)
            for row, (start, length) in enumerate(ranges)
        ]
        return Stored(torch.cat(packed, 1), self.method.basis(moment, states.dtype), code)
