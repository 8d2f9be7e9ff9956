"""The prompt that is about to be read, as far as it is known before its forwards."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ExpectedPrompt:
    """A prompt that is about to be read, perhaps in parts.

    Attributes:
        begin: its first logical position.
        visual, visible: bool ``[B, n]``.
        repeats: how often generate is going to repeat each row (beams, several answers).
        padding_known: whether `visible` says all that the masks of its forwards hide of it.
    """

    begin: int
    visual: Tensor
    visible: Tensor
    repeats: int = 1
    padding_known: bool = False

    @property
    def rows(self) -> int:
        """Rows of the batch that reads it."""
        return self.visual.shape[0] * self.repeats

    @property
    def end(self) -> int:
        """The first position behind it."""
        return self.begin + self.visual.shape[1]

    def agrees(self, begin: int, visual: Tensor | None, tokens: int) -> bool:
        """Return whether the next `tokens` positions belong to it; `visual` ``[B, tokens]`` flags them (None: text)."""
        if begin < self.begin or begin >= self.end:
            return False
        expected = self.visual[:, begin - self.begin :][:, :tokens].repeat_interleave(self.repeats, 0)
        if visual is None:
            return not bool(expected.any())
        return visual.shape[0] == expected.shape[0] and torch.equal(visual[:, : expected.shape[1]], expected)

    def shown(self, end: int) -> Tensor:
        """Return bool ``[B, end]``, False for padding among all positions up to `end`; those before it are shown."""
        visible = self.visible[:, : end - self.begin].repeat_interleave(self.repeats, 0)
        return torch.nn.functional.pad(visible, (self.begin, 0), value=True)

    def counts(self, begin: int | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Count the visual tokens and the others of each row from position `begin` on."""
        start = 0 if begin is None else begin - self.begin
        visual, visible = (flags[:, start:] for flags in (self.visual, self.visible))
        found = [(visual & visible).sum(1), (visible & ~visual).sum(1)]
        first, second = (tuple(counts.repeat_interleave(self.repeats).tolist()) for counts in found)
        return first, second
