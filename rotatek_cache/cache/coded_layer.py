"""`CodedKV`, the Keys and Values of one layer where all tokens are coded, text and images alike.

A token is coded when it comes, by itself: nothing waits for the end of an image, and nothing is fitted. A row's first
tokens (attention sinks) and, beside their codes, its last ones are dense, in a buffer that does not grow.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from rotatek_cache.cache.layer import check_shape
from rotatek_cache.cache.token_counts import DENSE_COLUMNS, Moves, TokenCounts
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.codecs.token_rows import TokenRows, token_rows
from rotatek_cache.core.precision import without_autocast
from rotatek_cache.core.quantization import HeadCodes
from rotatek_cache.core.row_layout import LENGTH, row_index
from rotatek_cache.core.segments import SegmentView
from rotatek_cache.options import FitOptions

# Free columns of codes after they had to grow: a smaller share than dense text has, since codes are all there is.
LEAST_FREE = 64
FILLED_PER_FREE = 32


class CodeBuffer:
    """Codes of the Keys, or Values, of a layer: `capacity` columns for each row of the batch.

    Args:
        codec: encodes and decodes.
        batch: rows.
        dtype: of the states.
        device: of the states.
    """

    def __init__(self, codec: TokenRows, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.codec, self.batch, self.dtype = codec, batch, dtype
        self.capacity = self.reserved = 0
        self.data = self._empty(device)

    def _empty(self, device: torch.device) -> Tensor:
        widths, dtype = self.codec.storage(self.dtype)
        slots = self.batch * self.capacity
        shape = (slots * sum(widths),) if isinstance(self.codec.code, HeadCodes) else (len(widths), slots, widths[0])
        return torch.zeros(shape, dtype=dtype, device=device)

    def _heads(self) -> list[Tensor]:
        """View the codes as ``[H', B, capacity, w]`` parts, one for all heads that have one width."""
        code = self.codec.code
        parts = code.split(self.data) if isinstance(code, HeadCodes) else [self.data]
        return [part.unflatten(1, (self.batch, self.capacity)) for part in parts]

    @property
    def is_frozen(self) -> bool:
        """Whether the codes come from an inference mode that has ended, and so cannot be written to any more."""
        return self.data.is_inference() and not torch.is_inference_mode_enabled()

    def reserve(self, columns: int) -> None:
        """Make sure of so many columns that can be written to."""
        if columns > self.capacity:
            self.resize(columns + max(LEAST_FREE, columns // FILLED_PER_FREE))
        elif self.is_frozen:
            self.resize(self.capacity)

    def resize(self, capacity: int) -> None:
        """Take new storage of so many columns, and copy what fits."""
        old = self._heads() if self.capacity else []
        kept = min(capacity, self.capacity)
        self.capacity = capacity
        self.data = self._empty(self.data.device)
        for new, held in zip(self._heads(), old, strict=False):
            new[:, :, :kept] = held[:, :, :kept]

    def write(self, rows: Tensor, columns: Tensor, states: Tensor) -> None:
        """Encode states ``[H, n, D]`` to the places `rows`, `columns`, int64 ``[n]``."""
        self.codec.write(self.data, rows * self.capacity + columns, states)

    def read(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Decode the places `rows`, `columns`, int64 ``[n]``: states ``[H, n, D]``."""
        slots = rows * self.capacity + columns
        code = self.codec.code
        if isinstance(code, HeadCodes):
            picked = torch.cat([part[:, slots].flatten() for part in code.split(self.data)])
        else:
            picked = self.data[:, slots]
        return self.codec.decode(picked, self.dtype)

    def select_rows(self, index: Tensor) -> None:
        """Let batch row b be what row ``index[b]`` was."""
        old = [part[:, index] for part in self._heads()]
        if len(index) != self.batch or self.is_frozen:
            self.batch = len(index)
            self.data = self._empty(self.data.device)
        for new, held in zip(self._heads(), old, strict=True):
            new.copy_(held)


class CodedKV:
    """Keys and Values of one layer, coded token by token.

    Args:
        options: with ``text="coded"``.
        positions: which positions are padding, shared by the layers of a cache.
        index: of the layer in the model, from 0.
    """

    readers = 1  # the one layer that attends to what it stores

    def __init__(self, options: FitOptions, positions: VisualPositions, index: int) -> None:
        self.options, self.positions, self.index = options, positions, index
        self.codecs = token_rows(options, index, "key"), token_rows(options, index, "value")
        self.reset()

    def reset(self) -> None:
        """Forget everything but the options."""
        self.length = 0  # logical tokens, padding included
        self.shape: tuple[int, int, int, int] | None = None  # B, H, D, D_v
        self.dtype: torch.dtype | None = None
        self.counts: TokenCounts | None = None
        self.dense_states: list[Tensor] = []  # Keys and Values [H, B, DENSE_COLUMNS, D]
        self.codes: list[CodeBuffer] = []
        self.fresh: tuple[Tensor, Tensor] | None = None  # [B, H, n, D] of a forward that has not attended yet

    @without_autocast
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take the Keys ``[B, H, n, D]`` and Values ``[B, H, n, D_v]`` of the next n positions."""
        self._check(keys, values)
        self.settle(None)
        for codec in self.codecs:
            codec.check_finite()
        alone = keys.shape[2] == 1 and self.length > 0
        self.length += keys.shape[2]
        if alone:
            self._step(keys, values)
        else:
            self.fresh = keys, values

    def _check(self, keys: Tensor, values: Tensor) -> None:
        batch, heads, _, width = keys.shape
        shape = (batch, heads, width, values.shape[-1])
        if self.shape is not None:
            check_shape(shape, self.shape)
            return
        for codec, states in zip(self.codecs, (keys, values), strict=True):
            if states.shape[1::2] != (codec.heads, codec.width):
                raise ValueError(
                    f"basis file {codec.file.path} was calibrated on another model: in layer {self.index} it has "
                    f"{codec.heads} {codec.wanted.kind} heads of width {codec.width}, the states have "
                    f"{states.shape[1]} of width {states.shape[3]}"
                )
        self.shape, self.dtype = shape, keys.dtype
        self.counts = self.positions.counts_of_nothing(batch, keys.device)
        self.dense_states = [
            states.new_zeros(heads, batch, DENSE_COLUMNS, states.shape[-1]) for states in (keys, values)
        ]
        self.codes = [CodeBuffer(codec, batch, keys.dtype, keys.device) for codec in self.codecs]

    def _step(self, keys: Tensor, values: Tensor) -> None:
        """Put one token of each row among the codes and into the ring."""
        assert self.counts is not None
        step, rows = self.counts.step, self.counts.batch
        self._reserve(step.counts.code_columns)
        self._thaw()
        for held, codes, new in zip(self.dense_states, self.codes, (keys, values), strict=True):
            states = new[:, :, 0].transpose(0, 1)
            codes.write(rows, step.code_column, states)
            held[:, rows, step.column] = states
        self.counts = step.counts

    @without_autocast
    def settle(self, mask: Tensor | None) -> None:
        """Put the tokens of a forward that has attended where they stay.

        Args:
            mask: the model's, bool ``[B or 1, 1, Q, T]`` or additive: what no query sees is padding. None: nothing is.
        """
        if self.fresh is None or self.counts is None:
            return
        fresh, self.fresh = self.fresh, None
        tokens = fresh[0].shape[2]
        visible = self.positions.see(self.length - tokens, self.length, len(self.counts.rows), mask)
        arrival = self.counts.arrival(tokens, visible)
        coded, dense = arrival.coded, arrival.dense
        self._reserve(arrival.counts.code_columns)
        self._thaw()
        for held, codes, new in zip(self.dense_states, self.codes, fresh, strict=True):
            states = new.transpose(0, 1)
            if coded:
                taken = states[:, coded.rows, coded.source]
                codes.codec.expect_finite(taken)
                codes.write(coded.rows, coded.target, taken)
            held[:, dense.rows, dense.target] = states[:, dense.rows, dense.source]
        self.counts = arrival.counts

    def _reserve(self, columns: int) -> None:
        for codes in self.codes:
            codes.reserve(max(1, columns))

    def _thaw(self) -> None:
        """Copy buffers of an inference mode that has ended, which cannot be written to any more."""
        if self.dense_states[0].is_inference() and not torch.is_inference_mode_enabled():
            self.dense_states = [held.clone() for held in self.dense_states]

    def reserve_steps(self, columns: int, multiple: int) -> None:
        """Make sure of a free column of codes for a step of fixed addresses, by so many more where there is none.

        Prompts of about the same length meet in one capacity, a multiple of `multiple`.
        """
        assert self.counts is not None
        needed = self.counts.step_columns
        for codes in self.codes:
            if needed > codes.capacity or codes.capacity != codes.reserved or codes.is_frozen:
                codes.reserved = -(-(needed + columns) // multiple) * multiple
                codes.resize(codes.reserved)
        self._thaw()

    def count_step(self) -> None:
        """Note a token that a replayed graph has coded."""
        assert self.counts is not None
        self.length += 1
        self.counts = self.counts.after_a_replay

    def fixed_views(self, code_lengths: Tensor, dense_lengths: Tensor) -> list[SegmentView]:
        """List the segments with lengths int32 ``[B]`` that the device knows."""
        assert self.counts is not None
        views = (self._code_view(self.counts, None), self._dense_view(self.counts, None))
        most = (self.codes[0].capacity, DENSE_COLUMNS)
        return [
            dataclasses.replace(view, lengths=lengths, max_length=bound, batched=False)
            for view, lengths, bound in zip(views, (code_lengths, dense_lengths), most, strict=True)
        ]

    def dense(self) -> tuple[Tensor, Tensor] | None:
        """Return all Keys and Values in logical order, ``[B, H, T, D]``, in the first forward; else None."""
        first = self.fresh is not None and self.fresh[0].shape[2] == self.length
        return self.fresh if first else None

    def views(self, mask: Tensor | None) -> list[SegmentView]:
        """List the segments for attention; `mask`, the model's, is bool or additive ``[B or 1, 1, Q, T]``, or None."""
        counts = self.counts
        assert counts is not None
        if mask is not None:
            self.positions.check_mask(mask)
        views = []
        if max(counts.coded):
            views.append(self._code_view(counts, mask))
        if counts.most:
            views.append(self._dense_view(counts, mask))
        if self.fresh is not None:
            views.append(fresh_view(*self.fresh, mask))
        return views

    def _code_view(self, counts: TokenCounts, mask: Tensor | None) -> SegmentView:
        keys, values = self.codes
        device = keys.data.device
        bases = [codec.basis(keys.dtype, device, len(counts.rows)) for codec in self.codecs]
        return SegmentView(
            keys=keys.data,
            values=values.data,
            starts=counts.batch * keys.capacity,
            lengths=counts.code_lengths,
            max_length=max(counts.coded),
            row_stride=keys.capacity,
            batched=counts.alike,
            basis=bases[0],
            mask=self._columns(mask, counts, "codes"),
            key_code=self.codecs[0].view_code,
            value_basis=bases[1],
            value_code=self.codecs[1].view_code,
        )

    def _dense_view(self, counts: TokenCounts, mask: Tensor | None) -> SegmentView:
        keys, values = self.dense_states
        return SegmentView(
            keys=keys.flatten(1, 2),
            values=values.flatten(1, 2),
            starts=counts.batch * DENSE_COLUMNS,
            lengths=counts.dense_lengths,
            max_length=min(counts.most, DENSE_COLUMNS),
            row_stride=DENSE_COLUMNS,
            batched=counts.alike or min(counts.rows) >= DENSE_COLUMNS,
            mask=self._columns(mask, counts, "dense"),
        )

    def _columns(self, mask: Tensor | None, counts: TokenCounts, which: str) -> Tensor | None:
        if mask is None:
            return None

        def places() -> Tensor:
            tokens = counts.coded_tokens() if which == "codes" else counts.dense_tokens()
            return self.positions.places_of(tokens)

        return self.positions.forward.mask_columns(mask, (counts, which), places)

    def select_rows(self, index: Tensor | Sequence[int]) -> None:
        """Let batch row b be what row ``index[b]`` was, for beams and batch selection."""
        if self.shape is None or self.counts is None:
            return
        self.settle(None)
        index = row_index(index, self.dense_states[0].device)
        if index.device.type == "cpu" and torch.equal(index, torch.arange(self.shape[0], device="cpu")):
            return
        self.counts = self.counts.selected(index)
        in_place = len(index) == self.shape[0]
        self._thaw()
        for place, held in enumerate(self.dense_states):
            if in_place:
                held.copy_(held[:, index])
            else:
                self.dense_states[place] = held[:, index]
        for codes in self.codes:
            codes.select_rows(index)
        self.shape = (len(index), *self.shape[1:])

    @without_autocast
    def truncate(self, length: int) -> None:
        """Forget the logical positions from `length` on; tokens that had left the ring come back as their codes say."""
        if length >= self.length or self.counts is None:
            return
        if length == 0:
            self.reset()
            return
        self.settle(None)
        back = self.counts.cut(self.positions.own_before(length, len(self.counts.rows)))
        self._thaw()
        if back.back:
            moves: Moves = back.back
            for held, codes in zip(self.dense_states, self.codes, strict=True):
                held[:, moves.rows, moves.target] = codes.read(moves.rows, moves.source)
        self.counts, self.length = back.counts, length

    def dense_tokens(self) -> int:
        """Count the tokens held dense, over all rows."""
        held = 0 if self.counts is None else sum(min(count, DENSE_COLUMNS) for count in self.counts.rows)
        return held + (0 if self.fresh is None else self.fresh[0].shape[0] * self.fresh[0].shape[2])

    def tensors(self) -> list[Tensor]:
        """List everything held, shared tensors included."""
        counts = [] if self.counts is None else [self.counts.on_device]
        return [*self.dense_states, *(codes.data for codes in self.codes), *(self.fresh or ()), *counts]


def fresh_view(keys: Tensor, values: Tensor, mask: Tensor | None) -> SegmentView:
    """View the last tokens as the model gave them: ``[B, H, n, D]``, columns of its mask included."""
    batch, _, tokens, _ = keys.shape
    device = keys.device
    return SegmentView(
        keys=keys.transpose(0, 1).flatten(1, 2),
        values=values.transpose(0, 1).flatten(1, 2),
        starts=torch.arange(batch, device=device) * tokens,
        lengths=torch.full((batch,), tokens, dtype=LENGTH, device=device),
        max_length=tokens,
        row_stride=tokens,
        batched=True,
        mask=None if mask is None else mask[:, 0, :, -tokens:].expand(batch, -1, -1),
    )
