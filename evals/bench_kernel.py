"""Time of decode attention: RotateK against the best dense decodes at hand.

    python -m evals.bench_kernel --device cpu         # one decoded token of one layer, update plus attention, in torch
    python -m evals.bench_kernel --device cuda        # the fused kernel, all sizes; JSON and a figure beside it
    python -m evals.bench_kernel --device rehearsal   # the same in Triton's interpreter, small and without a clock
    python -m evals.bench_kernel --roofline           # what bytes and instructions allow on an H200; needs no GPU

On the CPU every method is run in turn, round after round, so that all of them meet the same machine and cold caches;
ratios are of medians in that one run. On CUDA medians are taken with a cold L2 cache, called and replayed from a CUDA
graph. No speed is printed before the answers agree; on the CPU the Keys are drawn with rank r, so that the compressed
answer must equal the dense one.
"""

import argparse
import datetime
import importlib
import json
import os
import subprocess
from pathlib import Path

import torch


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda", "rehearsal"], default="cpu")
    parser.add_argument("--roofline", action="store_true", help="print bounds, measure nothing")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    cuda = parser.add_argument_group("cuda")
    cuda.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    cuda.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 32768, 65536, 131072])
    cpu = parser.add_argument_group("cpu")
    cpu.add_argument("--batch", type=int, default=1)
    cpu.add_argument("--visual", type=int, default=4096, help="visual tokens")
    cpu.add_argument("--text", type=int, default=32, help="text tokens of the prompt")
    cpu.add_argument("--q-heads", type=int, default=32)
    cpu.add_argument("--kv-heads", type=int, default=8)
    cpu.add_argument("--width", type=int, default=128, help="head width")
    cpu.add_argument("--rank", type=int, default=32)
    cpu.add_argument("--rounds", type=int, default=60)
    cpu.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.device == "rehearsal":
        os.environ["TRITON_INTERPRET"] = "1"  # read while Triton is imported, which the imports below do
    with torch.inference_mode():
        if args.roofline:
            roofline = importlib.import_module("evals.roofline")
            print(roofline.table(roofline.H200))
            return
        if args.device == "rehearsal":
            for kind, error in importlib.import_module("evals.bench_cuda").rehearse().items():
                print(f"{kind:12} relative error {error:.2g}")
            return
        result = on_cuda(args) if args.device == "cuda" else importlib.import_module("evals.bench_cpu").run(args)
    result["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        if args.device == "cuda":
            importlib.import_module("evals.bench_cuda").draw_figure(result, args.out.with_suffix(".png"))


def on_cuda(args: argparse.Namespace) -> dict:
    """The fused kernel against the dense decodes at hand."""
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a CUDA device; --device rehearsal and --roofline do not")
    bench = importlib.import_module("evals.bench_cuda")
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return {**bench.run(args.batches, args.tokens), "versions": {**bench.versions(), "driver, clock": driver}}


if __name__ == "__main__":
    main()
