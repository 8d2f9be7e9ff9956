"""The fidelity bench: its methods can be built, drawn pages and folders of images are scored, bytes are storage."""

import json
from pathlib import Path

import pytest
import torch

from evals import fidelity
from rotatek_cache import RotateKCache
from rotatek_cache.basis import Allocation, FitOptions
from rotatek_cache.methods import METHODS

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "rotatek_cache" / "reader" / "pages"


@pytest.mark.parametrize("name", ["fidelity.yaml", "fidelity_choice.yaml", "fidelity_allocation.yaml"])
def test_every_row_of_the_table_is_a_valid_cache(name):
    methods = fidelity.read_methods(ROOT / "evals" / name)
    for options in methods.values():
        FitOptions(**{**options, "allocation": Allocation.of(options.get("allocation", "uniform"))})


def test_the_table_compares_every_method():
    used = {options.get("basis", "rotatek") for options in fidelity.read_methods(fidelity.METHODS).values()}
    assert used >= set(METHODS)


def run(*arguments: str) -> None:
    fidelity.main(["--workers", "1", *arguments])


def test_drawn_pages_and_folders_of_images_are_scored(tmp_path):
    methods = tmp_path / "methods.yaml"
    methods.write_text("a:\n  exact: {sparsity: 0.0, value_sparsity: 0.0}\n  poor: {rank: 1}\n")
    common = ["--methods", str(methods), "--pages", "2"]
    run(*common, "--out", str(tmp_path / "drawn.json"))
    run(
        *common,
        "--images",
        str(PAGES),
        "--question",
        "row 3?",
        "--question",
        "column B?",
        "--out",
        str(tmp_path / "x.json"),
    )
    for name in ("drawn", "x"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        rows = json.loads((tmp_path / f"{name}.json").read_text())["methods"]
        assert rows["dense"]["second"]["images"] == 2 and rows["dense"]["kv_ratio"] == 1
        # Rotated in full and back: rounding alone is lost.
        assert rows["a: exact"]["second"]["kl"] < 1e-4 < rows["a: poor"]["second"]["kl"]
        assert rows["a: poor"]["key_ratio"] > 8 and rows["a: poor"]["value_ratio"] == 1
        tokens, heads, layers, width = 324, 2, 4, 128
        assert rows["dense"]["visual_bytes_per_image"] == tokens * heads * layers * 2 * width * 2
    # The dense cache's own answers stand for the true ones.
    assert rows["dense"]["first"]["exact_match"] == rows["dense"]["second"]["exact_match"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", str(PAGES)], "--images needs two --question, got 0"),
        (["--question", "row 3?"], "need --images"),
        (["--pages", "0"], "argument --pages: expected a whole number from 1 on, got '0'"),
        (["--skip", "-3"], "argument --skip: expected a whole number from 0 on, got '-3'"),
        (["--only", "nosuch"], "no row of"),
        (["--methods", "nowhere.yaml"], "nowhere.yaml"),
        (
            ["--only", "rotatek", "--images", str(PAGES), "--question", "a", "--question", "b", "--skip", "99"],
            "no image is left",
        ),
        (["--images", "nowhere", "--question", "a", "--question", "b"], "--images must be a folder"),
    ],
)
def test_bad_arguments_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_a_row_that_cannot_be_built_is_named_before_any_work(tmp_path, capsys):
    methods = tmp_path / "methods.yaml"
    methods.write_text("a:\n  lost: {sparsity: 0.5, basis: nowhere.safetensors}\n")
    with pytest.raises(SystemExit):
        run("--methods", str(methods))
    said = capsys.readouterr().err
    assert "row 'a: lost': basis file" in said and "nowhere.safetensors does not exist; python -m evals" in said


def test_another_models_images_leave_the_readers_bases_out(tmp_path, capsys):
    arguments = fidelity.argparse.Namespace(methods=fidelity.METHODS, only=None, images=PAGES, basis=None)
    rows = fidelity.chosen_methods(arguments)
    assert not any(str(options.get("basis")).endswith(".safetensors") for options in rows.values())
    assert "rows with a calibrated basis of the reader" in capsys.readouterr().out


def test_the_interval_is_that_of_paired_differences():
    losses = fidelity.np.array([0.0] * 90 + [1.0] * 10)
    low, high = fidelity.bootstrap(losses)
    assert 0.03 < low < 0.06 and 0.14 < high < 0.18


def test_what_a_cache_is_filled_with_is_what_its_prefill_gives():
    reader = fidelity.load(None)
    with torch.inference_mode():
        batch = fidelity.make_batch(reader.processor, fidelity.CHOOSE_SEEDS[:2], "easy", fidelity.ADDRESS_KINDS)
        recorder = fidelity.RecordingCache()
        reader.model(**batch.prompt, position_ids=batch.positions()[0], past_key_values=recorder, use_cache=True)
        filled, prefilled = (RotateKCache(rank=16, always_compress=True) for _ in range(2))
        fidelity.fill(filled, reader.model.config, batch, recorder)
        reader.model(**batch.prompt, position_ids=batch.positions()[0], past_key_values=prefilled, use_cache=True)
    for one, other in zip(filled.layers, prefilled.layers, strict=True):
        ours, theirs = one.kv.segments[0].keys, other.kv.segments[0].keys
        rebuilt = [part.basis.reconstruct(part.data.unflatten(1, (2, -1)).float()) for part in (ours, theirs)]
        assert (rebuilt[0] - rebuilt[1]).norm() < 0.02 * rebuilt[1].norm()
