"""All tokens coded, ours against peers: answers of drawn pages, bytes of a layout, and which rows are compared."""

import json

import pytest
import torch

from evals import coded_peers, fidelity
from evals.peers.recording import prefill
from evals.reader.pages import ADDRESS_KINDS


def test_answers_and_bytes_are_kept_part_by_part(tmp_path, capsys):
    out = tmp_path / "found.json"
    only = ["--only", "QuaRot", "OScaR: 2 bit, groups", "--out", str(out)]
    coded_peers.main(["--parts", "answers", "--pages", "3", "--batch", "2", "--other", "count", *only])
    first = json.loads(out.read_text())["answers"]
    assert first["dense"]["ratio"] == 1 and first["dense"]["count"]["loss"] == 0
    assert first["Hadamard (QuaRot): 4 bit"]["same"]["questions"] == 3
    assert first["Hadamard (QuaRot): 2 bit"]["bits"] == pytest.approx(2.25)
    # Keys: a range of 128 tokens and a length a token; Values: a range a token.
    assert first["OScaR: 2 bit, groups of 128"]["bits"] == pytest.approx(2 + (32 + 16 + 32) / 2 / 128)
    coded_peers.main(["--parts", "bytes", "--tokens", "512", *only])
    stored = json.loads(out.read_text())
    assert stored["answers"] == first and set(stored["runs"]) == {"answers", "bytes"}
    tokens = (512 - 68) * 2.25 / 16 + 68
    assert stored["bytes"]["Hadamard (QuaRot): 2 bit"]["512"] == pytest.approx(512 / tokens, rel=1e-3)
    assert "512: " in capsys.readouterr().out


def test_a_peer_is_held_against_ours_with_no_more_bits():
    best = coded_peers.BEST
    bits = {"dense": 16, f"{best}2 bit": 2, f"{best}2.25 bit": 2.25, "ours: 4 bit": 4, "peer": 2.25, "small": 1.5}
    assert coded_peers.against("peer", bits) == f"{best}2.25 bit"
    assert coded_peers.against("small", bits) is coded_peers.against("ours: 4 bit", bits) is None


def test_another_kind_of_second_question_leaves_the_first_as_it_was():
    processor = fidelity.load(None).processor
    same, other = (
        fidelity.make_batch(processor, fidelity.CHOOSE_SEEDS[:3], "easy", ADDRESS_KINDS, second=second)
        for second in (None, ("count",))
    )
    assert torch.equal(same.prompt["input_ids"], other.prompt["input_ids"])
    for row in range(3):
        firsts = [batch.rest[row][batch.answer[row] == 1].tolist() for batch in (same, other)]
        assert firsts[0] == firsts[1]
        asked = processor.tokenizer.decode(other.rest[row][other.answer[row] == 0])
        assert "count" in asked


def test_bits_of_images_alone_count_the_basis():
    chat = fidelity.load(None)
    with torch.inference_mode():
        batch = fidelity.make_batch(chat.processor, fidelity.CHOOSE_SEEDS[:2], "easy", ADDRESS_KINDS)
        recorder, _ = prefill(chat.model, batch)
        cache = coded_peers.filled({"rank": 16, "basis": "pca"}, chat.model.config, batch, recorder)
        keys, values = coded_peers.stored_bits(cache, recorder)
    assert values == 16 and keys == pytest.approx(16 * (324 * 16 + 128 * 16 + 128) / (324 * 128))
