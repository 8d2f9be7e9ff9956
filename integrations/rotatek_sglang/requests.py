"""What a request asks of the pools: which of its tokens are stored as visual ones, and whether it fits."""

import logging
from typing import Any

import torch
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult
from sglang.srt.runtime_context import get_serving
from torch import Tensor

from rotatek_sglang.pool import RotateKPool, make_room
from rotatek_sglang.rows import Need, SlotTable, added

log = logging.getLogger(__name__)


def visual_tokens(req: Any, begin: int, end: int) -> Tensor:
    """Return bool ``[end - begin]`` on the host: which tokens of the request are images or frames of a video."""
    mask = torch.zeros(end - begin, dtype=torch.bool, device="cpu")
    inputs = req.multimodal_inputs
    for item in inputs.mm_items if inputs is not None else ():
        if item.is_image() or item.is_video():
            if item.offsets is None:  # SGLang's LLaVA: known by the ids that stand in for this image
                ids = torch.tensor(req.origin_input_ids[begin:end], dtype=torch.int64, device="cpu")
                mask[: len(ids)] |= ids == item.pad_value
            for first, last in item.offsets or ():  # both inclusive
                mask[max(0, first - begin) : max(0, last + 1 - begin)] = True
    return mask


def compressed_tokens(pool: RotateKPool, req: Any, begin: int, end: int) -> Tensor:
    """Return bool ``[end - begin]``: which of the request's new tokens go to visual rows.

    All visual ones, or none: where compression costs bytes, and where there will never be so many visual rows.
    """
    mask = visual_tokens(req, begin, end)
    count = int(mask.sum())
    return mask if count <= pool.table.visual_rows and pool.worth(count) else torch.zeros_like(mask)


def assign_prompt(allocated: Any, batch: Any) -> None:
    """Give rows to the slots of prompts, or of chunks of them; runs after SGLang's `alloc_for_extend`."""
    slots, _, requests = allocated
    pool = batch.token_to_kv_pool_allocator.get_kvcache()
    waiting = []
    for req, request, part in zip(batch.reqs, requests.tolist(), slots.split(list(batch.extend_lens)), strict=True):
        chunk = slice(req.prefix_len, req.prefix_len + len(part))
        visual = compressed_tokens(pool, req, req.prefix_len, len(req.full_untruncated_fill_ids))
        held = torch.cat([batch.req_to_token_pool.req_to_token[request, : chunk.start], part])
        waiting.append(pool.ledger.assign_chunk(request, held, chunk, visual))
    pool.table.text.give(torch.cat(waiting))
    pool.publish()


def need_of_prompt(pool: RotateKPool, req: Any, *, in_chunks: bool = False, prefix: int | None = None) -> Need:
    """Count what the tokens of a request's prompt after `prefix` (default: what is cached) take, at most."""
    first, end = req.prefix_len if prefix is None else prefix, len(req.full_untruncated_fill_ids)
    tokens = end - first
    visual = int(compressed_tokens(pool, req, first, end).sum())
    return Need(tokens if in_chunks else tokens - visual, visual, int(visual > 0))


def need_of_answer(req: Any) -> Need:
    """Count what the answer of a request that waits takes yet, at most."""
    return Need(min(max(0, req.sampling_params.max_new_tokens - len(req.output_ids)), CLIP_MAX_NEW_TOKENS))


def held_by(pool: RotateKPool, req: Any) -> Need:
    """Count what a running request holds, at least, for tokens that were not cached when it came: its own alone."""
    first, end = req.prefix_len, req.seqlen - 1  # the last has no row yet
    compressed = int(compressed_tokens(pool, req, first, end).sum())
    text = end - first - int(visual_tokens(req, first, end).sum())
    return Need(max(0, text), compressed, int(compressed > 0))


def generate_nothing_if_refused(req: Any) -> None:
    """Have a request that was refused on its way here, and is let in to be told so, wait for no room to answer in.

    SGLang leaves the tokens it asked for where they were, and others would wait behind it.
    """
    if req.to_finish is not None:
        req.sampling_params.max_new_tokens = req.sampling_params.min_new_tokens = 0


