"""`Answer`: the tokens that decoding adds to a layer, held in a bounded run of its text columns.

A token that comes alone behind a prompt is one of an answer. Its columns stand where those of any text stand, at the
end of the buffers; when there are `cap` of them, a method chooses which stay, in each head others, and these move
together in place. Nothing is read on the host for it: all numbers of columns follow from how many tokens came.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rotatek_cache.cache.visual_positions import seen_by_mask
from rotatek_cache.core.forward_tables import ForwardTables
from rotatek_cache.core.row_layout import POSITION, Alignment, column_positions
from rotatek_cache.core.segments import TextSegment
from rotatek_cache.token_pruning.decoded import DecodedMethod
from rotatek_cache.token_pruning.registry import decoded_method


@dataclass
class Answer:
    """The answer that a layer holds last, and what has gone of earlier ones.

    Attributes:
        method: chooses what stays.
        readers: layers that attend to the layer's Keys.
        begin: logical position of the first token of the answer that is being given; None: none is.
        first: its text column.
        gone: of each answer that lost tokens, the logical positions among which they were (first, end), and how many.
            Which ones differs by head.
        queries: those of the last tokens, ``[readers, B, H_q, window, D]``; that of position p is in slot
            ``p % window``.
        scale: factor on the logits.
        slots: logical position of the query in each slot; -1: none.
        reads: how many layers have attended with the query of the token that came last; None: it is none of an answer.
    """

    method: DecodedMethod
    readers: int = 1
    begin: int | None = None
    first: int = 0
    gone: list[tuple[int, int, int]] = field(default_factory=list)
    queries: Tensor | None = None
    scale: float = 1.0
    slots: list[int] = field(default_factory=list)
    reads: int | None = None

    @classmethod
    def by_name(cls, method: str, readers: int) -> "Answer":
        """Make the answers of a layer that so many layers read, by the name and settings of their method."""
        return cls(decoded_method(method), readers)

    def make_room(self, text: TextSegment, position: int, forward: ForwardTables) -> None:
        """Begin an answer at a logical position if none is being given; evict tokens where no column is free."""
        if self.begin is None:
            self.begin, self.first = position, text.length
            text.most = text.length + self.method.cap
        if text.length - self.first >= self.method.cap:
            self._evict(text, position, forward)

    def close(self, text: TextSegment) -> None:
        """Note that the answer has ended: what comes next is read, not decoded."""
        self.begin, self.reads, text.most = None, None, None

    def _evict(self, text: TextSegment, position: int, forward: ForwardTables) -> None:
        assert text.keys is not None
        assert self.queries is not None
        assert self.begin is not None
        method, window = self.method, self.method.window
        keys = text.keys[:, :, self.first : text.length].transpose(0, 1)  # [B, H, n, D]
        batch, heads, tokens, _ = keys.shape
        queries = self.queries.roll(-(position % window), 3)  # the oldest first
        visible = torch.ones(window, tokens, dtype=torch.bool, device=keys.device).tril(tokens - window)
        known = [place for place in range(window) if position - window + place in self.slots]
        if len(known) < window:  # after a crop, the oldest are not
            queries, visible = queries[:, :, :, known], visible[known]
        queries = queries.unflatten(2, (heads, -1)).permute(1, 2, 0, 3, 4, 5).flatten(2, 3).float() * self.scale
        chosen = method.choose(keys, queries, visible)
        last = torch.arange(tokens - window, tokens, device=keys.device).expand(batch, heads, -1)
        kept = torch.cat([chosen, last], 2).transpose(0, 1)
        alignment = forward.made(
            ("evicted", text.alignment, text.length, self.first, keys.device),
            lambda: self._alignment(text, batch, position),
        )
        text.compact(self.first, kept, alignment)
        self.gone = [one for one in self.gone if one[0] != self.begin]
        self.gone.append((self.begin, position - window, position - self.begin - method.kept))

    def _alignment(self, text: TextSegment, batch: int, position: int) -> Alignment:
        """Lay out the columns that stay. Those before the window all have the answer's first position.

        Which token each of them is differs by head; that they are of the answer is all that masks ask.
        """
        assert text.keys is not None
        assert self.begin is not None
        before = column_positions(text.alignment, text.length, batch, text.keys.device)
        loose = before.new_full((batch, self.method.kept - self.method.window), self.begin)
        positions = torch.cat([before[:, : self.first], loose, before[:, text.length - self.method.window :]], 1)
        first = None if text.alignment is None else text.alignment.first
        return Alignment(positions.to(POSITION), first, position)

    def note(self, position: int) -> None:
        """Note that the query of a position is in its slot."""
        if not self.slots:
            self.slots = [-1] * self.method.window
        self.slots[position % self.method.window] = position

    def take(self, query: Tensor, scale: float, position: int) -> None:
        """Keep the query ``[B, H_q, 1, D]`` of the token at a position, of the next of the layer's readers."""
        if self.reads is None:
            return
        if self.queries is None or self.queries.shape[1] != query.shape[0]:
            shape = (self.readers, *query.shape[:2], self.method.window, query.shape[-1])
            self.queries, self.slots = query.new_zeros(shape), []
        elif self.queries.is_inference() and not torch.is_inference_mode_enabled():
            self.queries = self.queries.clone()
        self.queries[self.reads % self.readers, :, :, position % self.method.window] = query[:, :, -1]
        self.reads, self.scale = self.reads + 1, scale
        self.note(position)

    def check_mask(self, mask: Tensor, forward: ForwardTables) -> None:
        """Raise a ValueError where a mask ``[B or 1, 1, Q, T]`` shows some of an answer and hides some of it.

        A mask is read once in a forward; that of a decode step on CUDA is not, or the host would wait.
        """
        if not self.gone or (mask.is_cuda and mask.shape[2] == 1):
            return
        ranges = tuple((begin, end) for begin, end, _ in self.gone)
        forward.made(("gone", ranges, id(mask)), lambda: _check_ranges(ranges, seen_by_mask(mask[:, 0]), mask))

    def check_crop(self, length: int) -> None:
        """Raise a ValueError where a crop to `length` tokens would need to know which tokens each head has kept."""
        for begin, end, _ in self.gone:
            if begin < length < end:
                raise ValueError(
                    f"crop to {length} tokens: of positions {begin} to {end - 1} of an answer, each head has kept "
                    f"others, at most {self.method.cap} (decoded): crop to {begin}, before the answer, or to {end} or "
                    "more"
                )

    def truncate(self, text: TextSegment, columns: int, length: int, removed: int) -> None:
        """Forget `removed` logical positions, from `length` on, after the text has, which had so many `columns`."""
        self.gone = [one for one in self.gone if one[0] < length]
        self.slots = [position if position < length else -1 for position in self.slots]
        if self.begin is not None and length <= self.begin:
            self.close(text)
        elif self.begin is not None:
            self.first = text.length - (columns - self.first - removed)  # padding in front may have gone, too

    def select_rows(self, index: Tensor) -> None:
        """Let batch row b be what row ``index[b]`` was."""
        if self.queries is None:
            return
        frozen = self.queries.is_inference() and not torch.is_inference_mode_enabled()
        index = index.to(self.queries.device)
        if len(index) == self.queries.shape[1] and not frozen:
            self.queries.copy_(self.queries[:, index])  # in place, so that what writes to it finds it
        else:
            self.queries = self.queries[:, index]

    @property
    def evicted(self) -> int:
        """Tokens of answers that each head has let go."""
        return sum(count for _, _, count in self.gone)


def _check_ranges(ranges: Sequence[tuple[int, int]], seen: Tensor, mask: Tensor) -> Tensor:
    """Raise unless bool `seen` ``[..., T]`` is alike within each range of positions; returns the mask, to be held."""
    for begin, end in ranges:
        part = seen[..., begin:end]
        if not bool((part == part[..., :1]).all()):
            raise ValueError(
                f"attention_mask shows some of positions {begin} to {end - 1} and hides others: they are of an "
                "answer of which each head has kept other tokens (decoded): show or hide them together, or leave out "
                "decoded"
            )
    return mask
