"""Rows, rings and sinks of the pool in which all tokens are coded; needs no SGLang."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode_tables import NoSync
from torch.utils._python_dispatch import TorchDispatchMode

from rotatek_cache import FitOptions, attend
from rotatek_cache.cache.coded_layer import CodedKV
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.token_rows import RECENT_TOKENS, SINK_TOKENS
from rotatek_cache.core.segments import SegmentView
from rotatek_sglang.coded_layout import CodedPlan
from rotatek_sglang.coded_storage import (
    CodedLayer,
    DecodeTables,
    OutOfSinksError,
    Places,
    Sinks,
    ring_slots,
    table_before,
)
from rotatek_sglang.layout import HeadShape
from rotatek_sglang.metrics import CODED_DESCRIPTIONS, coded_values

HEADS = HeadShape(q_heads=4, kv_heads=2, key_width=32, value_width=32)
SLOTS, CONTEXT, REQUESTS = 900, 256, 6


def numbers(values):
    return torch.tensor(list(values), dtype=torch.int64)


def write_basis(path):
    """A basis file of one layer, from drawn states."""
    state = Calibration(torch.ones(3), "drawn")
    generator = torch.Generator().manual_seed(0)
    for which in ("key", "value"):
        state.add_tokens(0, which, "text", torch.randn(2, 400, 32, generator=generator) + 1)
    state.texts = 1
    state.write_basis(path, source="drawn")
    return str(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_basis(tmp_path_factory.mktemp("rows") / "basis.safetensors")


def plan_of(file, bits=4, dtype=torch.float32, **options):
    fit = FitOptions(basis=file, text="coded", bits=bits, **options)
    return CodedPlan.make(fit, range(1), HEADS, dtype, REQUESTS, 8, CONTEXT, "cpu")


class Serving:
    """Requests over one layer, as allocator and backend keep them; beside it all that was ever stored, dense."""

    def __init__(self, plan):
        (pair,) = plan.rows
        self.layer = CodedLayer(*pair, SLOTS, plan.sinks, plan.rings, torch.float32, "cpu")
        self.sinks = Sinks(SLOTS, plan.sinks, "cpu")
        self.ring_starts = torch.zeros(plan.rings, dtype=torch.int64)
        self.slots_of = torch.zeros(plan.rings, CONTEXT, dtype=torch.int32)
        self.free = torch.randperm(SLOTS - 2, generator=torch.Generator().manual_seed(1)).add(2).tolist()
        self.held, self.generator = {}, torch.Generator().manual_seed(2)

    def states(self, count):
        return [torch.randn(count, 2, 32, generator=self.generator) + 1 for _ in range(2)]

    def begin(self, request, shared_with=None, prefix=0):
        """A request whose first `prefix` tokens are found in what another has stored."""
        self.ring_starts[request] = prefix
        self.held[request] = [torch.zeros(0, 2, 32), torch.zeros(0, 2, 32)]
        if prefix:
            self.slots_of[request, :prefix] = self.slots_of[shared_with, :prefix]
            self.held[request] = [states[:prefix] for states in self.held[shared_with]]

    def extend(self, request, count):
        """Tokens of a prompt, or a chunk of one."""
        start = len(self.held[request][0])
        slots = numbers(self.free.pop() for _ in range(count))
        self.slots_of[request, start : start + count] = slots
        positions = torch.arange(start, start + count)
        early = (positions < SINK_TOKENS).nonzero()[:, 0]
        self.sinks.take(slots[early])
        recent = torch.arange(count)[-RECENT_TOKENS:]
        rows = ring_slots(torch.full_like(recent, request), positions[recent])
        keys, values = self.states(count)
        self.layer.write(Places(slots, early, self.sinks.row_of_slot[slots[early]].long(), recent, rows), keys, values)
        self.held[request] = [torch.cat(pair) for pair in zip(self.held[request], (keys, values), strict=True)]

    def read(self, request, end):
        """What attention should see of the first `end` tokens, a query behind them coming with others."""
        first = max(int(self.ring_starts[request]), end - RECENT_TOKENS, SINK_TOKENS)
        read = []
        for rows, held in zip((self.layer.key_rows, self.layer.value_rows), self.held[request], strict=True):
            states = held[:end].clone()
            coded = states[SINK_TOKENS:first].transpose(0, 1)
            if coded.shape[1]:
                states[SINK_TOKENS:first] = rows.decode(rows.encode(coded), torch.float32).transpose(0, 1)
            read.append(states.transpose(0, 1)[None])
        return read

    def decode(self, tables, requests, query=None):
        """One token for each; returns the attention of queries, drawn if not given, and what it should be."""
        index = numbers(requests)
        slots = numbers(self.free.pop() for _ in requests)
        lengths = numbers(len(self.held[request][0]) + 1 for request in requests)
        self.slots_of[index, lengths - 1] = slots.int()
        self.sinks.take(slots[lengths <= SINK_TOKENS])
        keys, values = self.states(len(requests))
        if query is None:
            query = torch.randn(len(requests), 4, 1, 32, generator=self.generator)
        with NoSync():
            tables.fill(self.slots_of, self.sinks, self.ring_starts, index, lengths, slots)
            self.layer.write(tables.places(len(index)), keys, values)
            views = self.layer.views(tables.table(len(index), int(lengths.numpy().max())))
            found, _ = attend(query, views, 0.2)
        for row, request in enumerate(requests):
            new = (keys[row : row + 1], values[row : row + 1])
            self.held[request] = [torch.cat(pair) for pair in zip(self.held[request], new, strict=True)]
        expected = [
            dense(query[row : row + 1], *self.read(request, int(lengths[row]))) for row, request in enumerate(requests)
        ]
        return found, torch.cat(expected)


def dense(query, keys, values):
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(query, keys, values, scale=0.2, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 16}, {"bits": (4, 2)}, {"bits": 3, "allocation": "heads"}])
def test_decoding_reads_sinks_codes_and_ring(file, options):
    """Requests from one token to hundreds, some behind prefixes of others, over a hundred steps."""
    serving = Serving(plan_of(file, **options))
    tables = DecodeTables(REQUESTS, CONTEXT, "cpu")
    serving.begin(1)
    serving.extend(1, 100)
    for request, prefix, own in ((2, 70, 20), (3, 2, 1), (4, 0, 1), (5, 99, 1)):
        serving.begin(request, 1, prefix)
        serving.extend(request, own)
    for step in range(100):
        found, expected = serving.decode(tables, [1, 2, 3, 4, 5] if step % 3 else [5, 3, 4])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("ring_start", "length"), [(0, 1), (0, 4), (0, 5), (0, 68), (0, 69), (0, 150), (100, 150), (150, 150)]
)
def test_what_is_before_a_chunk(file, ring_start, length):
    """Sinks, then codes, then the last 64 tokens as far as this request has read them itself."""
    serving = Serving(plan_of(file))
    serving.begin(2)
    serving.extend(2, max(ring_start, 1))
    serving.begin(1, 2, ring_start)
    if length > ring_start:
        serving.extend(1, length - ring_start)
    table = table_before(serving.slots_of[1, :length], serving.sinks.row_of_slot, 1, ring_start, numbers)
    parts = [part.longest if part is not None else 0 for part in (table.sinks, table.codes, table.ring)]
    first = max(ring_start, length - RECENT_TOKENS, SINK_TOKENS)
    assert parts == [min(length, 4), max(0, min(first, length) - 4), max(0, length - first)]
    query = torch.randn(1, 4, 3, 32)
    found, _ = attend(query, serving.layer.views(table), 0.2)
    torch.testing.assert_close(found, dense(query, *serving.read(1, length)), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[150], [3, 2], [100, 30, 1, 64]])
def test_a_request_is_read_as_the_cache_in_transformers_reads_it(file, chunks):
    """Cut at the same places, then token by token."""
    serving, cache = Serving(plan_of(file)), CodedKV(FitOptions(basis=file, text="coded"), VisualPositions(), 0)
    tables = DecodeTables(1, CONTEXT, "cpu")
    serving.begin(1)
    length = 0
    for count in [*chunks, *[1] * 60]:
        query = torch.randn(1, 4, count, 32, generator=serving.generator)
        step = count == 1 and length > 0
        if step:
            found, _ = serving.decode(tables, [1], query)
        else:
            before = []
            if length:
                table = table_before(serving.slots_of[1, :length], serving.sinks.row_of_slot, 1, 0, numbers)
                before = [  # as it was: attention comes before new tokens are written, over old ones in the ring
                    dataclasses.replace(view, keys=view.keys.clone(), values=view.values.clone())
                    for view in serving.layer.views(table)
                ]
            serving.extend(1, count)
        length += count
        keys, values = (states[-count:].transpose(0, 1)[None] for states in serving.held[1])
        mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)[None, None]
        cache.append(keys, values)
        expected, _ = attend(query, cache.views(mask), 0.2)
        cache.settle(mask)
        if not step:
            own = SegmentView(
                *(keys[0], values[0], numbers([0]), torch.tensor([count], dtype=torch.int32), count),
                mask=mask[0, :, :, -count:],
            )
            found, _ = attend(query, [*before, own], 0.2)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 11)), max_size=40))
def test_sinks_are_given_to_one_and_come_back(steps):
    """Whatever is taken and released, by slots of which some have none."""
    sinks, owners = Sinks(12, 8, "cpu"), {}
    for takes, slot in steps:
        if takes and slot not in owners:
            if len(owners) == 8:
                with pytest.raises(OutOfSinksError, match="1 sinks asked for, 0 of 8 are free"):
                    sinks.take(numbers([slot]))
                continue
            sinks.take(numbers([slot]))
            owners[slot] = int(sinks.row_of_slot[slot])
            assert 1 <= owners[slot] <= 8
        elif not takes:
            released = [slot, (slot + 5) % 12]
            sinks.release(numbers(released))
            for each in released:
                owners.pop(each, None)
        assert sinks.free() == sinks.free(wait=True) == 8 - len(owners)
        assert len(set(owners.values())) == len(owners)
        assert {s: int(row) for s, row in enumerate(sinks.row_of_slot) if row} == owners
    sinks.clear()
    assert sinks.free() == 8


class HostReads(TorchDispatchMode):
    """Counts what would make a host wait for its device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")
        by_mask = "index" in str(function) and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for given in args
            if isinstance(given, list | tuple)
            for index in given
        )
        self.count += by_mask or any(name in str(function) for name in waits)
        return function(*args, **(kwargs or {}))


