"""The Key methods: each formula on a case worked by hand, and what all of them have in common."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotatek_cache.codecs.bases.oblique import Oblique
from rotatek_cache.codecs.bases.rotatek import RotateK
from rotatek_cache.codecs.registry import BASES, codecs_for
from rotatek_cache.codecs.spark import SparK, SparseCode
from rotatek_cache.core.fitting import KeyStatistics, key_moments
from rotatek_cache.options import FitOptions


def statistics(seed=0, heads=2, group=2, tokens=60, width=16, window=40) -> tuple[KeyStatistics, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = normal(heads, 1, width, width) * torch.logspace(0, -1.5, width, dtype=torch.float64)
    keys = normal(heads, 1, tokens, width) @ mixing.mT + normal(heads, 1, 1, width)
    queries = normal(1, heads * group, window, width) @ normal(1, 1, width, width)
    mean, scatter = key_moments(keys)
    return KeyStatistics(mean, scatter, torch.tensor([tokens]), queries), keys


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("solver", ["subspace", "eigh"])
def test_every_method_is_exact_at_full_rank(name, solver):
    stats, keys = statistics()
    basis = BASES[name].fit(stats, 16, solver, torch.float64)
    torch.testing.assert_close(basis.reconstruct(basis.encode(keys)), keys, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BASES)
def test_every_method_gives_a_projection(name):
    stats, keys = statistics()
    basis = BASES[name].fit(stats, 8, "eigh", torch.float64)
    once = basis.reconstruct(basis.encode(keys))
    torch.testing.assert_close(basis.reconstruct(basis.encode(once)), once)
    assert basis.encode(keys).shape[-1] == 8


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("rank", "width", "columns"), [(4, 16, 8), (9, 12, 12)])
def test_what_a_rank_is_padded_to_holds_directions(name, rank, width, columns):
    keys = torch.randn(2, 40, width, generator=torch.Generator().manual_seed(0))
    queries = torch.randn(1, 4, 8, width, generator=torch.Generator().manual_seed(1))

    def stored(rank):
        keys_codec, _ = codecs_for(FitOptions(rank=rank, basis=name), 0)
        return keys_codec.store(keys, [(0, 40)], queries)

    padded, whole = stored(rank), stored(columns)
    assert torch.equal(padded.data, whole.data) and torch.equal(padded.basis.B, whole.basis.B)


@pytest.mark.parametrize("name", BASES)
def test_every_method_works_without_queries(name):
    stats, keys = statistics()
    basis = BASES[name].fit(KeyStatistics(stats.mean, stats.scatter, stats.tokens), 8, "eigh", torch.float64)
    assert torch.isfinite(basis.encode(keys)).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), rank=st.sampled_from([2, 5, 8]))
def test_the_oblique_basis_has_the_least_squared_logit_error(seed, rank):
    stats, keys = statistics(seed)
    moment = stats.query_moment()

    def logit_error(basis) -> torch.Tensor:
        residual = keys - basis.reconstruct(basis.encode(keys))
        return (residual @ moment * residual).sum((1, 2, 3))

    best = logit_error(Oblique(shrinkage=0.0).fit(stats, rank, "eigh", torch.float64))
    for name, method in BASES.items():
        if name not in ("think", "pca_uncentred"):  # they lack the mean, and could not win either way
            assert (best <= logit_error(method.fit(stats, rank, "eigh", torch.float64)) * (1 + 1e-9)).all(), name
    assert (best <= logit_error(BASES["think"].fit(stats, rank, "eigh", torch.float64))).all()


def test_rotatek_by_hand():
    # Variances 4 and 1, query norms 1 and 3: the weighted covariance is diag(4, 9), so channel 1 is kept.
    keys = torch.tensor([[2.0, 1.0], [-2.0, 1.0], [2.0, -1.0], [-2.0, -1.0]], dtype=torch.float64)[None, None]
    mean, scatter = key_moments(keys)
    queries = torch.tensor([[[[1.0, 3.0]]]], dtype=torch.float64)
    stats = KeyStatistics(mean, scatter, torch.tensor([4]), queries)
    assert RotateK().fit(stats, 1, "eigh", torch.float64).A[0, 0, :, 0].abs().tolist() == pytest.approx([0, 1])
    assert RotateK(0.0).fit(stats, 1, "eigh", torch.float64).A[0, 0, :, 0].abs().tolist() == pytest.approx([1, 0])
    # Tempered: diag(4, 3).
    assert RotateK(0.5).fit(stats, 1, "eigh", torch.float64).A[0, 0, :, 0].abs().tolist() == pytest.approx([1, 0])


def test_think_by_hand():
    # mean k^2 = (4, 1, 9); mean q^2 over both heads of the group = (1, 25, 0): scores 4, 25, 0.
    keys = torch.tensor([[2.0, 1.0, 3.0], [-2.0, -1.0, 3.0]], dtype=torch.float64)[None, None]
    mean, scatter = key_moments(keys)
    queries = torch.tensor([[[[1.0, 7.0, 0.0]], [[-1.0, 1.0, 0.0]]]], dtype=torch.float64)
    stats = KeyStatistics(mean, scatter, torch.tensor([2]), queries)
    assert BASES["think"].scores(stats).flatten().tolist() == pytest.approx([4, 25, 0])
    basis = BASES["think"].fit(stats, 2, "eigh", torch.float64)
    assert basis.A[0, 0, :, :2].T.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert basis.delta is None


def test_the_query_moment_of_a_group_does_not_cancel_signs():
    queries = torch.tensor([[[[1.0, 0.0]], [[-1.0, 0.0]]]], dtype=torch.float64)
    zero = torch.zeros(1, 1, 2, dtype=torch.float64)
    stats = KeyStatistics(zero, zero[..., None] * zero[..., None, :], torch.tensor([1]), queries)
    assert stats.query_moment().tolist() == [[[[1, 0], [0, 0]]]]
    assert (stats.channel_norm() == 1).all()  # the signed mean is zero everywhere: no weight


def test_unknown_basis_lists_the_known():
    with pytest.raises(ValueError, match=r"basis must be one of hadamard, none, oblique, pca, .*got 'svd'"):
        codecs_for(FitOptions(rank=8, basis="svd"))


def test_spark_by_hand():
    # ||q|| = (2, 2, 4, 0.5...): with k^2 = (9, 1, 1, 16) the scores are 18, 2, 4 and 8: channels 0 and 3 are kept.
    weight = torch.tensor([[2.0, 2.0, 4.0, 0.5]], dtype=torch.float64)
    keys = torch.tensor([[[3.0, -1.0, 1.0, -4.0]]], dtype=torch.float64)
    official, signed_mean = SparK(), SparK(signed_mean=True)
    code = official.code(4, 2, torch.float64)
    read = code.unpack(official.pack(keys, weight, code)) / weight.sqrt()
    # Dropped: sqrt(mean(2, 4) / ||q_j||) with the sign it had.
    assert read.flatten().tolist() == pytest.approx([3, -((3 / 2) ** 0.5), (3 / 4) ** 0.5, -4])
    code = signed_mean.code(4, 2, torch.float64)
    assert code.unpack(signed_mean.pack(keys, weight, code)).flatten().tolist() == pytest.approx([3, 0, 0, -4])


def test_sparks_weight_is_the_query_norm_over_the_window_and_the_group():
    moment = torch.diag(torch.tensor([9.0, 1.0, 4.0]))[None, None]
    assert SparK.weight(moment).flatten().tolist() == pytest.approx([1.5, 0.5, 1.0])
    assert torch.equal(SparK.weight(torch.zeros(1, 1, 3, 3)), torch.ones(1, 1, 3))


@settings(max_examples=40, deadline=None)
@given(
    width=st.sampled_from([8, 20, 64]),
    share=st.floats(0.05, 1),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    signs=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sparse_codes_keep_the_best_channels_of_each_token_exactly(width, share, dtype, signs, seed):
    rank = max(1, int(share * width))
    states = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    code = SparseCode(width, rank, dtype, signs)
    packed = code.pack(states, states.float().square())
    assert packed.shape == (2, 5, code.token_bytes) and packed.dtype == torch.uint8
    read = code.unpack(packed)
    best = states.float().abs().topk(rank, -1).indices
    assert torch.equal(read.gather(-1, best), states.float().gather(-1, best))
    if signs and rank < width:
        dropped = torch.ones_like(read, dtype=torch.bool).scatter_(-1, best, value=False)
        power = (states.float().square() * dropped).sum(-1) / (width - rank)
        torch.testing.assert_close((read.square() * dropped).sum(-1) / (width - rank), power, rtol=2e-2, atol=1e-6)
        assert ((read * states.float() >= 0) | ~dropped).all()
