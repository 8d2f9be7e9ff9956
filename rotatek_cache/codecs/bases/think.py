"""ThinK (arXiv 2407.21018): keep the channels with the largest product of query and Key power."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.fitting import KeyStatistics, one_hot_columns, stored_basis
from rotatek_cache.options import Solver


@dataclass(frozen=True)
class ThinK:
    """Selection of channels as a one-hot basis: really smaller storage, the same decode. Dropped channels read as 0."""

    def scores(self, stats: KeyStatistics) -> Tensor:
        """Score channels by ``mean(q_j^2) mean(k_j^2)``, averaged over the group, ``[H, R, D]``."""
        power = stats.scatter.diagonal(dim1=-2, dim2=-1) / stats.tokens.to(stats.mean)[None, :, None]
        power = power + stats.mean.square()
        moment = stats.query_moment()
        return power if moment is None else power * moment.diagonal(dim1=-2, dim2=-1)

    def energy_matrix(self, stats: KeyStatistics) -> Tensor:
        """Put the scores on a diagonal."""
        return torch.diag_embed(self.scores(stats))

    def fit(self, stats: KeyStatistics, rank: int, solver: Solver, dtype: torch.dtype) -> KeyBasis:
        """Pick the best channels by one-hot columns."""
        chosen = self.scores(stats).topk(rank, -1).indices
        columns = one_hot_columns(chosen, stats.mean.shape[-1], stats.mean.dtype)
        return stored_basis(columns, columns, None, None, dtype)
