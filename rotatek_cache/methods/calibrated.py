"""Bases fitted once per model from many images (`rotatek calibrate`): no eigenproblem and no basis per request."""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotatek_cache.basis import KeyBasis, KeyStatistics, Solver, padded_rank
from rotatek_cache.coding import BITS, CodeLayout, allocate_bits

FORMAT = "rotatek-basis-1"
STATES = ("key", "value")


@dataclass(frozen=True, eq=False)
class StateBasis:
    """The basis of the Keys or Values of one layer, all directions, best first.

    Attributes:
        encoder, decoder: A and B, ``[H, D, D]``; the same tensor for an orthogonal basis.
        spectrum: what each coefficient is worth (its mean variance within an image), ``[H, D]``, falling.
        low, step: of the codes of each width in `BITS`, ``[H, D]``, for coefficients of Keys less their image's mean.
    """

    encoder: Tensor
    decoder: Tensor
    spectrum: Tensor
    low: dict[int, Tensor]
    step: dict[int, Tensor]
    _memo: dict[object, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict[int, object]) -> "StateBasis":
        return self  # of the model, never changed: copies of a cache share it

    def energy_matrix(self, stats: KeyStatistics) -> Tensor:
        """The calibrated spectrum on a diagonal, the same for every row."""
        rows = stats.mean.shape[1]
        return torch.diag_embed(self.spectrum.to(stats.mean))[:, None].expand(-1, rows, -1, -1)

    def fit(self, stats: KeyStatistics, rank: int, solver: Solver, dtype: torch.dtype) -> KeyBasis:
        """The first `rank` directions, shared by all requests, around the image's own mean."""
        rows, device = stats.mean.shape[1], stats.mean.device
        key = ("basis", rank, dtype, device)
        if key not in self._memo:
            first = [self._columns(self.encoder, rank, dtype, device)]
            same = self.decoder is self.encoder
            first.append(first[0] if same else self._columns(self.decoder, rank, dtype, device))
            self._memo[key] = (first[0], first[1])
        encoder, decoder = self._memo[key]
        wide_encoder = encoder[:, None].expand(-1, rows, -1, -1)
        wide_decoder = wide_encoder if decoder is encoder else decoder[:, None].expand(-1, rows, -1, -1)
        mean = stats.mean.to(dtype).contiguous()
        return KeyBasis(wide_encoder, wide_decoder, mean, mean, rank, shared=True)

    @staticmethod
    def _columns(matrix: Tensor, rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        columns = torch.nn.functional.pad(matrix[..., :rank], (0, padded_rank(rank) - rank))
        return columns.to(device, dtype).contiguous()

    def layout(self, budget: int) -> CodeLayout:
        """Widths for a budget of bits per token, from the spectrum averaged over heads."""
        return CodeLayout.from_bits(allocate_bits(self.spectrum.mean(0), budget))

    def ranges(self, layout: CodeLayout, device: torch.device) -> tuple[Tensor, Tensor]:
        """``low`` and ``step`` ``[H, channels]`` for the widths of `layout`."""
        parts, start = [], 0
        for bits, channels in layout.blocks:
            parts.append((self.low[bits][:, start : start + channels], self.step[bits][:, start : start + channels]))
            start += channels
        low, step = (torch.cat(part, 1).to(device) for part in zip(*parts, strict=True))
        return low, step

    def code_decoder(self, layout: CodeLayout, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """For codes, of all requests: the decoder ``[H, D, channels]`` and what `low` adds to delta, ``[H, D]``."""
        key = ("decoder", layout, dtype, device)
        if key not in self._memo:
            low, step = self.ranges(layout, device)
            columns = self.decoder[..., : layout.channels].to(device)
            self._memo[key] = ((columns * step[:, None]).to(dtype).contiguous(), (columns @ low[..., None])[..., 0])
        return self._memo[key]


@dataclass(frozen=True, eq=False)
class CalibratedBasis:
    """A basis file: per layer the bases of Keys and Values, and the model that they belong to."""

    path: str
    fingerprint: Tensor
    model_type: str
    images: int
    layers: dict[int, dict[str, StateBasis]]

    def state(self, layer: int, which: str) -> StateBasis:
        """The basis of ``which`` ("key" or "value") of a layer; a ValueError if the file has none."""
        if layer not in self.layers:
            raise ValueError(f"basis file {self.path} has no layer {layer}; it holds {sorted(self.layers)}")
        return self.layers[layer][which]

    def check_model(self, fingerprint: Tensor) -> None:
        """Raise unless the file was calibrated on the model with this fingerprint."""
        if not same_fingerprint(fingerprint, self.fingerprint):
            raise ValueError(
                f"basis file {self.path} was calibrated on another model ({self.model_type}): run `rotatek calibrate` "
                "for this one"
            )

    def __deepcopy__(self, memo: dict[int, object]) -> "CalibratedBasis":
        return self


def read_tensors(path: str | Path, expected: str, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and provenance of a file of ours; a ValueError where it is unreadable or of another format."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 (bases fitted online need torch alone)

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{what} {path} cannot be read (truncated, or no safetensors file): {error}") from None
    if metadata.get("format") != expected:
        raise ValueError(f"{path} is no {what} of this version: expected {expected!r}, got {metadata.get('format')!r}")
    return tensors, json.loads(metadata["provenance"])


def same_fingerprint(one: Tensor, other: Tensor) -> bool:
    """Whether two fingerprints agree within the rounding of half precisions."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-2, atol=1e-6)


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
    fingerprint = tensors.pop("fingerprint")
    layers: dict[int, dict[str, StateBasis]] = {}
    for index in sorted({int(name.split(".")[1]) for name in tensors}):
        layers[index] = {}
        for which in STATES:
            part = f"layers.{index}.{which}."
            encoder = tensors[part + "encoder"]
            layers[index][which] = StateBasis(
                encoder,
                tensors.get(part + "decoder", encoder),
                tensors[part + "spectrum"],
                {bits: tensors[f"{part}low{bits}"] for bits in BITS},
                {bits: tensors[f"{part}step{bits}"] for bits in BITS},
            )
    return CalibratedBasis(path, fingerprint, provenance["model_type"], provenance["images"], layers)
