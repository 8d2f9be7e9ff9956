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
import importlib.metadata
import importlib.util
import io
import math
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TextIO

NEEDED = ("torch", "transformers", "triton", "pytest", "xdist", "matplotlib", "yaml")
VERSIONS = ("torch", "triton", "transformers", "pytest", "pytest-xdist", "numpy")
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
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Extent:
    """The amount of work that is measured.

    Attributes:
        device: "cuda" or "cpu".
        dtype: of the kernel's part and of the model, by torch's name.
        model_dtype: of the model.
        common: fields of every `Setting` of the kernel's part.
        sizes: batch and visual tokens of the decode table.
        kinds: of segments.
        swept: batch, visual tokens and kind of a sweep of splits.
        most_splits: numbers of splits tried; None for all.
        varied, variants: batch and visual tokens, and kinds of segments, whose variants are timed.
        most_variants: of each; None for all.
        called: batch and visual tokens of the host's time for a call.
        shape: of the model, in `shapes.yaml`.
        rank: of the model's methods.
        prefills: prompt lengths.
        rounds: of a prefill.
        sealed: visual tokens and batch of the seals by their parts.
        settings: batch and context of a token.
        compiled: the same of compiled steps.
        text, tokens: of a prompt, and timed.
        host: layers, context, tokens and rounds of the host's time for a token.
        processes: that compile, and that test.
        test_limit: seconds a test.
    """

    device: str = "cuda"
    dtype: str = "bfloat16"
    model_dtype: str = "bfloat16"
    common: Mapping[str, Any] = field(default_factory=dict)
    sizes: Sequence[tuple[int, int]] = ((1, 4096), (1, 16384), (1, 65536), (8, 16384), (8, 65536), (64, 16384))
    kinds: Sequence[str] = ("r = 16", "r = 32", "r = 64", "4 bit", "per head")
    swept: Sequence[tuple[int, int, str]] = (
        (1, 16384, "r = 32"),
        (8, 16384, "r = 32"),
        (8, 32768, "r = 32"),
        (64, 16384, "r = 32"),
        (1, 16384, "4 bit"),
        (8, 32768, "4 bit"),
    )
    most_splits: int | None = None
    varied: Sequence[tuple[int, int]] = ((8, 32768), (1, 16384))
    variants: Sequence[str] = ("4 bit", "per head", "r = 32")
    most_variants: int | None = None
    called: tuple[int, int] = (1, 4096)
    shape: str = "llava-next-8b"
    rank: int = 32
    prefills: Sequence[int] = (4096, 16384)
    rounds: int = 3
    sealed: Sequence[tuple[int, int]] = ((4096, 1), (16384, 1), (16384, 8))
    settings: Sequence[tuple[int, int]] = ((1, 16384), (1, 65536), (8, 16384), (32, 16384), (1, 4096))
    compiled: Sequence[tuple[int, int]] = ((1, 16384), (1, 65536), (1, 4096))
    text: int = 64
    tokens: int = 24
    host: tuple[int, int, int, int] = (32, 512, 16, 2)
    processes: int = min(12, os.cpu_count() or 1)
    test_limit: float = 60.0


REHEARSAL = Extent(
    device="cpu",
    dtype="float16",
    model_dtype="float32",
    common={"q_heads": 4, "kv_heads": 2, "text": 5, "device": "cpu"},
    sizes=((2, 40),),
    kinds=("r = 32", "4 bit"),
    swept=((1, 200, "r = 32"),),
    most_splits=2,
    varied=((2, 20),),
    variants=("4 bit",),
    most_variants=4,
    called=(1, 40),
    shape="rehearsal",
    rank=8,
    prefills=(96,),
    rounds=1,
    sealed=((96, 2),),
    settings=((2, 96),),
    compiled=(),
    text=16,
    tokens=2,
    host=(2, 64, 2, 1),
    processes=1,
)


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


def ranked(methods: Mapping[str, Mapping[str, Any]], rank: int) -> dict[str, dict[str, Any]]:
    """Return methods with another rank where they have one."""
    other = {"rank": rank, "always_compress": True} if rank != Extent.rank else {"rank": rank}
    return {name: dict(options) | (other if "rank" in options else {}) for name, options in methods.items()}


def kernel_common(extent: Extent) -> dict[str, Any]:
    """Return the fields of every `Setting` of the kernel's part."""
    return {"dtype": getattr(importlib.import_module("torch"), extent.dtype), **extent.common}


def shape_of(extent: Extent) -> dict[str, Any]:
    """Return the fields of the model's text config."""
    if extent.shape == "rehearsal":
        narrow: dict[str, Any] = importlib.import_module("evals.bench.gpu_model").HOST_SHAPE
        return narrow | {"num_hidden_layers": 2, "head_dim": 32}
    yaml = importlib.import_module("yaml")
    shapes: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text())
    return shapes[extent.shape]


