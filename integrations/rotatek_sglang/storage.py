"""The two pools and the bases, all layers: tensors, what is written to them, and the views that attention reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.quantization import HeadCodes
from rotatek_cache.core.segments import SegmentView, Stored
from rotatek_sglang.layout import CacheLayout, StateLayout


class StatePool:
    """Rows of the visual Keys, or Values, of one layer, and the bases that decode them."""

    def __init__(self, layout: StateLayout, rows: int, bases: int, device: torch.device | str) -> None:
        self.layout = layout
        each = layout.width // layout.heads
        shape = (rows * layout.width,) if isinstance(layout.code, HeadCodes) else (rows, layout.heads, each)
        self.data = torch.zeros(shape, dtype=layout.dtype, device=device)
        # Bases first in memory, so that one of them lies side by side; heads first to those who read.
        self.tables = {
            name: torch.zeros(bases, layout.heads, *shape, dtype=dtype, device=device).transpose(0, 1)
            for name, (shape, dtype) in layout.tables.items()
        }
        shared = {} if layout.shared is None else {"B": layout.shared.expand(-1, bases, -1, -1)}
        self.basis = KeyBasis(
            **self.tables, **shared, fitted_rank=max(layout.ranks), shared=bool(shared), delta_shared=False
        )

    @property
    def stored(self) -> Tensor:
        """The rows as attention reads them: ``[H, rows, w]``, or as `HeadCodes` says."""
        return self.data if isinstance(self.layout.code, HeadCodes) else self.data.transpose(0, 1)

    def write(self, stored: Stored, rows: Tensor, basis: int) -> None:
        """Keep what a seal stored of one request: tokens at int64 `rows`, its basis under the number `basis`."""
        code = self.layout.code
        if isinstance(code, HeadCodes):
            for pool, head in zip(code.split(self.data), code.split(stored.data), strict=True):
                pool[0, rows] = head[0]
        else:
            self.data[rows] = stored.data.transpose(0, 1)
        for name, table in self.tables.items():
            table[:, basis] = getattr(stored.basis, name)[:, 0]

    @property
    def own_bytes(self) -> int:
        """Bytes held: rows, and what bases have of their own."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.data, *self.tables.values()))


@dataclass(frozen=True)
class SegmentTable:
    """Where the tokens of a batch are stored, the same for all layers.

    Attributes:
        slots: int32 ``[B, n]`` rows, a request's visual tokens first, then its text.
        visual: one entry for each segment that any request has.
        text_starts: int64 ``[B]``.
        text_lengths: int32 ``[B]``.
        text_max: host-known bound of the text lengths.
    """

    slots: Tensor
    visual: tuple["VisualTable", ...]
    text_starts: Tensor
    text_lengths: Tensor
    text_max: int


@dataclass(frozen=True)
class VisualTable:
    """The i-th segment of every request: starts int64 ``[B]``, lengths int32 ``[B]`` (0: none), bases int64 ``[B]``."""

    starts: Tensor
    lengths: Tensor
    bases: Tensor
    max_length: int


class LayerStorage:
    """One layer: text rows and visual rows."""

    def __init__(self, keys: StatePool, values: StatePool, text_keys: Tensor, text_values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.text_keys, self.text_values = text_keys, text_values

    def write_text(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store dense Keys ``[n, H, D]`` and Values ``[n, H, D_v]`` at int64 `rows`."""
        self.text_keys[rows] = keys
        self.text_values[rows] = values

    def views(self, table: SegmentTable) -> list[SegmentView]:
        """Return the tokens of a batch as attention reads them."""
        views = [
            SegmentView(
                keys=self.keys.stored,
                values=self.values.stored,
                starts=part.starts,
                lengths=part.lengths,
                max_length=part.max_length,
                basis=self.keys.basis,
                basis_rows=part.bases,
                key_code=self.keys.layout.code,
                value_basis=None if self.values.layout.is_dense else self.values.basis,
                value_code=self.values.layout.code,
                slots=table.slots,
            )
            for part in table.visual
        ]
        if table.text_max:
            views.append(
                SegmentView(
                    keys=self.text_keys.transpose(0, 1),
                    values=self.text_values.transpose(0, 1),
                    starts=table.text_starts,
                    lengths=table.text_lengths,
                    max_length=table.text_max,
                    slots=table.slots,
                )
            )
        return views

    def tensors_bytes(self) -> tuple[int, int]:
        """Count the bytes held for Keys and for Values, bases included."""
        text_keys = self.text_keys.numel() * self.text_keys.element_size()
        text_values = self.text_values.numel() * self.text_values.element_size()
        return self.keys.own_bytes + text_keys, self.values.own_bytes + text_values


def build_storage(
    layout: CacheLayout, text_rows: int, visual_rows: int, bases: int, device: torch.device | str
) -> Sequence[LayerStorage]:
    """Empty pools for all layers."""
    heads = layout.heads

    def text(width: int) -> Tensor:
        return torch.zeros(text_rows, heads.kv_heads, width, dtype=layout.dtype, device=device)

    return [
        LayerStorage(
            StatePool(layer.keys, visual_rows, bases, device),
            StatePool(layer.values, visual_rows, bases, device),
            text(heads.key_width),
            text(heads.value_width),
        )
        for layer in layout.layers
    ]
