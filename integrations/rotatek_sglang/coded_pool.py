"""SGLang's KV pool and slot allocator where all tokens are coded: slots are rows."""

import logging
import os
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from torch import Tensor

from rotatek_cache.codecs.token_rows import RECENT_TOKENS, SINK_TOKENS
from rotatek_sglang import metrics
from rotatek_sglang.coded_layout import CodedPlan
from rotatek_sglang.coded_storage import CodedLayer, Sinks
from rotatek_sglang.metrics import Gauges
from rotatek_sglang.pool import NoDenseKeys

log = logging.getLogger(__name__)

LEAST_TOKENS = 2 * RECENT_TOKENS


class CodedLedger:
    """A record of the requests that run, which SGLang keeps up to date: numbers of its request pool.

    Attributes:
        ring_start: position of the first token in the ring of each.
        dense_capacity: tokens that can be scheduled, which SGLang asks for.
    """

    def __init__(self, dense_capacity: int) -> None:
        self.dense_capacity = dense_capacity
        self.clear()

    def clear(self) -> None:
        """Forget all requests."""
        self.ring_start: dict[int, int] = {}

    reset_allocator = clear

    def alloc_to_lengths(self, *, req_pool_indices_cpu: Tensor, target_seq_lens_cpu: Tensor) -> None:
        """Take no note that the next batch holds these requests."""

    @property
    def sinks(self) -> int:
        """Sinks that the requests brought themselves."""
        return sum(max(0, SINK_TOKENS - start) for start in self.ring_start.values())

    def free(self, request: int) -> None:
        """Forget a request, which is over or retracted."""
        self.ring_start.pop(int(request), None)


