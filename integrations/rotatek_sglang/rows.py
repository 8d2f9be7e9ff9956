"""Which row of which pool a slot's token is stored in: the one place where rows and bases are given out and returned.

SGLang counts in *slots*, one per token, whatever is stored for it. Behind a slot lies a row of one of two pools: text
rows hold dense Keys and Values, visual rows hold coefficients. A slot's entry in the table is signed: text row t is
``t`` (from 1 on: row 0 takes what padding writes), visual row v is ``-1 - v``, and 0 is nothing.

Rows follow their slots. A basis belongs to the visual rows that were encoded with it and is given back with the last of
them, so that requests which share a prefix share its rows and its basis.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class OutOfRowsError(RuntimeError):
    """More rows or bases were asked for than are free, which admission is there to prevent."""


class Need(NamedTuple):
    """So many rows of each kind, and bases."""

    text: int = 0
    visual: int = 0
    bases: int = 0


NOTHING = Need()


def added(needs: Iterable[Need]) -> Need:
    """Add up what several need."""
    return Need(*map(sum, zip(NOTHING, *needs, strict=True)))


class FreeRows:
    """A stack of free row numbers; how many there are is known on the host.

    Attributes:
        free: how many are not in use.
        reserved: how many of those are promised to somebody.
    """

    def __init__(self, first: int, count: int, what: str, device: torch.device | str) -> None:
        self.first = first
        self.total = count
        self.what = what
        self.stack = torch.arange(first + count - 1, first - 1, -1, dtype=torch.int32, device=device)
        self.free = count
        self.reserved = 0

    @property
    def used(self) -> int:
        """The number that is not free."""
        return self.total - self.free

    @property
    def available(self) -> int:
        """The number that any request may take."""
        return self.free - self.reserved

    def take(self, count: int) -> Tensor:
        """Return int32 ``[count]`` rows."""
        if count > self.available:
            raise OutOfRowsError(f"{count} {self.what} asked for, {self.available} of {self.total} are free")
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
        # One at least, where all that have no row are looked up.
        self.basis_of_row = torch.zeros(max(1, visual_rows), dtype=torch.int32, device=device)
        self.clear()

    def clear(self) -> None:
        """Set everything free."""
        self.rows.zero_()
        self.text = FreeRows(1, self.text_rows, "text rows", self.device)
        self.visual = FreeRows(0, self.visual_rows, "visual rows", self.device)
        self.bases = FreeRows(0, self.base_count, "bases", "cpu")
        self.basis_tokens = [0] * self.base_count  # visual rows in use of each basis

    def fits(self, need: Need) -> bool:
        """Say whether so much is free."""
        return all(count <= kind.available for count, kind in zip(need, self._kinds(), strict=True))

    def could_fit(self, need: Need, held: Need, evictable: int) -> bool:
        """Say whether so much might be free once cached prefixes are gone.

        Args:
            need: what is asked for.
            held: of what is in use, what requests hold that no prefix cache may give away, at least.
            evictable: tokens of cached prefixes that nobody uses.
        """
        return all(
            count - kind.available <= min(evictable, kind.used - own)
            for count, own, kind in zip(need, held, self._kinds(), strict=True)
        )

    def reserve(self, need: Need) -> None:
        """Promise rows and bases to somebody who takes them later; `unreserve` first."""
        for count, kind in zip(need, self._kinds(), strict=True):
            if count > kind.available:
                raise OutOfRowsError(f"{count} {kind.what} to be reserved, {kind.available} of {kind.total} are free")
        for count, kind in zip(need, self._kinds(), strict=True):
            kind.reserved += count

    def unreserve(self, need: Need) -> None:
        """Take the promise of as much back."""
        for count, kind in zip(need, self._kinds(), strict=True):
            kind.reserved -= count

    def _kinds(self) -> tuple[FreeRows, FreeRows, FreeRows]:
        return self.text, self.visual, self.bases

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
        need = Need(len(slots) - count, count, int(count > 0))
        if not self.fits(need):
            asked, free = (
                [f"{n} {kind.what}" for n, kind in zip(row, self._kinds(), strict=True)]
                for row in (need, [kind.available for kind in self._kinds()])
            )
            raise OutOfRowsError(f"asked for are {', '.join(asked)}; free are {', '.join(free)}")
        if not count:
            self.assign_text(slots)
            return
        taken = self.visual.take(count)
        basis = int(self.bases.take(1))
        self.basis_tokens[basis] = count
        self.basis_of_row[taken.long()] = basis
        self.rows[slots[places(visual, slots.device)]] = -1 - taken
        self.assign_text(slots[places(~visual, slots.device)])

    def _look_up(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the int32 rows ``[n]`` of slots; rows and, of visual ones, bases on the host, in one read."""
        rows = self.rows[slots]
        found = torch.stack([rows, self.basis_of_row[(-1 - rows).clamp_(min=0).long()]]).cpu()
        return rows, found[0], found[1]

    def release(self, slots: Tensor) -> None:
        """Return whatever rows the slots ``[n]`` have, and the bases that no row uses any more."""
        rows, known, bases = self._look_up(slots)
        self.rows[slots] = 0
        self.text.give(rows[places(known > 0, rows.device)])
        visual = known < 0
        if not visual.any():
            return
        self.visual.give(-1 - rows[places(visual, rows.device)])
        used = torch.bincount(bases[visual], minlength=self.base_count).tolist()
        for basis, count in enumerate(used):
            self.basis_tokens[basis] -= count
            if count and not self.basis_tokens[basis]:
                self.bases.give(torch.tensor([basis], dtype=torch.int32, device="cpu"))

    def layout(self, slots: Tensor) -> tuple[Tensor, list[Segment]]:
        """List what the slots ``[n]`` of one request hold, in their order.

        Returns:
            int32 ``[n]`` rows, those of visual tokens first, then those of text, each in the order of the slots; and
            the segments of the visual ones.
        """
        rows, known, bases = self._look_up(slots.long())
        visual, segments, first = known < 0, [], 0
        for basis, count in zip(*torch.unique_consecutive(bases[visual], return_counts=True), strict=True):
            segments.append(Segment(int(basis), first, int(count)))
            first += int(count)
        return torch.cat([-1 - rows[places(visual, rows.device)], rows[places(known > 0, rows.device)]]), segments


