"""The fidelity bench: its methods can be built, drawn pages and folders of images are scored, bytes are storage."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from evals import fidelity
from evals.reader import calibrate as reader_calibration
from rotatek_cache import RotateKCache
from rotatek_cache.calibration.gather import calibrate
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.fingerprint import fingerprint
from rotatek_cache.codecs.registry import CODECS
from rotatek_cache.options import Allocation, FitOptions
from rotatek_cache.token_pruning.registry import token_method

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "rotatek_cache" / "reader" / "pages"

quanto = pytest.mark.skipif(
    importlib.util.find_spec("optimum") is None or shutil.which("c++") is None,
    reason="needs optimum-quanto, which compiles its unpacking on its first use",
)


@pytest.mark.parametrize(
    "name",
    ["fidelity.yaml", "fidelity_choice.yaml", "fidelity_allocation.yaml", "fidelity_other.yaml", "fidelity_smol.yaml"],
)
def test_every_row_of_the_table_is_a_valid_cache(name):
    methods = fidelity.read_methods(ROOT / "evals" / "settings" / name)
    for options in methods.values():
        if "cache" in options:
            assert options["cache"] in fidelity.OTHER_CACHES
            continue
        if "tokens" in options:
            assert token_method(options.pop("tokens"))
        FitOptions(**{**options, "allocation": Allocation.of(options.get("allocation", "uniform"))})


def test_the_table_compares_every_method():
    used = {
        options.get("basis", "rotatek")
        for options in fidelity.read_methods(fidelity.DEFAULT_METHODS).values()
        if "cache" not in options
    }
    assert used >= set(CODECS)


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
        assert min(Image.open(tmp_path / f"{name}.png").size) > 400
        stored = json.loads((tmp_path / f"{name}.json").read_text())
        assert stored["command"].startswith("python -m evals.fidelity --workers 1 --methods ")
        rows = stored["methods"]
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


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{cache: paged}", "omni_scaled, or left out for RotateKCache, got 'paged'"),
        ("{cache: quantized, backend: nosuch}", "Unknown quantization backend `nosuch`"),
        ("{cache: quantized, backend: fp8, nbits: 4}", "does not support ['nbits']"),
        ("{cache: quantized, backend: fp8, rank: 4}", "unexpected keyword argument 'rank'"),
        ("{cache: quantized}", "missing 1 required positional argument: 'backend'"),
    ],
)
def test_another_cache_that_cannot_be_built_is_named(row, words, tmp_path, capsys):
    methods = tmp_path / "methods.yaml"
    methods.write_text(f"a:\n  lost: {row}\n")
    with pytest.raises(SystemExit):
        run("--methods", str(methods))
    error = capsys.readouterr().err
    assert "row 'a: lost': " in error and words in error


@quanto
def test_bits_that_quanto_lacks_are_named(tmp_path, capsys):
    methods = tmp_path / "methods.yaml"
    methods.write_text("a:\n  lost: {cache: quantized, backend: quanto, nbits: 3}\n")
    with pytest.raises(SystemExit):
        run("--methods", str(methods))
    assert "row 'a: lost': `nbits` for `quanto` backend has to be one of" in capsys.readouterr().err


def score_row(row, tmp_path):
    methods = tmp_path / "methods.yaml"
    methods.write_text(f"a:\n  row: {row}\n")
    run("--methods", str(methods), "--pages", "2", "--out", str(tmp_path / "x.json"))
    return json.loads((tmp_path / "x.json").read_text())["methods"]["a: row"]


def test_transformers_fp8_cache_is_scored_as_a_row(tmp_path):
    found = score_row("{cache: quantized, backend: fp8}", tmp_path)
    # One byte a coordinate in place of two, and one scale a layer.
    assert found["key_ratio"] == pytest.approx(2, rel=1e-3) and found["value_ratio"] == pytest.approx(2, rel=1e-3)
    assert 0 < found["second"]["kl"] < 1e-2


@quanto
def test_transformers_quanto_cache_is_scored_as_a_row(tmp_path):
    found = score_row("{cache: quantized, backend: quanto, nbits: 4}", tmp_path)
    # 64 coordinates in half precision, 128 bytes, become 32 bytes of codes, a scale and a shift.
    assert found["key_ratio"] == pytest.approx(128 / 36) and found["value_ratio"] == pytest.approx(128 / 36)
    assert 0 < found["second"]["kl"] < 0.1


@pytest.mark.parametrize("padded", [False, True])
def test_another_cache_is_read_as_transformers_itself_reads_it(padded):
    """Filled with recorded states and replayed: the logits of a prefill and a forward with that cache alone."""
    reader = fidelity.load(None)
    with torch.inference_mode():
        seeds = fidelity.CHOOSE_SEEDS[5:7] if padded else fidelity.CHOOSE_SEEDS[:2]
        batch = fidelity.make_batch(reader.processor, seeds, "easy", fidelity.ADDRESS_KINDS)
        assert bool(batch.prompt["attention_mask"].all()) is not padded
        positions = batch.positions()[0]
        recorder = fidelity.RecordingCache()
        first = reader.model(**batch.prompt, position_ids=positions, past_key_values=recorder, use_cache=True)
        options = {"cache": "quantized", "backend": "fp8"}
        filled, prefilled = (fidelity.new_cache(options, reader.model.config) for _ in range(2))
        fidelity.fill(filled, reader.model.config, batch, recorder)
        reader.model(**batch.prompt, position_ids=positions, past_key_values=prefilled, use_cache=True)
        ours, theirs = (
            fidelity.replay(reader.model, cache, batch, first.logits[:, -1]) for cache in (filled, prefilled)
        )
    real = batch.rest_mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=0.05, rtol=0)


def test_stored_tensors_are_those_behind_containers_and_wrappers():
    plain = torch.zeros(3)
    wrapped = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    found = fidelity.stored_tensors((plain, {"scale": wrapped, "bits": 4}, None))
    assert found[0] is plain and {tuple(t.shape) for t in found[1:]} >= {(5,), (3,)}


def test_rows_that_another_models_layers_cannot_take_are_left_out(tmp_path, capsys):
    text = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    transformers.Gemma3TextConfig(**text).save_pretrained(tmp_path)
    arguments = fidelity.argparse.Namespace(
        methods=fidelity.DEFAULT_METHODS, only=["fp8", "r=16"], images=PAGES, basis=None, model=str(tmp_path)
    )
    rows = fidelity.chosen_methods(arguments)
    assert "rotatek: r=16" in rows and not any("cache" in options for options in rows.values())
    assert "only full attention layers" in capsys.readouterr().out


def test_another_models_images_leave_the_readers_bases_out(tmp_path, capsys):
    arguments = fidelity.argparse.Namespace(
        methods=fidelity.DEFAULT_METHODS, only=None, images=PAGES, basis=None, model=None
    )
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
        filled, prefilled = (RotateKCache.for_study(rank=16, always_compress=True) for _ in range(2))
        fidelity.fill(filled, reader.model.config, batch, recorder)
        reader.model(**batch.prompt, position_ids=batch.positions()[0], past_key_values=prefilled, use_cache=True)
    for one, other in zip(filled.layers, prefilled.layers, strict=True):
        ours, theirs = one.kv.segments[0].keys, other.kv.segments[0].keys
        rebuilt = [part.basis.reconstruct(part.data.unflatten(1, (2, -1)).float()) for part in (ours, theirs)]
        assert (rebuilt[0] - rebuilt[1]).norm() < 0.02 * rebuilt[1].norm()


def test_a_cache_of_coded_tokens_is_filled_and_its_bytes_are_the_images_share(tmp_path):
    reader = fidelity.load(None)
    with torch.inference_mode():
        state = Calibration(fingerprint(reader.model), reader.model.config.model_type)
        conversation = next(reader_calibration.conversations(reader.processor, 1, ["easy"]))
        calibrate(reader.model, [conversation], state, text=True).write_basis(tmp_path / "rows.safetensors")
        batch = fidelity.make_batch(reader.processor, fidelity.CHOOSE_SEEDS[:2], "easy", fidelity.ADDRESS_KINDS)
        recorder = fidelity.RecordingCache()
        reader.model(**batch.prompt, position_ids=batch.positions()[0], past_key_values=recorder, use_cache=True)
        options = {"text": "coded", "bits": 4, "basis": str(tmp_path / "rows.safetensors")}
        filled, prefilled = (fidelity.new_cache(options, reader.model.config) for _ in range(2))
        fidelity.fill(filled, reader.model.config, batch, recorder)
        reader.model(**batch.prompt, position_ids=batch.positions()[0], past_key_values=prefilled, use_cache=True)
    share = float(recorder.visual.double().mean())
    keys = fidelity.storage_bytes(
        [held for layer in filled.layers for held in (layer.kv.dense_states[0], layer.kv.codes[0].data)]
    )
    assert fidelity.visual_bytes(filled, recorder.visual)[0] == pytest.approx(share * keys)
    for one, other in zip(filled.layers, prefilled.layers, strict=True):
        assert one.kv.counts.rows == other.kv.counts.rows
        ours, theirs = (layer.kv.codes[0].data for layer in (one, other))
        assert (ours != theirs).float().mean() < 0.05  # what was recorded in half precision rounds now and then
