"""PCA without centring: the mean is one of the directions. A peer; centred PCA is RotateK with exponent 0."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.fitting import KeyStatistics, principal_directions, ridged, stored_basis
from rotatek_cache.options import Solver


@dataclass(frozen=True)
class UncentredPCA:
    """Top eigenvectors of the second moment; no delta."""

    def energy_matrix(self, stats: KeyStatistics) -> Tensor:
        """Give the uncentred scatter ``K^T K``."""
        mean = stats.mean
        outer = mean[..., :, None] * mean[..., None, :]
        return stats.scatter + stats.tokens.to(mean)[None, :, None, None] * outer

    def fit(self, stats: KeyStatistics, rank: int, solver: Solver, dtype: torch.dtype) -> KeyBasis:
        """Fit the orthogonal basis through the origin."""
        directions = principal_directions(ridged(self.energy_matrix(stats)), rank, solver)
        return stored_basis(directions, directions, None, None, dtype)
