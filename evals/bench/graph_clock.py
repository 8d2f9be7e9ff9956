"""A clock for steps on a GPU: the median of thirty runs, each after a flush of L2.

A step that is replayed from a CUDA graph takes what the GPU takes; one that is called takes what the host takes, where
that is longer. `triton.testing.do_bench` runs a step for a fixed time with a flush before each run, which for a row of
`evals.bench.kernel` adds up to 40 s; this clock gives the same medians in less than one.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evals.bench.kernel_cuda import Clock

REPEATS = 30
WARM_UPS = 3
FLUSHED = 256 << 20  # bytes, more than any L2 holds


class GraphClock(Clock):
    """Times steps on the current CUDA device."""

    def __init__(self, repeats: int = REPEATS) -> None:
        self.repeats = repeats
        self.flushed: Tensor | None = None

    def median_ms(self, step: Callable[[], Any]) -> float:
        """Time a step with a cold L2 cache, in milliseconds."""
        if self.flushed is None:
            self.flushed = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
        for _ in range(WARM_UPS):
            step()
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats)]
        for begin, end in marks:
            self.flushed.zero_()
            begin.record()
            step()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in marks)

    def host_us(self, step: Callable[[], Any], calls: int = 200) -> float:
        """Time what the host needs to hand a step over, in microseconds; the GPU is not waited for meanwhile."""
        for _ in range(WARM_UPS):
            step()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        seconds = time.perf_counter() - begin
        torch.cuda.synchronize()
        return seconds / calls * 1e6


class RehearsalClock(GraphClock):
    """Runs each step once, on any device; every time is NaN."""

    def median_ms(self, step: Callable[[], Any]) -> float:
        """Run the step; NaN."""
        step()
        return math.nan

    def host_us(self, step: Callable[[], Any], calls: int = 200) -> float:
        """Run the step; NaN."""
        step()
        return math.nan

    def in_graph(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """Return the step itself."""
        return step

    def free_bytes(self) -> int:
        """Return as much as anything takes."""
        return 1 << 62

    def copy_bandwidth(self) -> float:
        """Return NaN."""
        return math.nan
