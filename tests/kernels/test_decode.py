"""The fused decode kernel against the reference: on a GPU where there is one, else in Triton's interpreter."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read while triton is imported
triton = pytest.importorskip("triton", reason="Triton is not installed")
if not CUDA:
    import triton.language  # its own helpers tell whether it was imported for the interpreter

# transformers' models import Triton; where their tests were collected first, these run in a process of their own.
TOO_LATE = not CUDA and isinstance(triton.language.sum, triton.runtime.JITFunction)

from kernel_contract import (  # noqa: E402
    BAD,
    CASES,
    Case,
    Kernel,
    assert_within_budget,
    draw,
    test_addresses_beyond_32_bits,  # noqa: F401
    test_any_strides,  # noqa: F401
    test_basis_may_be_wider_than_the_keys,  # noqa: F401
    test_beams_share_storage_and_basis,  # noqa: F401
    test_full_rank_is_dense,  # noqa: F401
    test_heads_of_their_own_are_rows,  # noqa: F401
    test_identity_basis_is_dense,  # noqa: F401
    test_order_of_segments_does_not_matter,  # noqa: F401
    test_rows_without_tokens_see_nothing,  # noqa: F401
    test_segments_without_room_see_nothing,  # noqa: F401
    test_what_is_not_a_number_is_not_hidden,  # noqa: F401
)

from rotatek_cache.core.attention import attend  # noqa: E402
from rotatek_cache.core.segments import SegmentView  # noqa: E402
from rotatek_kernels import decode, shapes  # noqa: E402
from rotatek_kernels.decode import decode_attention  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter's tl.dot is wrong on bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def kernel():
    return Kernel(decode_attention, DEVICE)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What the kernels are to write holds NaN before they run."""
    monkeypatch.setattr(
        decode, "_empty", lambda shape, dtype, device: torch.full(shape, torch.nan, dtype=dtype, device=device)
    )


@pytest.fixture
def many_splits(monkeypatch):
    """Blocks of 16 tokens, each of them a split."""
    monkeypatch.setattr(
        shapes, "BLOCK_SIZES", {kind: sizes._replace(tile=1) for kind, sizes in shapes.BLOCK_SIZES.items()}
    )
    monkeypatch.setattr(decode, "_REMEMBERED", {})
    monkeypatch.setattr(
        decode, "split_counts", lambda loads, slots, pairs: [max(1, math.ceil(load.tokens / 16)) for load in loads]
    )


def splits_of(query: torch.Tensor, segments: list[SegmentView]) -> list[int]:
    launches, _, _ = decode.plan(shapes.shapes_of(query, segments), query, segments, 1.0, 4096)
    return [(arguments.place[1] - 3) // 2 for launch in launches[:-1] for arguments in launch.arguments["segments"]]


IN_ALL_DTYPES = {
    "heads-mixed-bits",
    "width128-rank32-ragged",
    "row-with-nothing",
    "mixed-widths",
    "pool-many-queries",
    "additive-mask",
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(name, dtype) for name in CASES for dtype in DTYPES if CUDA or name in IN_ALL_DTYPES or dtype == torch.float16],
    ids=str,
)
def test_agrees_with_the_reference(case, dtype):
    case = CASES[case]
    query, segments = draw(case, dtype, DEVICE)
    assert_within_budget(decode_attention(query, segments, case.scale), query, segments, case.scale)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 130])
def test_splits_meet_at_any_boundary(tokens, many_splits):
    case = Case(((tokens, max(tokens - 16, 0)),), (130, tokens), heads=1)
    query, segments = draw(case, torch.float16, DEVICE)
    assert splits_of(query, segments) == [math.ceil(tokens / 16), 9]
    assert_within_budget(decode_attention(query, segments, case.scale), query, segments, case.scale)


def test_more_splits_than_one_block_of_the_merge(many_splits):
    case = Case(((300,), (33,)), (70,), heads=1, mask="bool")
    query, segments = draw(case, torch.float32, DEVICE)
    assert splits_of(query, segments) == [19, 3, 5]
    assert_within_budget(decode_attention(query, segments, case.scale), query, segments, case.scale)


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_a_scale_may_be_negative_or_zero(scale):
    query, segments = draw(CASES["coded-keys-plain-values"], torch.float16, DEVICE)
    assert_within_budget(decode_attention(query, segments, scale), query, segments, scale)


@pytest.mark.parametrize(
    ("case", "splits"),
    [
        ("heads-mixed-bits", "chosen"),
        ("int8-basis", "chosen"),
        ("width128-rank32-ragged", "many"),
        ("row-with-nothing", "many"),
    ],
)
def test_the_last_program_merges_in_every_replay(case, splits, request):
    if splits == "many":  # of which short rows leave some empty
        request.getfixturevalue("many_splits")
    case = CASES[case]
    query, segments = draw(case, torch.float16, DEVICE)
    needed = query.shape[0] * segments[0].heads
    counters = torch.zeros(needed + 1, dtype=torch.int32, device=DEVICE)
    state = decode_attention(query, segments, case.scale, counters=counters)
    assert_within_budget(state, query, segments, case.scale)
    assert not counters.any()
    for first, again in zip(state, decode_attention(query, segments, case.scale, counters=counters), strict=True):
        assert torch.equal(first, again)
    counters[:needed] = -1  # the last program is not the last by this count
    spoilt, _ = decode_attention(query, segments, case.scale, counters=counters)
    assert spoilt.isnan().all()


