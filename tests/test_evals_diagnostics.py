"""Diagnostics against planted geometry and against what transformers' own cache holds."""

import pytest
import torch
from transformers import DynamicCache

from evals import figures
from evals.accuracy import READER
from evals.diagnostics import (
    Heard,
    basis_errors,
    directions,
    geometry,
    listen,
    logit_energy,
    overlap,
    rank_for,
    spectrum,
    without_delta,
)
from evals.tasks import load_task
from rotatek_cache import RotateKCache
from rotatek_cache.basis import KeyStatistics, key_moments
from rotatek_cache.methods import BASES
from rotatek_lmms_eval.chat import Chat


def planted(heads=2, tokens=60, width=16, rank=3, seed=0):
    """Keys of an exact rank around a mean, and queries."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys = normal(heads, tokens, rank) @ normal(heads, rank, width) + normal(heads, 1, width)
    queries = normal(heads, 40, width)
    mean, scatter = key_moments(keys)
    window = queries.unflatten(1, (2, 20)).flatten(0, 1)[None]  # [1, H_q, W, D]
    stats = KeyStatistics(mean[:, None], scatter[:, None], torch.tensor([tokens]), window)
    return Heard(keys, keys[:, :5], queries, queries, stats)


def test_planted_rank_is_found():
    heard = planted(rank=3)
    share = spectrum(heard.stats.scatter[:, 0])
    assert rank_for(share, 0.999).tolist() == [3, 3]
    assert share[:, 2].tolist() == pytest.approx([1.0, 1.0])
    # Queries that see nothing but the first channel leave one direction of logit energy, whatever the Keys are.
    queries = torch.zeros_like(heard.answer)
    queries[..., 0] = 1.0
    assert rank_for(spectrum(logit_energy(heard.stats.scatter[:, 0], queries)), 0.99).tolist() == [1, 1]


def test_logit_energy_is_the_energy_of_the_logits():
    heard = planted()
    centred = heard.visual - heard.visual.mean(1, keepdim=True)
    logits = heard.answer @ centred.mT
    trace = logit_energy(heard.stats.scatter[:, 0], heard.answer).diagonal(dim1=-2, dim2=-1).sum(-1)
    moment = heard.answer.square().sum((1, 2)) / heard.answer.shape[1] / heard.answer.shape[2]
    torch.testing.assert_close(trace * moment, logits.square().sum((1, 2)) / heard.answer.shape[1])


def test_principal_angles_by_hand():
    eye = torch.eye(4)[None]
    plane, tilted = eye[..., :2], eye[..., :2].clone()
    tilted[0, 1, 1] = tilted[0, 2, 1] = 0.5**0.5  # the second axis turned by 45 degrees
    found = overlap(plane, tilted)
    assert found["shared"] == pytest.approx([0.75])
    assert found["degrees"] == pytest.approx([0.0, 45.0], abs=0.05)
    assert overlap(plane, eye[..., 2:])["shared"] == pytest.approx([0.0])


def test_few_states_span_few_directions():
    states = torch.randn(1, 4, 16)
    assert directions(states, 8).shape[-1] == 3
    assert directions(states, 8, centred=False).shape[-1] == 4


@pytest.mark.parametrize("name", ["pca", "pca_uncentred", "oblique"])
def test_bases_that_span_the_keys_make_no_error(name):
    heard = planted(rank=3)
    keys, logits = basis_errors(heard, name, 8)
    assert keys < 1e-10 and logits < 1e-10
    worse, _ = basis_errors(heard, name, 2)
    assert 0.001 < worse < 1


def test_without_delta_keys_are_projected_as_they_stand():
    torch.manual_seed(1)
    keys, values = torch.randn(1, 2, 64, 16) + 2.0, torch.randn(1, 2, 64, 16)
    cache = RotateKCache(rank=8, always_compress=True, visual_mask=torch.arange(64)[None] < 60)
    handle, _ = cache.update(keys, values, 0)
    handle.kv.observe(torch.randn(1, 2, 64, 16), None)
    (segment,) = cache.layers[0].kv.segments
    basis = segment.keys.basis
    held = basis.reconstruct(segment.keys.data[:, None])[:, 0]
    without_delta(cache)
    (segment,) = cache.layers[0].kv.segments
    found = segment.keys.basis.reconstruct(segment.keys.data[:, None])[:, 0]
    projector = basis.B[:, 0] @ basis.B[:, 0].mT
    torch.testing.assert_close(found, keys[0, :, :60] @ projector, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, held, atol=0.1)


@pytest.fixture(scope="module")
def chat():
    return Chat.load(str(READER), dtype=torch.float32)


def test_listening_hears_what_the_cache_holds(chat):
    task = load_task("reader-easy-second")
    sample = task.sample(0)
    heard = listen(chat, sample, task.max_new_tokens)
    dense = DynamicCache()
    batch = chat.begin([sample.images], [sample.turns[0].text], dense, max_new_tokens=16)
    chat.go_on(batch, [sample.turns[1].text])
    visual = batch.ids[0, :-1] == chat.model.config.image_token_id
    assert visual.sum() == 324
    for one, layer in zip(heard, dense.layers, strict=True):
        torch.testing.assert_close(one.visual, layer.keys[0][:, visual])
        torch.testing.assert_close(one.text, layer.keys[0][:, ~visual])
        assert one.window.shape[1] == 32 * 2 and one.window.shape[0] == one.visual.shape[0]
    new = batch.ids.shape[1] - 1 - len(visual) + int((~visual).sum())
    assert 0 < heard[0].answer.shape[1] < 2 * new


def test_geometry_and_its_pictures_are_whole(chat, tmp_path):
    task = load_task("reader-easy-second")
    heard = [listen(chat, task.sample(index), task.max_new_tokens) for index in range(3)]
    with torch.inference_mode():
        found = geometry(heard, (8, 32))
    assert found["samples"] == 3 and len(found["layers"]) == len(heard[0])
    for layer in found["layers"]:
        assert set(layer["errors"]) == set(BASES)
        for basis, errors in layer["errors"].items():
            assert errors["8"]["keys"] > errors["32"]["keys"], basis
        # Of all bases of a rank, PCA loses least of the Keys.
        assert layer["errors"]["pca"]["8"]["keys"] == min(errors["8"]["keys"] for errors in layer["errors"].values())
        assert all(0 <= share <= 1.0001 for curve in layer["explained_variance"] for share in curve)
        assert set(layer["angles"]) == {"images", "visual and text", "window and answer queries"}
    for name, figure in figures.diagnostics({"geometry": found, "head_width": 128}).items():
        figures.save(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
