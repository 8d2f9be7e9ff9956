"""Bound a decode step on a GPU: bytes over bandwidth, warp instructions over issue rate. No GPU is needed.

Instructions are read out of the code that Triton compiles for the target, bytes out of the shapes of what is stored.
"""

import statistics
from dataclasses import astuple, dataclass

import torch

from rotatek_cache.core.quantization import CodeLayout, HeadCodes
from rotatek_cache.core.segments import SegmentView
from rotatek_kernels.forms import SegmentForm
from rotatek_kernels.resources import plan_of_shape, resources, segment_of_shape
from rotatek_kernels.shapes import HEAD_COLUMNS, digits_of_heads


@dataclass(frozen=True)
class Gpu:
    """Nominal figures of a GPU: bytes a second of its memory, multiprocessors, their clock, warp schedulers of each."""

    name: str
    target: str
    bandwidth: float
    processors: int
    clock: float
    shared: int  # bytes of shared memory of a multiprocessor
    tensor: float  # dense bf16 operations a second
    schedulers: int = 4

    @property
    def issue_rate(self) -> float:
        """Return the warp instructions a second."""
        return self.processors * self.schedulers * self.clock


A100 = Gpu("A100", "sm_80", 2.04e12, 108, 1.41e9, 164 << 10, 3.12e14)
H200 = Gpu("H200", "sm_90", 4.8e12, 132, 1.98e9, 228 << 10, 9.89e14)
B200 = Gpu("B200", "sm_100", 8e12, 148, 1.96e9, 228 << 10, 2.25e15)
CODES = CodeLayout(((4, 32),))
# As many bytes as `CODES` on average, up to 28 in one head.
HEAD_BLOCKS = (((4, 32),), ((4, 16), (2, 16)), ((2, 32),), ((8, 8), (4, 32), (2, 16)))
MIXED = HeadCodes(tuple(CodeLayout(blocks) for blocks in HEAD_BLOCKS * 2))
KINDS: dict[str, dict[str, int | CodeLayout | HeadCodes]] = {
    "dense": {},
    "r = 128": {"rank": 128},
    "r = 64": {"rank": 64},
    "r = 32": {"rank": 32},
    "r = 16": {"rank": 16},
    "K r = 32, 8 bit": {"key_code": CodeLayout(((8, 32),))},
    "K and V r = 32, 8 bit": {"key_code": CodeLayout(((8, 32),)), "value_code": CodeLayout(((8, 32),))},
    "K and V r = 32, 4 bit": {"key_code": CODES, "value_code": CODES},
    "K and V r = 64, 2 bit": {"key_code": CodeLayout(((2, 64),)), "value_code": CodeLayout(((2, 64),))},
    "K and V per head, 16 bytes": {"key_code": MIXED, "value_code": MIXED},
}


@dataclass(frozen=True)
class Bound:
    """Cost of one token of one KV head.

    Attributes:
        token_bytes: stored.
        instructions: of a warp, per token, in the loop over tokens.
        by_bytes, by_issue: seconds on the whole GPU.
    """

    token_bytes: float
    instructions: float
    by_bytes: float
    by_issue: float

    @property
    def seconds(self) -> float:
        """Return the larger of the two."""
        return max(self.by_bytes, self.by_issue)


def token_bytes(segment: SegmentView) -> float:
    """Count the bytes of the Keys and Values of one token of one head, on average."""
    total = 0.0
    for stored, code in ((segment.keys, segment.key_code), (segment.values, segment.value_code)):
        columns = sum(code.widths) / len(code.parts) if isinstance(code, HeadCodes) else stored.shape[-1]
        total += columns * stored.element_size()
    return total


