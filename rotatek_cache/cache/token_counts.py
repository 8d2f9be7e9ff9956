"""How many tokens each row of a batch has, and where they lie: what the layers of a cache of coded tokens share.

A row counts its own tokens from 0, padding left out. Token i is coded when it comes, at column ``i - SINK_TOKENS`` of
the codes, unless it is a sink. The first `SINK_TOKENS` and the last `RECENT_TOKENS` are dense, side by side in one
buffer: token i at column i, or, behind the sinks, in a ring. So the columns of a row that hold something are always its
first. Attention reads the codes of those tokens that have left the ring.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.codecs.token_rows import RECENT_TOKENS, SINK_TOKENS
from rotatek_cache.core.row_layout import INDEX, LENGTH, integers

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
        coded: new tokens that are coded, to the codes.
        dense: new tokens that are sinks or recent, to the dense buffer.
    """

    counts: "TokenCounts"
    coded: Moves
    dense: Moves


@dataclass(frozen=True)
class Step:
    """What a forward of one token does: its columns int64 ``[B]`` of the dense buffer and of the codes.

    What a sink writes among the codes is not read, and overwritten by the first token that is none.
    """

    counts: "TokenCounts"
    column: Tensor
    code_column: Tensor


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
        self._on_device = on_device
        self._arrival: tuple[int, Tensor | None, Arrival] | None = None
        self._selected: tuple[Tensor, TokenCounts] | None = None
        self._returned: tuple[tuple[int, ...], Return] | None = None

    @property
    def on_device(self) -> Tensor:
        """int64 ``[B]``: the same on the device."""
        if self._on_device is None:
            # A copy would make the host wait for a GPU; launches do not.
            alike = torch.full((len(self.rows),), self.rows[0], dtype=INDEX, device=self.device) if self.alike else None
            self._on_device = integers(self.rows, self.device) if alike is None else alike
        return self._on_device

    @functools.cached_property
    def dense_lengths(self) -> Tensor:
        """int32 ``[B]``: columns of the dense buffer that hold something."""
        return self.on_device.clamp(max=DENSE_COLUMNS).to(LENGTH)

    @functools.cached_property
    def code_lengths(self) -> Tensor:
        """int32 ``[B]``: tokens that are read as codes."""
        return (self.on_device - DENSE_COLUMNS).clamp(min=0).to(LENGTH)

    @property
    def most(self) -> int:
        """Tokens of the longest row."""
        return max(self.rows)

    @property
    def coded(self) -> tuple[int, ...]:
        """Tokens that are read as codes, of each row."""
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
        """Give the number in its row of each token that is read as codes, ``[B, most]``; past a row's: arbitrary."""
        return SINK_TOKENS + torch.arange(max(self.coded), device=self.device).expand(len(self.rows), -1)

    def dense_tokens(self) -> Tensor:
        """Give the number in its row of the token in each dense column, ``[B, columns]``; past a row's: arbitrary."""
        columns = torch.arange(min(self.most, DENSE_COLUMNS), device=self.device).expand(len(self.rows), -1)
        return _held(columns, self.on_device[:, None])

    @property
    def code_columns(self) -> int:
        """Columns of the codes that are used."""
        return max(0, self.most - SINK_TOKENS)

    @property
    def step_columns(self) -> int:
        """Columns of the codes that are used after one more token of each row."""
        return max(1, self.most + 1 - SINK_TOKENS)

    @functools.cached_property
    def step(self) -> Step:
        """What one more token of each row does."""
        rows = tuple(count + 1 for count in self.rows)
        code_column = (self.on_device - SINK_TOKENS).clamp(min=0)
        return Step(TokenCounts(rows, self.device, self.on_device + 1), dense_column(self.on_device), code_column)

    @functools.cached_property
    def after_a_replay(self) -> "TokenCounts":
        """The counts when a graph has taken one more token of each row; nothing is launched."""
        return TokenCounts(tuple(count + 1 for count in self.rows), self.device)

    def arrival(self, tokens: int, visible: Tensor | None) -> Arrival:
        """Say what `tokens` more positions do; bool `visible` ``[B, tokens]`` says which are a row's own, None: all."""
        if self._arrival is None or self._arrival[0] != tokens or self._arrival[1] is not visible:
            self._arrival = tokens, visible, self._arrive(tokens, visible)
        return self._arrival[2]

    def _arrive(self, tokens: int, visible: Tensor | None) -> Arrival:
        own = torch.ones(len(self.rows), tokens, dtype=torch.bool, device="cpu") if visible is None else visible.cpu()
        before = torch.tensor(self.rows, device="cpu")[:, None]
        number = before + own.cumsum(1) - 1
        after = before + own.sum(1, keepdim=True)
        dense = own & ((number < SINK_TOKENS) | (number >= after - RECENT_TOKENS))
        return Arrival(
            counts=TokenCounts(tuple(after[:, 0].tolist()), self.device),
            coded=Moves.of(own & (number >= SINK_TOKENS), number - SINK_TOKENS, self.device),
            dense=Moves.of(dense, dense_column(number), self.device),
        )

    def cut(self, rows: tuple[int, ...]) -> Return:
        """Say what a crop to so many tokens of each row does."""
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
