"""Segments of a layer whose KV heads store tokens of their own: heads become rows of the row table.

Kernels and reference read rows of any length. A segment in which each KV head of each batch row is a row of its own
thus needs nothing new of them: one head, ``H * B`` rows, a query folded alike (`rotatek_cache.core.attention`).
"""

import dataclasses

import torch
from torch import Tensor

from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.retrieval import Chunks
from rotatek_cache.core.row_layout import LENGTH, RowLayout
from rotatek_cache.core.segments import Stored, VisualSegment
from rotatek_cache.token_pruning.interface import HeadChoice


def head_segments(segment: VisualSegment, choice: HeadChoice, layout: RowLayout, keys: Tensor) -> list[VisualSegment]:
    """Divide a segment by heads: one of those that read all they store, one of those that retrieve.

    Waits for the device, which the choice of tokens has done already.

    Args:
        segment: all visual tokens that any head stores, of all heads.
        choice: what each stores.
        layout: where the segment's tokens came from.
        keys: those that wait for the seal, ``[B, H, P, D]``.
    """
    device = segment.positions.device
    rows, columns = layout.token_rows.to(device), layout.token_columns.to(device)
    stored = choice.stored.to(device)[rows, :, columns].mT  # [H, N]
    retrieves = choice.retrieves.to(device)
    retrieved = retrieves[rows].mT
    made = []
    whole = stored & ~retrieved
    if bool(whole.any()):
        made.append(_divided(segment, whole, rows))
    chunked = stored & retrieved
    if bool(chunked.any()):
        part = _divided(segment, chunked, rows)
        heads = chunked.shape[0]
        tokens = keys.transpose(0, 1)[:, rows, columns].flatten(0, 1)[chunked.flatten()]
        read = torch.where(retrieves, choice.read.to(device), 0).mT.flatten()
        assert len(read) == heads * len(segment.starts)
        part.chunks = Chunks.of(tokens, part.starts, part.lengths, read, choice.chunk)
        made.append(part)
    return made


def _divided(segment: VisualSegment, chosen: Tensor, rows: Tensor) -> VisualSegment:
    """Pack the tokens of bool `chosen` ``[H, N]``, head by head, row by row; int64 `rows` ``[N]`` are theirs."""
    heads, batch = chosen.shape[0], len(segment.starts)
    index = chosen.flatten().nonzero()[:, 0]
    lengths = torch.zeros(heads, batch, dtype=torch.int64, device=chosen.device)
    lengths.index_add_(1, rows, chosen.long())
    lengths = lengths.flatten()
    bases = max(1, segment.keys.basis_count, segment.values.basis_count)
    basis_rows = torch.arange(heads, device=chosen.device)[:, None] * bases + segment.basis_rows
    return VisualSegment(
        keys=_of_heads(segment.keys, index),
        values=_of_heads(segment.values, index),
        positions=segment.positions.repeat(heads)[index],
        starts=lengths.cumsum(0) - lengths,
        lengths=lengths.to(LENGTH),
        basis_rows=basis_rows.flatten(),
        max_length=int(lengths.max()),
        uniform=False,
        heads=heads,
    )


def _of_heads(stored: Stored, index: Tensor) -> Stored:
    """Pick the tokens `index` of storage ``[H, N, w]`` with heads one behind the other: ``[1, n, w]``."""
    data = stored.data.flatten(0, 1)[index][None]
    return Stored(data, None if stored.basis is None else _basis_of_heads(stored.basis), stored.code)


def _basis_of_heads(basis: KeyBasis) -> KeyBasis:
    """Lay the rows of a basis out as `_divided` counts them; what has to be copied for it is the request's own."""
    divided = basis.select(lambda tensor: tensor.flatten(0, 1)[None])

    def is_copied(name: str) -> bool:
        new, old = getattr(divided, name), getattr(basis, name)
        return new is not None and new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr()

    return dataclasses.replace(
        divided,
        shared=basis.shared and not is_copied("A") and not is_copied("B"),
        delta_shared=basis.delta_shared and not is_copied("delta"),
    )
