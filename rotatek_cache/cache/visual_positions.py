"""Which logical positions of a cache are visual, padding or dropped, and the seal that follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rotatek_cache.cache.expected_prompt import ExpectedPrompt
from rotatek_cache.cache.seal_plan import SealPlan
from rotatek_cache.cache.token_counts import TokenCounts
from rotatek_cache.core.forward_tables import ForwardTables

PROMPT_ID = torch.int64  # dtype of the ids of a prompt


@dataclass
class Flags:
    """What is known of each position and row, on the host: it decides on shapes, and a GPU is not asked for it.

    Attributes:
        visual: (begin, end, bool ``[B, end - begin]``, or None where none is visual) of what was announced, in order.
        dropped: the same of visual tokens that were left out before the language model.
        visible: bool ``[B, T]``; None while nothing is known to be padding.
    """

    visual: list[tuple[int, int, Tensor | None]] = field(default_factory=list)
    dropped: list[tuple[int, int, Tensor]] = field(default_factory=list)
    visible: Tensor | None = None

    def select_rows(self, index: Tensor) -> "Flags":
        """Return the flags in which row b is what row ``index[b]`` was."""
        visual = [(begin, end, None if known is None else known[index]) for begin, end, known in self.visual]
        dropped = [(begin, end, known[index]) for begin, end, known in self.dropped]
        return Flags(visual, dropped, None if self.visible is None else self.visible[index])


class VisualPositions:
    """The visual positions announced so far, shared by the layers of one cache.

    The hooks of a host tell it what comes (`expect`, `begin_prompt`, `set_prompt_end`, `announce`, `learn_padding`,
    `drop`); layers and coordinator ask.

    Attributes:
        given: the mask given at construction, which wins where it reaches.
        prompt: ids ``[B, n]`` of the first forward, where they are known.
        forward: what the layers of the current forward share.
    """

    def __init__(self, visual_mask: Tensor | None = None) -> None:
        if visual_mask is not None:
            check_visual_mask(visual_mask)
        self.given = None if visual_mask is None else visual_mask.cpu()
        self.reset()

    def reset(self) -> None:
        """Forget everything but the mask given at construction."""
        self._known = Flags()
        self._order: Tensor | None = None  # rows of `_known` that the rows are now, selected on a device
        self.prompt: Tensor | None = None
        self.forward = ForwardTables()
        self._expected: ExpectedPrompt | None = None
        self._prompt_end: int | None = None
        self._sealed = 0  # positions before it went through a seal, which drops padding
        self.end_forward()

    def end_forward(self) -> None:
        """Drop what was derived for the layers of one forward."""
        self._plan: tuple[tuple[int, int], SealPlan | None] | None = None
        self._looked: tuple[tuple[int, int], Tensor | None] | None = None
        self._nothing: TokenCounts | None = None
        self._own_first: tuple[Tensor, Tensor] | None = None  # positions that are no padding, then the others
        self._checked: Tensor | None = None
        self._shown: tuple[Tensor | None] | None = None  # what `learn_padding` was told
        self.forward.clear()

    def _settled(self) -> Flags:
        """Return the flags of the rows as they are now; waits for a device that rows were selected on, once."""
        if self._order is not None:
            self._known, self._order = self._known.select_rows(self._order.cpu()), None
        return self._known

    @property
    def flags(self) -> list[tuple[int, int, Tensor | None]]:
        """Positions that are visual, see `Flags.visual`."""
        return self._settled().visual

    @property
    def dropped(self) -> list[tuple[int, int, Tensor]]:
        """Positions dropped before the language model, see `Flags.dropped`."""
        return self._settled().dropped

    @property
    def visible(self) -> Tensor | None:
        """Positions that are no padding, see `Flags.visible`."""
        return self._settled().visible

    @property
    def expected(self) -> ExpectedPrompt | None:
        """The whole of a prompt that is being read, where it is known."""
        return self._expected

    def expect(self, prompt: ExpectedPrompt | None) -> None:
        """Learn the whole of the prompt that comes next; None: it has been read, or came to nothing."""
        self._expected = prompt

    def begin_prompt(self, ids: Tensor | None) -> None:
        """Learn the ids ``[B, n]`` of the first forward, by which another prompt is told from this one."""
        self.prompt = ids

    def set_prompt_end(self, length: int) -> None:
        """Learn that positions from `length` on hold guesses at the answer, which come with the prompt."""
        self._prompt_end = length

    @staticmethod
    def bytes_per_position(*, tokens_dropped: bool) -> int:
        """Count the bytes held of each position of a row: flags, the prompt's ids, and which tokens were dropped."""
        flags = 3 if tokens_dropped else 2  # visual, visible, dropped
        return flags * torch.bool.itemsize + PROMPT_ID.itemsize

    @property
    def end(self) -> int:
        """First position that nothing is known of."""
        return self._known.visual[-1][1] if self._known.visual else 0

    @property
    def informed(self) -> bool:
        """Whether it is known which positions are visual."""
        return self.given is not None or bool(self._known.visual)

    @property
    def unsealed(self) -> bool:
        """Whether visual positions wait for their seal."""
        return self.has_visual(self._sealed, self.end)

    @property
    def reach(self) -> int:
        """Positions that the given mask covers."""
        return 0 if self.given is None else self.given.shape[1]

    def given_flags(self, begin: int, end: int, batch: int) -> Tensor:
        """Read positions ``begin : end`` of `batch` rows off the given mask: bool ``[batch, end - begin]``."""
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
        """Learn which of the positions ``begin : end`` are visual: bool ``[B, end - begin]``, None for none.

        They are read here, before the forward has given a GPU anything that could be waited for.
        """
        if visual is not None:
            if visual.dtype != torch.bool or visual.ndim != 2 or visual.shape[1] != end - begin:
                raise ValueError(
                    f"visual must be a bool tensor [rows, {end - begin}], got {visual.dtype} {list(visual.shape)}"
                )
            visual = visual.cpu()
            if not bool(visual.any()):
                visual = None
        self.truncate(begin)
        known = (self._known if visual is None else self._settled()).visual
        if visual is None and known and known[-1][2] is None and known[-1][1] == begin:
            begin, _, _ = known.pop()  # or every decoded token would lengthen the list
        known.append((begin, end, visual))

    def learn_padding(self, seen: Tensor | None) -> None:
        """Learn the padding that the masks of the forward to come hide, so that none of them has to be read.

        Args:
            seen: bool ``[B, end]``, False for padding; None if nothing is.
        """
        self._shown = (None if seen is None else seen.cpu(),)
        if seen is not None:
            self._check_seen(self._shown[0])

    def drop(self, kept: Tensor) -> None:
        """Learn which visual tokens of the positions announced last stay: bool ``[n]``, row after row."""
        begin, end, visual = self.flags[-1]
        if visual is None or int(visual.sum()) != len(kept):
            found = 0 if visual is None else int(visual.sum())
            raise ValueError(f"{len(kept)} image features were chosen from, but the prompt has {found} visual tokens")
        dropped = torch.zeros_like(visual)
        dropped[visual] = ~kept.to(visual.device)
        known = self._settled()
        known.dropped = [entry for entry in known.dropped if entry[0] < begin]
        known.dropped.append((begin, end, dropped))

    @property
    def undecided(self) -> bool:
        """Whether visual tokens were announced last for which no `drop` has come."""
        visual, dropped = self._known.visual, self._known.dropped
        if not visual or visual[-1][2] is None:
            return False
        return not dropped or dropped[-1][:2] != visual[-1][:2]

    def dropped_of(self, begin: int, end: int) -> Tensor | None:
        """Return bool ``[B, end - begin]``: positions dropped before the language model; None: none."""
        return _overlaid([entry for entry in self.dropped if entry[0] < end and entry[1] > begin], begin, end)

    def complete(self, end: int, batch: int) -> None:
        """Fill in positions up to `end` that were not announced, from the given mask (text beyond it)."""
        begin = self.end
        if begin >= end:
            return
        if begin == 0 and 0 < self.reach < end:
            raise ValueError(f"visual_mask must cover the prompt: it has {self.reach} positions, the prompt {end}")
        self.announce(begin, end, self.given_flags(begin, end, batch) if begin < self.reach else None)

    def has_visual(self, begin: int, end: int) -> bool:
        """Return whether any of the positions is visual in any row."""
        return any(visual is not None for first, last, visual in self._known.visual if first < end and last > begin)

    def rows_with_visual(self, begin: int, end: int) -> Tensor | None:
        """Return bool ``[B]``: rows with visual tokens among the positions; None if there are none."""
        visual = self.visual(begin, end)
        return None if visual is None else visual.any(1)

    def visual(self, begin: int, end: int) -> Tensor | None:
        """Return bool ``[B, end - begin]``: which of the positions are visual; None if none is."""
        return self._flags_of(begin, end) if self.has_visual(begin, end) else None

    def rows_cut_at(self, position: int) -> Tensor:
        """Return bool ``[B]``: rows with visual tokens on both sides of a position."""
        return self._flags_of(max(0, position - 1), position + 1).all(1) & (position > 0)

    def plan(self, begin: int, end: int, mask: Tensor | None, *, wait: bool = True) -> SealPlan | None:
        """Return the seal of the positions ``begin : end``; None while an image may go on (never if not to `wait`).

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
        visual, known = self._flags_of(begin, end), self._settled()
        seen = self._seen(mask, end)
        if seen is not None:
            seen = seen.expand(visual.shape[0], -1)
            if known.visible is not None:
                reach = known.visible.shape[1]
                seen = torch.cat([seen[:, :reach] | known.visible, seen[:, reach:]], 1)
            known.visible = seen
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
        self._sealed = end
        return SealPlan(visual, visible, begin, end, self.dropped_of(begin, end), self._prompt_end)

    def _seen(self, mask: Tensor | None, end: int) -> Tensor | None:
        """Return bool ``[B or 1, end]``: positions that are no padding in this forward; None if that is nothing new."""
        if mask is None:
            return None
        if self._shown is None:
            return seen_by_mask(mask[:, 0]).any(1).cpu()
        if self._shown[0] is None and self.visible is not None:
            return torch.ones(1, end, dtype=torch.bool, device="cpu")
        return self._shown[0]

    def counts_of_nothing(self, batch: int, device: torch.device) -> TokenCounts:
        """Return the counts of an empty cache of `batch` rows, the same for the layers of a forward."""
        if self._nothing is None or len(self._nothing.rows) != batch or self._nothing.device != device:
            self._nothing = TokenCounts((0,) * batch, device)
        return self._nothing

    def see(self, begin: int, end: int, batch: int, mask: Tensor | None) -> Tensor | None:
        """Learn which of the positions ``begin : end`` are padding, and return the others: bool ``[B, end - begin]``.

        The same for the layers of a forward; None if none of them is padding.

        Args:
            begin, end: the positions of the current forward.
            batch: rows.
            mask: its mask, bool ``[B or 1, 1, Q, end]`` or additive: what no query sees is padding. None hides nothing.
        """
        if self._looked is None or self._looked[0] != (begin, end):
            self._looked = ((begin, end), self._look(begin, end, batch, mask))
        return self._looked[1]

    def _look(self, begin: int, end: int, batch: int, mask: Tensor | None) -> Tensor | None:
        seen = self._seen(mask, end)
        if seen is None:
            return None
        seen = seen[:, begin:end].expand(batch, -1)
        self._sealed = end
        if bool(seen.all()):
            return None
        before = seen.new_ones(batch, begin)
        known = self._settled()
        if known.visible is not None:
            before[:, : known.visible.shape[1]] = known.visible[:, :begin]
        known.visible = torch.cat([before, seen], 1)
        return seen

    def places_of(self, tokens: Tensor) -> Tensor:
        """Find the logical positions of tokens ``[B, n]`` that are counted without their row's padding."""
        if self.visible is None:
            return tokens
        if self._own_first is None or self._own_first[0] is not self.visible:
            # A stable sort of the flags moves a row's own positions to the front, in their order.
            self._own_first = self.visible, (~self.visible).int().argsort(dim=1, stable=True)
        order, known = self._own_first[1].to(tokens.device), self.visible.shape[1]
        own = self.visible.sum(1, keepdim=True).to(tokens.device)
        return torch.where(tokens < own, order.gather(1, tokens.clamp(max=known - 1)), known + tokens - own)

    def shows_own(self, mask: Tensor) -> bool:
        """Say whether bool `mask` ``[B, T]`` shows all positions that are not padding. Waits for the device."""
        if self.visible is None:
            return bool(mask.all())
        known = self.visible.to(mask.device)[:, : mask.shape[1]]
        own = torch.nn.functional.pad(known, (0, mask.shape[1] - known.shape[1]), value=True)
        return bool((mask | ~own).all())

    def own_before(self, length: int, batch: int) -> tuple[int, ...]:
        """Count the positions before `length` that are not padding, of each of `batch` rows."""
        if self.visible is None:
            return (length,) * batch
        known = self.visible[:, :length]
        return tuple((known.sum(1) + (length - known.shape[1])).tolist())

    def _flags_of(self, begin: int, end: int) -> Tensor:
        flags = _overlaid([(b, e, visual) for b, e, visual in self.flags if visual is not None], begin, end)
        if flags is None:
            raise RuntimeError("no visual position has been announced")  # pending exists for visual positions only
        return flags

    def check_mask(self, mask: Tensor) -> None:
        """Raise if a query sees a position that was dropped at a seal because no query of its prompt had seen it."""
        if self._checked is mask:
            return
        self._checked = mask
        if self._known.visible is None or (mask.is_cuda and mask.shape[2] == 1):
            return  # reading the mask of every decode step would make the host wait for the GPU
        if self._shown is None or self._shown[0] is None:
            self._check_seen(seen_by_mask(mask[:, 0, :, : self._sealed]).any(1).cpu())

    def _check_seen(self, seen: Tensor | None) -> None:
        """Raise if bool ``[B or 1, T]`` shows a position that was dropped at a seal."""
        visible = self.visible
        if visible is None or seen is None:
            return
        known = min(visible.shape[1], self._sealed)
        if bool((seen[:, :known] & ~visible[:, :known]).any()):
            raise ValueError(
                "attention_mask shows positions that it hid from the whole prompt: a RotateKCache drops such as padding"
            )

    def truncate(self, length: int) -> None:
        """Forget positions from `length` on."""
        self._sealed = min(self._sealed, length)
        self.end_forward()
        known, kept = self._known, []  # whatever the rows are now
        for begin, end, visual in known.visual:
            if begin < length:
                shortened = None if visual is None else visual[:, : length - begin]
                kept.append((begin, min(end, length), shortened))
        known.visual = kept
        known.dropped = [(b, min(e, length), d[:, : length - b]) for b, e, d in known.dropped if b < length]
        if length == 0:
            known.visible = self.prompt = None
        if known.visible is not None:
            known.visible = known.visible[:, :length]
        if self.prompt is not None:
            self.prompt = self.prompt[:, :length]

    def select_rows(self, index: Tensor) -> None:
        """Let batch row b be what row ``index[b]`` was."""
        self.end_forward()
        # Read when the flags are: beams select rows in every step.
        self._order = index if self._order is None else self._order[index.to(self._order.device)]
        self.prompt = None if self.prompt is None else self.prompt[index.to(self.prompt.device)]

    def tensors(self) -> list[Tensor]:
        """List everything held beyond the current forward."""
        known = [entry[2] for entry in (*self.flags, *self.dropped)] + [self.visible, self.given, self.prompt]
        return [tensor for tensor in known if tensor is not None]

    def __deepcopy__(self, memo: dict) -> "VisualPositions":
        copy = VisualPositions(self.given)
        copy._known = Flags(list(self.flags), list(self.dropped), self.visible)
        copy.prompt, copy._sealed = self.prompt, self._sealed
        copy._expected, copy._prompt_end = self._expected, self._prompt_end
        return copy


def seen_by_mask(mask: Tensor) -> Tensor:
    """Convert a mask, bool or additive, to bool: True where a query sees a token."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _overlaid(entries: Sequence[tuple[int, int, Tensor]], begin: int, end: int) -> Tensor | None:
    """Return bool ``[B, end - begin]`` of flags known for ranges of positions, False elsewhere; None if none is."""
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