def admit(add_one_req: Any, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Let a request wait while rows for its prompt and its answer are short; runs around `PrefillAdder.add_one_req`."""
    generate_nothing_if_refused(req)
    allocator, running = adder.token_to_kv_pool_allocator, adder.running_batch
    pool = allocator.get_kvcache()
    fits, at_once = fits_beside_others(adder, req)
    if not fits and not (adder.can_run_list or pool.ledger.chunked or (running is not None and running.reqs)):
        # Nobody to wait for, so what is cached of its own prompt is in the way: each turn of a chat has a basis of its
        # own, and images too small for one in text rows. All of the prompt fits, or it would have been refused.
        make_room(allocator, adder.tree_cache, need_of_prompt(pool, req, prefix=0), Need(), need_of_answer(req))
        req.init_next_round_input(adder.tree_cache)
        fits, at_once = fits_beside_others(adder, req)
    if not fits:
        return AddReqResult.NO_TOKEN
    if not at_once:
        return add_one_req(adder, req, *args, **kwargs)
    chunk = adder.rem_chunk_tokens
    before = len(adder.can_run_list)
    adder.rem_chunk_tokens = None
    try:
        result = add_one_req(adder, req, *args, **kwargs)
    finally:
        adder.rem_chunk_tokens = chunk
    if len(adder.can_run_list) > before:
        adder.rem_chunk_tokens = 0  # this forward is full
    return result


def fits_beside_others(adder: Any, req: Any) -> tuple[bool, bool]:
    """Tell whether a request fits, once cached prefixes made way; and whether its prompt is read at once.

    As in SGLang, prefixes make way for the prompt alone: for answers they do so when those come, step by step.
    """
    pool = adder.token_to_kv_pool_allocator.get_kvcache()
    chunk = adder.rem_chunk_tokens
    tokens = len(req.full_untruncated_fill_ids) - req.prefix_len
    in_chunks = chunk is not None and adder.ceil_paged_tokens(tokens) > chunk
    needs = [need_of_prompt(pool, req, in_chunks=in_chunks)]
    at_once = in_chunks and needs[0].visual > 0 and len(req.full_untruncated_fill_ids) > pool.longest_in_chunks
    if at_once:
        needs = [need_of_prompt(pool, req)]
    answers = [need_of_answer(req)]
    for other in adder.can_run_list:  # admitted in this pass, nothing allocated yet
        need = need_of_prompt(pool, other)
        # A prompt that goes on has what is left of it reserved.
        needs.append(Need(text=need.text) if other.kv.req_pool_idx in pool.ledger.chunked else need)
        answers.append(need_of_answer(other))
    running = [] if adder.running_batch is None else adder.running_batch.reqs
    if running:
        # What SGLang expects running requests to decode yet, and a row for the step in flight.
        offset = adder._get_running_request_total_token_offset  # noqa: SLF001 (its own estimate, not a second one)
        answers += [Need(text=1 + max(0, int(offset(other)))) for other in running]
    held = added([held_by(pool, other) for other in running])
    with adder._lock_node(req.last_node):  # noqa: SLF001 (what is cached of this request must stay)
        fits = make_room(adder.token_to_kv_pool_allocator, adder.tree_cache, added(needs), held, added(answers))
    return fits, at_once


def keep_to_itself(stash: Any, scheduler: Any, req: Any) -> None:
    """Keep a prompt out of the prefix cache while images of it wait for their last chunk.

    Others would find rows there that are about to change. Runs around `Scheduler.stash_chunked_request`.
    """
    prompt = scheduler.token_to_kv_pool_allocator.get_kvcache().ledger.chunked.get(req.kv.req_pool_idx)
    if prompt is None or not prompt.visual.any():
        stash(scheduler, req)
    else:
        req.prefix_len = req.extend_end


def note_new_slots(pool: Any, indices: Any, values: Tensor) -> None:
    """Note that a request's slots are others now; runs after `ReqToTokenPool.write`."""
    request = indices[0]
    if isinstance(request, int) and pool._aux_cache is not None:  # noqa: SLF001 (our ledger, attached by the backend)
        pool._aux_cache.moved.add(request)  # noqa: SLF001


def refuse_too_large(scheduler: Any, req: Any) -> None:
    """Abort a request that could never be admitted; runs after `Scheduler.init_req_max_new_tokens`."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    if req.to_finish is not None:
        return
    table: SlotTable = pool.table
    tokens = len(req.origin_input_ids)
    # Text rows that are left for the answer, less one that the step takes which begins before its end is seen.
    free = table.text_rows - (tokens - int(compressed_tokens(pool, req, 0, tokens).sum())) - 1
    if free < 1:
        visual = int(visual_tokens(req, 0, tokens).sum())
        if get_serving().allow_auto_truncate and not visual:  # a prompt with images SGLang does not truncate either
            req.origin_input_ids = req.origin_input_ids[: table.text_rows - 2]
            log.warning("A prompt of %s tokens was cut to the %s text rows", tokens, table.text_rows)
            free = 1
    if free < 1:
        req.set_finish_with_abort(
            f"The prompt has {visual} visual tokens and {tokens - visual} others; the KV pool has {table.visual_rows} "
            f"visual rows and {table.text_rows} text rows, two of which the answer takes at least: shorten it, use a "
            "smaller image, or start the server with more memory or another --text-share."
        )
        req.sampling_params.max_new_tokens = 0
        return
    sampling = req.sampling_params
    sampling.max_new_tokens = min(sampling.max_new_tokens, free)
    sampling.min_new_tokens = min(sampling.min_new_tokens, sampling.max_new_tokens)
