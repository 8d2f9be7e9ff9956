"""Ways to store visual Keys, by name: one paper, one file. Tests and evals walk through these tables."""

from typing import Protocol

import torch
from torch import Tensor

from rotatek_cache.codecs.bases.oblique import Oblique
from rotatek_cache.codecs.bases.pca import UncentredPCA
from rotatek_cache.codecs.bases.rotatek import RotateK
from rotatek_cache.codecs.bases.think import ThinK
from rotatek_cache.codecs.spark import SparK
from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.fitting import KeyStatistics, Solver


class BasisMethod(Protocol):
    """A way to choose a Key basis."""

    def energy_matrix(self, stats: KeyStatistics) -> Tensor:
        """Symmetric ``[H, R, D, D]`` whose eigenvalues say what each coefficient is worth."""

    def fit(self, stats: KeyStatistics, rank: int, solver: Solver, dtype: torch.dtype) -> KeyBasis:
        """The basis of `rank` columns (padded), stored in `dtype`."""


class NoRotation:
    """Keys as they are: with `key_bits` the per-channel codes of KIVI (arXiv 2402.02750), a range per segment."""


KeyMethod = BasisMethod | SparK | NoRotation

BASES: dict[str, BasisMethod] = {
    "rotatek": RotateK(),
    "tempered": RotateK(exponent=0.5),
    "pca": RotateK(exponent=0.0),
    "pca_uncentred": UncentredPCA(),
    "oblique": Oblique(),
    "think": ThinK(),
}
METHODS: dict[str, KeyMethod] = {
    **BASES,
    "spark": SparK(),
    "spark_mean": SparK(signed_mean=True),
    "none": NoRotation(),
}


def key_method(name: str) -> KeyMethod:
    """The method called `name`; a ValueError that lists the known ones otherwise."""
    if name not in METHODS:
        raise ValueError(
            f"basis must be one of {', '.join(sorted(METHODS))}, or the path of a .safetensors file, got {name!r}"
        )
    return METHODS[name]
