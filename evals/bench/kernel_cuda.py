"""The kernel's benchmark on a CUDA device: ours against the best of the dense decodes at hand, on the same data.

Used by `evals.bench.kernel`. All that needs a CUDA device is a `Clock`; without one the same way is taken in Triton's
interpreter, and all times are NaN.
"""

import functools
import importlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from evals.bench.roofline import CODES, MIXED
from rotatek_cache.core.attention import reference_attention
from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.quantization import CodeLayout, HeadCodes
from rotatek_cache.core.segments import SegmentView
from rotatek_kernels.decode import decode_attention

Decode = Callable[[], Tensor]  # one step's output, [B, 1, H_q, D]
KINDS = ("r = 16", "r = 32", "r = 64", "r = 128", "4 bit", "per head")
# Relative error of the output's norm, against float32 on the same stored numbers.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
COPY_BYTES = 1 << 30


class Clock:
    """Times steps on the current CUDA device."""

    def median_ms(self, step: Callable[[], Any]) -> float:
        """Time a step with a cold L2 cache: the median, in milliseconds."""
        testing = importlib.import_module("triton.testing")
        return float(testing.do_bench(step, warmup=20, rep=150, return_mode="median"))

    def in_graph(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """Capture the step as a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def free_bytes(self) -> int:
        """Return the bytes of memory that are left."""
        return torch.cuda.mem_get_info()[0]

    def copy_bandwidth(self) -> float:
        """Measure the bytes a second, read and written, of a copy on the device."""
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return 2 * COPY_BYTES / (self.median_ms(lambda: target.copy_(source)) * 1e-3)


class NoClock(Clock):
    """Runs each step once; every time is NaN."""

    def median_ms(self, step: Callable[[], Any]) -> float:
        """Run the step; return NaN."""
        step()
        return math.nan

    def in_graph(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """Return the step itself."""
        return step

    def free_bytes(self) -> int:
        """Return more than anything takes."""
        return 1 << 62

    def copy_bandwidth(self) -> float:
        """Return NaN."""
        return math.nan


@dataclass(frozen=True)
class Setting:
    """Sizes of a measurement; the text is what a short question takes."""

    batch: int
    tokens: int
    q_heads: int = 32
    kv_heads: int = 8
    width: int = 128
    text: int = 64
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    seed: int = 0


def settings(batches: list[int], tokens: list[int], **common: Any) -> Iterator[Setting]:
    """List all combinations, the smaller first."""
    for batch, count in itertools.product(sorted(batches), sorted(tokens)):
        yield Setting(batch, count, **common)


def dense_bytes(setting: Setting) -> int:
    """Count the bytes of a dense cache of these sizes."""
    tokens = setting.batch * (setting.tokens + setting.text)
    return tokens * setting.kv_heads * 2 * setting.width * setting.dtype.itemsize


def _normal(setting: Setting, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(*shape, dtype=dtype or setting.dtype, device=setting.device)


def _segment(setting: Setting, tokens: int, keys: Tensor, values: Tensor, **fields: Any) -> SegmentView:
    batch = setting.batch
    return SegmentView(
        keys=keys,
        values=values,
        starts=torch.arange(batch, device=setting.device) * tokens,
        lengths=torch.full((batch,), tokens, dtype=torch.int32, device=setting.device),
        max_length=tokens,
        row_stride=tokens,
        batched=True,
        **fields,
    )


def _basis(setting: Setting, rank: int, scale: float = 1.0) -> KeyBasis:
    """Draw orthonormal directions and a mean; `scale` is a code's step."""
    shape = (setting.kv_heads, setting.batch, setting.width, rank)
    decoder = torch.linalg.qr(_normal(setting, *shape, dtype=torch.float32)).Q * scale
    return KeyBasis(B=decoder.to(setting.dtype).contiguous(), delta=_normal(setting, *shape[:3]))


def draw(setting: Setting, kind: str) -> tuple[Tensor, list[SegmentView]]:
    """Draw a query ``[B, H_q, 1, D]`` and a visual and a text segment."""
    torch.manual_seed(setting.seed)
    heads, rows, width = setting.kv_heads, setting.batch * setting.tokens, setting.width
    if kind in ("4 bit", "per head"):
        code: CodeLayout | HeadCodes = CODES
        shape: tuple[int, ...] = (heads, rows, CODES.token_bytes)
        if kind == "per head":
            code = HeadCodes((MIXED.parts * heads)[:heads])
            shape = (rows * sum(code.widths),)
        packed = [torch.randint(256, shape, dtype=torch.uint8, device=setting.device) for _ in range(2)]
        bases = [_basis(setting, code.channels, 0.2) for _ in range(2)]
        visual = _segment(
            setting,
            setting.tokens,
            *packed,
            basis=bases[0],
            value_basis=bases[1],
            key_code=code,
            value_code=code,
        )
    else:
        rank = int(kind.removeprefix("r = "))
        keys, values = _normal(setting, heads, rows, rank), _normal(setting, heads, rows, width)
        visual = _segment(setting, setting.tokens, keys, values, basis=_basis(setting, rank))
    states = [_normal(setting, heads, setting.batch * setting.text, width) for _ in range(2)]
    query = _normal(setting, setting.batch, setting.q_heads, 1, width)
    return query, [visual, _segment(setting, setting.text, *states)]


def dense_cache(setting: Setting) -> tuple[Tensor, Tensor]:
    """Draw Keys and Values ``[B, H, T, D]``, as a dense cache holds them."""
    torch.manual_seed(setting.seed + 1)
    shape = (setting.batch, setting.kv_heads, setting.tokens + setting.text, setting.width)
    return _normal(setting, *shape), _normal(setting, *shape)


def must_move(query: Tensor, segments: list[SegmentView]) -> int:
    """Count the bytes that a step reads and writes: tokens, bases, query, output."""
    read = [query, *(tensor for s in segments for tensor in (s.keys, s.values))]
    for segment in segments:
        read += [t for basis in (segment.basis, segment.value_basis) if basis is not None for t in basis.tensors()]
    return sum(tensor.numel() * tensor.element_size() for tensor in read) + query.numel() * query.element_size()


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Divide the norm of the difference by the norm."""
    return float((out.float() - expected.float()).norm() / expected.float().norm())


def ours_error(
    query: Tensor, segments: list[SegmentView], scale: float, step: Callable[[], tuple[Tensor, Tensor]] | None = None
) -> float:
    """Find the largest relative error of a row against the reference in float32, on the numbers as they are stored.

    `step` is how the kernel is called, if not as `attend` does.
    """
    out, _ = decode_attention(query, segments, scale) if step is None else step()
    worst = 0.0
    for row in {0, query.shape[0] - 1}:
        one = slice(row, row + 1)
        views = [
            replace(
                s, batched=False, starts=s.starts[one], lengths=s.lengths[one], basis_rows=s.starts.new_tensor([row])
            )
            for s in segments
        ]
        expected, _ = reference_attention(query[one].float(), views, scale)
        worst = max(worst, relative_error(out[one], expected))
    return worst


def dense_decodes(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> dict[str, Callable[[], Decode]]:
    """List makers of the dense decodes; a maker raises where its library or backend is not at hand."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def sdpa(backend: SDPBackend) -> Decode:
        def step() -> Tensor:
            with sdpa_kernel(backend):
                return attention(query, keys, values, scale=scale, enable_gqa=True).transpose(1, 2)

        return step

    def own() -> Decode:
        batch, heads, tokens, _ = keys.shape
        flat = [states.transpose(0, 1).flatten(1, 2) for states in (keys, values)]
        setting = Setting(batch, tokens, kv_heads=heads, device=str(query.device))
        segment = _segment(setting, tokens, *flat)
        return lambda: decode_attention(query, [segment], scale)[0]

    def flash_attention() -> Decode:
        with_cache = importlib.import_module("flash_attn").flash_attn_with_kvcache
        states = [query.transpose(1, 2), *(states.transpose(1, 2).contiguous() for states in (keys, values))]
        return lambda: with_cache(*states, softmax_scale=scale)

    def flash_infer() -> Decode:
        flashinfer = importlib.import_module("flashinfer")
        batch, heads, tokens, width = keys.shape
        page = 16
        pages = -(-tokens // page)
        padded = [
            torch.nn.functional.pad(states.transpose(1, 2), (0, 0, 0, 0, 0, pages * page - tokens))
            for states in (keys, values)
        ]
        pool = tuple(states.reshape(batch * pages, page, heads, width) for states in padded)
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=query.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        counts = {"dtype": torch.int32, "device": query.device}
        wrapper.plan(
            torch.arange(batch + 1, **counts) * pages,
            torch.arange(batch * pages, **counts),
            torch.full((batch,), (tokens - 1) % page + 1, **counts),
            query.shape[1],
            heads,
            width,
            page,
            q_data_type=query.dtype,
            sm_scale=scale,
        )
        return lambda: wrapper.run(query[:, :, 0], pool)[:, None]

    return {
        "sdpa, flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa, cuDNN": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
        "FlashAttention": flash_attention,
        "FlashInfer": flash_infer,
        "our dense GQA kernel": own,
    }


def dense_times(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, clock: Clock
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Time the dense decodes that run here and are right, one after the other; say why the others are left out."""
    row = slice(0, 1)
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = attention(
        query[row].float(), keys[row].float(), values[row].float(), scale=scale, enable_gqa=True
    ).transpose(1, 2)
    found: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for name, make in dense_decodes(query, keys, values, scale).items():
        try:
            step = make()
            error = relative_error(step()[row], expected)
            if error < TOLERANCE[query.dtype]:
                found[name] = times(step, clock)
            else:
                left_out[name] = f"relative error {error:.3g}"
        except Exception as problem:  # noqa: BLE001 - a library of others may fail in any way; the report says how
            left_out[name] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:160] if str(problem) else ''}"
    return found, left_out


def times(step: Callable[[], Any], clock: Clock) -> dict[str, float]:
    """Time a step called and replayed: median milliseconds."""
    return {"eager ms": clock.median_ms(step), "graph ms": clock.median_ms(clock.in_graph(step))}


def measure(setting: Setting, kinds: Sequence[str], bandwidth: float, clock: Clock) -> dict[str, Any]:
    """Measure one setting; a SystemExit where ours is wrong."""
    scale = setting.width**-0.5
    row: dict[str, Any] = {"batch": setting.batch, "tokens": setting.tokens, "dense": {}, "ours": {}}
    torch.manual_seed(setting.seed)
    query = _normal(setting, setting.batch, setting.q_heads, 1, setting.width)
    free = clock.free_bytes()
    if 2.5 * dense_bytes(setting) > free:  # libraries want a layout of their own
        row["no dense"] = f"a dense cache takes {dense_bytes(setting) / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
    else:
        row["dense"], row["left out"] = dense_times(query, *dense_cache(setting), scale, clock)
    best, row["best dense"] = min(
        ((one["graph ms"], name) for name, one in row["dense"].items()), default=(math.nan, None)
    )
    for kind in kinds:
        query, segments = draw(setting, kind)
        error = ours_error(query, segments, scale)
        if not error < TOLERANCE[setting.dtype]:
            raise SystemExit(f"no speed is reported: relative error {error:.3g} of {kind} at {setting}")
        one = times(functools.partial(decode_attention, query, segments, scale), clock)
        rate = must_move(query, segments) / (one["graph ms"] * 1e-3)
        row["ours"][kind] = {
            **one,
            "relative error": error,
            "GB/s": rate / 1e9,
            "share of copy": rate / bandwidth,
            "over best dense": best / one["graph ms"],
        }
    return row


def run(
    wanted: Iterable[Setting], kinds: Sequence[str] = KINDS, clock: Clock | None = None, minutes: float = math.inf
) -> dict[str, Any]:
    """Measure all settings, with the bandwidth of a copy in the same run; none is begun once `minutes` have passed."""
    clock = clock or Clock()
    bandwidth = clock.copy_bandwidth()
    rows: list[dict[str, Any]] = []
    not_reached: list[str] = []
    begin = time.monotonic()
    for setting in wanted:
        if time.monotonic() - begin > 60 * minutes:
            not_reached.append(f"batch {setting.batch}, {setting.tokens} tokens")
            continue
        rows.append(measure(setting, kinds, bandwidth, clock))
        print(line(rows[-1]), flush=True)
    return {"copy GB/s": bandwidth / 1e9, "rows": rows, "not reached": not_reached}


def line(row: dict[str, Any]) -> str:
    """Write what was measured of a setting as text."""
    best = row["best dense"]
    dense = row.get("no dense", "no dense decode is right here")
    if best is not None:
        dense = f"{best} {row['dense'][best]['graph ms'] * 1e3:.1f} us"
    parts = [f"batch {row['batch']:3d}  {row['tokens']:7d} tokens  {dense}"]
    for kind, one in row["ours"].items():
        share = f"{one['share of copy']:.0%} of copy"
        parts.append(f"{kind}: {one['graph ms'] * 1e3:.1f} us, {share}, {one['over best dense']:.2f}x")
    return "  |  ".join(parts)


def draw_figure(result: dict[str, Any], path: Path) -> None:
    """Draw speed over the best dense decode against visual tokens, a panel for each batch."""
    rows = [row for row in result["rows"] if row["best dense"] is not None]
    batches = sorted({row["batch"] for row in rows})
    if not batches:
        return
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["ours"]))
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(3.2 * len(batches), 3.2), layout="constrained")
        panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
        for panel, batch in zip(panels, batches, strict=True):
            own = [row for row in rows if row["batch"] == batch]
            for kind in kinds:
                panel.plot(
                    [row["tokens"] for row in own],
                    [row["ours"][kind]["over best dense"] for row in own],
                    marker="o",
                    label=kind,
                )
            panel.axhline(1, color="grey", linewidth=0.8)
            panel.set(xscale="log", title=f"batch {batch}", xlabel="visual tokens")
        panels[0].set_ylabel("times the best dense decode")
        panels[-1].legend()
        figure.savefig(path, dpi=150)


def versions() -> dict[str, str]:
    """Name hardware and versions that a figure belongs to."""
    properties = torch.cuda.get_device_properties(0)
    found = {"device": properties.name, "multiprocessors": str(properties.multi_processor_count)}
    for name in ("torch", "triton", "flashinfer", "flash_attn"):
        try:
            found[name] = str(importlib.import_module(name).__version__)
        except ImportError:
            found[name] = "not installed"
    found["cuda"] = str(torch.version.cuda)
    return found
