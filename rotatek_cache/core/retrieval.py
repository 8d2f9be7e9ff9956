"""Chunks of stored tokens, of which a decode step reads those that its query asks for."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rotatek_cache.core.row_layout import LENGTH


class Retrieved(NamedTuple):
    """The tokens that a step reads: their numbers in their rows ``[rows, n]``, and how many of these are a row's."""

    tokens: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Chunks:
    """Chunks of the tokens of each row, with the mean of their Keys.

    Attributes:
        means: ``[C, D]``, packed row after row.
        starts, counts: int64 ``[rows]``, first chunk and number of chunks of each row.
        read: int64 ``[rows]``, how many chunks a step reads.
        size: tokens of a chunk; the last of a row may have fewer.
        most, most_read: the most chunks that a row has, and reads.
    """

    means: Tensor
    starts: Tensor
    counts: Tensor
    read: Tensor
    size: int
    most: int
    most_read: int

    @classmethod
    def of(cls, keys: Tensor, starts: Tensor, lengths: Tensor, read: Tensor, size: int) -> "Chunks":
        """Make the chunks of packed Keys ``[N, D]``; `read` ``[rows]`` are tokens. Waits for the device."""
        counts = -(-lengths.long() // size)
        ends = counts.cumsum(0)
        first = ends - counts
        row = torch.repeat_interleave(torch.arange(len(lengths), device=keys.device), lengths.long())
        chunk = first[row] + (torch.arange(len(keys), device=keys.device) - starts[row]) // size
        total = keys.new_zeros(int(ends[-1]), keys.shape[-1], dtype=torch.float32)
        total.index_add_(0, chunk, keys.float())
        tokens = torch.bincount(chunk, minlength=len(total))
        wanted = (-(-read // size)).minimum(counts)
        means = (total / tokens[:, None]).to(keys.dtype)
        return cls(means, first, counts, wanted, size, int(counts.max()), int(wanted.max()))

    def best(self, query: Tensor, lengths: Tensor) -> Retrieved:
        """Find the tokens of the chunks that a query ``[rows, G, 1, D]`` asks for; no host number is read.

        A chunk's score is the largest product of its mean Key with a query of the group. `lengths` ``[rows]`` are the
        tokens that each row has.
        """
        columns = torch.arange(self.most, device=query.device)
        means = self.means[(self.starts[:, None] + columns).clamp(max=len(self.means) - 1)]
        scores = (query[:, :, 0].to(means.dtype) @ means.mT).amax(1)  # [rows, most]
        there = columns * self.size < lengths[:, None]
        order = scores.masked_fill(~there, -torch.inf).argsort(dim=1, descending=True, stable=True)
        order = order[:, : self.most_read]
        wanted = torch.arange(order.shape[1], device=query.device) < self.read[:, None]
        tokens = order[..., None] * self.size + torch.arange(self.size, device=query.device)
        inside = (wanted[..., None] & (tokens < lengths[:, None, None])).flatten(1)
        front = (~inside).int().argsort(dim=1, stable=True)
        return Retrieved(tokens.flatten(1).gather(1, front), inside.sum(1, dtype=LENGTH))

    def select_rows(self, index: Tensor) -> "Chunks":
        """Return the chunks where row b is what row ``index[b]`` was."""
        return self.with_rows(self.starts[index], self.counts[index], self.read[index])

    def with_rows(self, starts: Tensor, counts: Tensor, read: Tensor) -> "Chunks":
        """Return the same chunks with another table of rows."""
        return Chunks(self.means, starts, counts, read, self.size, self.most, self.most_read)

    def tensors(self) -> list[Tensor]:
        """List everything held."""
        return [self.means, self.starts, self.counts, self.read]
