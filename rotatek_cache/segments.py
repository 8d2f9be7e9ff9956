"""What attention reads (`SegmentView`) and who owns it under transformers (`LayerKV`): append, seal, select, crop.

One layer holds its Keys and Values in up to three places. New tokens whose image is not finished yet are *pending*:
dense, as the model gave them. A *seal* moves the visual ones among them into a compressed segment that is never copied
again, and the others into the *text* segment, which stays dense and grows in place.
Storage is head-major and packed, ``[H, N, width]``: the tokens of one row and head lie side by side, and rows may
have different numbers of them.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.basis import (
    FitOptions,
    KeyBasis,
    compressed_saves_bytes,
    fit_basis,
    key_moments,
    query_channel_norm,
    rank_for_energy,
    weighted_scatter,
)
from rotatek_cache.ledger import (
    Alignment,
    SealPlan,
    VisualLedger,
    align_right,
    column_positions,
    own_columns,
)

TEXT_ROOM = 32  # least number of free text columns after the segment had to grow


@dataclass(frozen=True)
class SegmentView:
    """One segment as attention reads it; it owns nothing.

    Attributes:
        keys: coefficients or dense Keys ``[H, N, w]``; row b owns tokens ``starts[b] : starts[b] + lengths[b]``.
        values: ``[H, N, D_v]``.
        starts: int64 ``[B]`` on the device of the Keys.
        lengths: int32 ``[B]``.
        max_length: host-known bound of `lengths`; it sizes grids and buffers.
        row_stride: tokens from one row's first to the next's if `batched`.
        batched: all rows hold exactly `max_length` tokens and begin `row_stride` tokens apart, in order.
        basis: what the coefficients mean; None for dense Keys.
        basis_rows: int64 ``[B]``, which of the basis' rows a batch row uses; None if row b uses row b.
        mask: ``[B, Q, max_length]``, True (bool) where a query sees a token, or a number to add (float); None if every
            query sees all.
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

    def _batched(self, packed: Tensor) -> Tensor:
        heads, _, width = packed.shape
        rows = packed.unflatten(1, (-1, self.row_stride))[:, :, : self.max_length]
        return rows.flatten(0, 1) if rows.stride(0) == rows.shape[1] * rows.stride(1) else rows.reshape(-1, *rows.shape[2:])

    def batched_keys(self) -> Tensor:
        """Keys as ``[H * B, max_length, w]`` without a copy; only where `batched`."""
        return self._batched(self.keys)

    def batched_values(self) -> Tensor:
        """Values as ``[H * B, max_length, D_v]`` without a copy; only where `batched`."""
        return self._batched(self.values)

    def row_ranges(self) -> Iterator[tuple[int, int]]:
        """(first token, number of tokens) of each batch row, on the host."""
        return zip(self.starts.tolist(), self.lengths.tolist(), strict=True)

    def basis_of_rows(self) -> KeyBasis:
        """The basis with one row per batch row."""
        assert self.basis is not None
        if self.basis_rows is None:
            return self.basis
        return select_basis(self.basis, self.basis_rows)


