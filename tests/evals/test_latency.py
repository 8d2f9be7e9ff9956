"""The latency script: what it counts, what it refuses, and the search for the largest batch."""

import importlib.util
import json
import sys

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evals.bench import latency
from evals.bench.latency import largest, measure
from evals.bench.workload import (
    NotHereError,
    PromptError,
    attention_steps,
    build,
    decode,
    draw_prompt,
    fill,
    fit_share,
    held_bytes,
    make_cache,
    prefill,
    read_prompt,
    switch_attention,
)
from rotatek_cache.hf.chat import READER

SHAPE = {
    "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 64, "vocab_size": 99,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return build(SHAPE, "cpu", torch.float32, 512)


VL_CACHE = latency.DEFAULT_METHODS.with_name("latency_vl_cache.yaml")


def small(path):
    """The methods of a file at a rank that a narrow model has."""
    methods = yaml.safe_load(path.read_text())
    return {name: options | ({"rank": 8} if "rank" in options else {}) for name, options in methods.items()}


def test_every_method_of_the_file_is_measured_or_says_why_not(model):
    methods = small(latency.DEFAULT_METHODS)
    with torch.inference_mode():
        rows = measure(model, methods, draw_prompt(model, 2, 200, 8), 2, 1)
    assert [row["method"] for row in rows] == list(methods)
    for row in rows:
        if "skipped" in row:
            assert any(word in row["method"] for word in ("FlashAttention", "Quantized", "compiled")), row
            continue
        # Durations of a busy machine are in no order; all that holds is that they are there, and a part is a part.
        assert all(row[name]["least"] > 0 for name in ("prefill_ms", "token_ms", "attention_ms", "end_to_end_ms"))
        assert (row["fit_share"] is None) == row["method"].startswith(("dense", "Quantized"))
        assert row["fit_share"] is None or 0 < row["fit_share"] < 1
    held = {row["method"]: row["cache_bytes"] for row in rows if "cache_bytes" in row}
    dense = 3 * 2 * 2 * 2 * (200 + 2) * 32 * 4  # layers, states, rows, heads, tokens, width, bytes
    assert held["dense, sdpa"] == dense
    assert all(row["cache_bytes"] < dense for row in rows if "tokens" in methods[row["method"]])
    assert held["RotateK r=32"] < 0.75 * dense and held["RotateK r=32, 4 bit"] < held["RotateK r=32"]


def test_the_setting_of_vl_cache_holds_a_tenth_of_the_bytes():
    model = build(SHAPE, "cpu", torch.float32, 2100)  # text and bases are a small part of a long prompt only
    with torch.inference_mode():
        rows = measure(model, yaml.safe_load(VL_CACHE.read_text()), draw_prompt(model, 1, 2000, 8), 2, 1)
    held = {row["method"]: row["cache_bytes"] for row in rows if "cache_bytes" in row}
    tenths = [bytes_held / held["dense, sdpa"] for name, bytes_held in held.items() if ".1 of the bytes" in name]
    assert len(tenths) == 4 and all(0.08 < share < 0.105 for share in tenths), held


@pytest.mark.parametrize("name", ["dense, sdpa", "dense, sdpa, preallocated", "RotateK r=32", "SparK r=32"])
def test_attention_alone_is_what_the_model_does_with_its_cache(model, name):
    """As many layers append and attend as the model has, and the attention functions are put back."""
    options = small(latency.DEFAULT_METHODS)[name]
    prompt = draw_prompt(model, 2, 120, 8)
    usual = dict(ALL_ATTENTION_FUNCTIONS)
    with torch.inference_mode():
        switch_attention(model, options)
        cache = make_cache(options, model.config, prompt.visual, 140)
        prefill(model, cache, prompt)
        assert len(attention_steps(model, cache, 2, 3)) == 3
        assert int(cache.get_seq_length()) == 120 + 1 + 3
        assert dict(ALL_ATTENTION_FUNCTIONS) == usual and "update" not in vars(cache)
        decode(model, cache, 2, 1)  # the model goes on with the same cache


@pytest.mark.parametrize("name", ["dense, sdpa", "RotateK r=32", "FastV .4, RotateK r=32", "VL-Cache .1, tokens only"])
def test_a_filled_cache_holds_the_bytes_of_a_prefilled_one(model, name):
    options = small(latency.DEFAULT_METHODS)[name]
    prompt = draw_prompt(model, 3, 160, 8)
    with torch.inference_mode():
        switch_attention(model, options)
        read, filled = (make_cache(options, model.config, prompt.visual, 170) for _ in range(2))
        prefill(model, read, prompt)
        fill(model, filled, 3, 160, 8)
        assert held_bytes(filled) == pytest.approx(held_bytes(read), rel=0.05)  # other tokens, as many of them
        decode(model, filled, 3, 2)
    assert int(filled.get_seq_length()) == 162


def test_images_go_through_the_models_own_tower():
    model = AutoModelForImageTextToText.from_pretrained(READER, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(READER)
    page = Image.open(next((READER / "pages").glob("*.png"))).convert("RGB")
    prompt = read_prompt(model, processor, [page], "row 3?", 2, 800)
    visual = prompt.inputs["input_ids"] == model.config.image_token_id
    assert visual.sum(1).tolist() == [2 * 324] * 2 and 648 < prompt.context <= 800
    methods = {"dense": {"dense": "dynamic"}, "ours": {"rank": 16}}
    with torch.inference_mode():
        dense, ours = measure(model, methods, prompt, 2, 1)
    assert ours["cache_bytes"] < 0.8 * dense["cache_bytes"]
    cache = make_cache({"rank": 16}, model.config, None, 900)
    with torch.inference_mode():
        assert fit_share(model, cache, prompt) > 0
    assert all(layer.kv.segments for layer in cache.layers)  # so that the share is that of a seal
    with pytest.raises(PromptError, match=r"--question '\?' gives no token of this model behind the image"):
        read_prompt(model, processor, [page], "?", 1, 800)
    with pytest.raises(PromptError, match=r"an image and a question take 3\d\d tokens, --contexts asks for 200"):
        read_prompt(model, processor, [page], "row 3?", 1, 200)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="FlashAttention is installed")
def test_what_a_machine_lacks_is_said(model):
    with pytest.raises(NotHereError, match="FlashAttention 2 needs a CUDA device and the package flash_attn"):
        switch_attention(model, {"dense": "dynamic", "attention": "flash_attention_2"})


def test_dense_and_compressed_caches_answer_alike_at_full_rank(model):
    prompt = draw_prompt(model, 2, 120, 9)
    logits = {}
    with torch.inference_mode():
        for name, options in {"dense": {"dense": "dynamic"}, "ours": {"rank": 32, "always_compress": True}}.items():
            switch_attention(model, options)
            cache = make_cache(options, model.config, prompt.visual, 130)
            prefill(model, cache, prompt)
            logits[name] = model(input_ids=torch.ones(2, 1, dtype=torch.long), past_key_values=cache).logits
    torch.testing.assert_close(logits["ours"], logits["dense"], atol=1e-3, rtol=1e-3)
    visual = prompt.visual
    assert visual.sum(1).tolist() == [111, 111] and not visual[:, :4].any() and not visual[:, -5:].any()


def test_embeddings_have_the_spectrum_that_is_promised(model):
    embeddings = draw_prompt(model, 1, 4000, 8).inputs["inputs_embeds"][0]
    values = torch.linalg.eigvalsh(torch.cov(embeddings.T)).flip(-1)
    assert 2 < values[0] / values[7] < 40 and values[0] / values[-1] > 8  # falls, as 1 / rank does


def test_bytes_are_those_of_distinct_storage():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 10, 4), torch.zeros(1, 2, 10, 4), 0)
    assert held_bytes(cache) == 2 * 2 * 10 * 4 * 4


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 100])
def test_the_largest_that_fits_is_found(most):
    asked = []
    assert largest(lambda n: asked.append(n) or n <= most, limit=64) == min(most, 64)
    assert len(asked) <= 14


