"""SGLang's KV pool and slot allocator over the two physical pools."""

import logging
import os
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from torch import Tensor

from rotatek_sglang import metrics
from rotatek_sglang.layout import Plan, Worth
from rotatek_sglang.metrics import Gauges
from rotatek_sglang.rows import NOTHING, Need, RequestLedger, SlotTable, added
from rotatek_sglang.storage import LayerStorage, build_storage

log = logging.getLogger(__name__)

LEAST_TEXT_ROWS = 64
NO_DENSE_KEYS = (
    "the KV pool holds coefficients, which only the attention backend 'rotatek' reads; start the server with "
    "--attention-backend rotatek and without what reads or moves dense Keys"
)


class NoDenseKeys(MHATokenToKVPool):
    """A KV pool without dense Keys: whatever reads, writes or moves them by slot must not find any."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(NO_DENSE_KEYS)

    get_key_buffer = get_value_buffer = get_kv_buffer = set_kv_buffer = get_raw_kv_buffer = _refuse
    _get_key_buffer = _get_value_buffer = move_kv_cache = get_cpu_copy = load_cpu_copy = _refuse
    get_contiguous_buf_infos = get_device_pool_infos = host_pool_decls = _refuse


class RotateKPool(NoDenseKeys):
    """Takes the place of the dense pool. Slots are its tokens; rows are given to them by `table`."""

    plan: Plan | None = None  # of this process, set when SGLang sizes the pool

    def _create_buffers(self) -> None:
        plan = type(self).plan
        if plan is None:
            raise RuntimeError("the KV pool was not sized by SGLang's DefaultPoolConfigurator, which RotateK needs")
        if self.layer_num != len(plan.layout.layers):
            raise RuntimeError(f"{self.layer_num} layers in this pool, {len(plan.layout.layers)} were planned for")
        text, visual = plan.rows(self.size)
        if text < LEAST_TEXT_ROWS:
            raise ValueError(
                f"the KV pool has {text} text rows at --text-share {plan.text_share:g}, which no prompt with its chat "
                f"template fits into; at least {LEAST_TEXT_ROWS} are needed: raise --text-share, or give the pool more "
                "memory (--mem-fraction-static, --max-total-tokens)"
            )
        self.table = SlotTable(self.size + self.page_size, text, visual, plan.bases, self.device)
        # Row 0 of the text takes what padding writes.
        self.layers = build_storage(plan.layout, text + 1, visual, plan.bases, self.device)
        self.sealers, self.layout = plan.sealers, plan.layout
        self.worth = Worth(plan.layout, plan.sealers)
        self.ledger = RequestLedger(self.size, self.table, self.publish)
        self.gauges: Gauges | None = None  # set by the attention backend if metrics are on
        self.k_buffer: list[Tensor] = []
        self.v_buffer: list[Tensor] = []
        log.info("%s", describe(plan, self))
        dense = dense_tokens(plan, self)
        if self.size <= dense:
            log.warning(
                "RotateK: %s tokens fit, where a dense cache would hold %s: lower --text-share or --bases, or "
                "compress more",
                f"{self.size:,}",
                f"{dense:,}",
            )

    @property
    def longest_in_chunks(self) -> int:
        """Tokens of a prompt up to which its visual tokens may wait in text rows for its last chunk: half of these."""
        return self.table.text_rows // 2

    def layer(self, layer_id: int) -> LayerStorage:
        """Return the storage of a layer of the model."""
        return self.layers[layer_id - self.start_layer]

    def publish(self) -> None:
        """Bring the metrics up to date, if there are any."""
        if self.gauges is not None and self.plan is not None:
            self.gauges.set(metrics.values(self.table, self.plan.layout, self.ledger.with_basis))

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Count the bytes held for Keys and for Values, bases included."""
        sizes = [layer.tensors_bytes() for layer in self.layers]
        return sum(keys for keys, _ in sizes), sum(values for _, values in sizes)


def held_bytes(plan: Plan, pool: RotateKPool) -> int:
    """Count the bytes of the pool with all its tables."""
    return sum(pool.get_kv_size_bytes()) + plan.fixed_bytes - plan.bases * plan.layout.basis_bytes


