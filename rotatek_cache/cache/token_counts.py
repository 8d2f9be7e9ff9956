"""How many tokens each row of a batch has, and where they lie: what the layers of a cache of coded tokens share.

A row counts its own tokens from 0, padding left out. The first `SINK_TOKENS` and the last `RECENT_TOKENS` of them are
dense, side by side in one buffer: token i at column i, or, behind the sinks, in a ring. So the columns of a row that
hold something are always its first. Token i that has left the ring is coded, at column ``i - SINK_TOKENS`` of codes.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.codecs.token_rows import RECENT_TOKENS, SINK_TOKENS
from rotatek_cache.core.row_layout import LENGTH

DENSE_COLUMNS = SINK_TOKENS + RECENT_TOKENS


def dense_column(tokens: Tensor) -> Tensor:
    """Find the column of the dense buffer that each token is in, or was, by its number in its row."""
    behind = tokens - SINK_TOKENS
    return torch.where(behind < 0, tokens, SINK_TOKENS + behind % RECENT_TOKENS)


@dataclass(frozen=True)
class Moves:
    """Where tokens go: int64 ``[n]`` each, on the device of the states.

    Attributes:
        rows: batch rows.
        source: columns that they come from.
        target: columns that they go to.
    """

    rows: Tensor
    source: Tensor
    target: Tensor

    @classmethod
    def of(cls, picked: Tensor, target: Tensor, device: torch.device, source: Tensor | None = None) -> "Moves":
        """Move columns marked in bool `picked` ``[B, n]`` to `target` ``[B, n]``; from `source` where that differs."""
        rows, columns = picked.nonzero(as_tuple=True)
        come = columns if source is None else source[picked]
        return cls(rows.to(device), come.to(device), target[picked].to(device))

    def __bool__(self) -> bool:
        return len(self.rows) > 0


@dataclass(frozen=True)
class Arrival:
    """What a forward of several tokens does to each layer.

    Attributes:
        counts: what the rows have after it.
        leaving: tokens that leave the ring, from the dense buffer to the codes.
        coded: new tokens that are coded at once.
        dense: new tokens that become sinks or recent ones.
    """

    counts: "TokenCounts"
    leaving: Moves
    coded: Moves
    dense: Moves


@dataclass(frozen=True)
class Step:
    """What a forward of one token does: columns int64 ``[B]`` of the dense buffer and of the codes.

    A token that leaves the ring goes to the codes before the new one takes its column; where none does in a row, what
    is written there is not read.
    """

    counts: "TokenCounts"
    column: Tensor
    code_column: Tensor
    leaves: bool


@dataclass(frozen=True)
class Return:
    """What a crop does: tokens that come back into the ring, from the codes to the dense buffer."""

    counts: "TokenCounts"
    back: Moves


class TokenCounts:
    """The number of tokens of each row, at one moment.

    Never changed: what follows from it is made once, for all layers.

    Args:
        rows: of each row, on the host.
        device: of the states.
    """

    def __init__(self, rows: tuple[int, ...], device: torch.device, on_device: Tensor | None = None) -> None:
        self.rows = rows
        self.device = device
        # On a GPU a copy from the host would wait; launches do not.
        self.on_device = _numbers(rows, device) if on_device is None else on_device
        self._arrival: tuple[int, Tensor | None, Arrival] | None = None
        self._selected: tuple[Tensor, TokenCounts] | None = None
        self._returned: tuple[tuple[int, ...], Return] | None = None

    @functools.cached_property
    def dense_lengths(self) -> Tensor:
        """int32 ``[B]``: columns of the dense buffer that hold something."""
        return self.on_device.clamp(max=DENSE_COLUMNS).to(LENGTH)

    @functools.cached_property
    def code_lengths(self) -> Tensor:
        """int32 ``[B]``: tokens that are coded."""
        return (self.on_device - DENSE_COLUMNS).clamp(min=0).to(LENGTH)

    @property
    def most(self) -> int:
        """Tokens of the longest row."""
        return max(self.rows)

    @property
    def coded(self) -> tuple[int, ...]:
        """Tokens that are coded, of each row."""
        return tuple(max(0, count - DENSE_COLUMNS) for count in self.rows)

    @property
    def alike(self) -> bool:
        """Whether all rows have as many."""
        return min(self.rows) == self.most

    @functools.cached_property
    def batch(self) -> Tensor:
        """int64 ``[B]``: 0, 1, 2, ..."""
        return torch.arange(len(self.rows), device=self.device)

    def coded_tokens(self) -> Tensor:
        """Give the number in its row of each coded token, ``[B, most]``; entries past a row's are arbitrary."""
        return SINK_TOKENS + torch.arange(max(self.coded), device=self.device).expand(len(self.rows), -1)

    def dense_tokens(self) -> Tensor:
        """Give the number in its row of the token in each dense column, ``[B, columns]``; past a row's: arbitrary."""
        columns = torch.arange(min(self.most, DENSE_COLUMNS), device=self.device).expand(len(self.rows), -1)
        return _held(columns, self.on_device[:, None])

    @functools.cached_property
    def step(self) -> Step:
        """What one more token of each row does."""
        counts = TokenCounts(tuple(count + 1 for count in self.rows), self.device, self.on_device + 1)
        code_column = (self.on_device - DENSE_COLUMNS).clamp(min=0)
        return Step(counts, dense_column(self.on_device), code_column, self.most >= DENSE_COLUMNS)

    def arrival(self, tokens: int, visible: Tensor | None) -> Arrival:
        """What `tokens` more positions do; bool `visible` ``[B, tokens]`` says which are a row's own, None: all."""
        if self._arrival is None or self._arrival[0] != tokens or self._arrival[1] is not visible:
            self._arrival = tokens, visible, self._arrive(tokens, visible)
        return self._arrival[2]

    def _arrive(self, tokens: int, visible: Tensor | None) -> Arrival:
        own = torch.ones(len(self.rows), tokens, dtype=torch.bool, device="cpu") if visible is None else visible.cpu()
        before = torch.tensor(self.rows, device="cpu")[:, None]
        number = before + own.cumsum(1) - 1
        after = before + own.sum(1, keepdim=True)
        recent_from = after - RECENT_TOKENS
        stays = (number < SINK_TOKENS) | (number >= recent_from)
        columns = torch.arange(SINK_TOKENS, DENSE_COLUMNS, device="cpu").expand(len(self.rows), -1)
        held = _held(columns, before)
        leaves = (columns < before) & (held < recent_from)
        return Arrival(
            counts=TokenCounts(tuple(after[:, 0].tolist()), self.device),
            leaving=Moves.of(leaves, held - SINK_TOKENS, self.device, columns),
            coded=Moves.of(own & ~stays, number - SINK_TOKENS, self.device),
            dense=Moves.of(own & stays, dense_column(number), self.device),
        )

    def cut(self, rows: tuple[int, ...]) -> Return:
        """What a crop to so many tokens of each row does."""
        if self._returned is None or self._returned[0] != rows:
            before, after = (torch.tensor(counts, device="cpu")[:, None] for counts in (self.rows, rows))
            columns = torch.arange(SINK_TOKENS, DENSE_COLUMNS, device="cpu").expand(len(rows), -1)
            held = _held(columns, after)
            lost = (columns < after) & (held < before - RECENT_TOKENS)
            back = Moves.of(lost, columns, self.device, held - SINK_TOKENS)
            self._returned = rows, Return(TokenCounts(rows, self.device), back)
        return self._returned[1]

    def selected(self, index: Tensor) -> "TokenCounts":
        """Return the counts where row b is what row ``index[b]`` was."""
        if self._selected is None or self._selected[0] is not index:
            # Rows that are alike stay so, whichever they are: nothing is read on the host.
            picked = [0] * len(index) if self.alike else index.tolist()
            rows = tuple(self.rows[row] for row in picked)
            self._selected = index, TokenCounts(rows, self.device, self.on_device[index.to(self.device)])
        return self._selected[1]


def _held(columns: Tensor, counts: Tensor) -> Tensor:
    """Find the last token below `counts` ``[B, 1]`` that is in each of `columns` ``[B, n]`` of the dense buffer."""
    rounds = ((counts - 1 - columns) // RECENT_TOKENS).clamp(min=0)
    return torch.where(columns < SINK_TOKENS, columns, columns + RECENT_TOKENS * rounds)


def _numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    if len(set(values)) == 1:
        return torch.full((len(values),), values[0], dtype=torch.int64, device=device)
    return torch.tensor(values, dtype=torch.int64, device=device)
