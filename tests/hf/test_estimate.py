"""The estimate of a cache's bytes is what the cache holds after `generate`, over options and families."""

import json

import pytest
import torch
import ways
from checks import AKVQ
from hosts import Host
from tiny_models import FAMILIES
from tiny_parts import visual_positions
from transformers import AutoConfig, DynamicCache
from typer.testing import CliRunner

from rotatek_cache import RotateKCache
from rotatek_cache.calibration.gather import calibrate
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.cli.app import app
from rotatek_cache.codecs.fingerprint import fingerprint
from rotatek_cache.codecs.sealing import Sealer
from rotatek_cache.hf.chat import READER
from rotatek_cache.hf.storage import stock_tensors, storage_bytes

EXACT = (
    {"sparsity": 0},
    {"sparsity": 0.5},
    {"sparsity": 0.75, "basis_bits": 8},
    {"rank": 5, "key_bits": 8},
    {"sparsity": 0.5, "key_bits": "fp8", "value_bits": "fp8"},
    {"rank": 16, "basis": "oblique", "value_sparsity": 0.5, "value_bits": 4},
    {"sparsity": 0.5, "basis": "spark"},
    {"sparsity": 0.5, "basis": "think"},
    {"sparsity": 0, "basis": "none", "key_bits": 4, "value_bits": 4, "value_basis": "none"},
    {"budget": "0.95x"},
    {"sparsity": 0.5, "tokens": "fastv:0.5"},
    {"sparsity": 0.5, "tokens": "look_m:0.4"},
    {"sparsity": 0, "tokens": "divprune:0.5"},
    {"sparsity": 0.5, "tokens": "pyramid_drop:0.5"},
    AKVQ | {"tokens": "akvq_vl:0.3,text_layers=1"},
)
RANGES = (
    {"energy": 0.9},
    {"energy": 0.5, "key_bits": 4},
    {"sparsity": 0.5, "key_bits": "auto"},
    {"sparsity": 0.25, "key_bits": "auto", "value_sparsity": 0.5, "value_bits": "auto"},
)


def _estimated(inputs, config, answer=0, **options):
    visual = visual_positions(inputs["input_ids"]).sum(1)
    text = inputs["attention_mask"].sum(1) - visual
    return RotateKCache.estimate(config, visual.tolist(), text.tolist(), answer_tokens=answer, **options)


def _held(host, inputs, new, **options):
    cache = RotateKCache.for_study(**options)
    ways.generate(host.attached, inputs, cache, max_new_tokens=new)
    return cache.nbytes()


def _prompts(tiny):
    return {"one": tiny.inputs(tiny.prompt(0, images=(0,))), "padded": ways.padded(tiny)}


@pytest.mark.parametrize("options", EXACT, ids=str)
def test_every_option(llava: Host, options):
    for inputs in _prompts(llava.tiny).values():
        for new in (1, 20):  # an answer of which text buffers grow
            estimate = _estimated(inputs, llava.plain.config, new - 1, dtype=torch.float32, **options)
            assert estimate.is_exact and estimate.least == estimate.nbytes
            assert estimate.nbytes == _held(llava, inputs, new, **options)


@pytest.mark.parametrize("host", list(FAMILIES), indirect=True)
def test_every_family(host: Host):
    options = {"sparsity": 0.5, "always_compress": True}
    for inputs in _prompts(host.tiny).values():
        estimate = _estimated(inputs, host.plain.config, 2, dtype=torch.float32, **options)
        assert estimate.nbytes == _held(host, inputs, 3, **options)
    dense = DynamicCache(config=host.plain.config.get_text_config(decoder=True))
    ways.generate(host.plain, inputs, dense, max_new_tokens=3)
    assert estimate.dense_nbytes == storage_bytes([t for layer in dense.layers for t in stock_tensors(layer)])


@pytest.mark.parametrize("options", RANGES, ids=str)
def test_what_follows_from_the_prompt_is_a_range(llava: Host, options):
    for inputs in _prompts(llava.tiny).values():
        estimate = _estimated(inputs, llava.plain.config, 2, dtype=torch.float32, **options)
        assert "follows from the prompt" in str(estimate) and not estimate.is_exact
        assert estimate.least <= _held(llava, inputs, 3, **options) <= estimate.nbytes
    one = tuple(_estimated(_prompts(llava.tiny)["one"], llava.plain.config, **options) for options in RANGES[:2])
    assert all(estimate.least < estimate.nbytes for estimate in one)


@pytest.mark.parametrize("tokens", ["vl_cache:0.5", "vl_cache:0.5,scope=prompt", "aircache:0.5"])
def test_layers_that_share_their_tokens_are_taken_to_get_alike(llava: Host, tokens):
    inputs = llava.tiny.inputs(llava.tiny.prompt(0, images=(1,)))
    estimate = _estimated(inputs, llava.plain.config, dtype=torch.float32, sparsity=0, tokens=tokens)
    assert not estimate.is_exact and str(estimate).startswith("about ")
    assert estimate.nbytes == pytest.approx(_held(llava, inputs, 1, sparsity=0, tokens=tokens), rel=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5},
        {"sparsity": 0.75, "key_bits": "auto", "value_sparsity": 0.75, "value_bits": "auto", "allocation": "heads"},
        {"energy": 0.9, "key_bits": 8},
    ],
    ids=str,
)
def test_a_calibrated_basis_leaves_nothing_open(llava: Host, tmp_path, options):
    state = Calibration(fingerprint(llava.attached), "llava")
    calibrate(llava.attached, (llava.tiny.inputs(llava.tiny.prompt(seed)) for seed in range(4)), state)
    state.write_basis(tmp_path / "basis.safetensors", value_method="output")
    options = options | {"basis": str(tmp_path / "basis.safetensors")}
    inputs = ways.padded(llava.tiny)
    estimate = _estimated(inputs, llava.plain.config, dtype=torch.float32, **options)
    assert estimate.is_exact
    assert estimate.nbytes == _held(llava, inputs, 1, **options)
    assert _held(llava, inputs, 1, **options) == estimate.nbytes  # nothing of the estimate is left in the file's memory


