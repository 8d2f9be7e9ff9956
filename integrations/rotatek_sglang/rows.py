"""Which row of which pool a slot's token is stored in: the one place where rows and bases are given out and returned.

SGLang counts in *slots*, one per token, whatever is stored for it. Behind a slot lies a row of one of two pools: text
rows hold dense Keys and Values, visual rows hold coefficients. A slot's entry in the table is signed: text row t is
``t`` (from 1 on: row 0 takes what padding writes), visual row v is ``-1 - v``, and 0 is nothing.

Rows follow their slots. A basis belongs to the visual rows that were encoded with it and is given back with the last of
them, so that requests which share a prefix share its rows and its basis.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class OutOfRowsError(RuntimeError):
    """More rows or bases were asked for than are free, which admission is there to prevent."""


class FreeRows:
    """A stack of free row numbers; how many there are is known on the host."""

    def __init__(self, first: int, count: int, what: str, device: torch.device | str) -> None:
        self.first = first
        self.total = count
        self.what = what
        self.stack = torch.arange(first + count - 1, first - 1, -1, dtype=torch.int32, device=device)
        self.free = count

    @property
    def used(self) -> int:
        """How many are not free."""
        return self.total - self.free

    def take(self, count: int) -> Tensor:
        """int32 ``[count]`` rows."""
        if count > self.free:
            raise OutOfRowsError(f"{count} {self.what} asked for, {self.free} of {self.total} are free")
        self.free -= count
        return self.stack[self.free : self.free + count].flip(0)  # from a fresh stack: ascending

    def give(self, rows: Tensor) -> None:
        """Take rows back."""
        count = len(rows)
        if self.free + count > self.total:
            raise RuntimeError(f"{count} {self.what} returned, but only {self.used} were in use")
        self.stack[self.free : self.free + count] = rows
        self.free += count


@dataclass(frozen=True)
class Segment:
    """Visual tokens of a request that share a basis: `count` of them from visual token `first` on."""

    basis: int
    first: int
    count: int


class SlotTable:
    """The table slot -> row, with the free rows of both pools and the free bases.

    Attributes:
        rows: int32 ``[slots]``, the signed row of each slot.
        text, visual, bases: what is free of each.
        basis_of_row: int32 ``[visual rows]``, the basis that a visual row was encoded with.
    """

    def __init__(self, slots: int, text_rows: int, visual_rows: int, bases: int, device: torch.device | str) -> None:
        self.device = device
        self.text_rows, self.visual_rows, self.base_count = text_rows, visual_rows, bases
        self.rows = torch.zeros(slots, dtype=torch.int32, device=device)
        self.basis_of_row = torch.zeros(visual_rows, dtype=torch.int32, device=device)
        self.clear()

    def clear(self) -> None:
        """Everything is free."""
        self.rows.zero_()
        self.text = FreeRows(1, self.text_rows, "text rows", self.device)
        self.visual = FreeRows(0, self.visual_rows, "visual rows", self.device)
        self.bases = FreeRows(0, self.base_count, "bases", "cpu")
        self.basis_tokens = [0] * self.base_count  # visual rows in use of each basis

    def fits(self, text: int, visual: int, bases: int) -> bool:
        """Whether so many rows and bases are free."""
        return text <= self.text.free and visual <= self.visual.free and bases <= self.bases.free

    def assign_text(self, slots: Tensor) -> None:
        """Give each of the slots ``[n]`` a text row."""
        self.rows[slots] = self.text.take(len(slots))

    def assign(self, slots: Tensor, visual: Tensor) -> None:
        """Give the slots ``[n]`` of one request their rows.

        Args:
            slots: of consecutive tokens.
            visual: bool ``[n]`` on the host; True gets a visual row (all of them one new basis), False a text row.
        """
        count = int(visual.sum())
        if not self.fits(len(slots) - count, count, int(count > 0)):
            raise OutOfRowsError(
                f"{len(slots) - count} text rows, {count} visual rows and {int(count > 0)} bases asked for; free are "
                f"{self.text.free}, {self.visual.free} and {self.bases.free}"
            )
        if not count:
            self.assign_text(slots)
            return
        visual = visual.to(slots.device)
        taken = self.visual.take(count)
        basis = int(self.bases.take(1))
        self.basis_tokens[basis] = count
        self.basis_of_row[taken.long()] = basis
        self.rows[slots[visual]] = -1 - taken
        self.assign_text(slots[~visual])

    def release(self, slots: Tensor) -> None:
        """Return whatever rows the slots ``[n]`` have, and the bases that no row uses any more."""
        rows = self.rows[slots]
        self.rows[slots] = 0
        self.text.give(rows[rows > 0])
        visual = -1 - rows[rows < 0]
        if not len(visual):
            return
        used = torch.bincount(self.basis_of_row[visual.long()].cpu(), minlength=self.base_count).tolist()
        self.visual.give(visual)
        for basis, count in enumerate(used):
            self.basis_tokens[basis] -= count
            if count and not self.basis_tokens[basis]:
                self.bases.give(torch.tensor([basis], dtype=torch.int32))

    def layout(self, slots: Tensor) -> tuple[Tensor, list[Segment]]:
        """What the slots ``[n]`` of one request hold, in their order.

        Returns:
            int32 ``[n]`` rows, those of visual tokens first, then those of text, each in the order of the slots; and
            the segments of the visual ones.
        """
        rows = self.rows[slots.long()]
        visual = -1 - rows[rows < 0]
        segments = []
        if len(visual):
            bases, counts = torch.unique_consecutive(self.basis_of_row[visual.long()], return_counts=True)
            first = 0
            for basis, count in zip(bases.tolist(), counts.tolist(), strict=True):
                segments.append(Segment(basis, first, count))
                first += count
        return torch.cat([visual, rows[rows > 0]]), segments


class RequestLedger:
    """What is stored for each request, known on the host; SGLang tells it of every request's steps and end.

    Attributes:
        segments: the visual segments of each request, by its number in SGLang's request pool.
        requests: the requests of the batch that runs next, in order.
        moved: requests to whom SGLang gave other slots of the same contents: those of a prefix that is cached.
        dense_capacity: tokens that can be scheduled, which SGLang asks for.
        changed: called when a request is over.
    """

    def __init__(self, dense_capacity: int, changed: Callable[[], None] = lambda: None) -> None:
        self.dense_capacity = dense_capacity
        self.changed = changed
        self.clear()

    def clear(self) -> None:
        """No request is known."""
        self.segments: dict[int, list[Segment]] = {}
        self.requests: list[int] = []
        self.moved: set[int] = set()

    reset_allocator = clear

    @property
    def with_basis(self) -> int:
        """How many requests hold compressed visual tokens."""
        return sum(bool(segments) for segments in self.segments.values())

    def alloc_to_lengths(self, *, req_pool_indices_cpu: Tensor, target_seq_lens_cpu: Tensor) -> None:
        """The next batch holds these requests."""
        self.requests = req_pool_indices_cpu.tolist()

    def free(self, request: int) -> None:
        """The request is over, or retracted."""
        self.segments.pop(int(request), None)
        self.moved.discard(int(request))
        self.changed()