def test_host_reads_are_counted():
    numbers, mask = torch.arange(4), torch.tensor([True, False, True, False])
    reads = [lambda: numbers[mask], lambda: int(numbers[0]), mask.nonzero, numbers.unique]
    for read in reads:
        with HostReads() as counted:
            read()
        assert counted.count == 1
    with HostReads() as counted:
        numbers[numbers.flip(0)].masked_fill(mask, 0)
    assert counted.count == 0


def test_what_is_read_on_the_host(file):
    """A step that decodes: nothing (`NoSync` above). Slots that come back: one number, which a GPU sends by itself."""
    serving = Serving(plan_of(file))
    serving.begin(1)
    serving.extend(1, 20)
    with HostReads() as taking:
        serving.sinks.take(numbers([800, 801]))
    with HostReads() as releasing:
        serving.sinks.release(serving.slots_of[1, :20].long())
    assert (taking.count, releasing.count) == (0, 1)


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 16}, {"bits": 3, "allocation": "heads"}])
def test_the_plan_counts_what_is_held(file, options):
    plan = plan_of(file, dtype=torch.bfloat16, **options)
    (pair,) = plan.rows
    slots = 5000
    layer = CodedLayer(*pair, slots, plan.sinks, plan.rings, torch.bfloat16, "cpu")
    sinks = Sinks(slots, plan.sinks, "cpu")
    tables = DecodeTables(plan.requests, plan.context, "cpu").tensors()
    keys, values = layer.tensors()
    held = sum(t.nbytes for t in [*keys, *values, *tables, sinks.row_of_slot, sinks.stack])
    assert held + plan.basis_bytes == plan.fixed_bytes + slots * plan.slot_bytes + 4  # the place of nothing
    assert plan.dense_bytes == 2 * (32 + 32) * 2


