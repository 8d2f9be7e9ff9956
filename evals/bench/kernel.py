"""Time of decode attention: RotateK against the best dense decodes at hand.

    python -m evals.bench.kernel --device cpu         # one decoded token of one layer, update plus attention
    python -m evals.bench.kernel --device cuda        # the fused kernel, all sizes; JSON and a figure beside it
    python -m evals.bench.kernel --device rehearsal   # the same in Triton's interpreter, small and without a clock
    python -m evals.bench.kernel --device host        # what a call takes of the host, in parts; needs no GPU
    python -m evals.bench.kernel --roofline           # what bytes and instructions allow on an H200; needs no GPU

On the CPU every method is run in turn, round after round, so that all of them meet the same machine and cold caches;
ratios are of medians in that one run, over the best of the dense ways that torch and transformers have. On CUDA medians
are taken with a cold L2 cache, called and replayed from a CUDA graph. No speed is printed before the answers agree; on
the CPU the Keys are drawn with rank r, so that the compressed answer must equal the dense one.

`--only` picks parts of a run on CUDA: "decode" (batches and tokens as given), "queries" (several queries a row), "fit"
(a basis, beside the prefill of a layer), "blocks" (block sizes in turn; see `evals.bench.block_sizes`). `--minutes`
ends it between two rows, and says which were not reached.
"""

import argparse
import datetime
import importlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

PARTS = ("decode", "queries", "fit", "blocks")


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda", "host", "rehearsal"], default="cpu")
    parser.add_argument("--roofline", action="store_true", help="print bounds, measure nothing")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    cuda = parser.add_argument_group("cuda")
    cuda.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    cuda.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 32768, 65536, 131072])
    cuda.add_argument("--only", nargs="+", choices=PARTS, default=["decode", "queries", "fit"])
    cuda.add_argument("--kinds", nargs="+", help="of segments, such as 'r = 32' or '4 bit'; all by default")
    cuda.add_argument("--minutes", type=float, default=9.0, help="begin no row after so many")
    cpu = parser.add_argument_group("cpu")
    cpu.add_argument("--batch", type=int, default=1)
    cpu.add_argument("--visual", type=int, default=4096, help="visual tokens")
    cpu.add_argument("--text", type=int, default=32, help="text tokens of the prompt")
    cpu.add_argument("--q-heads", type=int, default=32)
    cpu.add_argument("--kv-heads", type=int, default=8)
    cpu.add_argument("--width", type=int, default=128, help="head width")
    cpu.add_argument("--rank", type=int, default=32)
    cpu.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    cpu.add_argument("--rounds", type=int, default=60)
    cpu.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.device == "rehearsal":
        os.environ["TRITON_INTERPRET"] = "1"  # read while Triton is imported, which the imports below do
    with torch.inference_mode():
        if args.roofline:
            roofline = importlib.import_module("evals.bench.roofline")
            print(roofline.table(roofline.H200), roofline.fit_table(roofline.H200), sep="\n\n")
            return
        if args.device == "rehearsal":
            rehearse(args)
            return
        if args.device == "cuda":
            result = on_cuda(args)
        elif args.device == "host":
            result = importlib.import_module("evals.bench.host").run()
        else:
            result = importlib.import_module("evals.bench.kernel_cpu").run(args)
    result["command"] = shlex.join(["python", "-m", "evals.bench.kernel", *sys.argv[1:]])
    result["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        if "rows" in result:
            importlib.import_module("evals.bench.kernel_cuda").draw_figure(result, args.out.with_suffix(".png"))


def on_cuda(args: argparse.Namespace) -> dict:
    """Measure the fused kernel against the dense decodes at hand."""
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a CUDA device; --device rehearsal and --roofline do not")
    bench = importlib.import_module("evals.bench.kernel_cuda")
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    sizes = bench.settings(args.batches, args.tokens)
    shapes = {"tokens": 16384, "queries": (4, 16, 64, 256), "ranks": (16, 32, 64)}
    result = measure(args, sizes, shapes, bench.Clock(), {})
    return {**result, "versions": {**bench.versions(), "driver, clock": driver}}


def measure(args: argparse.Namespace, sizes: Iterable, shapes: dict, clock: Any, common: dict) -> dict:
    """Measure the parts that were asked for; `common` are fields of every `Setting`."""
    bench = importlib.import_module("evals.bench.kernel_cuda")
    prefill = importlib.import_module("evals.bench.prefill")
    kinds = args.kinds or bench.KINDS
    unknown = set(kinds) - set(bench.KINDS)
    if unknown:
        raise SystemExit(f"--kinds must be of {', '.join(bench.KINDS)}, got {', '.join(sorted(unknown))}")
    result: dict[str, Any] = {}
    if "fit" in args.only:
        setting = bench.Setting(1, shapes["tokens"], **common)
        result["fit"] = prefill.fit_rows(setting, shapes["ranks"], clock)
    if "queries" in args.only:
        plain = [kind for kind in kinds if kind.startswith("r = ")]
        result["queries"] = [
            prefill.queries_row(bench.Setting(batch, shapes["tokens"], **common), kind, queries, clock)
            for batch in (1, 8)
            for kind in plain
            for queries in shapes["queries"]
        ]
    if "blocks" in args.only:
        result["blocks"] = list(importlib.import_module("evals.bench.block_sizes").by_clock(clock, common))
    if "decode" in args.only:
        result |= bench.run(sizes, kinds, clock, args.minutes)
    return result


def rehearse(args: argparse.Namespace) -> None:
    """Take the way of a measurement but for the clock, with small sizes on the CPU."""
    bench = importlib.import_module("evals.bench.kernel_cuda")
    common = {"q_heads": 4, "kv_heads": 2, "width": 128, "text": 5, "dtype": torch.float16, "device": "cpu"}
    shapes = {"tokens": 160, "queries": (3,), "ranks": (32,)}
    result = measure(args, [bench.Setting(2, 40, **common)], shapes, bench.NoClock(), common)
    for row in result.get("rows", []):
        if "our dense GQA kernel" not in row["dense"]:
            raise SystemExit(f"our dense kernel is left out: {row['left out']}")
        for kind, one in row["ours"].items():
            print(f"{kind:12} relative error {one['relative error']:.2g}")


if __name__ == "__main__":
    main()
