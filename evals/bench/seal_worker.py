"""The measurements of `evals.bench.seal`, in the process that runs them: seals of a layer by parts, and prefills.

`evals.bench.seal` starts this file, by its path, in each checkout that it compares: it may import what both have. It
reads what is asked for, a line of JSON each, and answers with a line of JSON.
"""

import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, AutoProcessor

from evals.bench.workload import build, draw_prompt, make_cache, read_prompt, switch_attention
from rotatek_cache.cache.coordinator import Coordinator
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.options import FitOptions

ROOT = Path(__file__).parents[2]
TEXT, WINDOW = 16, 32  # tokens behind the image; queries that weigh the channels
LAYERS = 3  # sealed in turn: what the first shares, and the median of the others
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


if __name__ == "__main__":
    work()
