"""The first part of `evals.bench.gpu`: all kernels of the others, compiled in parallel processes."""

import importlib
import time
from collections.abc import Sequence
from multiprocessing import get_context
from typing import Any

from evals.bench.gpu_extent import Extent, kernel_common, ranked, shape_of

VARIANT_TASKS = 4  # that share the variants of a kind


def compile_kernels(extent: Extent, parts: Sequence[str], deadline: float) -> dict[str, Any]:
    """Compile what the other parts launch, each kind in a process of its own, into Triton's cache."""
    tasks: list[tuple[str, str]] = []
    if {"decode", "splits", "call"} & set(parts):
        tasks += [("kind", kind) for kind in extent.kinds]
    if "variants" in parts:
        tasks += [("variants", f"{kind}: {part}") for kind in extent.variants for part in range(VARIANT_TASKS)]
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
            kind, _, part = name.rpartition(": ")
            kernel = importlib.import_module("evals.bench.gpu_kernel")
            kernel.compile_variants(kind, kernel_common(extent), slice(int(part), None, VARIANT_TASKS))
        elif sort == "host":
            dtype = model.host_dtype(extent.device)
            model.compile_method(model.HOST_METHODS["r = 16, replayed"], model.HOST_SHAPE, extent.device, dtype)
        else:
            options = ranked(model.METHODS, extent.rank)[name]
            model.compile_method(options, shape_of(extent), extent.device, getattr(torch, extent.model_dtype))
    return time.monotonic() - begin
