"""Everything that only a GPU can tell, in one command of four minutes: `make gpu`.

    python -m evals.bench.gpu                        # checks and times; runs/gpu-DATE/gpu.json and gpu.log
    python -m evals.bench.gpu --only compiled        # StaticCache compiled by transformers, a minute a length
    python -m evals.bench.gpu --rehearse             # every line of it, small and on the CPU
    python -m evals.bench.gpu --only host --device cpu --out runs/host

The parts, each with a budget of seconds: an item that a part has no time left for is listed as not reached.

    compile    all kernels of the other parts, in parallel processes
    tests      those marked `gpu`; each with a time limit, named as it ends
    decode     decode attention against the best dense decode, called and replayed from a CUDA graph, L2 cold
    splits     the same kernel cut into other numbers of splits
    variants   the same kernel with other block sizes, with rests of projected queries in products of their own or not,
               with more or less of the decoder in one load, in one launch or three
    call       the host's time for one call of the kernel
    host       the host's time for a token, in `generate` and in a plain loop, with a model too narrow to take any other
    seal       the seals of an 8B model by their parts, and their share of its prefill (in pairs, no wait inside)
    seals      the seal of one layer by its parts: online and calibrated bases, codes or not (`evals.bench.seal`)
    token      a token of `generate` with an 8B model: GEMMs, small kernels, attention; gain and its bound by bytes
    compiled   the same beside StaticCache as transformers compiles it; only where it is asked for

A whole model has random weights. Contexts are drawn straight into the cache, unless a prefill is timed.
"""

import argparse
import contextlib
import datetime
import faulthandler
import functools
import importlib
import importlib.util
import io
import math
import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from evals.bench.gpu_compile import compile_kernels
from evals.bench.gpu_extent import REHEARSAL, Extent, kernel_common, ranked, shape_of
from evals.bench.gpu_report import table, wrongs
from evals.bench.machine import commit, hardware, versions

NEEDED = ("torch", "transformers", "triton", "pytest", "xdist", "matplotlib", "yaml")
# Seconds; what they add up to is more than the parts take with warm kernels.
BUDGETS = {
    "compile": 120.0,
    "tests": 75.0,
    "decode": 25.0,
    "splits": 15.0,
    "variants": 15.0,
    "call": 5.0,
    "host": 20.0,
    "seal": 40.0,
    "seals": 15.0,
    "token": 90.0,
    "compiled": 400.0,
}
USUAL = tuple(part for part in BUDGETS if part != "compiled")
GRACE = 60.0  # seconds that an item may go on after its part's budget; then the run ends with what it has


class Tee(io.TextIOBase):
    """A stream that writes to the terminal and into the log."""

    def __init__(self, *streams: TextIO) -> None:
        self.streams = streams

    def write(self, text: str) -> int:
        """Write to all."""
        for stream in self.streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush all."""
        for stream in self.streams:
            stream.flush()


def plain(value: Any) -> Any:
    """Return a value as JSON holds it: what is no number is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


