"""SGLang's model runner, batches and prefix cache in this process, without a server: what `test_coded_runner.py` runs.

    python runner.py MODEL BASIS 16 4

With ROTATEK_BASIS and ROTATEK_TEXT=coded in the environment. For each number of bits it prints a line of JSON, from a
process of its own: those are forked once SGLang is imported, which takes longer than all else. The last line is what a
pool comes to that is too small.
"""

import json
import logging
import os
import sys
from array import array

import torch
import transformers

from rotatek_cache import RotateKCache, attend
from rotatek_cache.cache.token_counts import DENSE_COLUMNS
from rotatek_cache.hf.attention import NAME

FLAGS = ["--device", "cpu", "--dtype", "float32", "--mem-fraction-static", "0.3", "--max-total-tokens", "600"]
FLAGS += ["--max-running-requests", "8", "--random-seed", "0", "--enable-mixed-chunk"]


class Runner:
    """Serves requests as SGLang's scheduler does, one batch after the other."""

    def __init__(self, model, flags=FLAGS):
        from sglang.benchmark import one_batch
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
        from sglang.srt.server_args import PortArgs, prepare_server_args

        given = prepare_server_args(["--model-path", model, *flags])
        given.resolve_once()
        one_batch._set_envs_and_config(given)
        rank = one_batch.spawn_world_rank(given, tp_rank=0, pp_rank=0)
        one_batch.publish(given, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=rank, gpu_id=0))
        one_batch._init_process_global_configs()
        bench, _ = one_batch.load_model(given, PortArgs.init_new(given), 0, 0)
        self.runner = bench.torch_runner
        self.allocator = self.runner.token_to_kv_pool_allocator
        self.pools = {
            "req_to_token_pool": self.runner.req_to_token_pool,
            "token_to_kv_pool_allocator": self.allocator,
        }
        params = CacheInitParams(disable=False, page_size=2, tree_components=(ComponentType.FULL,), **self.pools)
        self.tree = UnifiedRadixCache(params)

    def free(self):
        """Slots, sinks and rings in use."""
        ledger = self.runner.token_to_kv_pool.ledger
        return [self.allocator.available_size(), self.allocator.sinks.free(), len(ledger.ring_start)]

    def forward(self, batch):
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch

        if getattr(batch, "prefill_input_ids_cpu", None) is not None:
            batch.input_ids, batch.prefill_input_ids_cpu = batch.prefill_input_ids_cpu, None
        forward = ForwardBatch.init_new(batch, self.runner, return_hidden_states_before_norm=False)
        output = self.runner.forward(forward).logits_output
        return self.runner.sample(output, forward), output.next_token_logits.float().log_softmax(-1)

    @torch.no_grad()
    def serve(self, prompts, steps, chunk=10**6):
        """Answer prompts in one batch; returns what was cached of each, its tokens, and their log-probabilities."""
        from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req, ScheduleBatch
        from sglang.srt.mem_cache.common import release_kv_cache
        from sglang.srt.sampling.sampling_params import SamplingParams
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        requests = []
        for number, ids in enumerate(prompts):
            sampling = SamplingParams(temperature=0, max_new_tokens=steps, ignore_eos=True)
            request = Req(
                rid=str(number), origin_input_text="", origin_input_ids=array("q", ids), sampling_params=sampling
            )
            request.init_next_round_input(self.tree)
            request.lock = self.tree.lock(request.last_node)
            request.logprob_start_len = -1
            request.extend_end = min(len(ids), request.prefix_len + chunk)
            requests.append(request)
        cached = [request.prefix_len for request in requests]
        while True:
            batch = ScheduleBatch.init_new(
                reqs=requests,
                tree_cache=self.tree,
                model_config=self.runner.model_config,
                enable_overlap=False,
                spec_algorithm=SpeculativeAlgorithm.NONE,
                **self.pools,
            )
            batch.prepare_for_extend()
            tokens, found = self.forward(batch)
            if all(request.extend_end == len(request.full_untruncated_fill_ids) for request in requests):
                break
            for request in requests:
                request.prefix_len = request.extend_end
                request.extend_end = min(len(request.full_untruncated_fill_ids), request.prefix_len + chunk)
        steps_found = [found]
        for _ in range(steps - 1):
            for request, token in zip(requests, tokens.tolist(), strict=True):
                request.output_ids.append(token)
            batch.input_ids = tokens.to(torch.int64)
            batch.prepare_for_decode()
            tokens, found = self.forward(batch)
            steps_found.append(found)
        for request, token in zip(requests, tokens.tolist(), strict=True):
            request.output_ids.append(token)
            request.finished_reason = FINISH_LENGTH(length=steps)
            release_kv_cache(request, self.tree, checkpoint=True)
        answers = [list(request.output_ids) for request in requests]
        return cached, answers, torch.stack(steps_found, 1)


