"""What the layers of one cache share: which logical positions are visual, and the index tensors that follow from it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rotatek_cache.cache.seal_plan import Coming, SealPlan
from rotatek_cache.core.row_layout import Alignment


class VisualLedger:
    """The visual positions announced so far, and what has been derived from them in this forward."""

    def __init__(self, visual_mask: Tensor | None = None) -> None:
        if visual_mask is not None:
            check_visual_mask(visual_mask)
        self.given = visual_mask
        self.reset()

    def reset(self) -> None:
        """Forget everything but the mask given at construction."""
        self.flags: list[tuple[int, int, Tensor | None]] = []  # (begin, end, bool [B, end - begin] or None: no visual)
        self.dropped: list[tuple[int, int, Tensor]] = []  # as flags: visual tokens left out before the language model
        self.visible: Tensor | None = None  # bool [B, T]; None while nothing is known to be padding
        self.prompt: Tensor | None = None  # ids [B, n] of the first forward, where they are known
        self.coming: Coming | None = None  # the whole of a prompt that is being read, where it is known
        self.prompt_end: int | None = None  # where guesses at the answer begin in a forward that brings some
        self.sealed = 0  # positions before it went through a seal, which drops padding
        self.end_forward()

    def end_forward(self) -> None:
        """Drop what was derived for the layers of one forward."""
        self._plan: tuple[tuple[int, int], SealPlan | None] | None = None
        self._mask: Tensor | None = None
        self._gathered: dict[object, tuple[object, Tensor]] = {}
        self._text_rows: tuple[tuple[object, ...], tuple[Tensor, Tensor]] | None = None

    @property
    def end(self) -> int:
        """First position that nothing is known of."""
        return self.flags[-1][1] if self.flags else 0

    @property
    def expected(self) -> Coming | None:
        """The whole of a prompt that is being read, where it is known."""
        return self.coming

    def expect(self, prompt: Coming | None) -> None:
        """Learn the whole of a prompt that is about to be read; None: nothing is expected any more."""
        self.coming = prompt

    def begin_prompt(self, ids: Tensor | None) -> None:
        """Keep the ids ``[B, n]`` of the first forward, where they are known."""
        self.prompt = ids

    def set_prompt_end(self, length: int) -> None:
        """Learn where guesses at the answer begin in a forward that brings some."""
        self.prompt_end = length

    @property
    def informed(self) -> bool:
        """Whether anybody said which positions are visual."""
        return self.given is not None or bool(self.flags)

    @property
    def reach(self) -> int:
        """Positions that the given mask covers."""
        return 0 if self.given is None else self.given.shape[1]

    def given_flags(self, begin: int, end: int, batch: int) -> Tensor:
        """What the given mask says of ``begin : end`` for `batch` rows: bool ``[batch, end - begin]``."""
        assert self.given is not None
        rows = self.given.shape[0]
        if batch % rows:
            raise ValueError(
                f"visual_mask has {rows} rows, the batch has {batch}: expected as many, or a divisor where "
                "generate repeats each row (num_beams, num_return_sequences)"
            )
        flags = self.given[:, begin:end].repeat_interleave(batch // rows, 0)
        return torch.nn.functional.pad(flags, (0, end - begin - flags.shape[1]))

    def announce(self, begin: int, end: int, visual: Tensor | None) -> None:
        """Learn which of the positions ``begin : end`` are visual: bool ``[B, end - begin]``, None for none."""
        if visual is not None:
            if visual.dtype != torch.bool or visual.ndim != 2 or visual.shape[1] != end - begin:
                raise ValueError(
                    f"visual must be a bool tensor [rows, {end - begin}], got {visual.dtype} {list(visual.shape)}"
                )
            if not bool(visual.any()):
                visual = None
        self.truncate(begin)
        if visual is None and self.flags and self.flags[-1][2] is None and self.flags[-1][1] == begin:
            begin, _, _ = self.flags.pop()  # or every decoded token would lengthen the list
        self.flags.append((begin, end, visual))

    def drop(self, kept: Tensor) -> None:
        """Learn which visual tokens of the positions announced last stay: bool ``[n]``, row after row."""
        begin, end, visual = self.flags[-1]
        if visual is None or int(visual.sum()) != len(kept):
            found = 0 if visual is None else int(visual.sum())
            raise ValueError(f"{len(kept)} image features were chosen from, but the prompt has {found} visual tokens")
        dropped = torch.zeros_like(visual)
        dropped[visual] = ~kept.to(visual.device)
        self.dropped = [entry for entry in self.dropped if entry[0] < begin]
        self.dropped.append((begin, end, dropped))

    @property
    def undecided(self) -> bool:
        """Whether visual tokens were announced last of which nobody said which ones stay."""
        if not self.flags or self.flags[-1][2] is None:
            return False
        return not self.dropped or self.dropped[-1][:2] != self.flags[-1][:2]

    def dropped_of(self, begin: int, end: int) -> Tensor | None:
        """bool ``[B, end - begin]``: which of the positions were dropped before the language model; None: none."""
        return _overlaid([entry for entry in self.dropped if entry[0] < end and entry[1] > begin], begin, end)

    def complete(self, end: int, batch: int) -> None:
        """Fill in positions up to `end` that nobody announced, from the given mask (text beyond it)."""
        begin = self.end
        if begin >= end:
            return
        if begin == 0 and 0 < self.reach < end:
            raise ValueError(f"visual_mask must cover the prompt: it has {self.reach} positions, the prompt {end}")
        self.announce(begin, end, self.given_flags(begin, end, batch) if begin < self.reach else None)

    def has_visual(self, begin: int, end: int) -> bool:
        """Whether any of the positions is visual in any row."""
        return any(visual is not None for first, last, visual in self.flags if first < end and last > begin)

    def plan(self, begin: int, end: int, mask: Tensor | None, *, wait: bool = True) -> SealPlan | None:
        """The seal of the positions ``begin : end``, or None while an image may go on (never if not to `wait`).

        Complete means that every row with visual tokens has text after its last one. A position that no query has
        seen so far is padding, and is dropped.

        Args:
            begin, end: the pending positions.
            mask: the mask of the current forward, bool ``[B or 1, 1, Q, end]`` or additive.
        """
        if self._plan is None or self._plan[0] != (begin, end):
            self._plan = ((begin, end), self._make_plan(begin, end, mask, wait))
        return self._plan[1]

    @property
    def known_plan(self) -> SealPlan | None:
        """The seal that a layer of this forward has asked for already, if any."""
        return None if self._plan is None else self._plan[1]

    def _make_plan(self, begin: int, end: int, mask: Tensor | None, wait: bool) -> SealPlan | None:
        visual = self._flags_of(begin, end)
        if mask is not None:
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            seen = seen[:, 0].any(1).to(visual.device).expand(visual.shape[0], -1)
            if self.visible is not None:
                seen = torch.cat([seen[:, : self.visible.shape[1]] | self.visible, seen[:, self.visible.shape[1] :]], 1)
            self.visible = seen
        visible = torch.ones_like(visual) if self.visible is None else self.visible[:, begin:end]
        if visible.shape[1] < visual.shape[1]:
            # Later forwards without a mask see everything.
            visible = torch.nn.functional.pad(visible, (0, visual.shape[1] - visible.shape[1]), value=True)
        visual = visual & visible
        positions = torch.arange(1, end - begin + 1, device=visual.device)
        last_visual = (visual * positions).amax(1)
        last_text = ((visible & ~visual) * positions).amax(1)
        if wait and not bool(((last_visual == 0) | (last_text > last_visual)).all()):
            return None
        self.sealed = end
        plan = SealPlan(visual, visible, begin, end, self.dropped_of(begin, end))
        plan.prompt_end = end if self.prompt_end is None else self.prompt_end
        return plan

    def _flags_of(self, begin: int, end: int) -> Tensor:
        flags = _overlaid([(b, e, visual) for b, e, visual in self.flags if visual is not None], begin, end)
        if flags is None:
            raise RuntimeError("no visual position has been announced")  # pending exists for visual positions only
        return flags

    def gather_mask(self, mask: Tensor, key: object, positions: Callable[[], Tensor]) -> Tensor:
        """Columns of the model's mask for a segment: ``[B, Q, n]`` at logical `positions()` ``[B, n]``.

        All layers of a forward share mask and, mostly, layout: what was gathered is kept for the mask at hand under
        `key`, which is held as well, so that its identity stays its own.
        """
        if self._mask is not mask:
            self._check_dropped(mask)
            self._mask, self._gathered = mask, {}
        if key not in self._gathered:
            # Entries past a row's tokens may point at positions that a crop has removed.
            columns = positions().to(mask.device).clamp(max=mask.shape[-1] - 1)
            queries = mask.shape[2]
            rows = mask[:, 0].expand(columns.shape[0], -1, -1)
            self._gathered[key] = (key, rows.gather(2, columns[:, None].expand(-1, queries, -1)))
        return self._gathered[key][1]

    def text_rows(self, alignment: Alignment | None, buffer: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """First token and number of tokens ``[B]`` of each row in a text `buffer` ``[H, B, capacity, D]``.

        Layers that lie alike share them: on a GPU every index tensor of a decode step is a launch.
        """
        _, batch, capacity, _ = buffer.shape
        key = (alignment, batch, capacity, length, buffer.device)
        if self._text_rows is None or self._text_rows[0] != key:
            starts = torch.arange(0, batch * capacity, capacity, device=buffer.device)
            lengths = torch.full((batch,), length, dtype=torch.int32, device=buffer.device)
            if alignment is not None and alignment.first is not None:
                starts, lengths = starts + alignment.first, lengths - alignment.first.int()
            self._text_rows = key, (starts, lengths)
        return self._text_rows[1]

    def _check_dropped(self, mask: Tensor) -> None:
        """Raise if a query sees a position that was dropped at a seal because no query of its prompt had seen it."""
        if self.visible is None or (mask.is_cuda and mask.shape[2] == 1):
            return  # reading the mask of every decode step would make the host wait for the GPU
        known = min(self.visible.shape[1], self.sealed)
        seen = (
            mask[:, 0, :, :known]
            if mask.dtype == torch.bool
            else mask[:, 0, :, :known] > torch.finfo(mask.dtype).min / 2
        )
        if bool((seen.any(1) & ~self.visible[:, :known].to(mask.device)).any()):
            raise ValueError(
                "attention_mask shows positions that it hid from the whole prompt: a RotateKCache drops such as padding"
            )

    def truncate(self, length: int) -> None:
        """Forget positions from `length` on."""
        self.sealed = min(self.sealed, length)
        self.end_forward()
        kept: list[tuple[int, int, Tensor | None]] = []
        for begin, end, visual in self.flags:
            if begin < length:
                shortened = None if visual is None else visual[:, : length - begin]
                kept.append((begin, min(end, length), shortened))
        self.flags = kept
        self.dropped = [(b, min(e, length), d[:, : length - b]) for b, e, d in self.dropped if b < length]
        if length == 0:
            self.visible = self.prompt = None
        if self.visible is not None:
            self.visible = self.visible[:, :length]
        if self.prompt is not None:
            self.prompt = self.prompt[:, :length]

    def select_rows(self, index: Tensor) -> None:
        """Let batch row b be what row ``index[b]`` was."""
        self.end_forward()
        self.flags = [(b, e, None if v is None else v[index.to(v.device)]) for b, e, v in self.flags]
        self.dropped = [(b, e, d[index.to(d.device)]) for b, e, d in self.dropped]
        self.visible = None if self.visible is None else self.visible[index.to(self.visible.device)]
        self.prompt = None if self.prompt is None else self.prompt[index.to(self.prompt.device)]

    def tensors(self) -> list[Tensor]:
        """Everything held beyond the current forward."""
        known = [entry[2] for entry in (*self.flags, *self.dropped)] + [self.visible, self.given, self.prompt]
        return [tensor for tensor in known if tensor is not None]

    def __deepcopy__(self, memo: dict) -> "VisualLedger":
        copy = VisualLedger(self.given)
        copy.flags, copy.visible, copy.prompt, copy.sealed = list(self.flags), self.visible, self.prompt, self.sealed
        copy.dropped, copy.prompt_end, copy.coming = list(self.dropped), self.prompt_end, self.coming
        return copy


def _overlaid(entries: Sequence[tuple[int, int, Tensor]], begin: int, end: int) -> Tensor | None:
    """bool ``[B, end - begin]`` of flags that are known for ranges of positions, False elsewhere; None if none is."""
    if not entries:
        return None
    batch, device = entries[0][2].shape[0], entries[0][2].device
    flags = torch.zeros(batch, end - begin, dtype=torch.bool, device=device)
    for first, last, known in entries:
        if first < end and last > begin:
            low, high = max(first, begin), min(last, end)
            flags[:, low - begin : high - begin] = known[:, low - first : high - first].to(device)
    return flags


def check_visual_mask(mask: Tensor) -> None:
    """Raise unless `mask` is a bool tensor ``[rows, positions]``."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"visual_mask must be a bool tensor [rows, positions], got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"visual_mask must have dtype torch.bool, got {mask.dtype}")
    if mask.ndim != 2:
        raise ValueError(f"visual_mask must have shape [rows, positions], got {list(mask.shape)}")