class Run:
    """The findings, kept up in one JSON after each item.

    Args:
        folder: where the JSON and the log go.
        extent: how much is measured.
        parts: their names, in order.
        budgets: seconds of each.
    """

    def __init__(self, folder: Path, extent: Extent, parts: Sequence[str], budgets: Mapping[str, float]) -> None:
        self.folder, self.extent, self.parts, self.budgets = folder, extent, parts, budgets
        self.found: dict[str, Any] = {
            "hardware": hardware(extent.device),
            "versions": versions(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": commit(),
            "command": shlex.join(["python", "-m", "evals.bench.gpu", *sys.argv[1:]]),
            "parts": {},
        }

    def save(self) -> None:
        """Write the JSON."""
        store = importlib.import_module("evals.store")
        store.write_json(self.folder / "gpu.json", store.rounded(plain(self.found)))

    def do(self, part: str) -> None:
        """Run a part: its items in turn, until its budget is spent."""
        budget = self.budgets[part]
        rows: list[dict[str, Any]] = []
        section: dict[str, Any] = {"budget s": budget, "seconds": 0.0, "rows": rows, "not reached": []}
        self.found["parts"][part] = section
        print(f"\n== {part}, {budget:.0f} s ==", flush=True)
        watch = threading.Timer(budget + GRACE, self.give_up, [part])
        watch.daemon = True
        watch.start()
        begin = time.monotonic()
        try:
            for label, item in self.items(part, begin + budget):
                if time.monotonic() - begin > budget:
                    section["not reached"].append(label)
                    continue
                rows.append({"item": label, **attempt(item)})
                section["seconds"] = time.monotonic() - begin
                self.save()
        finally:
            watch.cancel()
        if part in ("token", "compiled"):
            importlib.import_module("evals.bench.gpu_model").compare_tokens(rows)
        self.save()

    def give_up(self, part: str) -> None:
        """End a run that hangs: nothing is lost of what was found."""
        print(f"\n{part} hangs; the run ends here", flush=True)
        faulthandler.dump_traceback(sys.__stderr__)
        self.found["parts"][part]["failed"] = f"hung {GRACE:.0f} s after its budget"
        self.save()
        print(table(self.found), flush=True)
        os._exit(3)

    def items(self, part: str, deadline: float) -> Iterable[tuple[str, Callable[[], dict[str, Any]]]]:
        """List what a part does."""
        extent = self.extent
        if part == "compile":
            return [("kernels", functools.partial(compile_kernels, extent, self.parts, deadline))]
        if part == "tests":
            # The kernel's contract is not marked: it runs in the interpreter, too.
            marked = [("tests marked gpu", functools.partial(self.tests, deadline, marked="gpu"))]
            contract = [("the kernel's contract", functools.partial(self.tests, deadline, marked="not gpu"))]
            return marked if extent.device == "cpu" else marked + contract
        kernel = importlib.import_module("evals.bench.gpu_kernel")
        if part in ("decode", "splits", "variants", "call"):
            clock, common = self.clock, kernel_common(extent)
            if part == "decode":
                return kernel.table_items(extent.sizes, extent.kinds, common, clock)
            if part == "variants":
                return kernel.variant_items(extent.variants, extent.varied, common, clock, extent.most_variants)
            if part == "splits":
                return kernel.split_items(extent.swept, common, clock, extent.most_splits)
            return kernel.call_items(extent.called, extent.kinds, common, clock)
        if part == "seals":
            seal = importlib.import_module("evals.bench.seal")
            heads = (self.extent.common.get("q_heads", 32), self.extent.common.get("kv_heads", 8), 128)
            items: Iterable[tuple[str, Callable[[], dict[str, Any]]]] = seal.items(
                seal.Heads(*heads, extent.device, extent.model_dtype),
                seal.grid([extent.rank], extent.sealed),
                extent.rounds,
            )
            return items
        model = importlib.import_module("evals.bench.gpu_model")
        if part == "host":
            return [("tokens", functools.partial(model.host_row, extent.device, model.HOST_METHODS, *extent.host))]
        methods = ranked(model.COMPILED if part == "compiled" else model.METHODS, extent.rank)
        if part == "seal":
            sealing = ranked(model.SEALED, extent.rank)
            alone = model.seal_items(self.host, sealing, extent.prefills, extent.text)
            return [
                *alone,
                *model.prefill_items(self.host, sealing, extent.prefills, extent.text, extent.rounds),
            ]
        settings = extent.compiled if part == "compiled" else extent.settings
        return model.token_items(self.host, methods, settings, extent.text, extent.tokens)

    @functools.cached_property
    def clock(self) -> Any:
        """The clock of the kernel's parts."""
        clocks = importlib.import_module("evals.bench.graph_clock")
        return clocks.GraphClock() if self.extent.device == "cuda" else clocks.RehearsalClock()

    @functools.cached_property
    def host(self) -> Any:
        """The 8B model of the last parts."""
        torch, model = importlib.import_module("torch"), importlib.import_module("evals.bench.gpu_model")
        contexts = [context for _, context in (*self.extent.settings, *self.extent.compiled)]
        longest = max([*contexts, *self.extent.prefills]) + 256
        on_cpu = self.extent.device == "cpu"
        dtype = getattr(torch, self.extent.model_dtype)
        return model.Model(shape_of(self.extent), self.extent.device, dtype, longest, no_graph=on_cpu)

    def tests(self, deadline: float, marked: str) -> dict[str, Any]:
        """Run the tests that need a GPU, or the kernel's others; in a rehearsal a file that skips them."""
        runner = importlib.import_module("evals.bench.gpu_tests")
        files = runner.files_with_gpu_tests()
        if self.extent.device == "cpu":
            files = [path for path in files if path.name == "test_seal_sync.py"]
        elif marked != "gpu":
            files = [path for path in files if path.name == "test_decode.py"]
        found: dict[str, Any] = runner.run_tests(
            files,
            self.folder,
            budget=max(1.0, deadline - time.monotonic()),
            limit=self.extent.test_limit,
            processes=self.extent.processes,
            marked=marked,
        )
        wrong = found.get("failed") or found.get("stopped while running")
        if wrong or found["exit status"]:
            found["wrong"] = f"{len(wrong or ())} tests failed or did not end, pytest's status {found['exit status']}"
        return found


def attempt(item: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run an item; what goes wrong with it is its result."""
    try:
        return item()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the other items go on
        traceback.print_exc(file=sys.stdout)
        return {"wrong": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"}


def parse() -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BUDGETS), default=USUAL, metavar="PART", help="parts to run")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: for the parts host and tests")
    parser.add_argument("--rehearse", action="store_true", help="all parts, small and without a GPU")
    parser.add_argument("--budget", type=float, default=1.0, metavar="FACTOR", help="on the seconds of every part")
    parser.add_argument("--out", type=Path, help="folder to write (default: runs/gpu-DATE)")
    args = parser.parse_args()
    if args.budget <= 0:
        parser.error(f"--budget must be a positive factor, got {args.budget}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"this Python lacks {', '.join(missing)}: install pytest-xdist, triton, matplotlib, transformers")
    if args.device == "cpu" and not args.rehearse and set(args.only) - {"host"}:
        parser.error(f"--device cpu tells of the part 'host' alone, got {', '.join(args.only)}; or use --rehearse")
    return args


def main() -> None:
    """Parse, run the parts, print the table."""
    args = parse()
    extent = Extent(device=args.device)
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read while Triton is imported
        extent = REHEARSAL
    torch = importlib.import_module("torch")
    if extent.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device is available; --rehearse runs everything without one")
    folder = args.out or Path("runs") / f"gpu-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "gpu.json").exists():
        raise SystemExit(f"error: --out '{folder}' holds a gpu.json already, which is not overwritten")
    budgets = {part: seconds * args.budget for part, seconds in BUDGETS.items()}
    # In the order of the list: what a part needs compiled is compiled before.
    parts = [part for part in BUDGETS if part in args.only]
    with (folder / "gpu.log").open("w", encoding="utf-8") as log, contextlib.redirect_stdout(Tee(sys.stdout, log)):
        begin = time.monotonic()
        run = Run(folder, extent, parts, budgets)
        with torch.no_grad():  # as generate does it
            for part in parts:
                run.do(part)
        run.found["seconds"] = time.monotonic() - begin
        run.save()
        print(table(run.found))
        print(f"\n{run.found['seconds']:.0f} s; all figures: {folder / 'gpu.json'}", flush=True)
        wrong = wrongs(run.found)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
