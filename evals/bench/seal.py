"""What a seal takes, by its parts, and its share of a prefill; on a CPU or a GPU.

    python -m evals.bench.seal --out runs/seal.json              # all rows: ranks, bases, codes, tokens, batches
    python -m evals.bench.seal --quick                           # a few of them, in a minute
    python -m evals.bench.seal --quick --beside ../old-checkout  # and how many times as long another checkout takes

A row is the seal of one layer's Keys and Values, of the second layer on: the first makes what the layers share, and is
named by itself. "host" is the time until the seal has returned, "wall" until it is done (on a CPU they are one, and
both are the time of this thread, to which other work on the machine counts little). "operations" are those of torch,
"launches" those of the GPU. Parts are told apart by the names of operations, or of kernels on a GPU.

The share of a prefill is (with seals - without) / without, of prefills in pairs: of the reader that comes with the
package, with a page of its own, and of the four layers of `shapes.yaml`. What lies without is the same model and the
same attention with `sparsity=0`, which stores Keys and Values as they are.

With `--beside` both checkouts are measured in turn, round after round, each in a process of its own, so that they meet
the same machine; the ratio is the median over rounds.
"""

import argparse
import datetime
import functools
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch

from evals.bench import seal_worker
from evals.bench.gpu_kernel import Item
from evals.bench.machine import commit, hardware, versions
from evals.bench.seal_worker import ON_CPU, ON_GPU, PREFILLS, Case, Heads, Seals
from evals.bench.workload import spread
from evals.store import rounded, write_json

ROOT = Path(__file__).parents[2]
MOST = 1 << 16  # visual tokens of all rows that a CPU is asked to seal


def cases(*, quick: bool, device: str) -> list[Case]:
    """List the seals that are timed."""
    if quick:
        sizes = [(1024, 1), (4096, 1), (1024, 8)] if device == "cpu" else [(4096, 1), (16384, 1), (16384, 8)]
        ranks = [32]
    else:
        ranks = [16, 32, 64]
        sizes = [(tokens, batch) for batch in (1, 8) for tokens in (1024, 4096, 16384, 65536)]
        sizes = [(tokens, batch) for tokens, batch in sizes if device != "cpu" or tokens * batch <= MOST]
    return grid(ranks, sizes)


