"""Fused attention over segment views: plans and launches. The kernel text is in `decode_triton.py`."""

import functools
import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotatek_cache.basis import KeyBasis
from rotatek_cache.coding import Code, CodeLayout, HeadCodes, Numbers
from rotatek_cache.segments import SegmentView
from rotatek_kernels.checks import check_arguments, check_scale
from rotatek_kernels.decode_triton import (
    STATE_ALIGN,
    Block,
    HeadTable,
    MergeArguments,
    MergeForm,
    SegmentArguments,
    SegmentForm,
    attend_splits,
    merge_splits,
)

SEGMENTS_PER_LAUNCH = 8  # each is a branch of the kernel
TOKENS_PER_SPLIT = 256  # below this a split costs more than it brings: it projects the queries and merges a state
MERGE_NUMBERS = 8192  # of a Value decoder, that a program of the merge holds
UNIT = STATE_ALIGN.value
MERGE_SPLITS = 16  # states that it reads at once
ONE_WARP = 128  # head width up to which one warp holds the output of text
REMEMBERED = 1024  # plans
# Bytes of a block where each head has codes of its own and one warp reads them: the least of a matrix product, so that
# narrow heads leave blocks out. More of them than these would spill; several warps share one block as wide as it takes.
HEAD_COLUMNS, HEAD_BLOCKS = 16, 2


class BlockSizes(NamedTuple):
    """How an attention over segments is cut up.

    Attributes:
        warps: of a program.
        rows: most queries (positions times heads of a group) that share a tile of tokens.
        programs: per multiprocessor: two waves of what its registers and shared memory hold.
        tokens: most tokens of a block.
        tile: most bytes of a block's Keys and Values, unpacked.
        stages: blocks in flight.
        registers: of a thread, at most (NVIDIA); where left to itself, the compiler spills one to hold more programs.
    """

    warps: int
    rows: int
    programs: int
    tokens: int
    tile: int
    stages: int
    registers: int | None


# Chosen by what the compiler reports (`tests/test_kernel_compile.py -s`: registers, spills, shared memory; instructions
# per token by `python -m evals.bench_kernel --roofline`), the same for sm_80, sm_90 and sm_100 and for all ranks. None
# of it has been timed on a GPU.
BLOCK_SIZES = {
    # Bound by bytes, so instructions may be spent: 18 a token at D 128, r 32 against 70 that the bytes leave time for.
    # At most 168 registers and 70 KiB let three programs share a processor.
    "plain": BlockSizes(warps=4, rows=16, programs=6, tokens=64, tile=32 * 1024, stages=3, registers=168),
    # Bound by instructions: several warps would each unpack all codes (14 a token with one warp, 26 with two, 52 with
    # four, at 4 bits and r 32). Larger tiles spill beside a text segment of D 128, which then has 16 tokens a block.
    "codes": BlockSizes(warps=1, rows=16, programs=22, tokens=64, tile=8 * 1024, stages=3, registers=None),
    # Without tensor cores; with four warps the dense segment needs twice the registers.
    "float32": BlockSizes(warps=8, rows=16, programs=4, tokens=64, tile=32 * 1024, stages=3, registers=None),
    # 64 rows by 64 tokens spill (976 instructions of it at D 128 with a mask), 64 by 32 do not.
    "queries": BlockSizes(warps=4, rows=64, programs=4, tokens=32, tile=16 * 1024, stages=2, registers=None),
}


