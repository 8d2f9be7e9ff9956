"""Outlier channels that change no logit: exact for the dense cache, seen in Keys, hard on a range a token."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from evals import outliers

TINY = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_logits_stay_and_keys_stand_out():
    torch.manual_seed(0)
    config = LlamaConfig(**TINY, num_key_value_heads=2, head_dim=8, attention_bias=True, initializer_range=0.3)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(20, (1, 12))
    before = model(ids, use_cache=True)
    assert outliers.add_outliers(model, 16.0, 1) == 2
    after = model(ids, use_cache=True)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-4, rtol=1e-4)
    for old, new in zip(before.past_key_values.layers, after.past_key_values.layers, strict=True):
        grown = new.keys.norm(dim=2) / old.keys.norm(dim=2)
        # Of eight channels of each head two, a pair that RoPE turns together, are 16 times as large.
        assert ((grown - 16).abs() < 0.01).sum(-1).tolist() == [[2, 2]]
        assert ((grown - 1).abs() < 0.01).sum(-1).tolist() == [[6, 6]]
        pair = (grown[0, 0] > 2).nonzero()[:, 0]
        assert int(pair[1] - pair[0]) == 4


def test_the_largest_channel_over_the_median_by_hand():
    keys = torch.ones(1, 1, 3, 5)
    keys[..., 4] = -7
    assert outliers.spread(keys).tolist() == [7]


def test_models_that_would_change_are_refused():
    with pytest.raises(ValueError, match="normalises Keys after their projection"):
        outliers.add_outliers(Qwen3ForCausalLM(Qwen3Config(**TINY, head_dim=8)), 8.0, 1)
    with pytest.raises(ValueError, match="no attention with q_proj and k_proj"):
        outliers.add_outliers(torch.nn.Linear(2, 2), 8.0, 1)


def test_rotation_helps_where_keys_have_outliers(tmp_path, capsys):
    """Two pages: with outliers a range a token loses more without rotation; the dense cache answers as before."""
    out = tmp_path / "found.json"
    arguments = ["--pages", "2", "--batch", "2", "--factors", "1", "64", "--out", str(out)]
    outliers.main([*arguments, "--only", "2 bit, a range a token: unrotated", "2 bit, a range a token: Hadamard"])
    found = json.loads(out.read_text())["factors"]
    assert found["1"]["dense_exact_match"] == found["64"]["dense_exact_match"]
    assert found["64"]["largest_channel_over_median"] > 10 * found["1"]["largest_channel_over_median"]
    plain, rotated = (found["64"]["rows"][f"2 bit, a range a token: {name}"] for name in ("unrotated", "Hadamard"))
    assert plain["key_bits"] == rotated["key_bits"] == 2.25
    assert rotated["first"]["less_kl"] > 0.5
    assert "outliers of 64" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        outliers.main(["--only", "Hadamard"])
    assert "needs a row 'unrotated'" in capsys.readouterr().err
