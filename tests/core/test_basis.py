"""The maths: moments, weights, solver, ranks, and what a basis does to Keys and queries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotatek_cache.codecs.registry import BASES
from rotatek_cache.core.basis import KeyBasis, padded_rank
from rotatek_cache.core.fitting import (
    KeyStatistics,
    key_moments,
    orthogonal_basis,
    principal_directions,
    query_channel_norm,
    rank_for_energy,
    ridged,
)
from rotatek_cache.options import FitOptions


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def decaying_keys(heads: int, rows: int, tokens: int, width: int, decades: float = 3, seed: int = 0) -> torch.Tensor:
    """Keys whose spectrum falls over `decades` in a random basis, around a mean."""
    scale = torch.logspace(0, -decades, width, dtype=torch.float64)
    rotation = torch.linalg.qr(normal(heads, rows, width, width, seed=seed)).Q
    keys = (normal(heads, rows, tokens, width, seed=seed + 1) * scale) @ rotation.mT
    return keys + normal(heads, rows, 1, width, seed=seed + 2)


def fitted(keys: torch.Tensor, rank: int, solver: str = "eigh", dtype: torch.dtype = torch.float64) -> KeyBasis:
    mean, scatter = key_moments(keys)
    return orthogonal_basis(mean, ridged(scatter), rank, solver, dtype)


def test_moments_of_a_case_worked_by_hand():
    mean, scatter = key_moments(torch.tensor([[1.0, 0.0], [3.0, 2.0]], dtype=torch.float64))
    assert mean.tolist() == [2, 1]
    assert scatter.tolist() == [[2, 2], [2, 2]]


def test_moments_survive_a_large_mean_in_half_precision():
    keys = decaying_keys(1, 1, 500, 16, decades=1)
    offset = 100 * torch.ones(16, dtype=torch.float64)
    half = (keys + offset).to(torch.bfloat16)
    mean, scatter = key_moments(half)
    expected_mean, expected = key_moments(half.double())
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-5, atol=1e-5)
    assert (scatter - expected).norm() / expected.norm() < 1e-4


def test_query_norm_averages_the_group_with_sign():
    # Two query heads of one group, two window positions, two channels: means are [[2, 0], [0, 2]].
    queries = torch.tensor([[[[1.0, 3.0], [0.0, 2.0]], [[3.0, -3.0], [0.0, 2.0]]]], dtype=torch.float64)
    assert query_channel_norm(queries, 1).tolist() == [[[2, 2]]]


def test_query_norm_is_floored_at_a_thousandth_of_the_median():
    queries = torch.tensor([[[[4.0, 2.0, 0.0]]]], dtype=torch.float64)
    assert query_channel_norm(queries, 1).flatten().tolist() == pytest.approx([4, 2, 2e-3])


def test_query_norm_ignores_padding_and_treats_an_empty_window_as_no_weight():
    queries = normal(2, 4, 5, 8)
    valid = torch.tensor([[False, False, True, True, True], [False] * 5])
    norm = query_channel_norm(queries, 2, valid)
    torch.testing.assert_close(norm[:, :1], query_channel_norm(queries[:1, :, 2:], 2))
    assert (norm[:, 1] == 1).all()
    # What padding holds must not matter, even if it is not a number.
    queries[0, :, :2] = torch.nan
    torch.testing.assert_close(query_channel_norm(queries, 2, valid)[:, :1], norm[:, :1])


@pytest.mark.parametrize("solver", ["subspace", "eigh"])
@pytest.mark.parametrize("rank", [1, 8, 64, 100, 128])
def test_directions_are_orthonormal_at_every_rank(solver, rank):
    keys = decaying_keys(2, 3, 400, 128).float()
    directions = principal_directions(ridged(key_moments(keys)[1]), rank, solver)
    error = (directions.mT @ directions - torch.eye(rank)).abs().max()
    assert error < 5e-6


def test_subspace_iteration_finds_the_top_directions():
    keys = decaying_keys(2, 2, 400, 64)
    matrix = key_moments(keys)[1]
    exact = principal_directions(matrix, 16, "eigh")
    found = principal_directions(matrix, 16, "subspace")

    def captured(basis: torch.Tensor) -> torch.Tensor:
        return (basis.mT @ matrix @ basis).diagonal(dim1=-2, dim2=-1).sum(-1)

    assert (captured(found) > 0.995 * captured(exact)).all()


def test_eigh_directions_come_in_falling_order():
    directions = principal_directions(torch.diag(torch.tensor([1.0, 9.0, 4.0])), 2, "eigh")
    assert directions.abs().argmax(0).tolist() == [1, 2]


@pytest.mark.parametrize("solver", ["subspace", "eigh"])
def test_constant_keys_are_their_mean(solver):
    keys = torch.ones(1, 1, 50, 16)
    basis = fitted(keys, 8, solver, torch.float32)
    assert torch.isfinite(basis.A).all()
    torch.testing.assert_close(basis.reconstruct(basis.encode(keys)), keys)


@pytest.mark.parametrize("solver", ["subspace", "eigh"])
def test_full_rank_loses_nothing(solver):
    keys = decaying_keys(2, 2, 100, 64)
    basis = fitted(keys, 64, solver)
    torch.testing.assert_close(basis.reconstruct(basis.encode(keys)), keys, rtol=1e-10, atol=1e-10)


def test_keys_of_low_rank_are_reproduced_without_the_query_weight():
    keys = normal(2, 1, 200, 12) @ normal(2, 1, 12, 64, seed=1) + normal(2, 1, 1, 64, seed=2)
    basis = fitted(keys, 16)
    torch.testing.assert_close(basis.reconstruct(basis.encode(keys)), keys, rtol=1e-9, atol=1e-9)


def test_reconstruct_after_encode_is_a_projection():
    keys = decaying_keys(2, 1, 100, 32)
    basis = fitted(keys, 8)
    once = basis.reconstruct(basis.encode(keys))
    torch.testing.assert_close(basis.reconstruct(basis.encode(once)), once)


def test_logits_from_coefficients_are_those_of_reconstructed_keys():
    keys, query = decaying_keys(2, 3, 50, 32), normal(2, 3, 4, 32, seed=9)
    basis = fitted(keys, 10)
    logits = basis.project_query(query) @ basis.encode(keys).mT + basis.logit_shift(query)
    torch.testing.assert_close(logits, query @ basis.reconstruct(basis.encode(keys)).mT)


def test_centred_coefficients_say_the_same_as_the_papers_uncentred_ones():
    keys, query = decaying_keys(1, 1, 80, 32), normal(1, 1, 4, 32, seed=9)
    basis = fitted(keys, 8)
    rotation, mean = basis.A, keys.mean(-2)
    delta = mean - (mean[..., None, :] @ rotation @ rotation.mT)[..., 0, :]
    papers = (query @ rotation) @ (keys @ rotation).mT + query @ delta[..., None]
    ours = basis.project_query(query) @ basis.encode(keys).mT + basis.logit_shift(query)
    torch.testing.assert_close(ours, papers)


def test_rank_is_padded_with_zero_columns():
    keys = decaying_keys(1, 1, 100, 96)
    basis = fitted(keys, 90)
    assert basis.A.shape[-1] == 96 and basis.fitted_rank == 90
    assert (basis.A[..., 90:] == 0).all() and (basis.encode(keys)[..., 90:] == 0).all()


def test_identity_keeps_keys_as_they_are():
    keys = normal(1, 2, 3, 8)
    identity = KeyBasis()
    assert identity.encode(keys) is keys and identity.reconstruct(keys) is keys
    assert identity.project_query(keys) is keys and identity.logit_shift(keys) is None and identity.tensors() == []


def test_equal_encoder_and_decoder_are_held_once():
    basis = fitted(decaying_keys(1, 1, 50, 16), 8)
    assert len(basis.tensors()) == 2  # A = B, offset = delta


def test_what_is_encoded_agrees_with_the_rounded_basis():
    # A bf16 basis is not orthonormal; encoding with the unrounded one would double the error.
    keys = decaying_keys(1, 1, 300, 64)
    basis = fitted(keys.to(torch.bfloat16), 64, dtype=torch.bfloat16)
    error = (basis.reconstruct(basis.encode(keys.to(torch.bfloat16)).double()) - keys).norm() / keys.norm()
    assert error < 2**-7


@settings(max_examples=50, deadline=None)
@given(rank=st.integers(1, 31), seed=st.integers(0, 1000))
def test_the_key_error_is_the_spectrum_left_out(rank, seed):
    keys = decaying_keys(1, 1, 60, 32, seed=seed)
    mean, scatter = key_moments(keys)
    basis = orthogonal_basis(mean, scatter, rank, "eigh", torch.float64)
    spectrum = torch.linalg.eigvalsh(scatter)[0, 0].flip(0)
    error = (basis.reconstruct(basis.encode(keys)) - keys).square().sum()
    torch.testing.assert_close(error, spectrum[rank:].sum(), rtol=1e-8, atol=1e-10)


def test_rank_for_energy_by_hand():
    matrix = torch.diag(torch.tensor([6.0, 3.0, 1.0, 0.0], dtype=torch.float64))
    assert [rank_for_energy(matrix, e) for e in (0.1, 0.6, 0.61, 0.9, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]
    flat = torch.eye(4, dtype=torch.float64)
    assert rank_for_energy(torch.stack([matrix, flat]), 0.9) == 4  # the worst head decides


def test_all_energy_is_the_rank_of_the_keys():
    keys = normal(1, 1, 200, 5) @ normal(1, 1, 5, 64, seed=1)
    stats = KeyStatistics(*key_moments(keys.float()), torch.tensor([200]))
    assert rank_for_energy(BASES["rotatek"].energy_matrix(stats), 1.0) == 5


@pytest.mark.parametrize(
    ("options", "width", "rank"),
    [({"sparsity": 0.75}, 128, 32), ({"sparsity": 0.3}, 128, 90), ({"sparsity": 0.0}, 80, 80), ({"rank": 7}, 64, 7)],
)
def test_rank_follows_from_the_options(options, width, rank):
    assert FitOptions(**options).rank_for(width) == rank


def test_padded_rank():
    assert [padded_rank(r) for r in (1, 8, 9, 90, 128)] == [8, 8, 16, 96, 128]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ValueError, "exactly one of sparsity, rank and energy.*none"),
        ({"sparsity": 0.5, "rank": 8}, ValueError, "exactly one.*sparsity=0.5, rank=8"),
        ({"sparsity": 1.0}, ValueError, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, ValueError, "sparsity"),
        ({"sparsity": float("nan")}, ValueError, "sparsity"),
        ({"sparsity": "half"}, TypeError, "sparsity must be a number, got str"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"rank": 1.5}, TypeError, "rank must be an int, got float"),
        ({"rank": True}, TypeError, "rank must be an int, got bool"),
        ({"energy": 0}, ValueError, "energy"),
        ({"energy": 1.1}, ValueError, "energy"),
        ({"rank": 8, "query_window": 0}, ValueError, "query_window must be at least 1"),
        ({"rank": 8, "solver": "svd"}, ValueError, "solver must be 'subspace' or 'eigh', got 'svd'"),
    ],
)
def test_bad_options_are_named(options, error, words):
    with pytest.raises(error, match=words):
        FitOptions(**options)


def test_rank_above_the_head_width_is_refused():
    with pytest.raises(ValueError, match="rank must be at most the head width 64, got 65"):
        FitOptions(rank=65).rank_for(64)


def oblique(keys: torch.Tensor, rank: int) -> KeyBasis:
    mean, scatter = key_moments(keys)
    tokens = torch.full((keys.shape[1],), keys.shape[2])
    queries = normal(keys.shape[1], 2 * keys.shape[0], 40, keys.shape[-1], seed=9)
    return BASES["oblique"].fit(KeyStatistics(mean, scatter, tokens, queries), rank, "eigh", torch.float64)


@pytest.mark.parametrize("rank", [3, 8, 13, 32])
@pytest.mark.parametrize("fit", [fitted, oblique])
def test_the_encoder_of_an_int8_basis_is_made_for_the_rounded_decoder(fit, rank):
    keys = decaying_keys(2, 3, 60, 32, decades=2)
    exact = fit(keys, rank)
    coded = exact.in_int8()
    assert coded.B.dtype == torch.int8 and coded.B.shape == exact.B.shape == (2, 3, 32, padded_rank(rank))
    decoder = coded.B * coded.scale[..., None, :]
    # A code is at most half a step from what it stands for, and the peak of each column is 127 steps.
    peak = exact.B.abs().amax(-2, keepdim=True)
    assert ((decoder - exact.B).abs() <= peak / 254 + 1e-12).all()
    identity = torch.eye(padded_rank(rank), dtype=torch.float64)
    identity[rank:] = 0
    torch.testing.assert_close(decoder.mT @ coded.A, identity.expand(2, 3, -1, -1), atol=1e-10, rtol=0)
    rebuilt = coded.reconstruct(coded.encode(keys))
    torch.testing.assert_close(coded.reconstruct(coded.encode(rebuilt)), rebuilt, atol=1e-9, rtol=0)
    query = normal(2, 3, 5, 32, seed=4)
    logits = coded.project_query(query) @ coded.encode(keys).mT + coded.logit_shift(query)
    torch.testing.assert_close(logits, query @ rebuilt.mT, atol=1e-9, rtol=0)
    if rank == 32:
        torch.testing.assert_close(rebuilt, keys, atol=1e-9, rtol=0)
    error, least = (((basis.reconstruct(basis.encode(keys)) - keys).square().sum()) for basis in (coded, exact))
    spread = (keys - keys.mean(2, keepdim=True)).square().sum()
    assert error < least + 1e-4 * spread


def test_an_int8_basis_of_selected_channels_is_exact():
    keys = decaying_keys(1, 1, 30, 16)
    mean, scatter = key_moments(keys)
    exact = BASES["think"].fit(KeyStatistics(mean, scatter, torch.tensor([30])), 8, "eigh", torch.float64)
    coded = exact.in_int8()
    torch.testing.assert_close(coded.reconstruct(coded.encode(keys)), exact.reconstruct(exact.encode(keys)))
    assert coded.delta is None
