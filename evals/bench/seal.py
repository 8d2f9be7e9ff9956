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
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, AutoProcessor

from evals.bench.gpu_kernel import Item
from evals.bench.machine import commit, hardware, versions
from evals.bench.workload import build, draw_prompt, make_cache, read_prompt, spread, switch_attention
from evals.store import rounded, write_json
from rotatek_cache.cache.coordinator import Coordinator
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.options import FitOptions

ROOT = Path(__file__).parents[2]
TEXT, WINDOW = 16, 32  # tokens behind the image; queries that weigh the channels
LAYERS = 3  # sealed in turn: what the first shares, and the median of the others
MOST = 1 << 16  # visual tokens of all rows that a CPU is asked to seal
# What the name of an operation or kernel says of it; the first that fits.
PARTS = {
    "compiled seal": ("rotatek", "seal_"),
    "QR": ("geqr", "orgqr", "ormqr", "larf", "householder", "linalg_qr"),
    "Cholesky and triangular solves": ("potr", "trsm", "trsv", "cholesky", "triangular"),
    "products": ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk", "::mm", "::addmm", "::bmm", "baddbmm"),
    "copies and gathers": ("copy", "memcpy", "memset", "gather", "index", "::cat", "scatter", "fill", "clone"),
}
REST = "other small operations"


@dataclass(frozen=True)
class Case:
    """A seal that is timed.

    Attributes:
        rank: coefficients of a Key, and of a Value where these are coded.
        basis: "online" or "calibrated".
        coded: whether Keys and Values are stored as codes of 4 bits.
        tokens: visual ones of a row.
        batch: rows.
    """

    rank: int
    basis: str
    coded: bool
    tokens: int
    batch: int

    @property
    def name(self) -> str:
        """What a table calls it."""
        stored = "K and V at 4 bits" if self.coded else "K"
        return f"{self.batch} x {self.tokens:,}, r = {self.rank}, {self.basis}, {stored}"

    def options(self, width: int, file: Path) -> FitOptions:
        """Return the options of the cache, for heads of `width` and the calibrated basis of `file`."""
        chosen: dict[str, Any] = {"rank": self.rank, "always_compress": True}
        if self.coded:
            chosen |= {"key_bits": 4, "value_bits": 4, "value_sparsity": 1 - self.rank / width}
        return FitOptions(**chosen, **({"basis": str(file)} if self.basis == "calibrated" else {}))


@dataclass(frozen=True)
class Heads:
    """The heads of a layer, and where its states are."""

    q_heads: int
    kv_heads: int
    width: int
    device: str
    dtype: str


ON_CPU = Heads(14, 2, 128, "cpu", "float32")  # of the four layers
ON_GPU = Heads(32, 8, 128, "cuda", "bfloat16")  # of an 8B model


