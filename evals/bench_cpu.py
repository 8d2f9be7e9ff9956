"""One decoded token of one layer on the CPU, update plus attention, in torch: the cache against dense decodes.

Used by `evals.bench_kernel`.
"""

import argparse
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
from rotatek_cache.ledger import VisualLedger

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


class DenseModule(torch.nn.Module):
    """What transformers' sdpa function reads off an attention module."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def rotatek_step(keys: Tensor, values: Tensor, queries: Tensor, visual: int, rank: int) -> Step:
    """One decode step of our cache, filled with a prompt of `visual` visual tokens and some text."""
    batch, _, tokens, width = keys.shape
    ledger = VisualLedger()
    ledger.announce(0, tokens, (torch.arange(tokens, device=keys.device) < visual).expand(batch, -1))
    # Without the query weight, or the basis would not span Keys of rank r (the paper applies the eigenvectors of the
    # weighted covariance to unweighted Keys).
    kv = LayerKV(FitOptions(rank=rank, query_weight=False), ledger, 0)
    kv.append(keys, values)
    kv.observe(queries, None)

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ledger.complete(kv.length + 1, batch)
        kv.append(key, value)
        return attend(query, kv.views(None), width**-0.5, return_lse=False)[0]

    return step


def dynamic_cache_step(keys: Tensor, values: Tensor, groups: int) -> Step:
    """transformers' default: DynamicCache, then its sdpa attention function."""
    cache = DynamicCache()
    cache.update(keys, values, 0)
    module = DenseModule(groups)

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        held_keys, held_values = cache.update(key, value, 0)
        return sdpa_attention_forward(module, query, held_keys, held_values, None, scaling=query.shape[-1] ** -0.5)[0]

    return step


class Preallocated:
    """A dense cache with room for `room` more tokens, which none of the dense formulations below has to copy."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        self.length = keys.shape[2]
        self.buffers = [t.new_zeros(*t.shape[:2], self.length + room, t.shape[3]) for t in (keys, values)]
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
    """torch's sdpa with enable_gqa on a preallocated dense cache."""

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(query, *cache.append(key, value), enable_gqa=True)
        return out.transpose(1, 2)

    return step


def matmul_step(cache: Preallocated, *, keys_left: bool) -> Step:
    """Batched matmuls over KV heads on a preallocated dense cache: each Key is read once for its GQA group.

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
    """Keys of rank `args.rank` around a mean, Values and queries of a prompt."""
    generator = torch.Generator().manual_seed(args.seed)
    tokens = args.visual + args.text

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inner = normal(args.batch, args.kv_heads, tokens, args.rank)
    keys = inner @ normal(args.batch, args.kv_heads, args.rank, args.width) / args.rank**0.5
    keys = keys + normal(args.batch, args.kv_heads, 1, args.width)
    values = normal(args.batch, args.kv_heads, tokens, args.width)
    queries = normal(args.batch, args.q_heads, tokens, args.width)
    return keys, values, queries


def measure(args: argparse.Namespace) -> dict:
    """Check the methods against one another, then time them in turn."""
    keys, values, queries = draw(args)
    room = args.rounds + 2
    methods: dict[str, Step] = {
        "rotatek": rotatek_step(keys, values, queries, args.visual, args.rank),
        "DynamicCache + sdpa": dynamic_cache_step(keys, values, args.q_heads // args.kv_heads),
        "dense, sdpa": sdpa_step(Preallocated(keys, values, room)),
        "dense, matmuls q K": matmul_step(Preallocated(keys, values, room), keys_left=False),
        "dense, matmuls K q": matmul_step(Preallocated(keys, values, room), keys_left=True),
    }

    def token() -> tuple[Tensor, Tensor, Tensor]:
        query = torch.randn(args.batch, args.q_heads, 1, args.width)
        return query, *(torch.randn(args.batch, args.kv_heads, 1, args.width) for _ in range(2))

    torch.manual_seed(args.seed)
    first = token()
    outputs = {name: step(*first) for name, step in methods.items()}
    expected = outputs["dense, matmuls q K"]
    errors = {name: float((out - expected).norm() / expected.norm()) for name, out in outputs.items()}
    wrong = {name: error for name, error in errors.items() if not error < 1e-4}
    if wrong:
        raise SystemExit(f"no speed is reported: relative errors against the dense decode are {wrong}")
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in trange(args.rounds, desc="rounds", leave=False):
        drawn = token()
        for name in random.sample(list(methods), len(methods)):  # what runs before a method is not always the same
            step = methods[name]
            begin = time.perf_counter()
            step(*drawn)
            times[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    ours = median["rotatek"]
    best = min((value, name) for name, value in median.items() if name != "rotatek")
    return {
        "milliseconds": median,
        "relative_error": errors,
        "over DynamicCache + sdpa": median["DynamicCache + sdpa"] / ours,
        "best dense": best[1],
        "over best dense": best[0] / ours,
    }


def cpu_name() -> str:
    """Name of the processor, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def run(args: argparse.Namespace) -> dict:
    """A step of the cache in torch against the dense ways to do it."""
    result = measure(args)
    names = ("batch", "visual", "text", "q_heads", "kv_heads", "width", "rank", "rounds", "seed")
    result["setting"] = {name: getattr(args, name) for name in names}
    result["hardware"] = f"{cpu_name()}, {torch.get_num_threads()} threads"
    result["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    for name, value in result["milliseconds"].items():
        print(f"{name:24} {value:8.3f} ms   {value / result['milliseconds']['rotatek']:5.2f}x ours")
    print(
        f"over DynamicCache + sdpa {result['over DynamicCache + sdpa']:.2f}x, "
        f"over the best dense ({result['best dense']}) {result['over best dense']:.2f}x"
    )
    return result