def compile_kernels(extent: Extent, parts: Sequence[str], deadline: float) -> dict[str, Any]:
    """Compile what the other parts launch, each kind in a process of its own, into Triton's cache."""
    tasks: list[tuple[str, str]] = []
    if {"decode", "splits", "call"} & set(parts):
        tasks += [("kind", kind) for kind in extent.kinds]
    if "variants" in parts:
        tasks += [("variants", kind) for kind in extent.variants]
    if {"seal", "token", "compiled"} & set(parts):
        model = importlib.import_module("evals.bench.gpu_model")
        tasks += [("method", name) for name, options in model.METHODS.items() if "dense" not in options]
    if "host" in parts:
        tasks.append(("host", "the host's model"))
    if extent.device == "cpu":
        tasks = tasks[:1] + tasks[-1:]
    seconds: dict[str, float] = {}
    wrong: dict[str, str] = {}
    pool = get_context("spawn").Pool(extent.processes)
    try:
        running = {f"{sort} {name}": pool.apply_async(compile_task, (extent, sort, name)) for sort, name in tasks}
        for name, result in running.items():
            try:
                seconds[name] = result.get(max(0.1, deadline - time.monotonic()))
            except Exception as error:  # noqa: BLE001 - the part that needs it will say so, too
                wrong[name] = f"{type(error).__name__}: {error}"
    finally:
        pool.terminate()
    print(", ".join(f"{name} {time:.0f} s" for name, time in seconds.items()))
    return {"seconds": seconds} | ({"wrong": f"not compiled: {wrong}"} if wrong else {})


def compile_task(extent: Extent, sort: str, name: str) -> float:
    """Compile the kernels of a kind of segment, or of a method; return the seconds it took."""
    begin = time.monotonic()
    torch = importlib.import_module("torch")
    with torch.no_grad():
        model = importlib.import_module("evals.bench.gpu_model")
        if sort == "kind":
            importlib.import_module("evals.bench.gpu_kernel").compile_kind(name, kernel_common(extent))
        elif sort == "variants":
            importlib.import_module("evals.bench.gpu_kernel").compile_variants(name, kernel_common(extent))
        elif sort == "host":
            dtype = model.host_dtype(extent.device)
            model.compile_method(model.HOST_METHODS["r = 16, replayed"], model.HOST_SHAPE, extent.device, dtype)
        else:
            options = ranked(model.METHODS, extent.rank)[name]
            model.compile_method(options, shape_of(extent), extent.device, getattr(torch, extent.model_dtype))
    return time.monotonic() - begin


