"""The buffers that CUDA graphs of decoding read, against tables made anew for each step; needs no SGLang."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rotatek_cache import FitOptions, attend
from rotatek_cache.codecs.sealing import Sealer
from rotatek_sglang.decode_tables import GRAPH_SEGMENTS, GraphTables, count_segments, padded, segment_numbers, table_of
from rotatek_sglang.layout import HeadShape, find_layout
from rotatek_sglang.rows import Segment, SlotTable
from rotatek_sglang.storage import build_storage

HEADS = HeadShape(q_heads=4, kv_heads=2, key_width=16, value_width=8)
TEXT, VISUAL, BASES, CONTEXT = 60, 40, 6, 40


class NoSync(TorchDispatchMode):
    """Fails on what makes the host wait for the device, or a shape depend on numbers there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
        ), function
        return function(*args, **(kwargs or {}))


def test_numbers_worked_by_hand():
    held = [[Segment(2, 0, 3), Segment(1, 3, 2)], [], [Segment(4, 0, 1)]]
    places, counts = segment_numbers(held, [9, 4, 2], 2, pin=False)
    assert places.tolist() == [[0, 0, 0], [2, 0, 4], [3, 0, 0], [1, 0, 0], [5, 0, 1]]
    assert counts.tolist() == [[3, 0, 1], [2, 0, 0], [4, 4, 1]]
    assert (places.dtype, counts.dtype) == (torch.int64, torch.int32)
    assert count_segments(held) == 2
    assert count_segments([]) == 0


class Serving:
    """Requests over real pools, as the backend keeps them."""

    def __init__(self, options):
        self.sealer = Sealer(FitOptions(**options), 0)
        layout = find_layout([self.sealer], HEADS, torch.float32, "cpu")
        (self.layer,) = build_storage(layout, TEXT + 1, VISUAL, BASES, "cpu")
        self.table = SlotTable(120, TEXT, VISUAL, BASES, "cpu")
        self.slots_of = torch.zeros(8, CONTEXT, dtype=torch.int64)
        self.rows_of = torch.zeros(8, CONTEXT, dtype=torch.int32)
        self.segments, self.lengths, self.free = {}, {}, list(range(1, 120))

    def begin(self, request, parts):
        """A request of visual segments and runs of text: ("v", 5) or ("t", 3)."""
        self.lengths[request] = 0
        for kind, count in parts:
            self._extend(request, torch.full((count,), kind == "v"))
        self.rows_of[request] = 0
        held = self.slots_of[request, : self.lengths[request]]
        self.rows_of[request, : len(held)], self.segments[request] = self.table.layout(held)

    def _extend(self, request, visual):
        length = self.lengths[request]
        slots = torch.tensor([self.free.pop() for _ in visual])
        self.slots_of[request, length : length + len(slots)] = slots
        self.lengths[request] += len(slots)
        self.table.assign(slots, visual)
        rows = self.table.rows[slots].long()
        keys, values = torch.randn(2, len(slots), 16), torch.randn(2, len(slots), 8)
        if visual[0]:
            span, window = [(0, len(slots))], torch.randn(1, 4, 3, 16)
            basis = int(self.table.basis_of_row[-1 - rows[0]])
            self.layer.keys.write(self.sealer.store_keys(keys, span, window, None), -1 - rows, basis)
            self.layer.values.write(self.sealer.store_values(values, span), -1 - rows, basis)
        else:
            self.layer.write_text(rows, keys.transpose(0, 1), values.transpose(0, 1))

    def end(self, request):
        held = self.slots_of[request, : self.lengths.pop(request)]
        self.table.release(held)
        self.free += held.tolist()

    def step(self, requests):
        """A slot for the next token of each, and lengths with it."""
        new = torch.tensor([self.free.pop() for _ in requests])
        self.table.assign_text(new)
        for request, slot in zip(requests, new.tolist(), strict=True):
            self.slots_of[request, self.lengths[request]] = slot
            self.lengths[request] += 1
        return new, torch.tensor([self.lengths[request] for request in requests])

    def held(self, requests):
        return [self.segments[request] for request in requests]


