"""The command for a GPU, as far as it goes without one: all its lines, its budgets, what it makes of tests and names.

Imports stand in the tests, since what they import loads Triton, which other tests want in its interpreter.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# Not on a machine that was set up for the GPU alone.
BLOCKED = ("rapidfuzz", "pycocoevalcap", "datasets", "psutil", "accelerate", "typer", "rich", "jinja2", "hypothesis")
REHEARSE = """
import runpy, sys
for name in {blocked}:
    sys.modules[name] = None
sys.argv = ["gpu", "--rehearse", "--out", {out!r}]
if __name__ == "__main__":
    runpy.run_module("evals.bench.gpu", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_every_part_runs_without_a_gpu_and_with_few_packages(tmp_path):
    out = tmp_path / "run"
    run = subprocess.run(
        [sys.executable, "-c", REHEARSE.format(blocked=BLOCKED, out=str(out))],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "integrations")]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    found = json.loads((out / "gpu.json").read_text())
    assert list(found["parts"]) == [
        "compile",
        "tests",
        "decode",
        "splits",
        "variants",
        "call",
        "host",
        "seal",
        "seals",
        "token",
    ]
    assert all(part["rows"] and not part["not reached"] for part in found["parts"].values())
    assert {"torch", "triton", "transformers"} <= found["versions"].keys() and found["hardware"]["cpu"]
    assert found["parts"]["decode"]["rows"][1]["ours"]["4 bit"]["relative error"] < 1e-2
    tokens = {row["method"]: row for row in found["parts"]["token"]["rows"]}
    assert tokens["r = 32, from a graph"]["decoding"] == "from a captured graph"
    assert tokens["r = 32, step by step"]["decoding"].startswith("step by step")
    assert tokens["StaticCache, sdpa"]["bound by bytes"] <= 1
    table = run.stdout.rpartition("=" * 100)[2]
    assert "nothing went wrong" in table and "K and V r = 32, 4 bit, from a graph" in table
    assert (out / "gpu.log").read_text() == run.stdout


def test_a_part_whose_budget_is_spent_says_what_it_did_not_reach(tmp_path):
    from evals.bench.gpu import Run
    from evals.bench.gpu_extent import REHEARSAL
    from evals.bench.gpu_report import table, wrongs

    run = Run(tmp_path, REHEARSAL, ["host"], {"host": -1.0})
    run.do("host")
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"]["host"]["not reached"] == ["tokens"]
    assert "NOT REACHED: tokens" in table(run.found)
    assert not wrongs(run.found)


def test_what_an_item_raises_is_its_result():
    from evals.bench.gpu import attempt

    def bad():
        raise SystemExit("no speed is reported: relative error 0.3")

    assert attempt(bad) == {"wrong": "SystemExit: no speed is reported: relative error 0.3"}
    assert attempt(dict) == {}


def test_what_is_no_number_is_null():
    from evals.bench.gpu import plain

    assert plain({1: [math.nan, (math.inf, 2.0)], "a": "b"}) == {"1": [None, [None, 2.0]], "a": "b"}


def test_a_test_that_hangs_is_named_and_the_others_go_on(tmp_path):
    from evals.bench.gpu_tests import run_tests

    file = tmp_path / "test_some.py"
    file.write_text(
        "import time\n"
        "def test_good():\n    pass\n"
        "def test_hangs():\n    time.sleep(100)\n"
        "def test_bad():\n    assert False, 'so'\n"
        "def test_last():\n    pass\n"
    )
    found = run_tests([file], tmp_path, budget=60, limit=2, processes=1, marked=None)
    assert found["passed"] == 2 and found["exit status"] == 1
    assert {name.rpartition("::")[2] for name in found["failed"]} == {"test_hangs", "test_bad"}


def test_tests_that_take_too_long_are_stopped_and_named(tmp_path):
    from evals.bench.gpu_tests import run_tests

    file = tmp_path / "test_some.py"
    file.write_text("import time\ndef test_good():\n    pass\ndef test_slow():\n    time.sleep(100)\n")
    found = run_tests([file], tmp_path, budget=15, limit=90, processes=1, marked=None)
    assert [name.rpartition("::")[2] for name in found["stopped while running"]] == ["test_slow"]
    assert (found["begun"], found["ended"]) == (2, 1)


def test_tests_that_need_a_gpu_are_found():
    from evals.bench.gpu_tests import files_with_gpu_tests

    names = {path.name for path in files_with_gpu_tests()}
    assert {"test_gpu.py", "test_decode.py", "test_seal_sync.py"} <= names
    assert "test_lmms_eval.py" not in names


def test_kernels_are_told_apart_by_their_names():
    from evals.bench.gpu_model import KERNELS, SEAL_KERNELS, by_kind

    kernels = {
        "attend_splits": (2000.0, 32.0),
        "merge_splits": (500.0, 32.0),
        "void pytorch_flash::flash_fwd_splitkv_kernel<cutlass::bfloat16_t>": (1000.0, 1.0),
        "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": (4000.0, 224.0),
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>": (250.0, 1.0),
        "triton_red_fused_rsqrt": (125.0, 3.0),
    }
    assert by_kind(kernels, KERNELS, "small") == {"attention": 3.5, "GEMMs": 4.25, "small": 0.125}
    seal = {"void geqr2_batch<float>": (9.0, 1.0), "trsm_left_kernel": (3.0, 1.0), "elementwise_kernel": (1.0, 2.0)}
    found = by_kind(seal, SEAL_KERNELS, "other")
    assert found["QR"] == 0.009 and found["Cholesky and triangular solves"] == 0.003 and found["other"] == 0.001


def test_the_gain_stands_beside_what_bytes_allow():
    from evals.bench.gpu_model import compare_tokens

    def row(method, ms, cache):
        held = {"weights bytes": 100, "cache bytes": cache, "token ms": {"median": ms}}
        return {"batch": 1, "context": 2, "method": method} | held

    rows = [row("DynamicCache, sdpa", 9.0, 50), row("StaticCache, sdpa", 6.0, 60), row("r = 32, from a graph", 4.0, 20)]
    other = {"batch": 1, "context": 3, "method": "r = 32, from a graph", "skipped": "out of memory"}
    compare_tokens([*rows, other])
    assert rows[2]["best dense"] == "StaticCache, sdpa" and rows[2]["over best dense"] == 1.5
    assert rows[2]["bound by bytes"] == 150 / 120
    assert "bound by bytes" not in other


def test_a_sweep_forces_splits_and_leaves_the_choice_as_it_was():
    from evals.bench.gpu_kernel import forced_splits, split_numbers
    from rotatek_kernels import decode

    chosen = decode.split_counts
    with forced_splits(7, longer_than=64):
        assert decode.split_counts([(16384, 320), (64, 512)], 396, 8) == [7, 1]
    assert decode.split_counts is chosen
    tried = split_numbers(132, 64, 16384)
    assert tried == sorted(set(tried)) and {1, 6, 49} <= set(tried)
    assert split_numbers(132, 8, 128) == [2]


def test_a_graph_of_nothing_lets_the_host_go_through_its_step():
    from evals.bench.gpu_model import HOST_METHODS, HOST_SHAPE, Model, generated

    host = Model(HOST_SHAPE | {"num_hidden_layers": 2}, "cpu", torch.float32, 256, no_graph=True)
    figures, tokens = generated(host, HOST_METHODS["r = 16, replayed"], 2, 96, 8, 3)
    assert figures["decoding"] == "from a captured graph"
    assert tokens.shape == (2, 3 + 4 + 5)
    assert figures["cache bytes"] > 0 and figures["token ms"]["least"] > 0
