"""The attention backend "rotatek" where all tokens are coded: it reads and writes the pool of `coded_pool`."""

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import get_parallel, get_serving
from torch import Tensor

from rotatek_cache.codecs.finite import FiniteCheck
from rotatek_cache.codecs.token_rows import RECENT_TOKENS, SINK_TOKENS
from rotatek_cache.core.attention import attend
from rotatek_sglang import metrics, options
from rotatek_sglang.backend import heads_of, refuse_extras, report_unanswered
from rotatek_sglang.checks import check_basis, check_model
from rotatek_sglang.coded_layout import CodedPlan
from rotatek_sglang.coded_pool import CodedPool, to_device
from rotatek_sglang.coded_storage import CodedTable, DecodeTables, Places, table_before
from rotatek_sglang.metrics import Gauges
from rotatek_sglang.prompt_attention import OwnTokens, attend_continuation, attend_forms, attend_prompt


@dataclass(frozen=True)
class PromptPart:
    """The part of a forward that belongs to one request.

    Attributes:
        tokens: where it lies among the tokens of the forward.
        before: what is stored of the request already; None if nothing is.
        own: how its tokens see each other where something is stored before them.
    """

    tokens: slice
    before: CodedTable | None = None
    own: OwnTokens | None = None


class CodedBackend(AttentionBackend):
    """Attention over a `CodedPool`.

    A prompt is attended exactly, on the Keys and Values of the forward, and to what is stored before it. Each of its
    tokens is coded into its slot as it comes; decoding reads sinks, codes and the request's ring. What a decode step
    needs it finds on the device.
    """

    needs_cpu_seq_lens = True

    def __init__(self, runner: Any) -> None:
        super().__init__()
        pool: CodedPool = runner.token_to_kv_pool
        plan = pool.plan
        assert plan is not None
        check_model(runner.model, on_gpu=runner.device == "cuda")
        check_basis(options.from_environment().fit, runner.model, plan.heads)
        self.pool, self.sinks, self.ledger = pool, pool.sinks, pool.ledger
        self.slots_of = runner.req_to_token_pool.req_to_token
        if len(self.slots_of) > plan.rings:
            raise ValueError(f"SGLang runs {len(self.slots_of) - 1} requests at once, {plan.requests} were planned for")
        runner.req_to_token_pool.attach_aux_cache(self.ledger)
        if runner.server_args.enable_metrics and get_parallel().tp_rank == 0:
            rank = get_parallel().dp_rank
            names = {"model_name": get_serving().served_model_name}  # as in SGLang's own
            names |= {} if rank is None else {"dp_rank": str(rank)}
            pool.gauges = Gauges(names, metrics.CODED_DESCRIPTIONS)
            pool.publish(0)
        self.last_layer = pool.start_layer + pool.layer_num - 1
        self.decoding = DecodeTables(runner.req_to_token_pool.size, self.slots_of.shape[1], self.slots_of.device)
        self.parts: list[PromptPart] = []
        self.unanswered: list[FiniteCheck] = []
        self.table: CodedTable | None = None
        self.places: Places | None = None
        self._warm_up(plan)

    def _warm_up(self, plan: CodedPlan) -> None:
        """Run every form of attention once, over nothing, so that no request waits for a kernel to be compiled."""
        device = self.slots_of.device

        def before(length: int, start: int) -> CodedTable:
            slots = torch.zeros(length, dtype=torch.int32, device=device)
            return table_before(
                slots, self.sinks.row_of_slot, 0, start, lambda numbers: to_device(list(numbers), device)
            )

        long = SINK_TOKENS + 2 * RECENT_TOKENS
        # Sinks alone; with a ring; with codes, after a prefix that was cached; with both.
        tables = [before(1, 0), before(SINK_TOKENS + 1, 0), before(long, long), before(long, 0)]
        for table in (*tables, self.decoding.table(1, SINK_TOKENS), self.decoding.table(1, self.decoding.context)):
            for storage in self.pool.layers:
                attend_forms(storage.views(table), plan.heads, plan.dtype)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Find where the forward's tokens are; once per forward, for all layers."""
        self.unanswered = report_unanswered(self.unanswered)
        mode = forward_batch.forward_mode
        if mode.is_decode():
            self._use_buffers(forward_batch.batch_size, int(forward_batch.seq_lens_cpu.numpy().max()))
            self.init_forward_metadata_in_graph(forward_batch)
        elif mode.is_extend_without_speculative():
            self._prepare_extend(forward_batch)
        elif not mode.is_idle():
            raise NotImplementedError(f"the attention backend 'rotatek' does not run forwards of mode {mode.name}")

    def _use_buffers(self, batch: int, longest: int) -> None:
        self.table, self.places = self.decoding.table(batch, longest), self.decoding.places(batch)

    # CUDA graphs of decoding. SGLang calls these by name.

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Have buffers for up to `max_bs` requests."""
        if max_bs > self.decoding.most:
            self.decoding = DecodeTables(max_bs, self.slots_of.shape[1], self.slots_of.device)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Return the length of a row of padding: one token, which goes where padding is written."""
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Read the buffers, of any length that a request may have."""
        self._use_buffers(forward_batch.batch_size, self.decoding.context)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Fill the buffers from SGLang's: recorded in the graph."""
        if forward_batch.forward_mode.is_decode():
            batch = forward_batch
            self.decoding.fill(
                self.slots_of,
                self.sinks,
                self.pool.ring_starts,
                batch.req_pool_indices,
                batch.seq_lens,
                batch.out_cache_loc,
            )

    def _prepare_extend(self, batch: Any) -> None:
        device = self.slots_of.device
        self.parts = []
        sinks: list[int] = []
        recent: list[int] = []
        ring_rows: list[int] = []
        first = 0
        for row, request in enumerate(batch.req_pool_indices_cpu.tolist()):
            prefix, count = batch.extend_prefix_lens_cpu[row], batch.extend_seq_lens_cpu[row]
            tokens = slice(first, first + count)
            if prefix:
                slots, start = self.slots_of[request, :prefix], self.ledger.ring_start[request]
                before = table_before(
                    slots, self.sinks.row_of_slot, request, start, lambda numbers: to_device(list(numbers), device)
                )
                self.parts.append(PromptPart(tokens, before, OwnTokens.of(count, device)))
            else:
                self.parts.append(PromptPart(tokens))
            sinks += range(first, first + max(0, min(count, SINK_TOKENS - prefix)))
            kept = min(count, RECENT_TOKENS)
            recent += range(first + count - kept, first + count)
            positions = range(prefix + count - kept, prefix + count)
            ring_rows += [request * RECENT_TOKENS + position % RECENT_TOKENS for position in positions]
            first += count
        which = to_device(sinks, device)
        slots = batch.out_cache_loc[:first]
        self.places = Places(
            slots,
            which,
            self.sinks.row_of_slot[slots[which]].long(),
            to_device(recent, device),
            to_device(ring_rows, device),
        )

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """Attend prompts and store them.

        Args:
            q, k, v: after RoPE, one row per token of the forward.

        Returns:
            ``[tokens, H_q * D_v]``.
        """
        refuse_extras(kwargs)
        q, k, v = heads_of(q, k, v, layer)
        output = q.new_empty(q.shape[0], q.shape[1], layer.v_head_dim)
        storage = self.pool.layer(layer.layer_id)
        for part in self.parts:
            q_part, k_part, v_part = (tensor[part.tokens] for tensor in (q, k, v))
            if part.before is None or part.own is None:
                output[part.tokens] = attend_prompt(q_part, k_part, v_part, layer.scaling)
            else:
                before = storage.views(part.before)
                output[part.tokens] = attend_continuation(q_part, k_part, v_part, before, part.own, layer.scaling)
        assert self.places is not None
        tokens = len(self.places.slots)
        k, v = k[:tokens], v[:tokens]
        if layer.layer_id == self.last_layer:
            # A token that was not finite in a layer is not in the next: the last one tells of all.
            self.unanswered.append(FiniteCheck(k.sum() + v.sum(), "Keys or Values of a prompt hold NaN or infinity"))
        storage.write(self.places, k, v)
        return output.flatten(1)

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """Store one token of each request and attend to all that it has. Returns ``[B, H_q * D_v]``."""
        refuse_extras(kwargs)
        q, k, v = heads_of(q, k, v, layer)
        storage = self.pool.layer(layer.layer_id)
        assert self.table is not None
        assert self.places is not None
        storage.write(self.places, k, v)
        output, _ = attend(q[:, :, None], storage.views(self.table), layer.scaling, return_lse=False)
        return output.flatten(1)

    def support_triton(self) -> bool:
        """Say whether SGLang may use its Triton helpers around this backend."""
        return bool(self.slots_of.is_cuda)
