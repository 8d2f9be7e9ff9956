"""Segments: the form that attention reads (`SegmentView`), and the two kinds a layer owns, visual and text.

Storage is head-major and packed, ``[H, N, width]``: the tokens of one row and head lie side by side, and rows may
have different numbers of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.forward_tables import ForwardTables, TextForm, row_table
from rotatek_cache.core.quantization import Code, HeadCodes, join_tokens
from rotatek_cache.core.retrieval import Chunks
from rotatek_cache.core.row_layout import (
    POSITION,
    Alignment,
    TextOrder,
    align_right,
    column_positions,
    own_columns,
)

# Free text columns after the segment had to grow: enough to make growing rare, few enough not to eat what is saved.
LEAST_FREE = 8
FILLED_PER_FREE = 8  # one free column for so many filled ones
# Where steps are replayed from a graph, growing means another capture: so many free columns, or an eighth, in steps of
# fewer, so that prompts of about the same length meet in one graph.
RESERVED = 256
RESERVED_STEP = 64


@dataclass(frozen=True)
class SegmentView:
    """One segment as attention reads it; it owns nothing.

    Attributes:
        keys: dense Keys, coefficients or packed codes ``[H, N, w]`` (with `HeadCodes` as that says); row b owns tokens
            ``starts[b] : starts[b] + lengths[b]``.
        values: dense Values, coefficients or packed codes, laid out like `keys`.
        starts: int64 ``[B]`` on the device of the Keys.
        lengths: int32 ``[B]``.
        max_length: host-known bound of `lengths`; it sizes grids and buffers.
        row_stride: tokens from one row's first to the next's if `batched`.
        batched: all rows hold exactly `max_length` tokens and begin `row_stride` tokens apart, in order.
        basis: what the Keys' coefficients mean; None for dense Keys.
        basis_rows: int64 ``[B]``, which of the bases' rows a batch row uses; None if row b uses row b.
        mask: ``[B, Q, max_length]``, True (bool) where a query sees a token, or a number to add (float); None if every
            query sees all.
        key_code: how Keys are packed; None if `keys` are numbers.
        value_basis: what the Values' coefficients mean; None for dense Values.
        value_code: how Values are packed; None if `values` are numbers.
        slots: int32 or int64 ``[B, n]`` where tokens are scattered over a pool: token j of row b is stored at
            ``slots[b, starts[b] + j]``. None if they lie side by side.
        head_rows: KV heads that are rows of their own: there is one head then, and row ``h * B + b`` is head h of batch
            row b, in all fields above. 1: heads are heads.
        chunks: of which a query of one token reads those that it asks for; None: all is read.
    """

    keys: Tensor
    values: Tensor
    starts: Tensor
    lengths: Tensor
    max_length: int
    row_stride: int = 0
    batched: bool = False
    basis: KeyBasis | None = None
    basis_rows: Tensor | None = None
    mask: Tensor | None = None
    key_code: Code | None = None
    value_basis: KeyBasis | None = None
    value_code: Code | None = None
    slots: Tensor | None = None
    head_rows: int = 1
    chunks: Chunks | None = None

    @property
    def is_by_heads(self) -> bool:
        """Whether KV heads hold or read tokens of their own, so that attention goes over them one by one."""
        return self.head_rows > 1 or self.chunks is not None

    def heads_as_rows(self) -> "SegmentView":
        """Return the same with each KV head of each row as a row of its own, see `head_rows`."""
        if self.head_rows > 1:
            return self
        heads, batch = self.heads, len(self.starts)
        if isinstance(self.key_code, HeadCodes) or isinstance(self.value_code, HeadCodes) or self.slots is not None:
            raise ValueError(
                "heads that store tokens of their own cannot be read beside heads with codes of their own, or a pool"
            )
        tokens = self.keys.shape[1]
        head = torch.arange(heads, device=self.starts.device)[:, None]
        bases, rows = max(1, *(_basis_count(basis) for basis in (self.basis, self.value_basis))), self.basis_rows
        if rows is not None or bases != batch:
            rows = torch.arange(batch, device=self.starts.device) if rows is None else rows
            rows = (head * bases + rows).flatten()
        return dataclasses.replace(
            self,
            keys=self.keys.flatten(0, 1)[None],
            values=self.values.flatten(0, 1)[None],
            starts=(head * tokens + self.starts).flatten(),
            lengths=self.lengths.repeat(heads),
            batched=self.batched and tokens == batch * self.row_stride,
            basis=_heads_as_rows(self.basis),
            value_basis=_heads_as_rows(self.value_basis),
            basis_rows=rows,
            mask=None if self.mask is None else self.mask.repeat(heads, 1, 1),
            head_rows=heads,
        )

    def retrieved(self, query: Tensor) -> "SegmentView":
        """Return the tokens of the chunks that a query ``[rows, G, 1, D]`` asks for; all of them, if it has more."""
        if self.chunks is None or query.shape[2] > 1:
            return self
        tokens, lengths = self.chunks.best(query, self.lengths)
        slots = (self.starts[:, None] + tokens).clamp(max=self.keys.shape[1] - 1)
        mask = self.mask
        if mask is not None:
            mask = mask.gather(2, tokens.clamp(max=mask.shape[2] - 1)[:, None].expand(-1, mask.shape[1], -1))
        return dataclasses.replace(
            self,
            starts=torch.zeros_like(self.starts),
            lengths=lengths,
            max_length=slots.shape[1],
            slots=slots,
            mask=mask,
            batched=False,
            chunks=None,
        )

    @property
    def is_diagonal(self) -> bool:
        """Whether Keys or Values are read through scales of channels that were not rotated."""
        return any(basis is not None and basis.is_diagonal for basis in (self.basis, self.value_basis))

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is to reach anything of it."""
        held = [self.keys, self.values, self.mask]
        for basis in (self.basis, self.value_basis):
            held += [] if basis is None else [basis.B, basis.delta, basis.scale]
        return any(tensor is not None and tensor.requires_grad for tensor in held)

    @property
    def heads(self) -> int:
        """KV heads."""
        return len(self.key_code.parts) if isinstance(self.key_code, HeadCodes) else self.keys.shape[0]

    @property
    def value_width(self) -> int:
        """D_v of what attention returns."""
        basis = self.value_basis
        if basis is not None and basis.B is not None:
            return basis.B.shape[-1] if basis.is_diagonal else basis.B.shape[-2]
        return self.values.shape[-1] if self.value_code is None else self.value_code.channels

    def _batched(self, packed: Tensor) -> Tensor:
        if self.max_length == self.row_stride:
            return packed.reshape(-1, self.max_length, packed.shape[-1])
        rows = packed.unflatten(1, (-1, self.row_stride))[:, :, : self.max_length]
        return rows.flatten(0, 1)

    def batched_keys(self, dtype: torch.dtype) -> Tensor:
        """Return Keys or coefficients ``[H * B, max_length, r]`` in `dtype`, copied only if not so; `batched` only."""
        return _numbers(self.keys, self.key_code, self._batched, dtype)

    def batched_values(self, dtype: torch.dtype) -> Tensor:
        """Return Values or coefficients ``[H * B, max_length, r_v]`` in `dtype`; only where `batched`."""
        return _numbers(self.values, self.value_code, self._batched, dtype)

    def row_keys(self, row: int, dtype: torch.dtype) -> Tensor:
        """Return Keys or coefficients ``[H, length, r]`` of one row in `dtype`."""
        return _numbers(self.keys, self.key_code, functools.partial(self._row, row), dtype)

    def row_values(self, row: int, dtype: torch.dtype) -> Tensor:
        """Return Values or coefficients ``[H, length, r_v]`` of one row in `dtype`."""
        return _numbers(self.values, self.value_code, functools.partial(self._row, row), dtype)

    def _row(self, row: int, packed: Tensor) -> Tensor:
        start, length = self.row_ranges[row]
        if self.slots is None:
            return packed[:, start : start + length]
        return packed[:, self.slots[row, start : start + length]]

    @functools.cached_property
    def row_ranges(self) -> list[tuple[int, int]]:
        """(first token, number of tokens) of each batch row, on the host."""
        return list(zip(self.starts.tolist(), self.lengths.tolist(), strict=True))

    def basis_of_rows(self, basis: KeyBasis) -> KeyBasis:
        """Return `basis` with one row per batch row."""
        return basis if self.basis_rows is None else select_basis(basis, self.basis_rows)


