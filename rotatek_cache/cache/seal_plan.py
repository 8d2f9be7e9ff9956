"""How pending positions divide into visual tokens, text and padding, and where a seal puts each of them."""

import functools

import torch
from torch import Tensor

from rotatek_cache.core.row_layout import (
    INDEX,
    LENGTH,
    POSITION,
    Alignment,
    RowLayout,
    TextOrder,
    align_right,
    column_positions,
    moved,
    own_columns,
)
from rotatek_cache.token_pruning.interface import HeadChoice

# Plans of which segments were made, with the batch rows of each.
Compressed = tuple[tuple["SealPlan", tuple[int, ...]], ...]


class SealPlan:
    """The pending positions ``begin : end`` as visual tokens, text and padding.

    Layers share it, and what one of them derives from it is kept for the others. All of it is found on the host, and
    sent to the layers' device without waiting for that.

    Args:
        visual, visible: bool ``[B, P]`` on the host.
        begin, end: the positions.
        dropped: bool ``[B, P]``, tokens that are to be left out; None: none.
        prompt_end: where guesses at the answer begin; None: there are none.
        asking: bool ``[B, P]``, tokens whose queries weigh; None: those that are stored.
        better: bool ``[B, P]``, visual tokens that are stored better than the others; None: all are stored alike.
        heads: which of the visual tokens each KV head stores; None: all.
    """

    def __init__(
        self,
        visual: Tensor,
        visible: Tensor,
        begin: int,
        end: int,
        dropped: Tensor | None = None,
        prompt_end: int | None = None,
        asking: Tensor | None = None,
        better: Tensor | None = None,
        heads: HeadChoice | None = None,
    ) -> None:
        if dropped is not None:
            # Handled as padding is: stored nowhere, and queries of visual tokens, which may be masked, weigh nothing.
            asking = visible & ~(visual & dropped) if asking is None else asking
            visual, visible = visual & ~dropped, visible & ~dropped
        self.visual = visual  # bool [B, P], padding excluded
        self.visible = visible  # bool [B, P]
        self.asking = visible if asking is None else asking  # bool [B, P]
        self.dropped = dropped
        self.better = better
        self.heads = heads
        self.prompt_end = end if prompt_end is None else prompt_end
        self.begin = begin
        self.end = end
        self.counts: list[int] = visual.sum(1).tolist()
        self.all_visible = bool(visible.all())
        self.all_ask = self.all_visible if self.asking is visible else bool(self.asking.all())
        # By what they follow from; tensors and alignments are compared by identity.
        self._keeping: dict[tuple[Tensor, bool], SealPlan] = {}
        self._preferring: dict[Tensor, SealPlan] = {}
        self._last_dense: dict[int, SealPlan] = {}
        self._layouts: dict[tuple[tuple[int, ...], torch.device], RowLayout] = {}
        self._dropped_counts: dict[torch.device, Tensor] = {}
        self._tails: dict[tuple[tuple[int, ...], int, torch.device], Tensor] = {}
        self._texts: dict[object, tuple[TextOrder, Alignment]] = {}

    def dropped_counts(self, device: torch.device) -> Tensor:
        """Count the tokens that are left out of each row, ``[B]``."""
        assert self.dropped is not None
        if device not in self._dropped_counts:
            (self._dropped_counts[device],) = moved([self.dropped.sum(1)], device)
        return self._dropped_counts[device]

    def visible_tail(self, rows: tuple[int, ...], window: int, device: torch.device) -> Tensor | None:
        """Return bool ``[len(rows), window]``, which of the last queries of `rows` weigh; None if all queries do."""
        if self.all_ask:
            return None
        key = (rows, window, device)
        if key not in self._tails:
            (self._tails[key],) = moved([self.asking[list(rows), -window:]], device)
        return self._tails[key]

    def keeping(self, kept: Tensor | None, *, text_too: bool = False) -> "SealPlan":
        """Return the plan of a layer that keeps only the tokens of bool ``[B, P]``; the same for one `kept`.

        Args:
            kept: visual tokens; all text stays.
            text_too: text that is not in `kept` is left out as well.
        """
        if kept is None:
            return self
        if (kept, text_too) not in self._keeping:
            dropped = (self.visible if text_too else self.visual) & ~kept.to(self.visual.device)
            self._keeping[kept, text_too] = SealPlan(self.visual, self.visible, self.begin, self.end, dropped)
        return self._keeping[kept, text_too]

    def dividing(self, heads: HeadChoice) -> "SealPlan":
        """Return the plan of a layer whose KV heads keep tokens of their own; what none of them keeps is left out."""
        dropped = self.visual & ~heads.stored.any(1).to(self.visual.device)
        return SealPlan(self.visual, self.visible, self.begin, self.end, dropped, heads=heads)

    def preferring(self, better: Tensor | None) -> "SealPlan":
        """Return the plan of a layer that stores the visual tokens of bool ``[B, P]`` better; the same for one."""
        if better is None:
            return self
        if better not in self._preferring:
            own = better.to(self.visual.device)
            self._preferring[better] = SealPlan(
                self.visual, self.visible, self.begin, self.end, asking=self.asking, better=own
            )
        return self._preferring[better]

    @functools.cached_property
    def by_quality(self) -> "tuple[SealPlan, SealPlan]":
        """Plans of the visual tokens that are stored better, and of the others; all else is the same in both."""
        assert self.better is not None
        better, others = (
            SealPlan(self.visual & part, self.visible, self.begin, self.end, asking=self.asking)
            for part in (self.better, ~self.better)
        )
        return better, others

    def keep_last_dense(self, tokens: int) -> "SealPlan":
        """Return the plan that counts the last `tokens` visual tokens of each row as text."""
        if not tokens:
            return self
        if tokens not in self._last_dense:
            from_end = self.visual.flip(1).cumsum(1).flip(1)  # 1 for the last visual token
            visual = self.visual & (from_end > tokens)
            self._last_dense[tokens] = SealPlan(
                visual, self.visible, self.begin, self.end, self.dropped, asking=self.asking
            )
        return self._last_dense[tokens]

    def queries_behind_visual(self, *, last_only: bool = False) -> Tensor:
        """Return bool ``[B, P]``: text behind a row's last visual token, or only the last of it; none in rows of text.

        Guesses of assisted decoding, which come with the prompt, are not looked at, unless the prompt ends in an image.
        """
        places = torch.arange(1, self.visual.shape[1] + 1, device=self.visual.device)
        last_visual = (self.visual * places).amax(1, keepdim=True)
        behind = self.visible & (places > last_visual) & (last_visual > 0)
        prompt = behind & (places <= self.prompt_end - self.begin)
        behind = torch.where(prompt.any(1, keepdim=True), prompt, behind)
        return behind & (places == (behind * places).amax(1, keepdim=True)) if last_only else behind

    @functools.cached_property
    def rows(self) -> "tuple[SealPlan, ...]":
        """A plan for each batch row with visual tokens."""
        index = torch.arange(len(self.counts), device=self.visual.device)[:, None]
        return tuple(
            SealPlan(self.visual & (index == row), self.visible, self.begin, self.end, asking=self.asking)
            for row, count in enumerate(self.counts)
            if count
        )

    def layout(self, rows: tuple[int, ...], device: torch.device) -> RowLayout:
        """Lay out a segment that holds the visual tokens of batch rows `rows`."""
        key = (rows, device)
        if key not in self._layouts:
            self._layouts[key] = self._layout(rows, device)
        return self._layouts[key]

    def _layout(self, rows: tuple[int, ...], device: torch.device) -> RowLayout:
        batch = len(self.counts)
        chosen = torch.zeros(batch, 1, dtype=torch.bool, device="cpu")
        chosen[list(rows)] = True
        token_rows, token_columns = (self.visual & chosen.to(self.visual.device)).nonzero(as_tuple=True)
        starts, lengths, basis_rows = [0] * batch, [0] * batch, [0] * batch
        ranges = []
        offset = 0
        for basis_row, row in enumerate(rows):
            starts[row], lengths[row], basis_rows[row] = offset, self.counts[row], basis_row
            ranges.append((offset, self.counts[row]))
            offset += self.counts[row]
        run = None
        if len(rows) == 1 and int(token_columns[-1] - token_columns[0]) == offset - 1:
            run = (rows[0], int(token_columns[0]), int(token_columns[-1]) + 1)
        kept = [
            (token_columns + self.begin).to(POSITION),
            torch.tensor(starts, dtype=INDEX, device="cpu"),
            torch.tensor(lengths, dtype=LENGTH, device="cpu"),
            torch.tensor(basis_rows, dtype=INDEX, device="cpu"),
        ]
        # Those that the segment keeps lie apart from those that it does not.
        used = [torch.tensor(rows, dtype=INDEX, device="cpu"), token_rows, token_columns]
        positions, table_starts, table_lengths, table_basis_rows = moved(kept, device)
        if run is None:
            index, token_rows, token_columns = moved(used, device)
        else:
            (index,) = moved(used[:1], device)
        return RowLayout(
            rows=index,
            token_rows=token_rows,
            token_columns=token_columns,
            run=run,
            positions=positions,
            starts=table_starts,
            lengths=table_lengths,
            basis_rows=table_basis_rows,
            storage_ranges=tuple(ranges),
            max_length=max(lengths),
            uniform=len(set(lengths)) == 1,
        )

    def text_alignment(
        self, compressed: Compressed, previous: Alignment | None, columns: int, device: torch.device
    ) -> tuple[TextOrder, Alignment]:
        """Lay out the text: `columns` old columns that lay as `previous`, then the pending ones that stay dense.

        `compressed` are this plan or parts of it; visual tokens of other rows stay dense. Returns what `align_right`
        does, over the concatenation of old and pending columns.
        """
        # Parts are this plan or held by it; named by what they are, or the plan would hold itself.
        key = (tuple((id(part), rows) for part, rows in compressed), previous, columns, device)
        if key not in self._texts:
            self._texts[key] = self._text_alignment(compressed, previous, columns, device)
        return self._texts[key]

    def _text_alignment(
        self, compressed: Compressed, previous: Alignment | None, columns: int, device: torch.device
    ) -> tuple[TextOrder, Alignment]:
        keep = self.visible.clone()
        for part, rows in compressed:
            chosen = torch.zeros(len(self.counts), 1, dtype=torch.bool, device="cpu")
            chosen[list(rows)] = True
            keep &= ~(part.visual & chosen.to(part.visual.device))
        batch, host = keep.shape[0], keep.device
        positions = (torch.arange(keep.shape[1], device=host) + self.begin).expand(batch, -1)
        if columns:
            previous = None if previous is None else previous.on_host()
            old_positions = column_positions(previous, columns, batch, host)
            keep = torch.cat([own_columns(previous, columns, batch, host), keep], 1)
            positions = torch.cat([old_positions, positions], 1)
        order, alignment = align_right(keep, positions, self.end)
        return TextOrder(*moved(order, device)), alignment.on(device)
