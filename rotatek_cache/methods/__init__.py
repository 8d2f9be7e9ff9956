"""Key bases and token methods by name: one paper, one file. Tests and evals walk through `BASES` and `TOKENS`."""

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor

from rotatek_cache.basis import KeyBasis, KeyStatistics, Solver
from rotatek_cache.methods.divprune import DivPrune
from rotatek_cache.methods.fastv import FastV
from rotatek_cache.methods.oblique import Oblique
from rotatek_cache.methods.pca import UncentredPCA
from rotatek_cache.methods.rotatek import RotateK
from rotatek_cache.methods.think import ThinK
from rotatek_cache.methods.visionzip import VisionZip
from rotatek_cache.methods.vl_cache import VLCache
from rotatek_cache.tokens import TokenMethod


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


TOKENS: dict[str, type[TokenMethod]] = {
    "divprune": DivPrune,
    "fastv": FastV,
    "visionzip": VisionZip,
    "vl_cache": VLCache,
}


def token_method(spec: TokenMethod | str) -> TokenMethod:
    """A token method as it is, or from a name, a share and further settings: ``"vl_cache:0.4"``.

    Settings follow as ``name=value``, separated by commas: ``"vl_cache:0.4,uniform=0.8"``.
    """
    if isinstance(spec, TokenMethod):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"tokens must be a token method or a string such as 'fastv:0.4', got {type(spec).__name__}")
    name, _, settings = spec.partition(":")
    if name not in TOKENS:
        raise ValueError(f"tokens must name one of {', '.join(sorted(TOKENS))}, got {spec!r}")
    keep, *others = settings.split(",")
    pairs = [("keep", keep), *((key, value) for key, _, value in (other.partition("=") for other in others))]
    known = {field.name for field in dataclasses.fields(TOKENS[name])}
    arguments: dict[str, Any] = {}
    for key, value in pairs:
        if key not in known or key in arguments:
            raise ValueError(
                f"tokens={spec!r}: {key!r} is no setting of {name} (or given twice), which has {sorted(known)}"
            )
        try:
            arguments[key] = int(value) if value.isdigit() and key != "keep" else float(value)
        except ValueError:
            raise ValueError(
                f"tokens={spec!r}: {key} must be a number, got {value!r}; expected '<name>:<keep>[,<setting>=<value>]'"
            ) from None
    return TOKENS[name](**arguments)
