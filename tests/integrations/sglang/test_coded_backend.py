"""The backend of the coded pool without a server: what a step reads on the host, and what a graph would replay.

In a process of its own, since SGLang takes a platform from the environment when it is first imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

SCRIPT = """
import json, sys
from types import SimpleNamespace
import torch
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from rotatek_sglang import coded_backend, coded_storage, options
from rotatek_sglang.coded_layout import CodedPlan
from rotatek_sglang.coded_pool import CodedAllocator, CodedPool
from rotatek_sglang.coded_requests import assign_prompt
from rotatek_sglang.layout import HeadShape
from recorded_graph import RecordedGraph, attend_on_device
from test_coded_storage import HostReads

torch.manual_seed(0)
fit = options.from_environment().fit
heads = HeadShape(4, 2, 32, 32)
CodedPool.plan = CodedPlan.make(fit, range(1), heads, torch.float32, 6, 8, 256, "cpu")
pool = CodedPool(900, 2, torch.float32, 2, 32, 1, "cpu", False)
allocator = CodedAllocator(900, 2, torch.float32, "cpu", pool, False)
requests = ReqToTokenPool(6, 256, "cpu", False)
coded_backend.check_basis = lambda *args: None  # there is no model
runner = SimpleNamespace(token_to_kv_pool=pool, req_to_token_pool=requests, model=torch.nn.Module(), device="cpu",
                         server_args=SimpleNamespace(enable_metrics=False))
backend = coded_backend.CodedBackend(runner)
layer = RadixAttention(4, 32, 0.2, 2, layer_id=0)
table = requests.req_to_token
lengths = {}

# On a GPU these numbers are sent and read once they have arrived; here that is done between what is counted.
on_their_way = []
coded_storage.Arriving.send = lambda number: on_their_way.append(number)
prompts, ends = [], []

def counted(reads, work, *args):
    for number in on_their_way:
        number.known = int(number.count)
    backend.init_forward_metadata(SimpleNamespace(forward_mode=ForwardMode.IDLE))  # reads what has arrived
    with HostReads() as counted:
        result = work(*args)
    reads.append(counted.count)
    return result

def extend(index, count, prefix=0):
    return counted(prompts, read_prompt, index, count, prefix)

def read_prompt(index, count, prefix):
    slots = allocator.alloc(-(-count // 2) * 2)[:count]
    table[index, prefix : prefix + count] = slots.int()
    req = SimpleNamespace(prefix_len=prefix)
    batch = SimpleNamespace(reqs=[req], extend_lens=[count], token_to_kv_pool_allocator=allocator)
    assign_prompt((slots, None, torch.tensor([index])), batch)
    lengths[index] = prefix + count
    forward = SimpleNamespace(forward_mode=ForwardMode.EXTEND, req_pool_indices_cpu=torch.tensor([index]),
                              extend_prefix_lens_cpu=[prefix],
                              extend_seq_lens_cpu=[count], out_cache_loc=slots)
    backend.init_forward_metadata(forward)
    q, k, v = (torch.randn(count, n * 32) for n in (4, 2, 2))
    return backend.forward_extend(q, k, v, layer, forward)

def step(pad=0):
    index = torch.tensor([*lengths, *[0] * pad])
    seq_lens = torch.tensor([n + 1 for n in lengths.values()] + [1] * pad)
    slots = torch.zeros(len(index), dtype=torch.int64)
    slots[: len(lengths)] = allocator.alloc(2 * len(lengths))[::2]
    early = [row for row, n in enumerate(lengths.values()) if n < 4]
    pool.sinks.take(slots[early])
    for row, request in enumerate(lengths):
        table[request, lengths[request]] = slots[row].int()
        lengths[request] += 1
    return SimpleNamespace(forward_mode=ForwardMode.DECODE, batch_size=len(index), req_pool_indices=index,
                           seq_lens=seq_lens, seq_lens_cpu=seq_lens.clone(), out_cache_loc=slots)

outputs = [tuple(extend(1, 100).shape), tuple(extend(2, 2).shape), tuple(extend(1, 30, prefix=100).shape)]
table[3, :90] = table[1, :90]
outputs.append(tuple(extend(3, 1, prefix=90).shape))

idle = SimpleNamespace(forward_mode=ForwardMode.IDLE)
backend.init_forward_metadata(idle)  # has what the prompts are asked answered: sent by itself, read when it is there
assert not backend.unanswered
reads, differences, graph, attend = [], [], None, coded_backend.attend
for number in range(70):
    forward = step()
    q, k, v = (torch.randn(3, n * 32) for n in (4, 2, 2))
    with HostReads() as stepping:
        backend.init_forward_metadata(forward)
        eager = backend.forward_decode(q, k, v, layer, forward)
    reads.append(stepping.count)
    # As a graph of four rows replays it: recorded once, one row of padding, bounds of any length.
    pad = torch.nn.functional.pad
    later = {"out_cache_loc": pad(forward.out_cache_loc, (0, 1)), "q": pad(q, (0, 0, 0, 1)), "k": pad(k, (0, 0, 0, 1)),
             "req_pool_indices": pad(forward.req_pool_indices, (0, 1)), "v": pad(v, (0, 0, 0, 1)),
             "seq_lens": pad(forward.seq_lens, (0, 1), value=1)}
    if graph is None:
        static = SimpleNamespace(forward_mode=ForwardMode.DECODE, batch_size=4, **later)
        backend.init_forward_metadata_out_graph(static, in_capture=True)

        def recorded():
            backend.init_forward_metadata_in_graph(static)
            return backend.forward_decode(static.q, static.k, static.v, layer, static)

        graph = RecordedGraph()
        coded_backend.attend = attend_on_device  # which reads tables from the device alone, as the kernels do
        replayed = graph.capture(recorded, recorded)  # fails where anything is read on the host
        coded_backend.attend = attend
    for name, tensor in later.items():
        getattr(static, name).copy_(tensor)
    graph.replay()
    differences.append(float((replayed[:3] - eager).abs().max()))
def end(request, pages):
    allocator.free_page_ids(pages)  # as SGLang does, which knows them without a look
    backend.ledger.free(request)

for request, length in list(lengths.items()):
    own = table[request, (90 if request == 3 else 0) : length].long()
    counted(ends, end, request, torch.unique(own // 2))
for number in on_their_way:
    number.known = int(number.count)
free = [allocator.available_size(), pool.sinks.free()]
print(json.dumps({"outputs": outputs, "reads": sum(reads), "prompts": prompts, "ends": ends, "free": free,
                  "difference": max(differences), "running": len(backend.ledger.ring_start)}))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    from test_coded_storage import write_basis

    here = Path(__file__).parent
    path = write_basis(tmp_path_factory.mktemp("rows") / "basis.safetensors")
    environment = {**os.environ, "ROTATEK_BASIS": path, "ROTATEK_BITS": "4", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(here), str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_decode_step_reads_nothing_on_the_host(said):
    assert said["reads"] == 0


def test_prompts_and_ends_read_nothing_either(said):
    """Of the first tokens that come back the device sends how many they are."""
    assert said["prompts"] == [0] * 4
    assert said["ends"] == [0] * 3


def test_a_recorded_step_of_more_rows_replays_as_the_step(said):
    """Replayed at 70 steps, by which a sequence of two tokens has filled its ring and goes round."""
    assert said["difference"] < 1e-5


def test_everything_comes_back(said):
    assert said["outputs"] == [[100, 128], [2, 128], [30, 128], [1, 128]]
    assert said["free"] == [900, 32]
    assert said["running"] == 0
