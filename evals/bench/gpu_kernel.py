"""The kernel's part of `evals.bench.gpu`: the decode table, numbers of splits, the host's time for a call."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from evals.bench.block_sizes import TIMED, by_clock, candidates, step_of
from evals.bench.graph_clock import GraphClock
from evals.bench.kernel_cuda import Setting, dense_cache, dense_decodes, draw, line, measure, must_move
from rotatek_kernels import decode

Item = tuple[str, Callable[[], dict[str, Any]]]
# Programs for each multiprocessor that the numbers of splits of a sweep come to, about.
LOADS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24)
FEWEST_TOKENS = 64  # of a split


def table_items(
    sizes: Sequence[tuple[int, int]], kinds: Sequence[str], common: dict[str, Any], clock: GraphClock
) -> Iterator[Item]:
    """List the rows of the decode table: batch and visual tokens against the dense decodes at hand."""
    bandwidth = functools.cache(clock.copy_bandwidth)

    def copy() -> dict[str, Any]:
        smallest = torch.zeros(1, device=common.get("device", "cuda"))
        return {
            "copy GB/s": bandwidth() / 1e9,
            "smallest graph us": clock.median_ms(clock.in_graph(smallest.zero_)) * 1e3,
        }

    def row(batch: int, tokens: int) -> dict[str, Any]:
        found = measure(Setting(batch, tokens, **common), kinds, bandwidth(), clock)
        print(line(found), flush=True)
        return found

    yield "copy", copy
    for batch, tokens in sizes:
        yield f"{batch} x {tokens:,}", functools.partial(row, batch, tokens)


@contextmanager
def forced_splits(count: int, longer_than: int) -> Iterator[None]:
    """Cut segments of more than `longer_than` tokens into `count` splits, the others into one."""
    chosen = decode.split_counts

    def split_counts(segments: Sequence[Any], *_: Any) -> list[int]:
        return [count if tokens > longer_than else 1 for tokens, *_ in segments]

    decode.split_counts = split_counts
    decode._REMEMBERED.clear()  # noqa: SLF001 - what is remembered of a shape may hold its splits
    try:
        yield
    finally:
        decode.split_counts = chosen
        decode._REMEMBERED.clear()  # noqa: SLF001


def split_numbers(processors: int, pairs: int, tokens: int) -> list[int]:
    """Choose the numbers of splits of a sweep, from half a program for each multiprocessor to many."""
    most = max(1, tokens // FEWEST_TOKENS)
    return sorted({min(most, max(1, int(processors * load / pairs))) for load in LOADS})


def split_items(
    sizes: Sequence[tuple[int, int, str]], common: dict[str, Any], clock: GraphClock, most: int | None = None
) -> Iterator[Item]:
    """List the settings (batch, visual tokens, kind) whose number of splits is swept, `most` numbers of each."""
    processors = 4
    if torch.cuda.is_available():
        processors = torch.cuda.get_device_properties(0).multi_processor_count

    def row(batch: int, tokens: int, kind: str) -> dict[str, Any]:
        setting = Setting(batch, tokens, **common)
        query, segments = draw(setting, kind)
        step = functools.partial(decode.decode_attention, query, segments, setting.width**-0.5)

        def microseconds() -> float:
            return clock.median_ms(clock.in_graph(step)) * 1e3

        times = {}
        for count in split_numbers(processors, batch * setting.kv_heads, tokens)[:most]:
            with forced_splits(count, setting.text):
                times[count] = microseconds()
        best = min(times, key=lambda count: (times[count] != times[count], times[count]))
        chosen = microseconds()
        print(f"{batch} x {tokens:,}, {kind}: chosen {chosen:.1f} us, best {times[best]:.1f} with {best} splits")
        return {
            "batch": batch,
            "tokens": tokens,
            "kind": kind,
            "bytes": must_move(query, segments),
            "chosen us": chosen,
            "best splits": best,
            "over best": chosen / times[best],
            "us by splits": {str(count): time for count, time in times.items()},
        }

    for batch, tokens, kind in sizes:
        yield f"{batch} x {tokens:,}, {kind}", functools.partial(row, batch, tokens, kind)


def variant_items(
    kinds: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    common: dict[str, Any],
    clock: GraphClock,
    most: int | None = None,
) -> Iterator[Item]:
    """List kinds and sizes (batch, visual tokens) for which the candidates of `block_sizes` are timed in turn."""

    def row(batch: int, tokens: int, kind: str) -> dict[str, Any]:
        (found,) = by_clock(clock, common, [(entry_of(kind), kind)], tokens, batch, most)
        return {"batch": batch, "tokens": tokens, **found}

    for batch, tokens in sizes:
        for kind in kinds:
            yield f"{batch} x {tokens:,}, {kind}", functools.partial(row, batch, tokens, kind)


def entry_of(kind: str) -> str:
    """Name the entry of `BLOCK_SIZES` of a kind of segment."""
    return next(entry for entry, shape in TIMED if shape == kind)


def compile_variants(kind: str, common: dict[str, Any], share: slice) -> None:
    """Run a share of the candidates for a kind of segment once, as `variant_items` does."""
    setting = Setting(2, 512 if common.get("device", "cuda") == "cuda" else 16, **common)
    query, segments = draw(setting, kind)
    for candidate in list(candidates(entry_of(kind)))[share]:
        step_of(candidate, query, segments, setting.width**-0.5)()


def call_items(sizes: tuple[int, int], kinds: Sequence[str], common: dict[str, Any], clock: GraphClock) -> list[Item]:
    """List the host times of one call: of sdpa, and of the kernel over each kind of segment."""
    setting = Setting(*sizes, **common)

    def row() -> dict[str, Any]:
        found = {}
        query, _ = draw(setting, kinds[0])
        keys, values = dense_cache(setting)
        attention = torch.nn.functional.scaled_dot_product_attention
        found["sdpa"] = clock.host_us(functools.partial(attention, query, keys, values, enable_gqa=True))
        for kind in kinds:
            query, segments = draw(setting, kind)
            step = functools.partial(decode.decode_attention, query, segments, setting.width**-0.5)
            found[kind] = clock.host_us(step)
        print("host time of a call, us: " + ", ".join(f"{name} {time:.0f}" for name, time in found.items()))
        return {"us a call": found}

    return [("a call", row)]


def compile_kind(kind: str, common: dict[str, Any]) -> None:
    """Run the kernel once over short segments of a kind, and over a dense cache, as the decode table does."""
    for batch in (1, 2):
        setting = Setting(batch, 512 if common.get("device", "cuda") == "cuda" else 16, **common)
        query, segments = draw(setting, kind)
        decode.decode_attention(query, segments, setting.width**-0.5)
        if kind == "r = 32":
            dense_decodes(query, *dense_cache(setting), setting.width**-0.5)["our dense GQA kernel"]()()
