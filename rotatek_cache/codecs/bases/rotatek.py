"""RotateK (arXiv 2605.19218): the top eigenvectors of the query-weighted covariance of the visual Keys."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.fitting import KeyStatistics, orthogonal_basis, ridged, weighted_scatter
from rotatek_cache.options import Solver


@dataclass(frozen=True)
class RotateK:
    """Weighs channels by the window's queries to the power `exponent`: 1 is the paper, 0 centred PCA.

    With a weight, the eigenvectors are those of the *weighted* Keys but are applied to the unweighted ones: Keys of
    rank below r are then not reproduced exactly (they are at exponent 0).
    """

    exponent: float = 1.0

    def energy_matrix(self, stats: KeyStatistics) -> Tensor:
        """Give the weighted scatter."""
        weight = stats.channel_norm() if self.exponent else None
        return weighted_scatter(stats.scatter, None if weight is None else weight**self.exponent)

    def fit(self, stats: KeyStatistics, rank: int, solver: Solver, dtype: torch.dtype) -> KeyBasis:
        """Fit the orthogonal basis of the top directions."""
        return orthogonal_basis(stats.mean, ridged(self.energy_matrix(stats)), rank, solver, dtype)
