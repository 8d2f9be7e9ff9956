"""How pending positions divide into visual tokens, text and padding, and the prompt that is expected."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.core.row_layout import Alignment, RowLayout, align_right, column_positions, own_columns


@dataclass(frozen=True, eq=False)
class Coming:
    """A prompt that is about to be read, perhaps in parts.

    Attributes:
        begin: its first logical position.
        visual, visible: bool ``[B, n]``.
        repeats: how often generate is going to repeat each row (beams, several answers).
    """

    begin: int
    visual: Tensor
    visible: Tensor
    repeats: int = 1

    @property
    def rows(self) -> int:
        """Rows of the batch to come."""
        return self.visual.shape[0] * self.repeats

    @property
    def end(self) -> int:
        """The first position behind it."""
        return self.begin + self.visual.shape[1]

    def agrees(self, begin: int, visual: Tensor | None, tokens: int) -> bool:
        """Whether the next `tokens` positions are part of it, as far as it goes: `visual` ``[B, tokens]`` or none."""
        if begin < self.begin or begin >= self.end:
            return False
        expected = self.visual[:, begin - self.begin :][:, :tokens].repeat_interleave(self.repeats, 0)
        if visual is None:
            return not bool(expected.any())
        return visual.shape[0] == expected.shape[0] and torch.equal(visual[:, : expected.shape[1]], expected)

    def counts(self, begin: int | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Visual tokens and others of each row from position `begin` on."""
        start = 0 if begin is None else begin - self.begin
        visual, visible = (flags[:, start:] for flags in (self.visual, self.visible))
        found = [(visual & visible).sum(1), (visible & ~visual).sum(1)]
        first, second = (tuple(counts.repeat_interleave(self.repeats).tolist()) for counts in found)
        return first, second


