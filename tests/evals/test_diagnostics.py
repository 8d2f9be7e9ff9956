"""Diagnostics against planted geometry and against what transformers' own cache holds."""

import io
import json
import sys

import datasets
import pytest
import torch
from transformers import DynamicCache

from evals import diagnostics, figures
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
from rotatek_cache.codecs.registry import BASES
from rotatek_cache.core.fitting import KeyStatistics, key_moments
from rotatek_cache.hf.chat import Chat


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


def test_outlier_channels_by_hand():
    states = torch.ones(2, 4, 5)
    states[1, :, 3] = torch.tensor([6.0, -8.0, 8.0, -6.0])  # root mean square: sqrt(50)
    assert diagnostics.outlier_channels(states).tolist() == pytest.approx([1.0, 50**0.5])


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
    cache = RotateKCache.for_study(rank=8, always_compress=True, visual_mask=torch.arange(64)[None] < 60)
    handle, _ = cache.update(keys, values, 0)
    handle.observe(torch.randn(1, 2, 64, 16), None)
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


def test_many_layers_are_drawn_and_some_of_them_named(tmp_path):
    layer = {
        "explained_variance": [[0.5, 1.0]] * 2, "logit_energy": [[0.6, 1.0]] * 2,
        "angles": {"images": {"1": {"shared": [0.5], "degrees": [45.0]}}},
        "errors": {"pca": {"1": {"keys": 0.5, "logits": 0.4}, "2": {"keys": 0.1, "logits": 0.1}}},
    }  # fmt: skip
    drawn = figures.diagnostics({"geometry": {"layers": [layer] * 36}, "head_width": 2})
    for name in ("variance", "angles"):
        labels = drawn[name].axes[0].get_legend_handles_labels()[1]
        assert [label for label in labels if label != "by chance"] == [f"layer {i}" for i in (0, 7, 14, 21, 28, 35)]
    assert figures.spaced(4, 5) == [0, 1, 2, 3] and figures.spaced(1, 5) == [0]


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["diagnostics", *map(str, flags)])
    diagnostics.main()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "1"], "--samples must be at least 2"),
        (["--options", "{"], "argument --options: expected a mapping such as '{path: folder}', got '{'"),
        (["--ranks", "0"], "argument --ranks: expected a whole number from 1 on"),
        (["--level", "hardest"], "argument --level: invalid choice: 'hardest'"),
        (["--model", "other"], "give --pages 0 with another model"),
    ],
)
def test_wrong_flags_are_named(flags, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, "--out", tmp_path / "d.json", *flags)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_wrong_tasks_devices_and_ranks_are_named(tmp_path, monkeypatch):
    few = ["--samples", "2", "--pages", "0", "--out", tmp_path / "d.json"]
    for flags, message in (
        (["--task", "nope"], "unknown task 'nope'"),
        (["--device", "foo"], "device 'foo' cannot be used"),
        (["--ranks", "8", "129"], r"at most the head width of the model, 128, got \[129\]"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            command(monkeypatch, *few, *flags)


def test_the_command_leaves_out_samples_that_cannot_be_used(tmp_path, monkeypatch, capsys):
    file = io.BytesIO()
    load_task("reader-easy-row").sample(0).images[0].save(file, "PNG")
    pictures = [{"bytes": file.getvalue(), "path": None}] * 2 + [{"bytes": b"none", "path": None}]
    asked = ["row 1?", "column A?", "row 1?", "row 1?\nAnswer the question with a single word."]
    rows = [
        {"type": "h", "question": question, "answer": "1", "image": picture}
        for question, picture in zip(asked, [*pictures, pictures[0]], strict=True)
    ]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "data")
    options = json.dumps({"path": str(tmp_path / "data"), "suffix": ""})
    flags = ["--task", "chartqa", "--options", options, "--pages", "0", "--ranks", "8"]
    command(monkeypatch, *flags, "--out", tmp_path / "d.json", "--figures", tmp_path)
    stored = json.loads((tmp_path / "d.json").read_text())
    assert stored["geometry"]["samples"] == stored["setting"]["samples"] == 2
    said = capsys.readouterr().err
    assert "left out: the image of sample 2" in said
    assert "left out: sample 3: the answer ended with its first token" in said  # no question of the reader's
    assert {path.stem for path in tmp_path.glob("*.png")} == {"d_heat", "d_variance", "d_angles", "d_errors"}