def grid(ranks: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[Case]:
    """List the seals of all kinds at these ranks and sizes (visual tokens and batch)."""
    kinds = list(itertools.product(("online", "calibrated"), (False, True)))
    return [Case(rank, *kind, *size) for size, kind, rank in itertools.product(sizes, kinds, ranks)]


class Worker:
    """A process that measures one checkout.

    Args:
        checkout: its folder.
    """

    def __init__(self, checkout: Path) -> None:
        paths = os.pathsep.join(str(checkout / part) for part in ("", "kernels", "integrations"))
        # By its path: another checkout may not have that file, and everything else is to be its own.
        command = [sys.executable, "-P", seal_worker.__file__]
        self.process = subprocess.Popen(  # noqa: S603
            command,
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": paths, "KINETO_LOG_LEVEL": "9"},
            stdin=-1,
            stdout=-1,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def ask(self, what: str, **rest: Any) -> dict[str, Any]:
        """Have something measured."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"what": what, **rest}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"error: the process that measures {self.process.args} has ended; see above")
        found: dict[str, Any] = json.loads(answer)
        return found


def seal_row(workers: Mapping[str, Worker], heads: Heads, case: Case, rounds: int) -> dict[str, Any]:
    """Time a case in all checkouts in turn; ratios are to this one, of the same round."""
    asked: dict[str, Any] = {"heads": asdict(heads), "case": asdict(case)}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for number in range(rounds + 1):  # the first warms up
        for name, worker in workers.items():
            found = worker.ask("times", **asked)
            if number:
                times[name].append(found)
    row: dict[str, Any] = {"seal": case.name, **asdict(case)}
    for name, worker in workers.items():
        spreads = {what: spread([found[what] for found in times[name]]) for what in times[name][0]}
        row[name] = spreads | worker.ask("parts", **asked)
    if "beside" in workers:
        pairs = zip(times["beside"], times["here"], strict=True)
        row["beside / here"] = spread([old["wall ms"] / new["wall ms"] for old, new in pairs])
    return row


def items(heads: Heads, chosen: Sequence[Case], rounds: int) -> Iterator[Item]:
    """List seals as items of `evals.bench.gpu`, measured in this process."""
    with tempfile.TemporaryDirectory() as folder:
        seals = Seals(heads, Path(folder))

        def row(case: Case) -> dict[str, Any]:
            times = [seals.times(case) for _ in range(rounds + 1)][1:]  # the first compiles
            here = {what: spread([one[what] for one in times]) for what in times[0]} | seals.parts(case)
            found = {"seal": case.name, **asdict(case), "here": here}
            print(seal_line(found), flush=True)
            return found

        for case in chosen:
            yield case.name, functools.partial(row, case)


def prefill_row(workers: Mapping[str, Worker], shape: str, context: int, method: str, rounds: int) -> dict[str, Any]:
    """Time pairs of prefills in all checkouts in turn."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for number in range(rounds + 1):
        for name, worker in workers.items():
            found = worker.ask("prefill", arguments=(shape, context, method))
            if number:
                times[name].append(found)
    row: dict[str, Any] = {"prefill": shape, "context": context, "method": method}
    for name, found in times.items():
        row[name] = {what: spread([one[what] for one in found]) for what in found[0]}
        row[name]["share"] = spread([one["with ms"] / one["without ms"] - 1 for one in found])
    return row


def seal_line(row: Mapping[str, Any]) -> str:
    """Write a row of a seal."""
    here = row["here"]
    parts = here.get("device ms") or here["profiled ms"]
    told = ", ".join(f"{part} {spent * 1e3:.0f}" for part, spent in parts.items())
    counts = f"{here['operations']:.0f} operations"
    counts += f", {here['launches']:.0f} launches" if "launches" in here else ""
    line = (
        f"{row['seal']:48} host {here['host ms']['median'] * 1e3:7.0f} us, wall {here['wall ms']['median'] * 1e3:7.0f}"
    )
    line += f", first layer {here['first layer ms']['median'] * 1e3:7.0f}; {counts}; {told}"
    if "beside" in row:
        old = row["beside"]
        line += f" | beside: {old['wall ms']['median'] * 1e3:.0f} us, {old['operations']:.0f} operations, "
        line += f"{row['beside / here']['median']:.2f}x"
    return line


def prefill_line(row: Mapping[str, Any]) -> str:
    """Write a row of a prefill."""
    told = []
    for name in ("here", "beside"):
        if name in row:
            share = row[name]["share"]
            spread_of = f"{share['least']:.1%} to {share['most']:.1%}"
            told.append(
                f"{name}: {row[name]['without ms']['median']:.1f} ms, seals {share['median']:.1%} ({spread_of})"
            )
    return f"prefill of {row['prefill']}, {row['context']:,} tokens, {row['method']}: {' | '.join(told)}"


def run(args: argparse.Namespace) -> None:
    """Measure all that the flags ask for; what is found is kept row by row."""
    heads = ON_CPU if args.device == "cpu" else ON_GPU
    checkouts = {"here": ROOT} | ({"beside": args.beside} if args.beside else {})
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "evals.bench.seal", *sys.argv[1:]]),
        "hardware": hardware(args.device),
        "versions": versions(),
        "commit": {name: commit(folder) for name, folder in checkouts.items()},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "heads": asdict(heads),
        "prefills": [],
        "seals": [],
    }

    def keep(row: dict[str, Any], rows: list[dict[str, Any]], line: str) -> None:
        rows.append(row)
        print(line, flush=True)
        if args.out:
            write_json(args.out, rounded(result))

    workers = {name: Worker(folder) for name, folder in checkouts.items()}
    try:
        prefills: Iterator[tuple[str, int]] = iter(())
        if args.device == "cpu" and not args.only:
            prefills = iter([("reader", 400), ("four-layers", 1024)])
        for (shape, context), method in itertools.product(prefills, PREFILLS):
            row = prefill_row(workers, shape, context, method, args.rounds)
            keep(row, result["prefills"], prefill_line(row))
        for case in cases(quick=args.quick, device=args.device):
            if args.only and not any(word in case.name for word in args.only):
                continue
            row = seal_row(workers, heads, case, args.rounds)
            keep(row, result["seals"], seal_line(row))
    finally:
        for worker in workers.values():
            worker.__exit__()


def parse() -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows, in a minute")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another checkout of this repository")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="seals whose name holds one of these words")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to write, which must not be there")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and there is none; --device cpu does without")
    if args.out and args.out.exists():
        parser.error(f"--out '{args.out}' is there already and is not overwritten")
    if args.beside and not (args.beside / "rotatek_cache").is_dir():
        parser.error(f"--beside must be a checkout of this repository, got '{args.beside}', which has no rotatek_cache")
    return args


def main() -> None:
    """Parse, measure, print, store."""
    run(parse())


if __name__ == "__main__":
    main()
