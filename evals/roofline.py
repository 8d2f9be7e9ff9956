"""What bounds a decode step on a GPU: bytes over bandwidth, warp instructions over issue rate. No GPU is needed.

Instructions are read out of the code that Triton compiles for the target, bytes out of the shapes of what is stored.
"""

from dataclasses import dataclass

import torch

from rotatek_cache.coding import CodeLayout
from rotatek_cache.segments import SegmentView
from rotatek_kernels.resources import plan_of_shape, resources, segment_of_shape


@dataclass(frozen=True)
class Gpu:
    """Nominal figures of a GPU: bytes a second of its memory, multiprocessors, their clock, warp schedulers of each."""

    name: str
    target: str
    bandwidth: float
    processors: int
    clock: float
    shared: int  # bytes of shared memory of a multiprocessor
    schedulers: int = 4

    @property
    def issue_rate(self) -> float:
        """Warp instructions a second."""
        return self.processors * self.schedulers * self.clock


A100 = Gpu("A100", "sm_80", 2.04e12, 108, 1.41e9, 164 << 10)
H200 = Gpu("H200", "sm_90", 4.8e12, 132, 1.98e9, 228 << 10)
B200 = Gpu("B200", "sm_100", 8e12, 148, 1.96e9, 228 << 10)
CODES = CodeLayout(((4, 32),))
KINDS: dict[str, dict[str, int | CodeLayout]] = {
    "dense": {},
    "r = 128": {"rank": 128},
    "r = 64": {"rank": 64},
    "r = 32": {"rank": 32},
    "r = 16": {"rank": 16},
    "K r = 32, 8 bit": {"key_code": CodeLayout(((8, 32),))},
    "K and V r = 32, 8 bit": {"key_code": CodeLayout(((8, 32),)), "value_code": CodeLayout(((8, 32),))},
    "K and V r = 32, 4 bit": {"key_code": CODES, "value_code": CODES},
    "K and V r = 64, 2 bit": {"key_code": CodeLayout(((2, 64),)), "value_code": CodeLayout(((2, 64),))},
}


@dataclass(frozen=True)
class Bound:
    """What one token of one KV head costs.

    Attributes:
        token_bytes: stored.
        instructions: of a warp, per token, in the loop over tokens.
        by_bytes, by_issue: seconds on the whole GPU.
    """

    token_bytes: int
    instructions: float
    by_bytes: float
    by_issue: float

    @property
    def seconds(self) -> float:
        """The larger of the two."""
        return max(self.by_bytes, self.by_issue)


def token_bytes(segment: SegmentView) -> int:
    """Bytes of the Keys and Values of one token of one head."""
    return sum(stored.shape[-1] * stored.element_size() for stored in (segment.keys, segment.values))


def bound(gpu: Gpu, kind: str, *, width: int = 128, group: int = 4) -> Bound:
    """The bound for a kind of segment, bf16."""
    segment = segment_of_shape(8, 8, 32768, width, torch.bfloat16, **KINDS[kind])  # type: ignore[arg-type]
    launch = plan_of_shape([segment], group, width)[0]
    # The loop over tokens is the longest; the other projects the query, once for all tokens of a program.
    loop = max(resources(launch, gpu.target).loops)
    instructions = loop * launch.options["num_warps"] / launch.arguments["FORMS"][0].block_n
    size = token_bytes(segment)
    return Bound(size, instructions, size / gpu.bandwidth, instructions / gpu.issue_rate)


def table(gpu: Gpu) -> str:
    """Bounds of all kinds and their ratio to the bound of dense Keys and Values, as text."""
    bounds = {kind: bound(gpu, kind) for kind in KINDS}
    dense = bounds["dense"].seconds
    lines = [
        f"{gpu.name}, nominal: {gpu.bandwidth / 1e12:g} TB/s, {gpu.processors} processors of {gpu.schedulers} warp",
        f"schedulers at {gpu.clock / 1e9:g} GHz; D 128, G 4, bf16; code for {gpu.target}; nothing here is measured",
        f"{'':24}{'bytes':>8}{'instr.':>8}{'by bytes':>10}{'by issue':>10}{'over dense':>12}{'by bytes alone':>16}",
        f"{'':24}{'/ token':>8}{'/ token':>8}{'ps':>10}{'ps':>10}",
    ]
    for kind, one in bounds.items():
        lines.append(
            f"{kind:24}{one.token_bytes:8d}{one.instructions:8.1f}{one.by_bytes * 1e12:10.1f}"
            f"{one.by_issue * 1e12:10.1f}{dense / one.seconds:11.2f}x{dense / one.by_bytes:15.2f}x"
        )
    return "\n".join(lines)
