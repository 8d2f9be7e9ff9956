"""Where tokens lie: packed rows of visual tokens, right-aligned columns of text, and the index tensors of both."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

POSITION, INDEX, LENGTH = torch.int32, torch.int64, torch.int32  # dtypes of the tables below

# Bytes of these tables: a stored token has its position; a row of a layer has the first of its visual tokens, their
# number, its basis and its first text column.
TOKEN_BYTES = POSITION.itemsize
ROW_BYTES = 3 * INDEX.itemsize + LENGTH.itemsize
ALIGNED = 16  # bytes, of tensors that are copied together


@dataclass(frozen=True)
class RowLayout:
    """Where the visual tokens of a seal go: packed row after row.

    Attributes:
        rows: int64 ``[R]``, the batch rows that are compressed.
        token_rows, token_columns: int64 ``[N]``, batch row and pending column of each token.
        run: (row, first column, column behind the last) where the tokens are one run of one row, so that none has to be
            gathered; None where they are not.
        positions: int32 ``[N]``, logical positions.
        starts, lengths, basis_rows: ``[B]``, the row table of the new segment.
        storage_ranges: (first token, tokens) of each compressed row.
        max_length: tokens of the longest row.
        uniform: every batch row was compressed and all have `max_length` tokens.
    """

    rows: Tensor
    token_rows: Tensor
    token_columns: Tensor
    run: tuple[int, int, int] | None
    positions: Tensor
    starts: Tensor
    lengths: Tensor
    basis_rows: Tensor
    storage_ranges: tuple[tuple[int, int], ...]
    max_length: int
    uniform: bool


@dataclass(frozen=True, eq=False)
class Alignment:
    """A right-aligned layout of text columns, shared by the layers that have it.

    Attributes:
        positions: int32 ``[B, width]``, logical position of each column.
        first: int64 ``[B]``, first column that belongs to the row; None: 0 for all.
        next_position: logical position of the first token after them.
        origin: the same on the host, where it is known there.
    """

    positions: Tensor
    first: Tensor | None
    next_position: int
    origin: "Alignment | None" = field(default=None, metadata={"saved": False})  # or `load` would move it

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.positions.shape[1]

    def to(self, device: torch.device) -> "Alignment":
        """Return the layout on a device."""
        first = None if self.first is None else self.first.to(device)
        return Alignment(self.positions.to(device), first, self.next_position)

    def select_rows(self, index: Tensor) -> "Alignment":
        """Return the layout in which row b is what row ``index[b]`` was."""
        first = None if self.first is None else self.first[index]
        return Alignment(self.positions[index], first, self.next_position)

    def on_host(self) -> "Alignment":
        """Return the layout on the host; a device is waited for where rows were selected since it was made."""
        if self.origin is not None or self.positions.device.type == "cpu":
            return self.origin or self
        return Alignment(self.positions.cpu(), None if self.first is None else self.first.cpu(), self.next_position)

    def on(self, device: torch.device) -> "Alignment":
        """Return the layout, made on the host, on a device."""
        if device.type == "cpu":
            return self
        positions, *first = moved([self.positions] if self.first is None else [self.positions, self.first], device)
        return Alignment(positions, first[0] if first else None, self.next_position, self)


class TextOrder(NamedTuple):
    """The places of text in states that hold more: int64 ``[B, 1]`` and ``[B, width]``."""

    rows: Tensor
    columns: Tensor


def row_index(index: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """Convert rows to select, integers or a bool per row, to int64 ``[B']``."""
    index = torch.as_tensor(index, device=device)
    return index.nonzero()[:, 0] if index.dtype == torch.bool else index


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    """Put int64 `values` on a device, as numbers in launches: a copy would make the host wait for a GPU."""
    if len(set(values)) == 1:
        return torch.full((len(values),), values[0], dtype=torch.int64, device=device)
    return torch.cat([torch.full((1,), value, dtype=torch.int64, device=device) for value in values])


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Move tensors of the host to a device, in one copy that is not waited for; on the CPU they are what comes back.

    They lie in one storage there, which lives as long as any of them.
    """
    if device.type == "cpu":
        return list(tensors)
    if device.type == "meta":  # shapes without numbers, of which bytes are estimated: as on the CPU
        return [tensor.to(device) for tensor in tensors]
    room = sum(-(-tensor.nbytes // ALIGNED) * ALIGNED for tensor in tensors)
    staged = torch.empty(room, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    for tensor, place in zip(tensors, parts_of(staged, tensors), strict=True):
        place.copy_(tensor)
    return parts_of(staged.to(device, non_blocking=True), tensors)


def parts_of(storage: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Divide bytes into tensors like the given ones, one behind the other."""
    parts, begin = [], 0
    for tensor in tensors:
        parts.append(storage[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        begin += -(-tensor.nbytes // ALIGNED) * ALIGNED
    return parts


def align_right(keep: Tensor, positions: Tensor, next_position: int) -> tuple[TextOrder, Alignment]:
    """Order columns such that the kept ones of bool ``[B, P]`` end up right-aligned.

    Returns:
        Their rows and columns, and the alignment they give with logical `positions` ``[B, P]``.
    """
    counts = keep.sum(1)
    width = int(counts.max()) if keep.shape[1] else 0
    # A stable sort of the flags moves the kept columns to the right end without changing their order.
    order = keep.int().argsort(dim=1, stable=True)[:, keep.shape[1] - width :]
    first = None if bool((counts == width).all()) else width - counts
    rows = torch.arange(keep.shape[0], device=keep.device)[:, None]
    return TextOrder(rows, order), Alignment(positions.gather(1, order).to(POSITION), first, next_position)


def column_positions(alignment: Alignment | None, columns: int, batch: int, device: torch.device) -> Tensor:
    """Return logical positions ``[B, columns]`` of text columns: those of the alignment, then one after the other."""
    if alignment is None:
        return torch.arange(columns, device=device).expand(batch, -1)
    tail = torch.arange(columns - alignment.width, device=device) + alignment.next_position
    return torch.cat([alignment.positions.long(), tail.expand(batch, -1)], 1)


def own_columns(alignment: Alignment | None, columns: int, batch: int, device: torch.device) -> Tensor:
    """Return bool ``[B, columns]``: which text columns belong to their row."""
    index = torch.arange(columns, device=device).expand(batch, -1)
    return index >= 0 if alignment is None or alignment.first is None else index >= alignment.first[:, None]
