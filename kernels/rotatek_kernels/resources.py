"""Read out of what Triton compiles what a launch takes of a GPU; no GPU is needed."""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.quantization import CodeLayout, HeadCodes, Numbers
from rotatek_cache.core.segments import SegmentView
from rotatek_kernels.decode import Launch, plan
from rotatek_kernels.occupancy import H200
from rotatek_kernels.shapes import BlockSizes, shapes_of, sizes_of

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
REGISTERS = 162  # of a thread of the kernel over numbers on sm_90
SLOTS = 3 * H200.multiprocessors  # that an H200 holds of the kernel over numbers, for plans
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """Registers, memory and instructions of a compiled kernel.

    Attributes:
        registers: of a thread.
        spills: instructions that move registers to local memory and back (on AMD: registers spilled).
        shared: bytes of shared memory of a program.
        loads: of stored tokens and bases, by their size in bytes (asynchronous copies, where the target has them).
        loops: instructions of each innermost loop with matrix products, one warp's.
        token_loop: those of the loop over blocks of tokens: the longest that copies past the registers, or of all.
        token_ways: the most of them that are run between two of its beginnings, by how many matrix products are: where
            heads have widths of their own a program runs the products of its head alone.
        instructions: of all.
        asynchronous: whether stored tokens are copied past the registers while others are worked on.
    """

    registers: int
    spills: int
    shared: int
    loads: dict[int, int]
    loops: list[int]
    instructions: int
    asynchronous: bool = False
    token_loop: int = 0
    token_ways: dict[int, int] = field(default_factory=dict)


class _Driver:
    """A driver that claims a GPU of a kind, as far as compiling asks, and in whose launches nothing runs.

    Attributes:
        launched: grid, kernel and arguments of each launch, if that is to be kept.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.utils = self
        self.launched: list[tuple[Any, ...]] | None = None

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        """Make what Triton calls to launch a kernel."""
        del src, metadata

        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            if self.launched is not None:
                self.launched.append(((x, y, z), function, rest[4:]))  # less the metadata and hooks

        return launch

    def load_binary(self, name: str, kernel: bytes, shared: int, device: str) -> tuple[int, int, int, int, int]:
        """Give the kernel an id; its registers are those of the kernel over numbers, three of which an H200 holds."""
        del name, shared, device
        number = hash(kernel)
        return number, number, REGISTERS, 0, 1024

    def unload_module(self, module: int) -> None:
        """Unload nothing."""

    def get_device_properties(self, device: str) -> dict[str, int]:
        """Tell what Triton compares a kernel's shared memory with."""
        del device
        return {"max_shared_mem": 227 << 10}

    def get_current_device(self) -> str:
        return self.name  # kernels are kept by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]


