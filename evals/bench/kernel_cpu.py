"""One decoded token of one layer on the CPU, update plus attention: the cache against dense decodes.

Used by `evals.bench.kernel`.
"""

import argparse
import dataclasses
import importlib.metadata
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import trange
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rotatek_cache import FitOptions, LayerKV, attend
from rotatek_cache.cache.coordinator import Coordinator
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.core.attention import Implementation
from rotatek_kernels import cpu_library

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


class DenseModule(torch.nn.Module):
    """An attention module, as far as transformers' sdpa function reads it."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def filled_layer(
    keys: Tensor, values: Tensor, queries: Tensor, visual: int, options: FitOptions
) -> tuple[VisualPositions, LayerKV]:
    """Make a layer of our cache after a prompt of `visual` visual tokens and some text."""
    batch, _, tokens, _ = keys.shape
    positions = VisualPositions()
    positions.announce(0, tokens, (torch.arange(tokens, device=keys.device) < visual).expand(batch, -1))
    kv = LayerKV(options, positions, 0)
    kv.append(keys, values)
    Coordinator(positions).observe(kv, queries, None)
    return positions, kv


def our_step(positions: VisualPositions, kv: LayerKV, impl: Implementation) -> Step:
    """Make the decode step of our cache; of a dense one, if its prompt had no visual token."""

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        positions.complete(kv.length + 1, len(query))
        kv.append(key, value)
        return attend(query, kv.views(None), query.shape[-1] ** -0.5, impl=impl, return_lse=False)[0]

    return step


def dynamic_cache_step(keys: Tensor, values: Tensor, groups: int) -> Step:
    """Make the step of transformers' default: DynamicCache, then its sdpa attention function."""
    cache = DynamicCache()
    cache.update(keys, values, 0)
    module = DenseModule(groups)

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        held_keys, held_values = cache.update(key, value, 0)
        return sdpa_attention_forward(module, query, held_keys, held_values, None, scaling=query.shape[-1] ** -0.5)[0]

    return step


class Preallocated:
    """A dense cache with space for `space` more tokens, which none of the dense formulations below has to copy."""

    def __init__(self, keys: Tensor, values: Tensor, space: int) -> None:
        self.length = keys.shape[2]
        self.buffers = [t.new_zeros(*t.shape[:2], self.length + space, t.shape[3]) for t in (keys, values)]
        for buffer, source in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, : self.length] = source

    def append(self, *states: Tensor) -> tuple[Tensor, Tensor]:
        """Take one more Key and Value; all of them so far, as views."""
        for buffer, state in zip(self.buffers, states, strict=True):
            buffer[:, :, self.length : self.length + 1] = state
        self.length += 1
        keys, values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return keys, values


def sdpa_step(cache: Preallocated) -> Step:
    """Make the step of torch's sdpa with enable_gqa on a preallocated dense cache."""

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(query, *cache.append(key, value), enable_gqa=True)
        return out.transpose(1, 2)

    return step


def matmul_step(cache: Preallocated, *, keys_left: bool) -> Step:
    """Make a step of batched matmuls over KV heads on a dense cache: each Key is read once for its GQA group.

    `keys_left` makes the Keys the left factor, which some libraries are faster at.
    """

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = (held.flatten(0, 1) for held in cache.append(key, value))
        batch, q_heads, _, width = query.shape
        grouped = (query * width**-0.5).view(len(keys), -1, width)
        scores = torch.bmm(keys, grouped.mT).mT if keys_left else torch.bmm(grouped, keys.mT)
        out = torch.bmm(scores.softmax(-1), values)
        return out.view(batch, 1, q_heads, width)

    return step


