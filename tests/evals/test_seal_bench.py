"""The bench of seals as far as no clock is needed: its rows, its counts, its two processes, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evals.bench.seal import MOST, cases, grid, items, parse, seal_line
from evals.bench.seal_worker import PARTS, REST, Case, Heads, Operations

ROOT = Path(__file__).parents[2]
SMALL = Heads(4, 2, 32, "cpu", "float32")


def test_rows_cover_ranks_bases_codes_tokens_and_batches():
    on_gpu = cases(quick=False, device="cuda")
    assert {case.rank for case in on_gpu} == {16, 32, 64}
    assert {(case.tokens, case.batch) for case in on_gpu} == {
        (1024 * 4**n, batch) for n in range(4) for batch in (1, 8)
    }
    assert len(on_gpu) == len(set(on_gpu)) == 3 * 2 * 2 * 8
    assert all(case.tokens * case.batch <= MOST for case in cases(quick=False, device="cpu"))
    assert len(cases(quick=True, device="cpu")) < len(cases(quick=False, device="cpu")) / 3


def test_an_item_has_times_counts_and_parts(capsys):
    rows = [row() for _, row in items(SMALL, grid([8], [(96, 2)]), rounds=1)]
    assert [row["basis"] for row in rows] == ["online", "online", "calibrated", "calibrated"]
    for row in rows:
        here = row["here"]
        assert here["operations"] > 0 and here["wall ms"]["least"] > 0 and here["first layer ms"]["median"] > 0
        assert here["profiled ms"].keys() <= {*PARTS, REST} and sum(here["profiled ms"].values()) > 0
    assert capsys.readouterr().out.splitlines()[-1] == seal_line(rows[-1])
    online, coded, calibrated, _ = (row["here"]["operations"] for row in rows)
    assert calibrated < online < coded  # nothing is fitted; Values are stored, too


def test_views_are_no_operations():
    with Operations() as counted:
        torch.ones(4, 4).mT[1:].unsqueeze(0).add(1)
    assert counted.found == {"ones.default": 1, "add.Tensor": 1}


@pytest.mark.slow
def test_two_checkouts_are_measured_in_turn(tmp_path):
    out = tmp_path / "seal.json"
    command = [sys.executable, "-m", "evals.bench.seal", "--quick", "--rounds", "1", "--beside", str(ROOT)]
    command += ["--device", "cpu", "--only", "1 x 1,024, r = 32, calibrated, K and V", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(out.read_text())
    (row,) = found["seals"]
    assert row["beside"]["operations"] == row["here"]["operations"]
    assert row["beside / here"]["median"] > 0 and "x" in run.stdout
    assert found["command"].startswith("python -m evals.bench.seal --quick") and found["versions"]["torch"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--beside", "/tmp"], "--beside must be a checkout of this repository, got '/tmp'"),
        (["--out", __file__], "is there already and is not overwritten"),
    ],
    ids=str,
)
def test_flags_that_cannot_be_used_are_named(flags, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["seal", *flags])
    with pytest.raises(SystemExit):
        parse()
    assert said in capsys.readouterr().err


def test_the_options_of_a_case_are_those_of_a_cache(tmp_path):
    options = Case(32, "calibrated", True, 1024, 1).options(128, tmp_path / "basis.safetensors")
    assert (options.rank, options.key_bits, options.value_bits, options.value_sparsity) == (32, 4, 4, 0.75)
    assert options.is_calibrated and not Case(32, "online", False, 1024, 1).options(128, tmp_path).codes_values