class Operations(TorchDispatchMode):
    """Counts the operations of torch that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one; views, which do nothing, are left out."""
        if not func.is_view:
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class Seals:
    """Layers with drawn states, sealed as a case says.

    Args:
        heads: of a layer.
        folder: where the calibrated basis is written.
    """

    def __init__(self, heads: Heads, folder: Path) -> None:
        self.heads = heads
        self.dtype = getattr(torch, heads.dtype)
        self.file = folder / "basis.safetensors"
        state = Calibration(torch.zeros(4), "bench")
        for layer, which in itertools.product(range(LAYERS), ("key", "value")):
            state.add(layer, which, self._draw(1, heads.kv_heads, 1024)[0].float().cpu())
        state.images = 1
        state.write_basis(self.file)
        self._drawn: tuple[tuple[int, int], tuple[Tensor, Tensor, Tensor]] | None = None

    def _draw(self, batch: int, count: int, tokens: int) -> Tensor:
        device, width = self.heads.device, self.heads.width
        spectrum = torch.logspace(0, -2, width, device=device, dtype=self.dtype)
        return torch.randn(batch, count, tokens, width, device=device, dtype=self.dtype) * spectrum + 0.5

    def states(self, case: Case) -> tuple[Tensor, Tensor, Tensor]:
        """Return Keys, Values and the last queries."""
        key = (case.batch, case.tokens)
        if self._drawn is None or self._drawn[0] != key:
            self._drawn = None
            torch.manual_seed(0)
            tokens = case.tokens + TEXT
            states = (self._draw(case.batch, self.heads.kv_heads, tokens) for _ in range(2))
            self._drawn = key, (*states, self._draw(case.batch, self.heads.q_heads, WINDOW))
        return self._drawn[1]

    def clock(self) -> float:
        """Return the seconds of this thread; on a GPU those of the wall, when all is done."""
        if self.heads.device == "cpu":
            return time.thread_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def seal(self, case: Case, watch: Any = None) -> list[tuple[float, float]]:
        """Seal some layers in turn; return host and wall seconds of each. `watch` is entered for all but the first."""
        keys, values, window = self.states(case)
        batch, _, tokens, _ = keys.shape
        positions = VisualPositions()
        flags = torch.zeros(batch, tokens, dtype=torch.bool, device=self.heads.device)
        flags[:, : case.tokens] = True
        positions.announce(0, tokens, flags)
        coordinator = Coordinator(positions)
        layers = [LayerKV(case.options(self.heads.width, self.file), positions, layer) for layer in range(LAYERS)]
        for layer in layers:
            layer.append(keys, values)
        found = []
        for layer in layers:
            if watch is not None and layer is layers[1]:
                watch.__enter__()
            begin = self.clock()
            coordinator.observe(layer, window, None)
            host = (time.thread_time() if self.heads.device == "cpu" else time.perf_counter()) - begin
            found.append((host, self.clock() - begin))
        if watch is not None:
            watch.__exit__(None, None, None)
        return found

    @torch.no_grad()
    def times(self, case: Case) -> dict[str, float]:
        """Time the seals once: milliseconds of the first layer, and of each other one."""
        first, *others = self.seal(case)
        host, wall = (statistics.median(times) * 1e3 for times in zip(*others, strict=True))
        return {"first layer ms": first[1] * 1e3, "host ms": host, "wall ms": wall}

    @torch.no_grad()
    def parts(self, case: Case) -> dict[str, Any]:
        """Count what the seal of a layer does, and time it by parts."""
        counted = Operations()
        self.seal(case, counted)
        found: dict[str, Any] = {"operations": sum(counted.found.values()) / (LAYERS - 1)}
        on_gpu = self.heads.device != "cpu"
        # The least of some: a profiler takes the time of the wall, in which a CPU may do other work.
        profiles = [self._profiled(case, on_gpu=on_gpu) for _ in range(1 if on_gpu else 3)]
        found |= {"launches": profiles[0][1]} if on_gpu else {}
        times = {part: min(parts[part] for parts, _ in profiles) for part in profiles[0][0]}
        return found | {
            "device ms" if on_gpu else "profiled ms": {part: spent for part, spent in times.items() if spent}
        }

    def _profiled(self, case: Case, *, on_gpu: bool) -> tuple[dict[str, float], float]:
        """Return milliseconds of a layer by parts, and its launches."""
        profiled = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])
        self.seal(case, profiled)
        times = dict.fromkeys([*PARTS, REST], 0.0)
        launches = 0
        for event in profiled.key_averages():
            on_device = event.device_type != torch.autograd.DeviceType.CPU
            spent = event.self_device_time_total if on_device else event.self_cpu_time_total
            if spent <= 0 or not (on_device or event.key.startswith(("aten::", "rotatek"))):
                continue
            low = event.key.lower()
            part = next((part for part, words in PARTS.items() if any(word in low for word in words)), REST)
            times[part] += spent / (LAYERS - 1) / 1e3
            launches += event.count
        return times, launches / (LAYERS - 1)


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


PREFILLS: dict[str, dict[str, Any]] = {
    "r = 32": {"rank": 32, "always_compress": True},
    "K and V r = 32, 4 bits": {
        "rank": 32,
        "key_bits": 4,
        "value_sparsity": 0.75,
        "value_bits": 4,
        "always_compress": True,
    },
}


@functools.cache
def prefill_model(shape: str, context: int) -> tuple[Any, Any]:
    """Make the model of a shape, or the reader, on the CPU, and its prompt."""
    if shape == "reader":
        folder = ROOT / "rotatek_cache" / "reader"
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        page = Image.open(folder / "pages" / "page1_easy.png").convert("RGB")
        return model, read_prompt(model, AutoProcessor.from_pretrained(folder), [page], "row 3?", 1, context)
    shapes = yaml.safe_load((ROOT / "evals" / "bench" / "shapes.yaml").read_text())
    torch.manual_seed(0)
    model = build(shapes[shape], "cpu", torch.float32, context + 8)
    return model, draw_prompt(model, 1, context, TEXT)


@torch.no_grad()
def prefill_times(shape: str, context: int, method: str) -> dict[str, float]:
    """Time a prefill without seals and one with them, in milliseconds of this thread."""
    model, prompt = prefill_model(shape, context)
    found = {}
    for name, options in (("without ms", {"sparsity": 0}), ("with ms", PREFILLS[method])):
        switch_attention(model, options)
        cache = make_cache(options, model.config, prompt.visual, 0)
        begin = time.thread_time()
        model(**prompt.inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found[name] = (time.thread_time() - begin) * 1e3
    return found


def work() -> None:
    """Measure what is asked for, a line of JSON each, until there is no more."""
    with tempfile.TemporaryDirectory() as folder:
        seals: Seals | None = None
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["what"] == "prefill":
                found: dict[str, Any] = prefill_times(*asked["arguments"])
            else:
                seals = Seals(Heads(**asked["heads"]), Path(folder)) if seals is None else seals
                found = getattr(seals, asked["what"])(Case(**asked["case"]))
            print(json.dumps(found), flush=True)


class Worker:
    """A process that measures one checkout.

    Args:
        checkout: its folder.
    """

    def __init__(self, checkout: Path) -> None:
        paths = os.pathsep.join(str(checkout / part) for part in ("", "kernels", "integrations"))
        # By its path: another checkout may not have this file, and everything else is to be its own.
        command = [sys.executable, "-P", str(Path(__file__)), "--worker"]
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
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
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
    args = parse()
    if args.worker:
        work()
        return
    run(args)


if __name__ == "__main__":
    main()
