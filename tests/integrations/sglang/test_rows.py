"""Rows, bases and views of the serving pools, against a plain model of the same thing; needs no SGLang."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotatek_cache import FitOptions, attend
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.sealing import Sealer
from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.quantization import HeadCodes
from rotatek_cache.options import Allocation
from rotatek_sglang.layout import HeadShape, Worth, find_layout
from rotatek_sglang.metrics import values
from rotatek_sglang.rows import Need, OutOfRowsError, RequestLedger, Segment, SlotTable
from rotatek_sglang.storage import SegmentTable, VisualTable, build_storage


def mask(text):
    return torch.tensor([letter == "v" for letter in text])


def test_a_prompt_and_its_answer_worked_by_hand():
    table = SlotTable(slots=12, text_rows=6, visual_rows=5, bases=2, device="cpu")
    table.assign(torch.tensor([2, 3, 4, 5, 8]), mask("tvvtv"))
    table.assign_text(torch.tensor([9]))
    assert table.rows.tolist() == [0, 0, 1, -1, -2, 2, 0, 0, -3, 3, 0, 0]
    assert (table.text.used, table.visual.used, table.bases.used) == (3, 3, 1)
    rows, segments = table.layout(torch.tensor([2, 3, 4, 5, 8, 9]))
    assert rows.tolist() == [0, 1, 2, 1, 2, 3]  # visual ones first
    assert segments == [Segment(basis=0, first=0, count=3)]

    # A second image behind it, while the first stays.
    table.assign(torch.tensor([10, 11]), mask("vv"))
    rows, segments = table.layout(torch.tensor([2, 3, 4, 5, 8, 9, 10, 11]))
    assert rows.tolist() == [0, 1, 2, 3, 4, 1, 2, 3]
    assert segments == [Segment(0, 0, 3), Segment(1, 3, 2)]

    # A basis lives as long as one of its rows does; slots without a row are no matter.
    table.release(torch.tensor([2, 3, 6]))
    assert table.bases.used == 2
    table.release(torch.tensor([4, 8]))
    assert table.bases.used == 1
    assert table.visual.used == 2
    table.release(torch.arange(12))
    assert (table.text.used, table.visual.used, table.bases.used) == (0, 0, 0)


def test_the_host_looks_once_at_what_slots_hold(monkeypatch):
    table = SlotTable(slots=12, text_rows=6, visual_rows=5, bases=2, device="cpu")
    slots, looks, look = torch.tensor([2, 3, 4, 5, 8]), [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: looks.append(tensor) or look(tensor))
    table.assign(slots, mask("tvvtv"))
    assert len(looks) == 0
    table.layout(slots)
    assert len(looks) == 1
    table.release(slots)
    assert len(looks) == 2


def test_what_could_be_free_once_cached_prefixes_are_gone():
    """Six text rows and two visual ones of eight each are in use; requests hold four of the former."""
    table = SlotTable(slots=20, text_rows=8, visual_rows=8, bases=2, device="cpu")
    table.assign(torch.arange(8), mask("ttttttvv"))
    held = Need(text=4)
    assert table.could_fit(Need(text=4, visual=8, bases=2), held, evictable=4)
    assert not table.could_fit(Need(text=5), held, evictable=4)  # though four cached tokens could go: two are text
    assert not table.could_fit(Need(text=4), held, evictable=1)
    assert not table.could_fit(Need(bases=3), held, evictable=4)


def test_what_is_not_there_is_refused_and_nothing_is_lost():
    table = SlotTable(slots=10, text_rows=3, visual_rows=2, bases=1, device="cpu")
    with pytest.raises(OutOfRowsError, match=r"asked for are .*3 visual rows, 1 bases; free are 3 text rows, 2 visual"):
        table.assign(torch.arange(3), mask("vvv"))
    table.assign(torch.arange(2), mask("vt"))
    with pytest.raises(OutOfRowsError, match=r"1 bases; free are .* 0 bases"):
        table.assign(torch.arange(2, 4), mask("vt"))
    with pytest.raises(OutOfRowsError, match="3 text rows asked for, 2 of 3 are free"):
        table.assign_text(torch.arange(4, 7))
    assert (table.text.used, table.visual.used, table.bases.used) == (1, 1, 1)
    with pytest.raises(RuntimeError, match="returned, but only 1 were in use"):
        table.text.give(torch.tensor([1, 2], dtype=torch.int32))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("prompt"), st.text("tv", min_size=1, max_size=6)),
            st.tuples(st.just("decode"), st.integers(0, 5)),
            st.tuples(st.just("finish"), st.integers(0, 5)),
            st.tuples(st.just("share"), st.integers(0, 5)),
        ),
        max_size=30,
    )
)
def test_no_row_is_given_twice_and_none_is_lost(steps):
    table = SlotTable(slots=64, text_rows=20, visual_rows=12, bases=4, device="cpu")
    free, requests = list(range(1, 64)), []
    for kind, what in steps:
        if kind == "prompt" and len(free) >= len(what):
            visual = what.count("v")
            if table.fits(Need(len(what) - visual, visual, int(visual > 0))):
                slots = [free.pop() for _ in what]
                table.assign(torch.tensor(slots), mask(what))
                requests.append((slots, what))
        elif kind == "decode" and what < len(requests) and free and table.fits(Need(text=1)):
            requests[what] = ([*requests[what][0], free.pop()], requests[what][1] + "t")
            table.assign_text(torch.tensor(requests[what][0][-1:]))
        elif kind == "finish" and what < len(requests):
            slots, _ = requests.pop(what)
            table.release(torch.tensor(slots))
            free += slots
        held = [slot for slots, _ in requests for slot in slots]
        letters = "".join(kinds for _, kinds in requests)
        rows = table.rows[torch.tensor(held, dtype=torch.int64)].tolist()
        assert len(set(rows)) == len(rows)
        assert ["v" if row < 0 else "t" for row in rows] == list(letters)
        assert 0 not in rows
        assert (table.text.used, table.visual.used) == (letters.count("t"), letters.count("v"))
        assert table.bases.used == sum("v" in kinds for _, kinds in requests)
        for slots, kinds in requests:
            _, segments = table.layout(torch.tensor(slots))
            assert [segment.count for segment in segments] == ([kinds.count("v")] if "v" in kinds else [])


def test_the_ledger_forgets_a_request_at_its_end():
    ledger = RequestLedger(100, SlotTable(12, 6, 5, 2, "cpu"))
    ledger.alloc_to_lengths(req_pool_indices_cpu=torch.tensor([3, 1]), target_seq_lens_cpu=torch.tensor([7, 8]))
    ledger.segments.update({3: [Segment(0, 0, 4)], 1: []})
    assert ledger.requests == [3, 1]
    assert ledger.with_basis == 1
    ledger.free(3)
    ledger.free(3)
    assert ledger.segments == {1: []}
    assert ledger.dense_capacity == 100


def test_a_prompt_in_chunks_worked_by_hand():
    table = SlotTable(slots=16, text_rows=8, visual_rows=5, bases=2, device="cpu")
    ledger = RequestLedger(100, table)
    prompt, slots = mask("tvvtvt"), torch.tensor([2, 3, 4, 5, 6, 7])
    assert not len(ledger.assign_chunk(1, slots[:2], slice(0, 2), prompt))
    # The visual token waits in a text row; rows for the rest, for the sealed image and a basis are kept for it.
    assert table.rows[slots].tolist() == [1, 2, 0, 0, 0, 0]
    assert (table.text.available, table.visual.available, table.bases.available) == (2, 2, 1)
    with pytest.raises(OutOfRowsError, match="3 text rows asked for, 2 of 8 are free"):
        table.assign_text(torch.arange(8, 11))
    assert not len(ledger.assign_chunk(1, slots[:4], slice(2, 4), prompt[2:]))
    assert (table.text.used, table.text.available) == (4, 2)
    waiting = ledger.assign_chunk(1, slots, slice(4, 6), prompt[4:])
    assert waiting.tolist() == [2, 3]
    assert table.rows[slots].tolist() == [1, -1, -2, 4, -3, 5]
    table.text.give(waiting)
    assert (table.text.used, table.visual.used, table.bases.used) == (3, 3, 1)
    assert (table.text.available, table.visual.available, table.bases.available) == (5, 2, 1)
    assert ledger.chunked[1].is_last


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    prompt=st.text("tv", min_size=2, max_size=9),
    cuts=st.sets(st.integers(1, 8), max_size=4),
    stop_after=st.integers(0, 5),
    others=st.integers(0, 3),
)
def test_a_prompt_in_chunks_ends_as_one_that_came_at_once(prompt, cuts, stop_after, others):
    """Or is aborted in mid-chunk, and then everything is free."""
    table = SlotTable(slots=64, text_rows=20, visual_rows=12, bases=2, device="cpu")
    ledger = RequestLedger(100, table)
    table.assign_text(torch.arange(50, 50 + others))
    slots = torch.arange(1, 1 + len(prompt))
    edges = [0, *sorted(cut for cut in cuts if cut < len(prompt)), len(prompt)]
    for begin, end in list(itertools.pairwise(edges))[: stop_after or None]:
        visual = mask(prompt[begin:])
        table.text.give(ledger.assign_chunk(3, slots[:end], slice(begin, end), visual))
        if end < len(prompt):
            rest = len(prompt) - end
            assert table.text.free - table.text.available == rest
            assert table.visual.free - table.visual.available == prompt.count("v")
            assert (table.rows[slots[:end]] > 0).all()
        else:
            assert ["v" if row < 0 else "t" for row in table.rows[slots].tolist()] == list(prompt)
            assert table.text.used == prompt.count("t") + others
            assert table.bases.used == int("v" in prompt)
            assert len(set(table.rows[slots].tolist())) == len(prompt)
            compressed = ledger.compressed.get(3, torch.zeros(len(prompt), dtype=torch.bool))
            assert torch.equal(compressed, table.rows[slots] < 0)
    ledger.free(3)
    assert not ledger.compressed
    table.release(slots)
    for kind, total in ((table.text, 20 - others), (table.visual, 12), (table.bases, 2)):
        assert kind.free == kind.available == total


HEADS = HeadShape(q_heads=4, kv_heads=2, key_width=16, value_width=8)
OPTIONS = [
    {"sparsity": 0},
    {"sparsity": 0.5},
    {"rank": 16, "basis": "pca_uncentred"},
    {"rank": 8, "key_bits": 4, "value_sparsity": 0, "value_bits": 8},
    {"rank": 8, "basis_bits": 8},
    {"rank": 8, "key_bits": 4, "value_sparsity": 0.5, "basis_bits": 8},
    {"sparsity": 0.5, "basis": "calibrated", "value_sparsity": 0.5},
    {"sparsity": 0.5, "basis": "calibrated", "allocation": "heads"},
    {"sparsity": 0.7, "basis": "calibrated", "allocation": "heads", "key_bits": "auto"},
    {"sparsity": 0.7, "basis": "calibrated", "allocation": "layers", "key_bits": "auto", "value_bits": 8},
]


@pytest.fixture(scope="module")
def fit_options(tmp_path_factory):
    """`FitOptions` of entries of `OPTIONS`; the calibrated basis is that of random states, uneven between heads."""
    state = Calibration(torch.zeros(1), "none")
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor([1.0, 4.0])[:, None, None]
    for layer, (which, width) in itertools.product(range(2), [("key", 16), ("value", 8)]):
        fall = 0.7 ** torch.arange(width)
        states = torch.randn(2, 200, width, generator=generator) * fall * scale
        state.add(layer, which, states, torch.eye(width, dtype=torch.float64).expand(2, -1, -1))
    path = tmp_path_factory.mktemp("basis") / "basis.safetensors"
    state.write_basis(path)

    def make(given):
        chosen = {**given, "allocation": Allocation.of(given.get("allocation", "uniform"))}
        if given.get("basis") == "calibrated":
            chosen["basis"] = str(path)
        return FitOptions(**chosen)

    return make


def decoded(stored):
    """States ``[H, N, D]`` from what a seal stored of one request."""
    if isinstance(stored.code, HeadCodes):
        coefficients = stored.code.unpack(stored.code.split(stored.data))
    else:
        coefficients = stored.data if stored.code is None else stored.code.unpack(stored.data)
    basis = KeyBasis() if stored.basis is None else stored.basis
    return basis.reconstruct(coefficients[:, None].float())[:, 0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_was_sealed_is_what_attention_reads(options, fit_options):
    """Two requests, one with an image, scattered over the pools: as the segments of `Sealer` themselves decode."""
    sealer = Sealer(fit_options(options), 0)
    layout = find_layout([sealer], HEADS, torch.float32, "cpu")
    (layer,) = build_storage(layout, text_rows=10, visual_rows=12, bases=3, device="cpu")
    keys, values = torch.randn(2, 7, 16), torch.randn(2, 7, 8)  # [H, N, D]
    window = torch.randn(1, 4, 3, 16)
    stored_keys, stored_values = sealer.store_keys(keys, [(0, 7)], window, None), sealer.store_values(values, [(0, 7)])
    visual_rows = torch.tensor([11, 2, 3, 5, 4, 0, 8])
    layer.keys.write(stored_keys, visual_rows, 2)
    layer.values.write(stored_values, visual_rows, 2)
    text_keys, text_values = torch.randn(5, 2, 16), torch.randn(5, 2, 8)
    text_rows = torch.tensor([9, 1, 7, 3, 2])
    layer.write_text(text_rows, text_keys, text_values)

    # The first request has the image and two text tokens, the second three text tokens.
    slots = torch.tensor([[11, 2, 3, 5, 4, 0, 8, 9, 1], [7, 3, 2, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    image = VisualTable(torch.tensor([0, 0]), torch.tensor([7, 0], dtype=torch.int32), torch.tensor([2, 0]), 7)
    table = SegmentTable(slots, (image,), torch.tensor([7, 0]), torch.tensor([2, 3], dtype=torch.int32), 3)
    query = torch.randn(2, 4, 1, 16)
    output, _ = attend(query, layer.views(table), 0.3)

    image_keys = decoded(stored_keys)
    image_values = values if stored_values.basis is None else decoded(stored_values)
    parts = [
        (
            torch.cat([image_keys, text_keys[:2].transpose(0, 1)], 1),
            torch.cat([image_values, text_values[:2].transpose(0, 1)], 1),
        ),
        (text_keys[2:].transpose(0, 1), text_values[2:].transpose(0, 1)),
    ]
    for row, part in enumerate(parts):
        k, v = (states.repeat_interleave(2, 0) for states in part)
        weights = (query[row].double() @ k.double().mT * 0.3).softmax(-1)
        torch.testing.assert_close(output[row, 0].double(), (weights @ v.double())[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_planned_bytes_are_those_of_the_storage(options, fit_options):
    sealers = [Sealer(fit_options(options), index) for index in range(2)]
    layout = find_layout(sealers, HEADS, torch.bfloat16, "cpu")
    text_rows, visual_rows, bases = 11, 13, 3
    layers = build_storage(layout, text_rows, visual_rows, bases, "cpu")
    held = sum(sum(layer.tensors_bytes()) for layer in layers)
    assert held == text_rows * layout.text_bytes + visual_rows * layout.visual_bytes + bases * layout.basis_bytes


@pytest.mark.parametrize("shape", [{"kv_heads": 4}, {"key_width": 32}, {"value_width": 16}], ids=str)
def test_a_basis_for_other_heads_is_refused(shape, fit_options):
    sealer = Sealer(fit_options({"sparsity": 0.5, "basis": "calibrated"}), 0)
    with pytest.raises(
        ValueError, match=r"calibrated on another model: in layer 0 it has 2 (key|value) heads of width"
    ):
        find_layout([sealer], dataclasses.replace(HEADS, **shape), torch.float32, "cpu")


def test_bytes_of_a_token_worked_by_hand():
    layout = find_layout([Sealer(FitOptions(rank=8), 0)], HEADS, torch.bfloat16, "cpu")
    assert layout.text_bytes == 2 * (16 + 8) * 2
    assert layout.visual_bytes == 2 * (8 + 8) * 2
    assert layout.basis_bytes == 2 * (16 * 8 + 16) * 2
    # 24 or 16 numbers a token, 144 a basis: 18 tokens pay for it exactly, 19 win.
    worth = Worth(layout, [Sealer(FitOptions(rank=8), 0)])
    assert not worth(0)
    assert not worth(18)
    assert worth(19)


def test_the_compression_ratio_counts_the_bases():
    layout = find_layout([Sealer(FitOptions(rank=8), 0)], HEADS, torch.bfloat16, "cpu")
    table = SlotTable(slots=50, text_rows=20, visual_rows=40, bases=2, device="cpu")
    assert values(table, layout, 0)["rotatek_compression_ratio"] == 1
    table.assign(torch.arange(40), mask("v" * 38 + "tt"))
    dense, stored = 40 * 96, 2 * 96 + 38 * 64 + 576
    found = values(table, layout, 1)
    assert found["rotatek_compression_ratio"] == pytest.approx(dense / stored)
    assert found["rotatek_visual_rows_used"] == 38
    assert found["rotatek_requests_with_basis"] == 1
