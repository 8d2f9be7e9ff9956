"""The kernel that attends: each program reads a share of a segment's tokens for one (row, KV head, tile of queries).

It leaves a partial state, which `merge_triton.py` adds up: in a launch of its own, or in the program that ends last
(`MERGE`). Logarithms are base 2 until the merge ends. Blocks: M queries (the heads of a group side by side, position
after position), N tokens, D head width, W columns that one token stores in one block of its layout. What differs
between segments comes in tuples, an entry each (`forms.py`).

A matrix product takes 16 queries at least. Where there are no more than 8 (`PAIRED`) the other 8 lines of the projected
queries hold what rounding took from the first: one product instead of two, and the softmax is that of 8.
"""

import triton
import triton.language as tl

from rotatek_kernels.forms import STATE_ALIGN, basis_row_of, decode_integers, form_of
from rotatek_kernels.merge_triton import merge_queries

LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(2.0**-126)  # of normal float32: no unit of logits is less, or what is hidden would be NaN
WEIGHT = tl.constexpr(15)  # weights are 2 ** WEIGHT times as large, which keeps small ones normal in float16
LARGEST = tl.constexpr(14)  # projected queries are brought to 2 ** LARGEST, for the same reason


@triton.jit
def _unpack(
    stored,
    digit: tl.constexpr,
    byte: tl.constexpr,
    BITS: tl.constexpr,
    CENTRED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Return digit `digit` of byte `byte` of stored words as float16: plus `2 ** BITS`, or less `2 ** (BITS - 1)`.

    A digit is set into the mantissa of a power of two, two of them by a rotation and a logical instruction. Highest in
    it, the power is no larger than the digits, and a sum of products loses next to nothing to it. Those that are
    centred, by one more instruction, share a rotation with their byte.
    """
    LOW: tl.constexpr = digit * BITS if CENTRED else 8 - BITS  # bit of the mantissa, whose bits 2 to 9 hold a byte
    SHIFT: tl.constexpr = 2 + LOW - 8 * byte - digit * BITS
    MASK: tl.constexpr = (2**BITS - 1) << (2 + LOW)
    POWER: tl.constexpr = (23 - LOW) << 10  # 2 ** (8 - LOW)
    CENTRE: tl.constexpr = 2 ** (8 - LOW) + 2 ** (BITS - 1)
    if ASSEMBLY:
        if CENTRED:
            LESS: tl.constexpr = 0x8000 + POWER + (2 << (LOW + BITS))  # -CENTRE
            numbers = tl.inline_asm_elementwise(
                f"{{ .reg .b32 t, c; shf.l.wrap.b32 t, $1, $1, {SHIFT % 32}; mov.b32 c, {LESS * 65537}; "
                f"lop3.b32 t, t, {MASK * 65537}, {POWER * 65537}, 0xEA; add.rn.f16x2 $0, t, c; }}",
                "=r,r",
                [stored],
                dtype=tl.float16,
                is_pure=True,
                pack=2,
            )
        else:
            numbers = tl.inline_asm_elementwise(
                f"{{ .reg .b32 t; shf.l.wrap.b32 t, $1, $1, {SHIFT % 32}; "
                f"lop3.b32 $0, t, {MASK * 65537}, {POWER * 65537}, 0xEA; }}",
                "=r,r",
                [stored],
                dtype=tl.float16,
                is_pure=True,
                pack=2,
            )
    else:
        words = stored.to(tl.uint16, bitcast=True).to(tl.uint32)
        if SHIFT >= 0:
            words = words << SHIFT
        else:
            words = words >> -SHIFT
        numbers = ((words & MASK) | POWER).to(tl.uint16).to(tl.float16, bitcast=True)
        if CENTRED:
            numbers = numbers - CENTRE
    return numbers


@triton.jit
def _stored_columns(BLOCK: tl.constexpr):
    """List the numbers, or the words of two bytes, of a block, and say where the block begins."""
    if BLOCK.bits == 0:
        columns = tl.arange(0, BLOCK.padded)
        offset = BLOCK.offset
    else:
        columns = tl.arange(0, BLOCK.padded // 2)
        offset = BLOCK.offset // 2
    return columns, offset


@triton.jit
def _stored_inside(columns, width, BLOCK: tl.constexpr):
    """Tell which of `_stored_columns` there are in a token of `width`, which is counted as they are."""
    if BLOCK.width == 0 and BLOCK.bits == 0:
        inside = columns < width - BLOCK.offset
    elif BLOCK.width == 0:
        inside = columns < width - BLOCK.offset // 2
    elif BLOCK.bits == 0:
        inside = columns < BLOCK.width
    else:
        inside = columns < BLOCK.width // 2
    return inside


@triton.jit
def _halves(upper, lower):
    """Stack two tiles of as many lines."""
    return tl.reshape(tl.permute(tl.join(upper, lower), 2, 0, 1), [2 * upper.shape[0], upper.shape[1]])


@triton.jit
def _zeros(BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, VALUES: tl.constexpr, PAIRED: tl.constexpr):
    """Make a sum [BLOCK_M, W] for each part of each block: of projected queries, or of `VALUES`.

    Of these, codes have one for each byte of a word. Where queries are `PAIRED`, numbers have theirs [W, 8], in
    half the registers.
    """
    zeros = ()
    for index in tl.static_range(len(BLOCKS)):
        for _ in tl.static_range(BLOCKS[index].parts):
            if VALUES and PAIRED and BLOCKS[index].bits == 0:
                zeros = zeros + (tl.zeros([BLOCKS[index].padded, 8], tl.float32),)
            elif VALUES and BLOCKS[index].bits > 0:
                zeros = zeros + (tl.zeros([BLOCK_M, BLOCKS[index].padded // 2], tl.float32),)
                zeros = zeros + (tl.zeros([BLOCK_M, BLOCKS[index].padded // 2], tl.float32),)
            else:
                zeros = zeros + (tl.zeros([BLOCK_M, BLOCKS[index].padded], tl.float32),)
    return zeros


@triton.jit
def _column(heads, entry, columns, inside, TABLE: tl.constexpr):
    """Load entry `entry` of what a `HeadTable` says of columns, [W]; 0 for those that are not there."""
    return tl.load(heads + 3 + entry * TABLE.columns + columns, mask=inside, other=0)


@triton.jit
def _inside(columns, width, BLOCK: tl.constexpr):
    """Tell which columns [W] of a block there are in a token of `width`."""
    if BLOCK.width > 0:
        inside = columns < BLOCK.width
    else:
        inside = columns < width - BLOCK.offset
    return inside


@triton.jit
def _channels(heads, columns, inside, digit, part: tl.constexpr, BLOCK: tl.constexpr, TABLE: tl.constexpr):
    """Return the channel of part `part` of a block's columns, [W], and the power of two by which it counts there.

    Also which of the columns have such a part: those that are `inside`, unless the head has fewer digits to a byte.
    """
    if BLOCK.width > 0:
        channels = BLOCK.channel + part * BLOCK.width + columns
        power = 1.0
    else:
        first_bit = part * digit + tl.zeros_like(columns)  # [W]
        inside = inside & (first_bit < 8)
        log_bits = _column(heads, 0, BLOCK.offset + columns, inside, TABLE)
        channels = _column(heads, 1, BLOCK.offset + columns, inside, TABLE)
        channels += (first_bit >> log_bits) * _column(heads, 2, BLOCK.offset + columns, inside, TABLE)
        channels = tl.max_contiguous(tl.multiple_of(channels, TABLE.align), TABLE.align)
        power = (1 << (first_bit & ((1 << log_bits) - 1))).to(tl.float32)
    return channels, power, inside


@triton.jit
def _digit(heads, index: tl.constexpr, BLOCK: tl.constexpr, TABLE: tl.constexpr):
    """Return the bits of a head's digits in block `index`; -1 where the head ends before it."""
    if BLOCK.width > 0:
        digit = BLOCK.bits
    else:
        digit = tl.load(heads + 3 + 3 * TABLE.columns + index)
    return digit


@triton.jit
def _digits_of(heads, BLOCKS: tl.constexpr, TABLE: tl.constexpr):
    """List what `_digit` says of all blocks."""
    digits = ()
    for index in tl.static_range(len(BLOCKS)):
        digits = digits + (_digit(heads, index, BLOCKS[index], TABLE),)
    return digits


@triton.jit
def _add_projections(sums, q, lines, there, heads, width, digit, BLOCK: tl.constexpr, TABLE: tl.constexpr):
    """Add the products of query channels with a block's part of the decoder to its `sums`.

    `lines` are pointers to these channels' lines of the decoder, `there` whether they are there.
    """
    columns = tl.arange(0, BLOCK.padded)  # [W]
    inside = _inside(columns, width, BLOCK)
    projected = ()
    for part in tl.static_range(BLOCK.parts):
        channels, _, held = _channels(heads, columns, inside, digit, part, BLOCK, TABLE)
        decoder = tl.load(  # [BLOCK_K, W]
            lines[:, None] + channels[None, :], mask=there[:, None] & held[None, :], other=0.0
        )
        if decoder.dtype == q.dtype:
            product = tl.dot(q, decoder, sums[BLOCK.first_part + part], input_precision="ieee")
        else:
            product = tl.dot(
                q.to(tl.float32), decoder.to(tl.float32), sums[BLOCK.first_part + part], input_precision="ieee"
            )
        projected = projected + (product,)
    return projected


@triton.jit
def _project(
    query,  # pointers [BLOCK_M]
    inside_queries,  # [BLOCK_M]
    negative,  # whether the queries change their sign
    seg,
    heads,  # this head's entry of the table, where there is one
    key_stride,
    head,
    row,
    FORM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Project the queries on what the Keys store, [BLOCK_M, W] for each part of each block; also ``q . delta``.

    Channels are read `BLOCK_K` at a time: all of them at once would fill the registers.
    """
    basis_row = row
    if seg.basis_rows is not None:
        basis_row = tl.load(seg.basis_rows + row).to(tl.int64)
    width = key_stride * (2 if FORM.key_blocks[0].bits > 0 else 1)
    shift = tl.zeros([query.shape[0]], tl.float32)  # [BLOCK_M]
    sums = _zeros(FORM.key_blocks, query.shape[0], False, False)
    digits = _digits_of(heads, FORM.key_blocks, FORM.key_heads)
    strides = decode_integers(seg.basis_strides)
    decoder = basis_row_of(seg.decoder, strides, head, basis_row, 0, FORM.decoder_align)
    for first in tl.range(0, D, BLOCK_K, num_stages=1):
        channels = first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        q = tl.load(  # [BLOCK_M, BLOCK_K]
            query[:, None] + channels[None, :], mask=inside_queries[:, None] & (channels[None, :] < D), other=0.0
        )
        q = tl.where(negative, -q, q)
        if seg.delta is not None:
            delta = tl.load(  # [BLOCK_K]
                basis_row_of(seg.delta, strides, head, basis_row, 2, FORM.delta_align) + channels,
                mask=channels < D,
                other=0.0,
            )
            shift += tl.sum(q.to(tl.float32) * delta.to(tl.float32)[None, :], 1)
        lines = decoder + channels * FORM.decoder_stride  # [BLOCK_K]
        more = ()
        for index in tl.static_range(len(FORM.key_blocks)):
            more = more + _add_projections(
                sums, q, lines, channels < D, heads, width, digits[index], FORM.key_blocks[index], FORM.key_heads
            )
        sums = more
    projections = ()
    for index in tl.static_range(len(FORM.key_blocks)):
        for part in tl.static_range(FORM.key_blocks[index].parts):
            projected = sums[FORM.key_blocks[index].first_part + part]
            columns = tl.arange(0, FORM.key_blocks[index].padded)  # [W]
            inside = _inside(columns, width, FORM.key_blocks[index])
            if FORM.key_blocks[index].width == 0 or seg.scale is not None:
                own, power, held = _channels(
                    heads, columns, inside, digits[index], part, FORM.key_blocks[index], FORM.key_heads
                )
                if FORM.key_blocks[index].width == 0:
                    projected = projected * power[None, :]
                if seg.scale is not None:
                    scale = tl.load(  # [W]
                        basis_row_of(seg.scale, strides, head, basis_row, 4, FORM.scale_align) + own,
                        mask=held,
                        other=0.0,
                    )
                    projected = projected * scale[None, :]
            projections = projections + (projected,)
    return projections, shift


@triton.jit
def _of_projections(states, first, block, FORM: tl.constexpr, BLOCK_M: tl.constexpr, PAIRED: tl.constexpr):
    """Point at what `project_queries` keeps of a block (row, KV head, tile) of queries: lines [BLOCK_M], and width."""
    QUERIES: tl.constexpr = 8 if PAIRED else BLOCK_M
    lines = tl.arange(0, BLOCK_M) % QUERIES  # [BLOCK_M]
    return states + first.to(tl.int64) * STATE_ALIGN + (block * QUERIES + lines) * FORM.projected


@triton.jit
def _store_projections(pointers, projections, shift, FORM: tl.constexpr):
    """Store projected queries [M, W], part after part, then ``q . delta``."""
    start = 0
    for index in tl.static_range(len(FORM.key_blocks)):
        columns = tl.arange(0, FORM.key_blocks[index].padded)  # [W]
        for part in tl.static_range(FORM.key_blocks[index].parts):
            projected = projections[FORM.key_blocks[index].first_part + part]
            tl.store(pointers[:, None] + (start + columns)[None, :], projected)
            start += FORM.key_blocks[index].padded
    tl.store(pointers + start, shift)


@triton.jit
def _load_projections(pointers, FORM: tl.constexpr):
    """Load what `_store_projections` stored."""
    projections = ()
    start = 0
    for index in tl.static_range(len(FORM.key_blocks)):
        columns = tl.arange(0, FORM.key_blocks[index].padded)  # [W]
        for _ in tl.static_range(FORM.key_blocks[index].parts):
            projections = projections + (tl.load(pointers[:, None] + (start + columns)[None, :]),)
            start += FORM.key_blocks[index].padded
    return projections, tl.load(pointers + start)


@triton.jit
def _as_tiles(projections, unit, shift, digits, DTYPE: tl.constexpr, FORM: tl.constexpr, PAIRED: tl.constexpr):
    """Round projected queries to what Keys are multiplied with: tuples of tiles [M, W] and of rests for each block.

    The projected query is no number of the query's dtype. Rounding it would cost more precision than all else here; a
    second product with what the rounding lost costs little. `unit` is what a logit has to be multiplied with, and
    `shift` what has to be added to it then, both [M].
    """
    CODED: tl.constexpr = FORM.key_blocks[0].bits > 0
    if CODED and DTYPE == tl.float16:
        # Float16 has no room for all projected queries: they are brought to one size.
        most = tl.zeros([shift.shape[0]], tl.float32)
        for part in tl.static_range(len(projections)):
            most = tl.maximum(most, tl.max(tl.abs(projections[part]), 1))
        power = (most.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # of two, no larger
        power = tl.maximum(power, 2.0**-100)
        grown = 2.0**LARGEST / power
        unit = unit * (power * 2.0**-LARGEST)
    else:
        grown = tl.full([shift.shape[0]], 1.0, tl.float32)
    tiles = ()
    rests = ()
    for index in tl.static_range(len(FORM.key_blocks)):
        own = ()
        own_rests = ()
        for part in tl.static_range(FORM.key_blocks[index].parts):
            projected = projections[FORM.key_blocks[index].first_part + part] * grown[:, None]
            rounded = projected.to(DTYPE)
            rest = (projected - rounded.to(tl.float32)).to(DTYPE)
            if CODED:
                held = rounded.to(tl.float32) + rest.to(tl.float32)
                if FORM.key_blocks[index].width > 0:
                    shift -= 2.0 ** FORM.key_blocks[index].bits * tl.sum(held, 1) * unit
                else:
                    shift -= (1 << tl.maximum(digits[index], 0)).to(tl.float32) * tl.sum(held, 1) * unit
            if PAIRED:
                first = tl.arange(0, 16)[:, None] < 8
                rounded = tl.where(first, rounded, rest)
            if CODED:
                # As words have them: even bytes, then odd ones.
                own = own + _by_byte(rounded, FORM.key_blocks[index])
                own_rests = own_rests + _by_byte(rest, FORM.key_blocks[index])
            else:
                own = own + (rounded,)
                own_rests = own_rests + (rest,)
        tiles = tiles + (own,)
        rests = rests + (own_rests,)
    return tiles, rests, unit, shift


@triton.jit
def _by_byte(tile, BLOCK: tl.constexpr):
    """Part a tile [M, W] into its even and its odd columns; where these are 8 each, they stand in one tile."""
    HALF: tl.constexpr = BLOCK.padded // 2
    pairs = tl.reshape(tile, [tile.shape[0], HALF, 2])
    if HALF < 16:
        tiles = (tl.reshape(tl.permute(pairs, 0, 2, 1), [tile.shape[0], BLOCK.padded]),)
    else:
        tiles = tl.split(pairs)
    return tiles


@triton.jit
def _load_keys(k_ptrs, inside, width, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Load a block of the tokens' Keys as they are stored, [W, BLOCK_N]."""
    columns, offset = _stored_columns(BLOCK)
    there = _stored_inside(columns, width, BLOCK)[:, None]
    if EDGE:
        there = there & inside[None, :]
    pointers = k_ptrs[None, :] + (offset + columns)[:, None]
    # Codes are finite whatever their bits, and what meets those that are not there is zero: they need no fill.
    if BLOCK.bits > 0:
        stored = tl.load(pointers, mask=there)
    else:
        stored = tl.load(pointers, mask=there, other=0.0)
    return stored


@triton.jit
def _load_values(v_ptrs, inside, width, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Load a block of the tokens' Values as they are stored, [BLOCK_N, W]."""
    columns, offset = _stored_columns(BLOCK)
    there = _stored_inside(columns, width, BLOCK)[None, :]
    if EDGE:
        there = there & inside[:, None]
    pointers = v_ptrs[:, None] + (offset + columns)[None, :]
    if BLOCK.bits > 0:
        stored = tl.load(pointers, mask=there)
    else:
        stored = tl.load(pointers, mask=there, other=0.0)
    return stored


@triton.jit
def _add_logits(logits, tiles, rests, stored, digit, BLOCK: tl.constexpr, PAIRED: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Add the products of projected queries with one block of the tokens' Keys to `logits` [M, BLOCK_N]."""
    if BLOCK.width > 0 or (len(BLOCK.digits) == 1 and BLOCK.offset == 0):
        logits = _add_products(logits, tiles, rests, stored, BLOCK.bits, BLOCK, PAIRED, ASSEMBLY)
    else:
        for index in tl.static_range(len(BLOCK.digits)):
            if digit == BLOCK.digits[index]:
                logits = _add_products(logits, tiles, rests, stored, BLOCK.digits[index], BLOCK, PAIRED, ASSEMBLY)
    return logits


@triton.jit
def _add_products(
    logits,
    tiles,
    rests,
    stored,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Do so for digits of `BITS`."""
    DTYPE: tl.constexpr = tiles[0].dtype
    TILES: tl.constexpr = len(tiles) * BLOCK.bits // BITS if BITS > 0 else 1
    for part in tl.static_range(TILES):
        if BITS == 0:
            keys = stored
        elif BLOCK.padded == 16:
            keys = _halves(
                _unpack(stored, part, 0, BITS, False, ASSEMBLY),
                _unpack(stored, part, 1, BITS, False, ASSEMBLY),
            ).to(DTYPE)
        else:
            keys = _unpack(stored, part // 2, part % 2, BITS, False, ASSEMBLY).to(DTYPE)
        logits = tl.dot(tiles[part], keys, logits, input_precision="ieee")
        if len(rests) > 0 and not PAIRED and DTYPE != tl.float32:
            logits = tl.dot(rests[part], keys, logits, input_precision="ieee")
    return logits


@triton.jit
def _sums_of(acc, BLOCK: tl.constexpr):
    """Return those of the sums that are a block's own: one for each part, and for each byte of a word of codes."""
    BYTES: tl.constexpr = 2 if BLOCK.bits > 0 else 1
    own = ()
    for part in tl.static_range(BLOCK.parts * BYTES):
        own = own + (acc[BLOCK.first_part * BYTES + part],)
    return own


@triton.jit
def _add_values(
    own,
    alpha,
    p,  # weights [M, BLOCK_N]
    stored,
    digit,
    BLOCK: tl.constexpr,
    PAIRED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Add a block's weighted Values to its own sums, times `alpha` [M]."""
    if PAIRED and BLOCK.bits > 0:
        p = _halves(p, tl.zeros_like(p))
        alpha = tl.reshape(tl.permute(tl.join(alpha, alpha), 1, 0), [16])
    if BLOCK.width > 0 or (len(BLOCK.digits) == 1 and BLOCK.offset == 0):
        own = _add_weighted(own, alpha, p, stored, BLOCK.bits, BLOCK, PAIRED, ASSEMBLY)
    else:
        for index in tl.static_range(len(BLOCK.digits)):
            if digit == BLOCK.digits[index]:
                own = _add_weighted(own, alpha, p, stored, BLOCK.digits[index], BLOCK, PAIRED, ASSEMBLY)
    return own


@triton.jit
def _add_weighted(
    own,
    alpha,
    p,
    stored,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Do so for digits of `BITS`, of which there may be fewer than sums; the others stay zero."""
    new = ()
    if BITS == 0 and PAIRED:
        new = (tl.dot(tl.trans(stored), tl.trans(p), own[0] * alpha[None, :], input_precision="ieee"),)
    elif BITS == 0:
        new = (tl.dot(p, stored, own[0] * alpha[:, None], input_precision="ieee"),)
    else:
        for part in tl.static_range(8 // BITS):
            for byte in tl.static_range(2):
                values = _unpack(stored, part, byte, BITS, True, ASSEMBLY).to(p.dtype)
                new = new + (tl.dot(p, values, own[2 * part + byte] * alpha[:, None], input_precision="ieee"),)
        for rest in tl.static_range(16 // BITS, len(own)):
            new = new + (own[rest],)
    return new


@triton.jit
def _sum_of(acc, part: tl.constexpr, BLOCK: tl.constexpr, PAIRED: tl.constexpr):
    """Return the sum of part `part` of a block, [M, W] with columns as they are stored."""
    if BLOCK.bits == 0 and PAIRED:
        total = tl.trans(acc[BLOCK.first_part + part])
    elif BLOCK.bits == 0:
        total = acc[BLOCK.first_part + part]
    else:
        total = tl.join(acc[2 * (BLOCK.first_part + part)], acc[2 * (BLOCK.first_part + part) + 1])
        total = tl.reshape(total, [total.shape[0], BLOCK.padded])
        if PAIRED:  # the other half is zero
            total = tl.sum(tl.reshape(total, [2, 8, BLOCK.padded]), 0)
    return total


@triton.jit
def _store_block(
    states, there, acc, l_i, heads, width, digit, BLOCK: tl.constexpr, TABLE: tl.constexpr, PAIRED: tl.constexpr
):
    """Store a block's channels of the state, [M] pointers, with the centre of its codes put back."""
    columns = tl.arange(0, BLOCK.padded)  # [W]
    inside = _inside(columns, width, BLOCK)
    if BLOCK.bits == 0:
        centre = 0.0
    elif BLOCK.width > 0:
        centre = 2.0 ** (BLOCK.bits - 1)
    else:
        centre = (1 << tl.maximum(digit, 1) >> 1).to(tl.float32)
    for part in tl.static_range(BLOCK.parts):
        out = _sum_of(acc, part, BLOCK, PAIRED) / l_i[:, None] + centre
        channels, power, stored = _channels(heads, columns, inside, digit, part, BLOCK, TABLE)
        if BLOCK.width == 0:
            # The first digit of a code takes the others to it.
            stored = stored & (power == 1.0)
            for other in tl.static_range(part + 1, BLOCK.parts):
                others, weight, held = _channels(heads, columns, inside, digit, other, BLOCK, TABLE)
                more = (_sum_of(acc, other, BLOCK, PAIRED) / l_i[:, None] + centre) * weight[None, :]
                out += tl.where((held & (others == channels))[None, :], more, 0.0)
        tl.store(states[:, None] + channels[None, :], out, mask=there[:, None] & stored[None, :])


@triton.jit
def _head(
    stored,
    table,
    head,
    head_stride,
    STRIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    TABLE: tl.constexpr,
    CODED: tl.constexpr,
):
    """Find where a head's tokens begin, its entry of the table if there is one, and the stride from token to token.

    Codes are read as words of two bytes, and counted in them from here on.
    """
    if CODED:
        stored = stored.to(tl.pointer_type(tl.int16), bitcast=True)
    UNIT: tl.constexpr = ALIGN // 2 if CODED else ALIGN
    if table is None:
        heads = stored  # there is none to be read
        tokens = stored + head * head_stride * UNIT
        stride = STRIDE // 2 if CODED else STRIDE
    else:
        # With a table the stride of heads is the number of tokens stored, and tokens are as wide as they lie apart.
        heads = table + head * TABLE.entries
        tokens = stored + tl.load(heads).to(tl.int64) * head_stride * UNIT
        stride = tl.load(heads + 1) * UNIT
    return tokens, heads, stride


@triton.jit
def _token_pointers(keys, values, slots, tokens, inside, key_stride, value_stride):
    """Point at Keys and Values of tokens [BLOCK_N], through the slot table if there is one."""
    if slots is None:
        slot = tokens
    elif inside is None:
        slot = tl.load(slots + tokens).to(tl.int64)
    else:
        slot = tl.load(slots + tokens, mask=inside, other=0).to(tl.int64)
    return keys + slot * key_stride, values + slot * value_stride


@triton.jit
def _first_half(lines):
    """Return 8 of 16 lines that come twice."""
    return tl.max(tl.reshape(lines, [2, 8]), 0)


@triton.jit
def _attend_block(
    m_i,
    l_i,
    acc,
    tiles,
    rests,
    unit,
    k_ptrs,
    v_ptrs,
    mask,  # where it begins, for one query or for each [M]; or None
    tokens,  # of the block
    inside,
    inside_queries,
    key_stride,
    value_stride,
    key_digits,
    value_digits,
    FORM: tl.constexpr,
    DTYPE: tl.constexpr,  # of the query
    EDGE: tl.constexpr,  # some tokens may not be there
    SINGLE: tl.constexpr,
    PAIRED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Take a block of tokens in: the largest logit, the sum of weights and the weighted Values after it."""
    BLOCK_M: tl.constexpr = tiles[0][0].shape[0]
    logits = tl.zeros([BLOCK_M, FORM.block_n], tl.float32)  # [BLOCK_M, BLOCK_N]
    # Loads are left out of branches, inside which they would not be begun blocks ahead.
    for index in tl.static_range(len(FORM.key_blocks)):
        keys = _load_keys(k_ptrs, inside, key_stride, FORM.key_blocks[index], EDGE)
        logits = _add_logits(
            logits, tiles[index], rests[index], keys, key_digits[index], FORM.key_blocks[index], PAIRED, ASSEMBLY
        )
    if PAIRED:
        logits = tl.sum(tl.reshape(logits, [2, 8, FORM.block_n]), 0)  # [M, BLOCK_N] from here on
    if mask is not None:
        if SINGLE:
            seen = tl.load(mask + tokens * FORM.mask_stride, mask=inside, other=0)[None, :]
        else:
            seen = tl.load(  # [M, BLOCK_N]
                mask[:, None] + tokens[None, :] * FORM.mask_stride,
                mask=inside_queries[:, None] & inside[None, :],
                other=0,
            )
        if FORM.hidden is None:
            logits = tl.where(seen != 0, logits, float("-inf"))
        else:
            visible = seen > FORM.hidden
            added = tl.where(visible, seen, 0.0).to(tl.float32) * LOG2_E
            logits = tl.where(visible, logits * unit[:, None] + added, float("-inf"))
            unit = tl.full(unit.shape, 1.0, tl.float32)
    if EDGE:
        logits = tl.where(inside[None, :], logits, float("-inf"))

    m_ij = tl.maximum(m_i, tl.max(logits, 1) * unit)  # [M]
    # A query that saw no token yet has -inf here; any finite number keeps `p` at zero and out of NaN.
    m_safe = tl.where(m_ij == float("-inf"), 0.0, m_ij)  # [M]
    p = tl.exp2(logits * unit[:, None] - (m_safe - WEIGHT)[:, None])  # [M, BLOCK_N]
    alpha = tl.exp2(m_i - m_safe)  # [M]
    l_i = l_i * alpha + tl.sum(p, 1)
    if FORM.value_blocks[0].bits > 0 and DTYPE != tl.float32:
        p_rounded = p.to(tl.float16)
    else:
        p_rounded = p.to(DTYPE)
    new_acc = ()
    for index in tl.static_range(len(FORM.value_blocks)):
        values = _load_values(v_ptrs, inside, value_stride, FORM.value_blocks[index], EDGE)
        new_acc = new_acc + _add_values(
            _sums_of(acc, FORM.value_blocks[index]),
            alpha,
            p_rounded,
            values,
            value_digits[index],
            FORM.value_blocks[index],
            PAIRED,
            ASSEMBLY,
        )
    return m_ij, l_i, new_acc


@triton.jit
def _attend_segment(
    query,  # pointers of the queries [BLOCK_M]
    there,  # whether they are there [BLOCK_M]
    inside_queries,  # [M]
    positions,  # of each query [M]
    states,
    lses,
    seg,
    pair,  # (row * heads + head)
    query_index,  # index of a query within a state [M]
    head,
    row,
    split,  # within the segment
    scale_log2,
    total_splits,
    all_queries,  # Q * G
    block,  # (pair * tiles + tile)
    FORM: tl.constexpr,
    SINGLE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAIRED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PROJECTED: tl.constexpr,
):
    """Attend to one share of a segment's tokens and store the state: normalised output and base-2 log-sum-exp.

    A row's own length is divided, in whole blocks, so that ragged rows load all programs alike.
    """
    BLOCK_M: tl.constexpr = query.shape[0]
    QUERIES: tl.constexpr = 8 if PAIRED else BLOCK_M
    BLOCK_N: tl.constexpr = FORM.block_n
    first_split, splits, first_state, first_projection = decode_integers(seg.place)
    (
        max_length,
        mask_row_stride,
        mask_query_stride,
        key_head_stride,
        value_head_stride,
        slot_row_stride,
    ) = decode_integers(seg.sizes)
    start = tl.load(seg.starts + row).to(tl.int64)
    length = tl.load(seg.lengths + row).to(tl.int32)
    length = tl.maximum(tl.minimum(length, max_length), 0)
    blocks = tl.cdiv(length, BLOCK_N)
    share = blocks // splits
    more = blocks % splits  # splits that read a block more than the others
    begin = (split * share + tl.minimum(split, more)) * BLOCK_N
    end = tl.minimum(begin + (share + tl.where(split < more, 1, 0)) * BLOCK_N, length)

    keys, key_heads, key_stride = _head(
        seg.stored_keys,
        seg.key_heads,
        head,
        key_head_stride,
        FORM.key_stride,
        FORM.key_align,
        FORM.key_heads,
        FORM.key_blocks[0].bits > 0,
    )
    values, value_heads, value_stride = _head(
        seg.stored_values,
        seg.value_heads,
        head,
        value_head_stride,
        FORM.value_stride,
        FORM.value_align,
        FORM.value_heads,
        FORM.value_blocks[0].bits > 0,
    )
    key_digits = _digits_of(key_heads, FORM.key_blocks, FORM.key_heads)
    value_digits = _digits_of(value_heads, FORM.value_blocks, FORM.value_heads)
    DTYPE: tl.constexpr = query.dtype.element_ty
    # The unit of logits is positive; queries have the scale's sign.
    negative = scale_log2 < 0
    scale_log2 = tl.abs(scale_log2)
    unit = tl.zeros([BLOCK_M], tl.float32) + scale_log2  # [BLOCK_M]
    if seg.decoder is None:
        channels = tl.arange(0, BLOCK_D)  # [BLOCK_D]
        if PAIRED:
            there = there & (tl.arange(0, BLOCK_M) < 8)
        q = tl.load(query[:, None] + channels[None, :], mask=there[:, None] & (channels[None, :] < D), other=0.0)
        tiles = ((tl.where(negative, -q, q),),)  # [BLOCK_M, BLOCK_D]
        rests = ((),)
        shift = tl.zeros([BLOCK_M], tl.float32)  # [BLOCK_M]
    else:
        if PROJECTED:
            pointers = _of_projections(states, first_projection, block, FORM, BLOCK_M, PAIRED)
            projections, shift = _load_projections(pointers, FORM)
        else:
            projections, shift = _project(
                query, there, negative, seg, key_heads, key_stride, head, row, FORM, D, BLOCK_K
            )
        if FORM.key_blocks[0].bits > 0 and DTYPE != tl.float32:
            tiles, rests, unit, shift = _as_tiles(
                projections, unit, shift * scale_log2, key_digits, tl.float16, FORM, PAIRED
            )
        else:
            tiles, rests, unit, shift = _as_tiles(
                projections, unit, shift * scale_log2, key_digits, DTYPE, FORM, PAIRED
            )
    if PAIRED:
        unit = _first_half(unit)
        shift = _first_half(shift)
    unit = tl.maximum(unit, SMALLEST)  # [M]

    tokens = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    if seg.slots is None:
        keys += (start + begin) * key_stride
        values += (start + begin) * value_stride
        slots = None
    else:
        slots = seg.slots + row * slot_row_stride + start + begin
    if seg.mask is None:
        mask = None
    elif SINGLE:
        mask = seg.mask + row * mask_row_stride + begin.to(tl.int64) * FORM.mask_stride
    else:
        mask = (
            seg.mask
            + row * mask_row_stride
            + positions.to(tl.int64) * mask_query_stride
            + begin.to(tl.int64) * FORM.mask_stride
        )

    m_i = tl.full([QUERIES], float("-inf"), tl.float32)  # [M]
    l_i = tl.zeros([QUERIES], tl.float32)  # [M]
    acc = _zeros(FORM.value_blocks, BLOCK_M, True, PAIRED)
    # With one warp the loop over whole blocks has no instruction to spare for tokens that are not there.
    whole = begin
    if PAIRED:
        whole = begin + (end - begin) // BLOCK_N * BLOCK_N
        for _ in tl.range(begin, whole, BLOCK_N, num_stages=FORM.stages):
            k_ptrs, v_ptrs = _token_pointers(keys, values, slots, tokens, None, key_stride, value_stride)
            m_i, l_i, acc = _attend_block(
                m_i,
                l_i,
                acc,
                tiles,
                rests,
                unit,
                k_ptrs,
                v_ptrs,
                mask,
                tokens,
                tokens >= 0,
                inside_queries,
                key_stride,
                value_stride,
                key_digits,
                value_digits,
                FORM,
                DTYPE,
                False,
                SINGLE,
                PAIRED,
                ASSEMBLY,
            )
            if slots is None:
                keys += BLOCK_N * key_stride
                values += BLOCK_N * value_stride
            else:
                slots += BLOCK_N
            if mask is not None:
                mask += BLOCK_N * FORM.mask_stride
    for first in tl.range(whole, end, BLOCK_N, num_stages=1 if PAIRED else FORM.stages):
        inside = first + tokens < end  # [BLOCK_N]
        k_ptrs, v_ptrs = _token_pointers(keys, values, slots, tokens, inside, key_stride, value_stride)
        m_i, l_i, acc = _attend_block(
            m_i,
            l_i,
            acc,
            tiles,
            rests,
            unit,
            k_ptrs,
            v_ptrs,
            mask,
            tokens,
            inside,
            inside_queries,
            key_stride,
            value_stride,
            key_digits,
            value_digits,
            FORM,
            DTYPE,
            True,
            SINGLE,
            PAIRED,
            ASSEMBLY,
        )
        if slots is None:
            keys += BLOCK_N * key_stride
            values += BLOCK_N * value_stride
        else:
            slots += BLOCK_N
        if mask is not None:
            mask += BLOCK_N * FORM.mask_stride

    nothing = l_i == 0.0  # [M]
    l_i = tl.where(nothing, 1.0, l_i)
    lse = tl.where(nothing, float("-inf"), m_i + (tl.log2(l_i) - WEIGHT) + shift)  # [M]
    tl.store(
        lses + (pair * total_splits + first_split + split) * all_queries + query_index,
        lse,
        mask=inside_queries,
    )
    state = ((pair * splits + split) * all_queries + query_index) * FORM.state_width  # [M]
    state += first_state.to(tl.int64) * STATE_ALIGN
    for index in tl.static_range(len(FORM.value_blocks)):
        _store_block(
            states + state,
            inside_queries,
            acc,
            l_i,
            value_heads,
            value_stride * (2 if FORM.value_blocks[index].bits > 0 else 1),
            value_digits[index],
            FORM.value_blocks[index],
            FORM.value_heads,
            PAIRED,
        )


@triton.jit
def _merge_if_last(
    states,
    lses,
    merging,
    queries,
    total_splits,
    programs,
    tile,
    head,
    row,
    G: tl.constexpr,
    TILE_Q: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Merge the states of a tile's queries, if the other programs of (row, KV head, tile) have stored theirs.

    They are counted, one counter for each such triple. What all threads stored before the barrier is released by the
    one that counts, and acquired by whoever counts after it. The last to count sets the counter back for the next
    launch.
    """
    heads = tl.num_programs(1)
    counter = merging.counters + (row * heads + head) * (tl.num_programs(0) // programs) + tile
    tl.debug_barrier()
    ended = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if ended == programs - 1:
        tl.store(counter, 0)
        offs_q = tl.arange(0, MERGE.queries)  # [M]
        position = tile * TILE_Q + offs_q // G  # [M]
        merge_queries(
            states,
            lses,
            merging.out,
            merging.lse,
            merging.segments,
            position * G + offs_q % G,
            (offs_q < TILE_Q * G) & (position < queries),
            queries,
            head,
            heads,
            row,
            total_splits,
            0,
            MERGE.forms,
            G,
            MERGE.width,
            MERGE.block,
            MERGE.numbers,
            MERGE.splits,
            MERGE.stages,
        )


@triton.jit
def _queries(
    query,
    row_stride,
    head_stride,
    stride,
    queries,
    tile,
    head,
    row,
    G: tl.constexpr,
    QUERY_ALIGN: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Point at the queries of a tile, and tell whether they are there, both [BLOCK_M]."""
    QUERIES: tl.constexpr = 8 if PAIRED else BLOCK_M
    offs_m = tl.arange(0, BLOCK_M) % QUERIES  # [BLOCK_M]
    there = (offs_m < TILE_Q * G) & (tile * TILE_Q + offs_m // G < queries)  # [BLOCK_M]
    pointers = (  # [BLOCK_M]
        query
        + row * row_stride * QUERY_ALIGN
        + (head * G + offs_m % G) * head_stride * QUERY_ALIGN
        + (tile * TILE_Q + offs_m // G).to(tl.int64) * stride * QUERY_ALIGN
    )
    return pointers, there


@triton.jit
def project_queries(
    query,  # [B, H * G, Q, D]
    states,  # float32, written: each segment's projected queries [B, H, tiles, M, projected]
    segments,  # a SegmentArguments each
    scale,
    integers,  # encoded: Q, strides of the query in QUERY_ALIGN
    FORMS: tl.constexpr,  # a SegmentForm each
    G: tl.constexpr,
    D: tl.constexpr,
    QUERY_ALIGN: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Project queries once for all programs of `attend_splits`; grid (segments * tiles of queries, H, B)."""
    queries, row_stride, head_stride, stride = decode_integers(integers)
    tiles = tl.num_programs(0) // len(FORMS)
    own = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    pointers, there = _queries(
        query, row_stride, head_stride, stride, queries, tile, head, row, G, QUERY_ALIGN, TILE_Q, BLOCK_M, PAIRED
    )
    for index in tl.static_range(len(FORMS)):
        if own == index:
            _project_segment(
                pointers,
                there,
                states,
                segments[index],
                scale,
                head,
                row,
                (row * tl.num_programs(1) + head) * tiles + tile,
                form_of(FORMS, index),
                D,
                BLOCK_K,
                PAIRED,
            )


@triton.jit
def _project_segment(
    query,
    there,
    states,
    seg,
    scale,
    head,
    row,
    block,
    FORM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Project queries on what the Keys of a segment store, if they have a basis, and store that."""
    if seg.decoder is not None:
        _, _, _, first_projection = decode_integers(seg.place)
        _, _, _, key_head_stride, _, _ = decode_integers(seg.sizes)
        _, heads, key_stride = _head(
            seg.stored_keys,
            seg.key_heads,
            head,
            key_head_stride,
            FORM.key_stride,
            FORM.key_align,
            FORM.key_heads,
            FORM.key_blocks[0].bits > 0,
        )
        projections, shift = _project(query, there, scale < 0, seg, heads, key_stride, head, row, FORM, D, BLOCK_K)
        pointers = _of_projections(states, first_projection, block, FORM, query.shape[0], PAIRED)
        _store_projections(pointers, projections, shift, FORM)


@triton.jit
def attend_splits(
    query,  # [B, H * G, Q, D]
    states,  # float32, written: each segment's [B, H, splits, Q * G, state_width], and base-2 log-sum-exps
    segments,  # a SegmentArguments each
    scale,
    # Encoded: Q, total_splits, where lses begin, splits of this launch, its first, strides of the query in QUERY_ALIGN.
    integers,
    merging,  # a MergingArguments where the last program merges, else None
    FORMS: tl.constexpr,  # a SegmentForm each
    SINGLE: tl.constexpr,  # Q is 1
    G: tl.constexpr,
    D: tl.constexpr,
    QUERY_ALIGN: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,  # channels of the query projected at once
    PAIRED: tl.constexpr,
    ASSEMBLY: tl.constexpr,  # of NVIDIA
    PROJECTED: tl.constexpr,  # whether `project_queries` ran before
    MERGE: tl.constexpr,  # a LastMerge in a tuple, or nothing
):
    """Attend to segments and store partial states; grid (splits of these segments * tiles of queries, H, B)."""
    queries, total_splits, first_lse, programs, first_split, row_stride, head_stride, stride = decode_integers(integers)
    lses = states + first_lse.to(tl.int64) * STATE_ALIGN  # [B, H, total_splits, Q * G]
    split = first_split + tl.program_id(0) % programs
    tile = tl.program_id(0) // programs
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    QUERIES: tl.constexpr = 8 if PAIRED else BLOCK_M
    pointers, there = _queries(
        query, row_stride, head_stride, stride, queries, tile, head, row, G, QUERY_ALIGN, TILE_Q, BLOCK_M, PAIRED
    )
    offs_q = tl.arange(0, QUERIES)  # [M]
    positions = tile * TILE_Q + offs_q // G  # [M]
    inside = (offs_q < TILE_Q * G) & (positions < queries)  # [M]
    for index in tl.static_range(len(FORMS)):
        first_split, splits, _, _ = decode_integers(segments[index].place)
        own = split - first_split
        if (own >= 0) & (own < splits):
            _attend_segment(
                pointers,
                there,
                inside,
                positions,
                states,
                lses,
                segments[index],
                row * tl.num_programs(1) + head,
                positions * G + offs_q % G,
                head,
                row,
                own,
                scale * LOG2_E,
                total_splits,
                queries * G,
                (row * tl.num_programs(1) + head) * (tl.num_programs(0) // programs) + tile,
                form_of(FORMS, index),
                SINGLE,
                D,
                BLOCK_D,
                BLOCK_K,
                PAIRED,
                ASSEMBLY,
                PROJECTED,
            )
    if len(MERGE) > 0:
        _merge_if_last(
            states, lses, merging, queries, total_splits, programs, tile, head, row, G, TILE_Q, form_of(MERGE, 0)
        )
