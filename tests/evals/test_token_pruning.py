"""The token bench: variants hold the same bytes, the dense row is dense, and a table and a figure come out."""

import json
import sys

import pytest

from evals import token_pruning


def test_variants_hold_the_bytes_of_their_budget(tmp_path, monkeypatch, capsys):
    out = tmp_path / "token_pruning.json"
    arguments = ["--pages", "2", "--batch", "2", "--timed", "1", "--only", "VisionZip", "AirCache", "K = 2"]
    monkeypatch.setattr(sys, "argv", ["token_pruning.py", *arguments, "--out", str(out)])
    token_pruning.main()
    result = json.loads(out.read_text())
    dense, *rows = result["rows"]
    assert dense["bytes_share"] == pytest.approx(1, rel=0.005)  # tokens' positions come on top
    assert dense["second"]["exact_match"] == 1
    budgeted = [row for row in rows if row["budget"] is not None]
    assert all(row["bytes_share"] == pytest.approx(row["budget"], rel=0.02) for row in budgeted)
    reached = {(row["tokens"], row["channels"]) for row in budgeted}
    assert {"VisionZip", "AirCache"} == {tokens for tokens, channels in reached if channels == "tokens only"}
    assert ("FastV, K = 2", "RotateK 1/4") in reached  # alone it keeps half of this model whole
    assert all(ratio > 0 for ratio in result["prefill_time_ratio"].values())
    joint = [row for row in budgeted if row["channels"] != "tokens only" and row["tokens"] != "FastV, K = 2"]
    assert joint and all("loss_to_tokens_only_95" in row["second"] for row in joint if row["budget"] > 0.1)
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "| AirCache | tokens only |" in capsys.readouterr().out
