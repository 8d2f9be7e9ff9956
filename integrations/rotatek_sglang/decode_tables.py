"""Where the tokens of a batch that decodes lie: made anew for each step, or in buffers that a CUDA graph reads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rotatek_sglang.rows import Segment
from rotatek_sglang.storage import SegmentTable, VisualTable

GRAPH_SEGMENTS = 4  # visual segments of a request in a CUDA graph, each of which costs every step a little
NOTHING = Segment(0, 0, 0)


def count_segments(held: Sequence[Sequence[Segment]]) -> int:
    """Count the visual segments of the request that has most."""
    return max(map(len, held), default=0)


def padded(
    lengths: Sequence[int], held: Sequence[Sequence[Segment]], batch: int
) -> tuple[list[int], list[Sequence[Segment]]]:
    """Fill lengths and visual segments up to `batch` with rows that are no requests: one token in text row 0."""
    spare = batch - len(held)
    return [*lengths, *[1] * spare], [*held, *[[]] * spare]


def segment_numbers(
    held: Sequence[Sequence[Segment]], lengths: Sequence[int], segments: int, pin: bool
) -> tuple[Tensor, Tensor]:
    """Return the part of a `SegmentTable` that speaks of requests, on the host.

    Args:
        held: the visual segments of each request, at most `segments`.
        lengths: tokens of each request, visual ones included.
        segments: how many visual segments the table has.
        pin: whether to keep them where a GPU reads them without a wait.

    Returns:
        int64 ``[2 * segments + 1, B]``, start and basis of each segment and start of the text; and int32
        ``[segments + 1, B]``, the lengths of each.
    """
    visual = [sum(segment.count for segment in each) for each in held]
    places, counts = [], []
    for position in range(segments):
        column = [each[position] if position < len(each) else NOTHING for each in held]
        places += [[segment.first for segment in column], [segment.basis for segment in column]]
        counts.append([segment.count for segment in column])
    places.append(visual)
    counts.append([length - own for length, own in zip(lengths, visual, strict=True)])
    return (
        torch.tensor(places, dtype=torch.int64, device="cpu", pin_memory=pin),
        torch.tensor(counts, dtype=torch.int32, device="cpu", pin_memory=pin),
    )


def segment_table(
    slots: Tensor, places: Tensor, counts: Tensor, visual_max: Sequence[int], text_max: int
) -> SegmentTable:
    """Make the table that says this.

    Args:
        slots: int32 ``[B, n]`` rows, visual tokens first.
        places, counts: of `segment_numbers`, on the device.
        visual_max: bounds of the segments' lengths.
        text_max: bound of the text's.
    """
    visual = tuple(
        VisualTable(places[2 * index], counts[index], places[2 * index + 1], longest)
        for index, longest in enumerate(visual_max)
    )
    return SegmentTable(slots, visual, places[-1], counts[-1], text_max)


def table_of(
    rows_of: Tensor, indices: Tensor, held: Sequence[Sequence[Segment]], lengths: Sequence[int]
) -> SegmentTable:
    """Make a table of the tokens ``: lengths[b]`` of requests.

    Args:
        rows_of: int32 ``[requests, n]``, the rows of each request.
        indices: int64 ``[B]``, which of them.
        held: their visual segments.
        lengths: their tokens.
    """
    segments = count_segments(held)
    places, counts = segment_numbers(held, lengths, segments, pin=rows_of.is_cuda)
    visual_max = [max(len(each) > i and each[i].count for each in held) for i in range(segments)]
    text_max = int(counts[-1].max())
    places, counts = (numbers.to(rows_of.device, non_blocking=True) for numbers in (places, counts))
    return segment_table(rows_of[indices, : max(lengths)], places, counts, visual_max, text_max)


class GraphTables:
    """Buffers of fixed place and shape for batches of up to `most_requests`, filled before each step.

    What is computed on the device from other fixed buffers belongs into the graph (`gather`); what comes from the host
    does not (`fill`). Bounds of lengths are those of the pools, so that one graph serves every step.

    Attributes:
        new_rows: int64 ``[most_requests]``, the text row of each request's new token.
    """

    def __init__(self, most_requests: int, rows_of: Tensor, visual_rows: int, text_rows: int) -> None:
        device, context = rows_of.device, rows_of.shape[1]
        self.rows_of = rows_of
        self.visual_max = [min(context, visual_rows)] * GRAPH_SEGMENTS
        self.text_max = min(context, text_rows)
        self.places = torch.zeros(2 * GRAPH_SEGMENTS + 1, most_requests, dtype=torch.int64, device=device)
        self.counts = torch.zeros(GRAPH_SEGMENTS + 1, most_requests, dtype=torch.int32, device=device)
        self.new_rows = torch.zeros(most_requests, dtype=torch.int64, device=device)
        self.slots = torch.zeros(most_requests, context, dtype=torch.int32, device=device)

    def fill(self, held: Sequence[Sequence[Segment]], lengths: Sequence[int]) -> None:
        """Say where the tokens of the batch are."""
        batch = len(held)
        places, counts = segment_numbers(held, lengths, GRAPH_SEGMENTS, pin=self.slots.is_cuda)
        self.places[:, :batch].copy_(places, non_blocking=True)
        self.counts[:, :batch].copy_(counts, non_blocking=True)

    def gather(self, slot_rows: Tensor, new_slots: Tensor, indices: Tensor, lengths: Tensor) -> None:
        """Look up the rows of the new tokens and of all others.

        Args:
            slot_rows: int32 ``[slots]``, the table slot -> row.
            new_slots: int64 ``[B]``, of the new tokens.
            indices: int64 ``[B]``, the requests' numbers.
            lengths: int64 ``[B]``, with the new tokens.
        """
        batch = len(indices)
        new_rows = self.new_rows[:batch]
        new_rows.copy_(slot_rows[new_slots])
        self.rows_of[indices, lengths - 1] = new_rows.int()
        torch.index_select(self.rows_of, 0, indices, out=self.slots[:batch])

    def table(self, batch: int) -> SegmentTable:
        """Return the first `batch` rows of the buffers."""
        return segment_table(
            self.slots[:batch], self.places[:, :batch], self.counts[:, :batch], self.visual_max, self.text_max
        )