def head_products(form: SegmentForm, segment: SegmentView) -> list[int]:
    """Count the matrix products of one warp that each head takes for a block of tokens, 16 x 8 numbers of 16 each.

    They follow from the digits that its bytes are read in.
    """
    parts = [0] * segment.heads
    for code in (segment.key_code, segment.value_code):
        assert isinstance(code, HeadCodes)
        for of_heads in digits_of_heads(code, HEAD_COLUMNS):
            parts = [part + (8 // digit if digit > 0 else 0) for part, digit in zip(parts, of_heads, strict=True)]
    return [part * form.block_n // 8 for part in parts]


def bound(gpu: Gpu, kind: str, *, width: int = 128, group: int = 4) -> Bound:
    """Bound a kind of segment, bf16."""
    segment = segment_of_shape(8, 8, 32768, width, torch.bfloat16, **KINDS[kind])  # type: ignore[arg-type]
    return bound_of(gpu, segment, width, group)


def layouts_bound(gpu: Gpu, *, width: int = 128, group: int = 4) -> Bound:
    """Bound the layouts of `MIXED` one by one, each as that of all heads; return the mean."""
    segments = [
        segment_of_shape(8, 8, 32768, width, torch.bfloat16, key_code=code, value_code=code)
        for code in map(CodeLayout, HEAD_BLOCKS)
    ]
    bounds = [bound_of(gpu, segment, width, group) for segment in segments]
    return Bound(*(statistics.mean(figures) for figures in zip(*map(astuple, bounds), strict=True)))


def bound_of(gpu: Gpu, segment: SegmentView, width: int, group: int) -> Bound:
    """Bound a segment, for heads of `width` channels and `group` query heads of each KV head."""
    launch = plan_of_shape([segment], group, width)[0]
    # Not counted: what projects the query, once for all tokens of a program.
    found, form = resources(launch, gpu.target), launch.arguments["FORMS"][0]
    of_block: float = found.token_loop
    if isinstance(segment.key_code, HeadCodes):
        of_block = statistics.mean(found.token_ways[products] for products in head_products(form, segment))
    instructions = of_block * launch.options["num_warps"] / form.block_n
    size = token_bytes(segment)
    return Bound(size, instructions, size / gpu.bandwidth, instructions / gpu.issue_rate)


def table(gpu: Gpu) -> str:
    """List bounds of all kinds and their ratio to the bound of dense Keys and Values, as text."""
    bounds = {kind: bound(gpu, kind) for kind in KINDS}
    bounds["  each layout in all heads"] = layouts_bound(gpu)
    dense = bounds["dense"].seconds
    lines = [
        f"{gpu.name}, nominal: {gpu.bandwidth / 1e12:g} TB/s, {gpu.processors} processors of {gpu.schedulers} warp",
        f"schedulers at {gpu.clock / 1e9:g} GHz; D 128, G 4, bf16; code for {gpu.target}; nothing here is measured",
        f"{'':28}{'bytes':>8}{'instr.':>8}{'by bytes':>10}{'by issue':>10}{'over dense':>12}{'by bytes alone':>16}",
        f"{'':28}{'/ token':>8}{'/ token':>8}{'ps':>10}{'ps':>10}",
    ]
    for kind, one in bounds.items():
        lines.append(
            f"{kind:28}{one.token_bytes:8.0f}{one.instructions:8.1f}{one.by_bytes * 1e12:10.1f}"
            f"{one.by_issue * 1e12:10.1f}{dense / one.seconds:11.2f}x{dense / one.by_bytes:15.2f}x"
        )
    return "\n".join(lines)


def fit_table(
    gpu: Gpu, *, tokens: int = 16384, heads: int = 8, group: int = 4, width: int = 128, rank: int = 32
) -> str:
    """List what the seal of one layer's Keys moves and multiplies, beside that layer's prefill, as text.

    The layer is that of a 7B or 8B model (feed-forward width 14,336). Not counted: some sixty small launches over
    ``[heads, width, rank]``, a few microseconds each.
    """
    keys, wide = tokens * heads * width * 2, tokens * heads * rank * 4
    moved = {
        "visual tokens gathered (K and V)": 4 * keys,
        "mean": keys,
        "centred": 2 * keys,
        "scatter": 2 * keys,
        "coefficients": keys + wide,
        "mean taken off, rounded": wide + wide // 2 + wide // 2,
    }
    hidden = heads * group * width
    products = 2 * tokens * (hidden * (2 * hidden + 2 * heads * width) + 3 * hidden * 14336)
    attention = 2 * tokens**2 * hidden
    scatter, encode = 2 * tokens * heads * width**2, 2 * tokens * heads * width * rank
    layer, seal = (products + attention) / gpu.tensor, sum(moved.values()) / gpu.bandwidth
    lines = [f"fit and encode of {tokens} tokens, {heads} heads, D {width}, r {rank}, bf16, on a {gpu.name}, nominal"]
    lines += [f"{name:34}{size / 2**20:8.1f} MiB {size / gpu.bandwidth * 1e6:8.1f} us" for name, size in moved.items()]
    flops = scatter + encode
    lines.append(f"{'products, on tensor cores':34}{flops / 1e9:8.1f} GFLOP{flops / gpu.tensor * 1e6:7.1f} us")
    lines.append(
        f"all bytes {seal * 1e6:.0f} us; prefill of the layer at least {layer * 1e6:.0f} us: {seal / layer:.2%}"
    )
    return "\n".join(lines)