class Launch(NamedTuple):
    """A kernel with everything that its launch needs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


class SegmentShape(NamedTuple):
    """What follows from the shapes and strides of a segment, whatever its length.

    Attributes:
        order: which of the segments it is.
        form, merge_form: what the kernels are compiled for.
        token_bytes: of one token's Keys and Values in one head.
        strides: odd, of heads of Keys and of Values (see `SegmentArguments`) and of rows of slots.
        basis_strides, merge_strides: of the Keys' basis and the Values', odd.
        heads: tables of what each head has of its own, of Keys and of Values.
        packed_rows: whether row tables lie side by side, as the kernels read them.
    """

    order: int
    form: SegmentForm
    merge_form: MergeForm
    token_bytes: int
    strides: tuple[int, ...]
    basis_strides: tuple[int, ...]
    merge_strides: tuple[int, ...]
    heads: tuple[Tensor | None, Tensor | None]
    packed_rows: bool


class Shapes(NamedTuple):
    """What follows from the shapes and strides of query and segments: checked once, used in every step.

    Attributes:
        segments: those that may hold tokens.
        programs: wanted per multiprocessor.
        tiles: of queries.
        heads: of Keys and Values.
        value_width: of the output.
        query_strides: odd, in units of their alignment.
        constants, merge_constants: of the two kernels.
        options, merge_options: for Triton.
    """

    segments: list[SegmentShape]
    programs: int
    tiles: int
    heads: int
    value_width: int
    query_strides: tuple[int, ...]
    constants: dict[str, Any]
    merge_constants: dict[str, Any]
    options: dict[str, Any]
    merge_options: dict[str, Any]


def decode_attention(query: Tensor, segments: Sequence[SegmentView], scale: float) -> tuple[Tensor, Tensor]:
    """`rotatek_cache.attention.attend`, fused: one pass over what the segments store.

    A segment is read as it lies, coefficients as numbers or as codes; the queries are projected inside, and coded
    Values are summed as coefficients, which the merge rotates back once. The segments of a layer share a launch (up to
    `SEGMENTS_PER_LAUNCH` of them), whose partial states a second kernel merges. Nothing is read on the host, so that a
    step can be captured in a CUDA graph; a row whose length is negative counts as empty.

    Not gained: there is no backward, and float32 runs without tensor cores.

    Args:
        query: ``[B, H_q, Q, D]`` after RoPE; float16, bfloat16 or float32 on a GPU (on the CPU under
            ``TRITON_INTERPRET=1``).
        segments: views of what the cache stores: numbers in the query's dtype or packed codes, last dimensions
            contiguous; their KV heads divide ``H_q``. Masks are ``[B, Q, max_length]``. Ranks are multiples of 8.
        scale: factor on ``q . k``.

    Returns:
        Output ``[B, Q, H_q, D_v]`` in the query's dtype and natural log-sum-exp ``[B, H_q, Q]`` in float32. A query
        that sees no token has output 0 and log-sum-exp -inf.

    Raises:
        TypeError, ValueError: an argument is nothing that the kernel can read; nothing was launched then.
    """
    if isinstance(query, Tensor) and query.dim() and query.stride(-1) != 1:
        query = query.contiguous()
    shapes = _checked_shapes(query, segments, scale)
    launches, out, lse = plan(shapes, query, segments, scale, _processors(query.device))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(query):
        for launch in launches:
            launch.kernel[launch.grid](**launch.arguments, **launch.options)
    return out, lse


_REMEMBERED: dict[Hashable, Shapes] = {}
_FORCED: dict[None, BlockSizes] = {}


@contextmanager
def forced_sizes(sizes: BlockSizes) -> Iterator[None]:
    """Attend with these block sizes, whatever the table says (to compare them)."""
    _REMEMBERED.clear()
    _FORCED[None] = sizes
    try:
        yield
    finally:
        _FORCED.clear()
        _REMEMBERED.clear()


def _checked_shapes(query: Tensor, segments: Sequence[SegmentView], scale: float) -> Shapes:
    """`shapes_of` checked arguments. All that checks look at, but the scale, is in the key under which it is kept."""
    try:
        key = _key(query, segments)
        shapes = _REMEMBERED.get(key)
    except (AttributeError, TypeError):
        key = shapes = None  # something is not of its type, which the checks will name
    if shapes is not None:
        check_scale(scale)
        return shapes
    check_arguments(query, segments, scale)
    shapes = shapes_of(query, segments)
    if key is not None:
        if len(_REMEMBERED) >= REMEMBERED:
            _REMEMBERED.clear()
        _REMEMBERED[key] = shapes
    return shapes


def _key(query: Tensor, segments: Sequence[SegmentView]) -> Hashable:
    grad = torch.is_grad_enabled()
    rows, positions = query.shape[0], query.shape[2]
    key: list[Any] = [type(segments), grad]
    tensors = [query]
    for segment in segments:
        basis, value_basis, mask, length = segment.basis, segment.value_basis, segment.mask, segment.max_length
        # Lengths and masks differ from step to step: of them the key holds what matters.
        key += [type(segment), segment.key_code, segment.value_code, type(length), length >> 30, length > 0]
        tensors += [segment.keys, segment.values, segment.starts, segment.lengths]
        for optional in (segment.slots, segment.basis_rows):
            key.append(optional is None)
            if optional is not None:
                tensors.append(optional)
        for one in (basis, value_basis):
            held = () if one is None else (one.B, one.delta, one.scale)
            key.append(None if one is None else (type(one), *(tensor is None for tensor in held)))
            tensors += [tensor for tensor in held if tensor is not None]
        if mask is not None:
            right = mask.shape == (rows, positions, length)
            stride = mask.stride(2) if length > 1 else 1
            gradient = mask.requires_grad and grad
            key.append((type(mask), mask.dtype, mask.device, stride, gradient, right or mask.shape))
    key += [(type(t), t.dtype, t.device, t.shape, t.stride(), t.requires_grad and grad) for t in tensors]
    return tuple(key)


def shapes_of(query: Tensor, segments: Sequence[SegmentView], sizes: BlockSizes | None = None) -> Shapes:
    """What follows from the shapes and strides of checked arguments; `sizes` in place of the table's."""
    _, q_heads, positions, width = query.shape
    heads = segments[0].heads
    group = q_heads // heads
    value_width = segments[0].value_width
    sizes = sizes or _FORCED.get(None) or BLOCK_SIZES[_kind(query, segments)]
    # Few block sizes, so that few kernels are made: a tile holds as many positions as fit.
    rows = max(_block(group), min(sizes.rows, _block(positions * group)))
    tile_queries = rows // group
    shaped = [
        _shape_segment(index, segment, sizes, query.dtype)
        for index, segment in enumerate(segments)
        if segment.max_length > 0
    ]
    widest = max([shape.merge_form.block_w for shape in shaped], default=0)
    align = _alignment(query, *query.stride()[:3])
    # With a slot table the compiler keeps within them by itself, and spills where it is told to; widths per head need
    # more.
    free = any(segment.slots is not None or isinstance(segment.key_code, HeadCodes) for segment in segments)
    registers = None if free else sizes.registers
    return Shapes(
        segments=shaped,
        programs=sizes.programs,
        tiles=-(-positions // tile_queries),
        heads=heads,
        value_width=value_width,
        query_strides=tuple(odd(stride // align) for stride in query.stride()[:3]),
        constants={
            "SINGLE": positions == 1,
            "G": group,
            "D": width,
            "QUERY_ALIGN": align,
            "TILE_Q": tile_queries,
            "BLOCK_M": rows,
            "BLOCK_D": _block(width),
        },
        merge_constants={
            "G": group,
            "D_V": value_width,
            "BLOCK_DV": min(_block(value_width), MERGE_NUMBERS // max(16, widest)),
            "BLOCK_S": MERGE_SPLITS,
        },
        options={
            "num_warps": sizes.warps,
            "num_stages": sizes.stages,
            "enable_fp_fusion": True,
            **({} if registers is None or torch.version.hip else {"maxnreg": registers}),
        },
        merge_options={"num_warps": 4 if widest else 2, "num_stages": 2, "enable_fp_fusion": True},
    )


def plan(
    shapes: Shapes, query: Tensor, segments: Sequence[SegmentView], scale: float, processors: int
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches that decode arguments of `shapes`, with output ``[B, Q, H_q, D_v]`` and lse ``[B, H_q, Q]``."""
    batch, q_heads, positions, _ = query.shape
    device, heads = query.device, shapes.heads
    states_of_split = batch * q_heads * positions
    splits = split_counts(
        [(segments[shape.order].max_length, shape.token_bytes) for shape in shapes.segments],
        shapes.programs * processors,
        batch * heads * shapes.tiles,
    )
    total_splits = sum(splits)
    attended, merged, first_split, first_state = [], [], 0, 0
    for shape, count in zip(shapes.segments, splits, strict=True):
        place = (2 * first_split + 3, 2 * count + 3, 2 * first_state + 3)  # `odd` numbers
        attended.append(_segment_arguments(segments[shape.order], shape, place))
        merged.append(_merge_arguments(segments[shape.order], shape, place))
        first_split += count
        first_state += -(-states_of_split * count * shape.form.state_width // UNIT)
    # One allocation for all that only the kernels see: the states, behind them their log-sum-exps.
    states = _empty((first_state * UNIT + states_of_split * total_splits,), torch.float32, device)
    out = _empty((batch, positions, q_heads, shapes.value_width), query.dtype, device)
    lse = _empty((batch, q_heads, positions), torch.float32, device)
    launches = []
    for start in range(0, len(attended), SEGMENTS_PER_LAUNCH):
        part = slice(start, start + SEGMENTS_PER_LAUNCH)
        programs, before = sum(splits[part]), sum(splits[:start])
        integers = (odd(positions), odd(total_splits), odd(first_state), odd(programs), odd(before))
        arguments: dict[str, Any] = {
            "query": query,
            "states": states,
            "segments": tuple(attended[part]),
            "scale": float(scale),
            "integers": integers + shapes.query_strides,
            "FORMS": tuple([shape.form for shape in shapes.segments[part]]),
            **shapes.constants,
        }
        launches.append(Launch(attend_splits, (programs * shapes.tiles, heads, batch), arguments, shapes.options))
    merge: dict[str, Any] = {
        "states": states,
        "out": out,
        "lse": lse,
        "segments": tuple(merged),
        "integers": (odd(positions), odd(total_splits), odd(first_state)),
        "FORMS": tuple([shape.merge_form for shape in shapes.segments]),
        **shapes.merge_constants,
    }
    blocks = -(-shapes.value_width // shapes.merge_constants["BLOCK_DV"])
    launches.append(Launch(merge_splits, (q_heads * positions, batch, blocks), merge, shapes.merge_options))
    return launches, out, lse


def split_counts(segments: Sequence[tuple[int, int]], programs: int, pairs: int) -> list[int]:
    """Number of programs that share each segment's tokens, per (row, KV head, tile of queries).

    Follows from numbers that the host knows: programs are dealt out by the bytes that the segments may hold.

    Args:
        segments: most tokens of a row and bytes of a token, for each segment.
        programs: wanted in all.
        pairs: of rows, KV heads and tiles.
    """
    wanted = -(-programs // pairs)
    total = sum(tokens * size for tokens, size in segments)
    return [
        max(1, min(round(wanted * tokens * size / total), -(-tokens // TOKENS_PER_SPLIT))) for tokens, size in segments
    ]


def odd(integer: int) -> int:
    """An odd number above 1 for an integer above -1, which Triton does not make a kernel of its own for.

    The kernels take it back; see `decode_triton._plain`.
    """
    return 2 * integer + 3


def _kind(query: Tensor, segments: Sequence[SegmentView]) -> str:
    """The entry of `BLOCK_SIZES` for these arguments."""
    if query.dtype == torch.float32:
        return "float32"
    if query.shape[2] > 1:
        return "queries"
    coded = any(_is_narrow(segment.key_code) and _is_narrow(segment.value_code) for segment in segments)
    widest = max(query.shape[3], *(segment.value_width for segment in segments))
    return "codes" if coded and widest <= ONE_WARP else "plain"


def _is_narrow(code: Code | None) -> bool:
    """Whether these are codes that one warp can hold."""
    if isinstance(code, HeadCodes):
        return isinstance(code.parts[0], CodeLayout) and max(code.widths) <= HEAD_BLOCKS * HEAD_COLUMNS
    return code is not None


def _unpacked(blocks: tuple[Block, ...]) -> int:
    """Numbers of a token in tiles."""
    return sum(block.parts * block.padded for block in blocks)


class StoredForm(NamedTuple):
    """How the Keys, or the Values, of a segment lie in memory.

    Attributes:
        blocks: of a token.
        stride: from token to token; 0 if each head has its own.
        align: divides the strides.
        heads, table: what each head has of its own.
        head_stride: odd, in units of `align`; the number of tokens stored where each head has its own stride.
        channels: coefficients of a token, or its numbers.
        token_bytes: of a token in one head, on average.
    """

    blocks: tuple[Block, ...]
    stride: int
    align: int
    heads: HeadTable
    table: Tensor | None
    head_stride: int
    channels: int
    token_bytes: int


def _shape_stored(stored: Tensor, code: Code | None, warps: int) -> StoredForm:
    if isinstance(code, HeadCodes):
        widest = max(code.widths)
        block = HEAD_COLUMNS if warps == 1 else _block(widest)
        columns = -(-widest // block) * block
        align = math.gcd(16 // stored.element_size(), *code.widths)
        runs = [run for part in code.parts for _, run, _ in _runs(part)]
        heads = HeadTable(columns, math.gcd(16, *runs))
        width = sum(code.widths)
        return StoredForm(
            blocks=_digit_blocks(code, columns, block),
            stride=0,
            align=align,
            heads=heads,
            table=_head_table(code, columns, align, stored.device),
            head_stride=odd(stored.numel() // width),
            channels=code.channels,
            token_bytes=-(-width * stored.element_size() // len(code.parts)),
        )
    stride = _token_stride(stored)
    align = _alignment(stored, stored.stride(0), stride)
    return StoredForm(
        blocks=_blocks(stored.shape[-1], code),
        stride=stride,
        align=align,
        heads=HeadTable(0, 1),
        table=None,
        head_stride=odd(stored.stride(0) // align),
        channels=stored.shape[-1] if code is None else code.channels,
        token_bytes=stored.shape[-1] * stored.element_size(),
    )


def _shape_segment(order: int, segment: SegmentView, sizes: BlockSizes, dtype: torch.dtype) -> SegmentShape:
    keys = _shape_stored(segment.keys, segment.key_code, sizes.warps)
    values = _shape_stored(segment.values, segment.value_code, sizes.warps)
    unpacked = _unpacked(keys.blocks + values.blocks) * dtype.itemsize
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
        block_n=max(16, min(sizes.tokens, (1 << (sizes.tile // unpacked).bit_length()) // 2)),
        stages=sizes.stages,
        key_heads=keys.heads,
        value_heads=values.heads,
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
        token_bytes=keys.token_bytes + values.token_bytes,
        strides=(
            keys.head_stride,
            values.head_stride,
            odd(0 if segment.slots is None else segment.slots.stride(0)),
        ),
        basis_strides=_basis_strides(key_basis),
        merge_strides=_basis_strides(value_basis),
        heads=(keys.table, values.table),
        packed_rows=all(table is None or table.is_contiguous() for table in tables),
    )


def _blocks(columns: int, code: Code | None) -> tuple[Block, ...]:
    """The blocks of a stored token of `columns` numbers, or of bytes packed as `code` says."""
    if code is None:
        return (Block(0, 1, 0, columns, _block(columns), 0, 0),)
    assert isinstance(code, CodeLayout)
    blocks: list[Block] = []
    offset = channel = first_part = 0
    for bits, width, parts in _runs(code):
        blocks.append(Block(bits, parts, offset, width, _block(width), channel, first_part))
        offset, channel, first_part = offset + width, channel + width * parts, first_part + parts
    return tuple(blocks)


def _runs(code: CodeLayout | Numbers) -> list[tuple[int, int, int]]:
    """Bits (0: numbers), columns and channels to a column of each run of columns of a token."""
    if isinstance(code, Numbers):
        return [(0, code.channels, 1)]
    return [(bits, channels * bits // 8, 8 // bits) for bits, channels in code.blocks]


def _digit_blocks(code: HeadCodes, columns: int, width: int) -> tuple[Block, ...]:
    """Blocks of `width` columns of a token whose head says what they hold; see `Block`."""
    bits = min(bits for part in code.parts for bits, _, _ in _runs(part))
    parts = 8 // bits if bits else 1
    return tuple(Block(bits, parts, i * width, 0, width, 0, i * parts) for i in range(columns // width))


@functools.lru_cache(maxsize=REMEMBERED)
def _head_table(code: HeadCodes, columns: int, align: int, device: torch.device) -> Tensor:
    """What a `HeadTable` describes."""
    table = []
    offset = 0
    for part, width in zip(code.parts, code.widths, strict=True):
        of_columns, channel = [], 0
        for bits, run, channels in _runs(part):
            log_bits = (bits or 16).bit_length() - 1
            of_columns += [(log_bits, channel + column, run) for column in range(run)]
            channel += run * channels
        of_columns += [(0, 0, 0)] * (columns - width)
        table.append(
            [offset // align, width // align, part.channels, *(n for row in zip(*of_columns, strict=True) for n in row)]
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
    """Strides of heads and rows of decoder, delta and scale, odd, in units of their alignment."""
    form = _basis_form(basis)
    strides = []
    decoder, delta, scale = (None, None, None) if basis is None else (basis.B, basis.delta, basis.scale)
    for name, tensor in (("decoder", decoder), ("delta", delta), ("scale", scale)):
        pair = (0, 0) if tensor is None else tensor.stride()[:2]
        strides += [odd(stride // form[f"{name}_align"]) for stride in pair]
    return tuple(strides)


def _segment_arguments(segment: SegmentView, shape: SegmentShape, place: tuple[int, int, int]) -> SegmentArguments:
    mask, basis = segment.mask, segment.basis
    if mask is None:
        mask_strides = (3, 3)  # `odd` zeros
    else:
        mask_strides = (odd(mask.stride(0)), odd(mask.stride(1)))
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    starts, lengths, rows = segment.starts, segment.lengths, segment.basis_rows
    if not shape.packed_rows:
        starts, lengths, rows = starts.contiguous(), lengths.contiguous(), None if rows is None else rows.contiguous()
    decoder = None if basis is None else basis.B
    return SegmentArguments(
        segment.keys,
        segment.values,
        *shape.heads,
        segment.slots,
        starts,
        lengths,
        mask,
        decoder,
        None if basis is None or decoder is None else basis.delta,
        None if basis is None or decoder is None else basis.scale,
        None if decoder is None else rows,
        place,
        (2 * segment.max_length + 3, *mask_strides, *shape.strides),
        shape.basis_strides,
    )


def _merge_arguments(segment: SegmentView, shape: SegmentShape, place: tuple[int, int, int]) -> MergeArguments:
    basis = segment.value_basis
    if basis is None or basis.B is None:
        return MergeArguments(None, None, None, None, None, place, shape.merge_strides)
    rows = segment.basis_rows
    if rows is not None and not shape.packed_rows:
        rows = rows.contiguous()
    return MergeArguments(basis.B, basis.delta, basis.scale, rows, shape.heads[1], place, shape.merge_strides)


def _token_stride(tensor: Tensor) -> int:
    # torch leaves the stride of a dimension of one token arbitrary, and each new one would be a new kernel.
    return tensor.stride(1) if tensor.shape[1] > 1 else tensor.shape[2]


def _alignment(tensor: Tensor, *strides: int) -> int:
    """The largest power of two, up to 16 bytes, that divides the strides."""
    return math.gcd(16 // tensor.element_size(), *strides)


def _block(size: int) -> int:
    """The power of two, at least the 16 of a matrix product, that holds `size`."""
    return max(16, 1 << (size - 1).bit_length())


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a small number for the interpreter, whose programs run one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
