"""The attention kernel for CPUs against the reference, compiled for this processor and for narrower ones."""

import copy
import dataclasses
import pickle
import platform
import shlex
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_contract import (
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
from tiny_models import FAMILIES

from rotatek_cache import RotateKCache
from rotatek_cache.core import attention
from rotatek_cache.core.attention import attend, reference_attention
from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.segments import SegmentView
from rotatek_kernels import cpu_library, decode_cpu
from rotatek_kernels.decode_cpu import decode_attention

pytestmark = pytest.mark.skipif(cpu_library.find_compiler() is None, reason="needs a C++ compiler, on Linux")

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def kernel():
    return Kernel(decode_attention, CPU)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What the kernel is to write holds NaN before it runs."""
    monkeypatch.setattr(decode_cpu, "_empty", lambda shape, dtype: torch.full(shape, torch.nan, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case, dtype):
    case = CASES[case]
    query, segments = draw(case, dtype, CPU)
    assert_within_budget(decode_attention(query, segments, case.scale), query, segments, case.scale)


@pytest.mark.parametrize(("spoil", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(spoil, error, message, monkeypatch):
    query, (visual, text) = draw(CASES["bool-mask"], torch.float16, CPU)
    arguments = spoil(query, visual, text, 0.125)
    decode_attention(query, [visual, text], 0.125)  # what is right is remembered, and must not cover what is wrong
    monkeypatch.setattr(cpu_library, "load", None)  # nothing is run
    with torch.enable_grad(), pytest.raises(error, match=message):
        decode_attention(*arguments)


# name: case, what is spoilt of its first segment, what the message says
OUTSIDE = {
    "starts-negative": ("bool-mask", {"starts": [-1, 136]}, "starts and lengths .* its tokens.* 202, got -1 and 130"),
    "starts-too-far": (
        "bool-mask",
        {"starts": [3, 140]},
        "starts .* its tokens, which are 202, got 140 and 63 in row 1",
    ),
    "lengths-too-large": ("bool-mask", {"lengths": [130, 67]}, "starts and lengths .* 202, got 136 and 67 in row 1"),
    "starts-behind-slots": (
        "pool-codes",
        {"starts": [1, 3]},
        "starts .* slots of a row, which are 68, got 3 and 66 in row 1",
    ),
    "slots-negative": ("pool-codes", {"slots": -1}, r"slots must be of its tokens, \[0, 115\), got -1 to .* row 1"),
    "slots-too-far": ("pool-codes", {"slots": 115}, r"slots must be of its tokens, \[0, 115\), got .* to 115 in row 1"),
    "basis-rows-negative": ("pool-codes", {"basis_rows": [-1, 1]}, r"basis_rows .* \[0, 2\), got -1 in row 0"),
    "basis-rows-too-far": ("bool-mask", {"basis_rows": [0, 2]}, r"basis_rows .* \[0, 2\), got 2 in row 1"),
}


@pytest.mark.parametrize(("case", "spoilt", "message"), OUTSIDE.values(), ids=OUTSIDE)
def test_what_is_outside_of_storage_is_named(case, spoilt, message, kernel):
    query, (visual, text) = draw(CASES[case], torch.float32, CPU)
    fields = {name: torch.tensor(value) for name, value in spoilt.items()}
    if "slots" in spoilt:
        fields["slots"] = visual.slots.clone()
        fields["slots"][1, 66] = spoilt["slots"]
    wrong = dataclasses.replace(visual, **fields)
    with pytest.raises(ValueError, match=rf"segments\[1\]\.{message}"):
        decode_attention(query, [text, wrong], 0.125)


@pytest.mark.parametrize("case", ["no-text", "pool-codes"])
def test_nothing_is_looked_up_for_rows_without_tokens(case):
    query, segments = draw(CASES[case], torch.float32, CPU)
    lengths, rows = segments[0].lengths * torch.tensor([0, 1]), torch.tensor([0, 1])
    empty = dataclasses.replace(segments[0], lengths=lengths, basis_rows=rows)
    far = dataclasses.replace(
        empty, starts=empty.starts + torch.tensor([-(2**40), 0]), basis_rows=rows - (1 - rows) * 2**40
    )
    for state, expected in zip(
        decode_attention(query, [far], 0.125), decode_attention(query, [empty], 0.125), strict=True
    ):
        assert torch.equal(state, expected)


LENGTHS = st.lists(st.integers(0, 150), min_size=2, max_size=2).map(tuple)
EIGHTS = st.integers(1, 12).map(lambda n: 8 * n)
BLOCKS = st.dictionaries(st.sampled_from([8, 4, 2]), EIGHTS, min_size=1)
CODES = st.none() | BLOCKS.map(lambda blocks: tuple(sorted(blocks.items(), reverse=True)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_agrees_with_the_reference_in_any_shape(data):
    case = Case(
        (data.draw(LENGTHS),),
        data.draw(LENGTHS),
        heads=data.draw(st.integers(1, 3)),
        group=data.draw(st.integers(1, 9)),
        width=data.draw(EIGHTS),
        value_width=data.draw(EIGHTS),
        rank=data.draw(EIGHTS),
        queries=data.draw(st.sampled_from([1, 1, 2, 3, 40])),
        mask=data.draw(st.sampled_from([None, "bool", "additive"])),
        delta=data.draw(st.booleans()),
        key_code=data.draw(CODES),
        value_code=data.draw(CODES),
        slots=data.draw(st.booleans()),
    )
    query, segments = draw(case, data.draw(st.sampled_from(DTYPES)), CPU)
    assert_within_budget(decode_attention(query, segments, case.scale), query, segments, case.scale)


def rows_of(values: torch.Tensor, tokens: int) -> SegmentView:
    """Values ``[1, rows * tokens, D_v]``, of which each row weighs its own alike."""
    rows = values.shape[1] // tokens
    keys = values.new_zeros(1, rows * tokens, 8)
    lengths = torch.full((rows,), tokens, dtype=torch.int32)
    return SegmentView(keys, values, torch.arange(rows) * tokens, lengths, tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 8], ids=["whole-vectors", "part-of-a-vector"])
def test_every_half_precision_number_comes_through(dtype, width):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, -1, width)
    out, _ = decode_attention(numbers.new_zeros(numbers.shape[1], 1, 1, 8), [rows_of(numbers, 1)], 1.0)
    torch.testing.assert_close(out.view_as(numbers), numbers, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_outputs_are_rounded_to_the_nearest_half_precision_number(dtype):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    numbers = numbers[: len(numbers) // 64 * 64].view(1, -1, 64)
    pairs = torch.stack([numbers[:, :-1], numbers[:, 1:]], 2).flatten(1, 2)  # whose means are no such numbers
    out, _ = decode_attention(numbers.new_zeros(pairs.shape[1] // 2, 1, 1, 8), [rows_of(pairs, 2)], 1.0)
    expected = ((pairs[:, ::2].float() + pairs[:, 1::2].float()) / 2).to(dtype)
    assert torch.equal(out.view_as(expected), expected)


@pytest.mark.parametrize("queries", [1, 5])
def test_threads_change_nothing_but_the_order_of_sums(queries):
    case = Case(((9000, 3000),), (70, 9), queries=queries)  # work for more threads than are tried
    query, segments = draw(case, torch.float32, CPU)
    expected = decode_attention(query, segments, 0.125)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            assert_within_budget(decode_attention(query, segments, 0.125), query, segments, 0.125)
    finally:
        torch.set_num_threads(threads)
    with ThreadPoolExecutor(4) as pool:
        for state in pool.map(lambda _: decode_attention(query, segments, 0.125), range(40)):
            for one, other in zip(state, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.fixture(params=["x86-64-v3", "x86-64-v2"])
def _narrow(request, monkeypatch):
    """A processor with shorter vectors, whose code this one runs."""
    if platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs an x86-64 processor with AVX2")
    flags = tuple(flag.replace("=native", f"={request.param}") for flag in cpu_library.FLAGS)
    library = cpu_library.opened(cpu_library.build(cpu_library.find_compiler(), flags))
    monkeypatch.setattr(cpu_library, "load", lambda: library)


@pytest.mark.usefixtures("_narrow")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_processors_with_shorter_vectors_agree(dtype):
    for case in CASES.values():
        if case.batch < 100 and (case.text is None or max(case.text) < 1000):
            query, segments = draw(case, dtype, CPU)
            assert_within_budget(decode_attention(query, segments, case.scale), query, segments, case.scale)


def test_the_source_has_no_warnings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # GCC's own header for half precision starts a variable with itself; Clang knows but one of the names of that.
    headers = ("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option")
    as_errors = ("-Wall", "-Wextra", "-Werror", *headers)
    cpu_library.build(cpu_library.find_compiler(), (*cpu_library.FLAGS, *as_errors))


FAST = (*cpu_library.FLAGS, "-O0")  # the last one counts; compiled in a fraction of the time


def test_it_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = cpu_library.find_compiler()
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: cpu_library.build(compiler, FAST), range(2))
    made = first.stat().st_mtime_ns
    assert cpu_library.build(compiler, FAST) == first == second
    assert first.stat().st_mtime_ns == made
    assert list(first.parent.iterdir()) == [first]


@pytest.fixture(scope="module")
def whole_library(tmp_path_factory):
    """Name and content of a library as it is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("whole")))
        library = cpu_library.build(cpu_library.find_compiler(), FAST)
    return library.name, library.read_bytes()


