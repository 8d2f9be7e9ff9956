"""Rows of tokens: states coded around the model's own mean, so that a row follows from its token's states alone.

A pool that all requests share, or a cache that grows token by token, uses it like this, once per layer and for Keys and
Values each::

    rows = token_rows(FitOptions(basis=file, text="coded", bits=4), layer, "key", heads)
    widths, dtype = rows.storage(states.dtype)   # elements that a token takes in each head, and their dtype
    pool = torch.zeros(len(widths), slots, widths[0], dtype=dtype)
    rows.write(pool, slot, states)               # states [H, N, D], after RoPE, to int64 slots [N]
    basis = rows.basis(states.dtype, device)     # B [H, 1, D, r], delta [H, 1, D]: the model's, no request's
    SegmentView(pool, ..., basis=basis, basis_rows=torch.zeros(B, int64), key_code=rows.view_code, ...)

`encode` is stateless: no range, mean or basis of a request, no read on the host, alike for one token and for many, so
that it may be captured in a graph. Where `rows.code` is a `HeadCodes` (`allocation` "heads"), a pool of N slots is
flat, ``[N * sum(widths)]``; otherwise all widths are the same. Ranges are the file's, per coefficient: nothing but
codes is stored, and kernels read them as they read calibrated codes.

What attention reads of a prompt is for its cache to decide. Here and in `rotatek_cache.cache.coded_layer`: the first
`SINK_TOKENS` of a row are dense and never coded; its last `RECENT_TOKENS` are dense beside their codes. A query that
comes alone sees itself and the `RECENT_TOKENS - 1` before it dense, and codes of those before; queries that come
together (a chunk of a prompt) see the `RECENT_TOKENS` before the chunk and the chunk itself dense.
"""

from typing import Literal

import torch
from torch import Tensor

from rotatek_cache.codecs.basis_file import load_basis
from rotatek_cache.codecs.interface import KeyCodec, Ranges, StateOptions
from rotatek_cache.codecs.shared_basis import HeadBudget
from rotatek_cache.core.basis import KeyBasis, coded_delta_dtype, compute_dtype
from rotatek_cache.core.quantization import (
    CHANNEL_BLOCK,
    CodeLayout,
    HeadCodes,
    Numbers,
    pack_coefficients,
)
from rotatek_cache.core.segments import Stored
from rotatek_cache.options import UNIFORM, WHOLE_BITS, FitOptions

SINK_TOKENS = 4  # of a row, its first: attention sinks, whose states lie far from all others
RECENT_TOKENS = 64


