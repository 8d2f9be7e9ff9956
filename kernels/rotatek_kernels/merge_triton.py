"""The kernel that adds up the partial states of `attend_triton.py` by their log-sum-exps; blocks as there."""

import triton
import triton.language as tl

from rotatek_kernels.forms import STATE_ALIGN, basis_row_of, decode_integers, form_of

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _merge_segment(
    states,
    lses,
    seg,
    pair,
    query_index,  # [M]
    there,  # [M]
    head,
    row,
    total_splits,
    all_queries,
    first_channel,
    FORM: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    NUMBERS: tl.constexpr,
    MOST_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Merge a segment's states: channels of outputs [M, BLOCK_DV], rotated back once, and base-2 log-sum-exps [M]."""
    channels = first_channel + tl.arange(0, BLOCK_DV)  # [BLOCK_DV]
    if seg.decoder is None:
        columns = channels  # [W]
    else:
        columns = tl.arange(0, FORM.block_w)  # [W]
    LINES: tl.constexpr = query_index.shape[0] * columns.shape[0]
    BLOCK_S: tl.constexpr = min(MOST_S, max(1, NUMBERS // LINES))
    first_split, splits, first_state, _ = decode_integers(seg.place)
    width = FORM.state_width
    if seg.value_heads is not None:
        width = tl.load(seg.value_heads + head * FORM.value_heads.entries + 2)
    m_i = tl.full(query_index.shape, float("-inf"), tl.float32)
    l_i = tl.zeros(query_index.shape, tl.float32)
    acc = tl.zeros([query_index.shape[0], columns.shape[0]], tl.float32)  # [M, W]
    for first in tl.range(0, splits, BLOCK_S, num_stages=STAGES):
        split = first + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        inside = there[:, None] & (split < splits)[None, :]  # [M, BLOCK_S]
        lse = tl.load(
            lses + (pair * total_splits + first_split + split)[None, :] * all_queries + query_index[:, None],
            mask=inside,
            other=float("-inf"),
        )
        state = ((pair * splits + split)[None, :] * all_queries + query_index[:, None]) * FORM.state_width
        tile = tl.load(  # [M, BLOCK_S, W]
            states + first_state.to(tl.int64) * STATE_ALIGN + state[:, :, None] + columns[None, None, :],
            mask=inside[:, :, None] & (columns < width)[None, None, :],
            other=0.0,
        )
        m_ij = tl.maximum(m_i, tl.max(lse, 1))
        m_safe = tl.where(m_ij == float("-inf"), 0.0, m_ij)
        p = tl.exp2(lse - m_safe[:, None])  # [M, BLOCK_S]
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None] + tl.sum(p[:, :, None] * tile, 1)
        m_i = m_ij
    nothing = l_i == 0.0
    acc = acc / tl.where(nothing, 1.0, l_i)[:, None]
    if seg.decoder is not None:
        strides = decode_integers(seg.basis_strides)
        basis_row = row
        if seg.basis_rows is not None:
            basis_row = tl.load(seg.basis_rows + row).to(tl.int64)
        if seg.scale is not None:
            scale = tl.load(  # [W]
                basis_row_of(seg.scale, strides, head, basis_row, 4, FORM.scale_align) + columns,
                mask=columns < width,
                other=0.0,
            )
            acc *= scale[None, :]
        decoder = tl.load(  # [BLOCK_DV, W]
            basis_row_of(seg.decoder, strides, head, basis_row, 0, FORM.decoder_align)
            + channels[:, None] * FORM.decoder_stride
            + columns[None, :],
            mask=(channels[:, None] < D_V) & (columns[None, :] < width),
            other=0.0,
        )
        acc = tl.sum(decoder.to(tl.float32)[None, :, :] * acc[:, None, :], 2)  # [M, BLOCK_DV]
        if seg.delta is not None:
            delta = tl.load(
                basis_row_of(seg.delta, strides, head, basis_row, 2, FORM.delta_align) + channels,
                mask=channels < D_V,
                other=0.0,
            )
            acc += delta.to(tl.float32)[None, :]
    return acc, tl.where(nothing, float("-inf"), m_i + tl.log2(tl.where(nothing, 1.0, l_i)))


@triton.jit
def merge_queries(
    states,
    lses,
    out,
    lse,
    segments,
    query_index,  # [M]: of queries of this row and KV head, position after position
    there,  # [M]
    queries,  # Q
    head,
    heads,
    row,
    total_splits,
    first_channel,
    FORMS: tl.constexpr,
    G: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    NUMBERS: tl.constexpr,
    MOST_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Merge the states of a head's queries and store channels of their outputs, with the first also log-sum-exps.

    As many states are read at once as `NUMBERS` numbers hold, `MOST_S` at most, and `STAGES` times as many are on their
    way.
    """
    m_i = tl.full(query_index.shape, float("-inf"), tl.float32)
    l_i = tl.zeros(query_index.shape, tl.float32)
    acc = tl.zeros([query_index.shape[0], BLOCK_DV], tl.float32)  # [M, BLOCK_DV]
    for index in tl.static_range(len(FORMS)):
        segment_out, segment_lse = _merge_segment(
            states,
            lses,
            segments[index],
            row * heads + head,
            query_index,
            there,
            head,
            row,
            total_splits,
            queries * G,
            first_channel,
            form_of(FORMS, index),
            D_V,
            BLOCK_DV,
            NUMBERS,
            MOST_S,
            STAGES,
        )
        m_ij = tl.maximum(m_i, segment_lse)
        m_safe = tl.where(m_ij == float("-inf"), 0.0, m_ij)
        p = tl.exp2(segment_lse - m_safe)
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * segment_out
        m_i = m_ij
    nothing = l_i == 0.0
    acc = acc / tl.where(nothing, 1.0, l_i)[:, None]
    natural = (m_i + tl.log2(tl.where(nothing, 1.0, l_i))) * LN_2
    channels = first_channel + tl.arange(0, BLOCK_DV)  # [BLOCK_DV]
    position = query_index // G
    query_head = head * G + query_index % G
    tl.store(
        out + (((row * queries + position) * heads * G + query_head) * D_V)[:, None] + channels[None, :],
        acc.to(out.dtype.element_ty),
        mask=there[:, None] & (channels < D_V)[None, :],
    )
    if first_channel == 0:
        tl.store(
            lse + (row * heads * G + query_head) * queries + position,
            tl.where(nothing, float("-inf"), natural),
            mask=there,
        )


@triton.jit
def merge_splits(
    states,  # float32: each segment's [B, H, splits, Q * G, state_width], and base-2 log-sum-exps
    out,  # [B, Q, H * G, D_V], written
    lse,  # [B, H * G, Q] float32, natural, written
    segments,  # a MergeArguments each
    integers,  # encoded: Q, total_splits, where log-sum-exps begin
    FORMS: tl.constexpr,  # a MergeForm each
    G: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    NUMBERS: tl.constexpr,
    MOST_S: tl.constexpr,
):
    """Add up the states of a query by their log-sum-exp; grid (H * G * Q, B, blocks of channels)."""
    queries, total_splits, first_lse = decode_integers(integers)
    position = tl.program_id(0) % queries
    query_head = tl.program_id(0) // queries
    query_index = position * G + query_head % G + tl.arange(0, 1)  # [1]
    merge_queries(
        states,
        states + first_lse.to(tl.int64) * STATE_ALIGN,  # [B, H, total_splits, Q * G]
        out,
        lse,
        segments,
        query_index,
        query_index >= 0,
        queries,
        (query_head // G).to(tl.int64),
        tl.num_programs(0) // queries // G,
        tl.program_id(1).to(tl.int64),
        total_splits,
        tl.program_id(2) * BLOCK_DV,
        FORMS,
        G,
        D_V,
        BLOCK_DV,
        NUMBERS,
        MOST_S,
        1,
    )
