"""Tell the kernels of a segment: when they are compiled (forms), and when they are launched (arguments)."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

STATE_ALIGN = tl.constexpr(4)
INTERPRETED = not isinstance(tl.sum, triton.runtime.JITFunction)


class Block(NamedTuple):
    """Columns of a stored token: numbers as they are (`bits` 0), or codes of `bits`, ``8 // bits`` to a byte.

    Bytes are read as words of two; all widths and offsets are even.

    Where heads have widths of their own (`width` 0), which columns there are and what they hold is in a `HeadTable`.
    Bytes are read as digits then, of the fewest bits of any code of the head there, one of `digits`: a code of more
    bits is a sum of digits times powers of two, which are folded into the projected queries, and for Values into the
    sum. So one kernel reads all mixtures.
    """

    bits: int  # the fewest in any head
    parts: int  # codes, or digits, to a byte, at most
    digits: tuple[int, ...]  # widths of digits in bits, one of them each head's; `bits` alone where all are alike
    offset: int  # first number or byte within the token
    width: int  # numbers or bytes; 0: the head's own
    padded: int  # the power of two that holds `width`
    channel: int  # first channel; part i of a byte holds channels ``channel + i * width`` and following
    first_part: int  # parts of the blocks before


class HeadTable(NamedTuple):
    """Where the numbers stand that a head has of its own, int32 ``[H, entries]``.

    Of the head: where its tokens begin, per token of the storage, and how wide they are, both in units of the alignment
    of its rows; its channels. Of each column: the binary logarithm of its bits, the channel of its first code, and how
    many channels further on that of the next code in the same byte is. Of each block: the bits of its digits (0:
    numbers); -1 where the head ends before it.
    """

    columns: int  # 0: all heads are alike, and there is no table
    align: int  # divides all runs of channels that lie side by side
    entries: int  # of a head: 3, 3 to a column, 1 to a block


class SegmentForm(NamedTuple):
    """Facts of a segment for which a kernel is compiled."""

    key_blocks: tuple[Block, ...]
    value_blocks: tuple[Block, ...]
    key_stride: int  # from token to token
    value_stride: int
    key_align: int  # divides the head stride, which is counted in it, so that tokens are known to be aligned
    value_align: int
    decoder_stride: int  # of the Keys' basis, from channel to channel
    decoder_align: int
    delta_align: int
    scale_align: int
    state_width: int  # channels of a partial state: D_v, or the Values' coefficients
    mask_stride: int  # from token to token
    hidden: float | None  # masks: numbers up to here hide a token; None: bool, or no mask
    block_n: int
    stages: int
    key_heads: HeadTable
    value_heads: HeadTable
    projected: int  # numbers that are kept of a query projected once: all parts of all blocks, and ``q . delta``


class SegmentArguments(NamedTuple):
    """Tensors and sizes of a segment; integers are encoded, strides of heads and of rows in units of align."""

    stored_keys: Any  # [H, N, columns], or the heads one after the other
    stored_values: Any  # [H, N, columns] (a tuple of Triton has `values` of its own)
    key_heads: Any  # a `HeadTable`, or None
    value_heads: Any
    slots: Any  # [B, n], or None: tokens lie side by side
    starts: Any  # [B]
    lengths: Any  # [B]
    mask: Any  # [B, Q, max_length] uint8 or float, or None
    decoder: Any  # [H, R, D, channels] of the Keys, or None: they are dense
    delta: Any  # [H, R, D], or None
    scale: Any  # [H, R, channels] of an int8 decoder, or None
    basis_rows: Any  # [B], or None: row b uses row b of the basis
    place: tuple[int, ...]  # first split, splits, where states and projected queries begin in units of STATE_ALIGN
    # max_length; strides of the mask's rows and queries; of heads of Keys, of Values (or the tokens stored); of slots
    sizes: tuple[int, ...]
    basis_strides: tuple[int, ...]  # of heads and rows of the decoder, of delta, of the scale


class MergeForm(NamedTuple):
    """Facts of a segment's states for which the merge is compiled."""

    state_width: int
    block_w: int  # the power of two that holds it, where it is rotated back
    decoder_stride: int
    decoder_align: int
    delta_align: int
    scale_align: int
    value_heads: HeadTable


class MergeArguments(NamedTuple):
    """Tensors and sizes of a segment's states and of its Values' basis; integers are encoded (`encode_integer`)."""

    decoder: Any  # [H, R, D_v, channels], or None: states are outputs
    delta: Any  # [H, R, D_v], or None
    scale: Any  # [H, R, channels] of an int8 decoder, or None
    basis_rows: Any  # [B], or None
    value_heads: Any
    place: tuple[int, ...]
    basis_strides: tuple[int, ...]


class MergingArguments(NamedTuple):
    """Tensors of a launch whose last programs merge."""

    counters: Any  # int32, of each row, KV head and tile of queries: programs that have ended; left zero
    out: Any  # [B, Q, H * G, D_v], written
    lse: Any  # [B, H * G, Q] float32, natural, written
    segments: Any  # a MergeArguments each


class LastMerge(NamedTuple):
    """Facts of a merge by the last program for which the attending kernel is compiled."""

    forms: tuple[MergeForm, ...]
    queries: int  # the power of two that holds those of a tile
    width: int  # D_v
    block: int  # the power of two that holds it
    numbers: int  # of states read at once
    splits: int  # at most of them
    stages: int  # times as many are on their way


def form_of(forms, index, _semantic=None):
    """Return entry `index` of `FORMS` as a tuple of Triton, which before 3.9 makes none of tuples of tuples itself."""
    form = forms[index]
    interpreted = _semantic is None  # and takes tuples as they are
    return form if interpreted or isinstance(form, tl.tuple) else _static(form)


form_of.__triton_builtin__ = True  # type: ignore[attr-defined]  # Python, called while a kernel is compiled


def _static(value):
    """Make a constant of a number, or of tuples of numbers however deep."""
    if not isinstance(value, tuple):
        return tl.constexpr(value)
    entries = [_static(entry) for entry in value]
    return tl.tuple(entries, tl.tuple_type([entry.type for entry in entries], getattr(value, "_fields", None)))


def encode_integer(integer: int) -> int:
    """Encode a non-negative integer as 2 n + 3.

    Triton specialises kernels on 1 and on multiples of 16; encoded values are neither, so changing lengths never
    recompile. (Inside of tuples it cannot be told not to.)
    """
    return 2 * integer + 3


@triton.jit
def decode_integers(encoded):
    """Undo `encode_integer` for each entry of a tuple."""
    return [(integer - 3) >> 1 for integer in encoded]


@triton.jit
def basis_row_of(tensor, strides, head, basis_row, FIRST: tl.constexpr, ALIGN: tl.constexpr):
    """Find where `tensor` of a basis keeps a head and a row; entry `FIRST` of the strides is its first."""
    return tensor + (head * strides[FIRST] + basis_row * strides[FIRST + 1]) * ALIGN