@contextmanager
def pretend(target: str) -> Iterator[_Driver]:
    """Let Triton compile for `target`, a name in `TARGETS`, and launch nothing."""
    before = driver._active  # noqa: SLF001 - its own reset fails where there is no GPU
    pretended = _Driver(target)
    driver.set_active(pretended)
    try:
        yield pretended
    finally:
        driver._active = before  # noqa: SLF001


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile the kernel that `launch` would run on `target`, as a launch does."""
    options = dict(launch.options)
    if TARGETS[target].backend == "hip":
        options.pop("maxnreg", None)  # a launch there has none
        # Nor is the assembly of NVIDIA used.
        launch = launch._replace(
            constants={name: name != "ASSEMBLY" and value for name, value in launch.constants.items()}
        )
    with pretend(target):
        return launch._replace(options=options).compile()


def resources(launch: Launch, target: str) -> Resources:
    """Compile `launch` for `target` and read what it takes."""
    compiled = compile_launch(launch, target)
    if TARGETS[target].backend == "hip":
        return _amd(compiled.asm["amdgcn"], compiled.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as cubin:
        cubin.write(compiled.asm["cubin"])
    try:
        usage = _run("cuobjdump", "-res-usage", cubin.name)
        code = _run("nvdisasm", "-c", cubin.name)
    finally:
        Path(cubin.name).unlink()
    return _nvidia(usage, code, compiled.metadata.shared)


def _run(program: str, *arguments: str) -> str:
    command = [str(BINARIES / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 - Triton's own


def _nvidia(usage: str, code: str, shared: int) -> Resources:
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(instruction[1])
    loads: dict[int, int] = {}
    for text in instructions:
        load = re.search(r"\b(?:LDGSTS|LDG)\.(\S*)", text)
        # Row tables, lengths and single numbers of a mask are no streams; a copy past the cache (LDGSTS) always is.
        if load:
            size = next((int(bits) // 8 for bits in re.findall(r"\b(64|128)\b", load[1].replace(".", " "))), 4)
            size = 1 if "U8" in load[1] else 2 if "U16" in load[1] else size
            loads[size] = loads.get(size, 0) + 1
    targets = {index: labels[to] for index, text in enumerate(instructions) if (to := _target(text)) in labels}
    jumps = [(target, index + 1) for index, target in targets.items() if target <= index]
    loops = [
        (begin, end)
        for begin, end in jumps
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in jumps)
        and any("MMA" in text or "FFMA" in text for text in instructions[begin:end])
    ]
    copying = [(begin, end) for begin, end in loops if any("LDGSTS" in text for text in instructions[begin:end])]
    token_loop = max(copying or loops, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    return Resources(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spills=sum(bool(re.search(r"\b(?:STL|LDL)\b", text)) for text in instructions)
        + sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        shared=shared,
        loads=loads,
        loops=[end - begin for begin, end in loops],
        token_loop=token_loop[1] - token_loop[0],
        token_ways=_ways(instructions, targets, *token_loop),
        instructions=len(instructions),
        asynchronous=any("LDGSTS" in text for text in instructions),
    )


def _target(instruction: str) -> str | None:
    jump = re.search(r"BRA.*?`\((\.L_\w+)\)", instruction)
    return jump[1] if jump else None


def _ways(instructions: Sequence[str], targets: Mapping[int, int], begin: int, end: int) -> dict[int, int]:
    """Count the most instructions of a loop on any way through it, by the matrix products on the way."""
    ways: dict[int, int] = {}
    reached: dict[int, dict[int, int]] = {begin: {0: 0}}
    for index in range(begin, end):
        text, target = instructions[index], targets.get(index)
        following = [] if target is None else [target]
        if target is None or text.startswith("@"):
            following.append(index + 1)
        for products, count in reached.pop(index, {}).items():
            after = products + ("MMA" in text)
            for to in following:
                known = ways if to == begin else reached.setdefault(to, {})
                known[after] = max(known.get(after, 0), count + 1)
    return ways


def _amd(code: str, shared: int) -> Resources:
    def count(name: str) -> int:
        return sum(int(number) for number in re.findall(rf"\.{name}:\s*(\d+)", code))

    sizes = {"ubyte": 1, "sbyte": 1, "ushort": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    loads: dict[int, int] = {}
    for kind in re.findall(r"(?:global|buffer)_load_(\w+)", code):
        size = next((sizes[name] for name in (kind, kind.split("_")[0]) if name in sizes), 0)
        loads[size] = loads.get(size, 0) + 1
    return Resources(
        registers=count("vgpr_count"),
        spills=count("vgpr_spill_count") + count("sgpr_spill_count") + count("private_segment_fixed_size"),
        shared=shared,
        loads=loads,
        loops=[],
        instructions=len(re.findall(r"^\t[a-z]", code, re.MULTILINE)),
    )


def segment_of_shape(
    batch: int,
    heads: int,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    *,
    rank: int | None = None,
    key_code: CodeLayout | HeadCodes | None = None,
    value_rank: int | None = None,
    value_code: CodeLayout | HeadCodes | None = None,
    slots: bool = False,
    mask: tuple[int, torch.dtype] | None = None,
) -> SegmentView:
    """Make a segment without storage, for plans: `tokens` in each of `batch` rows.

    Args:
        batch, heads, tokens, width: its shape.
        dtype: of numbers.
        rank: of the Keys; None for dense ones, unless `key_code` says how they are packed.
        key_code: packing of the Keys.
        value_rank, value_code: the same for Values.
        slots: whether tokens are read through a table.
        mask: queries and dtype of a mask.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def stored(code: CodeLayout | HeadCodes | None, channels: int | None) -> tuple[Tensor, KeyBasis | None]:
        channels = channels if code is None else code.channels
        basis = None
        if channels is not None:
            decoder, delta = empty(heads, batch, width, channels), empty(heads, batch, width)
            basis = KeyBasis(B=decoder, delta=delta)
        if isinstance(code, HeadCodes):
            plain = isinstance(code.parts[0], Numbers)
            return empty(batch * tokens * sum(code.widths), dtype=dtype if plain else torch.uint8), basis
        if code is not None:
            return empty(heads, batch * tokens, code.token_bytes, dtype=torch.uint8), basis
        return empty(heads, batch * tokens, channels or width), basis

    keys, basis = stored(key_code, rank)
    values, value_basis = stored(value_code, value_rank)
    return SegmentView(
        keys=keys,
        values=values,
        starts=empty(batch, dtype=torch.int64),
        lengths=empty(batch, dtype=torch.int32),
        max_length=tokens,
        basis=basis,
        basis_rows=empty(batch, dtype=torch.int64) if basis or value_basis else None,
        key_code=key_code,
        value_basis=value_basis,
        value_code=value_code,
        slots=empty(batch, tokens, dtype=torch.int32) if slots else None,
        mask=None if mask is None else empty(batch, mask[0], tokens, dtype=mask[1]),
    )


def plan_of_shape(
    segments: Sequence[SegmentView],
    group: int,
    width: int,
    queries: int = 1,
    sizes: BlockSizes | None = None,
    *,
    amd: bool = False,
    counted: bool = False,
) -> list[Launch]:
    """Plan the launches over segments without storage, by a query of their dtype; `sizes` in place of the table's.

    Where ended programs are `counted`, the last merges.
    """
    heads, batch = segments[0].heads, segments[0].starts.shape[0]
    dtype = next((s.keys.dtype for s in segments if s.key_code is None), torch.bfloat16)
    query = torch.empty(batch, heads * group, queries, width, dtype=dtype, device="meta")
    sizes = sizes or sizes_of(query, segments, amd=amd)
    counters = torch.empty(batch * heads, dtype=torch.int32, device="meta") if counted else None
    return plan(shapes_of(query, segments, sizes, counted=counted), query, segments, width**-0.5, SLOTS, counters)[0]