class CodedPool(NoDenseKeys):
    """Takes the place of the dense pool; a slot is a row of codes."""

    plan: CodedPlan | None = None  # of this process, set when SGLang sizes the pool

    def _create_buffers(self) -> None:
        plan = type(self).plan
        if plan is None:
            raise RuntimeError("the KV pool was not sized by SGLang's DefaultPoolConfigurator, which RotateK needs")
        if self.layer_num != len(plan.rows):
            raise RuntimeError(f"{self.layer_num} layers in this pool, {len(plan.rows)} were planned for")
        if self.size < LEAST_TOKENS:
            raise ValueError(
                f"the KV pool holds {self.size} tokens, which no request fits into; at least {LEAST_TOKENS} are "
                "needed: give it more memory (--mem-fraction-static, --max-total-tokens) or lower "
                f"--max-running-requests, each of which takes {plan.ring_bytes:,} bytes for its last tokens"
            )
        slots = self.size + self.page_size  # the first page takes what padding writes
        self.layers = [
            CodedLayer(keys, values, slots, plan.sinks, plan.rings, plan.dtype, self.device)
            for keys, values in plan.rows
        ]
        self.sinks = Sinks(slots, plan.sinks, self.device)
        self.ring_starts = torch.zeros(plan.rings, dtype=torch.int64, device=self.device)
        self.ledger = CodedLedger(self.size)
        self.gauges: Gauges | None = None  # set by the attention backend if metrics are on
        self.k_buffer: list[Tensor] = []
        self.v_buffer: list[Tensor] = []
        log.info("%s", self.describe())
        dense = plan.dense_tokens(self.size)
        if self.size <= dense:
            log.warning(
                "RotateK: %s tokens fit, where a dense cache would hold %s: lower --max-running-requests or --bits, or "
                "give the pool more memory",
                f"{self.size:,}",
                f"{dense:,}",
            )

    def describe(self) -> str:
        """Describe the pool for the start-up log."""
        plan = type(self).plan
        assert plan is not None
        dense = plan.dense_tokens(self.size)
        return (
            f"RotateK (process {os.getpid()}): all tokens coded, bits {plan.bits()}; a token takes {plan.row_bytes:,} "
            f"bytes, dense {plan.dense_bytes:,}; set aside are {plan.ring_bytes / 2**20:,.1f} MiB for the "
            f"{RECENT_TOKENS} last tokens of each of {plan.requests} requests at once, and dense rows for the "
            f"{SINK_TOKENS} first of {plan.beginnings:,} prompts; {self.size:,} tokens fit in "
            f"{(self.size * plan.slot_bytes + plan.fixed_bytes) / 2**20:,.1f} MiB, all of this included, where a dense "
            f"cache would hold {dense:,} ({self.size / dense:.3f}x)"
        )

    def layer(self, layer_id: int) -> CodedLayer:
        """Return the storage of a layer of the model."""
        return self.layers[layer_id - self.start_layer]

    def publish(self, used: int) -> None:
        """Bring the metrics up to date, if there are any, with so many slots in use."""
        if self.gauges is not None and self.plan is not None:
            running = len(self.ledger.ring_start)
            self.gauges.set(metrics.coded_values(self.size, used, self.sinks, running, self.plan))

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Count the bytes held for Keys and for Values."""
        held = [layer.tensors() for layer in self.layers]
        return sum(t.nbytes for keys, _ in held for t in keys), sum(t.nbytes for _, values in held for t in values)


class CodedAllocator(PagedTokenToKVPoolAllocator):
    """SGLang's allocator, which gives the first tokens of a prompt dense rows with their slots, and takes them back."""

    @property
    def sinks(self) -> Sinks:
        """Those of the pool."""
        found: Sinks = self._kvcache.sinks
        return found

    def publish(self) -> None:
        """Bring the metrics up to date."""
        self._kvcache.publish(self.size - self.available_size())

    def alloc_decode(self, seq_lens: Tensor, seq_lens_cpu: Tensor, last_loc: Tensor) -> Tensor | None:
        """Return slots of the next token of every request; None if they are short."""
        slots = super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)
        if slots is not None:
            early = [row for row, length in enumerate(seq_lens_cpu.tolist()) if length <= SINK_TOKENS]
            if early:
                self.sinks.take(slots[to_device(early, slots.device)])
            self.publish()
        return slots

    def _release_page_ids(self, *page_ids: Tensor) -> None:
        first = torch.cat(page_ids).to(torch.int64) * self.page_size
        self.sinks.release((first[:, None] + torch.arange(self.page_size, device=first.device)).flatten())
        super()._release_page_ids(*page_ids)
        self.publish()

    def clear(self) -> None:
        """Set everything free."""
        super().clear()
        self.sinks.clear()
        self.publish()

    def check_decode_capacity(
        self, *, num_tokens: int, tree_cache: Any, requests: Any = None, spec_algorithm: Any = None
    ) -> bool:
        """Say whether slots and sinks last for the next step; if not, SGLang retracts requests."""
        slots = super().check_decode_capacity(
            num_tokens=num_tokens, tree_cache=tree_cache, requests=requests, spec_algorithm=spec_algorithm
        )
        early = sum(req.seqlen <= SINK_TOKENS for req in requests or ())
        return slots and sinks_for(self, tree_cache, early)


def sinks_for(allocator: CodedAllocator, tree_cache: Any, count: int, held: int = 0) -> bool:
    """Make sure of so many free sinks, for which cached prefixes that are not in use may have to go; say if it did.

    Nothing goes where that could not be enough, seeing that running requests hold `held`. Only where sinks are short
    does this wait for the device.
    """
    sinks = allocator.sinks
    # The exact number before anything else is asked: processes that share a model must come to the same answer.
    if count <= sinks.free() or count <= sinks.free(wait=True):
        return True
    if count > sinks.total - held:
        return False
    while count > sinks.free(wait=True):
        least = EvictParams(num_tokens=allocator.page_size)
        if tree_cache is None or not tree_cache.evict(least).num_tokens_evicted:
            return False
    return True


def to_device(numbers: list[int], device: torch.device | str) -> Tensor:
    """Send int64 numbers of the host to a device; nobody waits for it."""
    pin = torch.device(device).type == "cuda"
    return torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=pin).to(device, non_blocking=True)
