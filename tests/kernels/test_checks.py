"""What the kernels read: one predicate, which `attend` falls back on, and the key under which it is remembered."""

import dataclasses

import pytest
import torch
from kernel_contract import CASES, Case, change, change_basis, draw

from rotatek_cache.core import attention
from rotatek_cache.core.attention import KERNELS, UnsupportedError, attend, reference_attention
from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.segments import SegmentView
from rotatek_kernels import cpu_library, decode_cpu
from rotatek_kernels.checks import arguments_key, check_arguments, unsupported_reason

CPU = torch.device("cpu")

needs_cpp = pytest.mark.skipif(cpu_library.find_compiler() is None, reason="needs a C++ compiler, on Linux")


def full() -> tuple[torch.Tensor, list[SegmentView]]:
    """A query and a segment that has a tensor in every field, and text."""
    case = dataclasses.replace(CASES["int8-basis"], slots=True, mask="additive")
    query, (visual, text) = draw(case, torch.float16, CPU)
    return query, [change(visual, basis_rows=torch.arange(2)), text]


class ReadsOf:
    """Which fields of views and bases are read, by way of subclasses that note it."""

    def __init__(self) -> None:
        found = self.found = set()

        def noting(kind):
            fields = {field.name for field in dataclasses.fields(kind)}

            class Noting(kind):
                def __getattribute__(self, name):
                    if name in fields:
                        found.add((kind.__name__, name))
                    return super().__getattribute__(name)

            return Noting

        self.view, self.basis = noting(SegmentView), noting(KeyBasis)

    def watched(self, segment: SegmentView) -> SegmentView:
        """The same segment, watched."""
        fields = {field.name: getattr(segment, field.name) for field in dataclasses.fields(segment)}
        for name in ("basis", "value_basis"):
            basis = fields[name]
            if basis is not None:
                held = {field.name: getattr(basis, field.name) for field in dataclasses.fields(basis)}
                fields[name] = self.basis(**held)
        return self.view(**fields)


def test_every_field_that_the_checks_read_enters_the_key():
    query, segments = full()
    by_checks, by_key = ReadsOf(), ReadsOf()
    with torch.enable_grad():
        watched = [by_checks.watched(segment) for segment in segments]
        check_arguments(query, watched)
        assert unsupported_reason(query, watched) is None
        arguments_key(query, [by_key.watched(segment) for segment in segments])
    assert ("SegmentView", "slots") in by_checks.found  # or nothing was watched
    assert ("KeyBasis", "scale") in by_checks.found
    assert by_checks.found <= by_key.found


TENSORS = ("keys", "values", "starts", "lengths", "slots", "basis_rows", "mask")
OF_BASES = [(field, part) for field in ("basis", "value_basis") for part in ("B", "delta", "scale")]
PROPERTIES = {
    "dtype": lambda tensor: tensor.to(torch.float64 if tensor.dtype != torch.float64 else torch.float32),
    "device": lambda tensor: tensor.to("meta"),
    "shape": lambda tensor: tensor[..., :-1].clone(),
    "stride": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "gradient": lambda tensor: tensor.detach().float().requires_grad_(),
}


@pytest.mark.parametrize("spoil", PROPERTIES.values(), ids=PROPERTIES)
@pytest.mark.parametrize("field", [*TENSORS, *OF_BASES], ids=str)
def test_every_property_of_a_tensor_enters_the_key(field, spoil):
    query, segments = full()
    visual = segments[0]
    with torch.enable_grad():
        if isinstance(field, str):
            other = change(visual, **{field: spoil(getattr(visual, field))})
        else:
            basis = getattr(visual, field[0])
            other = change(
                visual, **{field[0]: dataclasses.replace(basis, **{field[1]: spoil(getattr(basis, field[1]))})}
            )
        assert arguments_key(query, [visual]) != arguments_key(query, [other])


def test_addresses_and_lengths_do_not_enter_the_key():
    query, (visual, text) = draw(CASES["two-images-no-text"], torch.float16, CPU)
    keys = torch.empty_strided(visual.keys.shape, visual.keys.stride(), dtype=visual.keys.dtype)
    longer = change(visual, keys=keys, max_length=visual.max_length + 1)
    assert arguments_key(query, [visual, text]) == arguments_key(query.clone(), [longer, text])


# name: how (query, visual, text) are changed into what the reference reads and no kernel does
UNSUPPORTED = {
    "float64-query": lambda q, v, t: (q.double(), [v, t]),
    "other-dtype": lambda q, v, t: (q, [v, change(t, values=t.values.double())]),
    "diagonal-basis": lambda q, v, t: (q, [v, change(t, basis=KeyBasis(B=torch.ones(2, 2, 64)))]),
    "strided-keys": lambda q, v, t: (q, [v, change(t, keys=t.keys.mT.contiguous().mT)]),
    "strided-basis": lambda q, v, t: (q, [change_basis(v, B=v.basis.B.mT.contiguous().mT), t]),
    "rank-12": lambda q, v, t: (
        q,
        [change_basis(change(v, keys=v.keys[..., :12].clone()), B=v.basis.B[..., :12].clone()), t],
    ),
    "float64-basis": lambda q, v, t: (q, [change_basis(v, B=v.basis.B.double()), t]),
    "gradient": lambda q, v, t: (q.clone().requires_grad_(), [v, t]),
}


@needs_cpp
@pytest.mark.parametrize("spoil", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_auto_falls_back_where_an_explicit_kernel_says_why_not(spoil):
    query, (visual, text) = draw(CASES["bool-mask"], torch.float32, CPU)
    assert decode_cpu.unsupported_reason(query, [visual, text]) is None
    with torch.enable_grad():
        query, segments = spoil(query, visual, text)
        reason = decode_cpu.unsupported_reason(query, segments)
        for state, expected in zip(
            attend(query, segments, 0.125), reference_attention(query, segments, 0.125), strict=True
        ):
            assert torch.equal(state, expected)
        with pytest.raises(UnsupportedError) as raised:
            attend(query, segments, 0.125, impl="cpp")
    assert str(raised.value) == reason


@needs_cpp
@pytest.mark.parametrize("impl", ["auto", "cpp"])
def test_malformed_arguments_raise_whatever_is_asked_for(impl):
    query, (visual, text) = draw(CASES["bool-mask"], torch.float32, CPU)
    with pytest.raises(TypeError, match=r"segments\[0\].starts must be int32 or int64, got torch.float32"):
        attend(query, [change(visual, starts=visual.starts.float()), text], 0.125, impl=impl)


def test_a_kernel_that_has_no_way_for_so_many_query_heads_is_not_taken(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    case = Case(((9, 5),), (3, 2), heads=1, group=65, width=16, value_width=16, rank=8)
    query, segments = draw(case, torch.float32, CPU)
    monkeypatch.setattr(attention, "_kernel_for", lambda device: "triton")
    # Without the interpreter a CPU is a reason by itself; with it, the number of heads is.
    with pytest.raises(UnsupportedError, match=r"query must be on a GPU|for each 64 query heads, got 1 for 65"):
        attend(query, segments, 0.25, impl="triton")
    for state, expected in zip(attend(query, segments, 0.25), reference_attention(query, segments, 0.25), strict=True):
        assert torch.equal(state, expected)


def test_every_kernel_has_the_predicate():
    pytest.importorskip("triton", reason="Triton is not installed")
    query, segments = draw(CASES["bool-mask"], torch.float64, CPU)
    for module in KERNELS.values():
        kernel = attention.importlib.import_module(module)
        assert kernel.unsupported_reason(query, segments).startswith("query must be float16, bfloat16 or float32")