def select_basis(basis: KeyBasis, rows: Tensor) -> KeyBasis:
    """`basis` with its rows (dimension 1) picked by the int64 vector `rows`."""
    picked: dict[int, Tensor] = {}

    def pick(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return picked.setdefault(id(tensor), tensor[:, rows])

    return KeyBasis(pick(basis.A), pick(basis.B), pick(basis.offset), pick(basis.delta), basis.fitted_rank)


@dataclass
class VisualSegment:
    """Sealed visual tokens of a layer. The storage never changes; selecting rows permutes the three row vectors.

    Attributes:
        coefficients: ``[H, N, r]``.
        values: ``[H, N, D_v]``.
        basis: rows are the sequences that were compressed at the seal.
        positions: int32 ``[N]``, logical position of each token (shared by the layers).
        starts, lengths, basis_rows: the row table, ``[B]`` each.
    """

    coefficients: Tensor
    values: Tensor
    basis: KeyBasis
    positions: Tensor
    starts: Tensor
    lengths: Tensor
    basis_rows: Tensor
    max_length: int
    uniform: bool

    def view(self, ledger: VisualLedger, mask: Tensor | None) -> SegmentView:
        """The segment as attention reads it, with its columns of the model's mask."""
        return SegmentView(
            keys=self.coefficients,
            values=self.values,
            starts=self.starts,
            lengths=self.lengths,
            max_length=self.max_length,
            row_stride=self.max_length,
            batched=self.uniform,
            basis=self.basis,
            basis_rows=None if self.uniform else self.basis_rows,
            mask=None if mask is None else ledger.gather_mask(mask, (self.positions, self.starts), self.token_positions),
        )

    def token_positions(self) -> Tensor:
        """Logical positions ``[B, max_length]``; entries past a row's length are arbitrary."""
        columns = torch.arange(self.max_length, device=self.positions.device)
        index = (self.starts[:, None] + columns).clamp_(max=len(self.positions) - 1)
        return self.positions[index].long()

    def select_rows(self, index: Tensor, unchanged: bool) -> None:
        """Let batch row b be what row ``index[b]`` was."""
        self.starts, self.lengths = self.starts[index], self.lengths[index]
        self.basis_rows = self.basis_rows[index]
        self.uniform = self.uniform and unchanged

    def truncate(self, length: int) -> None:
        """Forget tokens at logical positions from `length` on."""
        columns = torch.arange(self.max_length, device=self.positions.device)
        inside = columns < self.lengths[:, None]
        kept = (inside & (self.token_positions() < length)).sum(1, dtype=self.lengths.dtype)
        self.uniform = self.uniform and bool((kept == self.lengths).all())
        self.lengths = kept

    def tensors(self) -> list[Tensor]:
        """Everything held."""
        rows = [self.positions, self.starts, self.lengths, self.basis_rows]
        return [self.coefficients, self.values, *self.basis.tensors(), *rows]

    def __deepcopy__(self, memo: dict) -> "VisualSegment":
        # Sealed storage is immutable, so copies of a cache share it; what may change is only ever replaced.
        return dataclasses.replace(self)


class TextSegment:
    """Dense tokens of a layer, right-aligned: all rows end at the same column, so that appending is one slice copy.

    A seal lays the columns out anew (`alignment`); those appended later follow one another.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None  # [H, B, capacity, D]
        self.values: Tensor | None = None  # [H, B, capacity, D_v]
        self.length = 0
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
            self.keys, self.values = _room(keys, end), _room(values, end)
        elif end > self.capacity or self._frozen():
            self.keys, self.values = _room(self.keys, end, self.length), _room(self.values, end, self.length)
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end

    def _frozen(self) -> bool:
        """Whether the buffers come from an inference mode that has ended, and so cannot be written to any more."""
        return self.keys is not None and self.keys.is_inference() and not torch.is_inference_mode_enabled()

    def view(self, ledger: VisualLedger, mask: Tensor | None) -> SegmentView | None:
        """The segment as attention reads it; None while it is empty."""
        if self.length == 0 or self.keys is None or self.values is None:
            return None
        batch, capacity, device = self.keys.shape[1], self.capacity, self.keys.device
        starts = torch.arange(batch, device=device) * capacity
        lengths = torch.full((batch,), self.length, dtype=torch.int32, device=device)
        first = None if self.alignment is None else self.alignment.first
        if first is not None:
            starts, lengths = starts + first, lengths - first.int()
        columns = None
        if mask is not None:
            columns = ledger.gather_mask(mask, (self.alignment, self.length), self.token_positions)
        return SegmentView(
            keys=self.keys.flatten(1, 2),
            values=self.values.flatten(1, 2),
            starts=starts,
            lengths=lengths,
            max_length=self.length,
            row_stride=capacity,
            batched=first is None,
            mask=columns,
        )

    def token_positions(self) -> Tensor:
        """Logical positions ``[B, length]``, a row's own tokens first; entries past them are arbitrary."""
        assert self.keys is not None
        positions = column_positions(self.alignment, self.length, self.keys.shape[1], self.keys.device)
        if self.alignment is None or self.alignment.first is None:
            return positions
        columns = self.alignment.first[:, None] + torch.arange(self.length, device=positions.device)
        return positions.gather(1, columns.clamp_(max=self.length - 1))

    def logical(self) -> tuple[Tensor, Tensor]:
        """The columns' Keys ``[B, H, length, D]`` and Values, as views; logical order while nothing was sealed."""
        assert self.keys is not None and self.values is not None
        return self.keys.transpose(0, 1)[:, :, : self.length], self.values.transpose(0, 1)[:, :, : self.length]

    def realign(self, keys: Tensor, values: Tensor, order: Tensor, alignment: Alignment) -> None:
        """Replace the contents by columns `order` ``[B, width]`` of ``keys [B, H, P, D]`` and `values`."""
        rows = torch.arange(order.shape[0], device=order.device)[:, None]
        width = alignment.width
        self.keys = _room(keys.transpose(0, 1)[:, rows, order], width, width)
        self.values = _room(values.transpose(0, 1)[:, rows, order], width, width)
        self.length, self.alignment = width, alignment

    def select_rows(self, index: Tensor) -> None:
        """Let batch row b be what row ``index[b]`` was (copies: rows go on differently)."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, index], self.values[:, index]
        self.alignment = None if self.alignment is None else self.alignment.select_rows(index)

    def truncate(self, length: int) -> None:
        """Forget tokens at logical positions from `length` on."""
        if self.keys is None or self.values is None:
            return
        aligned, linear_from = (0, 0) if self.alignment is None else (self.alignment.width, self.alignment.next_position)
        if length >= linear_from:
            self.length = min(self.length, aligned + length - linear_from)
            return
        batch, device = self.keys.shape[1], self.keys.device
        positions = column_positions(self.alignment, self.length, batch, device)
        keep = own_columns(self.alignment, self.length, batch, device) & (positions < length)
        self.realign(*self.logical(), *align_right(keep, positions, length))

    def tensors(self) -> list[Tensor]:
        """Everything held."""
        layout = [] if self.alignment is None else [self.alignment.positions, self.alignment.first]
        return [t for t in (self.keys, self.values, *layout) if t is not None]


def _room(source: Tensor, needed: int, filled: int = 0) -> Tensor:
    """A buffer ``[H, B, >= needed, D]`` like `source` with its first `filled` columns copied."""
    capacity = needed + max(TEXT_ROOM, needed // 4)
    buffer = source.new_zeros(*source.shape[:2], capacity, source.shape[-1])
    buffer[:, :, :filled] = source[:, :, :filled]
    return buffer


@dataclass
class Pending:
    """Dense tokens that wait for their seal, as the model gave them: ``[B, H, P, D]``."""

    keys: Tensor
    values: Tensor
    begin: int  # logical position of the first
    window: Tensor | None = None  # the last queries, [B, H_q, <= W, D]


class LayerKV:
    """Keys and Values of one layer: dense until an image is complete, compressed from its seal on."""

    def __init__(self, options: FitOptions, ledger: VisualLedger, index: int) -> None:
        self.options = options
        self.ledger = ledger
        self.index = index
        self.segments: list[VisualSegment] = []
        self.text = TextSegment()
        self.pending: Pending | None = None
        self.length = 0  # logical tokens, padding included
        self.kept_dense: list[tuple[int, int]] = []  # (row at its seal, visual tokens) below break-even
        self.shape: tuple[int, int, int, int] | None = None  # B, H, D, D_v
        self.dtype: torch.dtype | None = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take the Keys ``[B, H, n, D]`` and Values ``[B, H, n, D_v]`` of the next n positions."""
        self._check(keys, values)
        tokens = keys.shape[2]
        begin, self.length = self.length, self.length + tokens
        if self.pending is not None:
            self.pending.keys = torch.cat([self.pending.keys, keys], 2)
            self.pending.values = torch.cat([self.pending.values, values], 2)
        elif self.ledger.has_visual(begin, self.length):
            self.pending = Pending(keys, values, begin)
        else:
            self.text.append(keys, values)

    def _check(self, keys: Tensor, values: Tensor) -> None:
        batch, heads, _, width = keys.shape
        shape = (batch, heads, width, values.shape[-1])
        if self.shape is None:
            self.shape, self.dtype = shape, keys.dtype
        elif shape != self.shape:
            raise ValueError(
                f"this cache holds (rows, KV heads, key width, value width) = {self.shape}, the new states have {shape}; "
                "call cache.reset() or make a new cache for another batch"
            )

    def dense(self) -> tuple[Tensor, Tensor] | None:
        """All Keys and Values in logical order, ``[B, H, T, D]``, while nothing has been sealed; else None."""
        if self.segments or self.text.alignment is not None:
            return None
        if self.pending is None:
            return self.text.logical()
        if self.text.length == 0:
            return self.pending.keys, self.pending.values
        keys, values = self.text.logical()
        return torch.cat([keys, self.pending.keys], 2), torch.cat([values, self.pending.values], 2)

    def views(self, mask: Tensor | None) -> list[SegmentView]:
        """What attention reads; `mask` is the model's ``[B or 1, 1, Q, T]``, bool or additive, None for all visible."""
        views = [segment.view(self.ledger, mask) for segment in self.segments]
        text = self.text.view(self.ledger, mask)
        if text is not None:
            views.append(text)
        if self.pending is not None:
            views.append(self._pending_view(self.pending, mask))
        return views

    def _pending_view(self, pending: Pending, mask: Tensor | None) -> SegmentView:
        batch, _, tokens, _ = pending.keys.shape
        device = pending.keys.device
        if mask is not None:
            mask = mask[:, 0, :, pending.begin :].expand(batch, -1, -1)
        return SegmentView(
            keys=pending.keys.transpose(0, 1).flatten(1, 2),
            values=pending.values.transpose(0, 1).flatten(1, 2),
            starts=torch.arange(batch, device=device) * tokens,
            lengths=torch.full((batch,), tokens, dtype=torch.int32, device=device),
            max_length=tokens,
            row_stride=tokens,
            batched=True,
            mask=mask,
        )

    def observe(self, query: Tensor, mask: Tensor | None) -> None:
        """See the queries ``[B, H_q, Q, D]`` of a forward whose attention is done; seal if the images are complete."""
        pending = self.pending
        if pending is None:
            return
        window = query if pending.window is None else torch.cat([pending.window, query], 2)
        # Cloned, or a view would keep the whole prompt's queries alive until the seal.
        pending.window = window[:, :, -self.options.query_window :].clone()
        plan = self.ledger.plan(pending.begin, self.length, mask)
        if plan is not None:
            self._seal(pending, plan)

    def _seal(self, pending: Pending, plan: SealPlan) -> None:
        rows = self._rows_worth_compressing(pending, plan)
        self.pending = None
        dense_rows = [row for row, count in enumerate(plan.counts) if count and row not in rows]
        self.kept_dense += [(row, plan.counts[row]) for row in dense_rows]
        if not rows and not self.segments and self.text.alignment is None and plan.all_visible:
            # Nothing is compressed and nothing is padding: the tokens keep their logical order.
            self.text.append(pending.keys, pending.values)
            return
        if rows:
            self.segments.append(self._compress(pending, plan, rows))
        self._append_text(pending, plan, rows)

    def _rows_worth_compressing(self, pending: Pending, plan: SealPlan) -> tuple[int, ...]:
        assert self.shape is not None
        width = self.shape[2]
        candidates = tuple(row for row, count in enumerate(plan.counts) if count)
        rank = self.options.rank_for(width)
        if self.options.always_compress or self.options.is_identity or rank is None:
            return candidates
        return tuple(row for row in candidates if compressed_saves_bytes(plan.counts[row], width, rank))

    def _compress(self, pending: Pending, plan: SealPlan, rows: tuple[int, ...]) -> VisualSegment:
        layout = plan.layout(rows, pending.keys.device)
        keys = pending.keys.transpose(0, 1)[:, layout.token_rows, layout.token_columns]  # [H, N, D]
        values = pending.values.transpose(0, 1)[:, layout.token_rows, layout.token_columns]
        pending_window, pending.window = pending.window, None
        basis = KeyBasis()
        coefficients = keys
        if not self.options.is_identity:
            basis = self._fit(keys, pending_window, plan, rows, layout.storage_ranges)
            coefficients = _encode(keys, basis, layout.storage_ranges)
        return VisualSegment(
            coefficients=coefficients,
            values=values,
            basis=basis,
            positions=layout.positions,
            starts=layout.starts,
            lengths=layout.lengths,
            basis_rows=layout.basis_rows,
            max_length=layout.max_length,
            uniform=layout.uniform,
        )

    def _fit(
        self, keys: Tensor, window: Tensor | None, plan: SealPlan, rows: Sequence[int], ranges: Sequence[tuple[int, int]]
    ) -> KeyBasis:
        moments = [key_moments(keys[:, start : start + length]) for start, length in ranges]
        mean, scatter = (torch.stack(parts, 1) for parts in zip(*moments, strict=True))
        if not bool(torch.isfinite(scatter).all()):
            raise ValueError(
                f"the visual Keys of layer {self.index} hold NaN or infinity, so no basis can be fitted to them: the model's "
                "weights, inputs or dtype overflow before they reach the cache"
            )
        weight = None
        if self.options.query_weight and window is not None:
            index = torch.tensor(rows, device=window.device)
            valid = plan.visible_tail(window.shape[2], window.device)
            weight = query_channel_norm(window[index], keys.shape[0], None if valid is None else valid[index])
        matrix = weighted_scatter(scatter, weight)
        rank = self.options.rank_for(keys.shape[-1])
        if rank is None:
            assert self.options.energy is not None
            rank = rank_for_energy(matrix, self.options.energy)
        return fit_basis(mean, matrix, rank, self.options.solver, keys.dtype)

    def _append_text(self, pending: Pending, plan: SealPlan, compressed_rows: tuple[int, ...]) -> None:
        """Move the pending tokens that stay dense behind the text."""
        keys, values = pending.keys, pending.values
        order, alignment = plan.text_alignment(compressed_rows, self.text.alignment, self.text.length, keys.device)
        if self.text.length:
            text_keys, text_values = self.text.logical()
            keys, values = torch.cat([text_keys, keys], 2), torch.cat([text_values, values], 2)
        self.text.realign(keys, values, order, alignment)

    def select_rows(self, index: Tensor) -> None:
        """Let batch row b be what row ``index[b]`` was, for beams and batch selection."""
        if self.shape is None:
            return
        device = self._device()
        index = index.to(device)
        unchanged = device.type == "cpu" and torch.equal(index, torch.arange(self.shape[0]))
        if unchanged:
            return
        for segment in self.segments:
            segment.select_rows(index, unchanged)
        self.text.select_rows(index)
        if self.pending is not None:
            pending = self.pending
            window = None if pending.window is None else pending.window[index]
            self.pending = Pending(pending.keys[index], pending.values[index], pending.begin, window)
        self.shape = (len(index), *self.shape[1:])

    def _device(self) -> torch.device:
        return next(iter(self.tensors())).device

    def truncate(self, length: int) -> None:
        """Forget the logical positions from `length` on."""
        if length >= self.length:
            return
        if self.pending is not None and length > self.pending.begin:
            keep = length - self.pending.begin
            removed = self.length - length
            window = self.pending.window
            window = None if window is None else window[:, :, : max(0, window.shape[2] - removed)]
            keys, values = self.pending.keys[:, :, :keep], self.pending.values[:, :, :keep]
            self.pending = Pending(keys, values, self.pending.begin, window)
        else:
            self.pending = None
            for segment in self.segments:
                segment.truncate(length)
            self.text.truncate(length)
        self.length = length

    def dense_tokens(self) -> int:
        """Tokens held dense, over all rows: text, what waits for its seal, and images below break-even."""
        if self.shape is None:
            return 0
        text = self.text.length * self.shape[0]
        if self.text.alignment is not None and self.text.alignment.first is not None:
            text -= int(self.text.alignment.first.sum())
        return text + (0 if self.pending is None else self.pending.keys.shape[2] * self.shape[0])

    def tensors(self) -> list[Tensor]:
        """Everything held, shared tensors included."""
        held = [t for segment in self.segments for t in segment.tensors()] + self.text.tensors()
        if self.pending is not None:
            window = [] if self.pending.window is None else [self.pending.window]
            held += [self.pending.keys, self.pending.values, *window]
        return held


def _encode(keys: Tensor, basis: KeyBasis, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Coefficients ``[H, N, r]`` of packed Keys ``[H, N, D]``, row by row of the basis."""
    assert basis.A is not None
    coefficients = keys.new_empty(*keys.shape[:2], basis.A.shape[-1])
    for row, (start, length) in enumerate(ranges):
        one = select_basis(basis, torch.tensor([row], device=keys.device))
        coefficients[:, start : start + length] = one.encode(keys[:, None, start : start + length])[:, 0]
    return coefficients

