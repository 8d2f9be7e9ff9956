"""What a request asks of a pool in which all tokens are coded, beyond slots: a few rows for its first tokens."""

from typing import Any

import torch
from sglang.srt.managers.schedule_policy import AddReqResult

from rotatek_cache.codecs.token_rows import SINK_TOKENS
from rotatek_sglang.coded_pool import sinks_for, to_device
from rotatek_sglang.requests import generate_nothing_if_refused


def sinks_ahead(req: Any) -> int:
    """Count the first tokens of a request, answer included, that have no dense row yet."""
    tokens = len(req.full_untruncated_fill_ids) + max(0, req.sampling_params.max_new_tokens - len(req.output_ids))
    return max(0, min(SINK_TOKENS, tokens) - req.prefix_len)


def admit(add_one_req: Any, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Let a request wait while sinks are short; runs around `PrefillAdder.add_one_req`, which counts slots."""
    generate_nothing_if_refused(req)
    count = sinks_ahead(req) + sum(map(sinks_ahead, adder.can_run_list))
    if adder.running_batch is not None:
        count += sum(max(0, SINK_TOKENS - running.seqlen + 1) for running in adder.running_batch.reqs)
    allocator = adder.token_to_kv_pool_allocator
    held = allocator.get_kvcache().ledger.sinks
    with adder._lock_node(req.last_node):  # noqa: SLF001 (what is cached of this request must stay)
        if not sinks_for(allocator, adder.tree_cache, count, held):
            return AddReqResult.NO_TOKEN
    return add_one_req(adder, req, *args, **kwargs)


def assign_prompt(allocated: Any, batch: Any) -> None:
    """Give the first tokens of prompts their dense rows, and begin rings; runs after SGLang's `alloc_for_extend`."""
    slots, _, requests = allocated
    allocator = batch.token_to_kv_pool_allocator
    pool = allocator.get_kvcache()
    begun, first = [], []
    for req, request, part in zip(batch.reqs, requests.tolist(), slots.split(list(batch.extend_lens)), strict=True):
        if request not in pool.ledger.ring_start:
            pool.ledger.ring_start[request] = req.prefix_len
            begun.append(request)
        if req.prefix_len < SINK_TOKENS:
            first.append(part[: SINK_TOKENS - req.prefix_len])
    if first:
        allocator.sinks.take(torch.cat(first))
    if begun:
        starts = [pool.ledger.ring_start[request] for request in begun]
        pool.ring_starts[to_device(begun, slots.device)] = to_device(starts, slots.device)
    allocator.publish()
