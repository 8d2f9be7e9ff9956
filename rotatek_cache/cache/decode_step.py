"""A decode step whose every address is fixed: what a captured graph reads and writes of a cache.

A graph freezes host numbers and addresses. So the text column that a step writes, the lengths of rows and the row
tables of visual segments live in tensors of the step; what changes between steps is written into them.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.row_layout import Alignment, column_positions, own_columns
from rotatek_cache.core.segments import SegmentView, Stored, TextSegment, VisualSegment


@dataclass(eq=False)
class TextCursor:
    """Where the next token of each row goes; shared by the layers whose text lies alike.

    Attributes:
        text: the text segment of one of these layers.
        column: int64 ``[1]``, the column that the next step writes.
        starts, lengths: int64 and int32 ``[B]``, first slot and number of tokens of each row, the next token included.
        place: int64 ``[1]``, where the query of the next token goes among the last `window`.
        window: how many queries are kept, where tokens of the answer are to be evicted by them; 1 elsewhere.
        at: the column on the host.
        alignment: the layout that `starts` and `lengths` were made from.
    """

    text: TextSegment
    column: Tensor
    starts: Tensor
    lengths: Tensor
    place: Tensor
    window: int = 1
    at: int = -1
    alignment: Alignment | None = None

    @classmethod
    def of(cls, text: TextSegment, window: int) -> "TextCursor":
        """Make the cursor of a text segment that holds something."""
        assert text.keys is not None
        batch, device = text.keys.shape[1], text.keys.device
        cursor = cls(
            text,
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros(batch, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            window,
        )
        cursor.refresh()
        return cursor

    def refresh(self) -> None:
        """Write what has changed since the last step into the tensors."""
        if self.at == self.text.length and self.alignment is self.text.alignment:
            return
        self.at, self.alignment = self.text.length, self.text.alignment
        batch, capacity = len(self.starts), self.text.capacity
        self.column.fill_(self.at)
        self.place.fill_(self.text.next_position % self.window)
        torch.arange(0, batch * capacity, capacity, out=self.starts)
        self.lengths.fill_(self.at + 1)
        if self.alignment is not None and self.alignment.first is not None:
            self.starts.add_(self.alignment.first)
            self.lengths.sub_(self.alignment.first)

    def advance_on_device(self) -> None:
        """Move on by one column; part of what is captured."""
        self.column.add_(1)
        self.lengths.add_(1)
        if self.window > 1:
            self.place.add_(1).remainder_(self.window)


@dataclass(eq=False)
class TableCopy:
    """The row table of a visual segment, copied to addresses that stay; shared by the layers that lie alike."""

    segment: VisualSegment
    tensors: dict[str, Tensor] = field(default_factory=dict)
    copied: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.copied = self.segment.table()
        self.tensors = {name: tensor.clone() for name, tensor in self.copied.items()}

    def refresh(self) -> None:
        """Copy what has been selected anew since the last step."""
        for name, current in self.segment.table().items():
            if current is not self.copied[name]:
                self.tensors[name].copy_(current)
                self.copied[name] = current

    def view(self, view: SegmentView) -> SegmentView:
        """Return the view of the segment that reads these tensors."""
        table, chunks = self.tensors, view.chunks
        if chunks is not None:
            chunks = chunks.with_rows(table["chunk_starts"], table["chunk_counts"], table["chunk_read"])
        rows = None if view.basis_rows is None else table["basis_rows"]
        starts, lengths = table["starts"], table["lengths"]
        return dataclasses.replace(view, starts=starts, lengths=lengths, basis_rows=rows, chunks=chunks)


@dataclass(eq=False)
class LayerStep:
    """One layer in a decode step of fixed addresses.

    Attributes:
        layer: the layer.
        text: its text segment; a layer that was reset has another one.
        segments: its visual segments.
        tables: of each of them, the copy of its row table.
        uniform: of each of them, whether its rows lie in order.
        keys, values: the text buffers ``[H, B, capacity, D]``.
        cursor: where the next token goes.
        views: what attention reads.
        queries: the last queries, see `Answer`; None where none are kept.
        reads: layers that have attended in this step.
    """

    layer: LayerKV
    text: TextSegment
    segments: list[VisualSegment]
    tables: list[TableCopy]
    uniform: list[bool]
    keys: Tensor
    values: Tensor
    cursor: TextCursor
    views: list[SegmentView]
    queries: Tensor | None = None
    reads: int = 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write ``[B, H, 1, D]`` and ``[B, H, 1, D_v]`` to the column that the device knows."""
        self.reads = 0
        self.keys.index_copy_(2, self.cursor.column, keys.transpose(0, 1))
        self.values.index_copy_(2, self.cursor.column, values.transpose(0, 1))

    def keep_query(self, query: Tensor) -> None:
        """Write ``[B, H_q, 1, D]`` to the place that the device knows."""
        if self.queries is not None:
            held = self.queries[self.reads % len(self.queries)]
            held.index_copy_(2, self.cursor.place, query.to(held.dtype))
            self.reads += 1

    def fits(self) -> bool:
        """Say whether the layer still is what this step was made of, with a free column."""
        layer, text = self.layer, self.text
        return (
            layer.pending is None
            and layer.text is text
            and text.keys is self.keys
            and text.values is self.values
            and not text.lent
            and self.queries is _queries(layer)
            and text.length == self.cursor.text.length < text.capacity
            and len(layer.segments) == len(self.segments)
            and all(now is then for now, then in zip(layer.segments, self.segments, strict=True))
            and all(now.uniform == then for now, then in zip(layer.segments, self.uniform, strict=True))
        )


