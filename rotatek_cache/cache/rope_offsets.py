"""`RopeOffsets`: by how much M-RoPE positions differ from counted ones, at every place of a conversation."""

import bisect
import sys
from collections.abc import Sequence

import torch
from torch import Tensor


class RopeOffsets:
    """The offsets of M-RoPE positions behind each image of each row, by which a crop finds where its row goes on.

    M-RoPE numbers the tokens of an image by its rows and columns, so that text behind it goes on at a position that is
    not its number among the tokens; an image changes this offset once. Kept are plain integers, no tensors.

    Attributes:
        rows: of each batch row the (logical position, offset) pairs from where on text has another offset.
        open: whether the offset behind the last token may show at the next one only, as behind an image.
    """

    def __init__(self) -> None:
        self.rows: list[list[tuple[int, int]]] = []
        self.open = False

    def record(self, begin: int, offsets: Tensor, text: Tensor) -> None:
        """Learn the offsets of a forward.

        Args:
            begin: its first logical position.
            offsets: int64 ``[B, n]``, position less the number of tokens before, of each token.
            text: bool ``[B, n]``, False for visual tokens and padding, whose offsets mean nothing.
        """
        if len(self.rows) != len(offsets):
            self.rows = [[] for _ in offsets]
        self.truncate(begin)
        before = torch.tensor([known[-1][1] if known else 0 for known in self.rows], device=offsets.device)
        # Tokens without a meaning take the offset of the last that has one, so that only changes are left.
        columns = torch.arange(1, offsets.shape[1] + 1, device=offsets.device)
        last = (text * columns).cummax(1).values
        filled = torch.cat([before[:, None], offsets], 1).gather(1, last)
        previous = torch.cat([before[:, None], filled[:, :-1]], 1)
        for row, column in (filled != previous).nonzero().tolist():
            self.rows[row].append((begin + column, int(filled[row, column])))

    def at(self, row: int, position: int) -> int:
        """Return the offset of text at a logical position of a row, which is not between two visual tokens."""
        known = self.rows[row]
        found = bisect.bisect_right(known, (position, sys.maxsize))
        return known[found - 1][1] if found else 0

    def truncate(self, length: int) -> None:
        """Forget logical positions from `length` on."""
        self.rows = [[entry for entry in known if entry[0] < length] for known in self.rows]
        self.open = True

    def select_rows(self, index: Sequence[int]) -> None:
        """Let batch row b be what row ``index[b]`` was."""
        if self.rows:
            self.rows = [list(self.rows[row]) for row in index]