QUICK = [
    "latency", "--shape", "four-layers", "--contexts", "128", "--tokens", "2", "--rounds", "1", "--text", "8",
    "--device", "cpu",
]  # fmt: skip


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    out = tmp_path / "l.json"
    command = [*QUICK, "--only", "RotateK r=32", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    latency.main()
    stored = json.loads(out.read_text())
    assert {"command", "environment", "rows", "setting"} <= set(stored)
    assert "RotateK r=32, 4 bit" in capsys.readouterr().out and len(stored["rows"]) == 4
    with pytest.raises(SystemExit):
        latency.main()
    assert f"--out '{out}' is there already and is not overwritten" in capsys.readouterr().err


def test_what_is_measured_stays_when_a_later_setting_fails(tmp_path, monkeypatch):
    out = tmp_path / "l.json"
    real = latency.measure

    def fails_second(model, methods, prompt, *rest):
        if prompt.context == 129:
            raise RuntimeError("the device is gone")
        return real(model, methods, prompt, *rest)

    monkeypatch.setattr(latency, "measure", fails_second)
    command = [*QUICK, "--contexts", "128", "129", "--only", "preallocated", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(RuntimeError, match="the device is gone"):
        latency.main()
    assert {row["context"] for row in json.loads(out.read_text())["rows"]} == {128}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--largest", "1024"], "--largest looks for the end of a GPU's memory; --device is 'cpu'"),
        (["--images", "page.png"], "--images needs a model with a trained tower"),
        (["--tokens", "0"], "argument --tokens: expected a whole number from 1 on, got '0'"),
        (["--rounds", "0"], "argument --rounds: expected a whole number from 1 on, got '0'"),
        (["--text", "-4"], "--text"),
        (["--batches", "0"], "argument --batches: expected a whole number from 1 on"),
        (["--batches", "2", "--batch-context", "8"], "must be longer than --text (8), got [8]"),
        (["--only", "nothing"], "--only nothing is in no name of dense, sdpa"),
        (["--device", "foo"], "device 'foo' cannot be used"),
        (["--dtype", "float3"], "--dtype must be 'auto' or the name of a torch dtype, got 'float3'"),
        (["--methods", "nowhere.yaml"], "--methods 'nowhere.yaml' cannot be read"),
    ],
)
def test_wrong_flags_are_named(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*QUICK, *flags])
    with pytest.raises(SystemExit):
        latency.main()
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must map names of methods"),
        ("a: 3", "method 'a' must be a mapping of options, got 3"),
        ("a: {dense: paged}", "method 'a': dense must be one of dynamic, static, got 'paged'"),
        ("a: {rank: 0}", "method 'a': rank must be"),
        ("a: {rnk: 8}", "method 'a': .*'rnk'"),
    ],
)
def test_wrong_methods_are_named(text, message, tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(latency.MethodsError, match=message):
        latency.read_methods(path, None)


def test_a_model_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["latency", "--model", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit, match=r"error: --model '.*' cannot be used"):
        latency.main()
