"""Kernel text of the fused decode attention; checks, grids and launches are in `decode.py`.

A layer is decoded by `decode_splits`, in which each program reads a share of the tokens of one (row, KV head) and
leaves a partial state, and `merge_splits`, which adds the states up. Logarithms are base 2 until the merge ends.
Blocks: G query heads of a KV head, N tokens, D head width, R rank, W key width (R compressed, D dense), DV value width.
"""

import triton
import triton.language as tl


@triton.jit
def _share_of_row(starts, lengths, row, max_length, split, splits, BLOCK_N: tl.constexpr):
    """First token of a batch row in storage (int64), and the tokens ``begin : end`` of the row that a split reads.

    A row's own length is divided, in whole blocks, so that ragged rows load all programs alike.
    """
    start = tl.load(starts + row).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    length = tl.maximum(tl.minimum(length, max_length), 0)
    blocks = tl.cdiv(length, BLOCK_N)
    begin = blocks * split // splits * BLOCK_N
    end = tl.minimum(blocks * (split + 1) // splits * BLOCK_N, length)
    return start, begin, end


@triton.jit
def _attend_tokens(
    query,  # [BLOCK_G, BLOCK_W] in the Keys' dtype
    query_rest,  # [BLOCK_G, BLOCK_W] what `query` lost to rounding, or None
    shift,  # [BLOCK_G] added to q . k, or None
    keys,  # pointer to the row's token `begin`, head chosen
    values,  # the same
    mask,  # pointer to the row's mask at `begin`, or None
    begin,
    end,
    scale_log2,
    mask_stride,
    WIDTH: tl.constexpr,
    D_V: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    BOOL_MASK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over tokens ``begin : end``: normalised output [BLOCK_G, BLOCK_DV] and base-2 lse [BLOCK_G]."""
    tokens = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    channels = tl.arange(0, BLOCK_W)  # [BLOCK_W]
    value_channels = tl.arange(0, BLOCK_DV)  # [BLOCK_DV]
    key_offsets = channels[:, None] + tokens[None, :] * KEY_STRIDE  # [BLOCK_W, BLOCK_N]
    value_offsets = tokens[:, None] * VALUE_STRIDE + value_channels[None, :]  # [BLOCK_N, BLOCK_DV]

    highest = tl.full([BLOCK_G], float("-inf"), tl.float32)  # [BLOCK_G]
    total = tl.zeros([BLOCK_G], tl.float32)  # [BLOCK_G]
    out = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)  # [BLOCK_G, BLOCK_DV]
    for first in tl.range(begin, end, BLOCK_N):
        inside = first + tokens < end  # [BLOCK_N]
        key_tile = tl.load(  # [BLOCK_W, BLOCK_N]
            keys + key_offsets, mask=(channels[:, None] < WIDTH) & inside[None, :], other=0.0
        )
        value_tile = tl.load(  # [BLOCK_N, BLOCK_DV]
            values + value_offsets, mask=inside[:, None] & (value_channels[None, :] < D_V), other=0.0
        )
        logits = tl.dot(query, key_tile, input_precision="ieee")  # [BLOCK_G, BLOCK_N]
        if query_rest is not None:
            logits = tl.dot(query_rest, key_tile, logits, input_precision="ieee")
        if shift is not None:
            logits += shift[:, None]
        logits *= scale_log2
        if mask is not None:
            seen = tl.load(mask + tokens.to(tl.int64) * mask_stride, mask=inside, other=0)  # [BLOCK_N]
            if BOOL_MASK:
                inside = inside & (seen != 0)
            else:
                logits += seen.to(tl.float32)[None, :] * 1.4426950408889634
            mask += BLOCK_N * mask_stride
        logits = tl.where(inside[None, :], logits, float("-inf"))

        new_highest = tl.maximum(highest, tl.max(logits, 1))  # [BLOCK_G]
        # A head that saw no token yet has -inf here; any finite number keeps its weights at zero and out of NaN.
        reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # [BLOCK_G]
        weights = tl.exp2(logits - reference[:, None])  # [BLOCK_G, BLOCK_N]
        fade = tl.exp2(highest - reference)  # [BLOCK_G]
        total = total * fade + tl.sum(weights, 1)
        out = tl.dot(weights.to(value_tile.dtype), value_tile, out * fade[:, None], input_precision="ieee")
        highest = new_highest
        keys += BLOCK_N * KEY_STRIDE
        values += BLOCK_N * VALUE_STRIDE

    nothing = total == 0.0  # [BLOCK_G]
    out = out / tl.where(nothing, 1.0, total)[:, None]
    lse = tl.where(nothing, float("-inf"), highest + tl.log2(tl.where(nothing, 1.0, total)))  # [BLOCK_G]
    return out, lse


@triton.jit(
    # Numbers that change from step to step, or between caches: they must not make new kernels.
    do_not_specialize=[
        "compressed_max_length",
        "dense_max_length",
        "compressed_splits",
        "dense_splits",
        "first_split",
        "total_splits",
        "query_row_stride",
        "query_head_stride",
        "compressed_key_head_stride",
        "compressed_value_head_stride",
        "compressed_mask_row_stride",
        "compressed_mask_stride",
        "decoder_head_stride",
        "decoder_row_stride",
        "decoder_stride",
        "delta_head_stride",
        "delta_row_stride",
        "dense_key_head_stride",
        "dense_value_head_stride",
        "dense_mask_row_stride",
        "dense_mask_stride",
    ]
)
def decode_splits(
    query,  # [B, H * G, D]
    split_out,  # [B, H, total_splits, G, D_V] float32, written
    split_lse,  # [B, H, total_splits, G] float32, base 2, written
    # A compressed segment, or None for every pointer.
    compressed_keys,  # [H, N, RANK]
    compressed_values,  # [H, N, D_V]
    compressed_starts,  # [B]
    compressed_lengths,  # [B]
    compressed_mask,  # [B, compressed_max_length] or None
    decoder,  # [H, R, D, RANK]
    delta,  # [H, R, D] or None
    basis_rows,  # [B], or None: row b uses row b of the basis
    # A dense segment, or None for every pointer.
    dense_keys,  # [H, N, D]
    dense_values,  # [H, N, D_V]
    dense_starts,  # [B]
    dense_lengths,  # [B]
    dense_mask,  # [B, dense_max_length] or None
    scale,
    compressed_max_length,
    dense_max_length,
    compressed_splits,
    dense_splits,
    first_split,
    total_splits,
    query_row_stride,
    query_head_stride,
    # Head strides of stored tokens count vectors of ALIGN elements: so the compiler knows that rows are aligned.
    compressed_key_head_stride,
    compressed_value_head_stride,
    compressed_mask_row_stride,
    compressed_mask_stride,
    decoder_head_stride,
    decoder_row_stride,
    decoder_stride,
    delta_head_stride,
    delta_row_stride,
    dense_key_head_stride,
    dense_value_head_stride,
    dense_mask_row_stride,
    dense_mask_stride,
    COMPRESSED_KEY_STRIDE: tl.constexpr,
    COMPRESSED_VALUE_STRIDE: tl.constexpr,
    DENSE_KEY_STRIDE: tl.constexpr,
    DENSE_VALUE_STRIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPRESSED_BOOL_MASK: tl.constexpr,
    DENSE_BOOL_MASK: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Partial states of up to two segments; grid (compressed_splits + dense_splits, H, B).

    The first `compressed_splits` programs of a (row, head) read the compressed segment, the others the dense one.
    """
    split = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    group = tl.arange(0, BLOCK_G)  # [BLOCK_G]
    channels = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    q = tl.load(  # [BLOCK_G, BLOCK_D]
        query + row * query_row_stride + (head * G + group[:, None]) * query_head_stride + channels[None, :],
        mask=(group[:, None] < G) & (channels[None, :] < D),
        other=0.0,
    )
    scale_log2 = scale * 1.4426950408889634
    out = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)  # [BLOCK_G, BLOCK_DV]
    lse = tl.full([BLOCK_G], float("-inf"), tl.float32)  # [BLOCK_G]

    if compressed_keys is not None:  # noqa: SIM102 - decided while it is compiled, the inner one while it runs
        if split < compressed_splits:
            start, begin, end = _share_of_row(
                compressed_starts, compressed_lengths, row, compressed_max_length, split, compressed_splits, BLOCK_N
            )
            basis_row = row
            if basis_rows is not None:
                basis_row = tl.load(basis_rows + row).to(tl.int64)
            ranks = tl.arange(0, BLOCK_R)  # [BLOCK_R]
            decoder_tile = tl.load(  # [BLOCK_D, BLOCK_R]
                decoder
                + head * decoder_head_stride
                + basis_row * decoder_row_stride
                + channels[:, None].to(tl.int64) * decoder_stride
                + ranks[None, :],
                mask=(channels[:, None] < D) & (ranks[None, :] < RANK),
                other=0.0,
            )
            if decoder_tile.dtype == q.dtype:
                projected = tl.dot(q, decoder_tile, input_precision="ieee")  # [BLOCK_G, BLOCK_R]
            else:
                projected = tl.dot(q.to(tl.float32), decoder_tile.to(tl.float32), input_precision="ieee")
            # The projected query is no number of the Keys' dtype. Rounding it would cost more precision than all else
            # here; a second product with what the rounding lost costs little.
            rounded = projected.to(compressed_keys.dtype.element_ty)  # [BLOCK_G, BLOCK_R]
            rest = None
            if compressed_keys.dtype.element_ty != tl.float32:
                rest = (projected - rounded.to(tl.float32)).to(rounded.dtype)  # [BLOCK_G, BLOCK_R]
            shift = None
            if delta is not None:
                delta_row = tl.load(  # [BLOCK_D]
                    delta + head * delta_head_stride + basis_row * delta_row_stride + channels,
                    mask=channels < D,
                    other=0.0,
                )
                shift = tl.sum(q.to(tl.float32) * delta_row.to(tl.float32)[None, :], 1)  # [BLOCK_G]
            mask = None
            if compressed_mask is not None:
                mask = compressed_mask + row * compressed_mask_row_stride + begin.to(tl.int64) * compressed_mask_stride
            out, lse = _attend_tokens(
                rounded,
                rest,
                shift,
                compressed_keys + head * compressed_key_head_stride * ALIGN + (start + begin) * COMPRESSED_KEY_STRIDE,
                compressed_values
                + head * compressed_value_head_stride * ALIGN
                + (start + begin) * COMPRESSED_VALUE_STRIDE,
                mask,
                begin,
                end,
                scale_log2,
                compressed_mask_stride,
                RANK,
                D_V,
                COMPRESSED_KEY_STRIDE,
                COMPRESSED_VALUE_STRIDE,
                COMPRESSED_BOOL_MASK,
                BLOCK_G,
                BLOCK_R,
                BLOCK_DV,
                BLOCK_N,
            )
    if dense_keys is not None:  # noqa: SIM102 - as above
        if split >= compressed_splits:
            start, begin, end = _share_of_row(
                dense_starts, dense_lengths, row, dense_max_length, split - compressed_splits, dense_splits, BLOCK_N
            )
            mask = None
            if dense_mask is not None:
                mask = dense_mask + row * dense_mask_row_stride + begin.to(tl.int64) * dense_mask_stride
            out, lse = _attend_tokens(
                q,
                None,
                None,
                dense_keys + head * dense_key_head_stride * ALIGN + (start + begin) * DENSE_KEY_STRIDE,
                dense_values + head * dense_value_head_stride * ALIGN + (start + begin) * DENSE_VALUE_STRIDE,
                mask,
                begin,
                end,
                scale_log2,
                dense_mask_stride,
                D,
                D_V,
                DENSE_KEY_STRIDE,
                DENSE_VALUE_STRIDE,
                DENSE_BOOL_MASK,
                BLOCK_G,
                BLOCK_D,
                BLOCK_DV,
                BLOCK_N,
            )

    state = ((row * tl.num_programs(1) + head) * total_splits + first_split + split) * G + group  # [BLOCK_G]
    value_channels = tl.arange(0, BLOCK_DV)  # [BLOCK_DV]
    tl.store(split_lse + state, lse, mask=group < G)
    tl.store(
        split_out + state[:, None] * D_V + value_channels[None, :],
        out,
        mask=(group[:, None] < G) & (value_channels[None, :] < D_V),
    )


@triton.jit(do_not_specialize=["total_splits"])
def merge_splits(
    split_out,  # [B, H, total_splits, G, D_V] float32
    split_lse,  # [B, H, total_splits, G] float32, base 2
    out,  # [B, H * G, D_V], written
    lse,  # [B, H * G] float32, natural, written
    total_splits,
    G: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add the partial states of a query head up by their log-sum-exp; grid (H * G, B)."""
    query_head = tl.program_id(0)
    query_row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + query_head
    # Query heads of a group stand side by side, so (row, KV head) counts query rows in steps of G.
    state = query_row // G * total_splits * G + query_head % G  # of split 0
    splits = tl.arange(0, BLOCK_S)  # [BLOCK_S]
    value_channels = tl.arange(0, BLOCK_DV)  # [BLOCK_DV]

    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    merged = tl.zeros([BLOCK_DV], tl.float32)  # [BLOCK_DV]
    for first in tl.range(0, total_splits, BLOCK_S):
        inside = first + splits < total_splits  # [BLOCK_S]
        states = state + (first + splits) * G  # [BLOCK_S]
        tile_lse = tl.load(split_lse + states, mask=inside, other=float("-inf"))  # [BLOCK_S]
        tile = tl.load(  # [BLOCK_S, BLOCK_DV]
            split_out + states[:, None] * D_V + value_channels[None, :],
            mask=inside[:, None] & (value_channels[None, :] < D_V),
            other=0.0,
        )
        new_highest = tl.maximum(highest, tl.max(tile_lse, 0))
        reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(tile_lse - reference)  # [BLOCK_S]
        fade = tl.exp2(highest - reference)
        total = total * fade + tl.sum(weights, 0)
        merged = merged * fade + tl.sum(weights[:, None] * tile, 0)
        highest = new_highest

    nothing = total == 0.0
    merged = merged / tl.where(nothing, 1.0, total)
    natural = (highest + tl.log2(tl.where(nothing, 1.0, total))) * 0.6931471805599453
    tl.store(lse + query_row, tl.where(nothing, float("-inf"), natural))
    tl.store(out + query_row * D_V + value_channels, merged.to(out.dtype.element_ty), mask=value_channels < D_V)
