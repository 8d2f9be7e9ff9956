"""All tokens coded: one pool of rows of one width, a dense ring for each running request, dense rows for sinks.

A slot of SGLang's is a row of codes, of text and images alike; what is in it follows from its token alone, so that
prefixes are shared, evicted and taken back as dense ones are. Beside it, in the model's dtype:

- the **ring** of a running request: its last `RECENT_TOKENS` tokens once more. It belongs to the number that the
  request has in SGLang's request pool, so that there are as many rings as requests that run at once. After a prefix
  that was found in the cache it begins empty;
- **sinks**: the first `SINK_TOKENS` tokens of a prompt, held whole. Their rows belong to their slots.

Attention reads sinks, codes behind them, and the ring. Nothing here is read on the host.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.codecs.token_rows import RECENT_TOKENS, SINK_TOKENS, TokenRows
from rotatek_cache.core.quantization import HeadCodes
from rotatek_cache.core.segments import SegmentView


class OutOfSinksError(RuntimeError):
    """More sinks were asked for than are surely free, which admission is there to prevent."""


class Arriving:
    """A number that the device counts up, known on the host as far as it has arrived, which nothing waits for."""

    def __init__(self, count: Tensor) -> None:
        self.count = count
        self.known = 0
        self._stale = False  # whether it has changed since it was sent
        self._sent: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def send(self) -> None:
        """Have the number as it is now on its way; where an earlier one is, once that has arrived."""
        self._stale = self._sent is not None
        if not self.count.is_cuda:
            self.known = int(self.count)
        elif self._sent is None:
            self._sent = torch.empty((), dtype=self.count.dtype, device="cpu", pin_memory=True)
            self._sent.copy_(self.count, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self, *, wait: bool = False) -> int:
        """Return the latest number that has arrived; with `wait`, the one of now."""
        if wait and self.count.is_cuda:
            self.known, self._sent, self._stale = int(self.count), None, False
        elif self._sent is not None and self._arrived is not None and self._arrived.query():
            self.known, self._sent = int(self._sent), None
            if self._stale:
                self.send()
        return self.known


class Sinks:
    """Who has which dense row: taken and returned on the device. The host knows how many are free at least.

    Attributes:
        total: rows, from 1 on; row 0 takes what no sink is.
        row_of_slot: int32 ``[slots]``, the row of a slot's token; 0 for all that have none.
    """

    def __init__(self, slots: int, total: int, device: torch.device | str) -> None:
        self.total, self.device = total, device
        self.row_of_slot = torch.zeros(slots, dtype=torch.int32, device=device)
        self.clear()

    def clear(self) -> None:
        """Set all free."""
        self.row_of_slot.zero_()
        # One more than there are rows: where nothing is returned to.
        self.stack = torch.arange(self.total, -1, -1, dtype=torch.int32, device=self.device)
        self.top = torch.full((), self.total, dtype=torch.int64, device=self.device)
        self.returned = Arriving(torch.zeros((), dtype=torch.int64, device=self.device))
        self.taken = 0

    def free(self, *, wait: bool = False) -> int:
        """Count the rows that are free, at least; with `wait`, exactly."""
        return self.total - self.taken + self.returned.read(wait=wait)

    def take(self, slots: Tensor) -> None:
        """Give each of the int64 slots ``[n]`` a row."""
        count = len(slots)
        if count > self.free() and count > self.free(wait=True):
            raise OutOfSinksError(f"{count} sinks asked for, {self.free()} of {self.total} are free")
        self.taken += count
        self.top -= count
        self.row_of_slot[slots] = self.stack[self.top + torch.arange(count, device=slots.device)]

    def release(self, slots: Tensor) -> None:
        """Return the rows that the int64 slots ``[n]`` have, of which many have none."""
        rows = self.row_of_slot[slots]
        held = rows > 0
        self.stack[torch.where(held, self.top + held.cumsum(0) - 1, self.total)] = rows
        self.row_of_slot[slots] = 0
        count = held.sum()
        self.top += count
        self.returned.count += count
        self.returned.send()


@dataclass(frozen=True)
class Places:
    """Where the new tokens of a forward go, the same for all layers; all int64 on the device.

    Attributes:
        slots: ``[N]`` of the pool.
        sinks, sink_rows: which of the tokens are sinks (None: all may be, and row 0 is none), and their rows.
        recent, ring_rows: which of the tokens stay in a ring (None: all), and where.
    """

    slots: Tensor
    sinks: Tensor | None
    sink_rows: Tensor
    recent: Tensor | None
    ring_rows: Tensor


@dataclass(frozen=True)
class Part:
    """One of the three parts of what is stored of a batch: int32 slots ``[B, n]``, and which of them are read."""

    slots: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int


@dataclass(frozen=True)
class CodedTable:
    """Where the tokens of a batch lie; a part that nobody has is None. `bases` is int64 ``[B]``, all zero."""

    sinks: Part | None
    codes: Part | None
    ring: Part | None
    bases: Tensor


def _empty_codes(rows: TokenRows, slots: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    widths, stored = rows.storage(dtype)
    shape = (slots * sum(widths),) if isinstance(rows.code, HeadCodes) else (len(widths), slots, widths[0])
    return torch.zeros(shape, dtype=stored, device=device)


class CodedLayer:
    """One layer: pools of codes, and dense Keys and Values ``[rows, H, D]`` of sinks and of rings."""

    def __init__(
        self,
        keys: TokenRows,
        values: TokenRows,
        slots: int,
        sinks: int,
        rings: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.key_rows, self.value_rows = keys, values
        self.key_codes = _empty_codes(keys, slots, dtype, device)
        self.value_codes = _empty_codes(values, slots, dtype, device)
        where = self.key_codes.device  # with its number, by which bases are remembered
        self.key_basis, self.value_basis = keys.basis(dtype, where), values.basis(dtype, where)

        def dense(count: int) -> tuple[Tensor, Tensor]:
            shapes = ((count, rows.heads, rows.width) for rows in (keys, values))
            key, value = (torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
            return key, value

        self.sinks = dense(sinks + 1)
        self.ring = dense(rings * RECENT_TOKENS)

    def write(self, places: Places, keys: Tensor, values: Tensor) -> None:
        """Store Keys and Values ``[N, H, D]`` of new tokens."""
        for rows, codes, states in ((self.key_rows, self.key_codes, keys), (self.value_rows, self.value_codes, values)):
            rows.write(codes, places.slots, states.transpose(0, 1))
        for held, tokens, where in (
            (self.sinks, places.sinks, places.sink_rows),
            (self.ring, places.recent, places.ring_rows),
        ):
            for dense, states in zip(held, (keys, values), strict=True):
                dense[where] = states if tokens is None else states[tokens]

    def views(self, table: CodedTable) -> list[SegmentView]:
        """Return the stored tokens of a batch as attention reads them."""
        views = []
        for part, (keys, values) in ((table.sinks, self.sinks), (table.ring, self.ring)):
            if part is not None:
                views.append(_view(part, keys.transpose(0, 1), values.transpose(0, 1)))
        if table.codes is not None:
            views.append(
                _view(
                    table.codes,
                    self.key_codes,
                    self.value_codes,
                    basis=self.key_basis,
                    basis_rows=table.bases,
                    key_code=self.key_rows.view_code,
                    value_basis=self.value_basis,
                    value_code=self.value_rows.view_code,
                )
            )
        return views

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """List what is held for Keys, and for Values."""
        (sink_keys, sink_values), (ring_keys, ring_values) = self.sinks, self.ring
        return [self.key_codes, sink_keys, ring_keys], [self.value_codes, sink_values, ring_values]


def _view(part: Part, keys: Tensor, values: Tensor, **coded: object) -> SegmentView:
    return SegmentView(
        keys=keys,
        values=values,
        starts=part.starts,
        lengths=part.lengths,
        max_length=part.longest,
        slots=part.slots,
        **coded,  # type: ignore[arg-type]
    )


def ring_slots(requests: Tensor, positions: Tensor) -> Tensor:
    """Return rows of the ring in which requests keep the tokens at these positions."""
    return requests * RECENT_TOKENS + positions % RECENT_TOKENS


class DecodeTables:
    """Buffers of fixed place for batches of up to `most` requests that decode, filled on the device before each step.

    All follows from SGLang's own buffers, so that a graph records `fill` with the step.
    """

    def __init__(self, most: int, context: int, device: torch.device | str) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        long = torch.int64
        self.context = context
        self.slots = zeros(most, context)
        self.sinks, self.ring = zeros(most, SINK_TOKENS), zeros(most, RECENT_TOKENS)
        self.lengths = zeros(3, most)  # of sinks, codes, ring
        self.none, self.after_sinks = zeros(most, dtype=long), zeros(most, dtype=long).fill_(SINK_TOKENS)
        self.new_slots, self.new_sinks, self.new_ring = (zeros(most, dtype=long) for _ in range(3))
        self.recent = torch.arange(RECENT_TOKENS, device=device)

    @property
    def most(self) -> int:
        """The requests that fit."""
        return len(self.slots)

    def fill(
        self, slots_of: Tensor, sinks: Sinks, ring_starts: Tensor, requests: Tensor, lengths: Tensor, slots: Tensor
    ) -> None:
        """Say where the tokens of the batch are.

        Args:
            slots_of: int32 ``[requests, context]``, SGLang's slots of each request's tokens.
            sinks: who has which.
            ring_starts: int64 ``[requests]``, the position of the first token in each ring.
            requests: int64 ``[B]``, numbers of the requests.
            lengths: int64 ``[B]``, their tokens, new ones included.
            slots: int64 ``[B]``, of the new ones.
        """
        batch = len(requests)
        torch.index_select(slots_of, 0, requests, out=self.slots[:batch])
        first = torch.maximum(ring_starts[requests], lengths - RECENT_TOKENS).clamp_(min=SINK_TOKENS)
        self.sinks[:batch] = sinks.row_of_slot[self.slots[:batch, :SINK_TOKENS]]
        self.ring[:batch] = ring_slots(requests[:, None], first[:, None] + self.recent)
        self.lengths[0, :batch] = lengths.clamp(max=SINK_TOKENS)
        self.lengths[1, :batch] = torch.minimum(first, lengths).sub_(SINK_TOKENS).clamp_(min=0)
        self.lengths[2, :batch] = (lengths - first).clamp_(min=0)
        self.new_slots[:batch] = slots
        # A token behind the sinks has no row among theirs, and its slot says so: row 0.
        self.new_sinks[:batch] = sinks.row_of_slot[slots]
        self.new_ring[:batch] = ring_slots(requests, lengths - 1)

    def table(self, batch: int, longest: int) -> CodedTable:
        """Return the first `batch` rows of the buffers, for requests of up to `longest` tokens."""
        codes = None
        if longest > SINK_TOKENS:
            columns = min(longest, self.context)
            codes = Part(self.slots[:batch], self.after_sinks[:batch], self.lengths[1, :batch], columns - SINK_TOKENS)
        return CodedTable(
            Part(self.sinks[:batch], self.none[:batch], self.lengths[0, :batch], SINK_TOKENS),
            codes,
            Part(self.ring[:batch], self.none[:batch], self.lengths[2, :batch], RECENT_TOKENS),
            self.none[:batch],
        )

    def places(self, batch: int) -> Places:
        """Return where the new tokens of the first `batch` rows go."""
        return Places(self.new_slots[:batch], None, self.new_sinks[:batch], None, self.new_ring[:batch])

    def tensors(self) -> list[Tensor]:
        """List the buffers."""
        return [tensor for tensor in vars(self).values() if isinstance(tensor, Tensor)]


def table_before(
    slots: Tensor, row_of_slot: Tensor, request: int, ring_start: int, numbers: Callable[[Sequence[int]], Tensor]
) -> CodedTable:
    """Make the table of one request's stored tokens, all known on the host.

    Args:
        slots: int32 ``[n]`` of its tokens; at least one.
        row_of_slot: of `Sinks`.
        request: its number.
        ring_start: position of the first token in its ring.
        numbers: makes an int64 tensor on the device of numbers on the host.
    """
    length = len(slots)
    first = min(length, max(ring_start, length - RECENT_TOKENS, SINK_TOKENS))
    sunk, coded, recent = min(SINK_TOKENS, length), max(0, first - SINK_TOKENS), length - first
    starts = numbers([0, SINK_TOKENS, sunk, coded, recent])
    lengths = starts.int()
    none = starts[:1]
    ring = None
    if recent:
        positions = torch.arange(first, length, device=slots.device)
        ring = Part((request * RECENT_TOKENS + positions % RECENT_TOKENS)[None], none, lengths[4:], recent)
    return CodedTable(
        Part(row_of_slot[slots[:sunk].long()][None], none, lengths[2:3], sunk),
        Part(slots[None], starts[1:2], lengths[3:4], coded) if coded else None,
        ring,
        none,
    )