def test_a_basis_of_another_model_is_refused(file):
    other = HeadShape(q_heads=4, kv_heads=2, key_width=64, value_width=32)
    fit = FitOptions(basis=file, text="coded")
    with pytest.raises(ValueError, match="2 Key heads of width 32, where this one has 2 of width 64"):
        CodedPlan.make(fit, range(1), other, torch.float32, 1, None, 64, "cpu")
    with pytest.raises(ValueError, match="has no layer 1"):
        CodedPlan.make(fit, range(2), HEADS, torch.float32, 1, None, 64, "cpu")


def test_the_metrics_count_what_is_in_use(file):
    """Of 100 slots with 8 sinks and 2 rings: a row and its number each, and dense tokens besides."""
    plan = plan_of(file)
    sinks = Sinks(200, plan.sinks, "cpu")
    assert coded_values(200, 0, sinks, 0, plan)["rotatek_compression_ratio"] == 1
    sinks.take(torch.arange(8))
    found = coded_values(200, 100, sinks, 2, plan)
    assert (found["rotatek_rows"], found["rotatek_rows_used"]) == (200, 100)
    assert (found["rotatek_sinks"], found["rotatek_sinks_used"]) == (plan.sinks, 8)
    assert (found["rotatek_rings"], found["rotatek_rings_used"]) == (REQUESTS, 2)
    dense = 2 * 2 * 32 * 4  # 2 KV heads, Keys and Values of 32 channels of 4 bytes
    row = dense // 8 + 4
    assert found["rotatek_compression_ratio"] == 100 * dense / (100 * row + 8 * dense + 2 * 64 * dense)
    assert all(name in CODED_DESCRIPTIONS for name in found)


def test_a_part_of_the_heads_takes_what_they_were_dealt(file):
    """All processes that share a model count slots by the widest row, and together keep what one would."""
    parts = [HeadShape.of_rank(4, 2, 32, 32, rank, 2) for rank in range(2)]
    fit = FitOptions(basis=file, text="coded", bits=3, allocation="heads")
    plans = [CodedPlan.make(fit, range(1), heads, torch.float32, 1, 8, 64, "cpu") for heads in (HEADS, *parts)]
    assert sum(plan.row_bytes for plan in plans[1:]) == plans[0].row_bytes
    assert [plan.heads.kv_slice for plan in plans] == [None, slice(0, 1), slice(1, 2)]
