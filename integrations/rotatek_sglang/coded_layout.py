"""What a token, a request and a prompt's beginning take where all tokens are coded; decided before the pool is made."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rotatek_cache.codecs.token_rows import RECENT_TOKENS, SINK_TOKENS, TokenRows, token_rows
from rotatek_cache.options import FitOptions
from rotatek_sglang.coded_storage import DecodeTables
from rotatek_sglang.layout import ROW_NUMBER_BYTES, HeadShape

BEGINNINGS_PER_REQUEST = 4  # most of them for prompts that are only cached


@dataclass(frozen=True)
class CodedPlan:
    """The pool for `requests` at once, of up to `context` tokens, and `beginnings` of prompts.

    Attributes:
        rows: how Keys and Values of each layer become rows.
        heads: those of this process.
        dtype: of the model.
        requests: that run at once.
        beginnings: prompts, running or cached, that have no first tokens in common.
        context: tokens of a request.
        device: where all is.
    """

    rows: Sequence[tuple[TokenRows, TokenRows]]
    heads: HeadShape
    dtype: torch.dtype
    requests: int
    beginnings: int
    context: int
    device: str

    @classmethod
    def make(
        cls,
        fit: FitOptions,
        layers: range,
        heads: HeadShape,
        dtype: torch.dtype,
        requests: int,
        beginnings: int | None,
        context: int,
        device: str,
    ) -> "CodedPlan":
        """Make the plan of these layers; a ValueError where the basis file does not fit them or is without text."""
        rows = []
        for index in layers:
            pair = token_rows(fit, index, "key", heads.kv_slice), token_rows(fit, index, "value", heads.kv_slice)
            for name, found, width in zip(("Key", "Value"), pair, (heads.key_width, heads.value_width), strict=True):
                if (found.heads, found.width) != (heads.kv_heads, width):
                    raise ValueError(
                        f"basis file {fit.basis} was calibrated on another model: in layer {index} it has "
                        f"{found.heads} {name} heads of width {found.width}, where this one has {heads.kv_heads} of "
                        f"width {width}"
                    )
            rows.append(pair)
        return cls(rows, heads, dtype, requests, beginnings or BEGINNINGS_PER_REQUEST * requests, context, device)

    @property
    def dense_bytes(self) -> int:
        """Bytes of a token in a dense cache."""
        numbers = self.heads.key_width + self.heads.value_width
        return self.heads.kv_heads * numbers * self.dtype.itemsize * len(self.rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's row in all layers."""
        stored = (rows.storage(self.dtype) for pair in self.rows for rows in pair)
        return sum(sum(widths) * dtype.itemsize for widths, dtype in stored)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: the row, and the number of its row among the sinks."""
        return self.row_bytes + ROW_NUMBER_BYTES

    @property
    def rings(self) -> int:
        """Rings: one for each request and one for padding."""
        return self.requests + 1

    @property
    def sinks(self) -> int:
        """Dense rows for sinks."""
        return self.beginnings * SINK_TOKENS

    @property
    def ring_bytes(self) -> int:
        """Bytes of one ring."""
        return RECENT_TOKENS * self.dense_bytes

    @property
    def basis_bytes(self) -> int:
        """Bytes of the bases of the model, in the file's precision and as attention reads them."""
        where = torch.empty(0, dtype=torch.uint8, device=self.device).device
        tensors = []
        for pair in self.rows:
            for rows in pair:
                basis = rows.basis(self.dtype, where)
                tensors += [*rows.state.encoder_around(where), basis.B, basis.delta]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def fixed_bytes(self) -> int:
        """Bytes that do not grow with the slots."""
        dense_rows = self.rings * RECENT_TOKENS + self.sinks + 1
        tables = sum(tensor.nbytes for tensor in DecodeTables(self.requests, self.context, "meta").tensors())
        return dense_rows * self.dense_bytes + self.sinks * ROW_NUMBER_BYTES + tables + self.basis_bytes

    def dense_tokens(self, slots: int) -> int:
        """Count the tokens that a dense cache holds in the bytes of a pool of so many slots."""
        return (slots * self.slot_bytes + self.fixed_bytes) // self.dense_bytes

    def bits(self) -> str:
        """Write the bits per channel of Keys and Values, as they came out."""
        said = []
        for which, name in enumerate(("Keys", "Values")):
            parts = [pair[which] for pair in self.rows]
            stored = sum(sum(widths) * dtype.itemsize for widths, dtype in (p.storage(self.dtype) for p in parts))
            said.append(f"{name} {8 * stored / sum(part.heads * part.width for part in parts):.3g}")
        return ", ".join(said)
