"""Token methods: their formulas by hand, the attention that they read, and what all of them have in common."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotatek_cache import AirCache, DivPrune, FastV, LookM, PyramidDrop, RotateKCache, VisionZip, VLCache
from rotatek_cache.token_pruning.interface import AttentionRows, Stage
from rotatek_cache.token_pruning.registry import TOKENS, token_method
from rotatek_cache.token_pruning.selection import best_tokens, share_of, spread


def rows_of(weights, seen=None, visual=None) -> AttentionRows:
    """Rows of a batch of one from ``weights [H][q][P]``."""
    tensor = torch.tensor(weights)[None]
    seen = torch.ones_like(tensor[:, 0], dtype=torch.bool) if seen is None else torch.tensor(seen)[None]
    visual = torch.ones(1, tensor.shape[-1], dtype=torch.bool) if visual is None else torch.tensor(visual)[None]
    return AttentionRows(tensor, seen, seen.any(-1), visual)


def flags(*indices, size=6):
    return [index in indices for index in range(size)]


def test_fastv_by_hand():
    # One query, two heads: means .15, .25, .05, .3, .25 over the first five tokens, of which 0, 1, 2, 3 are visual.
    rows = rows_of([[[0.1, 0.4, 0.1, 0.2, 0.2]], [[0.2, 0.1, 0.0, 0.4, 0.3]]])
    (scores,) = FastV(0.5).summarise(rows)
    assert scores[0].tolist() == pytest.approx([0.15, 0.25, 0.05, 0.3, 0.25])
    visual = torch.tensor([[True, True, True, True, False]])
    kept = FastV(0.5).select({1: (scores,)}, visual, (2, 3))
    assert kept[2].tolist() == [[False, True, False, True, False]]
    assert kept[3] is kept[2]  # the same tokens in all later layers
    assert FastV(0.5, layer=2).stages((0, 1, 2, 3)) == (Stage((1,), (2, 3)),)


def test_pyramid_drop_by_hand():
    # 32 layers in four stages; of 40 tokens a fifth goes on each time: 40, 8, 2 (of 1.6), 1 (at least).
    method = PyramidDrop(0.2)
    stages = method.stages(range(32))
    assert [(stage.watched, stage.pruned[0], stage.pruned[-1]) for stage in stages] == [
        ((7,), 8, 15),
        ((15,), 16, 23),
        ((23,), 24, 31),
    ]
    assert [method.times_dropped(range(32))[layer] for layer in (0, 7, 8, 16, 24, 31)] == [0, 0, 1, 2, 3, 3]
    # Two heads: means .15, .25, .05, .3, .25. Token 3, the best, is not held any more, and token 4 is text.
    rows = rows_of([[[0.1, 0.4, 0.1, 0.2, 0.2]], [[0.2, 0.1, 0.0, 0.4, 0.3]]])
    held = torch.tensor([[True, True, True, False, False]])
    kept = PyramidDrop(0.7).select({7: method.summarise(rows)}, held, (8, 9))
    assert kept[8].tolist() == [[True, True, False, False, False]]
    assert kept[9] is kept[8]
    # A model of fewer layers than stages has a layer a stage, one of two layers drops once.
    assert method.stages(range(3)) == (Stage((0,), (1,)), Stage((1,), (2,)))
    with pytest.raises(ValueError, match="PyramidDrop needs a model of two layers or more, got 1"):
        method.check_layers([0], 1)


def test_vl_cache_by_hand():
    # Layer 0, one head, two causal queries over 6 tokens: 5 + 6 entries, 4 of them below 1 % of their row's largest.
    dense = [[[0.6, 0.395, 0.004, 0.001, 0.0, 0.0], [0.5, 0.2, 0.1, 0.002, 0.1, 0.098]]]
    seen = [[True] * 5 + [False], [True] * 6]
    columns, sparse, total, readers = VLCache(0.5).summarise(rows_of(dense, seen))
    assert columns[0].tolist() == pytest.approx([1.1, 0.595, 0.104, 0.003, 0.1, 0.098])
    assert (int(sparse), int(total)) == (4, 11)
    assert readers.tolist() == [[2, 2, 2, 2, 2, 1]]
    # gamma 4/11 and 9/11: budgets in the ratio 7 : 2 of 0.5 * 2 layers * 90 tokens.
    summaries = {0: (columns, sparse, total, readers), 1: (columns, torch.tensor([9]), total, readers)}
    budgets = VLCache(0.5).layer_budgets(summaries, torch.tensor([90]), (0, 1))
    assert budgets.flatten().tolist() == [70, 20]
    # 80 % uniform: 0.8 * 45 + 0.2 * 70, 0.8 * 45 + 0.2 * 20.
    budgets = VLCache(0.5, uniform=0.8).layer_budgets(summaries, torch.tensor([90]), (0, 1))
    assert budgets.flatten().tolist() == [50, 40]


def test_vl_cache_keeps_a_recent_window_and_the_best():
    scores = torch.tensor([[9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0, 0.0, 0.5, 99.0]])
    visual = torch.ones(1, 12, dtype=torch.bool)
    visual[0, 11] = False  # text scores nothing, however much it is read
    readers = torch.tensor([[0] + [2] * 10 + [1]])  # the first token is padding, or no query sees it
    summary = (scores, torch.tensor([0]), torch.tensor([10]), readers)
    kept = VLCache(5 / 11, recent=0.2).select({0: summary}, visual, (0,))[0]
    assert kept[0].nonzero().flatten().tolist() == [0, 2, 4, 6, 10]  # one of five is recent
    # The whole prompt has eleven tokens, too, of which the text is the recent one; what no query sees stays as it is.
    kept = VLCache(5 / 11, recent=0.2, scope="prompt").select({0: summary}, visual, (0,))[0]
    assert kept[0].nonzero().flatten().tolist() == [0, 2, 4, 6, 8, 11]


def test_visionzip_by_hand():
    # 3 of 8 tokens, 2 of them contextual. Dominant: 3. Others 0 1 2 4 5 6 7, targets 0 and 4 (every third).
    scores = torch.tensor([0.1, 0.0, 0.2, 0.9, 0.3, 0.0, 0.1, 0.2])
    east, north = [1.0, 0.0], [0.0, 1.0]
    keys = torch.tensor([east, east, north, east, north, [3.0, 1.0], [1.0, 5.0], north])
    features = torch.arange(8.0)[:, None]
    method = VisionZip(3 / 8, contextual=2 / 8)
    kept, taken_by = method.choose(features, method.count_of(8), scores, keys)
    assert kept.nonzero().flatten().tolist() == [0, 3, 4]
    # 1 and 5 lie nearest to target 0; 2, 6 and 7 to target 4. A target is itself plus the mean of what it was given.
    assert taken_by.tolist() == [-1, 0, 4, -1, -1, 0, 4, 4]
    assert method.merged(features, taken_by)[kept].flatten().tolist() == pytest.approx([0 + 3, 3, 4 + 5])


def test_visionzip_keeps_line_breaks_last_and_merges_none():
    # Tokens 2 and 5 show no patch. Of 6 tokens, 4 patches: token 3 dominant, target 0 of the others 0 1 4.
    scores = torch.tensor([0.1, 0.2, -math.inf, 0.9, 0.3, -math.inf])
    keys, features = torch.ones(6, 2), torch.arange(6.0)[:, None]
    kept, taken_by = VisionZip(2 / 6, contextual=1 / 6).choose(features, 2, scores, keys)
    assert kept.nonzero().flatten().tolist() == [0, 3]
    assert taken_by.tolist() == [-1, 0, -1, -1, 0, -1]
    kept, taken_by = VisionZip(5 / 6, contextual=1 / 6).choose(features, 5, scores, keys)
    assert kept.tolist() == [True, True, True, True, True, False]
    assert taken_by.tolist() == [-1] * 6
    kept, _ = VisionZip(1.0).choose(features, 6, scores, keys)
    assert kept.all()


def test_a_budget_never_makes_more_than_a_quarter_contextual():
    assert VisionZip().with_keep(0.4) == VisionZip(0.4, contextual=0.05)
    assert VisionZip().with_keep(0.08) == VisionZip(0.08, contextual=0.02)


def test_divprune_by_hand():
    # Angles 0, 10, 90, 100 and 200 degrees: 200 is farthest from its nearest.
    angles = torch.tensor([0.0, 10.0, 90.0, 100.0, 200.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [5.0], [1.0], [2.0], [3.0]])
    kept, merged = DivPrune().choose(features, 2, None, None)
    assert kept.nonzero().flatten().tolist() == [1, 4]  # cosine of 200 to 10 is -.98, the lowest
    kept, _ = DivPrune().choose(features, 3, None, None)
    # 90: nearest chosen is 10, cosine .17. 100: nearest chosen is 10, cosine 0, so it is farther.
    assert kept.nonzero().flatten().tolist() == [1, 3, 4]
    assert merged is None


def air_rows() -> AttentionRows:
    """Three visual tokens and the text behind them, whose two queries see each other causally."""
    weights = [[[0.2, 0.1, 0.1, 0.6, 0.0], [0.1, 0.3, 0.1, 0.2, 0.3]]]
    seen = [[True] * 4 + [False], [True] * 5]
    return rows_of(weights, seen, [True] * 3 + [False] * 2)


def test_aircache_scores_by_hand():
    # Among text the last query gives .4 to the first text token and .6 to itself: the elite at .9 is itself alone, and
    # its weights on the three tokens and itself sum to .8.
    (scores,) = AirCache(0.5).summarise(air_rows())
    assert scores[0, :3].tolist() == pytest.approx([0.125, 0.375, 0.125])
    # At .6 both are elite, and nothing is left out: plain means.
    (scores,) = AirCache(0.5, elite=0.6).summarise(air_rows())
    assert scores[0, :3].tolist() == pytest.approx([0.15, 0.2, 0.1])


def test_aircache_budgets_by_hand():
    # Strengths .6 and .3: relative 4/3 and 2/3. Skewness 0 and 3 / 2 * 2.1213, relative 0 and 2.
    scores = torch.tensor([[[0.1, 0.3, 0.2, 9.0]], [[0.0, 0.0, 0.3, 9.0]]])
    visual = torch.tensor([[True, True, True, False]])
    shares = AirCache.layer_shares(scores, visual)
    assert shares.flatten().tolist() == pytest.approx([2 / 3, 4 / 3])
    kept = AirCache(0.5).select({0: (scores[0],), 1: (scores[1],)}, visual, (0, 1))
    assert kept[0].tolist() == [[False, True, False, False]]  # 1 of 3 tokens in all
    assert kept[1].sum() == 2


@pytest.mark.parametrize(
    ("merge", "key"),
    [
        # Tokens 2 and 3 lie nearest to 0, whose Key is (1, 0).
        ("average", [(1 + 2 + 0.6) / 3, (0 + 0 + 0.8) / 3]),
        ("pivotal", [(1 + 1.5 + 0.8) / 3, (0 + 0 + 0.4) / 3]),
        ("weighted", [(1 + 2 + 0.36) / 3, (0 + 0 + 0.48) / 3]),
        ("none", [1, 0]),
    ],
)
def test_look_m_by_hand(merge, key):
    keys = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [2.0, 0.0], [0.6, 0.8], [5.0, 5.0]])[None, None]
    values = torch.tensor([[10.0], [20.0], [40.0], [70.0], [0.0]])[None, None]
    kept = torch.tensor([[True, True, False, False, False]])
    dropped = torch.tensor([[False, False, True, True, False]])
    new_keys, new_values = LookM(0.5, merge=merge).merged(keys, values, kept, dropped)
    assert new_keys[0, 0, 0].tolist() == pytest.approx(key)
    assert torch.equal(new_keys[0, 0, 1], keys[0, 0, 1])
    assert torch.equal(new_keys[0, 0, 4], keys[0, 0, 4])  # text takes nothing
    expected = {"average": 40.0, "pivotal": (10 + 25 + 40) / 3, "weighted": (10 + 40 + 42) / 3, "none": 10.0}
    assert float(new_values[0, 0, 0]) == pytest.approx(expected[merge])


def test_look_m_keeps_the_same_share_in_every_layer():
    visual = torch.tensor([[True, True, True, True, False]])
    scores = [torch.tensor([[3.0, 1.0, 2.0, 0.0, 9.0]]), torch.tensor([[0.0, 1.0, 2.0, 3.0, 9.0]])]
    kept = LookM(0.5).select({0: (scores[0],), 1: (scores[1],)}, visual, (0, 1))
    assert [kept[layer][0].nonzero().flatten().tolist() for layer in (0, 1)] == [[0, 2], [2, 3]]


def test_what_a_full_layer_cannot_take_goes_to_the_others():
    # 90 % of 3 * 10 tokens in proportion 8 : 1 : 1 would give the first 21.6.
    shares = torch.tensor([[0.8], [0.1], [0.1]])
    found = spread(shares, torch.tensor([27]), torch.tensor([1]), torch.tensor([10]))
    assert found.flatten().tolist() == [10, 9, 8]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    layers=st.integers(1, 8),
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    keep=st.floats(0.01, 1.0),
)
def test_budgets_sum_to_the_whole(seed, layers, counts, keep):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor(counts)
    total = torch.full((len(counts),), 1000)
    seen = {
        layer: (None, torch.randint(0, 1001, total.shape, generator=generator).clamp(max=999), total)
        for layer in range(layers)
    }
    budgets = VLCache(keep).layer_budgets(seen, tokens, range(layers))
    assert (budgets <= tokens).all()
    assert (budgets >= tokens.clamp(max=1)).all()
    expected = share_of(layers * tokens, keep).maximum(layers * tokens.clamp(max=1))
    assert budgets.sum(0).tolist() == expected.tolist()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_best_tokens_are_the_best(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (3, 12), generator=generator).float()
    candidates = torch.rand(3, 12, generator=generator) < 0.7
    counts = share_of(candidates.sum(1), 0.4)
    kept = best_tokens(scores, candidates, counts)
    assert (kept & ~candidates).sum() == 0
    assert torch.equal(kept.sum(1), counts)
    for row in range(3):
        order = sorted(candidates[row].nonzero().flatten().tolist(), key=lambda i, row=row: (-scores[row, i], i))
        assert kept[row].nonzero().flatten().tolist() == sorted(order[: int(counts[row])])


def test_a_share_of_few_tokens_is_at_least_one():
    assert share_of(torch.tensor([0, 1, 3, 10]), 0.04).tolist() == [0, 1, 1, 1]
    assert share_of(torch.tensor([0, 1, 3, 10]), 1.0).tolist() == [0, 1, 3, 10]


def test_specs():
    assert token_method("fastv:0.4") == FastV(keep=0.4)
    assert token_method("fastv:0.4,layer=3") == FastV(keep=0.4, layer=3)
    assert token_method("look_m:0.4,merge=average") == LookM(keep=0.4, merge="average")
    assert token_method("vl_cache") == VLCache()
    assert token_method("vl_cache:uniform=0.8") == VLCache(uniform=0.8)
    assert token_method("vl_cache:0.25,uniform=0.8") == VLCache(keep=0.25, uniform=0.8)
    method = VLCache(0.5)
    assert token_method(method) is method


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("fast:0.4", ValueError, "tokens must name one of .*fastv.*got 'fast:0.4'"),
        ("fastv", ValueError, "keep must be given where no budget is"),
        ("fastv:", ValueError, "keep must be given where no budget is"),
        ("fastv:many", ValueError, "keep must be a number, got 'many'"),
        ("fastv:0.4,depth=2", ValueError, "'depth' is no setting of fastv"),
        ("fastv:0.4,keep=0.2", ValueError, "given twice"),
        ("fastv:1.5", ValueError, r"FastV: keep must be in \(0, 1\], got 1.5"),
        ("fastv:nan", ValueError, "keep must be in"),
        (0.4, TypeError, "tokens must be a token method or a string such as 'fastv:0.4', got float"),
    ],
)
def test_wrong_specs(spec, error, message):
    with pytest.raises(error, match=message):
        RotateKCache(sparsity=0.5, tokens=spec)


@pytest.mark.parametrize("method", TOKENS.values())
@pytest.mark.parametrize("keep", [0, -0.1, 1.01, math.nan, True, "half"])
def test_shares_out_of_range(method, keep):
    with pytest.raises((ValueError, TypeError), match="keep must be"):
        method(keep=keep)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FastV(0.5, layer=0), "layer must be at least 1"),
        (lambda: FastV(0.5, layer=2.0), "layer must be an int"),
        (lambda: PyramidDrop(0.5, parts=1), "parts must be at least 2, got 1"),
        (lambda: VLCache(0.5, recent=1.5), "recent must be in"),
        (lambda: VLCache(0.5, uniform=-1), "uniform must be in"),
        (lambda: VLCache(0.5, scope="text"), "scope must be one of visual, prompt, got 'text'"),
        (
            lambda: RotateKCache(budget="0.5x", tokens="vl_cache:scope=prompt"),
            r"budget='0.5x' is divided among visual tokens.*drop text as well: give keep",
        ),
        (lambda: AirCache(0.5, elite=2), "elite must be in"),
        (lambda: LookM(0.5, merge="sum"), "merge must be one of pivotal, average, weighted, none, got 'sum'"),
        (lambda: VisionZip(0.5, contextual=0.6), "contextual must be at most keep=0.5, got 0.6"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
