"""Perplexity and KL of coded text: whole coefficients change nothing, fewer bits more, on a tiny random model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rotatek_cache
from evals import coded_peers, decoded_text, text_fidelity
from evals.store import Results

READER = Path(rotatek_cache.__file__).parent / "reader"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose attention is peaked, so that codes are seen, with the tokenizer of the reader."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(READER / "tokenizer.json"))
    tokenizer.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, bos_token_id=None, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    generator = torch.Generator().manual_seed(0)
    vocabulary = [word for word in tokenizer.get_vocab() if word.isalpha()]
    for name in ("book", "other"):
        drawn = torch.randint(len(vocabulary), (4000,), generator=generator).tolist()
        (path / f"{name}.txt").write_text(" ".join(vocabulary[word] for word in drawn))
    return path


def test_fewer_bits_predict_less_like_the_dense_cache(folder, tmp_path, capsys):
    out = tmp_path / "found.json"
    arguments = ["--model", folder, "--book", folder / "book.txt", "--other", folder / "other.txt", "--length", 160]
    arguments += ["--passages", 2, "--calibrate", 3, "--step", 16, "--bits", 16, 4, "2,1", "--out", out]
    text_fidelity.main([str(argument) for argument in arguments])
    found = json.loads(out.read_text())["settings"]
    assert list(found)[:2] == ["dense", "same book, 16.0 bit"] and "other text, 4.0 bit" in capsys.readouterr().out
    exact, four, few = (found[f"same book, {bits} bit"] for bits in ("16.0", "4.0", "(2.0, 1.0)"))
    assert exact["kl"] < 1e-6 < four["kl"] < few["kl"]
    assert exact["perplexity"] == pytest.approx(found["dense"]["perplexity"], rel=1e-4)
    assert exact["same_prediction"] == 1 and few["same_prediction"] < 1
    assert exact["ratio"] < four["ratio"] < few["ratio"]


def test_what_is_missing_is_named(folder, capsys):
    with pytest.raises(SystemExit):
        text_fidelity.main(["--model", str(folder), "--book", "nowhere.txt"])
    assert "nowhere.txt" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"weights of the package nothing_here is not here: see"):
        text_fidelity.in_package("nothing_here", "weights")
    with pytest.raises(ValueError, match="2 passages of 9 tokens need a text of as many tokens, got 17"):
        text_fidelity.passages(torch.arange(17), 9, 2)


def test_peers_read_the_same_passages_at_counted_bits(folder, tmp_path, capsys):
    out = tmp_path / "found.json"
    arguments = ["--parts", "text", "--text-model", folder, "--book", folder / "book.txt", "--out", out]
    arguments += ["--other-text", folder / "other.txt", "--passages", 2, "--prompt", 120, "--read", 20, "--step", 10]
    arguments += ["--calibrate", 3, "--only", "over heads: 4", "over heads: 2 bit", "QuaRot", "OSCAR", "fp8"]
    coded_peers.main([str(argument) for argument in arguments])
    found = json.loads(out.read_text())["text"]
    assert "Hadamard (QuaRot): 2 bit" in capsys.readouterr().out
    assert found["dense"]["kl"] == 0 and found["dense"]["ratio"] == 1
    four, two = (found[f"Hadamard (QuaRot): {bits} bit"] for bits in (4, 2))
    assert 0 < four["kl"] < two["kl"]
    # 16 channels and two numbers of half precision beside them.
    assert (four["bits"], two["bits"]) == (6, 4) and found["OSCAR: 2 bit, same book"]["bits"] == 4
    best = coded_peers.BEST
    assert 3 < found[f"{best}4 bit, other text"]["bits"] <= 4
    # Each is held against ours with no more bits, on the same passages and of the same calibration.
    for name, ours in (("Hadamard (QuaRot): 4 bit", "other text"), ("OSCAR: 2 bit, same book", "same book")):
        held = found[name]["ours"]
        assert held["row"] == f"{best}4 bit, {ours}"
        assert held["less_kl"] == pytest.approx(found[name]["kl"] - found[held["row"]]["kl"], rel=1e-3)
    assert found["transformers' QuantizedCache: fp8"]["bits"] == pytest.approx(8, rel=1e-2)


def test_more_tokens_held_are_nearer_to_dense(folder, tmp_path, capsys):
    out = tmp_path / "found.json"
    arguments = ["--model", folder, "--book", folder / "book.txt", "--caps", 16, 32, "--prompt", 8, "--answer", 48]
    decoded_text.main([str(argument) for argument in [*arguments, "--passages", 2, "--batch", 2, "--out", out]])
    stored = json.loads(out.read_text())
    rows = stored["settings"]
    assert len(rows) == 8 and "16 tokens, R-KV" in capsys.readouterr().out
    assert all(rows["32 tokens, R-KV"]["kl"] < rows[f"16 tokens, {name}"]["kl"] for name in decoded_text.methods(16))
    assert all(row["loss_to_last"] == 0 for name, row in rows.items() if name.endswith("the last tokens"))
    results = Results()
    assert results.kind_of(stored) is results.decoded


def test_answers_shorter_than_the_cap_are_refused(folder, capsys):
    with pytest.raises(SystemExit):
        decoded_text.main(["--model", str(folder), "--caps", "64", "--answer", "60"])
    assert "expected more tokens than the largest of --caps [64], got 60" in capsys.readouterr().err