class TokenRows(KeyCodec):
    """Stores any tokens as codes in the file's basis around the file's mean."""

    def __init__(self, wanted: StateOptions) -> None:
        super().__init__(wanted)
        self.kind: Literal["token_key", "token_value"] = "token_key" if wanted.kind == "key" else "token_value"
        file = load_basis(wanted.options.basis)
        self.file = file if wanted.heads is None else file.of_heads(wanted.heads)
        self.state = self.file.state(wanted.layer, self.kind)
        self.heads, self.width = self.state.encoder.shape[:2]
        self.code = self._code()
        self.view_code = None if isinstance(self.code, Numbers) else self.code

    def _code(self) -> CodeLayout | HeadCodes | Numbers:
        wanted = self.wanted
        bits = wanted.options.row_bits[0 if wanted.kind == "key" else 1]
        if self.width % CHANNEL_BLOCK:
            raise ValueError(f"text='coded' needs a head width that is a multiple of {CHANNEL_BLOCK}, got {self.width}")
        if bits == WHOLE_BITS:
            return self.file.code(wanted.layer, self.kind, None, HeadBudget(rank=self.width), UNIFORM)
        least = 2 * CHANNEL_BLOCK  # the narrowest block of channels that can be kept
        budget = int(bits * self.width)
        if budget < least:
            raise ValueError(
                f"bits={bits:g} of {wanted.kind}s leaves {budget} bits for a token of head width {self.width}: give at "
                f"least {least / self.width:g}"
            )
        return self.file.code(wanted.layer, self.kind, "auto", HeadBudget(bits=budget), wanted.options.allocation)

    def storage(self, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        """Give the elements that a token takes in each head, and their dtype, for states of `dtype`."""
        if isinstance(self.code, HeadCodes):
            return self.code.widths, torch.uint8
        return (self.code.token_width,) * self.heads, dtype if isinstance(self.code, Numbers) else torch.uint8

    def stored_bytes(self, tokens: int, width: int, dtype: torch.dtype, rank: int | None = None) -> int:
        """Count the bytes of the codes of the widest head."""
        widths, stored = self.storage(dtype)
        return tokens * max(widths) * stored.itemsize

    def encode(self, states: Tensor) -> Tensor:
        """Encode states ``[H, N, D]`` as rows ``[H, N, w]``, or as `HeadCodes` says: each follows from itself alone."""
        low, step = self.state.ranges(self.code, states.device)
        encoder, mean = self.state.encoder_around(states.device)
        wide = compute_dtype(states.dtype)
        coefficients = (states.to(wide) - mean.to(wide)[:, None]) @ encoder[..., : self.code.channels].to(wide)
        packed = pack_coefficients(coefficients, low, step, self.code)
        return packed.to(states.dtype) if isinstance(self.code, Numbers) else packed

    def basis(self, dtype: torch.dtype, device: torch.device, rows: int = 1) -> KeyBasis:
        """Give what rows mean to queries of `dtype`: a basis of the model, one for all of `rows` sequences."""
        key = ("rows", self.code, dtype, device, rows)
        return self.state.remembered(key, lambda: self._basis(dtype, device, rows))

    def _basis(self, dtype: torch.dtype, device: torch.device, rows: int) -> KeyBasis:
        decoder, shift = self.state.scaled_decoder(self.code, "auto", dtype, device)
        _, mean = self.state.encoder_around(device)
        delta = (mean + shift).to(coded_delta_dtype(dtype))
        return KeyBasis(
            B=decoder[:, None].expand(-1, rows, -1, -1),
            delta=delta[:, None].expand(-1, rows, -1),
            fitted_rank=self.code.channels,
            shared=True,
            delta_shared=True,
        )

    def write(self, pool: Tensor, slots: Tensor, states: Tensor) -> None:
        """Encode states ``[H, N, D]`` into int64 `slots` ``[N]`` of a pool ``[H, S, w]``, or as `HeadCodes` says."""
        rows = self.encode(states)
        if isinstance(self.code, HeadCodes):
            for held, head in zip(self.code.split(pool), self.code.split(rows), strict=True):
                held.index_copy_(1, slots, head)
        else:
            pool.index_copy_(1, slots, rows)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rebuild states ``[H, N, D]`` from rows, as attention in `dtype` reads them."""
        code = self.code
        numbers = code.unpack(code.split(rows)) if isinstance(code, HeadCodes) else code.unpack(rows)
        return self.basis(dtype, rows.device).reconstruct(numbers[:, None])[:, 0].to(dtype)

    def store(
        self, states: Tensor, ranges: Ranges, queries: Tensor | None = None, valid: Tensor | None = None
    ) -> Stored:
        """Store packed states ``[H, N, D]``, whatever rows they belong to."""
        self.expect_finite(states)
        return Stored(self.encode(states), self.basis(states.dtype, states.device, len(ranges)), self.view_code)


def token_rows(options: FitOptions, layer: int, kind: Literal["key", "value"], heads: slice | None = None) -> TokenRows:
    """Make the codec of a layer's Keys or Values; a ValueError where the file has no text, or bits are too few.

    Args:
        options: with ``text="coded"``.
        layer: of the model, from 0.
        kind: which states.
        heads: which of the layer's KV heads come; None if all do.
    """
    return TokenRows(StateOptions(options, kind, layer, heads))
