"""What a request asks of the pools: which of its tokens are stored as visual ones, and whether it fits."""

from typing import Any

import torch
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult
from torch import Tensor

from rotatek_sglang.pool import RotateKPool, make_room
from rotatek_sglang.rows import SlotTable


def visual_tokens(req: Any, begin: int, end: int) -> Tensor:
    """bool ``[end - begin]`` on the host: which tokens of the request are images or frames of a video."""
    mask = torch.zeros(end - begin, dtype=torch.bool)
    inputs = req.multimodal_inputs
    for item in inputs.mm_items if inputs is not None else ():
        if item.is_image() or item.is_video():
            for first, last in item.offsets:  # both inclusive
                mask[max(0, first - begin) : max(0, last + 1 - begin)] = True
    return mask


def compressed_tokens(pool: RotateKPool, req: Any, begin: int, end: int) -> Tensor:
    """bool ``[end - begin]``: which of the request's new tokens go to visual rows."""
    mask = visual_tokens(req, begin, end)
    return mask if pool.worth(int(mask.sum())) else torch.zeros_like(mask)


def assign_prompt(allocated: Any, batch: Any) -> None:
    """Give rows to the slots of a prompt; runs after SGLang's `alloc_for_extend`."""
    slots = allocated[0]
    pool = batch.token_to_kv_pool_allocator.get_kvcache()
    for req, part in zip(batch.reqs, slots.split(list(batch.extend_lens)), strict=True):
        pool.table.assign(part, compressed_tokens(pool, req, req.prefix_len, req.prefix_len + len(part)))
    pool.publish()


def rows_of_prompt(pool: RotateKPool, req: Any) -> tuple[int, int]:
    """(text rows, visual rows) that the request's tokens after its prefix take."""
    end = len(req.full_untruncated_fill_ids)
    visual = int(compressed_tokens(pool, req, req.prefix_len, end).sum())
    return end - req.prefix_len - visual, visual


def admit(add_one_req: Any, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Let a request wait while rows for its prompt and its answer are short; runs around `PrefillAdder.add_one_req`."""
    allocator = adder.token_to_kv_pool_allocator
    pool = allocator.get_kvcache()
    text, visual = rows_of_prompt(pool, req)
    bases = int(visual > 0)
    left = max(0, req.sampling_params.max_new_tokens - len(req.output_ids))
    text += min(left, CLIP_MAX_NEW_TOKENS)
    for other in adder.can_run_list:  # admitted in this pass, nothing allocated yet
        other_text, other_visual = rows_of_prompt(pool, other)
        other_left = max(0, other.sampling_params.max_new_tokens - len(other.output_ids))
        text += other_text + min(other_left, CLIP_MAX_NEW_TOKENS)
        visual += other_visual
        bases += int(other_visual > 0)
    if adder.running_batch is not None:
        # What SGLang expects running requests to decode yet, and a row for the step in flight.
        offset = adder._get_running_request_total_token_offset  # noqa: SLF001 (its own estimate, not a second one)
        text += sum(1 + max(0, int(offset(running))) for running in adder.running_batch.reqs)
    with adder._lock_node(req.last_node):  # noqa: SLF001 (what is cached of this request must stay)
        if not make_room(allocator, adder.tree_cache, text, visual, bases):
            return AddReqResult.NO_TOKEN
    return add_one_req(adder, req, *args, **kwargs)


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
    visual = int(compressed_tokens(pool, req, 0, tokens).sum())
    text = tokens - visual
    if text >= table.text_rows or visual > table.visual_rows:
        req.set_finish_with_abort(
            f"The prompt needs {text} text rows and {visual} visual rows of the KV pool, which has "
            f"{table.text_rows} and {table.visual_rows}: shorten it, use a smaller image, or start the server with "
            "more memory or another --text-share."
        )
        req.sampling_params.max_new_tokens = 0
        return
    room = table.text_rows - text - 1
    sampling = req.sampling_params
    sampling.max_new_tokens = min(sampling.max_new_tokens, room)
    sampling.min_new_tokens = min(sampling.min_new_tokens, sampling.max_new_tokens)
