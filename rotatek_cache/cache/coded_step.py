"""A decode step of fixed addresses over layers whose tokens are all coded; see `rotatek_cache.cache.decode_step`.

What a step writes is the same however often it is run before the device moves on, so that a capture may warm up.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.cache.coded_layer import CodedKV
from rotatek_cache.cache.token_counts import DENSE_COLUMNS, TokenCounts, dense_column
from rotatek_cache.codecs.token_rows import SINK_TOKENS
from rotatek_cache.core.precision import without_autocast
from rotatek_cache.core.row_layout import LENGTH
from rotatek_cache.core.segments import RESERVED, RESERVED_STEP, SegmentView


class CountsOnDevice:
    """Where the next token of each row goes, at addresses that stay; shared by the layers.

    Attributes:
        counts: int64 ``[B]``, tokens of each row before it.
        column, code_column: int64 ``[B]``, its columns of the dense buffer and of the codes.
        dense_lengths, code_lengths: int32 ``[B]``, what attention reads, the next token included.
        at: the counts on the host; None if they are not known to agree.
    """

    def __init__(self, counts: TokenCounts) -> None:
        self.counts = counts.on_device.clone()
        self.batch = counts.batch
        self.column, self.code_column = torch.zeros_like(self.counts), torch.zeros_like(self.counts)
        self.dense_lengths = torch.zeros_like(self.counts, dtype=LENGTH)
        self.code_lengths = torch.zeros_like(self.dense_lengths)
        self.at: tuple[int, ...] | None = counts.rows
        self._follow()

    def _follow(self) -> None:
        """Write what follows from the counts."""
        self.column.copy_(dense_column(self.counts))
        self.code_column.copy_((self.counts - SINK_TOKENS).clamp(min=0))
        self.dense_lengths.copy_((self.counts + 1).clamp(max=DENSE_COLUMNS))
        self.code_lengths.copy_((self.counts + 1 - DENSE_COLUMNS).clamp(min=0))

    def refresh(self, counts: TokenCounts) -> None:
        """Write the counts of the host where they differ."""
        if self.at != counts.rows:
            self.at = counts.rows
            self.counts.copy_(counts.on_device)
            self._follow()

    def advance_on_device(self) -> None:
        """Count one more token of each row; part of what is captured."""
        self.counts.add_(1)
        self._follow()


@dataclass(eq=False)
class CodedLayerStep:
    """One layer in a decode step of fixed addresses.

    Attributes:
        layer: the layer.
        dense: Keys and Values ``[H, B, DENSE_COLUMNS, D]`` that it writes.
        codes: what it writes of their codes.
        places: where.
        capacity: columns of the codes.
        views: what attention reads.
    """

    layer: CodedKV
    dense: list[Tensor]
    codes: list[Tensor]
    places: CountsOnDevice
    capacity: int
    views: list[SegmentView]

    @property
    def keys(self) -> Tensor:
        """Something of the layer on its device."""
        return self.dense[0]

    @without_autocast
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write ``[B, H, 1, D]`` and ``[B, H, 1, D_v]`` to the columns that the device knows."""
        places = self.places
        slots = places.batch * self.capacity + places.code_column
        for held, codes, codec, new in zip(self.dense, self.codes, self.layer.codecs, (keys, values), strict=True):
            states = new[:, :, 0].transpose(0, 1).to(held.dtype)
            codec.write(codes, slots, states)
            held.index_put_((_all_heads(held), places.batch, places.column), states)

    def fits(self) -> bool:
        """Say whether the layer still is what this step was made of, with a free column."""
        layer = self.layer
        return (
            layer.fresh is None
            and layer.counts is not None
            and len(layer.counts.rows) == len(self.places.batch)
            and layer.counts.step_columns <= self.capacity
            and all(now is then for now, then in zip(layer.dense_states, self.dense, strict=True))
            and all(now.data is then for now, then in zip(layer.codes, self.codes, strict=True))
        )


def _all_heads(held: Tensor) -> Tensor:
    return torch.arange(len(held), device=held.device)[:, None]


class CodedStep:
    """All layers of a cache of coded tokens in a decode step of fixed addresses.

    Args:
        layers: of one cache, none of them waiting for its attention. Their codes get free columns first.
    """

    def __init__(self, layers: Sequence[CodedKV]) -> None:
        for layer in layers:
            layer.reserve_steps(RESERVED, RESERVED_STEP)
        assert layers[0].counts is not None
        self.places = CountsOnDevice(layers[0].counts)
        self.layers = [self._layer(layer) for layer in layers]

    def _layer(self, layer: CodedKV) -> CodedLayerStep:
        places, codes = self.places, [buffer.data for buffer in layer.codes]
        capacity = layer.codes[0].capacity
        views = layer.fixed_views(places.code_lengths, places.dense_lengths)
        return CodedLayerStep(layer, list(layer.dense_states), codes, places, capacity, views)

    def fits(self) -> bool:
        """Say whether the cache still lies where this step reads and writes it, with a column for another token."""
        return all(layer.fits() for layer in self.layers)

    def belongs_to(self, layers: Sequence[CodedKV]) -> bool:
        """Say whether these are the layers that it was made of, not reset since."""
        return all(
            held.layer is layer and bool(layer.dense_states) and held.dense[0] is layer.dense_states[0]
            for held, layer in zip(self.layers, layers, strict=True)
        )

    def refresh(self) -> None:
        """Write what has changed since the last step (rows selected, tokens appended otherwise) into its tensors."""
        counts = self.layers[0].layer.counts
        assert counts is not None
        self.places.refresh(counts)

    def advance_on_device(self) -> None:
        """Let the next step write the next columns; captured as the end of the step."""
        self.places.advance_on_device()

    def run(self, replay: Callable[[], None]) -> None:
        """Let `replay` take a token on the device, and note it on the host."""
        self.places.at = None  # should this be interrupted, the next step writes the counts anew
        replay()
        for held in self.layers:
            held.layer.count_step()
        counts = self.layers[0].layer.counts
        assert counts is not None
        self.places.at = counts.rows

    def shows_all(self, mask: Tensor) -> bool:
        """Say whether a mask ``[B, T]`` hides nothing that is stored (padding is not). Waits for the device."""
        return self.layers[0].layer.positions.shows_own(mask.bool())

    def form(self) -> Hashable:
        """Say all that a captured graph has frozen but addresses: two steps of one form may share a graph."""
        return tuple(
            (
                tuple((tuple(held.shape), held.dtype, held.device) for held in (*layer.dense, *layer.codes)),
                layer.capacity,
                tuple((codec.code, id(codec.state)) for codec in layer.layer.codecs),  # read where they lie
            )
            for layer in self.layers
        )

    def take_over(self, layers: Sequence[CodedKV]) -> None:
        """Let other layers of the same `form` live where this step reads, whose own are not needed any more."""
        for held, layer in zip(self.layers, layers, strict=True):
            for mine, theirs in zip(layer.dense_states, held.dense, strict=True):
                theirs.copy_(mine)
            layer.dense_states = list(held.dense)
            for buffer, codes in zip(layer.codes, held.codes, strict=True):
                codes.copy_(buffer.data)
                buffer.data = codes
            held.layer = layer
        self.refresh()

    @property
    def is_private(self) -> bool:
        """Whether no copy of the cache shares what it stores: copies have storage of their own."""
        return True