def dense_tokens(plan: Plan, pool: RotateKPool) -> int:
    """Count the tokens that a dense cache holds in as many bytes."""
    return held_bytes(plan, pool) // plan.layout.text_bytes


def describe(plan: Plan, pool: RotateKPool) -> str:
    """Describe the pool for the start-up log."""
    layout, held, dense = plan.layout, held_bytes(plan, pool), dense_tokens(plan, pool)
    return (
        f"RotateK (process {os.getpid()}): ranks {layout.ranks()}; a text token takes {layout.text_bytes:,} bytes, a "
        f"visual one {layout.visual_bytes:,}, a basis {layout.basis_bytes:,}; {pool.table.text_rows:,} text rows, "
        f"{pool.table.visual_rows:,} visual rows, {plan.bases} bases in {held / 2**20:,.1f} MiB; {pool.size:,} tokens "
        f"fit at a text share of {plan.text_share:g}, where a dense cache would hold {dense:,} "
        f"({pool.size / dense:.3f}x); prompts with images are read in chunks up to {pool.longest_in_chunks:,} tokens, "
        "at once beyond"
    )


def make_room(allocator: Any, tree_cache: Any, need: Need, held: Need, later: Need = NOTHING) -> bool:
    """Make sure of so many free rows and bases, for which unused cached prefixes may have to go; say if it did.

    Args:
        allocator: of the pool.
        tree_cache: SGLang's prefix cache.
        need: what is needed now, and made room for.
        held: what running requests hold, at least. Nothing goes where all else would not be enough.
        later: what has to fit beside it some time, for which nothing goes yet.
    """
    table: SlotTable = allocator.table
    total = added((need, later))
    evictable = 0 if tree_cache is None else tree_cache.evictable_size()
    if not table.fits(total) and not table.could_fit(total, held, evictable):
        return False
    while not table.fits(need):
        # SGLang chooses what goes, the oldest; of a prompt with an image that is rows of both kinds.
        short = max(need.text - table.text.available, need.visual - table.visual.available, allocator.page_size)
        if not tree_cache.evict(EvictParams(num_tokens=short)).num_tokens_evicted:
            return False
    return True


class RotateKAllocator(PagedTokenToKVPoolAllocator):
    """Gives rows to the slots that it hands out for decoding, and takes rows back with the slots.

    Slots of a prompt get their rows from `assign_prompt`, since only the request knows which of them are visual.
    """

    @property
    def table(self) -> SlotTable:
        """The slot table of the pool."""
        return self._kvcache.table

    def alloc_decode(self, seq_lens: Tensor, seq_lens_cpu: Tensor, last_loc: Tensor) -> Tensor | None:
        """Return slots of the next token of every request, each with a text row; None if slots or rows are short."""
        if len(seq_lens) > self.table.text.available:
            return None
        slots = super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)
        if slots is not None:
            self.table.assign_text(slots)
            self._kvcache.publish()
        return slots

    def _release_page_ids(self, *page_ids: Tensor) -> None:
        first = torch.cat(page_ids).to(torch.int64) * self.page_size
        self.table.release((first[:, None] + torch.arange(self.page_size, device=first.device)).flatten())
        super()._release_page_ids(*page_ids)
        self._kvcache.publish()

    def clear(self) -> None:
        """Set everything free."""
        super().clear()
        self.table.clear()
        self._kvcache.publish()

    def check_decode_capacity(
        self, *, num_tokens: int, tree_cache: Any, requests: Any = None, spec_algorithm: Any = None
    ) -> bool:
        """Say whether slots and text rows last for the next step; if not, SGLang retracts requests."""
        slots = super().check_decode_capacity(
            num_tokens=num_tokens, tree_cache=tree_cache, requests=requests, spec_algorithm=spec_algorithm
        )
        # A text row a step and request: what they hold beside that is not asked for.
        return slots and make_room(self, tree_cache, Need(num_tokens if requests is None else len(requests)), Need())
