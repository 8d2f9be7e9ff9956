"""The basis of least expected squared logit error at a given rank.

With query second moment Cq and Key covariance Ck, ``U`` the top eigenvectors of ``Cq^1/2 Ck Cq^1/2``,
``A = Cq^1/2 U`` and ``B = Cq^-1/2 U``. Derived for Q K^T in KQ-SVD (arXiv 2512.05916); as a covariance-weighted
projection in SAKI (arXiv 2608.03228).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.fitting import KeyStatistics, matrix_roots, principal_directions, stored_basis
from rotatek_cache.options import Solver


@dataclass(frozen=True)
class Oblique:
    """Weighs by the window's query moment over all heads of the group, shrunk towards a multiple of the identity.

    Args:
        shrinkage: share in [0, 1] of the identity; the window of one question overfits it at small values.
    """

    shrinkage: float = 0.5

    def _roots(self, stats: KeyStatistics) -> tuple[Tensor, Tensor]:
        """Give ``Cq^1/2`` and ``Cq^-1/2``, ``[H, R, D, D]``."""
        eye = torch.eye(stats.mean.shape[-1], dtype=stats.mean.dtype, device=stats.mean.device)
        moment = stats.query_moment()
        if moment is None:
            return eye.expand_as(stats.scatter), eye.expand_as(stats.scatter)
        mean_power = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        mean_power = torch.where(mean_power > 0, mean_power, torch.ones_like(mean_power))
        shrunk = (1 - self.shrinkage) * moment / mean_power + self.shrinkage * eye
        return matrix_roots(shrunk)

    def energy_matrix(self, stats: KeyStatistics) -> Tensor:
        """Give ``Cq^1/2 Ck Cq^1/2``: its eigenvalues are logit energy."""
        root, _ = self._roots(stats)
        matrix = root @ stats.scatter @ root
        return (matrix + matrix.mT) / 2

    def fit(self, stats: KeyStatistics, rank: int, solver: Solver, dtype: torch.dtype) -> KeyBasis:
        """Fit the oblique basis with ``B^T A = I``."""
        root, inverse = self._roots(stats)
        matrix = root @ stats.scatter @ root
        directions = principal_directions((matrix + matrix.mT) / 2, rank, solver)
        return stored_basis(root @ directions, inverse @ directions, stats.mean, stats.mean, dtype)
