"""The fused kernels compile for the GPUs they are meant for, without spills; no GPU is needed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Triton reads TRITON_INTERPRET once a process, and other tests may have set it: all of this happens in children.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")])

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(code: str, *arguments: str) -> str:
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr[-6000:]
    return child.stdout


PLAN = """
import dataclasses, json, sys

import torch

from rotatek_cache.core.quantization import CodeLayout, HeadCodes
from rotatek_kernels.resources import compile_launch, plan_of_shape, resources, segment_of_shape


def plan(width, group, dtype, visual, queries=1, text=512, mask=None, slots=False, amd=False):
    dtype = getattr(torch, dtype)
    def layout(blocks):
        return CodeLayout(tuple(map(tuple, blocks)))

    coded = {}
    for name, value in visual.items():
        if name.endswith("heads"):
            coded[name.replace("heads", "code")] = HeadCodes(tuple(map(layout, value)))
        else:
            coded[name] = layout(value) if name.endswith("code") else value
    common = dict(mask=None if mask is None else (queries, getattr(torch, mask)), slots=slots)
    segments = [segment_of_shape(8, 8, 16384, width, dtype, **coded, **common)]
    if text:
        segments.append(segment_of_shape(8, 8, text, width, dtype, **common))
    return plan_of_shape(segments, group, width, queries, amd=amd)
"""

REPORT = """
def compiled(targets, shape):
    for target in targets:
        for launch in plan(**shape, amd=target.startswith("gfx")):
            warps, found = launch.options["num_warps"], resources(launch, target)
            yield launch.kernel.__name__, target, warps, dataclasses.asdict(found)


