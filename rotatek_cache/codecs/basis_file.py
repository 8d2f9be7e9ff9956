"""Basis files: bases fitted once per model from many images (`rotatek calibrate`)."""

import functools
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from rotatek_cache.codecs.shared_basis import CalibratedBasis, StateBasis
from rotatek_cache.core.quantization import BITS

FORMAT = "rotatek-basis-2"
VISUAL_STATES = ("key", "value")
TOKEN_STATES = ("token_key", "token_value")  # in files that were calibrated with text


def read_file(path: str | os.PathLike[str], expected: str, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a file; a ValueError where it is unreadable or of another format."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 (bases fitted online need torch alone)

    if not Path(path).is_file():
        raise ValueError(f"{what} {path} does not exist, or is no file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{what} {path} cannot be read (truncated, or no safetensors file): {error}") from None
    if metadata.get("format") != expected:
        got = metadata.get("format")
        raise ValueError(f"{path} is no {what} of this version, make it anew: expected {expected!r}, got {got!r}")
    return tensors, metadata


def read_tensors(path: str | Path, expected: str, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and provenance of a file; a ValueError where it is unreadable or of another format."""
    tensors, metadata = read_file(path, expected, what)
    return tensors, json.loads(metadata.get("provenance", "{}"))


def load_basis(path: str | Path) -> CalibratedBasis:
    """Read a basis file; caches that name the same unchanged file share its tensors."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"basis file {path} does not exist")
    return _load(str(file.resolve()), file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _load(path: str, modified: int) -> CalibratedBasis:
    del modified  # part of the memo's key only
    tensors, provenance = read_tensors(path, FORMAT, "basis file")
    try:
        return _layers(path, tensors, provenance)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"basis file {path} is incomplete or holds something else: {error}") from None


def _layers(path: str, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> CalibratedBasis:
    fingerprint = tensors.pop("fingerprint")
    layers: dict[int, dict[str, StateBasis]] = {}
    for index in sorted({int(name.split(".")[1]) for name in tensors}):
        layers[index] = {}
        for states in (VISUAL_STATES, TOKEN_STATES):
            if any(f"layers.{index}.{which}.encoder" in tensors for which in states):
                layers[index] |= {which: _state(tensors, f"layers.{index}.{which}.") for which in states}
        if not layers[index]:
            raise ValueError(f"layer {index} has no encoder")
    return CalibratedBasis(path, fingerprint, provenance["model_type"], provenance["images"], layers)


def _state(tensors: dict[str, Tensor], part: str) -> StateBasis:
    encoder = tensors[part + "encoder"]
    heads, width, _ = encoder.shape
    around = ("mean",) if part.split(".")[2] in TOKEN_STATES else ()
    ranges = (f"{name}{bits}" for name in ("low", "step") for bits in BITS)
    for name in ("spectrum", "gain", *around, *ranges):
        if tensors[part + name].shape != (heads, width):
            raise ValueError(f"{part}{name} has shape {tuple(tensors[part + name].shape)}")
    return StateBasis(
        encoder,
        tensors.get(part + "decoder", encoder),
        tensors[part + "spectrum"],
        tensors[part + "gain"],
        {bits: tensors[f"{part}low{bits}"] for bits in BITS},
        {bits: tensors[f"{part}step{bits}"] for bits in BITS},
        tensors[part + "mean"] if around else None,
    )
