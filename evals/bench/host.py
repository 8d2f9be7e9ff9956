"""Time that the host takes for one call of the fused attention, in parts.

Used by `evals.bench.kernel`. On a CUDA device calls are real, and what the GPU does meanwhile is not waited for.
Without one, Triton compiles for an H200 and takes the way of a real launch up to its launcher, in whose place nothing
is called: what the launcher takes is owed. Time is that of this thread: other work on the machine counts little.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from evals.bench.kernel_cuda import Setting, draw
from rotatek_kernels import cpu_library, decode, decode_cpu
from rotatek_kernels.checks import arguments_key
from rotatek_kernels.occupancy import H200
from rotatek_kernels.resources import pretend

ROUNDS, CALLS = 15, 100


def microseconds(step: Callable[[], Any], calls: int = CALLS) -> float:
    """Time a step: the median over rounds of the mean of `calls` calls."""
    times = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        for _ in range(calls):
            step()
        times.append((time.thread_time() - begin) / calls * 1e6)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return statistics.median(times)


def parts(setting: Setting, kind: str) -> dict[str, float]:
    """Measure a call of the Triton kernel and its parts, on the device of the setting."""
    query, segments = draw(setting, kind)
    scale = setting.width**-0.5
    decode.decode_attention(query, segments, scale)  # compiles
    prepared = decode._prepare(query, segments, None)  # noqa: SLF001 - the parts of a call
    shapes, slots = prepared.shapes, prepared.slots
    assert shapes is not None
    assert slots is not None
    launches, _, _ = decode.plan(shapes, query, segments, scale, slots)

    def triton() -> None:
        for launch in launches:
            launch.run()

    def direct() -> None:
        for launch, kernel in zip(launches, next(iter(prepared.compiled.values())), strict=True):
            kernel[launch.grid](*launch.leading, *launch.constants.values())

    longer = iter(range(setting.tokens, 1 << 29, decode.LENGTH_STEP))
    visual = decode.Load(setting.tokens, shapes.segments[0].work, shapes.segments[0].coded)
    pairs = setting.batch * setting.kv_heads
    text = decode.Load(setting.text, 4 * setting.width, coded=False)
    return {
        "call": microseconds(lambda: decode.decode_attention(query, segments, scale)),
        "of it checks": microseconds(lambda: decode._prepare(query, segments, None)),  # noqa: SLF001
        "of these the key": microseconds(lambda: arguments_key(query, segments)),
        "of it direct launches": microseconds(direct),
        "launches by Triton, which these replace": microseconds(triton),
        "splits, once in 64 tokens for all layers": microseconds(
            lambda: decode.split_counts([visual._replace(tokens=next(longer)), text], slots, pairs), calls=1
        ),
    }


def cpu_part(setting: Setting, kind: str) -> float:
    """Measure a call of the kernel for CPUs up to the library, in whose place nothing is called."""
    library = cpu_library.load()
    if library is None:
        return float("nan")
    query, segments = draw(setting, kind)
    scale = setting.width**-0.5
    load = cpu_library.load

    class Nothing:
        @staticmethod
        def rotatek_attend(_: int) -> int:
            return 0

    try:
        cpu_library.load = lambda: Nothing  # type: ignore[assignment, return-value, misc]
        return microseconds(lambda: decode_cpu.decode_attention(query, segments, scale))
    finally:
        cpu_library.load = load


def run(*, batch: int = 1, tokens: int = 4096) -> dict[str, Any]:
    """Measure and print; `TRITON_INTERPRET` must not be set."""
    if decode.INTERPRETED:
        raise SystemExit(
            f"--device host times compiled kernels: unset TRITON_INTERPRET={os.environ['TRITON_INTERPRET']}"
        )
    result: dict[str, Any] = {}
    cuda = torch.cuda.is_available()
    setting = Setting(batch, tokens, device="cuda" if cuda else "cpu")
    for kind in ("r = 32", "4 bit"):
        if cuda:
            result[kind] = parts(setting, kind)
        else:
            reason, processor = decode._launch_reason, decode._processor  # noqa: SLF001 - a GPU that is not there
            decode._launch_reason, decode._processor = lambda *_: None, lambda _: H200  # type: ignore[assignment] # noqa: SLF001
            try:
                with pretend("sm_90"):
                    result[kind] = parts(setting, kind)
            finally:
                decode._launch_reason, decode._processor = reason, processor  # noqa: SLF001
        result[kind]["C++ kernel, up to the library"] = cpu_part(Setting(batch, tokens, device="cpu"), kind)
        print(f"{kind}, {'on a GPU' if cuda else 'without a GPU: launchers do nothing'}")
        for name, time_taken in result[kind].items():
            print(f"  {name:42}{time_taken:8.1f} us")
    return {"host": result}