class SealPlan:
    """How the pending positions ``begin : end`` divide into visual, text and padding; the same for all layers."""

    def __init__(self, visual: Tensor, visible: Tensor, begin: int, end: int, dropped: Tensor | None = None) -> None:
        if dropped is not None:
            # Handled as padding is: stored nowhere, and its queries weigh nothing.
            visual, visible = visual & ~dropped, visible & ~dropped
        self.visual = visual  # bool [B, P], padding excluded
        self.visible = visible  # bool [B, P]
        self.dropped = dropped  # bool [B, P], visual tokens that are to be left out; None: none
        self.prompt_end = end  # later positions hold guesses at the answer
        self.begin = begin
        self.end = end
        self.counts: list[int] = visual.sum(1).tolist()
        self.all_visible = bool(visible.all())
        self._memo: dict[object, object] = {}

    def visible_tail(self, window: int, device: torch.device) -> Tensor | None:
        """bool ``[B, window]`` for the last positions; None if none of them is padding."""
        return None if self.all_visible else self.visible[:, -window:].to(device)

    def keeping(self, kept: Tensor | None) -> "SealPlan":
        """The plan of a layer that keeps of the visual tokens those of bool ``[B, P]``; one object for one `kept`."""
        if kept is None:
            return self
        key = ("keeping", kept)
        if key not in self._memo:
            dropped = self.visual & ~kept.to(self.visual.device)
            self._memo[key] = SealPlan(self.visual, self.visible, self.begin, self.end, dropped)
        plan = self._memo[key]
        assert isinstance(plan, SealPlan)
        return plan

    def sparing(self, exact: int) -> "SealPlan":
        """The plan that leaves the last `exact` visual tokens of each row as they are."""
        if not exact:
            return self
        if ("sparing", exact) not in self._memo:
            from_end = self.visual.flip(1).cumsum(1).flip(1)  # 1 for the last visual token
            visual = self.visual & (from_end > exact)
            self._memo["sparing", exact] = SealPlan(visual, self.visible, self.begin, self.end)
        return self._memo["sparing", exact]  # type: ignore[return-value]

    def queries_behind_visual(self, *, last_only: bool = False) -> Tensor:
        """bool ``[B, P]``: text behind a row's last visual token, or only the last of it; nothing in rows of text.

        Guesses of assisted decoding, which come with the prompt, are not looked at, unless the prompt ends in an image.
        """
        places = torch.arange(1, self.visual.shape[1] + 1, device=self.visual.device)
        last_visual = (self.visual * places).amax(1, keepdim=True)
        behind = self.visible & (places > last_visual) & (last_visual > 0)
        prompt = behind & (places <= self.prompt_end - self.begin)
        behind = torch.where(prompt.any(1, keepdim=True), prompt, behind)
        return behind & (places == (behind * places).amax(1, keepdim=True)) if last_only else behind

    def rows(self) -> "tuple[SealPlan, ...]":
        """A plan for each batch row with visual tokens."""
        if "rows" not in self._memo:
            index = torch.arange(len(self.counts), device=self.visual.device)[:, None]
            self._memo["rows"] = tuple(
                SealPlan(self.visual & (index == row), self.visible, self.begin, self.end)
                for row, count in enumerate(self.counts)
                if count
            )
        return self._memo["rows"]  # type: ignore[return-value]

    def layout(self, rows: tuple[int, ...], device: torch.device) -> RowLayout:
        """The layout of a segment that holds the visual tokens of batch rows `rows`."""
        key = ("layout", rows, device)
        if key not in self._memo:
            self._memo[key] = self._layout(rows, device)
        layout = self._memo[key]
        assert isinstance(layout, RowLayout)
        return layout

    def _layout(self, rows: tuple[int, ...], device: torch.device) -> RowLayout:
        batch = len(self.counts)
        chosen = torch.zeros(batch, 1, dtype=torch.bool)
        chosen[list(rows)] = True
        token_rows, token_columns = (self.visual & chosen.to(self.visual.device)).nonzero(as_tuple=True)
        starts, lengths, basis_rows = [0] * batch, [0] * batch, [0] * batch
        ranges = []
        offset = 0
        for basis_row, row in enumerate(rows):
            starts[row], lengths[row], basis_rows[row] = offset, self.counts[row], basis_row
            ranges.append((offset, self.counts[row]))
            offset += self.counts[row]
        return RowLayout(
            token_rows=token_rows.to(device),
            token_columns=token_columns.to(device),
            positions=(token_columns + self.begin).int().to(device),
            starts=torch.tensor(starts, dtype=torch.int64, device=device),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
            basis_rows=torch.tensor(basis_rows, dtype=torch.int64, device=device),
            storage_ranges=tuple(ranges),
            max_length=max(lengths),
            uniform=len(set(lengths)) == 1,
        )

    def text_alignment(
        self,
        compressed: "tuple[tuple[SealPlan, tuple[int, ...]], ...]",
        previous: Alignment | None,
        columns: int,
        device: torch.device,
    ) -> tuple[Tensor, Alignment]:
        """Where the text goes: `columns` old columns laid out as `previous`, then the pending ones that stay dense.

        `compressed` are the plans of which segments were made, this one or those of its rows, and the batch rows of
        each; visual tokens of other rows stay dense. Returns what `align_right` does, over the concatenation of old and
        pending columns.
        """
        key = ("text", compressed, previous, columns, device)
        if key not in self._memo:
            keep = self.visible.clone()
            for part, rows in compressed:
                chosen = torch.zeros(len(self.counts), 1, dtype=torch.bool)
                chosen[list(rows)] = True
                keep &= ~(part.visual & chosen.to(part.visual.device))
            keep = keep.to(device)
            batch = keep.shape[0]
            positions = (torch.arange(keep.shape[1], device=device) + self.begin).expand(batch, -1)
            if columns:
                old_positions = column_positions(previous, columns, batch, device)
                keep = torch.cat([own_columns(previous, columns, batch, device), keep], 1)
                positions = torch.cat([old_positions, positions], 1)
            self._memo[key] = align_right(keep, positions, self.end)
        return self._memo[key]  # type: ignore[return-value]
