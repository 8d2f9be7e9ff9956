"""Tell the kernels of a seal what they are compiled for (forms), and what they are launched with (arguments)."""

from typing import Any, NamedTuple

import triton.language as tl

MOST_SPLITS = tl.constexpr(16)  # of a row's tokens


class Block(NamedTuple):
    """Columns of a stored token: numbers as they are (`bits` 0), or codes of `bits`, ``8 // bits`` to a byte."""

    bits: int
    parts: int  # codes to a byte
    offset: int  # first number or byte within the token
    width: int  # numbers or bytes
    padded: int  # the power of two that holds `width`
    channel: int  # first channel; part i of a byte holds channels ``channel + i * width`` and following


class SealForm(NamedTuple):
    """Facts of the Keys or the Values for which the kernels are compiled."""

    width: int  # of the states
    padded_width: int
    block_d: int  # channels of a tile of the scatter
    tiles: int  # along a side of it
    block_n: int
    block_k: int
    block_w: int  # queries at a time
    align: int  # divides the strides of the states, which are counted in it
    rank: int  # directions to be fitted; 0: the basis is given
    channels: int  # stored coefficients
    padded_channels: int
    block_c: int  # coefficients at a time
    block_l: int  # lines of a matrix at a time
    panel: int  # columns of a basis that are made orthonormal at a time
    weighted: bool
    exponent: float
    group: int
    iterations: int
    token_width: int  # stored numbers or bytes
    blocks: tuple[Block, ...]
    clips: tuple[float, ...]
    precision: str  # of products of float32


class SealArguments(NamedTuple):
    """Tensors of the Keys or the Values; strides are encoded integers, those of the states in units of align."""

    states: Any  # [B, H, P, D]
    strides: tuple[int, ...]  # of rows, heads and columns of the states
    queries: Any  # [R, H_q, W, D], or None
    query_sizes: tuple[int, ...]  # strides of rows, heads and queries; queries
    valid: Any  # uint8 [R, W], or None
    sums: Any  # float32 [pairs, splits, D]
    scatters: Any  # float32 [pairs, splits, D, D]; None where the basis is given, as the next three are
    shifts: Any  # float32 [pairs, D]
    scratch: Any  # float32 [pairs, 3 D + D D + 2 D C]
    mean: Any  # [pairs, D] in the states' dtype
    encoder: Any  # [pairs, D, channels], or [H, D, channels] of a basis that is given
    least: Any  # float32 [pairs, splits, channels]; None where nothing is coded by ranges of its own
    most: Any
    errors: Any  # float32 [pairs, splits, clips, channels]
    low: Any  # float32 [H, channels]; None unless the basis is given and codes are stored
    step: Any
    shift: Any  # float32 [H, D]
    stored: Any  # [H, N, token_width]
    decoder: Any  # [pairs, D, channels], or None: the encoder
    delta: Any  # [pairs, D], or None: the mean
    finite: Any  # uint8 [pairs]


class PlaceArguments(NamedTuple):
    """Where tokens lie; integers are encoded."""

    token_rows: Any  # [N], or None: states have one row, with the tokens in their order
    token_columns: Any
    starts: Any  # int64 [R], or None: all rows have as many tokens
    lengths: Any
    sizes: tuple[int, ...]  # rows, tokens of the longest, splits, tokens of all