@pytest.mark.parametrize("share", [0, 0.5, 1], ids=["empty", "half", "last-byte"])
def test_a_damaged_library_is_compiled_anew(share, whole_library, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name, whole = whole_library
    damaged = tmp_path / "rotatek" / name
    damaged.parent.mkdir()
    damaged.write_bytes(whole[: int(share * len(whole)) - (share == 1)])
    assert cpu_library.opened(cpu_library.build(cpu_library.find_compiler(), FAST)).rotatek_attend
    assert [path.read_bytes() for path in damaged.parent.iterdir()] == [whole]


def test_without_a_compiler_torch_does_the_work(monkeypatch):
    query, segments = draw(CASES["bool-mask"], torch.float32, CPU)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert cpu_library.find_compiler() is None
    monkeypatch.setattr(cpu_library, "load", cpu_library.load.__wrapped__)
    monkeypatch.setattr(attention, "_cpp_is_compiled", attention._cpp_is_compiled.__wrapped__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = attend(query, segments, 0.125)
    for one, other in zip(state, reference_attention(query, segments, 0.125), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match=r"impl='cpp' needs a C\+\+ compiler"):
        attend(query, segments, 0.125, impl="cpp")


CXX = shlex.join(cpu_library.find_compiler() or ["c++"])
COMPILES_NOTHING = f"sh -c 'for made; do :; done; echo | {CXX} -shared -x c++ - -o $made' sh"


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("c++ -include /no/such/header", "/no/such/header"),
        ("/no/such/compiler", "No such file"),
        ("false", "failed: without a message"),
        ("c++ '", 'CXX must be the command of a compiler, got "c++ \'": No closing quotation'),
        ("true", "made.so"),
        ("sh -c 'for made; do :; done; echo no library > $made' sh", "file too short"),
        (
            f"sh -c 'for made; do :; done; echo | {CXX} -shared -x c++ - -o $made' sh",
            "undefined symbol: rotatek_attend",
        ),
    ],
)
def test_a_compiler_that_fails_is_told_of(compiler, said, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(RuntimeWarning, match="could not be compiled.*torch does its work") as caught:
        assert cpu_library.load.__wrapped__() is None
    assert said in str(caught[0].message)


def test_copies_of_views_are_read_where_they_lie():
    query, segments = draw(CASES["bool-mask"], torch.float32, CPU)
    expected = attend(query, segments, 0.125)
    copies = [copy.deepcopy(segments), pickle.loads(pickle.dumps(segments))]
    for segment in segments:
        segment.keys.fill_(torch.nan)
        segment.values.fill_(torch.nan)
    for copied in copies:
        for state, one in zip(attend(query, copied, 0.125), expected, strict=True):
            assert torch.equal(state, one)


def test_attend_takes_it_for_what_it_reads(monkeypatch):
    query, segments = draw(CASES["bool-mask"], torch.float32, CPU)
    for state, direct in zip(attend(query, segments, 0.125), decode_attention(query, segments, 0.125), strict=True):
        assert torch.equal(state, direct)
    monkeypatch.setattr(decode_cpu, "_segment", None)  # nothing is read by the kernel
    visual, text = segments
    basis = visual.basis
    refused = [
        dataclasses.replace(text, basis=KeyBasis(B=torch.ones(2, 2, 64))),
        dataclasses.replace(text, values=text.values.half()),
        dataclasses.replace(text, keys=text.keys.mT.contiguous().mT),
        dataclasses.replace(visual, keys=visual.keys[..., :12], basis=KeyBasis(B=basis.B[..., :12])),
        dataclasses.replace(visual, basis=dataclasses.replace(basis, B=basis.B.double())),
        dataclasses.replace(visual, basis=dataclasses.replace(basis, delta=basis.delta.double())),
        dataclasses.replace(visual, basis=dataclasses.replace(basis, B=basis.B.mT.contiguous().mT)),
    ]
    for last in refused:
        attend(query, [text, last], 0.125)
    with torch.enable_grad():
        attend(query.clone().requires_grad_(), segments, 0.125)
        attend(query, [dataclasses.replace(text, mask=text.mask.float().requires_grad_())], 0.125)
        basis = dataclasses.replace(basis, delta=basis.delta.clone().requires_grad_())
        attend(query, [text, dataclasses.replace(visual, basis=basis)], 0.125)
    attend(*draw(CASES["bool-mask"], torch.float64, CPU), 0.125)


OPTIONS = {
    "numbers": {"rank": 16, "always_compress": True},
    "codes": {"sparsity": 0.5, "key_bits": 4, "value_sparsity": 0.5, "value_bits": 4, "always_compress": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("host", FAMILIES, indirect=True)
def test_generate_through_it_gives_what_torch_gives(host, options, monkeypatch):
    inputs = host.tiny.inputs(host.tiny.prompt(0, (0,)), host.tiny.prompt(1, (0,), text=3))

    def generated():
        return host.attached.generate(
            **inputs,
            past_key_values=RotateKCache.for_study(**options),
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )

    choose, chosen = attention._kernel_for, []
    monkeypatch.setattr(attention, "_kernel_for", lambda device: chosen.append(choose(device)) or chosen[-1])
    ours = generated()
    assert set(chosen) == {"cpp"}
    monkeypatch.setattr(attention, "_kernel_for", lambda device: None)
    expected = generated()
    assert torch.equal(ours.sequences, expected.sequences)
    for logits, exact in zip(ours.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


FORKED = """
import os, torch
from rotatek_cache.core.attention import attend
from rotatek_cache.core.segments import SegmentView

torch.set_num_threads(2)
tokens = 60_000  # enough for two threads
keys, values, query = torch.randn(2, tokens, 64), torch.randn(2, tokens, 64), torch.randn(1, 4, 1, 64)
starts, lengths = torch.zeros(1, dtype=torch.int64), torch.full((1,), tokens, dtype=torch.int32)
view = SegmentView(keys, values, starts=starts, lengths=lengths, max_length=tokens, row_stride=tokens, batched=True)
expected, _ = attend(query, [view], 0.1, impl="cpp")
child = os.fork()
if not child:
    got, _ = attend(query, [view], 0.1, impl="cpp")
    os._exit(0 if (got - expected).abs().max() < 1e-5 else 3)
sys_exit = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert torch.equal(attend(query, [view], 0.1, impl="cpp")[0], expected)
print("child ended with", sys_exit)
"""


def test_a_forked_process_attends_too():
    """Threads of the parent are not there in the child; OpenMP would wait for them for ever."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "child ended with 0", done.stderr


def test_threads_attend_at_the_same_time():
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 4096, 64, generator=generator) for _ in range(2))
    starts, lengths = torch.zeros(1, dtype=torch.int64), torch.full((1,), 4096, dtype=torch.int32)
    view = SegmentView(keys, values, starts=starts, lengths=lengths, max_length=4096, row_stride=4096, batched=True)
    queries = [torch.randn(1, 4, 1, 64, generator=generator) for _ in range(64)]
    expected = [decode_attention(query, [view], 0.1)[0] for query in queries]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda query: decode_attention(query, [view], 0.1)[0], queries))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
