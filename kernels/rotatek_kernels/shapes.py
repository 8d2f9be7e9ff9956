"""Block sizes of an attention, and how each segment is laid out for the kernels: what follows from shapes alone."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.quantization import Code, CodeLayout, HeadCodes, Numbers
from rotatek_cache.core.segments import SegmentView
from rotatek_kernels.forms import INTERPRETED, Block, HeadTable, LastMerge, MergeForm, SegmentForm, encode_integer
from rotatek_kernels.occupancy import CODE_WORK

PROJECTED_CHANNELS = 128  # of the query at once, where it is projected once
MERGE_NUMBERS = 8192  # of a Value decoder, that a program of the merge holds
MERGE_SPLITS = 16  # states that it reads at once
MERGE_STAGES = 3
THREAD_NUMBERS = 8  # of states that a thread holds where the last of the attending programs merges
SEGMENTS_PER_LAUNCH = 8  # each is a branch of the kernel
ONE_WARP_TILE = 8 * 1024  # bytes of a block of numbers that one warp reads: more spill
ONE_WARP = 128  # head width up to which one warp holds the output of text
FOUR_WARPS = 256  # and up to which four warps do
NARROW = 64  # channels of a head
REMEMBERED = 1024  # tables of heads
PAIRED = 8  # queries, at most, of which a matrix product takes numbers and rests together
# Bytes of a block where each head has codes of its own and one warp reads them: the least of a matrix product, so that
# narrow heads leave blocks out. More of them than these would spill; several warps share one block as wide as it takes.
HEAD_COLUMNS, HEAD_BLOCKS = 16, 2


class BlockSizes(NamedTuple):
    """Sizes by which an attention over segments is cut up.

    Attributes:
        warps: of a program.
        queries: most of them (positions times heads of a group) that share a tile of tokens; 8: the other half of a
            matrix product holds what rounding takes from the projected queries.
        tokens: most tokens of a block.
        tile: most bytes of a block's Keys and Values, unpacked; a code counts as 4 bytes, as one where
            one warp reads it.
        stages: blocks in flight.
        registers: of a thread, at most (NVIDIA); where left to itself, the compiler spills one to hold more programs.
        channels: of the query that are projected at once.
        projected: whether queries are projected once, in a launch before, and not in each program.
    """

    warps: int
    queries: int
    tokens: int
    tile: int
    stages: int
    registers: int | None
    channels: int = 32
    projected: bool = False


# Chosen by what the compiler reports (`tests/kernels/test_compile.py -s`: registers, spills, shared memory;
# instructions per token by `python -m evals.bench.kernel --roofline`), the same for sm_80, sm_90 and sm_100 and for all
# ranks. On an H200 those of "plain" were the fastest tried, those of "codes" within 4 % of the fastest
# (evals/results/gpu_decode_sweep_h200.json); the others have not been timed.
BLOCK_SIZES = {
    # Bound by bytes, so instructions may be spent: 18 a token at D 128, r 32 against 70 that the bytes leave time for.
    # At most 168 registers and 70 KiB let three programs share a processor. The decoder comes in one load: in four it
    # takes no fewer registers, and four times as long until the first Key is asked for.
    "plain": BlockSizes(warps=4, queries=16, tokens=64, tile=32 * 1024, stages=3, registers=168, channels=128),
    # Bound by instructions: several warps would each unpack all codes. One takes 5.1 a token at 4 bits and r 32 (5.8 in
    # blocks of 64). Larger tiles spill beside a text segment of D 128, which then has 32 tokens a block.
    "codes": BlockSizes(warps=1, queries=8, tokens=128, tile=8 * 1024, stages=3, registers=None),
    # In heads of at most `NARROW` channels.
    "8 bit": BlockSizes(warps=1, queries=8, tokens=64, tile=8 * 1024, stages=3, registers=None),
    # 8.7 instructions a token at r 64; 15.4 in blocks of 32, whose Values the compiler moves through shared memory.
    "2 bit": BlockSizes(warps=1, queries=8, tokens=64, tile=8 * 1024, stages=3, registers=None, channels=128),
    # Without tensor cores; with four warps the dense segment needs twice the registers.
    "float32": BlockSizes(warps=8, queries=16, tokens=64, tile=32 * 1024, stages=3, registers=None),
    # 64 queries by 64 tokens spill (976 instructions of it at D 128 with a mask), 64 by 32 do not.
    "queries": BlockSizes(warps=4, queries=64, tokens=32, tile=16 * 1024, stages=2, registers=None),
    # Heads of more than `ONE_WARP` channels, codes, too. "plain" spills at rank 128 of 256 on sm_90, whatever registers
    # it may take; half the tile takes 128, which lets four programs share a processor.
    "wide": BlockSizes(warps=4, queries=16, tokens=64, tile=16 * 1024, stages=3, registers=None, channels=128),
    # 64 queries by 32 tokens spill with four warps, and take all registers with eight.
    "wide queries": BlockSizes(warps=8, queries=32, tokens=32, tile=32 * 1024, stages=2, registers=None),
    "wide float32": BlockSizes(warps=8, queries=16, tokens=64, tile=16 * 1024, stages=2, registers=None),
    # Of more than `FOUR_WARPS`, where four warps spill, three blocks in flight, and 32 queries.
    "wider": BlockSizes(warps=8, queries=16, tokens=64, tile=32 * 1024, stages=2, registers=None, channels=128),
    "wider queries": BlockSizes(warps=8, queries=16, tokens=32, tile=32 * 1024, stages=2, registers=None),
    "wider float32": BlockSizes(warps=16, queries=16, tokens=64, tile=32 * 1024, stages=2, registers=None),
}


class SegmentShape(NamedTuple):
    """Consequences of the shapes and strides of a segment, whatever its length.

    Attributes:
        order: which of the segments it is.
        form, merge_form: what the kernels are compiled for.
        work: of one token's Keys and Values in one head (see `occupancy.Load`).
        coded: whether codes are the greater part of it.
        strides: encoded, of heads of Keys and of Values (see `SegmentArguments`) and of rows of slots.
        basis_strides, merge_strides: of the Keys' basis and the Values', encoded.
        heads: tables of what each head has of its own, of Keys and of Values.
        packed_tables: whether the entries of row tables lie side by side, as the kernels read them.
    """

    order: int
    form: SegmentForm
    merge_form: MergeForm
    work: int
    coded: bool
    strides: tuple[int, ...]
    basis_strides: tuple[int, ...]
    merge_strides: tuple[int, ...]
    heads: tuple[Tensor | None, Tensor | None]
    packed_tables: bool


class Shapes(NamedTuple):
    """Consequences of the shapes and strides of query and segments: checked once, used in every step.

    Attributes:
        segments: those that may hold tokens.
        batch, q_heads, positions: of the query.
        tiles: of queries.
        heads: of Keys and Values.
        value_width: of the output.
        query_strides: encoded, in units of their alignment.
        constants, merge_constants: of the two kernels.
        project_constants: of the kernel that projects queries; None where each program does.
        projections: numbers of all projected queries of each segment.
        one_launch: whether the last of the attending programs merges, so that there is no second launch.
        forms, merge_forms: of all segments.
        merge_blocks: of channels of the output.
        options, project_options, merge_options: for Triton.
    """

    segments: list[SegmentShape]
    batch: int
    q_heads: int
    positions: int
    tiles: int
    heads: int
    value_width: int
    query_strides: tuple[int, ...]
    constants: dict[str, Any]
    project_constants: dict[str, Any] | None
    merge_constants: dict[str, Any]
    projections: tuple[int, ...]
    one_launch: bool
    forms: tuple[SegmentForm, ...]
    merge_forms: tuple[MergeForm, ...]
    merge_blocks: int
    options: dict[str, Any]
    project_options: dict[str, Any]
    merge_options: dict[str, Any]


def shapes_of(
    query: Tensor, segments: Sequence[SegmentView], sizes: BlockSizes | None = None, *, counted: bool = False
) -> Shapes:
    """Work out what follows from the shapes and strides of checked arguments; `sizes` in place of the table's.

    Where ended programs are `counted`, the last merges: those of one query a row, in one launch.
    """
    batch, q_heads, positions, width = query.shape
    heads = segments[0].heads
    group = q_heads // heads
    value_width = segments[0].value_width
    sizes = sizes or sizes_of(query, segments)
    # Few block sizes, so that few kernels are made: a tile holds as many positions as fit.
    paired = sizes.queries <= PAIRED and group <= PAIRED
    queries = PAIRED if paired else max(_block(group), min(sizes.queries, _block(positions * group)))
    tile_queries = queries // group
    shaped = [
        _shape_segment(index, segment, sizes, query.dtype)
        for index, segment in enumerate(segments)
        if segment.max_length > 0
    ]
    widest = max([shape.merge_form.block_w for shape in shaped], default=0)
    merge_block = min(_block(value_width), MERGE_NUMBERS // max(16, widest))
    align = _alignment(query, *query.stride()[:3])
    # With a slot table the compiler keeps within them by itself, and spills where it is told to; widths per head need
    # more.
    merge_forms = tuple([shape.merge_form for shape in shaped])
    last: tuple[LastMerge, ...] = ()
    if counted and positions == 1 and 0 < len(shaped) <= SEGMENTS_PER_LAUNCH:
        held = THREAD_NUMBERS * 32 * sizes.warps
        last = (
            LastMerge(merge_forms, _power(group), value_width, _block(value_width), held, MERGE_SPLITS, MERGE_STAGES),
        )
    free = any(segment.slots is not None or isinstance(segment.key_code, HeadCodes) for segment in segments)
    registers = None if free else sizes.registers
    common = {
        "G": group,
        "D": width,
        "QUERY_ALIGN": align,
        "TILE_Q": tile_queries,
        "BLOCK_M": _block(queries),
    }
    of_queries = batch * heads * -(-positions // tile_queries) * (PAIRED if paired else _block(queries))
    forms = tuple([shape.form for shape in shaped])
    once = sizes.projected and any(form.decoder_stride for form in forms)
    return Shapes(
        segments=shaped,
        batch=batch,
        q_heads=q_heads,
        positions=positions,
        tiles=-(-positions // tile_queries),
        heads=heads,
        value_width=value_width,
        query_strides=tuple(encode_integer(stride // align) for stride in query.stride()[:3]),
        constants={
            "SINGLE": positions == 1,
            **common,
            "BLOCK_D": _block(width),
            "BLOCK_K": min(sizes.channels, _block(width)),
            "PAIRED": paired,
            "ASSEMBLY": not INTERPRETED and not torch.version.hip,
            "PROJECTED": once,
            "MERGE": last,
        },
        project_constants={**common, "BLOCK_K": min(PROJECTED_CHANNELS, _block(width)), "PAIRED": paired}
        if once
        else None,
        merge_constants={
            "G": group,
            "D_V": value_width,
            "BLOCK_DV": merge_block,
            "NUMBERS": MERGE_NUMBERS,
            "MOST_S": MERGE_SPLITS,
        },
        projections=tuple([of_queries * form.projected if once else 0 for form in forms]),
        one_launch=bool(last),
        forms=forms,
        merge_forms=merge_forms,
        merge_blocks=-(-value_width // merge_block),
        options={
            "num_warps": sizes.warps,
            "num_stages": sizes.stages,
            "enable_fp_fusion": True,
            **({} if registers is None or torch.version.hip else {"maxnreg": registers}),
        },
        project_options={"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True},
        merge_options={"num_warps": 4 if widest else 2, "num_stages": 2, "enable_fp_fusion": True},
    )


def sizes_of(
    query: Tensor, segments: Sequence[SegmentView], *, amd: bool = torch.version.hip is not None
) -> BlockSizes:
    """Look up the sizes for these arguments; AMD's compiler keeps more of a block of codes in registers."""
    sizes = BLOCK_SIZES[kind_of(query, segments)]
    return sizes._replace(tile=sizes.tile // 2) if amd and sizes.warps == 1 else sizes


def kind_of(query: Tensor, segments: Sequence[SegmentView]) -> str:
    """Choose the entry of `BLOCK_SIZES` for these arguments."""
    widest = max(query.shape[3], *(segment.value_width for segment in segments))
    wide = "" if widest <= ONE_WARP else "wide" if widest <= FOUR_WARPS else "wider"
    if query.dtype == torch.float32:
        return f"{wide} float32".strip()
    if query.shape[2] > 1:
        return f"{wide} queries".strip()
    if wide:
        return wide
    coded = [segment for segment in segments if _is_narrow(segment.key_code) and _is_narrow(segment.value_code)]
    if not coded:
        return "plain"
    codes = [code for segment in coded for code in (segment.key_code, segment.value_code)]
    layouts = [code for code in codes if isinstance(code, CodeLayout)]
    widths = {bits for code in layouts for bits, _ in code.blocks}
    if len(layouts) < len(codes):
        return "codes"
    if widths == {2}:
        return "2 bit"
    return "8 bit" if widths == {8} and widest <= NARROW else "codes"


def _is_narrow(code: Code | None) -> bool:
    """Tell whether these are codes that one warp can hold."""
    if isinstance(code, HeadCodes):
        return isinstance(code.parts[0], CodeLayout) and max(code.widths) <= HEAD_BLOCKS * HEAD_COLUMNS
    return code is not None


def _unpacked(blocks: tuple[Block, ...], itemsize: int, warps: int) -> int:
    """Count the bytes of a token in tiles, as `BlockSizes.tile` does."""
    code = 1 if warps == 1 else 4
    return sum(block.parts * block.padded * (code if block.bits else itemsize) for block in blocks)


class StoredForm(NamedTuple):
    """Layout of the Keys, or the Values, of a segment in memory.

    Attributes:
        blocks: of a token.
        stride: from token to token; 0 if each head has its own.
        align: divides the strides.
        heads, table: what each head has of its own.
        head_stride: encoded, in units of `align`; the number of tokens stored where each head has its own stride.
        channels: coefficients of a token, or its numbers.
        work: of a token in one head, on average (see `occupancy.Load`).
        coded: whether these are codes.
    """

    blocks: tuple[Block, ...]
    stride: int
    align: int
    heads: HeadTable
    table: Tensor | None
    head_stride: int
    channels: int
    work: int
    coded: bool


def _work(stored: Tensor, code: Code | None) -> int:
    """Count the bytes of numbers that take as long as a token of all heads (of one, if they are alike)."""
    if code is None:
        return stored.shape[-1] * stored.element_size()
    parts = code.parts if isinstance(code, HeadCodes) else (code,)
    return sum(part.channels * (CODE_WORK if isinstance(part, CodeLayout) else stored.element_size()) for part in parts)


def _shape_stored(stored: Tensor, code: Code | None, warps: int) -> StoredForm:
    if isinstance(code, HeadCodes):
        widest = max(code.widths)
        block = HEAD_COLUMNS if warps == 1 else _block(widest)
        columns = -(-widest // block) * block
        align = math.gcd(16 // stored.element_size(), *code.widths)
        runs = [run for part in code.parts for _, run, _ in _runs(part)]
        # Several warps read all heads alike: the compiler fails on branches over tiles that they share.
        digits = digits_of_heads(code, block, alike=warps > 1)
        heads = HeadTable(columns, math.gcd(16, *runs), 3 + 3 * columns + len(digits))
        width = sum(code.widths)
        return StoredForm(
            blocks=_digit_blocks(digits, block),
            stride=0,
            align=align,
            heads=heads,
            table=_head_table(code, columns, block, warps > 1, align, stored.device),
            head_stride=encode_integer(stored.numel() // width),
            channels=code.channels,
            work=-(-_work(stored, code) // len(code.parts)),
            coded=isinstance(code.parts[0], CodeLayout),
        )
    stride = _token_stride(stored)
    align = _alignment(stored, stored.stride(0), stride)
    return StoredForm(
        blocks=_blocks(stored.shape[-1], code),
        stride=stride,
        align=align,
        heads=HeadTable(0, 1, 0),
        table=None,
        head_stride=encode_integer(stored.stride(0) // align),
        channels=stored.shape[-1] if code is None else code.channels,
        work=_work(stored, code),
        coded=code is not None,
    )


def _shape_segment(order: int, segment: SegmentView, sizes: BlockSizes, dtype: torch.dtype) -> SegmentShape:
    keys = _shape_stored(segment.keys, segment.key_code, sizes.warps)
    values = _shape_stored(segment.values, segment.value_code, sizes.warps)
    unpacked = _unpacked(keys.blocks + values.blocks, dtype.itemsize, sizes.warps)
    tile = min(sizes.tile, ONE_WARP_TILE) if sizes.warps == 1 and not keys.coded and not values.coded else sizes.tile
    mask = segment.mask
    # The lowest finite number stands for "not seen" in additive masks.
    hidden = None if mask is None or mask.dtype == torch.bool else torch.finfo(mask.dtype).min / 2
    key_basis, value_basis = _decoder(segment.basis), _decoder(segment.value_basis)
    form = SegmentForm(
        key_blocks=keys.blocks,
        value_blocks=values.blocks,
        key_stride=keys.stride,
        value_stride=values.stride,
        key_align=keys.align,
        value_align=values.align,
        **_basis_form(key_basis),
        state_width=values.channels,
        mask_stride=0 if mask is None else mask.stride(2) if mask.shape[2] > 1 else 1,
        hidden=hidden,
        block_n=max(16, min(sizes.tokens, (1 << (tile // unpacked).bit_length()) // 2)),
        stages=sizes.stages,
        key_heads=keys.heads,
        value_heads=values.heads,
        projected=sum(block.parts * block.padded for block in keys.blocks) + 1 if key_basis else 0,
    )
    tables = (segment.starts, segment.lengths, segment.basis_rows)
    return SegmentShape(
        order=order,
        form=form,
        merge_form=MergeForm(
            values.channels,
            0 if value_basis is None else _block(values.channels),
            **_basis_form(value_basis),
            value_heads=values.heads,
        ),
        work=keys.work + values.work,
        coded=2 * (keys.work * keys.coded + values.work * values.coded) > keys.work + values.work,
        strides=(
            keys.head_stride,
            values.head_stride,
            encode_integer(0 if segment.slots is None else segment.slots.stride(0)),
        ),
        basis_strides=_basis_strides(key_basis),
        merge_strides=_basis_strides(value_basis),
        heads=(keys.table, values.table),
        packed_tables=all(table is None or table.is_contiguous() for table in tables),
    )


def _blocks(columns: int, code: Code | None) -> tuple[Block, ...]:
    """Cut a stored token into blocks: `columns` numbers, or bytes packed as `code` says."""
    if code is None:
        return (Block(0, 1, (0,), 0, columns, _block(columns), 0, 0),)
    assert isinstance(code, CodeLayout)
    blocks: list[Block] = []
    offset = channel = first_part = 0
    for bits, width, parts in _runs(code):
        blocks.append(Block(bits, parts, (bits,), offset, width, _block(width), channel, first_part))
        offset, channel, first_part = offset + width, channel + width * parts, first_part + parts
    return tuple(blocks)


def _runs(code: CodeLayout | Numbers) -> list[tuple[int, int, int]]:
    """List bits (0: numbers), columns and channels to a column of each run of columns of a token."""
    if isinstance(code, Numbers):
        return [(0, code.channels, 1)]
    return [(bits, channels * bits // 8, 8 // bits) for bits, channels in code.blocks]


def digits_of_heads(code: HeadCodes, width: int, *, alike: bool = False) -> list[list[int]]:
    """List the fewest bits of each head's codes in each block of `width` columns; -1 where the head ends before it.

    Where heads have to be read `alike` it is the fewest of all of them.
    """
    stored = [[bits for bits, run, _ in _runs(part) for _ in range(run)] for part in code.parts]
    digits = [
        [min(head[offset : offset + width], default=-1) for head in stored]
        for offset in range(0, max(code.widths), width)
    ]
    if alike:
        fewest = [min(digit for digit in of_heads if digit >= 0) for of_heads in digits]
        digits = [[min(one, digit) for digit in of_heads] for one, of_heads in zip(fewest, digits, strict=True)]
    return digits


def _digit_blocks(digits: list[list[int]], width: int) -> tuple[Block, ...]:
    """Make the blocks of tokens whose head says what they hold, of `width` columns each; see `Block`."""
    blocks: list[Block] = []
    for index, of_heads in enumerate(digits):
        found = tuple(sorted(set(of_heads) - {-1}, reverse=True))
        parts = 8 // found[-1] if found[-1] else 1
        first_part = blocks[-1].first_part + blocks[-1].parts if blocks else 0
        blocks.append(Block(found[-1], parts, found, index * width, 0, width, 0, first_part))
    return tuple(blocks)


@functools.lru_cache(maxsize=REMEMBERED)
def _head_table(code: HeadCodes, columns: int, block: int, alike: bool, align: int, device: torch.device) -> Tensor:
    """Fill the table that a `HeadTable` describes."""
    table = []
    offset = 0
    digits = digits_of_heads(code, block, alike=alike)
    for head, (part, width) in enumerate(zip(code.parts, code.widths, strict=True)):
        of_columns, channel = [], 0
        for bits, run, channels in _runs(part):
            log_bits = (bits or 16).bit_length() - 1
            of_columns += [(log_bits, channel + column, run) for column in range(run)]
            channel += run * channels
        of_columns += [(0, 0, 0)] * (columns - width)
        table.append(
            [offset // align, width // align, part.channels]
            + [number for entries in zip(*of_columns, strict=True) for number in entries]
            + [of_heads[head] for of_heads in digits]
        )
        offset += width
    return torch.tensor(table, dtype=torch.int32, device=device)


def _decoder(basis: KeyBasis | None) -> KeyBasis | None:
    return None if basis is None or basis.is_identity else basis


def _basis_form(basis: KeyBasis | None) -> dict[str, int]:
    decoder, delta, scale = (None, None, None) if basis is None else (basis.B, basis.delta, basis.scale)
    return {
        "decoder_stride": 0 if decoder is None else decoder.stride(2),
        "decoder_align": 1 if decoder is None else _alignment(decoder, *decoder.stride()[:3]),
        "delta_align": 1 if delta is None else _alignment(delta, *delta.stride()[:2]),
        "scale_align": 1 if scale is None else _alignment(scale, *scale.stride()[:2]),
    }


def _basis_strides(basis: KeyBasis | None) -> tuple[int, ...]:
    """Return the strides of heads and rows of decoder, delta and scale, encoded, in units of their alignment."""
    form = _basis_form(basis)
    strides = []
    decoder, delta, scale = (None, None, None) if basis is None else (basis.B, basis.delta, basis.scale)
    for name, tensor in (("decoder", decoder), ("delta", delta), ("scale", scale)):
        pair = (0, 0) if tensor is None else tensor.stride()[:2]
        strides += [encode_integer(stride // form[f"{name}_align"]) for stride in pair]
    return tuple(strides)


def _token_stride(tensor: Tensor) -> int:
    # torch leaves the stride of a dimension of one token arbitrary, and each new one would be a new kernel.
    return tensor.stride(1) if tensor.shape[1] > 1 else tensor.shape[2]


def _alignment(tensor: Tensor, *strides: int) -> int:
    """Find the largest power of two, up to 16 bytes, that divides the strides."""
    return math.gcd(16 // tensor.element_size(), *strides)


def _block(size: int) -> int:
    """Find the power of two, at least the 16 of a matrix product, that holds `size`."""
    return max(16, _power(size))


def _power(size: int) -> int:
    """Find the power of two that holds `size`."""
    return 1 << (size - 1).bit_length()
