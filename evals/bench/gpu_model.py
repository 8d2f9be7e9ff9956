"""The whole model's part of `evals.bench.gpu`: prefill and seal, a token of `generate`, the host's time for it."""

import functools
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from evals.bench.gpu_kernel import Item
from evals.bench.workload import (
    build,
    clock,
    draw_prompt,
    fill,
    held_bytes,
    make_cache,
    spread,
    switch_attention,
    visual_span,
)
from rotatek_cache import RotateKCache

# What the name of a kernel says of it; the first that fits.
KERNELS = {
    "attention": ("attend", "merge_splits", "flash", "fmha", "attention", "sdp"),
    "GEMMs": ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk", "::mm", "::addmm", "::bmm"),
}
SEAL_KERNELS = {
    "QR": ("geqr", "orgqr", "ormqr", "larf", "householder", "linalg_qr"),
    "Cholesky and triangular solves": ("potr", "trsm", "trsv", "cholesky", "triangular"),
    "products": ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk", "::mm", "::addmm", "::bmm", "baddbmm"),
    "copies and gathers": ("copy", "memcpy", "memset", "gather", "index", "cat", "scatter", "fill"),
}
METHODS: dict[str, dict[str, Any]] = {
    "DynamicCache, sdpa": {"dense": "dynamic"},
    "StaticCache, sdpa": {"dense": "static"},
    "dense, from a graph": {"sparsity": 0},
    "r = 32, step by step": {"rank": 32, "graphs": False},
    "r = 32, from a graph": {"rank": 32},
    "K and V r = 32, 4 bit, from a graph": {"rank": 32, "key_bits": 4, "value_sparsity": 0.75, "value_bits": 4},
    "VL-Cache, .1 of the tokens, from a graph": {"sparsity": 0, "tokens": "vl_cache:0.1"},
}
SEALED: dict[str, dict[str, Any]] = {
    "r = 32": METHODS["r = 32, from a graph"],
    "K and V r = 32, 4 bit": METHODS["K and V r = 32, 4 bit, from a graph"],
}
COMPILED: dict[str, dict[str, Any]] = {
    "StaticCache, sdpa, compiled": {"dense": "static", "compiled": True},
    "r = 32, from a graph": METHODS["r = 32, from a graph"],
    "K and V r = 32, 4 bit, from a graph": METHODS["K and V r = 32, 4 bit, from a graph"],
}
WARM_UPS = 5  # tokens; the first is run step by step, the second captures
PROFILED = 4  # tokens


