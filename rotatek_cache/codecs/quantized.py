"""Codes of states that are not rotated, as in KIVI (arXiv 2402.02750): Keys per channel, Values per token."""

import torch
from torch import Tensor

from rotatek_cache.codecs.coefficients import coefficient_bytes, delta_bytes, store_coefficients
from rotatek_cache.codecs.interface import KeyCodec, Ranges
from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.quantization import TokenCode
from rotatek_cache.core.segments import Stored


class ChannelCodes(KeyCodec):
    """Stores codes with a range per channel and segment."""

    supports_bits = (8, 4, 2)
    supports_sparsity = False

    def stored_bytes(self, tokens: int, width: int, dtype: torch.dtype, rank: int | None = None) -> int:
        """Count the bytes of the codes, and of the step and the low end of each channel."""
        scales = width * dtype.itemsize + delta_bytes(width, self.wanted.bits, dtype)
        return tokens * coefficient_bytes(width, self.wanted.bits, dtype) + scales

    def store(
        self, states: Tensor, ranges: Ranges, queries: Tensor | None = None, valid: Tensor | None = None
    ) -> Stored:
        """Store codes of the states."""
        self.expect_finite(states)
        return store_coefficients([states[:, at : at + length] for at, length in ranges], KeyBasis(), self.wanted.bits)


class TokenCodes(KeyCodec):
    """Stores codes with a range per token, which lies beside them."""

    supports_bits = (8, 4, 2)
    supports_sparsity = False

    def stored_bytes(self, tokens: int, width: int, dtype: torch.dtype, rank: int | None = None) -> int:
        """Count the bytes of the codes and of two numbers a token."""
        return tokens * (coefficient_bytes(width, self.wanted.bits, dtype) + 2 * dtype.itemsize)

    def store(
        self, states: Tensor, ranges: Ranges, queries: Tensor | None = None, valid: Tensor | None = None
    ) -> Stored:
        """Store codes of the states."""
        self.expect_finite(states)
        assert isinstance(self.wanted.bits, int)
        code = TokenCode(self.wanted.bits, states.shape[-1], states.dtype)
        return Stored(code.pack(states), code=code)
