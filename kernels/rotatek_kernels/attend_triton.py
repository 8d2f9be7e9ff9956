"""The kernel that attends: each program reads a share of a segment's tokens for one (row, KV head, tile of queries).

It leaves a partial state, which `merge_triton.py` adds up. Logarithms are base 2 until the merge ends. Blocks: M
queries (the heads of a group side by side, position after position), N tokens, D head width, W columns that one token
stores in one block of its layout. What differs between segments comes in tuples, an entry each (`forms.py`).
"""

import triton
import triton.language as tl

from rotatek_kernels.forms import STATE_ALIGN, basis_row_of, decode_integers, form_of

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _unpack(stored, part: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Return a stored tile as numbers: as it is, or part `part` of packed bytes less the centre ``2 ** (BITS - 1)``.

    A code is set into the mantissa of a power of two, which is then subtracted: cheaper than a conversion, and exact.
    """
    CENTRE: tl.constexpr = 2.0 ** (BITS - 1)
    if BITS == 0:
        numbers = stored
    else:
        codes = (stored >> (part * BITS)) & (2**BITS - 1)
        if DTYPE == tl.float16:
            numbers = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + CENTRE)
        elif DTYPE == tl.bfloat16 and BITS < 8:
            numbers = (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - (128.0 + CENTRE)
        else:
            wide = (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + CENTRE)
            numbers = wide.to(DTYPE)
    return numbers


@triton.jit
def _zeros(BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Make a sum [BLOCK_M, W] for each part of each block."""
    zeros = ()
    for index in tl.static_range(len(BLOCKS)):
        for _ in tl.static_range(BLOCKS[index].parts):
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
def _channels(heads, columns, inside, part: tl.constexpr, BLOCK: tl.constexpr, TABLE: tl.constexpr):
    """Return the channel of part `part` of a block's columns, [W], and the power of two by which it counts there."""
    if BLOCK.width > 0:
        channels = BLOCK.channel + part * BLOCK.width + columns
        power = 1.0
    else:
        DIGIT: tl.constexpr = part * BLOCK.bits
        log_bits = _column(heads, 0, BLOCK.offset + columns, inside, TABLE)
        channels = _column(heads, 1, BLOCK.offset + columns, inside, TABLE)
        channels += (DIGIT >> log_bits) * _column(heads, 2, BLOCK.offset + columns, inside, TABLE)
        channels = tl.max_contiguous(tl.multiple_of(channels, TABLE.align), TABLE.align)
        power = (1 << (DIGIT & ((1 << log_bits) - 1))).to(tl.float32)
    return channels, power


@triton.jit
def _add_projections(sums, q, lines, there, heads, width, BLOCK: tl.constexpr, TABLE: tl.constexpr):
    """Add the products of query channels with a block's part of the decoder to its `sums`.

    `lines` are pointers to these channels' lines of the decoder, `there` whether they are there.
    """
    columns = tl.arange(0, BLOCK.padded)  # [W]
    inside = _inside(columns, width, BLOCK)
    projected = ()
    for part in tl.static_range(BLOCK.parts):
        channels, _ = _channels(heads, columns, inside, part, BLOCK, TABLE)
        decoder = tl.load(  # [BLOCK_K, W]
            lines[:, None] + channels[None, :], mask=there[:, None] & inside[None, :], other=0.0
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
    seg,
    heads,  # this head's entry of the table, where there is one
    width,  # of a token
    head,
    basis_row,
    FORM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Project the queries on what the Keys store: a tile [BLOCK_M, W] for each part of each block, and its rest.

    Also what is added to all logits, [BLOCK_M]: ``q . delta`` and the centres of the codes. Channels are read a few at
    a time, or the decoder would fill the registers.
    """
    shift = tl.zeros([query.shape[0]], tl.float32)  # [BLOCK_M]
    sums = _zeros(FORM.key_blocks, query.shape[0])
    strides = decode_integers(seg.basis_strides)
    decoder = basis_row_of(seg.decoder, strides, head, basis_row, 0, FORM.decoder_align)
    for first in tl.range(0, D, BLOCK_K, num_stages=1):
        channels = first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        q = tl.load(  # [BLOCK_M, BLOCK_K]
            query[:, None] + channels[None, :], mask=inside_queries[:, None] & (channels[None, :] < D), other=0.0
        )
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
                sums, q, lines, channels < D, heads, width, FORM.key_blocks[index], FORM.key_heads
            )
        sums = more
    tiles = ()
    rests = ()
    for index in tl.static_range(len(FORM.key_blocks)):
        for part in tl.static_range(FORM.key_blocks[index].parts):
            projected = sums[FORM.key_blocks[index].first_part + part]
            columns = tl.arange(0, FORM.key_blocks[index].padded)  # [W]
            inside = _inside(columns, width, FORM.key_blocks[index])
            if FORM.key_blocks[index].width == 0 or seg.scale is not None:
                own, power = _channels(heads, columns, inside, part, FORM.key_blocks[index], FORM.key_heads)
                if FORM.key_blocks[index].width == 0:
                    projected = projected * power[None, :]
                if seg.scale is not None:
                    scale = tl.load(  # [W]
                        basis_row_of(seg.scale, strides, head, basis_row, 4, FORM.scale_align) + own,
                        mask=inside,
                        other=0.0,
                    )
                    projected = projected * scale[None, :]
            if FORM.key_blocks[index].bits > 0:
                shift += 2.0 ** (FORM.key_blocks[index].bits - 1) * tl.sum(projected, 1)
            # The projected query is no number of the query's dtype. Rounding it would cost more precision than all else
            # here; a second product with what the rounding lost costs little.
            rounded = projected.to(query.dtype.element_ty)
            tiles = tiles + (rounded,)
            if rounded.dtype != tl.float32:
                rests = rests + ((projected - rounded.to(tl.float32)).to(rounded.dtype),)
    return tiles, rests, shift


@triton.jit
def _add_logits(logits, tiles, rests, k_ptrs, inside, width, BLOCK: tl.constexpr):
    """Add the products of projected queries with one block of the tokens' Keys to `logits` [BLOCK_M, BLOCK_N]."""
    columns = tl.arange(0, BLOCK.padded)  # [W]
    inside_tile = _inside(columns, width, BLOCK)[:, None] & inside[None, :]  # [W, BLOCK_N]
    pointers = k_ptrs[None, :] + (BLOCK.offset + columns)[:, None]
    # Codes are finite whatever their bits, and what meets those that are not there is zero: they need no fill.
    if BLOCK.bits > 0:
        stored = tl.load(pointers, mask=inside_tile)
    else:
        stored = tl.load(pointers, mask=inside_tile, other=0.0)
    for part in tl.static_range(BLOCK.parts):
        keys = _unpack(stored, part, BLOCK.bits, tiles[0].dtype)
        logits = tl.dot(tiles[BLOCK.first_part + part], keys, logits, input_precision="ieee")
        if len(rests) > 0:
            logits = tl.dot(rests[BLOCK.first_part + part], keys, logits, input_precision="ieee")
    return logits


@triton.jit
def _add_values(acc, alpha, p, v_ptrs, inside, width, BLOCK: tl.constexpr):
    """Add a block's weighted Values to those of the sums `acc` [BLOCK_M, W] that are its own, times `alpha`."""
    columns = tl.arange(0, BLOCK.padded)  # [W]
    inside_tile = inside[:, None] & _inside(columns, width, BLOCK)[None, :]  # [BLOCK_N, W]
    pointers = v_ptrs[:, None] + (BLOCK.offset + columns)[None, :]
    if BLOCK.bits > 0:
        stored = tl.load(pointers, mask=inside_tile)
    else:
        stored = tl.load(pointers, mask=inside_tile, other=0.0)
    new_acc = ()
    for part in tl.static_range(BLOCK.parts):
        values = _unpack(stored, part, BLOCK.bits, p.dtype)
        scaled = acc[BLOCK.first_part + part] * alpha[:, None]
        new_acc = new_acc + (tl.dot(p, values, scaled, input_precision="ieee"),)
    return new_acc


@triton.jit
def _store_block(states, there, acc, l_i, heads, width, BLOCK: tl.constexpr, TABLE: tl.constexpr):
    """Store a block's channels of the state, [BLOCK_M] pointers, with the centre of its codes put back."""
    columns = tl.arange(0, BLOCK.padded)  # [W]
    inside = _inside(columns, width, BLOCK)
    for part in tl.static_range(BLOCK.parts):
        out = acc[BLOCK.first_part + part] / l_i[:, None]
        if BLOCK.bits > 0:
            out += 2.0 ** (BLOCK.bits - 1)
        channels, power = _channels(heads, columns, inside, part, BLOCK, TABLE)
        stored = inside
        if BLOCK.width == 0:
            # The first digit of a code takes the others to it.
            stored = inside & (power == 1.0)
            for other in tl.static_range(part + 1, BLOCK.parts):
                digit = acc[BLOCK.first_part + other] / l_i[:, None] + 2.0 ** (BLOCK.bits - 1)
                others, weight = _channels(heads, columns, inside, other, BLOCK, TABLE)
                out += tl.where((others == channels)[None, :], digit * weight[None, :], 0.0)
        tl.store(states[:, None] + channels[None, :], out, mask=there[:, None] & stored[None, :])


@triton.jit
def _head(stored, table, head, head_stride, STRIDE: tl.constexpr, ALIGN: tl.constexpr, TABLE: tl.constexpr):
    """Find where a head's tokens begin, its entry of the table if there is one, and the stride from token to token."""
    if table is None:
        heads = stored  # there is none to be read
        tokens = stored + head * head_stride * ALIGN
        stride = STRIDE
    else:
        # With a table the stride of heads is the number of tokens stored, and tokens are as wide as they lie apart.
        heads = table + head * (3 + 3 * TABLE.columns)
        tokens = stored + tl.load(heads).to(tl.int64) * head_stride * ALIGN
        stride = tl.load(heads + 1) * ALIGN
    return tokens, heads, stride


@triton.jit
def _attend_segment(
    query,  # pointers of the queries [BLOCK_M]
    inside_queries,  # [BLOCK_M]
    positions,  # of each query [BLOCK_M]
    states,
    lses,
    seg,
    pair,  # (row * heads + head)
    query_index,  # index of a query within a state [BLOCK_M]
    head,
    row,
    split,  # within the segment
    scale_log2,
    total_splits,
    all_queries,  # Q * G
    FORM: tl.constexpr,
    SINGLE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend to one share of a segment's tokens and store the state: normalised output and base-2 log-sum-exp.

    A row's own length is divided, in whole blocks, so that ragged rows load all programs alike.
    """
    BLOCK_M: tl.constexpr = query.shape[0]
    BLOCK_N: tl.constexpr = FORM.block_n
    first_split, splits, first_state = decode_integers(seg.place)
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
        seg.stored_keys, seg.key_heads, head, key_head_stride, FORM.key_stride, FORM.key_align, FORM.key_heads
    )
    values, value_heads, value_stride = _head(
        seg.stored_values,
        seg.value_heads,
        head,
        value_head_stride,
        FORM.value_stride,
        FORM.value_align,
        FORM.value_heads,
    )
    if seg.decoder is None:
        channels = tl.arange(0, BLOCK_D)  # [BLOCK_D]
        q = tl.load(  # [BLOCK_M, BLOCK_D]
            query[:, None] + channels[None, :], mask=inside_queries[:, None] & (channels[None, :] < D), other=0.0
        )
        tiles = (q,)
        rests = ()
        shift = tl.zeros([BLOCK_M], tl.float32)  # [BLOCK_M]
    else:
        basis_row = row
        if seg.basis_rows is not None:
            basis_row = tl.load(seg.basis_rows + row).to(tl.int64)
        tiles, rests, shift = _project(query, inside_queries, seg, key_heads, key_stride, head, basis_row, FORM, D, 32)
        shift *= scale_log2

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

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)  # [BLOCK_M]
    l_i = tl.zeros([BLOCK_M], tl.float32)  # [BLOCK_M]
    acc = _zeros(FORM.value_blocks, BLOCK_M)
    for first in tl.range(begin, end, BLOCK_N, num_stages=FORM.stages):
        inside = first + tokens < end  # [BLOCK_N]
        if slots is None:
            k_ptrs = keys + tokens * key_stride  # [BLOCK_N]
            v_ptrs = values + tokens * value_stride  # [BLOCK_N]
        else:
            slot = tl.load(slots + tokens, mask=inside, other=0).to(tl.int64)  # [BLOCK_N]
            k_ptrs = keys + slot * key_stride
            v_ptrs = values + slot * value_stride
        logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
        for index in tl.static_range(len(FORM.key_blocks)):
            if FORM.key_blocks[index].width == 0 and index > 0:
                if key_stride > FORM.key_blocks[index].offset:  # or this head ends before it
                    logits = _add_logits(logits, tiles, rests, k_ptrs, inside, key_stride, FORM.key_blocks[index])
            else:
                logits = _add_logits(logits, tiles, rests, k_ptrs, inside, key_stride, FORM.key_blocks[index])
        logits = logits * scale_log2 + shift[:, None]
        if mask is not None:
            if SINGLE:
                seen = tl.load(mask + tokens * FORM.mask_stride, mask=inside, other=0)[None, :]
            else:
                seen = tl.load(  # [BLOCK_M, BLOCK_N]
                    mask[:, None] + tokens[None, :] * FORM.mask_stride,
                    mask=inside_queries[:, None] & inside[None, :],
                    other=0,
                )
            if FORM.hidden is None:
                logits = tl.where(seen != 0, logits, float("-inf"))
            else:
                visible = seen > FORM.hidden
                logits = tl.where(visible, logits + tl.where(visible, seen, 0.0).to(tl.float32) * LOG2_E, float("-inf"))
            mask += BLOCK_N * FORM.mask_stride
        logits = tl.where(inside[None, :], logits, float("-inf"))

        m_ij = tl.maximum(m_i, tl.max(logits, 1))  # [BLOCK_M]
        # A query that saw no token yet has -inf here; any finite number keeps `p` at zero and out of NaN.
        m_safe = tl.where(m_ij == float("-inf"), 0.0, m_ij)  # [BLOCK_M]
        p = tl.exp2(logits - m_safe[:, None])  # [BLOCK_M, BLOCK_N]
        alpha = tl.exp2(m_i - m_safe)  # [BLOCK_M]
        l_i = l_i * alpha + tl.sum(p, 1)
        p_rounded = p.to(query.dtype.element_ty)
        new_acc = ()
        for index in tl.static_range(len(FORM.value_blocks)):
            if FORM.value_blocks[index].width == 0 and index > 0:
                block_acc = ()
                for part in tl.static_range(FORM.value_blocks[index].parts):
                    block_acc = block_acc + (acc[FORM.value_blocks[index].first_part + part],)
                if value_stride > FORM.value_blocks[index].offset:
                    block_acc = _add_values(
                        acc, alpha, p_rounded, v_ptrs, inside, value_stride, FORM.value_blocks[index]
                    )
                new_acc = new_acc + block_acc
            else:
                new_acc = new_acc + _add_values(
                    acc, alpha, p_rounded, v_ptrs, inside, value_stride, FORM.value_blocks[index]
                )
        acc = new_acc
        m_i = m_ij
        if slots is None:
            keys += BLOCK_N * key_stride
            values += BLOCK_N * value_stride
        else:
            slots += BLOCK_N

    nothing = l_i == 0.0  # [BLOCK_M]
    l_i = tl.where(nothing, 1.0, l_i)
    lse = tl.where(nothing, float("-inf"), m_i + tl.log2(l_i))  # [BLOCK_M]
    tl.store(
        lses + (pair * total_splits + first_split + split) * all_queries + query_index,
        lse,
        mask=inside_queries,
    )
    state = ((pair * splits + split) * all_queries + query_index) * FORM.state_width  # [BLOCK_M]
    state += first_state.to(tl.int64) * STATE_ALIGN
    for index in tl.static_range(len(FORM.value_blocks)):
        _store_block(
            states + state,
            inside_queries,
            acc,
            l_i,
            value_heads,
            value_stride,
            FORM.value_blocks[index],
            FORM.value_heads,
        )


@triton.jit
def attend_splits(
    query,  # [B, H * G, Q, D]
    states,  # float32, written: each segment's [B, H, splits, Q * G, state_width], and base-2 log-sum-exps
    segments,  # a SegmentArguments each
    scale,
    # Encoded: Q, total_splits, where lses begin, splits of this launch, its first, strides of the query in QUERY_ALIGN.
    integers,
    FORMS: tl.constexpr,  # a SegmentForm each
    SINGLE: tl.constexpr,  # Q is 1
    G: tl.constexpr,
    D: tl.constexpr,
    QUERY_ALIGN: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend to segments and store partial states; grid (splits of these segments * tiles of queries, H, B)."""
    queries, total_splits, first_lse, programs, first_split, row_stride, head_stride, stride = decode_integers(integers)
    lses = states + first_lse.to(tl.int64) * STATE_ALIGN  # [B, H, total_splits, Q * G]
    split = first_split + tl.program_id(0) % programs
    tile = tl.program_id(0) // programs
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    positions = tile * TILE_Q + offs_m // G  # [BLOCK_M]
    inside = (offs_m < TILE_Q * G) & (positions < queries)  # [BLOCK_M]
    pointers = (  # [BLOCK_M]
        query
        + row * row_stride * QUERY_ALIGN
        + (head * G + offs_m % G) * head_stride * QUERY_ALIGN
        + positions.to(tl.int64) * stride * QUERY_ALIGN
    )
    for index in tl.static_range(len(FORMS)):
        first_split, splits, _ = decode_integers(segments[index].place)
        own = split - first_split
        if (own >= 0) & (own < splits):
            _attend_segment(
                pointers,
                inside,
                positions,
                states,
                lses,
                segments[index],
                row * tl.num_programs(1) + head,
                positions * G + offs_m % G,
                head,
                row,
                own,
                scale * LOG2_E,
                total_splits,
                queries * G,
                form_of(FORMS, index),
                SINGLE,
                D,
                BLOCK_D,
            )