@pytest.mark.parametrize("case", ["heads-mixed-bits", "width128-rank32-ragged", "queries-masked", "int8-basis"])
def test_queries_may_be_projected_once(case):
    case = CASES[case]
    query, segments = draw(case, torch.float16, DEVICE)
    sizes = shapes.sizes_of(query, segments)._replace(projected=True)
    assert len(decode.plan(shapes.shapes_of(query, segments, sizes), query, segments, 1.0, 4)[0]) == 3
    state = decode_attention(query, segments, -case.scale, sizes=sizes)
    assert_within_budget(state, query, segments, -case.scale)


def test_several_queries_a_row_are_merged_by_a_launch_of_its_own():
    case = CASES["queries-masked"]
    query, segments = draw(case, torch.float16, DEVICE)
    counters = torch.full((1000,), 7, dtype=torch.int32, device=DEVICE)
    assert_within_budget(decode_attention(query, segments, case.scale, counters=counters), query, segments, case.scale)
    assert (counters == 7).all()


@pytest.mark.parametrize(
    ("counters", "error", "message"),
    [
        (torch.zeros(64), TypeError, r"counters must be a tensor of int32, got torch\.float32"),
        (torch.zeros(1, dtype=torch.int32), ValueError, r"at least \d+ side by side, got shape \(1,\) with strides"),
        (
            torch.zeros(64, dtype=torch.int32, device="meta"),
            ValueError,
            r"on the device of the query, c\w+(:0)?, got meta",
        ),
    ],
    ids=["dtype", "few", "device"],
)
def test_counters_that_do_not_fit_are_named(counters, error, message):
    query, segments = draw(CASES["bool-mask"], torch.float16, DEVICE)
    with pytest.raises(error, match=message):
        decode_attention(query, segments, 0.125, counters=counters)


def test_codes_an_odd_number_of_bytes_apart_go_to_torch():
    query, (visual,) = draw(CASES["codes-2-bit-no-text"], torch.float16, DEVICE)
    odd = dataclasses.replace(visual, keys=torch.nn.functional.pad(visual.keys, (0, 1))[..., :-1])
    assert r"segments[0].keys must lie an even number of bytes apart" in decode.unsupported_reason(query, [odd])


def test_attend_dispatches():
    query, segments = draw(CASES["bool-mask"], torch.float16, DEVICE)
    expected = decode_attention(query, segments, 0.125)
    for state, direct in zip(attend(query, segments, 0.125, impl="triton"), expected, strict=True):
        assert torch.equal(state, direct)


@pytest.mark.parametrize(("spoil", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(spoil, error, message, monkeypatch):
    query, (visual, text) = draw(CASES["bool-mask"], torch.float16, DEVICE)
    arguments = spoil(query, visual, text, 0.125)
    decode._prepare(query, [visual, text], None)  # what is right is remembered, and must not cover what is wrong
    monkeypatch.setattr(decode, "_run", None)  # nothing is planned, let alone launched
    with torch.enable_grad(), pytest.raises(error, match=message):
        decode_attention(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_step_never_waits_for_the_host_and_can_be_captured():
    query, segments = draw(CASES["bool-mask"], torch.bfloat16, DEVICE)
    expected_out, expected_lse = decode_attention(query, segments, 0.125)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_attention(query, segments, 0.125)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode_attention(query, segments, 0.125)
    graph.replay()
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize("case", ["codes-4-bit", "heads-mixed-bits", "two-images", "pool", "queries-masked"])
def test_a_captured_step_goes_on_as_rows_grow_on_the_device(case, launches):
    case = CASES[case]
    query, segments = draw(case, torch.bfloat16, DEVICE)
    counters = torch.zeros(1000, dtype=torch.int32, device=DEVICE) if launches == 1 else None
    grown = [segment.lengths.clone() for segment in segments]
    for segment in segments:
        segment.lengths.clamp_(max=1)
    decode_attention(query, segments, case.scale, counters=counters)  # compiles, and makes what later steps use again
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state = decode_attention(query, segments, case.scale, counters=counters)
    for step in range(1, int(max(map(torch.Tensor.max, grown))) + 1, 7):
        for segment, most in zip(segments, grown, strict=True):
            segment.lengths.copy_(most.clamp(max=step))
        query.normal_()
        graph.replay()
        for replayed, called in zip(
            state, decode_attention(query, segments, case.scale, counters=counters), strict=True
        ):
            assert torch.equal(replayed, called)
        fresh = [dataclasses.replace(segment) for segment in segments]  # without ranges read in an earlier step
        assert_within_budget(state, query, fresh, case.scale)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_launch_goes_to_the_device_of_its_tensors():
    query, segments = draw(CASES["two-images"], torch.bfloat16, DEVICE)

    def there(tensor):
        return None if tensor is None else tensor.to("cuda:1")

    moved = [
        dataclasses.replace(
            segment,
            **{name: there(getattr(segment, name)) for name in ("keys", "values", "starts", "lengths", "basis_rows")},
            basis=None if segment.basis is None else segment.basis.select(there),
        )
        for segment in segments
    ]
    expected = decode_attention(query, segments, 0.125)
    for state, one in zip(decode_attention(query.to("cuda:1"), moved, 0.125), expected, strict=True):
        assert torch.equal(state.cpu(), one.cpu())


if TOO_LATE:
    for name in [name for name in globals() if name.startswith("test_")]:
        del globals()[name]

    def test_in_a_process_of_its_own():
        arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment["TRITON_INTERPRET"] = "1"
        run = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