def _numbers(stored: Tensor, code: Code | None, pick: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """Read the numbers of the tokens that `pick` takes out of storage ``[H, N, w]``."""
    if isinstance(code, HeadCodes):
        return code.unpack([pick(head) for head in code.split(stored)]).to(dtype)
    picked = pick(stored)
    return (picked if code is None else code.unpack(picked)).to(dtype)


def _basis_count(basis: KeyBasis | None) -> int:
    held = () if basis is None else (basis.B, basis.delta)
    return next((tensor.shape[1] for tensor in held if tensor is not None), 0)


def _heads_as_rows(basis: KeyBasis | None) -> KeyBasis | None:
    return None if basis is None else basis.select(lambda tensor: tensor.flatten(0, 1)[None])


def select_basis(basis: KeyBasis, rows: Tensor) -> KeyBasis:
    """Pick rows (dimension 1) of `basis` by the int64 vector `rows`."""
    return basis.select(lambda tensor: tensor[:, rows])


@dataclass(frozen=True)
class Stored:
    """Keys or Values of a segment: numbers or bytes as in `SegmentView`, with basis and code (None: they are dense)."""

    data: Tensor
    basis: KeyBasis | None = None
    code: Code | None = None

    @property
    def channels(self) -> int:
        """Coefficients of a token, padding included."""
        return self.data.shape[-1] if self.code is None else self.code.channels

    @property
    def basis_count(self) -> int:
        """Sequences that have a basis here."""
        return _basis_count(self.basis)

    def tensors(self) -> list[Tensor]:
        """List everything held."""
        return [self.data, *(self.basis.tensors() if self.basis is not None else [])]


@dataclass
class VisualSegment:
    """Sealed visual tokens of a layer. The storage never changes; selecting rows permutes the three row vectors.

    Text that several rows go on from (`TextSegment.lend`) is stored as one too.

    Attributes:
        keys, values: their storage; rows of their bases are the sequences that were compressed at the seal.
        positions: int32 ``[N]``, logical position of each token (shared by the layers).
        starts, lengths, basis_rows: the row table, ``[B]`` each.
        is_text: whether it holds text.
        heads: KV heads that are rows of the table: row ``h * B + b`` is head h of batch row b. 1: heads are heads.
        chunks: of which a decode step reads those that its query asks for; None: all is read.
    """

    keys: "Stored"
    values: "Stored"
    positions: Tensor
    starts: Tensor
    lengths: Tensor
    basis_rows: Tensor
    max_length: int
    uniform: bool
    is_text: bool = False
    heads: int = 1
    chunks: Chunks | None = None
    # Whether a copy of the cache reads the same storage.
    shared: bool = field(default=False, metadata={"saved": False})
    _unmasked: SegmentView | None = field(default=None, init=False, repr=False)

    def view(self, forward: ForwardTables, mask: Tensor | None) -> SegmentView:
        """Return the segment as attention reads it, with its columns of the model's mask."""
        if self._unmasked is None:
            self._unmasked = SegmentView(
                keys=self.keys.data,
                values=self.values.data,
                starts=self.starts,
                lengths=self.lengths,
                max_length=self.max_length,
                row_stride=self.max_length,
                batched=self.uniform,
                basis=self.keys.basis,
                basis_rows=None if self.uniform else self.basis_rows,
                key_code=self.keys.code,
                value_basis=self.values.basis,
                value_code=self.values.code,
                head_rows=self.heads,
                chunks=self.chunks,
            )
        if mask is None:
            return self._unmasked
        columns = forward.mask_columns(mask, (self.positions, self.starts), self.token_positions)
        return dataclasses.replace(self._unmasked, mask=columns)

    def table(self) -> dict[str, Tensor]:
        """Give what selecting rows changes, by name."""
        held = {"starts": self.starts, "lengths": self.lengths, "basis_rows": self.basis_rows}
        if self.chunks is not None:
            held |= {f"chunk_{name}": getattr(self.chunks, name) for name in ("starts", "counts", "read")}
        return held

    def token_positions(self) -> Tensor:
        """Return logical positions ``[B, max_length]``; entries past a row's length are arbitrary."""
        columns = torch.arange(self.max_length, device=self.positions.device)
        index = (self.starts[:, None] + columns).clamp_(max=len(self.positions) - 1)
        return self.positions[index].long()

    def select_rows(self, index: Tensor) -> None:
        """Let batch row b be what row ``index[b]`` was."""
        if self.heads > 1:
            batch = len(self.starts) // self.heads
            index = (torch.arange(self.heads, device=index.device)[:, None] * batch + index).flatten()
        self.starts, self.lengths = self.starts[index], self.lengths[index]
        self.basis_rows = self.basis_rows[index]
        self.chunks = None if self.chunks is None else self.chunks.select_rows(index)
        self.uniform = False  # rows may share storage now, or lie in another order
        self._unmasked = None

    def truncate(self, length: int) -> None:
        """Forget tokens at logical positions from `length` on."""
        columns = torch.arange(self.max_length, device=self.positions.device)
        inside = columns < self.lengths[:, None]
        kept = (inside & (self.token_positions() < length)).sum(1, dtype=self.lengths.dtype)
        self.uniform = self.uniform and bool((kept == self.lengths).all())
        self.lengths = kept
        self._unmasked = None

    def tensors(self) -> list[Tensor]:
        """List everything held."""
        rows = [self.positions, self.starts, self.lengths, self.basis_rows]
        chunks = [] if self.chunks is None else self.chunks.tensors()
        return [*self.keys.tensors(), *self.values.tensors(), *rows, *chunks]

    def __deepcopy__(self, memo: dict) -> "VisualSegment":
        # Sealed storage is immutable, so copies of a cache share it; what may change is only ever replaced.
        self.shared = True
        return dataclasses.replace(self)


def join_segments(segments: Sequence[VisualSegment]) -> list[VisualSegment]:
    """Join segments of disjoint batch rows where they store alike: attention goes over fewer of them."""
    alike: dict[object, list[VisualSegment]] = {}
    for segment in segments:
        parts = (segment.keys, segment.values)
        form = tuple((part.code, part.data.dtype, part.channels, part.basis is None) for part in parts)
        alike.setdefault(form, []).append(segment)
    return [_joined(group) for group in alike.values()]


def _joined(segments: list[VisualSegment]) -> VisualSegment:
    if len(segments) == 1:
        return segments[0]
    starts, lengths, basis_rows = (
        torch.zeros_like(t) for t in (segments[0].starts, segments[0].lengths, segments[0].starts)
    )
    tokens = rows = 0
    for segment in segments:
        owned = segment.lengths > 0
        starts = torch.where(owned, segment.starts + tokens, starts)
        lengths = torch.where(owned, segment.lengths, lengths)
        basis_rows = torch.where(owned, segment.basis_rows + rows, basis_rows)
        tokens += len(segment.positions)
        rows += max(segment.keys.basis_count, segment.values.basis_count)
    return VisualSegment(
        keys=_joined_states([segment.keys for segment in segments]),
        values=_joined_states([segment.values for segment in segments]),
        positions=torch.cat([segment.positions for segment in segments]),
        starts=starts,
        lengths=lengths,
        basis_rows=basis_rows,
        max_length=max(segment.max_length for segment in segments),
        uniform=False,
    )


def _joined_states(parts: list[Stored]) -> Stored:
    data = join_tokens([part.data for part in parts], parts[0].code)
    bases = [part.basis for part in parts if part.basis is not None]
    if not bases:
        return Stored(data, None, parts[0].code)

    def join(name: str) -> Tensor | None:
        held = [getattr(basis, name) for basis in bases]
        if held[0] is not None and name in "AB" and bases[0].shared:
            return held[0][:, :1].expand(-1, sum(part.shape[1] for part in held), *held[0].shape[2:])
        return None if held[0] is None else torch.cat(held, 1)

    decoder = join("B")
    encoder = decoder if bases[0].A is bases[0].B else join("A")
    fitted = max(basis.fitted_rank or 0 for basis in bases) or None
    basis = KeyBasis(encoder, decoder, join("offset"), join("delta"), fitted, bases[0].shared, join("scale"))
    return Stored(data, basis, parts[0].code)


class TextSegment:
    """Dense tokens of a layer, right-aligned: all rows end at the same column, so that appending is one slice copy.

    A seal lays the columns out anew (`alignment`); those appended later follow one another.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None  # [H, B, capacity, D]
        self.values: Tensor | None = None  # [H, B, capacity, D_v]
        self.length = 0
        self.reserved = 0  # the capacity that `reserve` has made, if it did
        self.most: int | None = None  # columns that there will never be more than, where that is known
        self.lent = False  # whether another cache reads the columns, which are copied before they are written again
        self.alignment: Alignment | None = None  # None: column c is logical position c

    @property
    def capacity(self) -> int:
        """Columns that fit without growing."""
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append ``[B, H, n, D]`` and ``[B, H, n, D_v]`` behind every row."""
        keys, values = keys.transpose(0, 1), values.transpose(0, 1)
        end = self.length + keys.shape[2]
        if self.keys is None or self.values is None:
            self.keys, self.values = self._reserved(keys, end), self._reserved(values, end)
        elif end > self.capacity or self._frozen():
            self._renew(end)
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end

    def reserve(self) -> None:
        """Make sure of a free column; a buffer that has none gets `RESERVED` or an eighth more, whichever is larger."""
        assert self.keys is not None
        assert self.values is not None
        if self.length < self.capacity == self.reserved and not self._frozen():
            return
        wanted = self.length + max(RESERVED, self.length // FILLED_PER_FREE)
        self.reserved = self._bounded(-(-wanted // RESERVED_STEP) * RESERVED_STEP, self.length + 1)
        self.keys, self.values = (_buffer(held, self.reserved, self.length) for held in (self.keys, self.values))
        self.lent = False

    def lend(self, tables: dict[Any, Any]) -> VisualSegment | None:
        """Return a segment that reads the columns where they lie, for others to go on from; None if there are none.

        `tables` keeps row tables for layers whose text lies alike.
        """
        if self.length == 0 or self.keys is None or self.values is None:
            return None
        self.lent = True
        batch = self.keys.shape[1]
        key = (self.alignment, batch, self.capacity, self.length, self.keys.device)
        if key not in tables:
            positions = column_positions(self.alignment, self.length, batch, self.keys.device).to(POSITION)
            positions = torch.nn.functional.pad(positions, (0, self.capacity - self.length)).flatten()
            starts, lengths = row_table(TextForm(*key))
            tables[key] = positions, starts, lengths, torch.zeros_like(starts)
        positions, starts, lengths, basis_rows = tables[key]
        return VisualSegment(
            keys=Stored(self.keys.flatten(1, 2)),
            values=Stored(self.values.flatten(1, 2)),
            positions=positions,
            starts=starts,
            lengths=lengths,
            basis_rows=basis_rows,
            max_length=self.length,
            uniform=False,
            is_text=True,
            shared=True,
        )

    def follow(self, position: int, padding: Tensor) -> None:
        """Begin, while empty, at a logical position, with so many columns of padding first, int64 ``[B]``."""
        first = padding if bool(padding.any()) else None
        self.alignment = Alignment(padding.new_zeros(len(padding), 0, dtype=POSITION), first, position)

    def _frozen(self) -> bool:
        """Say whether the buffers must not be written to any more.

        They are lent, or come from an inference mode that has ended.
        """
        if self.lent:
            return True
        return self.keys is not None and self.keys.is_inference() and not torch.is_inference_mode_enabled()

    def view(self, forward: ForwardTables, mask: Tensor | None) -> SegmentView | None:
        """Return the segment as attention reads it; None while it is empty."""
        if self.length == 0 or self.keys is None or self.values is None:
            return None
        form = TextForm(self.alignment, self.keys.shape[1], self.capacity, self.length, self.keys.device)
        starts, lengths = forward.text_rows(form)
        columns = None
        if mask is not None:
            columns = forward.mask_columns(mask, (self.alignment, self.length), self.token_positions)
        return SegmentView(
            keys=self.keys.flatten(1, 2),
            values=self.values.flatten(1, 2),
            starts=starts,
            lengths=lengths,
            max_length=self.length,
            row_stride=self.capacity,
            batched=self.alignment is None or self.alignment.first is None,
            mask=columns,
        )

    def token_positions(self) -> Tensor:
        """Return logical positions ``[B, length]``, a row's own tokens first; entries past them are arbitrary."""
        assert self.keys is not None
        positions = column_positions(self.alignment, self.length, self.keys.shape[1], self.keys.device)
        if self.alignment is None or self.alignment.first is None:
            return positions
        columns = self.alignment.first[:, None] + torch.arange(self.length, device=positions.device)
        return positions.gather(1, columns.clamp_(max=self.length - 1))

    def logical(self) -> tuple[Tensor, Tensor]:
        """Return Keys ``[B, H, length, D]`` and Values as views, in logical order while nothing was sealed."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys.transpose(0, 1)[:, :, : self.length], self.values.transpose(0, 1)[:, :, : self.length]

    def realign(self, keys: Tensor, values: Tensor, order: TextOrder, alignment: Alignment) -> None:
        """Replace the contents by the tokens `order` of ``keys [B, H, P, D]`` and `values`."""
        width = alignment.width
        self.keys = self._reserved(keys.transpose(0, 1)[:, order.rows, order.columns], width, width)
        self.values = self._reserved(values.transpose(0, 1)[:, order.rows, order.columns], width, width)
        self.length, self.alignment, self.lent = width, alignment, False

    def compact(self, first: int, kept: Tensor, alignment: Alignment) -> None:
        """Keep of the columns from `first` on those of int64 `kept` ``[H, B, n]``, counted from there, in place."""
        assert self.keys is not None
        assert self.values is not None
        if self._frozen():
            self._renew(self.length)
        end = first + kept.shape[2]
        for held in (self.keys, self.values):
            index = kept[..., None].expand(-1, -1, -1, held.shape[-1])
            held[:, :, first:end] = held[:, :, first : self.length].gather(2, index)
        self.length, self.alignment = end, alignment

    @property
    def next_position(self) -> int:
        """Logical position of the next column."""
        return (
            self.length if self.alignment is None else self.alignment.next_position + self.length - self.alignment.width
        )

    def _renew(self, needed: int) -> None:
        """Move to buffers of at least `needed` columns, which nothing else reads."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = (self._reserved(held, needed, self.length) for held in (self.keys, self.values))
        self.lent = False

    def _bounded(self, columns: int, needed: int) -> int:
        return columns if self.most is None else max(needed, min(columns, self.most))

    def _reserved(self, source: Tensor, needed: int, filled: int = 0) -> Tensor:
        """Make a buffer ``[H, B, >= needed, D]`` like `source` with its first `filled` columns copied."""
        return _buffer(source, self._bounded(capacity_for(needed), needed), filled)

    def select_rows(self, index: Tensor) -> None:
        """Let batch row b be what row ``index[b]`` was (copies: rows go on differently)."""
        if self.keys is not None and self.values is not None:
            if len(index) == self.keys.shape[1] and not self._frozen():
                # As many rows: written in place, so that what reads the buffers finds them.
                for held in (self.keys, self.values):
                    filled = held[:, :, : self.length]
                    filled.copy_(filled[:, index])
            else:
                self.keys, self.values = self.keys[:, index], self.values[:, index]
                self.lent = False
        self.alignment = None if self.alignment is None else self.alignment.select_rows(index)

    def truncate(self, length: int) -> None:
        """Forget tokens at logical positions from `length` on."""
        if self.keys is None or self.values is None:
            if self.alignment is not None and length < self.alignment.next_position:
                self.alignment = dataclasses.replace(self.alignment, next_position=length)
            return
        aligned, linear_from = (
            (0, 0) if self.alignment is None else (self.alignment.width, self.alignment.next_position)
        )
        if length >= linear_from:
            self.length = min(self.length, aligned + length - linear_from)
            return
        batch, device = self.keys.shape[1], self.keys.device
        positions = column_positions(self.alignment, self.length, batch, device)
        keep = own_columns(self.alignment, self.length, batch, device) & (positions < length)
        self.realign(*self.logical(), *align_right(keep, positions, length))

    def tensors(self) -> list[Tensor]:
        """List everything held."""
        layouts = [] if self.alignment is None else [self.alignment, self.alignment.origin]
        if self.keys is not None and self.keys.is_meta:
            layouts = layouts[:1]  # a prompt of shapes alone stands for one on the CPU, where both are the same
        layout = [t for known in layouts if known is not None for t in (known.positions, known.first)]
        return [t for t in (self.keys, self.values, *layout) if t is not None]


def capacity_for(needed: int) -> int:
    """Return how many columns a text segment reserves for `needed` ones."""
    return needed + max(LEAST_FREE, needed // FILLED_PER_FREE)


def _buffer(source: Tensor, capacity: int, filled: int) -> Tensor:
    """Make a buffer ``[H, B, capacity, D]`` like `source` with its first `filled` columns copied."""
    buffer = source.new_zeros(*source.shape[:2], capacity, source.shape[-1])
    buffer[:, :, :filled] = source[:, :, :filled]
    return buffer
