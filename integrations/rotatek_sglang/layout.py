"""How wide a visual row is in each layer, and what a basis takes: found by sealing random states and looking.

So what a method stores is decided in one place, `rotatek_cache.codecs`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.codecs.sealing import Sealer
from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.quantization import CodeLayout, HeadCodes
from rotatek_cache.core.segments import Stored

ROW_NUMBER_BYTES = 4
PROMPTS_IN_CHUNKS = 2  # at most: SGLang goes on with one, and may begin another where that ends


@dataclass(frozen=True)
class HeadShape:
    """The attention heads of this process, and where they stand among those of the model.

    Attributes:
        q_heads, kv_heads: query and KV heads here.
        key_width, value_width: of each.
        first_kv_head: the first KV head here.
        all_kv_heads: KV heads of the model; None if all are here.
    """

    q_heads: int
    kv_heads: int
    key_width: int
    value_width: int
    first_kv_head: int = 0
    all_kv_heads: int | None = None

    @classmethod
    def of_rank(
        cls, q_heads: int, kv_heads: int, key_width: int, value_width: int, rank: int, size: int
    ) -> "HeadShape":
        """Name the heads of process `rank` of `size` that share a model; those without a KV head share one."""
        return cls(q_heads // size, max(1, kv_heads // size), key_width, value_width, rank * kv_heads // size, kv_heads)

    @property
    def kv_slice(self) -> slice | None:
        """The KV heads that are here; None if all are."""
        if self.all_kv_heads in (None, self.kv_heads):
            return None
        return slice(self.first_kv_head, self.first_kv_head + self.kv_heads)


@dataclass(frozen=True)
class StateLayout:
    """The stored form of the visual Keys, or Values, of one layer, in all heads of this process.

    Attributes:
        heads: how many there are.
        width: numbers, or bytes of codes, per token.
        dtype: of what is stored.
        code: how codes are packed; None if numbers are stored alike in all heads.
        ranks: coefficients of each head; dense states have D.
        shared: the decoder ``[H, 1, D, r]`` of the model; None if each basis has its own, or there is none.
        tables: what a basis has of its own: by attribute of `KeyBasis`, the shape per head and the dtype.
    """

    heads: int
    width: int
    dtype: torch.dtype
    code: CodeLayout | HeadCodes | None
    ranks: tuple[int, ...]
    shared: Tensor | None
    tables: dict[str, tuple[tuple[int, ...], torch.dtype]]

    @classmethod
    def of(cls, stored: Stored) -> "StateLayout":
        """Read the layout off what a seal stored; a ValueError where a pool cannot hold it."""
        basis, code = stored.basis if stored.basis is not None else KeyBasis(), stored.code
        if not (code is None or isinstance(code, CodeLayout | HeadCodes)) or basis.is_diagonal:
            raise ValueError(
                "a pool holds coefficients of a rotated basis, dense states, or codes with a range per channel; this "
                f"codec stores {type(code).__name__ if code is not None else 'scaled channels'}: choose another basis"
            )
        held = {name: getattr(basis, name) for name in ("B", "scale", "delta")}
        tables = {
            name: (tuple(tensor.shape[2:]), tensor.dtype)
            for name, tensor in held.items()
            if tensor is not None and not (basis.shared and name == "B")
        }
        if isinstance(code, HeadCodes):
            heads, width, ranks = len(code.parts), sum(code.widths), tuple(part.channels for part in code.parts)
        else:
            heads = stored.data.shape[0]
            width, ranks = heads * stored.data.shape[-1], (stored.channels,) * heads
        # One row of the calibrated decoder is all of it; a copy would keep the probe alive.
        shared = basis.B[:, :1] if basis.shared and basis.B is not None else None
        return cls(heads, width, stored.data.dtype, code, ranks, shared, tables)

    @property
    def is_dense(self) -> bool:
        """Whether states are stored as they are."""
        return self.shared is None and "B" not in self.tables

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.width * self.dtype.itemsize

    @property
    def basis_bytes(self) -> int:
        """Bytes that one basis adds."""
        return self.heads * sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tables.values())


@dataclass(frozen=True)
class LayerLayout:
    """Keys and Values of the visual tokens of one layer."""

    keys: StateLayout
    values: StateLayout


@dataclass(frozen=True)
class CacheLayout:
    """All layers, and the bytes that follow."""

    heads: HeadShape
    dtype: torch.dtype
    layers: tuple[LayerLayout, ...]

    @property
    def text_bytes(self) -> int:
        """Bytes of a text token: what a dense cache takes."""
        numbers = self.heads.key_width + self.heads.value_width
        return self.heads.kv_heads * numbers * self.dtype.itemsize * len(self.layers)

    @property
    def visual_bytes(self) -> int:
        """Bytes of a visual token, without its basis."""
        return sum(layer.keys.token_bytes + layer.values.token_bytes for layer in self.layers)

    @property
    def basis_bytes(self) -> int:
        """Bytes of one basis."""
        return sum(layer.keys.basis_bytes + layer.values.basis_bytes for layer in self.layers)

    def window_bytes(self, sealers: Sequence[Sealer]) -> int:
        """Count the bytes of the queries that are kept of a prompt until its last chunk is there."""
        numbers = self.heads.q_heads * self.heads.key_width
        return sum(s.options.query_window * numbers * self.dtype.itemsize for s in sealers if s.calibrated is None)

    def ranks(self) -> str:
        """Write the ranks of the Keys and Values, over layers and heads."""

        def span(parts: Sequence[StateLayout], width: int) -> str:
            ranks = sorted({rank for part in parts for rank in part.ranks})
            text = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            return f"{text} of {width}"

        keys, values = [layer.keys for layer in self.layers], [layer.values for layer in self.layers]
        return f"Keys {span(keys, self.heads.key_width)}, Values {span(values, self.heads.value_width)}"


def check_heads(sealer: Sealer, heads: HeadShape) -> None:
    """Raise a ValueError if the layer's calibrated basis, where there is one, is for heads of another shape."""
    if sealer.calibrated is None:
        return
    for which, width in (("key", heads.key_width), ("value", heads.value_width)):
        count, found = sealer.calibrated.state(sealer.layer, which).encoder.shape[:2]
        if (count, found) != (heads.kv_heads, width):
            raise ValueError(
                f"basis file {sealer.options.basis} was calibrated on another model: in layer {sealer.layer} it has "
                f"{count} {which} heads of width {found}, where this one has {heads.kv_heads} of width {width}"
            )