def test_by_hand():
    """One layer and head of 16 channels in half precision, by a config of nothing else."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 16}
    config = AutoConfig.for_model("llava", text_config={"model_type": "llama", "head_dim": 16, **sizes})
    estimate = RotateKCache.estimate(config, 1000, 0, sparsity=0.5, dtype=torch.float16)
    assert estimate.dense_nbytes == 1000 * 2 * 16 * 2
    # An image that no text follows waits: as dense, with a flag and an id of each position, and the last queries.
    assert estimate.nbytes == estimate.dense_nbytes + 1000 * (1 + 8) + 32 * 16 * 2
    sealed = RotateKCache.estimate(config, 1000, 1, sparsity=0.5, dtype=torch.float16)
    coefficients, values, basis, mean = 1000 * 8 * 2, 1000 * 16 * 2, 16 * 8 * 2, 16 * 2
    text, tables, positions = 9 * 2 * 16 * 2, 1000 * 4 + (8 + 4 + 8) + 4, 1001 * (1 + 8)
    assert sealed.nbytes == coefficients + values + basis + mean + text + tables + positions
    assert int(sealed) == sealed.nbytes and sealed.compression_ratio == sealed.dense_nbytes / sealed.nbytes


def test_layers_alike_are_stored_once(llava: Host, monkeypatch):
    stored = []
    store = Sealer.store
    monkeypatch.setattr(
        Sealer, "store", lambda self, *given, **more: stored.append(self) or store(self, *given, **more)
    )
    RotateKCache.estimate(llava.plain.config, 400, 20, sparsity=0.5)
    assert llava.plain.config.get_text_config().num_hidden_layers > len(stored) == 1


SOFTCAP = AutoConfig.for_model("paligemma", text_config={"model_type": "gemma2"})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"visual_tokens": -1}, ValueError, r"visual_tokens\[0\] must be at least 0, got -1"),
        ({"visual_tokens": 1.5}, TypeError, r"visual_tokens\[0\] must be an int, got float"),
        ({"visual_tokens": [1, 2], "batch": 3}, ValueError, "numbers of rows must agree, got visual_tokens 2, batch 3"),
        ({"visual_tokens": 0, "text_tokens": 0}, ValueError, "both 0"),
        ({"batch": 0}, ValueError, "batch must be at least 1"),
        ({"answer_tokens": -1}, ValueError, "answer_tokens must be at least 0"),
        ({"dtype": torch.int8}, TypeError, "floating-point dtype"),
        ({"dtype": "float16"}, TypeError, "floating-point dtype"),
        ({"config": "llava"}, TypeError, "config must be the config of a transformers model, got str"),
        ({"config": SOFTCAP}, ValueError, "a model of 'paligemma' cannot use RotateKCache: .* a softcap"),
        ({"sparsity": None}, ValueError, "exactly one of sparsity, rank and energy"),
        ({"tokens": "fastv:0.5,layer=40"}, ValueError, "FastV: layer must be below"),
        ({"tokens": "hybrid_kv:0.3"}, ValueError, "which heads store all tokens, and which a few, follows"),
    ],
)
def test_what_cannot_be(llava: Host, arguments, error, message):
    given = {"config": llava.plain.config, "visual_tokens": 10, "text_tokens": 3, "sparsity": 0.5} | arguments
    with pytest.raises(error, match=message):
        RotateKCache.estimate(**given)


def _call(*arguments):
    result = CliRunner().invoke(app, ["estimate", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_command_prints_what_the_method_says():
    config = AutoConfig.from_pretrained(READER)
    result = _call(READER, "--visual-tokens", 900, "--text-tokens", 30, "--batch", 2, "--dtype", "bfloat16")
    assert result.exit_code == 0
    for sparsity in (0.5, 0.75):
        estimate = RotateKCache.estimate(config, 900, 30, 2, dtype=torch.bfloat16, sparsity=sparsity)
        assert f"{estimate.nbytes:,}" in result.output and f"{estimate.compression_ratio:.2f}x" in result.output
    assert f"{estimate.dense_nbytes:,}" in result.output and "Values in bfloat16" in result.output


def test_the_command_reads_a_config_file_and_options(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads((READER / "config.json").read_text())))
    result = _call(
        file, "--visual-tokens", 900, "--cache", "energy=.9 basis=pca", "--cache", "budget=0.5x tokens=fastv"
    )
    assert result.exit_code == 0
    assert "energy=0.9 basis=pca" in result.output and " to " in result.output
    assert "follows from the prompt: energy" in result.output and "budget=0.5x tokens=fastv" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder/at/all"], "config of 'no/such/folder/at/all' cannot be read"),
        ([READER, "--cache", "sparsity=2"], r"sparsity=2: sparsity must be in [0, 1), got 2"),
        ([READER, "--cache", "sparsty=0.5"], "'sparsty' is no option of RotateKCache, which has sparsity, rank"),
        ([READER, "--cache", "0.5"], "must be options as in"),
        ([READER, "--dtype", "int8"], "--dtype must be a floating-point dtype"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message):
    result = _call(*arguments, "--visual-tokens", 10)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
