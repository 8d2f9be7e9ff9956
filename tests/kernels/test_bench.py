"""The kernel's benchmark as far as it goes without a GPU: bytes, bounds, its check of what it times, its figure."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "evals.bench.kernel", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def test_rehearsal_takes_the_way_of_a_measurement_up_to_the_clock():
    run = bench("--device", "rehearsal", "--kinds", "r = 32", "4 bit", "per head")
    assert run.returncode == 0, run.stderr[-4000:]
    lines = run.stdout.splitlines()
    assert lines[0].startswith("fit and encode, rank 32, 160 tokens: nan us")
    assert [line.split(",")[0] for line in lines[1:3]] == ["   3 queries", "   3 queries"]
    assert [line.split("  ")[0] for line in lines[-3:]] == ["r = 32", "4 bit", "per head"]


def test_unknown_kinds_are_named():
    run = bench("--device", "rehearsal", "--kinds", "r = 33")
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith("--kinds must be of r = 16, ") and "got r = 33" in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_device_nothing_is_timed():
    run = bench("--device", "cuda")
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith("--device cuda needs a CUDA device")


def test_cpu_bench_agrees_before_it_times(tmp_path):
    out = tmp_path / "bench.json"
    run = bench(
        "--device", "cpu", "--visual", "160", "--rounds", "1", "--q-heads", "4", "--kv-heads", "2", "--out", str(out)
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "over the best dense" in run.stdout
    assert out.exists()


def test_bytes_that_must_move_are_counted_by_hand():
    from evals.bench.kernel_cuda import Setting, dense_bytes, draw, must_move

    setting = Setting(2, 40, q_heads=4, kv_heads=2, width=128, text=5, dtype=torch.bfloat16, device="cpu")
    states = 2 * (2 * 4 * 128)  # query and output
    text = 2 * 2 * 5 * 2 * 128 * 2  # rows, heads, tokens, Keys and Values, channels, bytes
    basis = 2 * 2 * (128 * 32 + 128) * 2
    assert must_move(*draw(setting, "r = 32")) == 2 * states + text + basis + 2 * 2 * 40 * (32 + 128) * 2
    assert must_move(*draw(setting, "4 bit")) == 2 * states + text + 2 * basis + 2 * 2 * 40 * 32
    assert must_move(*draw(setting, "per head")) == 2 * states + text + 2 * basis + 2 * 40 * 2 * (16 + 12)
    assert dense_bytes(setting) == 2 * 45 * 2 * 2 * 128 * 2


def test_a_wrong_answer_reports_no_speed(monkeypatch):
    from evals.bench import kernel_cuda as bench_cuda

    setting = bench_cuda.Setting(1, 8, dtype=torch.float32, device="cpu", q_heads=4, kv_heads=2)
    monkeypatch.setattr(bench_cuda, "dense_times", lambda *_: ({"dense": {"graph ms": 1.0}}, {}))
    monkeypatch.setattr(bench_cuda, "ours_error", lambda *_: 0.5)
    with pytest.raises(SystemExit, match=r"no speed is reported: relative error 0\.5 of r = 32"):
        bench_cuda.measure(setting, ("r = 32",), 1e12, bench_cuda.NoClock())


def test_rows_that_there_is_no_time_for_are_named(monkeypatch):
    from evals.bench import kernel_cuda as bench_cuda

    monkeypatch.setattr(bench_cuda, "measure", lambda setting, *_: {})
    monkeypatch.setattr(bench_cuda, "line", lambda row: "")
    wanted = bench_cuda.settings([8, 1], [2048, 1024])
    result = bench_cuda.run(wanted, clock=bench_cuda.NoClock(), minutes=-1)
    assert result["rows"] == []
    assert result["not reached"] == [f"batch {b}, {n} tokens" for b in (1, 8) for n in (1024, 2048)]


def test_rows_and_figure(tmp_path):
    from evals.bench.kernel_cuda import KINDS, draw_figure, line

    def row(batch, tokens):
        one = {"graph ms": 0.1, "share of copy": 0.875, "over best dense": 1.5}
        dense = {"sdpa, flash": {"graph ms": 0.15}}
        return {
            "batch": batch,
            "tokens": tokens,
            "best dense": "sdpa, flash",
            "dense": dense,
            "ours": dict.fromkeys(KINDS, one),
        }

    full = "a dense cache takes 256 GiB, 130 are free"
    skipped = {"batch": 64, "tokens": 131072, "no dense": full, "best dense": None, "dense": {}, "ours": {}}
    assert "r = 32: 100.0 us, 88% of copy, 1.50x" in line(row(1, 1024))
    assert line(skipped).endswith(full)
    path = tmp_path / "bench.png"
    draw_figure({"rows": [row(1, 1024), row(1, 4096), row(8, 1024), skipped]}, path)
    assert path.stat().st_size > 1000


def test_roofline_by_hand():
    from evals.bench.roofline import H200, Bound, fit_table

    assert H200.issue_rate == pytest.approx(132 * 4 * 1.98e9)
    # 16,384 tokens of 8 heads of 128 in bf16 are 32 MiB, gathered with the Values: 4 times that.
    assert "visual tokens gathered (K and V)     128.0 MiB     28.0 us" in fit_table(H200)
    assert Bound(32, 14.0, 6.7e-12, 13.4e-12).seconds == 13.4e-12


def test_the_ways_through_a_loop_are_counted_by_hand():
    from rotatek_kernels.resources import _ways

    #        0      1 (to 4)   2       3 (to 6)  4       5       6 (to 0)
    code = ["MOV", "@P0 BRA", "HMMA", "BRA", "HMMA", "HMMA", "@P1 BRA"]
    assert _ways(code, {1: 4, 3: 6, 6: 0}, 0, 7) == {1: 5, 2: 5}
    code[1] = "@P0 NOP"
    assert _ways(code, {3: 6, 6: 0}, 0, 7) == {1: 5}


def test_products_of_heads_by_hand():
    from evals.bench.roofline import KINDS, head_products
    from rotatek_kernels.resources import plan_of_shape, segment_of_shape

    segment = segment_of_shape(1, 8, 64, 128, torch.bfloat16, **KINDS["K and V per head, 16 bytes"])
    form = plan_of_shape([segment], 4, 128)[0].arguments["FORMS"][0]
    blocks = form.block_n // 8
    # Keys and Values of 4 bits; of 4 and 2; of 2; 8 and 4 bits in the first 16 bytes, 4 and 2 in the others.
    assert head_products(form, segment) == [4 * blocks, 8 * blocks, 8 * blocks, 12 * blocks] * 2


def test_candidates_are_judged_by_hand():
    from evals.bench.block_sizes import Candidate, judged
    from evals.bench.roofline import H200
    from rotatek_kernels.resources import Resources
    from rotatek_kernels.shapes import BLOCK_SIZES

    found = Resources(160, 0, 70000, {16: 8}, [320, 40], 2000, asynchronous=True, token_loop=320)
    sizes = BLOCK_SIZES["plain"]._replace(warps=4, stages=3)
    one = judged(found, Candidate(sizes), 64, 320, H200)
    assert one["instructions a token"] == 20
    assert one["programs a multiprocessor"] == 3  # of 228 KiB; registers would hold 3 too
    assert one["KiB in flight"] == 3 * 2 * 64 * 320 / 1024
    assert one["ps a token"] == pytest.approx(320 / 4.8)
    few = judged(
        found, Candidate(sizes._replace(stages=2)), 16, 32, H200
    )  # 1,536 bytes on their way, 29 KB would fill the memory
    assert few["ps a token"] == pytest.approx(4.8e12 / 132 * 8e-7 / 1536 * 32 / 4.8, rel=1e-3)
    assert judged(Resources(255, 3, 0, {}, [9], 9), Candidate(sizes), 64, 320, H200)["ps a token"] == float("inf")
