"""The reference attention over segment views, against plain softmax attention in float64."""

import dataclasses
import itertools

import pytest
import torch

from rotatek_cache.core import attention
from rotatek_cache.core.attention import attend, merge_state, reference_attention
from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.fitting import key_moments, orthogonal_basis
from rotatek_cache.core.segments import SegmentView, select_basis

SHAPES = [  # batch, KV heads, group, queries, D, D_v, r, lengths of the visual rows, text tokens
    pytest.param(1, 2, 4, 1, 64, 64, 16, [63], 5, id="one-row"),
    pytest.param(2, 2, 1, 1, 80, 80, 24, [1, 40], 1, id="ragged-width80"),
    pytest.param(3, 1, 7, 1, 96, 64, 8, [30, 30, 30], 9, id="group7-narrow-values"),
    pytest.param(2, 2, 2, 5, 32, 48, 32, [12, 0], 7, id="many-queries-row-without-image"),
    pytest.param(2, 2, 2, 3, 32, 32, 8, [50, 50], 0, id="no-text"),
]


def draw(batch, heads, group, queries, width, value_width, rank, lengths, text, seed=0):
    """A query, views of a compressed and a text segment, and the dense Keys and Values per row that they stand for."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query = normal(batch, heads * group, queries, width)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    keys, values = normal(heads, sum(lengths), width), normal(heads, sum(lengths), value_width)
    rows = [slice(int(a), int(b)) for a, b in itertools.pairwise(starts)]
    moments = [
        key_moments(keys[:, row])
        if row.stop > row.start
        else (keys.new_zeros(heads, width), keys.new_zeros(heads, width, width))
        for row in rows
    ]
    mean, scatter = (torch.stack(part, 1) for part in zip(*moments, strict=True))
    basis = orthogonal_basis(mean, scatter, rank, "eigh", torch.float64)
    coefficients = torch.cat(
        [select_basis(basis, torch.tensor([b])).encode(keys[:, None, row])[:, 0] for b, row in enumerate(rows)], 1
    )
    visual = SegmentView(
        keys=coefficients,
        values=values,
        starts=starts[:-1],
        lengths=torch.tensor(lengths, dtype=torch.int32),
        max_length=max(lengths),
        row_stride=max(lengths),
        batched=len(set(lengths)) == 1,
        basis=basis,
    )
    text_keys, text_values = normal(heads, batch, text + 3, width), normal(heads, batch, text + 3, value_width)
    text_view = SegmentView(
        keys=text_keys.flatten(1, 2),
        values=text_values.flatten(1, 2),
        starts=torch.arange(batch) * (text + 3),
        lengths=torch.full((batch,), text, dtype=torch.int32),
        max_length=text,
        row_stride=text + 3,
        batched=True,
    )
    dense = []
    for b, row in enumerate(rows):
        one = select_basis(basis, torch.tensor([b]))
        rebuilt = one.reconstruct(coefficients[:, None, row])[:, 0]
        dense.append(
            (torch.cat([rebuilt, text_keys[:, b, :text]], 1), torch.cat([values[:, row], text_values[:, b, :text]], 1))
        )
    return query, [visual] + ([text_view] if text else []), dense


def plain_attention(query, dense, scale, masks=None):
    """Softmax attention row by row over dense ``[H, T, D]``; a query without tokens gives 0 and -inf."""
    outs, lses = [], []
    for b, (keys, values) in enumerate(dense):
        group = query.shape[1] // keys.shape[0]
        scores = query[b] @ keys.repeat_interleave(group, 0).mT * scale
        if masks is not None:
            scores = scores.masked_fill(~masks[b], -torch.inf)
        lses.append(scores.logsumexp(-1))
        outs.append((scores.softmax(-1).nan_to_num(0.0) @ values.repeat_interleave(group, 0)).transpose(0, 1))
    return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize("case", [shape.values for shape in SHAPES], ids=[shape.id for shape in SHAPES])
@pytest.mark.parametrize("chunked", [False, True])
def test_equals_softmax_attention_over_what_the_coefficients_stand_for(case, chunked, monkeypatch):
    query, segments, dense = draw(*case)
    if chunked:
        monkeypatch.setattr(attention, "MAX_SCORES", 1)
    out, lse = attend(query, segments, 0.3)
    expected, expected_lse = plain_attention(query, dense, 0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    without, _ = reference_attention(query, segments, 0.3, return_lse=False)
    torch.testing.assert_close(without, expected)


@pytest.mark.parametrize("lengths", [[6, 9], [9, 9]], ids=["ragged", "alike"])
def test_a_gradient_reaches_the_query(lengths):
    query, segments, _ = draw(2, 2, 2, 3, 32, 32, 8, lengths, 5)
    with torch.enable_grad():
        assert torch.autograd.gradcheck(lambda q: attend(q, segments, 0.3), query.requires_grad_())


def test_masks_hide_tokens_and_a_query_that_sees_none_gives_zero():
    query, segments, dense = draw(2, 2, 2, 4, 32, 32, 8, [6, 9], 5)
    visible = torch.rand(2, 4, 14, generator=torch.Generator().manual_seed(1)) > 0.4
    visible[1, 2] = False
    visual_mask, text_mask = visible[:, :, :9], visible[:, :, 9:]
    segments = [
        dataclasses.replace(segments[0], mask=visual_mask),
        dataclasses.replace(segments[1], mask=text_mask),
    ]
    masks = [torch.cat([visual_mask[b, :, :n], text_mask[b]], 1) for b, n in enumerate((6, 9))]
    expected, expected_lse = plain_attention(query, dense, 0.3, masks)
    out, lse = attend(query, segments, 0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert (out[1, 2] == 0).all() and (lse[1, :, 2] == -torch.inf).all()
    additive = [
        dataclasses.replace(s, mask=torch.zeros(s.mask.shape, dtype=torch.float64).masked_fill(~s.mask, -torch.inf))
        for s in segments
    ]
    torch.testing.assert_close(attend(query, additive, 0.3)[0], expected)
    lowest = torch.finfo(torch.float64).min
    finite = [dataclasses.replace(s, mask=s.mask.clamp_min(lowest)) for s in additive]
    torch.testing.assert_close(attend(query, finite, 0.3)[0], expected)


def test_rows_may_share_storage_through_the_row_table():
    query, (visual, text), dense = draw(2, 2, 2, 1, 32, 32, 8, [6, 9], 5)
    rows = torch.tensor([1, 1, 0])
    shared = dataclasses.replace(
        visual, starts=visual.starts[rows], lengths=visual.lengths[rows], basis_rows=rows, batched=False
    )
    text = dataclasses.replace(text, starts=text.starts[rows], lengths=text.lengths[rows], batched=False)
    out, _ = attend(query[rows], [shared, text], 0.3)
    torch.testing.assert_close(out, plain_attention(query[rows], [dense[r] for r in rows.tolist()], 0.3)[0])


def test_merged_states_equal_attention_over_the_union():
    query, segments, dense = draw(2, 2, 2, 3, 32, 32, 8, [6, 9], 5)
    states = [attend(query, [segment], 0.3) for segment in segments]
    out, lse = merge_state(states)
    expected, expected_lse = plain_attention(query, dense, 0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_merging_states_that_saw_nothing_gives_nothing():
    empty = torch.zeros(1, 1, 2, 4), torch.full((1, 2, 1), -torch.inf)
    out, lse = merge_state([empty, empty])
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_stays_within_twice_a_dense_low_precision_run(dtype):
    query, segments, dense = draw(2, 2, 4, 1, 64, 64, 16, [200, 180], 20)
    exact, _ = plain_attention(query, dense, 0.125)

    def low(view):
        basis = None
        if view.basis is not None:
            basis = KeyBasis(view.basis.A.to(dtype), view.basis.B.to(dtype), None, view.basis.delta.to(dtype))
        return dataclasses.replace(view, keys=view.keys.to(dtype), values=view.values.to(dtype), basis=basis)

    out, _ = attend(query.to(dtype), [low(view) for view in segments], 0.125)
    plain = torch.stack(
        [
            torch.nn.functional.scaled_dot_product_attention(
                query[b : b + 1].to(dtype), k[None].to(dtype), v[None].to(dtype), scale=0.125, enable_gqa=True
            )[0].transpose(0, 1)
            for b, (k, v) in enumerate(dense)
        ]
    )
    assert (out.double() - exact).norm() <= 2 * (plain.double() - exact).norm()


def test_the_error_of_the_output_falls_with_the_rank():
    generator = torch.Generator().manual_seed(0)
    errors = []
    width, tokens = 64, 300
    keys = (
        torch.randn(8, tokens, width, generator=generator, dtype=torch.float64) * torch.logspace(0.5, -1, width)
    ).double()
    keys = keys @ torch.linalg.qr(torch.randn(8, width, width, generator=generator, dtype=torch.float64)).Q
    values = torch.randn(8, tokens, width, generator=generator, dtype=torch.float64)
    query = torch.randn(1, 16, 20, width, generator=generator, dtype=torch.float64)
    expected, _ = plain_attention(query, [(keys, values)], 0.5)
    for rank in (8, 16, 32, 48, 64):
        mean, scatter = key_moments(keys[:, None])
        basis = orthogonal_basis(mean, scatter, rank, "eigh", torch.float64)
        view = SegmentView(
            basis.encode(keys[:, None])[:, 0],
            values,
            torch.tensor([0]),
            torch.tensor([tokens]),
            tokens,
            tokens,
            True,
            basis,
        )
        errors.append(float((attend(query, [view], 0.5)[0] - expected).norm()))
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-10 * float(expected.norm())


def test_unknown_implementation_is_named():
    query, segments, _ = draw(1, 2, 2, 1, 32, 32, 8, [6], 5)
    with pytest.raises(ValueError, match="impl must be 'auto', 'torch', 'triton' or 'cpp', got 'cuda'"):
        attend(query, segments, 1.0, impl="cuda")


@pytest.mark.parametrize(
    ("batch", "heads", "group", "queries", "width", "value_width", "rank", "lengths", "text"), SHAPES
)
def test_tokens_scattered_over_a_pool_are_read_through_their_slots(
    batch, heads, group, queries, width, value_width, rank, lengths, text
):
    query, views, _ = draw(batch, heads, group, queries, width, value_width, rank, lengths, text)
    expected, expected_lse = reference_attention(query, views, 0.3)
    scattered = []
    for view in views:
        order = torch.randperm(view.keys.shape[1])
        inverse = order.argsort()
        slots = torch.full((batch, view.max_length + 2), -1)
        for row, (start, length) in enumerate(view.row_ranges):
            slots[row, 1 : 1 + length] = inverse[start : start + length]
        # Pools hold tokens first, heads second; what no slot names is poisoned.
        pools = [
            torch.full((view.keys.shape[1] + 3, *t.shape[::2]), torch.nan, dtype=t.dtype)
            for t in (view.keys, view.values)
        ]
        for pool, packed in zip(pools, (view.keys, view.values), strict=True):
            pool[: packed.shape[1]] = packed[:, order].transpose(0, 1)
        scattered.append(
            dataclasses.replace(
                view,
                keys=pools[0].transpose(0, 1),
                values=pools[1].transpose(0, 1),
                starts=torch.ones(batch, dtype=torch.int64),
                slots=slots.int(),
                batched=False,
            )
        )
    out, lse = reference_attention(query, scattered, 0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