def places(mask: Tensor, device: torch.device) -> Tensor:
    """Return int64, on the device, of where a mask on the host is True; nobody waits for it."""
    found = mask.nonzero()[:, 0]
    return (found.pin_memory() if device.type == "cuda" else found).to(device, non_blocking=True)


@dataclass(eq=False)
class ChunkedPrompt:
    """A prompt that SGLang reads in chunks. Its visual tokens stay dense, in text rows, until the last one.

    Attributes:
        first: its first token that was not cached.
        visual: bool ``[tokens from there to its end]`` on the host, which of them will be compressed.
        reserved: what the chunks to come will take.
        is_last: whether the chunk that runs next, or runs, is the last.
        queries: by layer, the last queries ``[n, H_q, D]`` of the chunks so far, for the fit of a basis.
    """

    first: int
    visual: Tensor
    reserved: Need = field(default_factory=Need)
    is_last: bool = False
    queries: dict[int, Tensor] = field(default_factory=dict)


class RequestLedger:
    """A record of what is stored for each request, known on the host; SGLang tells it of every request's steps and end.

    Attributes:
        segments: the visual segments of each request, by its number in SGLang's request pool.
        requests: the requests of the batch that runs next, in order.
        moved: requests to whom SGLang gave other slots of the same contents: those of a prefix that is cached.
        compressed: of prompts whose last chunk, or only one, runs next: bool on the host, which tokens get compressed,
            from the first on that was not cached.
        chunked: the prompts that are being read in chunks, which is one at a time, or two where one follows another.
        dense_capacity: tokens that can be scheduled, which SGLang asks for.
        changed: called when a request is over.
    """

    def __init__(self, dense_capacity: int, table: SlotTable, changed: Callable[[], None] = lambda: None) -> None:
        self.dense_capacity = dense_capacity
        self.table = table
        self.changed = changed
        self.clear()

    def clear(self) -> None:
        """Forget all requests."""
        self.segments: dict[int, list[Segment]] = {}
        self.requests: list[int] = []
        self.moved: set[int] = set()
        self.chunked: dict[int, ChunkedPrompt] = {}
        self.compressed: dict[int, Tensor] = {}

    reset_allocator = clear

    @property
    def with_basis(self) -> int:
        """The number of requests that hold compressed visual tokens."""
        return sum(bool(segments) for segments in self.segments.values())

    def alloc_to_lengths(self, *, req_pool_indices_cpu: Tensor, target_seq_lens_cpu: Tensor) -> None:
        """Note that the next batch holds these requests."""
        self.requests = req_pool_indices_cpu.tolist()

    def assign_chunk(self, request: int, slots: Tensor, chunk: slice, visual: Tensor) -> Tensor:
        """Give rows to the slots of a chunk of a prompt; of all of it, where it comes in one.

        Args:
            request: its number in SGLang's request pool.
            slots: of the request's tokens as far as ``chunk.stop``.
            chunk: which of them are new.
            visual: bool ``[n]`` on the host, which tokens from ``chunk.start`` to the end of the prompt are to be
                compressed. The first chunk decides; later ones only say how many there are.

        Returns:
            int32: text rows in which earlier chunks were waiting. They are free once this batch has all its rows: the
            forward of this chunk reads them, and may not find others' tokens there.
        """
        none = self.table.rows[:0]
        prompt = self.chunked.get(request)
        is_last = chunk.stop - chunk.start == len(visual)
        if prompt is None:
            if is_last:
                self.table.assign(slots[chunk], visual)
                self.compressed[request] = visual
                return none
            prompt = self.chunked[request] = ChunkedPrompt(chunk.start, visual)
        self.table.unreserve(prompt.reserved)
        prompt.reserved = Need()
        if not is_last:
            self.table.assign_text(slots[chunk])
            count = int(prompt.visual.sum())
            prompt.reserved = Need(len(visual) - (chunk.stop - chunk.start), count, int(count > 0))
            self.table.reserve(prompt.reserved)
            return none
        if not prompt.visual.any():
            del self.chunked[request]
            self.table.assign_text(slots[chunk])
            return none
        prompt.is_last = True
        self.compressed[request] = prompt.visual
        read = chunk.start - prompt.first
        waiting = slots[prompt.first : chunk.start][places(prompt.visual[:read], slots.device)]
        rows = self.table.rows[waiting]
        self.table.assign(
            torch.cat([waiting, slots[chunk]]),
            torch.cat([torch.ones(len(waiting), dtype=torch.bool, device="cpu"), prompt.visual[read:]]),
        )
        return rows

    def free(self, request: int) -> None:
        """Forget a request, which is over or retracted."""
        self.segments.pop(int(request), None)
        self.moved.discard(int(request))
        self.compressed.pop(int(request), None)
        prompt = self.chunked.pop(int(request), None)
        if prompt is not None:
            self.table.unreserve(prompt.reserved)
        self.changed()
