"""Index tensors and mask columns that the layers of one forward share."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotatek_cache.core.row_layout import LENGTH, Alignment

RowTable = tuple[Tensor, Tensor]  # first token and number of tokens of each row, [B] each

# The places of a segment's tokens, compared by identity: positions and first tokens of visual ones, alignment and
# number of columns of text, counts of the rows' tokens and which of them where all are coded.
SegmentPlaces = tuple[object, object]


class TextForm(NamedTuple):
    """All that the row table of a text segment depends on."""

    alignment: Alignment | None
    batch: int
    capacity: int
    length: int
    device: torch.device


class ForwardTables:
    """Tensors derived for one layer and kept for the others of the same forward.

    Layers mostly lie alike, and on a GPU every index tensor of a decode step is a launch.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop all of it: the forward has ended, or rows or positions have changed."""
        self._mask: Tensor | None = None
        self._columns: dict[SegmentPlaces, Tensor] = {}
        self._text_rows: dict[TextForm, RowTable] = {}
        self._made: dict[Hashable, Any] = {}

    def mask_columns(self, mask: Tensor, places: SegmentPlaces, positions: Callable[[], Tensor]) -> Tensor:
        """Gather the columns of the model's mask for a segment.

        Args:
            mask: the model's ``[B or 1, 1, Q, T]``; what was gathered is kept until another one comes.
            places: where the tokens lie; held here, so that identities stay unique.
            positions: gives their logical positions ``[B, n]``, if the columns are not known yet.

        Returns:
            ``[B, Q, n]``.
        """
        if self._mask is not mask:
            self._mask, self._columns = mask, {}
        if places not in self._columns:
            # Entries past a row's tokens may point at positions that a crop has removed.
            index = positions().to(mask.device).clamp(max=mask.shape[-1] - 1)
            # Heads may be rows of their own, all rows of one head after those of another.
            rows = mask[:, 0] if mask.shape[0] == 1 else mask[:, 0].repeat(index.shape[0] // mask.shape[0], 1, 1)
            rows = rows.expand(index.shape[0], -1, -1)
            self._columns[places] = rows.gather(2, index[:, None].expand(-1, mask.shape[2], -1))
        return self._columns[places]

    def made(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what the first layer that asked for `key` has made."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def text_rows(self, form: TextForm) -> RowTable:
        """Return the row table of text in this form."""
        if form not in self._text_rows:
            self._text_rows[form] = row_table(form)
        return self._text_rows[form]


def row_table(form: TextForm) -> RowTable:
    """Make the row table of text in this form."""
    batch, capacity, device = form.batch, form.capacity, form.device
    starts = torch.arange(0, batch * capacity, capacity, device=device)
    lengths = torch.full((batch,), form.length, dtype=LENGTH, device=device)
    first = None if form.alignment is None else form.alignment.first
    if first is None:
        return starts, lengths
    first = first.clamp(max=form.length)  # part of the padding may be to come
    return starts + first, lengths - first.to(LENGTH)