print(json.dumps({name: list(compiled(*asked)) for name, asked in json.loads(sys.argv[1]).items()}))
"""

FOUR_BIT = {"key_code": [[4, 32]], "value_code": [[4, 32]]}
HEADS = [[[4, 16], [2, 8]], [[2, 16]], [[8, 16], [4, 24]], [[4, 24]]] * 2  # up to 28 bytes a token
SHAPES = {  # targets, arguments of `plan`
    "rank32": (
        ["sm_80", "sm_90", "sm_100", "gfx942"],
        {"width": 128, "group": 4, "dtype": "bfloat16", "visual": {"rank": 32}},
    ),
    "4-bit": (
        ["sm_80", "sm_90", "sm_100", "gfx942"],
        {"width": 128, "group": 4, "dtype": "bfloat16", "visual": FOUR_BIT},
    ),
    "8-bit-width64": (
        ["sm_80", "sm_90", "sm_100"],
        {
            "width": 64,
            "group": 4,
            "dtype": "bfloat16",
            "visual": {"key_code": [[8, 32]], "value_code": [[8, 32]]},
        },
    ),
    "2-bit": (
        ["sm_90"],
        {
            "width": 128,
            "group": 4,
            "dtype": "bfloat16",
            "visual": {"key_code": [[2, 64]], "value_code": [[2, 64]]},
        },
    ),
    "masked-rank16-width64": (
        ["sm_90"],
        {"width": 64, "group": 4, "dtype": "bfloat16", "visual": {"rank": 16}, "mask": "bool"},
    ),
    "pool-rank24-width80-group7": (
        ["sm_90"],
        {"width": 80, "group": 7, "dtype": "float16", "visual": {"rank": 24}, "slots": True},
    ),
    "pool-4-bit-keys": (
        ["sm_90"],
        {"width": 128, "group": 4, "dtype": "bfloat16", "visual": {"key_code": [[4, 32]]}, "slots": True},
    ),
    "mixed-widths": (
        ["sm_90"],
        {
            "width": 128,
            "group": 4,
            "dtype": "bfloat16",
            "visual": {"key_code": [[8, 8], [4, 24], [2, 32]], "value_code": [[4, 32], [2, 32]]},
        },
    ),
    "heads": (
        ["sm_80", "sm_90", "sm_100", "gfx942"],
        {
            "width": 128,
            "group": 4,
            "dtype": "bfloat16",
            "visual": {"key_heads": HEADS, "value_heads": HEADS},
        },
    ),
    "heads-wide": (
        ["sm_90"],
        {
            "width": 128,
            "group": 4,
            "dtype": "bfloat16",
            "visual": {"key_heads": [*HEADS[:7], [[8, 32], [4, 64]]], "value_heads": HEADS},
        },
    ),
    "heads-dense-values-masked": (
        ["sm_90"],
        {"width": 128, "group": 4, "dtype": "bfloat16", "visual": {"key_heads": HEADS}, "mask": "bool"},
    ),
    "queries-heads": (
        ["sm_90"],
        {
            "width": 128,
            "group": 4,
            "dtype": "bfloat16",
            "visual": {"key_heads": HEADS, "value_heads": HEADS},
            "queries": 64,
            "mask": "bool",
        },
    ),
    "queries-masked": (
        ["sm_90"],
        {"width": 128, "group": 4, "dtype": "bfloat16", "visual": {"rank": 32}, "queries": 64, "mask": "bool"},
    ),
    "queries-4-bit": (
        ["sm_90"],
        {"width": 128, "group": 4, "dtype": "bfloat16", "visual": FOUR_BIT, "queries": 64, "mask": "bool"},
    ),
    "float32": (["sm_90"], {"width": 128, "group": 4, "dtype": "float32", "visual": {"rank": 32}}),
    # Qwen3.5 and the sliding layers of Gemma have heads of 256 channels, full layers of Gemma 4 of 512.
    "rank128-width256": (
        ["sm_80", "sm_90", "sm_100", "gfx942"],
        {"width": 256, "group": 4, "dtype": "bfloat16", "visual": {"rank": 128}},
    ),
    "rank64-width256-group16": (["sm_90"], {"width": 256, "group": 16, "dtype": "float16", "visual": {"rank": 64}}),
    "4-bit-width256": (
        ["sm_80", "sm_90", "sm_100"],
        {
            "width": 256,
            "group": 4,
            "dtype": "bfloat16",
            "visual": {"key_code": [[4, 64]], "value_code": [[4, 64]]},
        },
    ),
    "queries-width256": (
        ["sm_80", "sm_90", "sm_100"],
        {"width": 256, "group": 4, "dtype": "bfloat16", "visual": {"rank": 128}, "queries": 64, "mask": "bool"},
    ),
    "float32-width256": (["sm_90", "sm_100"], {"width": 256, "group": 4, "dtype": "float32", "visual": {"rank": 64}}),
    "rank256-width512": (
        ["sm_80", "sm_90", "sm_100"],  # on gfx942 it spills
        {"width": 512, "group": 4, "dtype": "bfloat16", "visual": {"rank": 256}},
    ),
    "rank128-width512-group8-masked": (
        ["sm_90"],
        {"width": 512, "group": 8, "dtype": "bfloat16", "visual": {"rank": 128}, "mask": "bool"},
    ),
    "4-bit-width512": (
        ["sm_80", "sm_90", "sm_100"],
        {
            "width": 512,
            "group": 8,
            "dtype": "bfloat16",
            "visual": {"key_code": [[4, 128]], "value_code": [[4, 128]]},
        },
    ),
    "queries-width512": (
        ["sm_80", "sm_90", "sm_100"],
        {"width": 512, "group": 8, "dtype": "bfloat16", "visual": {"rank": 256}, "queries": 64, "mask": "bool"},
    ),
    "float32-width512": (["sm_90"], {"width": 512, "group": 8, "dtype": "float32", "visual": {"rank": 128}}),
}


# Instructions that move registers to memory and back.
SPILLS = {"queries-heads": 80, "heads": 4}  # "heads": on gfx942


@needs_triton
@pytest.mark.parametrize("part", range(5))
def test_compiles_without_spills(part):
    shapes = dict(list(SHAPES.items())[part::5])  # some in a child: that it starts takes as long as to compile one
    reports = json.loads(run(PLAN + REPORT, json.dumps(shapes)))
    for name, (targets, shape) in shapes.items():
        assert len(reports[name]) == 2 * len(targets)
        for kernel, target, warps, found in reports[name]:
            print(f"{name}, {kernel} {target}: {warps} warps, {found}")  # noqa: T201 - `pytest -s` reports it
            assert found["spills"] <= SPILLS.get(name, 0), (name, kernel, target, found)
            if kernel == "attend_splits":
                check_loads(name, shape, {int(size): count for size, count in found["loads"].items()})


def check_loads(name, shape, loads):
    """Stored tokens, bases and queries come 16 bytes at a time; row tables, masks and delta need not.

    Tokens of a width per head come in the largest unit that divides all widths, and their bases column by column.
    """
    masks = loads.get(1, 0)
    if any(kind.endswith("heads") for kind in shape["visual"]):
        return
    assert loads[16] > sum(count for size, count in loads.items() if size != 16) - masks, (name, loads)
    assert masks == 0 or "mask" in shape, name


COUNTED = """
segment, text = segment_of_shape(8, 8, 16384, 128, torch.bfloat16, rank=32), segment_of_shape(8, 8, 512, 128,
                                                                                            torch.bfloat16)
