"""Codes of states under a Walsh-Hadamard rotation, as in AKVQ-VL (arXiv 2501.15021): a basis that nobody has to fit."""

import functools

import torch
from torch import Tensor

from rotatek_cache.codecs.coefficients import coefficient_bytes, encode_row, store_codes
from rotatek_cache.codecs.interface import KeyCodec, Ranges
from rotatek_cache.core.basis import KeyBasis, coded_delta_dtype
from rotatek_cache.core.hadamard import hadamard
from rotatek_cache.core.quantization import CodeLayout
from rotatek_cache.core.segments import Stored


class HadamardCodes(KeyCodec):
    """Stores codes with a range per rotated channel and segment, for Keys and Values alike.

    The rotation spreads what is in an outlier channel over all of them, so that no channel's range is much wider than
    the others'. It is read as any basis is: the signs are a B of 8 bits, exact, of which a process holds one for each
    head width (a byte for each pair of channels), and the ranges are its scale and delta, which belong to the request.
    """

    supports_bits = (8, 4, 2)
    supports_sparsity = False

    def stored_bytes(self, tokens: int, width: int, dtype: torch.dtype, rank: int | None = None) -> int:
        """Count the bytes of the codes, and of the step and the low end of each channel."""
        ranges = width * (torch.promote_types(dtype, torch.float32).itemsize + coded_delta_dtype(dtype).itemsize)
        return tokens * coefficient_bytes(width, self.wanted.bits, dtype) + ranges

    def store(
        self, states: Tensor, ranges: Ranges, queries: Tensor | None = None, valid: Tensor | None = None
    ) -> Stored:
        """Store codes of the rotated states."""
        self.expect_finite(states)
        assert isinstance(self.wanted.bits, int)
        heads, width = states.shape[0], states.shape[-1]
        encoder, decoder, size = _rotation(width, states.device)
        wide = torch.promote_types(states.dtype, torch.float32)
        encoder = encoder.to(wide)
        basis = KeyBasis(
            A=encoder.expand(heads, len(ranges), -1, -1),
            B=decoder.expand(heads, len(ranges), -1, -1),
            scale=torch.full((heads, len(ranges), width), size, dtype=wide, device=states.device),
            delta=torch.zeros(heads, len(ranges), width, dtype=states.dtype, device=states.device),
            fitted_rank=width,
            shared=True,
        )
        coefficients = [encode_row(states, basis, row, span, self.wanted.bits) for row, span in enumerate(ranges)]
        return store_codes(coefficients, basis, CodeLayout(((self.wanted.bits, width),)))


@functools.lru_cache(maxsize=16)
def _rotation(width: int, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Return the rotation ``[width, width]`` in float32, its signs in int8, and the size of its entries."""
    matrix = hadamard(width)
    # An inference tensor could not be used in a later forward that records gradients.
    with torch.inference_mode(mode=False):
        return matrix.to(device).clone(), matrix.sign().to(torch.int8).to(device), float(matrix[0, 0])
