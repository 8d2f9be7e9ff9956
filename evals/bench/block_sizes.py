"""Block sizes of the kernel, candidate by candidate, for each head width, rank and architecture.

    python -m evals.bench.block_sizes --out evals/results/kernel_block_sizes.json     # from compiled code; needs no GPU
    python -m evals.bench.kernel --device cuda --only blocks --out FILE.json     # the same candidates, timed

Without a GPU a candidate is judged by its code: registers and shared memory say how many programs share a processor and
so how many bytes are on their way, warp instructions per token how fast it can issue. A token takes the longer of the
two, and candidates that spill are out. That orders candidates; how long they take, only a clock can say.
"""

import argparse
import datetime
import functools
import itertools
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evals.bench.roofline import A100, B200, H200, Gpu, token_bytes
from rotatek_cache.core.quantization import CodeLayout, HeadCodes
from rotatek_cache.core.segments import SegmentView
from rotatek_kernels import decode
from rotatek_kernels.occupancy import H200 as H200_PROCESSOR
from rotatek_kernels.occupancy import programs_held
from rotatek_kernels.resources import Resources, plan_of_shape, resources, segment_of_shape
from rotatek_kernels.shapes import BLOCK_SIZES, BlockSizes, kind_of

GPUS = (A100, H200, B200)
LATENCY = 8e-7  # seconds that a load of a busy memory takes, about
WIDTHS = (64, 128)
MIXED = HeadCodes(tuple(CodeLayout(b) for b in [((4, 32),), ((4, 16), (2, 16)), ((2, 32),), ((8, 8), (4, 8))] * 2))
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {f"r = {rank}": {"rank": rank} for rank in (16, 32, 64)},
    "codes": {
        name: {"key_code": code, "value_code": code}
        for name, code in {
            "8 bit, 32 channels": CodeLayout(((8, 32),)),
            "4 bit, 32 channels": CodeLayout(((4, 32),)),
            "per head, to 16 bytes": MIXED,
        }.items()
    },
    "8 bit": {"8 bit, 32 channels": dict.fromkeys(("key_code", "value_code"), CodeLayout(((8, 32),)))},
    "2 bit": {"2 bit, 64 channels": dict.fromkeys(("key_code", "value_code"), CodeLayout(((2, 64),)))},
}


# Entries of `BLOCK_SIZES` and shapes of the decode benchmark whose candidates are timed.
TIMED = (("plain", "r = 16"), ("plain", "r = 32"), ("plain", "r = 64"), ("codes", "4 bit"), ("codes", "per head"))


class Candidate(NamedTuple):
    """A way to cut an attention up: block sizes, and whether the last of its programs merges (`counted`)."""

    sizes: BlockSizes
    counted: bool = False

    def differs(self) -> dict[str, Any]:
        """Return the fields of both, as results hold them."""
        return self.sizes._asdict() | {"counted": self.counted}


def candidates(kind: str) -> Iterator[Candidate]:
    """List what is tried for an entry of `BLOCK_SIZES`, its own sizes first."""
    own = BLOCK_SIZES[kind]
    yield Candidate(own)
    yield Candidate(own, counted=True)  # one launch
    yield Candidate(own._replace(projected=True))  # three
    yield Candidate(own._replace(projected=True), counted=True)
    yield from map(Candidate, other_sizes(kind))