@torch.no_grad()
def reference(model, ids, answer, cache, cached, chunk):
    """Log-probabilities ``[steps, V]`` of transformers over an answer that is given, read with the same cuts."""

    def read(tokens):
        out = model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True)
        return out.logits[0, -1].float().log_softmax(-1)

    if cached:
        # What has left the ring comes back, when what follows is cut off, as its codes say: as a prefix is found.
        read(ids[:cached] + [ids[0]] * DENSE_COLUMNS)
        cache.crop(cached - cache.get_seq_length())
    found = [read(ids[first : first + chunk]) for first in range(cached, len(ids), chunk)][-1:]
    return torch.stack(found + [read([token]) for token in answer[:-1]])


def forked(work, *arguments):
    """What `work` returns, or the error that ends it, from a fork of this process."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = work(*arguments)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever it is, the test is told)
            said = {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(write, "w") as answer:
            json.dump(said, answer)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return json.loads(said)


def load_sglang():
    """Import what all forks need, with our plug-in, whose platform must be there first."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    import sglang.benchmark.one_batch  # noqa: F401


class Forms(set):
    """Kinds of attention that ran since: if of many queries, and of each segment whether it has a basis, a mask."""

    def __init__(self):
        from rotatek_sglang import backend, coded_backend, prompt_attention

        def watched(query, views, scale, **options):
            segments = tuple((view.basis is not None, view.mask is not None) for view in views)
            self.add((query.shape[2] > 1, segments))
            return attend(query, views, scale, **options)

        backend.attend = coded_backend.attend = prompt_attention.attend = watched


def start(model, flags, environment):
    """Make a `Runner` with other variables; returns the forms of attention that ran, and what was warned of."""
    os.environ.update(environment)
    forms, warned = Forms(), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("rotatek_sglang").addHandler(handler)
    Runner(model, flags)
    return {"forms": sorted(forms), "warned": warned}


def queued(model, flags):
    """What is left of five cached texts of 40 tokens, in a pool with 300 text rows, as others are asked for."""
    from rotatek_sglang.pool import make_room
    from rotatek_sglang.rows import Need

    runner = Runner(model, flags)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        runner.serve([torch.randint(0, 390, (39,), generator=generator).tolist()], 2)
    asked = {
        "an answer that would need most of the pool": (Need(text=60), Need(), Need(text=200)),
        "an image and a text that fit": (Need(text=60, visual=500, bases=1), Need(), Need()),
        "a text beside one that runs": (Need(text=200), Need(text=120), Need()),
        "an image beyond the visual rows": (Need(visual=1000), Need(), Need()),
        "a text for which two must go": (Need(text=180), Need(), Need()),
        "a text for which all must go": (Need(text=300), Need(), Need()),
    }
    return {
        what: [make_room(runner.allocator, runner.tree, *needs), runner.tree.evictable_size()]
        for what, needs in asked.items()
    }


def served(model, basis, bits):
    """What requests with all tokens coded come to, beside transformers."""
    os.environ["ROTATEK_BITS"] = bits
    started = Forms()
    runner = Runner(model)
    serving = Forms()
    bits = float(bits)
    dense = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    coded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    coded.set_attn_implementation(NAME)
    generator = torch.Generator().manual_seed(3)
    said = {"start": runner.free(), "cached": [], "running": [], "coded": [], "dense": []}

    def draw(count):
        return torch.randint(0, 390, (count,), generator=generator).tolist()

    def serve(prompts, steps, chunk=10**6):
        cached, answers, found = runner.serve(prompts, steps, chunk)
        said["cached"].append(cached)
        for ids, answer, row, known in zip(prompts, answers, found, cached, strict=True):
            cache = RotateKCache(basis=basis, text="coded", bits=bits)
            for name, host, held in (("coded", coded, cache), ("dense", dense, transformers.DynamicCache())):
                said[name].append(float((row - reference(host, ids, answer, held, known, chunk)).abs().max()))

    start = draw(100)
    serve([start + draw(20), draw(2), draw(90)], 71)
    serve([start + draw(7)], 30)
    serve([start + draw(30)], 5, chunk=16)
    serve([start[:2] + draw(30), start[:60] + draw(3)], 20)
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    said["held"] = runner.free()
    runner.tree.evict(EvictParams(num_tokens=10**6))
    said["end"] = runner.free()
    said["forms"] = [len(serving), len(serving - started)]
    return said


def main():
    model, basis, *settings = sys.argv[1:]
    load_sglang()
    for bits in settings:
        print(json.dumps(forked(served, model, basis, bits)))
    print(json.dumps(forked(start, model, [*FLAGS, "--max-total-tokens", "100"], {"ROTATEK_BITS": "4"})))


if __name__ == "__main__":
    main()