class DecodeStep:
    """All layers of a cache in a decode step of fixed addresses.

    Args:
        layers: of one cache, each with text and nothing pending. Their text buffers get free columns first.
    """

    def __init__(self, layers: Sequence[LayerKV]) -> None:
        for layer in layers:
            layer.text.reserve()
        self.cursors: list[TextCursor] = []
        self.tables: list[TableCopy] = []
        self.layers = [self._layer(layer) for layer in layers]

    def _layer(self, layer: LayerKV) -> LayerStep:
        text = layer.text
        assert text.keys is not None
        assert text.values is not None
        cursor = self._cursor(text, 1 if layer.answer is None else layer.answer.method.window)
        tables = [self._table(segment) for segment in layer.segments]
        views = []
        for segment, copied in zip(layer.segments, tables, strict=True):
            views.append(copied.view(segment.view(layer.positions.forward, None)))
        views.append(
            SegmentView(
                keys=text.keys.flatten(1, 2),
                values=text.values.flatten(1, 2),
                starts=cursor.starts,
                lengths=cursor.lengths,
                max_length=text.capacity,
                row_stride=text.capacity,
            )
        )
        uniform = [segment.uniform for segment in layer.segments]
        held = text.keys, text.values
        return LayerStep(layer, text, list(layer.segments), tables, uniform, *held, cursor, views, _queries(layer))

    def _cursor(self, text: TextSegment, window: int) -> TextCursor:
        assert text.keys is not None
        for cursor in self.cursors:
            alike = cursor.text.alignment is text.alignment and cursor.text.length == text.length
            if alike and cursor.text.capacity == text.capacity and cursor.column.device == text.keys.device:
                return cursor
        self.cursors.append(TextCursor.of(text, window))
        return self.cursors[-1]

    def _table(self, segment: VisualSegment) -> TableCopy:
        for table in self.tables:
            found = segment.table()
            if found.keys() == table.copied.keys() and all(found[name] is table.copied[name] for name in found):
                return table
        self.tables.append(TableCopy(segment))
        return self.tables[-1]

    def fits(self) -> bool:
        """Say whether the cache still lies where this step reads and writes it, with a column for another token."""
        return all(layer.fits() for layer in self.layers)

    def belongs_to(self, layers: Sequence[LayerKV]) -> bool:
        """Say whether these are the layers that it was made of."""
        return all(
            held.layer is layer and held.text is layer.text for held, layer in zip(self.layers, layers, strict=True)
        )

    def refresh(self) -> None:
        """Write what has changed since the last step (rows selected, tokens appended otherwise) into its tensors."""
        for cursor in self.cursors:
            cursor.refresh()
        for table in self.tables:
            table.refresh()

    def advance_on_device(self) -> None:
        """Let the next step write the next column; captured as the end of the step."""
        for cursor in self.cursors:
            cursor.advance_on_device()

    def run(self, replay: Callable[[], None]) -> None:
        """Let `replay` take a token on the device, and note it on the host."""
        for cursor in self.cursors:
            cursor.at = -1  # should this be interrupted, the next step writes the column anew
        replay()
        for held in self.layers:
            held.layer.count_step()
        for cursor in self.cursors:
            cursor.at = cursor.text.length

    def shows_all(self, mask: Tensor) -> bool:
        """Say whether a mask ``[B, T]`` hides nothing that is stored (padding is not). Waits for the device.

        The last of the T positions is that of the token to come.
        """
        seen = mask.bool()
        found = []
        for cursor in self.cursors:
            assert cursor.text.keys is not None
            batch, device = len(cursor.starts), cursor.text.keys.device
            positions = column_positions(cursor.text.alignment, cursor.text.length, batch, device)
            own = own_columns(cursor.text.alignment, cursor.text.length, batch, device)
            found.append((seen.gather(1, positions.to(seen.device)) | ~own.to(seen.device)).all())
        for table in self.tables:
            segment = table.segment
            columns = torch.arange(segment.max_length, device=segment.lengths.device)
            own = columns < segment.lengths[:, None]
            positions = segment.token_positions().masked_fill(~own, 0)
            shown = seen.repeat(segment.heads, 1).gather(1, positions.to(seen.device))
            found.append((shown | ~own.to(seen.device)).all())
        found += [seen[:, begin:end].all() for begin, end in self._gone()]
        found.append(seen[:, -1].all())
        return bool(torch.stack([part.to(seen.device) for part in found]).all())

    def _gone(self) -> list[tuple[int, int]]:
        """List the ranges of positions of which each head holds other tokens; alike in all layers."""
        answer = self.layers[0].layer.answer
        return [] if answer is None else [(begin, end) for begin, end, _ in answer.gone]

    def form(self) -> Hashable:
        """Say all that a captured graph has frozen but addresses: two steps of one form may share a graph."""
        return tuple(
            (
                (tuple(layer.keys.shape), tuple(layer.values.shape), layer.keys.dtype, layer.keys.device),
                None if layer.queries is None else (tuple(layer.queries.shape), layer.queries.dtype),
                self.cursors.index(layer.cursor),
                tuple(self.tables.index(table) for table in layer.tables),
                tuple(
                    (_form(part.keys), _form(part.values), part.max_length, uniform, part.heads, _chunks_form(part))
                    for part, uniform in zip(layer.segments, layer.uniform, strict=True)
                ),
            )
            for layer in self.layers
        )

    def take_over(self, layers: Sequence[LayerKV]) -> None:
        """Let other layers of the same `form` live where this step reads, whose own are not needed any more.

        What they hold is copied once; from then on they and this step are one.
        """
        tables = {id(table): table for table in self.tables}
        for held, layer in zip(self.layers, layers, strict=True):
            text = layer.text
            assert text.keys is not None
            assert text.values is not None
            held.keys.copy_(text.keys)
            held.values.copy_(text.values)
            text.keys, text.values = held.keys, held.values
            if held.queries is not None:
                assert layer.answer is not None
                assert layer.answer.queries is not None
                held.queries.copy_(layer.answer.queries)
                layer.answer.queries = held.queries
            joined = []
            for mine, theirs in zip(layer.segments, held.segments, strict=True):
                chunks = mine.chunks
                if chunks is not None and theirs.chunks is not None:
                    theirs.chunks.means.copy_(chunks.means)
                    chunks = dataclasses.replace(chunks, means=theirs.chunks.means)
                for new, old in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                    for source, target in zip(new.tensors(), old.tensors(), strict=True):
                        if source.data_ptr() != target.data_ptr():
                            target.copy_(source)
                taken = dataclasses.replace(mine, keys=theirs.keys, values=theirs.values, chunks=chunks)
                for table in tables.values():
                    if table.segment is theirs:
                        table.segment = taken
                joined.append(taken)
            layer.segments[:] = joined
            if held.cursor.text is held.text:
                held.cursor.text = text
                held.cursor.at = -1
            held.layer, held.text, held.segments = layer, text, joined
        self.refresh()

    @property
    def is_private(self) -> bool:
        """Whether no copy of the cache shares what it stores."""
        lent = any(layer.text.lent for layer in self.layers)
        return not lent and not any(segment.shared for layer in self.layers for segment in layer.segments)


def _queries(layer: LayerKV) -> Tensor | None:
    return None if layer.answer is None else layer.answer.queries


def _chunks_form(segment: VisualSegment) -> Hashable:
    chunks = segment.chunks
    return None if chunks is None else (tuple(chunks.means.shape), chunks.size, chunks.most, chunks.most_read)


def _form(stored: Stored) -> Hashable:
    def tensor(part: Tensor, *, of_the_model: bool = False) -> Hashable:
        # What belongs to the model (a calibrated basis) is read where it lies.
        return tuple(part.shape), part.stride(), part.dtype, part.device, part.data_ptr() if of_the_model else None

    parts: list[Any] = [tensor(stored.data), stored.code]
    for spec in dataclasses.fields(KeyBasis) if stored.basis is not None else ():
        value = getattr(stored.basis, spec.name)
        of_the_model = stored.basis is not None and stored.basis.shared and spec.name in ("A", "B")
        parts.append(tensor(value, of_the_model=of_the_model) if isinstance(value, Tensor) else value)
    return tuple(parts)
