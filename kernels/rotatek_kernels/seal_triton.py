"""The kernels that seal: moments of the states, the subspace iteration, ranges of the codes, and what is stored.

Each works on the Keys and the Values of a layer in one launch. A *pair* is a head of a compressed row, a *split* a
share of its tokens. Blocks: N tokens, D channels of the states, C coefficients, K channels at a time where all do not
fit. What differs between Keys and Values comes in tuples, an entry each (`seal_forms.py`).

The specification is `rotatek_cache.codecs` over `core/fitting.py` and `core/quantization.py`.
"""

import triton
import triton.language as tl

from rotatek_kernels.forms import decode_integers, form_of
from rotatek_kernels.seal_forms import MOST_SPLITS

SAMPLE = tl.constexpr(64)  # tokens whose mean states are centred by, before the true mean is known
RIDGE = tl.constexpr(1e-4)
WEIGHT_FLOOR = tl.constexpr(1e-3)  # of the median channel weight
TINY = tl.constexpr(1.1754943508222875e-38)  # smallest normal float32
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: adding and subtracting it rounds to an integer, half to even


@triton.jit
def _span(places, row):
    """Find a row's first token in the packed order, and its tokens."""
    length = decode_integers(places.sizes)[1]
    if places.starts is None:
        start = row * length
    else:
        start = tl.load(places.starts + row)
        length = tl.load(places.lengths + row).to(tl.int32)
    return start, length


@triton.jit
def _share(length, split, splits, BLOCK_N: tl.constexpr):
    """Divide a row's tokens in whole blocks: where share `split` begins and ends."""
    blocks = tl.cdiv(length, BLOCK_N)
    share = blocks // splits
    more = blocks % splits  # splits that read a block more than the others
    begin = (split * share + tl.minimum(split, more)) * BLOCK_N
    return begin, tl.minimum(begin + (share + tl.where(split < more, 1, 0)) * BLOCK_N, length)


@triton.jit
def _pointers(state, places, head, tokens, inside, FORM: tl.constexpr):
    """Find where tokens [N] of the packed order lie in the states as the model left them."""
    row_stride, head_stride, stride = decode_integers(state.strides)
    states = state.states + head * head_stride * FORM.align
    if places.token_rows is None:
        pointers = states + tokens.to(tl.int64) * stride * FORM.align
    else:
        rows = tl.load(places.token_rows + tokens, mask=inside, other=0).to(tl.int64)
        columns = tl.load(places.token_columns + tokens, mask=inside, other=0).to(tl.int64)
        pointers = states + rows * row_stride * FORM.align + columns * stride * FORM.align
    return pointers


@triton.jit
def _sample_mean(pointers, channels, there, FORM: tl.constexpr):
    """Average a few tokens [SAMPLE] of a row, rounded to the states' dtype, in float32 [D]."""
    states = tl.load(pointers[:, None] + channels[None, :], mask=there[None, :], other=0.0)
    mean = tl.sum(states.to(tl.float32), 0) / SAMPLE
    return mean.to(states.dtype).to(tl.float32)