def draw(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Draw Keys of rank `args.rank` around a mean, Values and queries of a prompt."""
    generator = torch.Generator().manual_seed(args.seed)
    tokens = args.visual + args.text

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inner = normal(args.batch, args.kv_heads, tokens, args.rank)
    keys = inner @ normal(args.batch, args.kv_heads, args.rank, args.width) / args.rank**0.5
    keys = keys + normal(args.batch, args.kv_heads, 1, args.width)
    values = normal(args.batch, args.kv_heads, tokens, args.width)
    queries = normal(args.batch, args.q_heads, tokens, args.width)
    dtype = getattr(torch, args.dtype)
    return keys.to(dtype), values.to(dtype), queries.to(dtype)


def steps_of(args: argparse.Namespace) -> tuple[dict[str, Step], dict[str, Step]]:
    """Make the methods by name, and the reference in torch of those whose answer is not the dense one."""
    keys, values, queries = draw(args)
    space = args.rounds + 2
    # Without the query weight, or the basis would not span Keys of rank r (the paper applies the eigenvectors of the
    # weighted covariance to unweighted Keys).
    plain = FitOptions(rank=args.rank, basis="pca")
    # As many channels of the Values, and both in 4 bits: an eighth of the bytes of r numbers in float32.
    coded = dataclasses.replace(plain, key_bits=4, value_bits=4, value_sparsity=1 - args.rank / args.width)

    def ours(options: FitOptions, visual: int, impl: Implementation) -> Step:
        return our_step(*filled_layer(keys, values, queries, visual, options), impl)

    methods: dict[str, Step] = {
        "rotatek": ours(plain, args.visual, "auto"),
        "rotatek, 4 bit": ours(coded, args.visual, "auto"),
        "rotatek in torch": ours(plain, args.visual, "torch"),
        "dense, our kernel": ours(plain, 0, "auto"),
        "DynamicCache + sdpa": dynamic_cache_step(keys, values, args.q_heads // args.kv_heads),
        "dense, sdpa": sdpa_step(Preallocated(keys, values, space)),
        "dense, matmuls q K": matmul_step(Preallocated(keys, values, space), keys_left=False),
        "dense, matmuls K q": matmul_step(Preallocated(keys, values, space), keys_left=True),
    }
    return methods, {"rotatek, 4 bit": ours(coded, args.visual, "torch")}


OURS = ("rotatek", "rotatek, 4 bit", "rotatek in torch", "dense, our kernel")
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 3e-3}  # relative; in halves the Keys are of rank r no more


def measure(args: argparse.Namespace) -> dict:
    """Check the methods against one another, then time them in turn."""
    methods, references = steps_of(args)
    dtype = getattr(torch, args.dtype)

    def token() -> tuple[Tensor, Tensor, Tensor]:
        heads = (args.q_heads, args.kv_heads, args.kv_heads)
        query, key, value = (torch.randn(args.batch, count, 1, args.width).to(dtype) for count in heads)
        return query, key, value

    torch.manual_seed(args.seed)
    first = token()
    outputs = {name: step(*first).float() for name, step in methods.items()}
    dense = outputs["dense, sdpa"]
    expected = {name: references[name](*first).float() if name in references else dense for name in methods}
    errors = {name: float((out - expected[name]).norm() / expected[name].norm()) for name, out in outputs.items()}
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE[args.dtype]}
    if wrong:
        raise SystemExit(f"no speed is reported: relative errors against what is expected are {wrong}")
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in trange(args.rounds, desc="rounds", leave=False):
        drawn = token()
        for name in random.sample(list(methods), len(methods)):  # what runs before a method is not always the same
            step = methods[name]
            begin = time.perf_counter()
            step(*drawn)
            times[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    best = min((name for name in median if name not in OURS), key=median.__getitem__)
    return {
        "milliseconds": median,
        "relative_error": errors,
        "over DynamicCache + sdpa": median["DynamicCache + sdpa"] / median["rotatek"],
        "best dense": best,
        "over best dense": median[best] / median["rotatek"],
        "4 bit over best dense": median[best] / median["rotatek, 4 bit"],
    }


def cpu_name() -> str:
    """Name the processor, as Linux does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def run(args: argparse.Namespace) -> dict:
    """Measure a step of the cache against the dense ways to do it, and print."""
    result = measure(args)
    names = ("batch", "visual", "text", "q_heads", "kv_heads", "width", "rank", "dtype", "rounds", "seed")
    result["setting"] = {name: getattr(args, name) for name in names}
    result["kernel"] = "C++" if cpu_library.load() else "none: torch does the work of our kernel"
    result["hardware"] = f"{cpu_name()}, {torch.get_num_threads()} threads"
    result["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    for name, value in result["milliseconds"].items():
        print(f"{name:24} {value:8.3f} ms   {value / result['milliseconds']['rotatek']:5.2f}x ours")
    print(
        f"over DynamicCache + sdpa {result['over DynamicCache + sdpa']:.2f}x, over the best dense decode in torch "
        f"({result['best dense']}) {result['over best dense']:.2f}x, with 4 bit {result['4 bit over best dense']:.2f}x"
    )
    return result