def find_layout(
    sealers: Sequence[Sealer], heads: HeadShape, dtype: torch.dtype, device: torch.device | str
) -> CacheLayout:
    """Find the layout that the sealers of the layers give for states of these shapes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)

    tokens = 2 * max(heads.key_width, heads.value_width)
    keys = random(heads.kv_heads, tokens, heads.key_width)
    values = random(heads.kv_heads, tokens, heads.value_width)
    queries = random(1, heads.q_heads, 4, heads.key_width)
    found = []
    for sealer in sealers:
        check_heads(sealer, heads)
        stored_keys = sealer.store_keys(keys, [(0, tokens)], queries, None)
        stored_values = sealer.store_values(values, [(0, tokens)])
        found.append(LayerLayout(StateLayout.of(stored_keys), StateLayout.of(stored_values)))
    return CacheLayout(heads, dtype, tuple(found))


@dataclass(frozen=True)
class Plan:
    """A division of memory, decided before the pool is made.

    Attributes:
        sealers: of the layers.
        layout: what a token takes.
        text_share: share of the slots that have a text row.
        bases: how many bases fit.
        fixed_bytes: what does not grow with the slots.
    """

    sealers: Sequence[Sealer]
    layout: CacheLayout
    text_share: float
    bases: int
    fixed_bytes: int

    @classmethod
    def make(
        cls,
        sealers: Sequence[Sealer],
        layout: CacheLayout,
        text_share: float,
        bases: int,
        requests: int,
        context: int,
        tables: int = 1,
    ) -> "Plan":
        """Plan for so many requests at once, of up to `context` tokens each, whose rows stand in so many tables."""
        rows = tables * requests * context * ROW_NUMBER_BYTES
        fixed = bases * layout.basis_bytes + rows + PROMPTS_IN_CHUNKS * layout.window_bytes(sealers)
        return cls(sealers, layout, text_share, bases, fixed)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot on average, rounded up."""
        text, visual = self.layout.text_bytes, self.layout.visual_bytes
        row_numbers = 3 * ROW_NUMBER_BYTES  # of the slot table, the stacks of free rows and the basis of a row
        return math.ceil(self.text_share * text + (1 - self.text_share) * visual) + row_numbers

    def rows(self, slots: int) -> tuple[int, int]:
        """Divide so many slots into (text rows, visual rows)."""
        text = min(slots, max(1, round(self.text_share * slots)))
        return text, slots - text


class Worth:
    """Whether so many visual tokens, sealed together, take fewer bytes compressed than dense, in all layers."""

    def __init__(self, layout: CacheLayout, sealers: Sequence[Sealer]) -> None:
        self.layout, self.sealers = layout, sealers
        self.known: dict[int, bool] = {}

    def __call__(self, tokens: int) -> bool:
        """Answer for a number of tokens."""
        if tokens not in self.known:
            heads, dtype = self.layout.heads, self.layout.dtype
            # With `energy` the ranks follow from the basis; all else the sealer knows.
            self.known[tokens] = tokens > 0 and all(
                sealer.is_worth(
                    tokens,
                    heads.key_width,
                    heads.value_width,
                    dtype,
                    None if sealer.options.energy is None else math.ceil(sum(part.keys.ranks) / len(part.keys.ranks)),
                )
                for sealer, part in zip(self.sealers, self.layout.layers, strict=True)
            )
        return self.known[tokens]
