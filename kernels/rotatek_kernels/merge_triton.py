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
    query_index,
    head,
    row,
    total_splits,
    all_queries,
    first_channel,
    FORM: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merge a segment's states: channels of its output [BLOCK_DV], rotated back once, and its base-2 log-sum-exp."""
    channels = first_channel + tl.arange(0, BLOCK_DV)  # [BLOCK_DV]
    if seg.decoder is None:
        columns = channels  # [W]
    else:
        columns = tl.arange(0, FORM.block_w)  # [W]
    first_split, splits, first_state = decode_integers(seg.place)
    width = FORM.state_width
    if seg.value_heads is not None:
        width = tl.load(seg.value_heads + head * (3 + 3 * FORM.value_heads.columns) + 2)
    m_i = tl.full([], float("-inf"), tl.float32)
    l_i = tl.zeros([], tl.float32)
    acc = tl.zeros([columns.shape[0]], tl.float32)  # [W]
    for first in tl.range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        inside = split < splits
        lse = tl.load(  # [BLOCK_S]
            lses + (pair * total_splits + first_split + split) * all_queries + query_index,
            mask=inside,
            other=float("-inf"),
        )
        state = ((pair * splits + split) * all_queries + query_index) * FORM.state_width  # [BLOCK_S]
        tile = tl.load(  # [BLOCK_S, W]
            states + first_state.to(tl.int64) * STATE_ALIGN + state[:, None] + columns[None, :],
            mask=inside[:, None] & (columns[None, :] < width),
            other=0.0,
        )
        m_ij = tl.maximum(m_i, tl.max(lse, 0))
        m_safe = tl.where(m_ij == float("-inf"), 0.0, m_ij)
        p = tl.exp2(lse - m_safe)  # [BLOCK_S]
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, 0)
        acc = acc * alpha + tl.sum(p[:, None] * tile, 0)
        m_i = m_ij
    nothing = l_i == 0.0
    acc = acc / tl.where(nothing, 1.0, l_i)
    if seg.decoder is not None:
        strides = decode_integers(seg.basis_strides)
        basis_row = row
        if seg.basis_rows is not None:
            basis_row = tl.load(seg.basis_rows + row).to(tl.int64)
        if seg.scale is not None:
            acc *= tl.load(  # [W]
                basis_row_of(seg.scale, strides, head, basis_row, 4, FORM.scale_align) + columns,
                mask=columns < width,
                other=0.0,
            )
        decoder = tl.load(  # [BLOCK_DV, W]
            basis_row_of(seg.decoder, strides, head, basis_row, 0, FORM.decoder_align)
            + channels[:, None] * FORM.decoder_stride
            + columns[None, :],
            mask=(channels[:, None] < D_V) & (columns[None, :] < width),
            other=0.0,
        )
        acc = tl.sum(decoder.to(tl.float32) * acc[None, :], 1)  # [BLOCK_DV]
        if seg.delta is not None:
            acc += tl.load(
                basis_row_of(seg.delta, strides, head, basis_row, 2, FORM.delta_align) + channels,
                mask=channels < D_V,
                other=0.0,
            ).to(tl.float32)
    return acc, tl.where(nothing, float("-inf"), m_i + tl.log2(tl.where(nothing, 1.0, l_i)))


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
    BLOCK_S: tl.constexpr,
):
    """Add up the states of a query by their log-sum-exp; grid (H * G * Q, B, blocks of channels)."""
    queries, total_splits, first_lse = decode_integers(integers)
    lses = states + first_lse.to(tl.int64) * STATE_ALIGN  # [B, H, total_splits, Q * G]
    position = tl.program_id(0) % queries
    query_head = tl.program_id(0) // queries
    heads = tl.num_programs(0) // queries // G
    row = tl.program_id(1).to(tl.int64)
    head = (query_head // G).to(tl.int64)
    first_channel = tl.program_id(2) * BLOCK_DV
    m_i = tl.full([], float("-inf"), tl.float32)
    l_i = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_DV], tl.float32)  # [BLOCK_DV]
    for index in tl.static_range(len(FORMS)):
        segment_out, segment_lse = _merge_segment(
            states,
            lses,
            segments[index],
            row * heads + head,
            position * G + query_head % G,
            head,
            row,
            total_splits,
            queries * G,
            first_channel,
            form_of(FORMS, index),
            D_V,
            BLOCK_DV,
            BLOCK_S,
        )
        m_ij = tl.maximum(m_i, segment_lse)
        m_safe = tl.where(m_ij == float("-inf"), 0.0, m_ij)
        p = tl.exp2(segment_lse - m_safe)
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + p
        acc = acc * alpha + p * segment_out
        m_i = m_ij
    nothing = l_i == 0.0
    acc = acc / tl.where(nothing, 1.0, l_i)
    natural = (m_i + tl.log2(tl.where(nothing, 1.0, l_i))) * LN_2
    channels = first_channel + tl.arange(0, BLOCK_DV)  # [BLOCK_DV]
    tl.store(
        out + ((row * queries + position) * heads * G + query_head) * D_V + channels,
        acc.to(out.dtype.element_ty),
        mask=channels < D_V,
    )
    if first_channel == 0:
        tl.store(lse + (row * heads * G + query_head) * queries + position, tl.where(nothing, float("-inf"), natural))
