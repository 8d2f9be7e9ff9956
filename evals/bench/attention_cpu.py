"""What attention alone costs a decode step on a CPU, without reading a prompt: VL-Cache's setting at long contexts.

    python -m evals.bench.attention_cpu --out evals/results/attention_vl_cache_cpu.json

Caches are filled with drawn states; then each method appends and attends through all layers of four narrow ones, in
turn with the others. Times are seconds of the processor that the process took, so that a busy machine disturbs them
little; `python -m evals.bench.latency` measures what a user waits for, prefill included.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from evals.accuracy import environment
from evals.bench.latency import SHAPES
from evals.bench.workload import attention_steps, build, fill, make_cache, spread, switch_attention, visual_span
from evals.fidelity import positive
from evals.store import rounded, write_json

METHODS: dict[str, dict[str, Any]] = {
    "dense, sdpa": {"dense": "dynamic", "attention": "sdpa"},
    "dense, sdpa, preallocated": {"dense": "static", "attention": "sdpa"},
    "VL-Cache, .1 of the bytes": {"sparsity": 0, "tokens": "vl_cache", "budget": "0.1x"},
    "VL-Cache, .1 of the whole prompt": {"sparsity": 0, "tokens": "vl_cache:0.1,scope=prompt"},
    "RotateK r=32": {"rank": 32},
    "AKVQ-VL 2 bit, a tenth in 8": {
        "sparsity": 0,
        "basis": "hadamard",
        "key_bits": 2,
        "value_basis": "hadamard",
        "value_bits": 2,
        "tokens": "akvq_vl:0.1",
    },
}


def processor_seconds(_: torch.device) -> float:
    """Return the seconds of the processor that this process has taken."""
    return time.process_time()


def measure(context: int, text: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Measure every method at one context."""
    torch.manual_seed(0)
    shape = yaml.safe_load(SHAPES.read_text())["four-layers"]
    longest = context + (rounds + 1) * (steps + 1) + 8
    model = build(shape, "cpu", torch.float32, longest)
    caches: dict[str, Any] = {}
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for name, options in METHODS.items():
        switch_attention(model, options)
        caches[name] = make_cache(options, model.config, visual_span(1, context, text, model.device), longest)
        fill(model, caches[name], 1, context, text)
    for number in range(rounds + 1):  # the first one warms up
        for name, options in METHODS.items():
            switch_attention(model, options)
            taken = attention_steps(model, caches[name], 1, steps, processor_seconds)
            times[name] += [1e3 * second for second in taken] if number else []
    return [{"method": name, "context": context, "batch": 1, "attention_ms": spread(times[name])} for name in METHODS]


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=positive, nargs="+", default=[4096, 16384])
    parser.add_argument("--text", type=positive, default=64, help="text tokens of the prompt")
    parser.add_argument("--rounds", type=positive, default=4)
    parser.add_argument("--steps", type=positive, default=8, help="of each method in a round")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = [row for context in args.contexts for row in measure(context, args.text, args.rounds, args.steps)]
    for row in rows:
        alike = [one for one in rows if one["context"] == row["context"] and one["method"].startswith("dense")]
        best = min(one["attention_ms"]["median"] for one in alike)
        own = row["attention_ms"]["median"]
        print(f"{row['context']:8} {row['method']:36} {own:8.2f} ms {best / own:6.2f}x of the best dense cache")
    if args.out:
        command = shlex.join(["python", "-m", "evals.bench.attention_cpu", *sys.argv[1:]])
        setting = {name: getattr(args, name) for name in ("text", "rounds", "steps")}
        write_json(
            args.out,
            rounded({"attention": rows, "command": command, "setting": setting, "environment": environment("cpu", 1)}),
        )


if __name__ == "__main__":
    main()
