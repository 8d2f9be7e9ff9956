"""A basis of the model's own, from a basis file: what belongs to a request is the codes and its own mean."""

import torch
from torch import Tensor

from rotatek_cache.codecs.basis_file import load_basis
from rotatek_cache.codecs.coefficients import delta_bytes, encode_row, kept_of_token, to_float8
from rotatek_cache.codecs.interface import KeyCodec, Ranges, StateOptions
from rotatek_cache.codecs.shared_basis import HeadBudget
from rotatek_cache.core.basis import KeyBasis, coded_delta_dtype, compute_dtype
from rotatek_cache.core.quantization import CodeLayout, HeadCodes, Numbers, join_tokens, pack_coefficients
from rotatek_cache.core.seal import Sealed, SealJob, Shared
from rotatek_cache.core.segments import Stored
from rotatek_cache.options import BIT_CHOICES


class Calibrated(KeyCodec):
    """Stores coefficients in the file's basis of the layer; no eigenproblem and no basis per request."""

    supports_bits = BIT_CHOICES
    supports_energy = True

    def __init__(self, wanted: StateOptions) -> None:
        super().__init__(wanted)
        file = load_basis(wanted.options.basis)
        self.file = file if wanted.heads is None else file.of_heads(wanted.heads)

    def stored_bytes(self, tokens: int, width: int, dtype: torch.dtype, rank: int | None = None) -> int:
        """Count the bytes of the coefficients and the delta."""
        _, token_bytes = kept_of_token(self.wanted, width, dtype, rank)
        return tokens * token_bytes + delta_bytes(width, self.wanted.bits, dtype)

    def _code(self, width: int) -> CodeLayout | HeadCodes | Numbers:
        wanted, rank = self.wanted, self.wanted.rank_for(width)
        if wanted.bits == "auto":
            budget = HeadBudget(bits=wanted.bit_budget(width))
        else:
            budget = HeadBudget(energy=wanted.energy) if rank is None else HeadBudget(rank=rank)
        return self.file.code(wanted.layer, wanted.kind, wanted.bits, budget, wanted.options.allocation)

    def store(
        self, states: Tensor, ranges: Ranges, queries: Tensor | None = None, valid: Tensor | None = None
    ) -> Stored:
        """Store coefficients around each row's own mean."""
        bits, code = self.wanted.bits, self._code(states.shape[-1])
        state = self.file.state(self.wanted.layer, self.wanted.kind)
        mean = torch.stack([_mean(states[:, start : start + length]) for start, length in ranges], 1)
        self.expect_finite(mean)
        basis = state.basis(mean, code.channels, states.dtype)
        coefficients = [encode_row(states, basis, row, span, bits) for row, span in enumerate(ranges)]
        assert basis.delta is not None
        dtype, device = basis.delta.dtype, basis.delta.device
        if isinstance(code, Numbers) and bits is None:
            return Stored(torch.cat(coefficients, 1), basis.sealed())
        low, step, decoder, shift = state.codes(code, bits, dtype, device)
        if bits == "fp8":
            coefficients = [to_float8(part, step) for part in coefficients]
        stored = join_tokens([pack_coefficients(part, low, step, code) for part in coefficients], code)
        delta = (basis.delta.float() + shift[:, None]).to(coded_delta_dtype(dtype))
        return Stored(stored, _coded_basis(decoder, delta, code), None if isinstance(code, Numbers) else code)

    def seal_job(self, states: Tensor, queries: Tensor | None = None, valid: Tensor | None = None) -> SealJob | str:
        """Tell a kernel which of the file's directions to encode with, and the ranges of their codes."""
        bits, code = self.wanted.bits, self._code(states.shape[-1])
        if isinstance(code, HeadCodes) or bits == "fp8":
            return "a width of its own for each head, and float8, are stored by torch alone"
        state = self.file.state(self.wanted.layer, self.wanted.kind)
        encoder = state.directions(code.channels, states.dtype, states.device)[0]
        name = f"{self.wanted.kind}s"
        if isinstance(code, Numbers):
            return SealJob(name, states, code.channels, Shared(encoder))
        low, step, _, shift = state.codes(code, self.wanted.bits, states.dtype, states.device)
        return SealJob(name, states, code.channels, Shared(encoder, low, step, shift), code)

    def take(self, job: SealJob, sealed: Sealed) -> Stored:
        """Take coefficients around the row's own mean."""
        self.expect_finite(sealed.finite)
        state = self.file.state(self.wanted.layer, self.wanted.kind)
        if job.code is None:
            return Stored(sealed.data, state.basis(sealed.delta, job.channels, job.states.dtype).sealed())
        decoder = state.codes(job.code, self.wanted.bits, job.states.dtype, job.states.device)[2]
        return Stored(sealed.data, _coded_basis(decoder, sealed.delta, job.code), job.code)


def _coded_basis(decoder: Tensor, delta: Tensor, code: CodeLayout | HeadCodes | Numbers) -> KeyBasis:
    """Make the basis that reads codes by a decoder ``[H, D, channels]`` that all requests share."""
    rows = decoder[:, None].expand(-1, delta.shape[1], -1, -1)
    return KeyBasis(B=rows, delta=delta, fitted_rank=code.channels, shared=True)


def _mean(states: Tensor) -> Tensor:
    """Average ``[H, S, D]`` over tokens, in float32 for half precisions: ``[H, D]``."""
    return states.mean(1, dtype=compute_dtype(states.dtype))
