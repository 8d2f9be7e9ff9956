"""`LayerKV`, the Keys and Values of one layer: append, seal, select, crop.

A layer holds them in up to three places. New tokens whose image is not finished yet are *pending*: dense, as the model
gave them. A *seal* moves the visual ones among them into a compressed segment that is never copied again, and the
others into the *text* segment, which stays dense and grows in place. A layer does as it is told: when it seals, with
what options and which tokens it keeps, is decided by the coordinator of its cache.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rotatek_cache.cache.answer import Answer
from rotatek_cache.cache.head_segments import head_segments
from rotatek_cache.cache.seal_plan import Compressed, SealPlan
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.codecs.sealing import Sealer
from rotatek_cache.core.attention import reference_attention
from rotatek_cache.core.basis import compute_dtype
from rotatek_cache.core.forward_tables import TextForm
from rotatek_cache.core.row_layout import RowLayout, row_index
from rotatek_cache.core.seal import Places
from rotatek_cache.core.segments import SegmentView, Stored, TextSegment, VisualSegment, join_segments
from rotatek_cache.options import FitOptions

Merge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # Keys and Values [B, H, P, D] to those that are stored


@dataclass
class Pending:
    """Dense tokens that wait for their seal, as the model gave them: ``[B, H, P, D]``."""

    keys: Tensor
    values: Tensor
    begin: int  # logical position of the first
    window: Tensor | None = None  # the last queries, [B, H_q, <= W, D]; where layers share these Keys, of all of them
    reads: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)  # of this forward: queries and masks


class LayerKV:
    """Keys and Values of one layer: dense until an image is complete, compressed from its seal on.

    Args:
        options: how it stores them.
        positions: which positions are visual, shared by the layers of a cache.
        index: of the layer in the model, from 0.
        readers: how many layers attend to what it stores: itself, and those that have no Keys of their own.
    """

    def __init__(self, options: FitOptions, positions: VisualPositions, index: int, readers: int = 1) -> None:
        self.positions = positions
        self.index = index
        self.readers = readers
        self.use(options)
        self._empty()

    def _empty(self) -> None:
        self.segments: list[VisualSegment] = []
        self.text = TextSegment()
        self.pending: Pending | None = None
        self.length = 0  # logical tokens, padding included
        self.kept_dense: list[tuple[int, int]] = []  # (row at its seal, visual tokens) below break-even
        self.dropped: list[tuple[int, Tensor]] = []  # by seal: its first position, tokens left out [B]
        self.shape: tuple[int, int, int, int] | None = None  # B, H, D, D_v
        self.dtype: torch.dtype | None = None
        decoded = self.options.decoded
        self.answer = None if decoded is None else Answer.by_name(decoded, self.readers)

    def use(self, options: FitOptions) -> None:
        """Seal with these options from now on."""
        self.options, self.sealer = options, Sealer(options, self.index)

    def reset(self) -> None:
        """Forget everything but the options."""
        self.use(self.options)
        self._empty()

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take the Keys ``[B, H, n, D]`` and Values ``[B, H, n, D_v]`` of the next n positions."""
        self._check(keys, values)
        self.sealer.check()
        tokens = keys.shape[2]
        if self.answer is not None:
            if tokens == 1 and self.make_room():
                self.answer.reads = 0
            else:
                self.answer.close(self.text)
        begin, self.length = self.length, self.length + tokens
        if self.pending is not None:
            self.pending.keys = torch.cat([self.pending.keys, keys], 2)
            self.pending.values = torch.cat([self.pending.values, values], 2)
            self.pending.reads = []
        elif self.positions.has_visual(begin, self.length):
            self.pending = Pending(keys, values, begin)
        else:
            self.text.append(keys, values)

    def make_room(self) -> bool:
        """Make sure of a place for one more token of an answer; False where the next is none, or answers may grow."""
        next_is_decoded = self.length > 0 and self.pending is None
        if self.answer is None or not next_is_decoded or self.positions.has_visual(self.length, self.length + 1):
            return False
        self.answer.make_room(self.text, self.length, self.positions.forward)
        return True

    def keep_decoded_query(self, query: Tensor, scale: float | None) -> None:
        """Keep the query ``[B, H_q, 1, D]`` of a token of an answer, by which others are judged."""
        if self.answer is not None:
            self.answer.take(query, query.shape[-1] ** -0.5 if scale is None else scale, self.length - 1)

    def _check(self, keys: Tensor, values: Tensor) -> None:
        batch, heads, _, width = keys.shape
        shape = (batch, heads, width, values.shape[-1])
        if self.shape is None:
            self.shape, self.dtype = shape, keys.dtype
        else:
            check_shape(shape, self.shape)

    def count_step(self) -> None:
        """Note a token that a replayed graph has written behind the text."""
        self.sealer.check()
        if self.answer is not None:
            self.answer.note(self.length)
        self.length += 1
        self.text.length += 1

    def dense(self) -> tuple[Tensor, Tensor] | None:
        """Return all Keys and Values in logical order, ``[B, H, T, D]``, while nothing has been sealed; else None."""
        if self.segments or self.text.alignment is not None:
            return None
        if self.pending is None:
            return self.text.logical()
        if self.text.length == 0:
            return self.pending.keys, self.pending.values
        keys, values = self.text.logical()
        return torch.cat([keys, self.pending.keys], 2), torch.cat([values, self.pending.values], 2)

    def views(self, mask: Tensor | None) -> list[SegmentView]:
        """List the segments for attention; `mask`, the model's, is bool or additive ``[B or 1, 1, Q, T]``, or None."""
        if mask is not None:
            self.positions.check_mask(mask)
            if self.answer is not None:
                self.answer.check_mask(mask, self.positions.forward)
        forward = self.positions.forward
        views = [segment.view(forward, mask) for segment in self.segments]
        text = self.text.view(forward, mask)
        if text is not None:
            views.append(text)
        if self.pending is not None:
            views.append(self._pending_view(self.pending, mask))
        return views

    def _pending_view(self, pending: Pending, mask: Tensor | None) -> SegmentView:
        batch, _, tokens, _ = pending.keys.shape
        starts, lengths = self.positions.forward.text_rows(TextForm(None, batch, tokens, tokens, pending.keys.device))
        if mask is not None:
            mask = mask[:, 0, :, pending.begin :].expand(batch, -1, -1)
        return SegmentView(
            keys=pending.keys.transpose(0, 1).flatten(1, 2),
            values=pending.values.transpose(0, 1).flatten(1, 2),
            starts=starts,
            lengths=lengths,
            max_length=tokens,
            row_stride=tokens,
            batched=True,
            mask=mask,
        )

    def keep_queries(self, query: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None] | None:
        """Keep the last of a forward's queries, by which pending Keys are weighed at their seal.

        Where layers share these Keys, each brings its own, and those of all count as heads of their group. A layer may
        attend with a prompt's last positions alone, whose queries are left out then.

        Args:
            query: ``[B, H_q, Q, D]``.
            mask: of the model.

        Returns:
            Queries and mask of the layer that attended first, once every layer has in this forward; None before.
        """
        pending = self.pending
        assert pending is not None
        pending.reads.append((query, mask))
        if len(pending.reads) < self.readers:
            return None
        reads, pending.reads = pending.reads, []
        heads, width = pending.keys.shape[1], self.options.query_window
        queries = [one[:, :, -width:].unflatten(1, (heads, -1)) for one, _ in reads]
        query = torch.cat([one for one in queries if one.shape[3] == queries[0].shape[3]], 2).flatten(1, 2)
        if pending.window is not None:
            groups = query.shape[1] // heads, pending.window.shape[1] // heads
            query, held = (
                one.unflatten(1, (heads, -1))[:, :, : min(groups)].flatten(1, 2) for one in (query, pending.window)
            )
            query = torch.cat([held, query], 2)
        # Cloned, or a view would keep the whole prompt's queries alive until the seal.
        pending.window = query[:, :, -width:].clone()
        return reads[0]

    def pending_attention(self, query: Tensor, visible: Tensor, scale: float) -> Tensor:
        """Compute what attention a few queries ``[B, H_q, q, D]`` pay to the pending tokens: ``[B, H_q, q, P]``.

        The softmax is over all that the layer holds; `visible` ``[B or 1, q, T]`` says what each query sees.
        """
        assert self.pending is not None
        dtype = compute_dtype(query.dtype)
        keys = self.pending.keys.to(dtype)
        _, lse = reference_attention(query, self.views(visible[:, None]), scale)
        assert lse is not None
        grouped = (query.to(dtype) * scale).unflatten(1, (keys.shape[1], -1))  # [B, H, G, q, D]
        logits = (grouped @ keys.mT[:, :, None]).flatten(1, 2)
        logits = logits.masked_fill(~visible[:, None, :, self.pending.begin :], -torch.inf)
        return (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()

    def seal(self, plan: SealPlan, merge: Merge | None = None, better: FitOptions | None = None) -> None:
        """Store the pending tokens as a plan says.

        Args:
            plan: which of them are visual, text, padding or dropped.
            merge: changes their Keys and Values first, where dropped tokens are merged into kept ones.
            better: how those are stored that the plan stores better, in a segment of their own; None: as the model gave
                them, among the text.
        """
        pending = self.pending
        assert pending is not None
        if plan.dropped is not None:
            self.dropped.append((plan.begin, plan.dropped_counts(pending.keys.device)))
        if merge is not None:
            pending.keys, pending.values = merge(pending.keys, pending.values)
        compressed: list[tuple[SealPlan, tuple[int, ...]]] = []
        for part, sealer in self._divided(plan, better):
            made: list[VisualSegment] = []
            # A segment has one layout, and that of a row must not depend on its batch.
            for rows_part in part.rows if self.options.follows_content else (part,):
                rows, segment = self._compress_worth(pending, rows_part, sealer)
                self.kept_dense += [
                    (row, count) for row, count in enumerate(rows_part.counts) if count and row not in rows
                ]
                if segment is None:
                    continue
                compressed.append((rows_part, rows))
                if plan.heads is None:
                    made.append(segment)
                else:
                    layout = rows_part.layout(rows, pending.keys.device)
                    self.segments += head_segments(segment, plan.heads, layout, pending.keys)
            self.segments += join_segments(made)
            self.sealer.answer_for(sealer)
        self.pending = None
        if not compressed and not self.segments and self.text.alignment is None and plan.all_visible:
            # Nothing is compressed and nothing is padding: the tokens keep their logical order.
            self.text.append(pending.keys, pending.values)
            return
        self._append_text(pending, plan, tuple(compressed))

    def _divided(self, plan: SealPlan, better: FitOptions | None) -> list[tuple[SealPlan, Sealer]]:
        """List the parts of a plan that are to be segments, and by what each is stored."""
        if plan.better is None:
            return [(plan, self.sealer)]
        chosen, others = plan.by_quality
        coded = [] if better is None else [(chosen, Sealer(better, self.index))]
        return [*coded, (others, self.sealer)]

    def _compress_worth(
        self, pending: Pending, plan: SealPlan, sealer: Sealer
    ) -> tuple[tuple[int, ...], VisualSegment | None]:
        """Make a segment of the rows whose visual tokens take fewer bytes in it; returns these rows and the segment."""
        rows = self._worth(pending, plan, [row for row, count in enumerate(plan.counts) if count], sealer)
        segment = self._compress(pending, plan, rows, sealer) if rows else None
        if segment is not None and self.options.energy is not None:
            # Only now is the rank known; rows that it does not pay for stay dense.
            worth = self._worth(pending, plan, rows, sealer, segment.keys.channels)
            if worth != rows:
                rows, segment = worth, self._compress(pending, plan, worth, sealer) if worth else None
        return rows, segment

    @staticmethod
    def _worth(
        pending: Pending, plan: SealPlan, rows: Sequence[int], sealer: Sealer, rank: int | None = None
    ) -> tuple[int, ...]:
        shape = (pending.keys.shape[-1], pending.values.shape[-1], pending.keys.dtype)
        return tuple(row for row in rows if sealer.is_worth(plan.counts[row], *shape, rank))

    @staticmethod
    def _compress(pending: Pending, plan: SealPlan, rows: tuple[int, ...], sealer: Sealer) -> VisualSegment:
        layout = plan.layout(rows, pending.keys.device)
        window, valid = pending.window, None
        if window is not None:
            valid = plan.visible_tail(rows, window.shape[2], window.device)
            window = window if len(rows) == len(window) else window[layout.rows]
        keys, values, places = _placed(pending, layout)
        stored_keys, stored_values = sealer.store(keys, values, places, window, valid)
        return VisualSegment(
            keys=_own(stored_keys, pending.keys),
            values=_own(stored_values, pending.values),
            positions=layout.positions,
            starts=layout.starts,
            lengths=layout.lengths,
            basis_rows=layout.basis_rows,
            max_length=layout.max_length,
            uniform=layout.uniform,
        )

    def _append_text(self, pending: Pending, plan: SealPlan, compressed: Compressed) -> None:
        """Move the pending tokens that stay dense behind the text."""
        keys, values = pending.keys, pending.values
        order, alignment = plan.text_alignment(compressed, self.text.alignment, self.text.length, keys.device)
        if self.text.length:
            text_keys, text_values = self.text.logical()
            keys, values = torch.cat([text_keys, keys], 2), torch.cat([text_values, values], 2)
        self.text.realign(keys, values, order, alignment)

    def select_rows(self, index: Tensor) -> None:
        """Let batch row b be what row ``index[b]`` was, for beams and batch selection."""
        if self.shape is None:
            return
        held = self.tensors()
        index = row_index(index, held[0].device if held else torch.device("cpu"))
        if index.device.type == "cpu" and torch.equal(index, torch.arange(self.shape[0], device="cpu")):
            return
        for segment in self.segments:
            segment.select_rows(index)
        self.text.select_rows(index)
        if self.answer is not None:
            self.answer.select_rows(index)
        self.dropped = [(begin, counts[index]) for begin, counts in self.dropped]
        if self.pending is not None:
            pending = self.pending
            window = None if pending.window is None else pending.window[index]
            self.pending = Pending(pending.keys[index], pending.values[index], pending.begin, window)
        self.shape = (len(index), *self.shape[1:])

    def follow(self, padding: Tensor) -> None:
        """Begin an empty text behind all that is held, with so many columns of padding, int64 ``[B]``."""
        if self.answer is not None:
            self.answer.close(self.text)
        self.text = TextSegment()
        self.text.follow(self.length, padding)

    def truncate(self, length: int) -> None:
        """Forget the logical positions from `length` on."""
        if length >= self.length:
            return
        if self.answer is not None:
            self.answer.check_crop(length)
        columns, removed = self.text.length, self.length - length
        if self.pending is not None and length > self.pending.begin:
            keep = length - self.pending.begin
            window = self.pending.window
            window = None if window is None else window[:, :, : max(0, window.shape[2] - removed)]
            keys, values = self.pending.keys[:, :, :keep], self.pending.values[:, :, :keep]
            self.pending = Pending(keys, values, self.pending.begin, window)
        else:
            self.pending = None
            for segment in self.segments:
                segment.truncate(length)
            self.segments = [segment for segment in self.segments if bool(segment.lengths.any())]
            self.text.truncate(length)
            self.dropped = [(begin, counts) for begin, counts in self.dropped if begin < length]
            if length == 0:
                self.text, self.kept_dense = TextSegment(), []
            if self.answer is not None:
                self.answer.truncate(self.text, columns, length, removed)
        self.length = length

    def dense_tokens(self) -> int:
        """Count the tokens held dense, over all rows: text, what waits for its seal, and images below break-even."""
        if self.shape is None:
            return 0
        text = self.text.length * self.shape[0] + sum(int(s.lengths.sum()) for s in self.segments if s.is_text)
        if self.text.alignment is not None and self.text.alignment.first is not None:
            text -= int(self.text.alignment.first.sum())
        return text + (0 if self.pending is None else self.pending.keys.shape[2] * self.shape[0])

    def tensors(self) -> list[Tensor]:
        """List everything held, shared tensors included."""
        held = [t for segment in self.segments for t in segment.tensors()] + self.text.tensors()
        if self.pending is not None:
            window = [] if self.pending.window is None else [self.pending.window]
            held += [self.pending.keys, self.pending.values, *window]
        if self.answer is not None and self.answer.queries is not None:
            held.append(self.answer.queries)
        return held + [counts for _, counts in self.dropped]


def check_shape(shape: tuple[int, int, int, int], held: tuple[int, int, int, int]) -> None:
    """Raise a ValueError where states of a `shape` (rows, KV heads, widths) come to a layer that holds another."""
    if shape == held:
        return
    repeated = shape[1:] == held[1:] and shape[0] % held[0] == 0
    repeat = f"call cache.batch_repeat_interleave({shape[0] // held[0]}) first where each row is repeated, "
    raise ValueError(
        f"this cache holds (rows, KV heads, key width, value width) = {held}, the new states have "
        f"{shape}: {repeat if repeated else 'call '}cache.reset() or a new cache for another batch"
    )


def _placed(pending: Pending, layout: RowLayout) -> tuple[Tensor, Tensor, Places]:
    """Give Keys and Values with the places of a layout's tokens in them; of a run of one row, that run alone."""
    if layout.run is None:
        return pending.keys, pending.values, Places(layout.storage_ranges, layout.token_rows, layout.token_columns)
    row, begin, end = layout.run
    keys, values = (states[row : row + 1, :, begin:end] for states in (pending.keys, pending.values))
    return keys, values, Places(layout.storage_ranges)


def _own(stored: Stored, given: Tensor) -> Stored:
    """Copy what is stored where it still lies among the states that were given, which are to be freed."""
    if stored.data.untyped_storage().data_ptr() != given.untyped_storage().data_ptr():
        return stored
    return dataclasses.replace(stored, data=stored.data.clone(memory_format=torch.contiguous_format))