def other_sizes(kind: str) -> Iterator[BlockSizes]:
    """List the block sizes that are tried beside those in use."""
    own = BLOCK_SIZES[kind]
    if kind == "plain":
        yield own._replace(stages=2)
        yield own._replace(tile=own.tile // 2)
        yield own._replace(tile=own.tile // 2, stages=4)
        yield own._replace(warps=8, registers=None)
        yield own._replace(warps=2, tile=own.tile // 2, registers=None)
        yield own._replace(tokens=128, tile=own.tile * 2, registers=None)
        yield own._replace(queries=8)  # numbers and rests of projected queries in one product
        yield own._replace(channels=64)  # of the decoder, in each of two loads
        yield own._replace(channels=32)
    else:
        yield own._replace(tile=own.tile // 2)
        yield own._replace(tile=own.tile * 2, stages=2)  # widths per head: as many tokens again, all registers
        yield own._replace(tokens=64)
        yield own._replace(queries=16)  # numbers and rests of projected queries in two products
        yield own._replace(channels=64)
        yield own._replace(channels=128)
        yield own._replace(warps=2)
        yield own._replace(warps=4, tokens=128, tile=own.tile * 2)


def judged(found: Resources, candidate: Candidate, block_n: int, size: int, gpu: Gpu) -> dict[str, Any]:
    """Judge a candidate by its compiled code, for tokens of `size` bytes; picoseconds a token on the whole GPU."""
    sizes = candidate.sizes
    processor = H200_PROCESSOR._replace(multiprocessors=gpu.processors, shared=gpu.shared)
    programs = programs_held(processor, found.registers, found.shared, sizes.warps)
    instructions = found.token_loop * sizes.warps / block_n
    # Copies past the registers are as many as the stages less the one in use; plain loads are one block's.
    ahead = max(1, sizes.stages - 1) if found.asynchronous else 1
    in_flight = programs * ahead * block_n * size
    wanted = gpu.bandwidth / gpu.processors * LATENCY
    by_bytes = size / gpu.bandwidth * max(1.0, wanted / max(1, in_flight))
    by_issue = instructions / gpu.issue_rate
    return {
        "sizes": candidate.differs(),
        "block": block_n,
        "registers": found.registers,
        "spills": found.spills,
        "shared": found.shared,
        "loads by bytes": found.loads,
        "asynchronous loads": found.asynchronous,
        "instructions a token": instructions,
        "programs a multiprocessor": programs,
        "KiB in flight": in_flight / 1024,
        "ps a token": max(by_bytes, by_issue) * 1e12 if programs and not found.spills else math.inf,
    }


def used(kind: str, name: str, width: int) -> bool:
    """Tell whether an entry of `BLOCK_SIZES` is that of a shape with heads of `width`."""
    query = torch.empty(1, 32, 1, width, dtype=torch.bfloat16, device="meta")
    return kind_of(query, [segment_of_shape(1, 8, 1, width, torch.bfloat16, **SHAPES[kind][name])]) == kind


def attending(launches: Sequence[decode.Launch]) -> decode.Launch:
    """Find the launch over all tokens."""
    return next(launch for launch in launches if launch.kernel is decode.attend_splits)


def by_code(kind: str, name: str, width: int, gpu: Gpu) -> dict[str, Any]:
    """Judge all candidates for a shape, and find the best of them: another than the one in use has to be 3 % better."""
    segments = [segment_of_shape(8, 8, 32768, width, torch.bfloat16, **SHAPES[kind][name])]
    text = segment_of_shape(8, 8, 512, width, torch.bfloat16)
    tried = []
    for candidate in candidates(kind):
        alone, both = (
            attending(plan_of_shape(listed, 4, width, sizes=candidate.sizes, counted=candidate.counted))
            for listed in (segments, [*segments, text])
        )
        # Registers and spills are those of the launch, in which a text segment has its part; the loop is the segment's.
        found, whole = resources(alone, gpu.target), resources(both, gpu.target)
        found = Resources(**{**asdict(whole), "token_loop": found.token_loop, "asynchronous": found.asynchronous})
        block_n = alone.arguments["FORMS"][0].block_n
        tried.append(judged(found, candidate, block_n, token_bytes(segments[0]), gpu))
    best = min(range(len(tried)), key=lambda index: (tried[index]["ps a token"] * (1.03 if index else 1.0), index))
    return {"kind": kind, "shape": name, "width": width, "target": gpu.target, "best": best, "candidates": tried}


def step_of(candidate: Candidate, query: Tensor, segments: Sequence[SegmentView], scale: float) -> Callable[[], Any]:
    """Make the decode step that a candidate stands for."""
    counters = None
    if candidate.counted:
        counters = torch.zeros(query.shape[0] * segments[0].heads, dtype=torch.int32, device=query.device)
    return functools.partial(decode.decode_attention, query, segments, scale, sizes=candidate.sizes, counters=counters)


def by_clock(
    clock: Any,
    common: dict[str, Any],
    shapes: Sequence[tuple[str, str]] = TIMED,
    tokens: int = 32768,
    batch: int = 8,
    most: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Time the same candidates, `most` of them, on the current device, for shapes that the decode benchmark draws."""
    from evals.bench.kernel_cuda import Setting, draw, ours_error  # noqa: PLC0415 (it imports a figure's library)

    setting = Setting(batch, tokens, **common)
    for kind, name in shapes:
        query, segments = draw(setting, name)
        scale = setting.width**-0.5
        row: dict[str, Any] = {"kind": kind, "shape": name, "width": setting.width, "candidates": []}
        for candidate in itertools.islice(candidates(kind), most):
            step = step_of(candidate, query, segments, scale)
            error = ours_error(query, segments, scale, step)
            # Replayed from a graph: the host takes longer to launch a small kernel than the GPU to run it.
            ms = clock.median_ms(clock.in_graph(step)) if error < 1e-2 else math.nan
            row["candidates"].append({"sizes": candidate.differs(), "relative error": error, "ms": ms})
        timed = [one["ms"] for one in row["candidates"]]
        row["best"] = min(
            range(len(timed)), key=lambda index: timed[index] if timed[index] == timed[index] else math.inf
        )
        print(
            f"{name}: {', '.join(f'{ms * 1e3:.1f}' for ms in timed)} us; best {row['candidates'][row['best']]['sizes']}"
        )
        yield row


def changed(sizes: dict[str, Any], own: dict[str, Any]) -> str:
    """Name what a candidate has otherwise than the sizes in use."""
    return ", ".join(f"{name} {value}" for name, value in sizes.items() if value != own[name]) or "as it is"


def main() -> None:
    """Compile, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--targets", nargs="+", default=[gpu.target for gpu in GPUS])
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--kinds", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    args = parser.parse_args()
    rows = []
    for gpu in (gpu for gpu in GPUS if gpu.target in args.targets):
        for kind in args.kinds:
            for name in SHAPES[kind]:
                for width in args.widths:
                    if not used(kind, name, width):
                        continue
                    row = by_code(kind, name, width, gpu)
                    rows.append(row)
                    print(f"{gpu.target} D {width} {name}: best is candidate {row['best']}")
                    for index, one in enumerate(row["candidates"]):
                        print(
                            f"  {index} {one['ps a token']:7.1f} ps, {one['instructions a token']:5.1f} instructions, "
                            f"{one['registers']} registers, {one['spills']} spills, "
                            f"{one['programs a multiprocessor']} programs, {one['KiB in flight']:.0f} KiB in flight, "
                            f"{one['sizes']}",
                            flush=True,
                        )
    if args.out:
        versions = {name: metadata.version(name) for name in ("torch", "triton")}
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        command = shlex.join(["python", "-m", "evals.bench.block_sizes", *sys.argv[1:]])
        result = {"measured": "compiled code, no clock", "command": command, "rows": rows}
        result |= {"versions": versions, "date": date}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