(launch,) = plan_of_shape([segment, text], 4, 128, counted=True)
found = dataclasses.asdict(resources(launch, "sm_90"))
(amd,) = plan_of_shape([segment, text], 4, 128, counted=True, amd=True)
print(json.dumps([found, resources(amd, "gfx942").spills, compile_launch(launch, "sm_90").asm["ptx"]]))
"""


@needs_triton
def test_the_last_program_counts_after_all_threads_have_stored_and_merges():
    found, amd_spills, code = json.loads(run(PLAN + COUNTED))
    assert max(found["spills"], amd_spills) <= 24  # of numbers that outlive the loop over tokens
    before, _, after = code.partition("atom.global.gpu.acq_rel.add")
    assert max(before.rfind("bar.sync"), before.rfind("bar.warp.sync")) > before.rfind("st.global")
    assert after.index("bar.sync") < after.index("cp.async")


# Takes the way of a real launch up to the launch itself, with a driver that claims a GPU.
GROW = """
kernels = [set(), set()]
for length in (1, 2, 15, 16, 17, 64, 257, 16384):
    launches = plan(64, 4, "bfloat16", {"rank": 16}, text=length, mask="bool")
    for made, launch in zip(kernels, launches, strict=True):
        made.add(id(compile_launch(launch, "sm_90")))
print([len(made) for made in kernels])
"""


@needs_triton
def test_text_that_grows_makes_no_new_kernel():
    assert json.loads(run(PLAN + GROW)) == [1, 1]


# A driver that launches nothing notes what Triton gives it and what a direct launch does.
DIRECT = """
import dataclasses, json

import torch
from kernel_contract import CASES, Case, draw

from rotatek_kernels import decode
from rotatek_kernels.occupancy import H200
from rotatek_kernels.resources import pretend


def plain(arguments):
    if isinstance(arguments, torch.Tensor):
        return arguments.data_ptr()
    return [plain(one) for one in arguments] if isinstance(arguments, (tuple, list)) else arguments


def launched(gpu, query, segments):
    gpu.launched = []
    decode.decode_attention(query, segments, 0.125)
    return [(grid, kernel, plain(arguments)) for grid, kernel, arguments in gpu.launched]


decode._launch_reason, decode._processor = lambda *_: None, lambda _: H200
kept = {}
outputs = decode._outputs  # the same for both ways
decode._outputs = lambda shapes, layout, query: kept.setdefault(layout.numbers, outputs(shapes, layout, query))
result = {}
with pretend("sm_90") as gpu:
    for name in ("two-images", "pool-codes", "heads-mixed-bits", "additive-mask", "queries-masked", "int8-basis"):
        query, segments = draw(CASES[name], torch.float16, torch.device("cpu"))
        text = segments[-1]
        tables = torch.cat([text.lengths[:1], text.lengths])
        assert tables[1:].data_ptr() % 16
        moved = dataclasses.replace(text, lengths=tables[1:])
        variants = {"as drawn": segments, "table not aligned": [*segments[:-1], moved]}
        if text.mask is None:
            variants["longer"] = [*segments[:-1], dataclasses.replace(text, max_length=text.max_length + 1000)]
        kernels = set()
        for variant, views in variants.items():
            by_triton = launched(gpu, query, views)
            prepared = decode._prepare(query, views, None)
            prepared.compiled.clear()
            by_triton = launched(gpu, query, views)
            direct = launched(gpu, query.clone(), views)
            again = launched(gpu, query, views)
            result[f"{name}, {variant}"] = [len(by_triton), again == by_triton, direct == by_triton]
            kernels.update(prepared.compiled)
        result[name] = len(kernels)
