"""The latency script: what it counts, what it refuses, and the search for the largest batch."""

import argparse
import importlib.util
import json
import sys

import pytest
import torch
import yaml
from transformers import DynamicCache

from evals import latency
from evals.latency import NotHereError, build, draw_prompt, held_bytes, largest, make_cache, measure, switch_attention

SHAPE = {
    "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 64, "vocab_size": 99,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return build(SHAPE, "cpu", torch.float32, 512)


def arguments(**changes):
    return argparse.Namespace(**{"text": 8, "tokens": 2, "rounds": 1, "seed": 0} | changes)


def test_every_method_of_the_file_is_measured_or_says_why_not(model):
    methods = yaml.safe_load(latency.METHODS.read_text())
    methods = {name: options | ({"rank": 8} if "rank" in options else {}) for name, options in methods.items()}
    with torch.inference_mode():
        rows = measure(model, methods, 200, 2, arguments())
    assert [row["method"] for row in rows] == list(methods)
    for row in rows:
        if "skipped" in row:
            assert "FlashAttention" in row["method"] or "Quantized" in row["method"], row
            continue
        # Durations of a busy machine are in no order; all that holds is that they are there, and a part is a part.
        assert all(row[name]["least"] > 0 for name in ("prefill_ms", "token_ms", "end_to_end_ms"))
        assert (row["fit_share"] is None) == row["method"].startswith(("dense", "Quantized"))
        assert row["fit_share"] is None or 0 < row["fit_share"] < 1
    held = {row["method"]: row["cache_bytes"] for row in rows if "cache_bytes" in row}
    dense = 3 * 2 * 2 * 2 * (200 + 2) * 32 * 4  # layers, states, rows, heads, tokens, width, bytes
    assert held["dense, sdpa"] == dense
    assert held["RotateK r=32"] < 0.75 * dense and held["RotateK r=32, 4 bit"] < held["RotateK r=32"]


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="FlashAttention is installed")
def test_what_a_machine_lacks_is_said(model):
    with pytest.raises(NotHereError, match="FlashAttention 2 needs a CUDA device and the package flash_attn"):
        switch_attention(model, {"dense": "dynamic", "attention": "flash_attention_2"})


def test_dense_and_compressed_caches_answer_alike_at_full_rank(model):
    embeddings, visual = draw_prompt(model, 2, 120, 9)
    logits = {}
    with torch.inference_mode():
        for name, options in {"dense": {"dense": "dynamic"}, "ours": {"rank": 32, "always_compress": True}}.items():
            switch_attention(model, options)
            cache = make_cache(options, model.config, visual, 130)
            model(inputs_embeds=embeddings, past_key_values=cache)
            logits[name] = model(input_ids=torch.ones(2, 1, dtype=torch.long), past_key_values=cache).logits
    torch.testing.assert_close(logits["ours"], logits["dense"], atol=1e-3, rtol=1e-3)
    assert visual.sum(1).tolist() == [111, 111] and not visual[:, :4].any() and not visual[:, -5:].any()


def test_embeddings_have_the_spectrum_that_is_promised(model):
    embeddings, _ = draw_prompt(model, 1, 4000, 8)
    values = torch.linalg.eigvalsh(torch.cov(embeddings[0].T)).flip(-1)
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


def test_the_command_writes_what_it_measured_and_refuses_what_it_cannot(tmp_path, monkeypatch, capsys):
    out = tmp_path / "l.json"
    small = ["latency", "--shape", "four-layers", "--contexts", "128", "--tokens", "2", "--rounds", "1", "--text", "8"]
    monkeypatch.setattr(sys, "argv", [*small, "--device", "cpu", "--only", "RotateK r=32", "--out", str(out)])
    latency.main()
    stored = json.loads(out.read_text())
    assert {"command", "environment", "rows", "setting"} <= set(stored)
    assert "RotateK r=32, 4 bit" in capsys.readouterr().out and len(stored["rows"]) == 4
    monkeypatch.setattr(sys, "argv", [*small, "--largest", "1024", "--device", "cpu"])
    with pytest.raises(SystemExit):
        latency.main()
    assert "--largest looks for the end of a GPU's memory; --device is 'cpu'" in capsys.readouterr().err
