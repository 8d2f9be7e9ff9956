"""Key bases by name: one paper, one file. Tests and evals walk through `BASES`."""

from typing import Protocol

import torch
from torch import Tensor

from rotatek_cache.basis import KeyBasis, KeyStatistics, Solver
from rotatek_cache.methods.oblique import Oblique
from rotatek_cache.methods.pca import UncentredPCA
from rotatek_cache.methods.rotatek import RotateK
from rotatek_cache.methods.think import ThinK


class KeyMethod(Protocol):
    """A way to choose a Key basis."""

    def energy_matrix(self, stats: KeyStatistics) -> Tensor:
        """Symmetric ``[H, R, D, D]`` whose eigenvalues say what each coefficient is worth."""

    def fit(self, stats: KeyStatistics, rank: int, solver: Solver, dtype: torch.dtype) -> KeyBasis:
        """The basis of `rank` columns (padded), stored in `dtype`."""


BASES: dict[str, KeyMethod] = {
    "rotatek": RotateK(),
    "tempered": RotateK(exponent=0.5),
    "pca": RotateK(exponent=0.0),
    "pca_uncentred": UncentredPCA(),
    "oblique": Oblique(),
    "think": ThinK(),
}


def key_method(name: str) -> KeyMethod:
    """The method called `name`; a ValueError that lists the known ones otherwise."""
    if name not in BASES:
        raise ValueError(f"basis must be one of {', '.join(sorted(BASES))}, got {name!r}")
    return BASES[name]