print(json.dumps(result))
"""


@needs_triton
def test_a_direct_launch_gives_the_kernel_what_triton_gives_it():
    found = json.loads(run(DIRECT))
    cases = {name: count for name, count in found.items() if isinstance(count, int)}
    assert cases == dict.fromkeys(cases, 2)  # kernels: a table that is not aligned is another, longer text is not
    for name, launches in found.items():
        if name not in cases:
            # Two launches; the same with all addresses the same, and not where the query lies elsewhere.
            assert launches == [2, True, False], name


HELD = """
from rotatek_kernels.occupancy import H200, programs_held
print([
    programs_held(H200, found.registers, found.shared, launch.options["num_warps"])
    for visual in ({"rank": 32}, dict.fromkeys(("key_code", "value_code"), [[4, 32]]))
    for launch in plan(128, 4, "bfloat16", visual, text=64)[:1]
    for found in [resources(launch, "sm_90")]
])
"""


@needs_triton
def test_an_h200_holds_as_many_programs_as_splits_were_fitted_with():
    assert json.loads(run(PLAN + HELD)) == [3, 10]  # see `test_occupancy.py`


@needs_triton
def test_cpu_tensors_need_the_interpreter():
    message = run("""
import torch
from rotatek_cache.core.attention import attend
from rotatek_cache.core.segments import SegmentView
storage = torch.zeros(1, 4, 16)
row = torch.zeros(1, dtype=torch.int64)
try:
    attend(torch.zeros(1, 1, 1, 16), [SegmentView(storage, storage, row, row, 4)], 1.0, impl="triton")
except ValueError as error:
    print(error)
""")
    assert message.startswith("query must be on a GPU, got cpu")
    assert "TRITON_INTERPRET=1" in message


@needs_triton
@pytest.mark.parametrize(("version", "used"), [("3.5.1", False), ("3.6.0", True), ("3.10.1+git", True), ("4.0", True)])
def test_a_triton_older_than_the_kernel_was_compiled_with_is_not_used(version, used, monkeypatch):
    from rotatek_cache.core import attention

    monkeypatch.setattr(attention.importlib.metadata, "version", lambda name: version)
    assert attention._triton_is_installed.__wrapped__() is used


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


SEAL = """
import dataclasses, json, sys

import torch

from rotatek_cache.core.quantization import CodeLayout
from rotatek_cache.core.seal import Fit, Places, SealJob, Shared
from rotatek_kernels import seal
from rotatek_kernels.resources import resources

torch.set_default_device("meta")


def compiled(target, width, dtype, ranks, bits, shared):
    seal._precision = lambda device: "ieee" if target.startswith("gfx") else "tf32x3"
    heads, tokens, dtype = 8, 4096, getattr(torch, dtype)
    jobs = []
    for name, rank in zip(("keys", "values"), ranks):
        code = None if bits is None else CodeLayout(((bits, rank),))
        if shared:
            ranges = () if code is None else (torch.empty(heads, rank), torch.empty(heads, rank),
                                              torch.empty(heads, width))
            basis = Shared(torch.empty(heads, width, rank, dtype=dtype), *ranges)
        else:
            basis = Fit(rank, 1.0, torch.empty(1, 4 * heads, 32, width, dtype=dtype) if name == "keys" else None)
        jobs.append(SealJob(name, torch.empty(1, heads, 5000, width, dtype=dtype), rank, basis, code))
    index = torch.empty(tokens, dtype=torch.int64)
    launches, _ = seal.plan(jobs, Places(((0, tokens),), index, index))
    return [[launch.kernel.__name__, launch.options["num_warps"], dataclasses.asdict(resources(launch, target))]
            for launch in launches]