def hardware(device: str) -> dict[str, Any]:
    """Say what machine this is."""
    torch = importlib.import_module("torch")
    found: dict[str, Any] = {"cpu": processor(), "cores": os.cpu_count(), "system": platform.platform()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        found["gpu GiB"] = properties.total_memory / 2**30
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            found["driver, clock"] = subprocess.run(  # noqa: S603
                query, capture_output=True, text=True, check=False
            ).stdout.partition("\n")[0]
    else:
        found |= {"threads": torch.get_num_threads(), "load average": os.getloadavg()[0]}
    return found


def processor() -> str:
    """Name the processor."""
    with contextlib.suppress(OSError):
        for text in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Name the versions that figures belong to."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["cuda"] = str(importlib.import_module("torch").version.cuda)
    return found


def commit(checkout: Path = ROOT) -> str:
    """Name the commit of a checkout, this one by default, and whether files differ from it."""
    told = []
    for command in (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]):
        try:
            run = subprocess.run(  # noqa: S603
                command, cwd=checkout, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        told.append(run.stdout.strip())
    return told[0] + (", with changes" if told[1] else "")


def wrongs(found: Mapping[str, Any]) -> list[str]:
    """List what went wrong."""
    listed = []
    for part, section in found["parts"].items():
        listed += [f"{part}: {section['failed']}"] if "failed" in section else []
        listed += [f"{part}, {row['item']}: {row['wrong']}" for row in section["rows"] if "wrong" in row]
    return listed


def number(value: Any, form: str = ".1f") -> str:
    """Return a figure as a table has it; "-" for none."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return format(value, form) if known else "-"


def table(found: Mapping[str, Any]) -> str:
    """Return all figures that matter as text."""
    lines = ["", "=" * 100, ", ".join(f"{name} {value}" for name, value in found["hardware"].items())]
    lines.append(", ".join(f"{name} {value}" for name, value in found["versions"].items()))
    lines.append(f"{found['date']}, commit {found['commit']}")
    for part, section in found["parts"].items():
        lines += ["", f"{part}: {section['seconds']:.0f} of {section['budget s']:.0f} s"]
        good = [row for row in section["rows"] if "wrong" not in row or part == "tests"]
        lines += LINES[part](good)
        if section["not reached"]:
            lines.append(f"  NOT REACHED: {'; '.join(section['not reached'])}")
    listed = wrongs(found)
    lines += ["", f"WRONG: {len(listed)}" if listed else "nothing went wrong", *(f"  {one}" for one in listed)]
    return "\n".join(lines)


def compile_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"  {name}: {number(time)} s" for row in rows for name, time in row["seconds"].items()]


def test_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if "passed" in row:
            lines.append(
                f"  {row['item']}: {row['passed']} passed, {row['skipped']} skipped, {len(row['failed'])} failed"
            )
            lines += [f"  FAILED {name}: {why}" for name, why in row["failed"].items()]
            lines += [f"  {number(time)} s {name}" for name, time in row["slowest, s"].items()]
        elif "ended" in row:
            lines.append(f"  {row['item']}, out of time: {row['ended']} of {row['begun']} begun tests ended; running:")
            lines += [f"  RUNNING {name}" for name in row["stopped while running"]]
    return lines


def decode_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if "ours" not in row:
            lines.append(f"  copy {number(row['copy GB/s'], ',.0f')} GB/s, graph {number(row['smallest graph us'])} us")
            continue
        best = row["dense"].get(row["best dense"], {}).get("graph ms", math.nan)
        told = [f"{row['item']:>12}  {row['best dense']} {number(best * 1e3)} us"]
        for kind, one in row["ours"].items():
            share, gain = number(one["share of copy"], ".2f"), number(one["over best dense"], ".2f")
            told.append(f"{kind} {number(one['graph ms'] * 1e3)} ({share}, {gain}x)")
        lines.append(" | ".join(told))
    return lines


def split_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"  {row['item']}: {number(row['chosen us'])} us, {number(row['over best'], '.2f')} of the best, which has "
        f"{row['best splits']} splits"
        for row in rows
    ]


def variant_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    changed = importlib.import_module("evals.bench.block_sizes").changed
    lines = []
    for row in rows:
        own = row["candidates"][0]["sizes"]
        told = [f"{changed(one['sizes'], own)} {number(one['ms'] * 1e3)}" for one in row["candidates"]]
        lines.append(f"  {row['item']}, us: {' | '.join(told)}")
    return lines


def call_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"  {name}: {number(time, '.0f')} us" for row in rows for name, time in row["us a call"].items()]


def host_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"  {name:24} generate {number(one['generate ms']['median'], '.2f')} ms a token, "
        f"plain loop {number(one['loop ms']['median'], '.2f')}"
        for row in rows
        for name, one in row["ms a token"].items()
    ]


def seal_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if "device ms a layer" in row:
            parts = ", ".join(f"{part} {number(time * 1e3, '.0f')}" for part, time in row["device ms a layer"].items())
            wall, own = number(row["wall ms a layer"] * 1e3, ".0f"), number(row["host ms a layer"] * 1e3, ".0f")
            lines.append(f"  {row['item']}: {wall} us a layer, host {own}; device: {parts}")
        else:
            walls = ", ".join(f"{name} {number(one['median'])}" for name, one in row["wall ms"].items())
            share = number(row["share of seals"]["median"], ".1%")
            on_device = number(row["share of seals on the device"], ".1%")
            lines.append(f"  {row['item']}: {walls} ms; seals {share}, on the device {on_device}")
    return lines


def layer_seal_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    line = importlib.import_module("evals.bench.seal").seal_line
    return [f"  {line(row)}" for row in rows]


def token_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    title = f"{'ms':>8} {'GEMMs':>7} {'small':>7} {'attn.':>7} {'MiB':>8} {'gain':>6} {'bound':>6}"
    lines = [f"  {'':58}{title}"]
    for row in rows:
        if "token ms" not in row:
            lines.append(f"  {row['item']:58}{row['skipped']}")
            continue
        device = row["device ms"]
        kinds = " ".join(f"{number(device[kind], '.2f'):>7}" for kind in ("GEMMs", "small kernels", "attention"))
        lines.append(
            f"  {row['item']:58}{number(row['token ms']['median'], '.2f'):>8} {kinds} "
            f"{number(row['cache bytes'] / 2**20, ',.0f'):>8} {number(row.get('over best dense'), '.2f'):>6} "
            f"{number(row.get('bound by bytes'), '.2f'):>6} {row['decoding']}"
        )
    return lines


LINES: dict[str, Callable[[Sequence[Mapping[str, Any]]], list[str]]] = {
    "compile": compile_lines,
    "tests": test_lines,
    "decode": decode_lines,
    "splits": split_lines,
    "variants": variant_lines,
    "call": call_lines,
    "host": host_lines,
    "seal": seal_lines,
    "seals": layer_seal_lines,
    "token": token_lines,
    "compiled": token_lines,
}


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
