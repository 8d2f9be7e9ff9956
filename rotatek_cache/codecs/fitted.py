"""A basis fitted to the states of each request, by a method of `bases`."""

from typing import Protocol

import torch
from torch import Tensor

from rotatek_cache.codecs.bases.rotatek import RotateK
from rotatek_cache.codecs.coefficients import (
    delta_bytes,
    encode_row,
    head_groups,
    kept_of_token,
    store_codes,
    store_coefficients,
)
from rotatek_cache.codecs.interface import KeyCodec, Ranges, StateOptions
from rotatek_cache.core.basis import KeyBasis, compute_dtype, padded_rank
from rotatek_cache.core.fitting import KeyStatistics, key_moments, rank_for_energy
from rotatek_cache.core.quantization import CodeLayout, allocate_bits
from rotatek_cache.core.row_layout import integers
from rotatek_cache.core.seal import Fit, Sealed, SealJob
from rotatek_cache.core.segments import Stored
from rotatek_cache.options import BIT_CHOICES, Solver


class BasisMethod(Protocol):
    """A way to choose a basis."""

    def energy_matrix(self, stats: KeyStatistics) -> Tensor:
        """Give the symmetric ``[H, R, D, D]`` whose eigenvalues say what each coefficient is worth."""

    def fit(self, stats: KeyStatistics, rank: int, solver: Solver, dtype: torch.dtype) -> KeyBasis:
        """Fit the basis of `rank` columns (padded), stored in `dtype`."""


class Fitted(KeyCodec):
    """Stores coefficients in a basis of the request's own."""

    owns_basis = True
    supports_bits = BIT_CHOICES
    supports_energy = True

    def __init__(self, wanted: StateOptions, method: BasisMethod) -> None:
        super().__init__(wanted)
        self.method = method

    def stored_bytes(self, tokens: int, width: int, dtype: torch.dtype, rank: int | None = None) -> int:
        """Count the bytes of the coefficients, the basis and its delta."""
        rank, token_bytes = kept_of_token(self.wanted, width, dtype, rank)
        stored = tokens * token_bytes + delta_bytes(width, self.wanted.bits, dtype)
        if self.wanted.options.basis_bits is None:
            return stored + width * rank * dtype.itemsize
        return stored + width * rank + rank * compute_dtype(dtype).itemsize

    def rank_of(self, stats: KeyStatistics) -> int:
        """Find the rank that keeps the wanted share of the variance in every head."""
        assert self.wanted.energy is not None
        return rank_for_energy(self.method.energy_matrix(stats), self.wanted.energy)

    def bits_of(self, variance: Tensor) -> list[int]:
        """Deal automatic bits out to coefficients, whose falling variances are ``[H, R, D]``."""
        return allocate_bits(variance.mean((0, 1))[None], self.wanted.bit_budget(variance.shape[-1]))[0]

    def store(
        self, states: Tensor, ranges: Ranges, queries: Tensor | None = None, valid: Tensor | None = None
    ) -> Stored:
        """Fit a basis to the states and store their coefficients."""
        wanted, width = self.wanted, states.shape[-1]
        rank = wanted.rank_for(width)
        mean, scatter = _moments(states, ranges)
        # What is not finite in a channel of the states is not finite on the diagonal.
        self.expect_finite(scatter.diagonal(dim1=-2, dim2=-1))
        tokens = integers([length for _, length in ranges], states.device)
        stats = KeyStatistics(mean, scatter, tokens, queries, valid)
        # What storage pads a rank to costs the same bytes with directions in it.
        rank = min(width, padded_rank(self.rank_of(stats) if rank is None else rank))
        # Spending bits freely needs all directions, the best ones first.
        automatic = wanted.bits == "auto"
        basis = self.method.fit(stats, width if automatic else rank, wanted.options.solver, states.dtype)
        layout = None
        if automatic:
            variance, order = _coefficient_variance(basis, stats).sort(-1, descending=True)
            layout = CodeLayout.from_bits(self.bits_of(variance))
            basis = basis.columns(order[..., : layout.channels])
        if wanted.options.basis_bits is not None:
            basis = basis.in_int8()
        coefficients = [encode_row(states, basis, row, span, wanted.bits) for row, span in enumerate(ranges)]
        if layout is not None:
            return store_codes(coefficients, basis, layout)
        return store_coefficients(coefficients, basis, wanted.bits)

    def seal_job(self, states: Tensor, queries: Tensor | None = None, valid: Tensor | None = None) -> SealJob | str:
        """Tell a kernel how to fit a centred orthogonal basis and to store its coefficients."""
        wanted, options = self.wanted, self.wanted.options
        rank = wanted.rank_for(states.shape[-1])
        if not isinstance(self.method, RotateK):
            return f"a basis of {type(self.method).__name__} is fitted by torch alone"
        if options.solver != "subspace":
            return f"solver={options.solver!r} runs in torch alone"
        if rank is None or wanted.bits == "auto":
            return "the shape of storage follows from the states, which the host has to read"
        if wanted.bits == "fp8" or options.basis_bits is not None:
            return "float8 coefficients and bases of 8 bits are stored by torch alone"
        channels = padded_rank(rank)
        code = None if wanted.bits is None else CodeLayout(((int(wanted.bits), channels),))
        fit = Fit(min(states.shape[-1], channels), self.method.exponent, queries, valid)
        return SealJob(f"{wanted.kind}s", states, channels, fit, code)

    def take(self, job: SealJob, sealed: Sealed) -> Stored:
        """Take coefficients with the basis that was fitted."""
        assert isinstance(job.basis, Fit)
        self.expect_finite(sealed.finite)
        encoder = sealed.decoder if job.code is None else None  # an orthogonal basis is both
        basis = KeyBasis(encoder, sealed.decoder, delta=sealed.delta, fitted_rank=job.basis.rank)
        return Stored(sealed.data, basis, job.code)


def _moments(states: Tensor, ranges: Ranges) -> tuple[Tensor, Tensor]:
    """Take `key_moments` of each row of packed states ``[H, N, D]``: ``[H, R, D]`` and ``[H, R, D, D]``."""
    alike = _alike(states, ranges)
    if alike is None:
        rows = [_moments(states[:, start : start + length], [(0, length)]) for start, length in ranges]
        mean, scatter = zip(*rows, strict=True)
        return torch.cat(mean, 1), torch.cat(scatter, 1)
    mean, scatter = zip(*(key_moments(alike[heads]) for heads in head_groups(states)), strict=True)
    return torch.cat(mean), torch.cat(scatter)


def _alike(states: Tensor, ranges: Ranges) -> Tensor | None:
    """View packed states as ``[H, R, S, D]`` where all rows have the same number of tokens."""
    if len({length for _, length in ranges}) != 1 or states.shape[1] != len(ranges) * ranges[0][1]:
        return None
    return states.unflatten(1, (len(ranges), -1))


def _coefficient_variance(basis: KeyBasis, stats: KeyStatistics) -> Tensor:
    """Find the variance over tokens of each coefficient, ``[H, R, r]``, from the scatter of what is encoded."""
    assert basis.A is not None
    encoder = basis.A.to(stats.scatter.dtype)
    variance = (encoder * (stats.scatter @ encoder)).sum(-2)
    return variance / stats.tokens.clamp_min(1).to(variance)[None, :, None]