OPTIONS = [
    {"sparsity": 0.5, "always_compress": True},
    {"rank": 8, "key_bits": 4, "value_sparsity": 0, "value_bits": 8, "always_compress": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_set_of_buffers_serves_all_batches(options):
    check_buffers(options, "torch")


def test_the_kernel_reads_them_too():
    """In a process of its own, since Triton learns while it is imported that it is to interpret its kernels."""
    pytest.importorskip("triton")
    script = "import test_decode_tables as t; t.check_buffers(t.OPTIONS[1], 'triton', t.BATCHES[:2])"
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


BATCHES = (([3, 1, 6], 4), ([6], 1), ([1], 2), ([6, 3], 6), ([3, 1, 6], 3))


def check_buffers(options, impl, batches=BATCHES):
    """Filled for one batch after another, larger and smaller, with and without images, padded up as a graph is."""
    torch.manual_seed(0)
    serving = Serving(options)
    serving.begin(3, [("t", 2), ("v", 6), ("t", 3)])
    serving.begin(1, [("t", 4)])
    serving.begin(6, [("v", 5), ("t", 1), ("v", 4), ("t", 2)])
    graph = GraphTables(6, serving.rows_of, VISUAL, TEXT)
    places = [t.data_ptr() for t in (graph.slots, graph.places, graph.counts, graph.new_rows)]
    for requests, size in batches:
        new, lengths = serving.step(requests)
        batch, spare = len(requests), size - len(requests)
        indices = torch.tensor(requests)
        every_length, held = padded(lengths.tolist(), serving.held(requests), size)
        graph.fill(held, every_length)
        # What SGLang pads with: request 0, slot 0, and the length that the backend names.
        pad = torch.zeros(spare, dtype=torch.int64)
        with NoSync():
            graph.gather(
                serving.table.rows, torch.cat([new, pad]), torch.cat([indices, pad]), torch.cat([lengths, pad + 1])
            )
            table = graph.table(size)
        assert torch.equal(graph.new_rows[:size], torch.cat([serving.table.rows[new].long(), pad]))
        serving.layer.write_text(graph.new_rows[:size], torch.randn(size, 2, 16), torch.randn(size, 2, 8))

        eager = table_of(serving.rows_of, indices, serving.held(requests), lengths.tolist())
        assert len(table.visual) == GRAPH_SEGMENTS
        assert torch.equal(table.text_starts[:batch], eager.text_starts)
        assert torch.equal(table.text_lengths[:batch], eager.text_lengths)
        for part, expected in zip(table.visual, eager.visual, strict=False):
            assert torch.equal(part.starts[:batch], expected.starts)
            assert torch.equal(part.lengths[:batch], expected.lengths)
            assert torch.equal(part.bases[:batch], expected.bases)
        query = torch.randn(size, 4, 1, 16)
        output, _ = attend(query, serving.layer.views(table), 0.3, impl=impl)
        expected, _ = attend(query[:batch], serving.layer.views(eager), 0.3)
        torch.testing.assert_close(output[:batch], expected, atol=1e-5, rtol=1e-5)
        assert output.isfinite().all()
    assert places == [t.data_ptr() for t in (graph.slots, graph.places, graph.counts, graph.new_rows)]
    serving.end(6)
    serving.begin(6, [("t", 3), ("v", 7)])
    new, lengths = serving.step([6])
    graph.fill(serving.held([6]), lengths.tolist())
    graph.gather(serving.table.rows, new, torch.tensor([6]), lengths)
    query = torch.randn(1, 4, 1, 16)
    output, _ = attend(query, serving.layer.views(graph.table(1)), 0.3, impl=impl)
    eager = table_of(serving.rows_of, torch.tensor([6]), serving.held([6]), lengths.tolist())
    torch.testing.assert_close(output, attend(query, serving.layer.views(eager), 0.3)[0], atol=1e-5, rtol=1e-5)
