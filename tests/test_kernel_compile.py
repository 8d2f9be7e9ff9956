"""The fused decode kernel compiles for the GPUs it is meant for, without spills; no GPU is needed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Triton reads TRITON_INTERPRET once a process, and other tests may have set it: all of this happens in children.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(code: str, *arguments: str) -> str:
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr[-6000:]
    return child.stdout


# Compiles what `plan` would launch, from tensors without storage, and reads the resources out of the cubin.
COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rotatek_cache.basis import KeyBasis
from rotatek_cache.segments import SegmentView
from rotatek_kernels import decode

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64",
         torch.int32: "i32", torch.uint8: "u8"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TOKENS, BATCH, HEADS = 16384, 8, 8


def plan(width, rank, group, dtype, masked, text_length=TOKENS):
    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def segment(key_width, max_length, basis=None):
        return SegmentView(
            keys=empty(HEADS, BATCH * TOKENS, key_width), values=empty(HEADS, BATCH * TOKENS, width),
            starts=empty(BATCH, dtype=torch.int64), lengths=empty(BATCH, dtype=torch.int32), max_length=max_length,
            basis=basis, basis_rows=None if basis is None else empty(BATCH, dtype=torch.int64),
            mask=empty(BATCH, 1, max_length, dtype=torch.bool) if masked else None,
        )

    directions, mean = empty(HEADS, BATCH, width, rank), empty(HEADS, BATCH, width)
    basis = KeyBasis(directions, directions, mean, mean)
    segments = [segment(rank, TOKENS, basis), segment(width, text_length)]
    return decode.plan(empty(BATCH, HEADS * group, 1, width), segments, 0.1, 132)[0]


def source(launch):
    signature, constants, hints = {}, {}, {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            hints[(parameter.num,)] = [["tt.divisibility", 16]]  # as Triton finds it at a launch
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    return ASTSource(launch.kernel, signature, constants, hints)


def resources(launch, capability):
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, option, cubin.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = {name.lower(): int(re.search(rf"{name}:(\\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    found["spills"] = len(re.findall(r"\\b(?:STL|LDL)\\b", code))
    found["shared"] = compiled.metadata.shared
    found["copies"] = len(re.findall(r"LDGSTS", code))
    found["copies of 16 bytes"] = len(re.findall(r"LDGSTS\\S*\\.128", code))
    return found
"""

REPORT = """
width, rank, group, dtype, masked, capabilities = json.loads(sys.argv[1])
launches = plan(width, rank, group, getattr(torch, dtype), masked)
print(json.dumps([[launch.kernel.__name__, sm, resources(launch, sm)] for sm in capabilities for launch in launches]))
"""

# Takes the way of a real launch up to the launch itself, with a driver that claims a GPU.
GROW = """
from triton.runtime import driver


class Driver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


driver.set_active(Driver())
kernels = [set(), set()]
for length in (1, 2, 15, 16, 17, 64, 257, 16384):
    for made, launch in zip(kernels, plan(64, 16, 4, torch.bfloat16, True, length), strict=True):
        made.add(id(launch.kernel.warmup(**launch.arguments, grid=launch.grid, **launch.options)))
print([len(made) for made in kernels])
"""

SHAPES = {  # D, r, G, dtype, masked, compute capabilities
    "width128-rank32-group4": (128, 32, 4, "bfloat16", False, (80, 90, 100)),
    "width64-rank16-group4-masked": (64, 16, 4, "bfloat16", True, (80, 90, 100)),
    "width80-rank24-group7": (80, 24, 7, "float16", False, (90,)),
    "width128-rank32-float32": (128, 32, 4, "float32", True, (90,)),
}


@needs_triton
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_compiles_without_spills(shape):
    compiled = json.loads(run(COMPILE + REPORT, json.dumps(shape)))
    assert [(kernel, sm) for kernel, sm, _ in compiled] == [
        (kernel, sm) for sm in shape[-1] for kernel in ("decode_splits", "merge_splits")
    ]
    for kernel, sm, found in compiled:
        print(f"{kernel} sm_{sm}: {found}")  # noqa: T201 - `pytest -s` reports what a kernel takes
        assert found["stack"] == found["local"] == found["spills"] == 0, (kernel, sm, found)
        # At most 168 registers a thread let three programs of four warps share a processor, as the grid assumes.
        assert found["reg"] <= 168, (kernel, sm, found)
        if kernel == "decode_splits":
            assert found["copies"] == found["copies of 16 bytes"] > 0, (kernel, sm, found)


@needs_triton
def test_text_that_grows_makes_no_new_kernel():
    assert json.loads(run(COMPILE + GROW)) == [1, 1]


@needs_triton
def test_cpu_tensors_need_the_interpreter():
    message = run("""
import torch
from rotatek_cache.attention import attend
from rotatek_cache.segments import SegmentView
storage = torch.zeros(1, 4, 16)
row = torch.zeros(1, dtype=torch.int64)
try:
    attend(torch.zeros(1, 1, 1, 16), [SegmentView(storage, storage, row, row, 4)], 1.0, impl="triton")
except ValueError as error:
    print(error)
""")
    assert message.startswith("query must be on a GPU, got cpu")
    assert "TRITON_INTERPRET=1" in message


def test_importing_the_package_imports_neither_triton_nor_torch():
    loaded = run("import sys, rotatek_kernels; print(sorted({'triton', 'torch'} & set(sys.modules)))")
    assert loaded.strip() == "[]"


@needs_triton
def test_importing_the_kernel_touches_no_cuda():
    state = run("import torch, rotatek_kernels.decode; print(torch.cuda.is_initialized())")
    assert state.strip() == "False"


def test_the_folder_is_no_package():
    # transformers probes for a package named `kernels` and would run ours in its place.
    assert not (ROOT / "kernels" / "__init__.py").exists()