print(json.dumps([compiled(*shape) for shape in json.loads(sys.argv[1])]))
"""

ONLINE, CODED = ["sum_moments", "solve", "encode"], ["sum_moments", "solve", "find_ranges", "find_ranges", "encode"]
SEALS = {  # target, width, dtype, ranks of Keys and Values, bits, whether the basis is given; kernels; spills
    "rank32": (["sm_90", 128, "bfloat16", [32, 64], None, False], ONLINE, 0),
    "4-bit": (["sm_90", 128, "bfloat16", [32, 32], 4, False], CODED, 0),
    "calibrated-4-bit": (["sm_90", 128, "bfloat16", [32, 32], 4, True], ["sum_moments", "encode"], 0),
    "sm_100": (["sm_100", 128, "bfloat16", [32, 32], None, False], ONLINE, 0),
    "width16": (["sm_90", 16, "float16", [8], 2, False], CODED, 0),
    "width64": (["sm_90", 64, "float16", [16], 8, False], CODED, 0),
    # A basis of 256 channels does not quite fit into the registers of a program.
    "width256": (["sm_90", 256, "bfloat16", [64], None, False], ONLINE, 400),
    "float32": (["sm_90", 128, "float32", [32], None, False], ONLINE, 0),
    "gfx942": (["gfx942", 128, "bfloat16", [32], None, False], ONLINE, 150),
}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_a_seal_compiles_into_few_launches(part):
    seals = dict(list(SEALS.items())[part::2])
    reports = json.loads(run(SEAL, json.dumps([shape for shape, _, _ in seals.values()])))
    for (name, (shape, kernels, spills)), compiled in zip(seals.items(), reports, strict=True):
        assert [kernel for kernel, _, _ in compiled] == kernels, name
        for kernel, warps, found in compiled:
            print(f"{name}, {kernel} {shape[0]}: {warps} warps, {found}")  # noqa: T201 - `pytest -s` reports it
            assert found["spills"] <= spills, (name, kernel, found)
            assert found["shared"] <= 227 << 10, (name, kernel, found)


# A driver that launches nothing notes what Triton gives it and what a direct launch does.
DIRECT_SEAL = """
import json

import torch

from rotatek_cache.core.quantization import CodeLayout
from rotatek_cache.core.seal import Fit, Places, SealJob
from rotatek_kernels import seal
from rotatek_kernels.resources import pretend


def plain(arguments):
    if isinstance(arguments, torch.Tensor):
        return arguments.data_ptr()
    return [plain(one) for one in arguments] if isinstance(arguments, (tuple, list)) else arguments


seal._precision = lambda device: "tf32x3"
kept, allocate = {}, seal._empty
states = torch.empty(2, 2, 100, 64, dtype=torch.float16)
queries, index = torch.empty(2, 4, 8, 64, dtype=torch.float16), torch.zeros(90, dtype=torch.int64)


def launched(gpu, states, tokens):
    order = iter(range(1000))
    # The same addresses for both ways.
    seal._empty = lambda shape, dtype, device: kept.setdefault((next(order), shape), allocate(shape, dtype, device))
    gpu.launched = []
    jobs = [SealJob("keys", states, 16, Fit(16, 1.0, queries), CodeLayout(((4, 16),))),
            SealJob("values", states, 16, Fit(16))]
    places = Places(((0, tokens), (tokens, 90 - tokens)), index, index)
    seal._run(seal.plan(jobs, places)[0])
    return [(grid, kernel, plain(arguments)) for grid, kernel, arguments in gpu.launched]


with pretend("sm_90") as gpu:
    found = [launched(gpu, states, 30), launched(gpu, states, 30), launched(gpu, states.clone(), 30)]
    count = len(seal._COMPILED)
    launched(gpu, states, 40)
    print(json.dumps([len(found[0]), found[1] == found[0], found[2] == found[0], count, len(seal._COMPILED)]))
"""


@needs_triton
@pytest.mark.slow
def test_a_direct_launch_of_a_seal_gives_the_kernels_what_triton_gives_them():
    # Five launches; the same with all addresses the same; other lengths make no other kernels.
    assert json.loads(run(DIRECT_SEAL)) == [5, True, False, 1, 1]