@triton.jit
def _add_moments(state, places, pair, row, head, split, splits, tile, FORM: tl.constexpr):
    """Sum a share's states and their products around a sample's mean, for one tile of the scatter."""
    left = (tile // FORM.tiles) * FORM.block_d + tl.arange(0, FORM.block_d)  # [D]
    right = (tile % FORM.tiles) * FORM.block_d + tl.arange(0, FORM.block_d)  # [D]
    start, length = _span(places, row)
    sampled = start + (tl.arange(0, SAMPLE).to(tl.int64) * length) // SAMPLE
    samples = _pointers(state, places, head, sampled, sampled >= 0, FORM)
    left_shift = _sample_mean(samples, left, left < FORM.width, FORM)
    if FORM.tiles > 1:
        right_shift = _sample_mean(samples, right, right < FORM.width, FORM)
    total = tl.zeros([FORM.block_d], tl.float32)
    scatter = tl.zeros([FORM.block_d, FORM.block_d], tl.float32)
    begin, end = _share(length, split, splits, FORM.block_n)
    for first in tl.range(begin, end, FORM.block_n):
        tokens = first + tl.arange(0, FORM.block_n)
        inside = tokens < end
        pointers = _pointers(state, places, head, start + tokens, inside, FORM)
        mask = inside[:, None] & (left[None, :] < FORM.width)
        states = tl.load(pointers[:, None] + left[None, :], mask=mask, other=0.0)
        centred = tl.where(mask, states.to(tl.float32) - left_shift[None, :], 0.0)  # [N, D]
        total += tl.sum(centred, 0)
        rounded = centred.to(states.dtype)  # for tensor cores
        if FORM.tiles > 1:
            mask = inside[:, None] & (right[None, :] < FORM.width)
            states = tl.load(pointers[:, None] + right[None, :], mask=mask, other=0.0)
            others = tl.where(mask, states.to(tl.float32) - right_shift[None, :], 0.0).to(states.dtype)
        else:
            others = rounded
        scatter = tl.dot(tl.trans(rounded), others, scatter, input_precision=FORM.precision)
    part = pair * splits + split
    there = left < FORM.width
    tl.store(
        state.scatters + (part * FORM.width + left)[:, None] * FORM.width + right[None, :],
        scatter,
        mask=there[:, None] & (right[None, :] < FORM.width),
    )
    if tile % FORM.tiles == 0:
        tl.store(state.sums + part * FORM.width + left, total, mask=there)
        if split == 0:
            tl.store(state.shifts + pair * FORM.width + left, left_shift, mask=there)


@triton.jit
def _add_states(state, places, pair, row, head, split, splits, FORM: tl.constexpr):
    """Sum a share's states."""
    channels = tl.arange(0, FORM.padded_width)
    there = channels < FORM.width
    start, length = _span(places, row)
    total = tl.zeros([FORM.padded_width], tl.float32)
    begin, end = _share(length, split, splits, FORM.block_n)
    for first in tl.range(begin, end, FORM.block_n):
        tokens = first + tl.arange(0, FORM.block_n)
        inside = tokens < end
        pointers = _pointers(state, places, head, start + tokens, inside, FORM)
        mask = inside[:, None] & there[None, :]
        states = tl.load(pointers[:, None] + channels[None, :], mask=mask, other=0.0)
        total += tl.sum(states.to(tl.float32), 0)
    tl.store(state.sums + (pair * splits + split) * FORM.width + channels, total, mask=there)


@triton.jit
def sum_moments(states, places, FORMS: tl.constexpr):
    """Sum moments of shares of tokens; grid (splits * tiles, pairs, Keys and Values)."""
    splits = decode_integers(places.sizes)[2]
    rows = decode_integers(places.sizes)[0]
    pair = tl.program_id(1).to(tl.int64)
    split = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits
    for index in tl.static_range(len(FORMS)):
        if tl.program_id(2) == index:
            if form_of(FORMS, index).rank > 0:
                if tile < form_of(FORMS, index).tiles * form_of(FORMS, index).tiles:
                    _add_moments(
                        states[index],
                        places,
                        pair,
                        pair % rows,
                        pair // rows,
                        split,
                        splits,
                        tile,
                        form_of(FORMS, index),
                    )
            elif tile == 0:
                _add_states(
                    states[index], places, pair, pair % rows, pair // rows, split, splits, form_of(FORMS, index)
                )


@triton.jit
def _places_from_top(stored, values, channels, FORM: tl.constexpr):
    """Rank each of `values` [D] among all, which lie at `stored`: 0 for the largest; of equals the first is first."""
    found = tl.zeros([FORM.padded_width], tl.int32)
    for first in tl.range(0, FORM.width, FORM.block_k, num_stages=1):
        others = first + tl.arange(0, FORM.block_k)
        other = tl.load(stored + others, mask=others < FORM.width, other=float("-inf"))
        above = (other[None, :] > values[:, None]) | (
            (other[None, :] == values[:, None]) & (others[None, :] < channels[:, None])
        )
        found += tl.sum(above.to(tl.int32), 1)
    return found


@triton.jit
def _weights(state, scratch, row, head, channels, there, FORM: tl.constexpr):
    """Find the channel weights [D] of a pair, the largest of them 1; see `fitting.query_channel_norm`."""
    row_stride, head_stride, stride, count = decode_integers(state.query_sizes)
    square = tl.zeros([FORM.padded_width], tl.float32)
    queries = state.queries + row * row_stride + head * FORM.group * head_stride
    for first in tl.range(0, count, FORM.block_w, num_stages=1):
        window = first + tl.arange(0, FORM.block_w)
        inside = window < count
        if state.valid is not None:
            inside = inside & (tl.load(state.valid + row * count + window, mask=inside, other=0) != 0)
        total = tl.zeros([FORM.block_w, FORM.padded_width], tl.float32)
        for member in tl.range(0, FORM.group, num_stages=1):
            total += tl.load(
                queries + member * head_stride + (window * stride)[:, None] + channels[None, :],
                mask=inside[:, None] & there[None, :],
                other=0.0,
            ).to(tl.float32)
        total = total / FORM.group
        square += tl.sum(total * total, 0)
    norm = tl.sqrt(square)
    tl.store(scratch + channels, norm, mask=there)
    tl.debug_barrier()
    above = _places_from_top(scratch, norm, channels, FORM)
    # The lower median, as torch has it.
    lower: tl.constexpr = FORM.width - 1 - (FORM.width - 1) // 2
    median = tl.sum(tl.where(there & (above == lower), norm, 0.0), 0)
    tl.debug_barrier()
    norm = tl.maximum(norm, median * WEIGHT_FLOOR)
    most = tl.max(tl.where(there, norm, 0.0), 0)
    # Without a valid query all weights are the same.
    weight = tl.where(most > 0, tl.maximum(norm, TINY) / tl.where(most > 0, most, 1.0), 1.0)
    if FORM.exponent != 1.0:
        weight = tl.exp2(tl.log2(weight) * FORM.exponent)
    return weight


@triton.jit
def _orthonormal_panel(panel, columns):
    """Make the columns of a panel [D, P] orthonormal by modified Gram-Schmidt; those that are zero stay zero."""
    # Scaled first: squares of small columns are below what float32 holds.
    most = tl.max(tl.abs(panel), 0)
    panel = panel / tl.where(most > 0, most, 1.0)[None, :]
    for column in tl.range(0, columns.shape[0], num_stages=1):
        own = tl.sum(tl.where(columns[None, :] == column, panel, 0.0), 1)  # [D]
        overlap = tl.sum(panel * own[:, None], 0)  # [P]
        square = tl.sum(tl.where(columns == column, overlap, 0.0), 0)
        inverse = 1.0 / tl.where(square > 0, square, 1.0)
        panel -= own[:, None] * tl.where(columns > column, overlap * inverse, 0.0)[None, :]
    norm = tl.sqrt(tl.sum(panel * panel, 0))
    return panel / tl.where(norm > 0, norm, 1.0)[None, :]


@triton.jit
def _make_orthonormal(kept, channels, there, FORM: tl.constexpr):
    """Make the columns of the matrix at `kept` [D, C] orthonormal, a panel of them at a time.

    Steps of Gram-Schmidt follow one another, so that their number and what each touches is the time of a seal: within a
    panel they are short, and later columns are freed of a whole panel by products.
    """
    in_panel = tl.arange(0, FORM.panel)  # [P]
    in_chunk = tl.arange(0, FORM.block_c)  # [C], some of the columns
    lines = kept + channels[:, None] * FORM.padded_channels
    for first in tl.range(0, FORM.rank, FORM.panel, num_stages=1):
        panel = tl.load(lines + first + in_panel[None, :], mask=there[:, None], other=0.0)  # [D, P]
        panel = _orthonormal_panel(panel, in_panel)
        tl.debug_barrier()
        tl.store(lines + first + in_panel[None, :], panel, mask=there[:, None])
        for second in tl.range(first + FORM.panel, FORM.rank, FORM.block_c, num_stages=1):
            columns = second + in_chunk
            mask = there[:, None] & (columns < FORM.rank)[None, :]
            later = tl.load(lines + columns[None, :], mask=mask, other=0.0)  # [D, C]
            overlap = tl.dot(tl.trans(panel), later, input_precision=FORM.precision)  # [P, C]
            later -= tl.dot(panel, overlap, input_precision=FORM.precision)
            tl.store(lines + columns[None, :], later, mask=mask)
        tl.debug_barrier()


@triton.jit
def _multiply(matrix, basis, product, channels, there, FORM: tl.constexpr):
    """Write the product of a symmetric matrix [D, D] and a basis [D, C]."""
    for second in tl.range(0, FORM.rank, FORM.block_c, num_stages=1):
        columns = second + tl.arange(0, FORM.block_c)  # [C]
        found = tl.zeros([FORM.padded_width, FORM.block_c], tl.float32)
        for first in tl.range(0, FORM.width, FORM.block_l, num_stages=1):
            lines = first + tl.arange(0, FORM.block_l)  # [K]
            inside = lines < FORM.width
            # The matrix is symmetric: its columns are read as lines, whose channels lie side by side.
            left = tl.load(
                matrix + channels[:, None] * FORM.width + lines[None, :],
                mask=there[:, None] & inside[None, :],
                other=0.0,
            )
            right = tl.load(
                basis + lines[:, None] * FORM.padded_channels + columns[None, :],
                mask=inside[:, None] & (columns < FORM.rank)[None, :],
                other=0.0,
            )
            found = tl.dot(left, right, found, input_precision=FORM.precision)
        tl.store(
            product + channels[:, None] * FORM.padded_channels + columns[None, :],
            found,
            mask=there[:, None] & (columns < FORM.padded_channels)[None, :],
        )
    tl.debug_barrier()


@triton.jit
def _solve(state, places, pair, row, head, splits, FORM: tl.constexpr):
    """Fit the basis of one pair from its moments: `fitting.orthogonal_basis` of the ridged, weighted scatter."""
    channels = tl.arange(0, FORM.padded_width)  # [D]
    there = channels < FORM.width
    _, length = _span(places, row)
    count = length.to(tl.float32)
    scratch = state.scratch + pair * (FORM.width * (FORM.width + 2 * FORM.padded_channels + 3))
    matrix = scratch + FORM.width * 3  # [D, D]
    basis = matrix + FORM.width * FORM.width  # [D, C]
    product = basis + FORM.width * FORM.padded_channels  # [D, C]
    total = tl.zeros([FORM.padded_width], tl.float32)
    diagonal = tl.zeros([FORM.padded_width], tl.float32)
    for split in tl.range(0, splits, num_stages=1):
        part = pair * splits + split
        total += tl.load(state.sums + part * FORM.width + channels, mask=there, other=0.0)
        diagonal += tl.load(
            state.scatters + (part * FORM.width + channels) * FORM.width + channels, mask=there, other=0.0
        )
    shift = tl.load(state.shifts + pair * FORM.width + channels, mask=there, other=0.0)
    mean = shift + total / count
    tl.store(state.mean + pair * FORM.width + channels, mean.to(state.mean.dtype.element_ty), mask=there)
    spread = diagonal - total * total / count
    # What is not finite is not equal to itself less itself; a channel's sum of squares tells of each of its tokens.
    known = tl.sum(tl.where(there, spread + total, 0.0), 0)
    tl.store(state.finite + pair, (known - known == 0.0).to(tl.uint8))
    if FORM.weighted:
        weight = _weights(state, scratch, row, head, channels, there, FORM)
        spread = spread * weight * weight
        tl.store(scratch + FORM.width + channels, weight, mask=there)
    ridge = RIDGE * tl.sum(tl.where(there, tl.abs(spread), 0.0), 0) / FORM.width
    trace = tl.sum(tl.where(there, spread, 0.0), 0) + FORM.width * ridge
    scale = 1.0 / tl.where(trace > 0, trace, 1.0)
    tl.store(scratch + channels, spread, mask=there)
    tl.store(scratch + FORM.width * 2 + channels, total, mask=there)
    tl.debug_barrier()
    above = _places_from_top(scratch, spread, channels, FORM)
    for first in tl.range(0, FORM.width, FORM.block_l, num_stages=1):
        lines = first + tl.arange(0, FORM.block_l)  # [K]
        inside = (lines[:, None] < FORM.width) & there[None, :]
        scatter = tl.zeros([FORM.block_l, FORM.padded_width], tl.float32)
        for split in tl.range(0, splits, num_stages=1):
            part = pair * splits + split
            scatter += tl.load(
                state.scatters + (part * FORM.width + lines)[:, None] * FORM.width + channels[None, :],
                mask=inside,
                other=0.0,
            )
        line_total = tl.load(scratch + FORM.width * 2 + lines, mask=lines < FORM.width, other=0.0)
        scatter -= line_total[:, None] * (total / count)[None, :]
        if FORM.weighted:
            line_weight = tl.load(scratch + FORM.width + lines, mask=lines < FORM.width, other=0.0)
            scatter = scatter * (line_weight[:, None] * weight[None, :])
        scatter = (scatter + tl.where(lines[:, None] == channels[None, :], ridge, 0.0)) * scale
        tl.store(matrix + lines[:, None] * FORM.width + channels[None, :], scatter, mask=inside)
    # Start from the channels of largest variance.
    for first in tl.range(0, FORM.padded_channels, FORM.block_c, num_stages=1):
        columns = first + tl.arange(0, FORM.block_c)  # [C]
        chosen = (above[:, None] == columns[None, :]) & (columns < FORM.rank)[None, :]
        tl.store(
            basis + channels[:, None] * FORM.padded_channels + columns[None, :],
            chosen.to(tl.float32),
            mask=there[:, None],
        )
    tl.debug_barrier()
    for _ in tl.range(0, FORM.iterations, num_stages=1):
        _multiply(matrix, basis, product, channels, there, FORM)
        _make_orthonormal(product, channels, there, FORM)
        basis, product = product, basis
    # Once more: rounding leaves columns as far from orthogonal as the matrix is ill-conditioned.
    _make_orthonormal(basis, channels, there, FORM)
    for first in tl.range(0, FORM.channels, FORM.block_c, num_stages=1):
        columns = first + tl.arange(0, FORM.block_c)  # [C]
        found = tl.load(
            basis + channels[:, None] * FORM.padded_channels + columns[None, :],
            mask=there[:, None] & (columns < FORM.rank)[None, :],
            other=0.0,
        )
        tl.store(
            state.encoder + (pair * FORM.width + channels)[:, None] * FORM.channels + columns[None, :],
            found.to(state.encoder.dtype.element_ty),
            mask=there[:, None] & (columns < FORM.channels)[None, :],
        )


@triton.jit
def solve(states, places, FORMS: tl.constexpr):
    """Fit the bases; grid (pairs, Keys and Values)."""
    splits = decode_integers(places.sizes)[2]
    rows = decode_integers(places.sizes)[0]
    pair = tl.program_id(0).to(tl.int64)
    for index in tl.static_range(len(FORMS)):
        if tl.program_id(1) == index:
            _solve(states[index], places, pair, pair % rows, pair // rows, splits, form_of(FORMS, index))


@triton.jit
def _offset(state, places, pair, row, splits, channels, there, FORM: tl.constexpr):
    """Return channels [K] of what a pair's states are centred by, as it is stored, in float32."""
    if FORM.rank > 0:
        offset = tl.load(state.mean + pair * FORM.width + channels, mask=there, other=0.0)
    else:
        split = tl.arange(0, MOST_SPLITS)
        sums = tl.load(
            state.sums + (pair * splits + split)[:, None] * FORM.width + channels[None, :],
            mask=(split < splits)[:, None] & there[None, :],
            other=0.0,
        )
        _, length = _span(places, row)
        offset = (tl.sum(sums, 0) / length.to(tl.float32)).to(state.states.dtype.element_ty)
    return offset.to(tl.float32)


@triton.jit
def _coefficients(state, places, pointers, inside, pair, row, head, splits, columns, there, FORM: tl.constexpr):
    """Encode tokens [N]: coefficients [N, C] of `columns` in float32; see `KeyBasis.encode`."""
    coefficients = tl.zeros([pointers.shape[0], columns.shape[0]], tl.float32)
    shift = tl.zeros([columns.shape[0]], tl.float32)
    if FORM.rank > 0:
        encoder = state.encoder + pair * (FORM.width * FORM.channels)
    else:
        encoder = state.encoder + head * (FORM.width * FORM.channels)
    for first in tl.range(0, FORM.width, FORM.block_k, num_stages=1):
        channels = first + tl.arange(0, FORM.block_k)  # [K]
        own = channels < FORM.width
        states = tl.load(pointers[:, None] + channels[None, :], mask=inside[:, None] & own[None, :], other=0.0)
        part = tl.load(
            encoder + channels[:, None] * FORM.channels + columns[None, :],
            mask=own[:, None] & there[None, :],
            other=0.0,
        )
        offset = _offset(state, places, pair, row, splits, channels, own, FORM)
        if states.dtype == tl.float32:
            states = states - offset[None, :]
        else:
            # Products of half precisions are exact in float32: what is subtracted is the offset's coefficients.
            shift += tl.sum(offset[:, None] * part.to(tl.float32), 0)
        coefficients = tl.dot(states, part, coefficients, input_precision=FORM.precision)
    return coefficients - shift[None, :]


@triton.jit
def _full_range(state, pair, splits, columns, there, FORM: tl.constexpr):
    """Return centre and half of the range of each coefficient, [C] each."""
    split = tl.arange(0, MOST_SPLITS)
    places = (pair * splits + split)[:, None] * FORM.channels + columns[None, :]
    mask = (split < splits)[:, None] & there[None, :]
    least = tl.min(tl.load(state.least + places, mask=mask, other=float("inf")), 0)
    most = tl.max(tl.load(state.most + places, mask=mask, other=float("-inf")), 0)
    least, most = tl.where(there, least, 0.0), tl.where(there, most, 0.0)
    return (least + most) / 2, (most - least) / 2


@triton.jit
def _rounded(scaled, LEVELS: tl.constexpr):
    """Round to the nearest code, half to even; the rest is clipped."""
    return (tl.minimum(tl.maximum(scaled, 0.0), LEVELS) + ROUND) - ROUND


@triton.jit
def _range(state, pair, head, splits, columns, there, BITS: tl.constexpr, FORM: tl.constexpr):
    """Return low end and step of the codes of each coefficient, [C] each; see `quantization.quantise`."""
    if FORM.rank > 0:
        LEVELS: tl.constexpr = 2.0**BITS - 1
        centre, half = _full_range(state, pair, splits, columns, there, FORM)
        split = tl.arange(0, MOST_SPLITS)
        mask = (split < splits)[:, None] & there[None, :]
        best_error = tl.full([columns.shape[0]], float("inf"), tl.float32)
        best = tl.full([columns.shape[0]], 1.0, tl.float32)
        for index in tl.static_range(len(FORM.clips)):
            places = ((pair * splits + split) * len(FORM.clips) + index)[:, None] * FORM.channels + columns[None, :]
            error = tl.sum(tl.load(state.errors + places, mask=mask, other=0.0), 0)
            better = error < best_error
            best = tl.where(better, FORM.clips[index], best)
            best_error = tl.where(better, error, best_error)
        low = centre - best * half
        step = tl.div_rn(2 * best * half, tl.full([columns.shape[0]], LEVELS, tl.float32))
    else:
        low = tl.load(state.low + head * FORM.channels + columns, mask=there, other=0.0)
        step = tl.load(state.step + head * FORM.channels + columns, mask=there, other=0.0)
    return low, step


@triton.jit
def _find_range(state, places, pair, row, head, chunk, split, splits, ERRORS: tl.constexpr, FORM: tl.constexpr):
    """Find a share's range of some coefficients, or the errors of their codes for each way to clip the full range."""
    columns = chunk * FORM.block_c + tl.arange(0, FORM.block_c)  # [C]
    there = columns < FORM.channels
    start, length = _span(places, row)
    begin, end = _share(length, split, splits, FORM.block_n)
    LEVELS: tl.constexpr = 2.0 ** FORM.blocks[0].bits - 1
    if ERRORS:
        centre, half = _full_range(state, pair, splits, columns, there, FORM)
        sums = ()
        for _ in tl.static_range(len(FORM.clips)):
            sums = sums + (tl.zeros([FORM.block_c], tl.float32),)
    else:
        sums = (
            tl.full([FORM.block_c], float("inf"), tl.float32),
            tl.full([FORM.block_c], float("-inf"), tl.float32),
        )
    for first in tl.range(begin, end, FORM.block_n, num_stages=1):
        tokens = first + tl.arange(0, FORM.block_n)
        inside = tokens < end
        pointers = _pointers(state, places, head, start + tokens, inside, FORM)
        coefficients = _coefficients(state, places, pointers, inside, pair, row, head, splits, columns, there, FORM)
        if ERRORS:
            more = ()
            for index in tl.static_range(len(FORM.clips)):
                low = centre - FORM.clips[index] * half
                step = 2 * FORM.clips[index] * half / LEVELS
                # A product is enough here: where it rounds another way than the division, both codes are as good.
                inverse = 1.0 / tl.where(step > 0, step, 1.0)
                codes = _rounded((coefficients - low[None, :]) * inverse[None, :], LEVELS)
                error = codes * step[None, :] + low[None, :] - coefficients
                more = more + (sums[index] + tl.sum(tl.where(inside[:, None], error * error, 0.0), 0),)
            sums = more
        else:
            least = tl.min(tl.where(inside[:, None], coefficients, float("inf")), 0)
            most = tl.max(tl.where(inside[:, None], coefficients, float("-inf")), 0)
            sums = (tl.minimum(sums[0], least), tl.maximum(sums[1], most))
    part = pair * splits + split
    if ERRORS:
        for index in tl.static_range(len(FORM.clips)):
            errors = state.errors + (part * len(FORM.clips) + index) * FORM.channels
            tl.store(errors + columns, sums[index], mask=there)
    else:
        tl.store(state.least + part * FORM.channels + columns, sums[0], mask=there)
        tl.store(state.most + part * FORM.channels + columns, sums[1], mask=there)


@triton.jit
def find_ranges(states, places, ERRORS: tl.constexpr, FORMS: tl.constexpr):
    """Find the ranges of coefficients, then the errors of codes; grid (splits * chunks, pairs, Keys and Values)."""
    splits = decode_integers(places.sizes)[2]
    rows = decode_integers(places.sizes)[0]
    pair = tl.program_id(1).to(tl.int64)
    for index in tl.static_range(len(FORMS)):
        if tl.program_id(2) == index:
            _find_range(
                states[index],
                places,
                pair,
                pair % rows,
                pair // rows,
                tl.program_id(0) // splits,
                tl.program_id(0) % splits,
                splits,
                ERRORS,
                form_of(FORMS, index),
            )


@triton.jit
def _store_block(
    state, places, pointers, stored, inside, pair, row, head, splits, BLOCK: tl.constexpr, FORM: tl.constexpr
):
    """Store a block of the layout: numbers, or codes of one width side by side in bytes."""
    columns = tl.arange(0, BLOCK.padded)  # [C]
    there = columns < BLOCK.width
    if BLOCK.bits == 0:
        packed = _coefficients(state, places, pointers, inside, pair, row, head, splits, columns, there, FORM)
    else:
        packed = tl.zeros([pointers.shape[0], BLOCK.padded], tl.int32)
        for part in tl.static_range(BLOCK.parts):
            own = BLOCK.channel + part * BLOCK.width + columns
            coefficients = _coefficients(state, places, pointers, inside, pair, row, head, splits, own, there, FORM)
            low, step = _range(state, pair, head, splits, own, there, BLOCK.bits, FORM)
            divisor = tl.broadcast_to(tl.where(step > 0, step, 1.0)[None, :], coefficients.shape)
            codes = _rounded(tl.div_rn(coefficients - low[None, :], divisor), 2.0**BLOCK.bits - 1)
            packed |= codes.to(tl.int32) << (part * BLOCK.bits)
    tl.store(
        stored[:, None] + BLOCK.offset + columns[None, :],
        packed.to(state.stored.dtype.element_ty),
        mask=inside[:, None] & there[None, :],
    )


@triton.jit
def _store_basis(state, places, pair, row, head, splits, FORM: tl.constexpr):
    """Store what reads a pair's codes: a fitted decoder with the steps folded in, and delta (`KeyBasis.for_codes`)."""
    columns = tl.arange(0, FORM.padded_channels)  # [C]
    inside = columns < FORM.channels
    if FORM.rank > 0:
        MIDDLE: tl.constexpr = (2.0 ** FORM.blocks[0].bits - 1) / 2
        low, step = _range(state, pair, head, splits, columns, inside, FORM.blocks[0].bits, FORM)
    known = 0.0
    for first in tl.range(0, FORM.width, FORM.block_k, num_stages=1):
        channels = first + tl.arange(0, FORM.block_k)  # [K]
        there = channels < FORM.width
        delta = _offset(state, places, pair, row, splits, channels, there, FORM)
        known += tl.sum(tl.where(there, delta, 0.0), 0)
        if FORM.rank > 0:
            lines = (pair * FORM.width + channels)[:, None] * FORM.channels + columns[None, :]
            mask = there[:, None] & inside[None, :]
            decoder = tl.load(state.encoder + lines, mask=mask, other=0.0).to(tl.float32)
            exact = decoder * step[None, :]
            rounded = exact.to(state.decoder.dtype.element_ty)
            tl.store(state.decoder + lines, rounded, mask=mask)
            # What rounding does to the middle of the codes would shift all tokens alike.
            delta += tl.sum(decoder * low[None, :], 1)
            delta += tl.sum((exact - rounded.to(tl.float32)) * MIDDLE, 1)
        elif state.shift is not None:
            delta += tl.load(state.shift + head * FORM.width + channels, mask=there, other=0.0)
        tl.store(state.delta + pair * FORM.width + channels, delta.to(state.delta.dtype.element_ty), mask=there)
    if FORM.rank == 0:
        tl.store(state.finite + pair, (known - known == 0.0).to(tl.uint8))


@triton.jit
def _encode(state, places, pair, row, head, block, splits, FORM: tl.constexpr):
    """Store one block of a pair's tokens, and with the first what reads them."""
    total = decode_integers(places.sizes)[3].to(tl.int64)
    start, length = _span(places, row)
    if block * FORM.block_n < length:
        tokens = block * FORM.block_n + tl.arange(0, FORM.block_n)  # [N]
        inside = tokens < length
        pointers = _pointers(state, places, head, start + tokens, inside, FORM)
        stored = state.stored + (head * total + start + tokens) * FORM.token_width  # [N]
        for index in tl.static_range(len(FORM.blocks)):
            _store_block(state, places, pointers, stored, inside, pair, row, head, splits, FORM.blocks[index], FORM)
    if state.delta is not None:
        if block == 0:
            _store_basis(state, places, pair, row, head, splits, FORM)


@triton.jit
def encode(states, places, FORMS: tl.constexpr):
    """Store the tokens and what reads them; grid (blocks of tokens, pairs, Keys and Values)."""
    splits = decode_integers(places.sizes)[2]
    rows = decode_integers(places.sizes)[0]
    pair = tl.program_id(1).to(tl.int64)
    for index in tl.static_range(len(FORMS)):
        if tl.program_id(2) == index:
            _encode(
                states[index],
                places,
                pair,
                pair % rows,
                pair // rows,
                tl.program_id(0),
                splits,
                form_of(FORMS, index),
            )