@dataclass
class Model:
    """A model of a shape with random weights, made when it is first asked for.

    Attributes:
        shape: fields of its text config.
        device, dtype: where it is.
        longest: positions.
        no_graph: put nothing in the place of a captured graph, to see what the host does.
    """

    shape: Mapping[str, Any]
    device: str
    dtype: torch.dtype
    longest: int
    no_graph: bool = False

    @functools.cached_property
    def model(self) -> Any:
        """The model."""
        torch.manual_seed(0)
        return build(self.shape, self.device, self.dtype, self.longest)

    def use(self, options: Mapping[str, Any]) -> Any:
        """Return the model with the attention that a method reads its cache with."""
        model = self.model
        switch_attention(model, {name: value for name, value in options.items() if name != "compiled"})
        if self.no_graph and "dense" not in options:
            model.model._rotatek.graphs.new_graph = NoGraph  # noqa: SLF001 - as tests put a recording there
        return model

    def empty_cache(self, options: Mapping[str, Any], batch: int, context: int, text: int, tokens: int) -> Any:
        """Make the empty cache of a method."""
        visual = visual_span(batch, context, text, self.model.device)
        return make_cache(options, self.model.config, visual, -(-(context + tokens + 1) // 64) * 64)

    def weight_bytes(self) -> int:
        """Count the bytes of weights that a decode step reads: all of the text model but its table of embeddings."""
        skipped = {id(self.model.get_input_embeddings().weight)}
        skipped -= {id(self.model.get_output_embeddings().weight)}
        named = self.model.named_parameters()
        return sum(part.nbytes for name, part in named if id(part) not in skipped and "vision" not in name)


class NoGraph:
    """Nothing, in the place of a captured graph: what remains of a step is the host's part."""

    def capture(self, warm_up: Callable[[], Any], step: Callable[[], Any]) -> Any:
        """Run the step once, for its outputs."""
        return step()

    def replay(self) -> None:
        """Do nothing."""


class Ticks(LogitsProcessor):
    """Notes when each token of a `generate` has its logits, and which kernels the last few take.

    Args:
        device: of the model; on CUDA the GPU notes the time, so that the host need not wait for it.
        profiled: from which token on kernels are listed; None for never.
    """

    def __init__(self, device: torch.device, profiled: int | None = None) -> None:
        self.on_cuda = device.type == "cuda"
        self.marks: list[Any] = []
        self.profiled = profiled
        self.profile = new_profile(on_cuda=self.on_cuda)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note a token."""
        if self.on_cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self.marks.append(mark)
        else:
            self.marks.append(time.perf_counter())
        if self.profiled is not None and len(self.marks) == self.profiled:
            self._wait()
            self.profile.start()
        if self.profiled is not None and len(self.marks) == self.profiled + PROFILED:
            self._wait()
            self.profile.stop()
        return scores

    def _wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def between_ms(self, first: int, last: int) -> list[float]:
        """Return the times between tokens, from one token to another."""
        self._wait()
        pairs = list(zip(self.marks[first:last], self.marks[first + 1 : last + 1], strict=False))
        return [one.elapsed_time(other) if self.on_cuda else (other - one) * 1e3 for one, other in pairs]


def new_profile(*, on_cuda: bool) -> profile:
    """Make a profiler that lists kernels; on the CPU, operations."""
    return profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU])


def kernel_times(profiled: profile, times: float) -> dict[str, tuple[float, float]]:
    """Sum up microseconds and launches of each kernel, divided by how many `times` something was done."""
    found: dict[str, tuple[float, float]] = {}
    for event in profiled.key_averages():
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
        is_work = on_device or event.key.startswith("aten::")
        if is_work and microseconds > 0:
            spent, launches = found.get(event.key, (0.0, 0.0))
            found[event.key] = (spent + microseconds / times, launches + event.count / times)
    return found


def by_kind(
    kernels: Mapping[str, tuple[float, float]], kinds: Mapping[str, Sequence[str]], rest: str
) -> dict[str, Any]:
    """Sum up milliseconds by what the names of kernels say."""
    found = dict.fromkeys([*kinds, rest], 0.0)
    for name, (microseconds, _) in kernels.items():
        low = name.lower()
        kind = next((kind for kind, words in kinds.items() if any(word in low for word in words)), rest)
        found[kind] += microseconds / 1e3
    return found


def longest_kernels(kernels: Mapping[str, tuple[float, float]], count: int = 12) -> list[dict[str, Any]]:
    """List the kernels that take longest."""
    order = sorted(kernels, key=lambda name: -kernels[name][0])[:count]
    return [{"kernel": name[:100], "us": kernels[name][0], "launches": kernels[name][1]} for name in order]


def free(device: torch.device) -> None:
    """Give memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def settings_of(tokens: int, *, compiled: bool) -> GenerationConfig:
    """Make the settings of a greedy `generate` of so many tokens, however early it would end."""
    settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    settings.disable_compile = not compiled
    return settings


@torch.no_grad()
def generated(
    host: Model, options: Mapping[str, Any], batch: int, context: int, text: int, tokens: int
) -> tuple[dict[str, Any], Tensor]:
    """Time the tokens of `generate` over a cache filled with drawn states; return the figures and the tokens.

    No prompt is read, so that long contexts take no time and no memory but the cache's.
    """
    model = host.use(options)
    free(model.device)  # what graphs of the method before have held
    dense = "dense" in options
    compiled = bool(options.get("compiled"))
    if compiled:
        torch.compiler.reset()  # or another length would be compiled for all lengths, which is slower
    more = tokens + PROFILED + WARM_UPS
    cache = host.empty_cache(options, batch, context, text, more)
    torch.manual_seed(0)
    fill(model, cache, batch, context, text)
    ids = torch.ones(batch, context + 1, dtype=torch.long, device=model.device)
    # A dense step is told not to be compiled by the same setting that turns our graphs off.
    settings = settings_of(more, compiled=compiled or not dense)
    ticks = Ticks(model.device, WARM_UPS + tokens - 1)
    begin = clock(model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        generation_config=settings,
        logits_processor=LogitsProcessorList([ticks]),
    )
    seconds = clock(model.device) - begin
    times = spread(ticks.between_ms(WARM_UPS - 1, WARM_UPS + tokens - 2))
    kernels = kernel_times(ticks.profile, PROFILED)
    found = {
        "token ms": times,
        "device ms": by_kind(kernels, KERNELS, "small kernels"),
        "launches": sum(launches for _, launches in kernels.values()),
        "longest kernels": longest_kernels(kernels),
        "weights bytes": host.weight_bytes(),
        "cache bytes": held_bytes(cache),
        "generate s": seconds,
        "decoding": cache.decoding if isinstance(cache, RotateKCache) else "",
    }
    return found, out[:, context + 1 :].cpu()


def token_items(
    host: Model,
    methods: Mapping[str, Mapping[str, Any]],
    settings: Sequence[tuple[int, int]],
    text: int,
    tokens: int,
) -> Iterator[Item]:
    """List the methods at each setting (batch, context)."""
    texts: dict[tuple[int, int], Tensor] = {}

    def row(batch: int, context: int, name: str) -> dict[str, Any]:
        found: dict[str, Any] = {"batch": batch, "context": context, "method": name}
        try:
            figures, new = generated(host, methods[name], batch, context, text, tokens)
        except torch.OutOfMemoryError:
            return found | {"skipped": "out of memory"}
        finally:
            free(host.model.device)
        if name == "r = 32, step by step":
            texts[batch, context] = new
        if name == "r = 32, from a graph" and (batch, context) in texts:
            figures["share of tokens as step by step"] = float((new == texts.pop((batch, context))).float().mean())
        time = figures["token ms"]["median"]
        print(f"{batch} x {context:,}, {name}: token {time:.2f} ms {figures['decoding']}", flush=True)
        return found | figures

    for batch, context in settings:
        for name in methods:
            yield f"{batch} x {context:,}, {name}", functools.partial(row, batch, context, name)


def compare_tokens(rows: list[dict[str, Any]]) -> None:
    """Add to each row how often its token goes into that of the best dense method, and what bytes alone would give."""
    for row in rows:
        if "token ms" not in row:
            continue
        alike = [one for one in rows if one.get("batch") == row["batch"] and one.get("context") == row["context"]]
        dense = [one for one in alike if "token ms" in one and one["method"].startswith(("Dynamic", "Static"))]
        if not dense:
            continue
        best = min(dense, key=lambda one: one["token ms"]["median"])
        read = row["weights bytes"] + row["cache bytes"]
        row["best dense"] = best["method"]
        row["over best dense"] = best["token ms"]["median"] / row["token ms"]["median"]
        row["bound by bytes"] = (row["weights bytes"] + min(one["cache bytes"] for one in dense)) / read


@torch.no_grad()
def prefill_row(host: Model, options: Mapping[str, Any], context: int, text: int, rounds: int) -> dict[str, Any]:
    """Time prefills with and without seals in turn, and what they take of the device."""
    model = host.model
    prompt = draw_prompt(model, 1, context, text)

    def read(method: Mapping[str, Any]) -> None:
        cache = host.empty_cache(method, 1, context, text, 0)
        model(**prompt.inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)

    pair = {"dense": {"dense": "dynamic"}, "sealing": options}
    walls: dict[str, list[float]] = {name: [] for name in pair}
    device: dict[str, float] = {}
    kernels = {}
    for number in range(rounds + 2):  # the first warms up, the last is profiled
        for name, method in pair.items():
            host.use(method)
            profiled = new_profile(on_cuda=model.device.type == "cuda")
            if number == rounds + 1:
                with profiled:
                    read(method)
                    clock(model.device)
                kernels[name] = kernel_times(profiled, 1)
                device[name] = sum(time for time, _ in kernels[name].values()) / 1e3
                continue
            begin = clock(model.device)
            read(method)
            seconds = clock(model.device) - begin
            if number:
                walls[name].append(seconds * 1e3)
    shares = [(ours - dense) / ours for dense, ours in zip(walls["dense"], walls["sealing"], strict=True)]
    found = {
        "context": context,
        "wall ms": {name: spread(times) for name, times in walls.items()},
        "share of seals": spread(shares),
        "device ms": device,
        "share of seals on the device": 1 - device["dense"] / device["sealing"],
    }
    free(model.device)
    return found


def prefill_items(
    host: Model, methods: Mapping[str, Mapping[str, Any]], contexts: Sequence[int], text: int, rounds: int
) -> Iterator[Item]:
    """List the methods whose seals are timed in a prefill of each length."""

    def row(context: int, name: str) -> dict[str, Any]:
        found = prefill_row(host, methods[name], context, text, rounds)
        share, device = found["share of seals"]["median"], found["share of seals on the device"]
        print(f"prefill of {context:,}, {name}: seals take {share:.1%}, on the device {device:.1%}", flush=True)
        return {"method": name} | found

    for context in contexts:
        for name in methods:
            yield f"prefill of {context:,}, {name}", functools.partial(row, context, name)


@torch.no_grad()
def seal_row(host: Model, options: Mapping[str, Any], context: int, text: int) -> dict[str, Any]:
    """Time the seals of all layers by themselves: the host's part, the whole, and the device's by kernels."""
    model = host.use(options)
    config = model.config.get_text_config(decoder=True)
    heads, groups, width = config.num_key_value_heads, config.num_attention_heads, config.head_dim
    layers = config.num_hidden_layers
    spectrum = torch.logspace(0, -2, width, device=model.device, dtype=model.dtype)
    keys = torch.randn(1, heads, context, width, device=model.device, dtype=model.dtype) * spectrum
    values = torch.randn_like(keys)
    window = torch.randn(1, groups, 32, width, device=model.device, dtype=model.dtype)

    def seal() -> tuple[float, float]:
        cache = host.empty_cache(options, 1, context, text, 0)
        cache.learn_config(model.config)
        held = [cache.update(keys, values, layer)[0] for layer in range(layers)]
        begin = clock(model.device)
        for layer in held:
            layer.observe(window, None)
        host_seconds = time.perf_counter() - begin
        return host_seconds / layers * 1e3, (clock(model.device) - begin) / layers * 1e3

    seal()
    host_ms, whole_ms = (statistics.median(times) for times in zip(*(seal() for _ in range(3)), strict=True))
    profiled = new_profile(on_cuda=model.device.type == "cuda")
    with profiled:
        seal()
        clock(model.device)
    kernels = kernel_times(profiled, layers)
    free(model.device)
    return {
        "context": context,
        "layers": layers,
        "host ms a layer": host_ms,
        "wall ms a layer": whole_ms,
        "device ms a layer": by_kind(kernels, SEAL_KERNELS, "other small kernels"),
        "launches a layer": sum(launches for _, launches in kernels.values()),
        "longest kernels": longest_kernels(kernels),
    }


def seal_items(
    host: Model, methods: Mapping[str, Mapping[str, Any]], contexts: Sequence[int], text: int
) -> Iterator[Item]:
    """List the methods whose seals are timed by themselves, for each length."""

    def row(context: int, name: str) -> dict[str, Any]:
        found = seal_row(host, methods[name], context, text)
        parts = ", ".join(f"{part} {time * 1e3:.0f}" for part, time in found["device ms a layer"].items())
        wall, own = found["wall ms a layer"] * 1e3, found["host ms a layer"] * 1e3
        print(f"seal of {context:,}, {name}: {wall:.0f} us a layer, host {own:.0f}; device: {parts}", flush=True)
        return {"method": name} | found

    for context in contexts:
        for name in methods:
            yield f"seal of {context:,}, {name}", functools.partial(row, context, name)


HOST_SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 64,
    "vocab_size": 256,
}
HOST_METHODS: dict[str, dict[str, Any]] = {
    "DynamicCache, sdpa": {"dense": "dynamic"},
    "StaticCache, sdpa": {"dense": "static"},
    "r = 16, step by step": {"rank": 16, "graphs": False, "always_compress": True},
    "r = 16, replayed": {"rank": 16, "always_compress": True},
}


@torch.no_grad()
def loop_ms(model: Any, cache: Any, tokens: int) -> list[float]:
    """Time the steps of a plain loop of model calls, in milliseconds."""
    ids = torch.ones(1, 1, dtype=torch.long, device=model.device)
    begin, times = int(cache.get_seq_length()), []
    for number in range(tokens):
        positions = torch.full_like(ids, begin + number)
        start = clock(model.device)
        model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        times.append((clock(model.device) - start) * 1e3)
    return times


def host_dtype(device: str) -> torch.dtype:
    """Choose what the kernels of a device are made for."""
    return torch.float32 if device == "cpu" else torch.bfloat16


@torch.no_grad()
def host_row(
    device: str, methods: Mapping[str, Mapping[str, Any]], layers: int, context: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Time tokens of a model so narrow that the host decides: in `generate`, and in a plain loop of calls.

    Without a GPU nothing stands in the place of a captured graph.
    """
    shape = HOST_SHAPE | {"num_hidden_layers": layers}
    host = Model(shape, device, host_dtype(device), 2 * context + 4 * tokens, no_graph=device == "cpu")
    gathered: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for _ in range(rounds):  # all methods meet the same machine
        for name, options in methods.items():
            figures, _ = generated(host, options, 1, context, 8, tokens)
            model = host.use(options)
            cache = host.empty_cache(options, 1, context, 8, tokens + WARM_UPS)
            fill(model, cache, 1, context, 8)
            steps = loop_ms(model, cache, tokens + WARM_UPS)[WARM_UPS:]
            gathered[name].append((figures["token ms"]["median"], statistics.median(steps)))
    found = {}
    for name, times in gathered.items():
        generate, loop = (spread(column) for column in zip(*times, strict=True))
        found[name] = {"generate ms": generate, "loop ms": loop}
        print(f"host time of a token, {name}: generate {generate['median']:.2f} ms, loop {loop['median']:.2f}")
    return {
        "layers": layers,
        "context": context,
        "tokens": tokens,
        "rounds": rounds,
        "graph": "nothing in its place" if device == "cpu" else "CUDA",
        "processor": platform.processor() or platform.machine(),
        "ms a token": found,
    }


def compile_method(options: Mapping[str, Any], shape: Mapping[str, Any], device: str, dtype: torch.dtype) -> None:
    """Decode a few tokens with one layer of a shape, so that its kernels are compiled."""
    narrow = {**shape, "num_hidden_layers": 1, "vocab_size": 1024}
    context = 512 if device == "cuda" else 96
    host = Model(narrow, device, dtype, 4 * context, no_graph=device == "cpu")
    with torch.no_grad():
        generated(host, options, 1, context, 16, 2)
