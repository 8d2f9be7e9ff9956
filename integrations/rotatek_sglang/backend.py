"""The attention backend "rotatek": exact attention over a prompt, which it then seals; decoding from the pools."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import get_parallel, get_serving
from torch import Tensor

from rotatek_cache.codecs.finite import FiniteCheck
from rotatek_cache.codecs.sealing import Sealer
from rotatek_cache.core.attention import attend
from rotatek_sglang import options
from rotatek_sglang.checks import check_basis, check_model
from rotatek_sglang.decode_tables import GRAPH_SEGMENTS, GraphTables, count_segments, padded, table_of
from rotatek_sglang.metrics import Gauges
from rotatek_sglang.pool import RotateKPool
from rotatek_sglang.prompt_attention import OwnTokens, attend_continuation, attend_forms, attend_prompt
from rotatek_sglang.rows import ChunkedPrompt, Segment, places
from rotatek_sglang.storage import LayerStorage, SegmentTable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptPart:
    """The part of a forward that belongs to one request.

    Attributes:
        tokens: where it lies among the tokens of the forward.
        text: int64, which of them are stored as text; None: all.
        text_rows: int64, where.
        visual: int64, which of them are compressed.
        visual_rows: int64, where, after those that waited.
        waiting: int64, text rows of visual tokens of earlier chunks, compressed with them.
        basis: the number of their basis.
        prefix: the tokens that are stored already; None if there are none.
        own: how its tokens see each other where there are some.
        prompt: the prompt of which this is a chunk; None if this is all of it.
    """

    tokens: slice
    text: Tensor | None
    text_rows: Tensor
    visual: Tensor | None = None
    visual_rows: Tensor | None = None
    waiting: Tensor | None = None
    basis: int = 0
    prefix: SegmentTable | None = None
    own: "OwnTokens | None" = None
    prompt: ChunkedPrompt | None = None


class RotateKBackend(AttentionBackend):
    """Attention over a `RotateKPool`.

    A prompt is attended exactly, on the Keys and Values of the forward; then its text is stored dense and its visual
    tokens are sealed. Tokens stored before it, and everything in decoding, are read as segments.
    """

    needs_cpu_seq_lens = True

    def __init__(self, runner: Any) -> None:
        super().__init__()
        pool = runner.token_to_kv_pool
        if not isinstance(pool, RotateKPool):
            raise TypeError(
                f"the attention backend 'rotatek' reads the pool of rotatek_sglang, got {type(pool).__name__}; set "
                "ROTATEK_SPARSITY, ROTATEK_RANK or ROTATEK_ENERGY, or use rotatek_sglang.launch"
            )
        check_model(runner.model, on_gpu=runner.device == "cuda")
        check_basis(pool.sealers[0].options, runner.model, pool.layout.heads)
        self.pool = pool
        self.slots_of = runner.req_to_token_pool.req_to_token
        # The rows of each request: visual tokens first, then text, of which decoding appends one a step.
        self.rows_of = torch.zeros_like(self.slots_of)
        self.ledger = pool.ledger
        runner.req_to_token_pool.attach_aux_cache(self.ledger)
        if runner.server_args.enable_metrics and get_parallel().tp_rank == 0:
            pool.gauges = Gauges({"model_name": get_serving().served_model_name})  # as in SGLang's own
            pool.publish()
        self.parts: list[PromptPart] = []
        self.unanswered: list[FiniteCheck] = []
        self.table: SegmentTable | None = None
        self.new_rows = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.graph_tables: GraphTables | None = None
        if options.from_environment().cuda_graphs and not self.rows_of.is_cuda:
            most = runner.req_to_token_pool.size
            self.init_cuda_graph_state(most, most)
        self._warm_up()

    def _warm_up(self) -> None:
        """Run every form of attention that requests with up to `GRAPH_SEGMENTS` visual segments need, over nothing.

        So that their kernels are compiled before there are requests; those of a seal ran when the pool was planned.
        SGLang's own warm-up sends an image that is too small to be compressed.
        """
        request = torch.zeros(1, dtype=torch.int64, device=self.rows_of.device)
        for count in range(GRAPH_SEGMENTS + 1):
            held = [[Segment(0, first, 1) for first in range(count)]]
            table = table_of(self.rows_of, request, held, [count + 1])
            for storage in self.pool.layers:
                attend_forms(storage.views(table), self.pool.layout.heads, self.pool.layout.dtype)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Find the rows of the forward's tokens; once per forward, for all layers."""
        self.unanswered = report_unanswered(self.unanswered)
        mode = forward_batch.forward_mode
        if mode.is_decode():
            if self.can_run_graph(forward_batch):
                # Also where no graph runs, so that what graphs read is what everything else is tested on.
                self.init_forward_metadata_out_graph(forward_batch)
                self.init_forward_metadata_in_graph(forward_batch)
            else:
                self._prepare_decode(forward_batch)
        elif mode.is_extend_without_speculative():
            self._prepare_extend(forward_batch)
        elif not mode.is_idle():
            raise NotImplementedError(f"the attention backend 'rotatek' does not run forwards of mode {mode.name}")

    def _decoding(self, batch: Any) -> tuple[list[int], list[list[Segment]]]:
        """Return lengths and visual segments of the requests of a batch that decodes."""
        requests = self.ledger.requests
        lengths = batch.seq_lens_cpu[: len(requests)].tolist()
        if len(requests) != len(lengths):
            raise RuntimeError(f"rows were given to {len(requests)} requests, {len(lengths)} are decoded")
        for request, length in zip(requests, lengths, strict=True):
            if request in self.ledger.moved:
                self._read_slots(request, length)
        return lengths, [self.ledger.segments.get(request, []) for request in requests]

    def _prepare_decode(self, batch: Any) -> None:
        lengths, held = padded(*self._decoding(batch), batch.batch_size)
        self.new_rows = self.pool.table.rows[batch.out_cache_loc].long()
        self.rows_of[batch.req_pool_indices, batch.seq_lens - 1] = self.new_rows.int()
        self.table = table_of(self.rows_of, batch.req_pool_indices, held, lengths)

    # CUDA graphs of decoding. SGLang calls these by name.

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make the buffers that graphs of up to `max_bs` requests read."""
        table = self.pool.table
        self.graph_tables = GraphTables(max_bs, self.rows_of, table.visual_rows, table.text_rows)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Return the length of a row of padding: one token, in the text row that padding writes."""
        return 1

    def can_run_graph(self, batch: Any) -> bool:
        """Say whether the buffers of the graphs hold what this batch has."""
        if self.graph_tables is None or batch.batch_size > len(self.graph_tables.new_rows):
            return False
        return count_segments(self._decoding(batch)[1]) <= GRAPH_SEGMENTS

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Write what a step needs of the host into the buffers."""
        assert self.graph_tables is not None
        known = ([], []) if in_capture else self._decoding(forward_batch)
        lengths, held = padded(*known, forward_batch.batch_size)
        self.graph_tables.fill(held, lengths)
        self.table = self.graph_tables.table(forward_batch.batch_size)
        self.new_rows = self.graph_tables.new_rows[: forward_batch.batch_size]

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Write what a step needs of the device into the buffers: recorded in the graph."""
        if self.graph_tables is not None and forward_batch.forward_mode.is_decode():
            batch = forward_batch
            self.graph_tables.gather(self.pool.table.rows, batch.out_cache_loc, batch.req_pool_indices, batch.seq_lens)

    def _prepare_extend(self, batch: Any) -> None:
        self.parts = []
        first = 0
        for row, request in enumerate(self.ledger.requests):
            prefix, count = batch.extend_prefix_lens_cpu[row], batch.extend_seq_lens_cpu[row]
            self.parts.append(self._prompt_part(request, prefix, count, slice(first, first + count)))
            first += count

    def _prompt_part(self, request: int, prefix: int, count: int, tokens: slice) -> PromptPart:
        prompt = self.ledger.chunked.get(request)
        is_last = prompt is not None and prompt.is_last
        before = waiting = own = None
        first = prefix
        if prefix:
            if not is_last:  # then the slots have new rows already, and the chunk before has read the old ones
                self._read_slots(request, prefix)
            index = torch.tensor([request], device=self.rows_of.device)
            before = table_of(self.rows_of, index, [self.ledger.segments.get(request, [])], [prefix])
            own = OwnTokens.of(count, self.rows_of.device)
        if prompt is not None and is_last:
            assert before is not None
            first = prompt.first
            dense = before.slots[0, first:prefix].long()  # what the chunks before stored, all of it dense, comes last
            waiting = dense[places(prompt.visual[: prefix - first], dense.device)]
            del self.ledger.chunked[request]
        self._read_slots(request, prefix + count)
        rows = self.pool.table.rows[self.slots_of[request, first : prefix + count].long()].long()
        new = rows[prefix - first :]
        compressed = self.ledger.compressed.pop(request, None)
        if compressed is None or not compressed.any():
            return PromptPart(tokens, None, new, prefix=before, own=own, prompt=prompt)
        is_visual = compressed[prefix - first :]
        device = rows.device
        text = places(~is_visual, device)
        return PromptPart(
            tokens,
            text=text,
            text_rows=new[text],
            visual=places(is_visual, device),
            visual_rows=-1 - rows[places(compressed, device)],
            waiting=waiting,
            basis=self.ledger.segments[request][-1].basis,
            prefix=before,
            own=own,
            prompt=prompt,
        )

    def _read_slots(self, request: int, length: int) -> None:
        """Find the rows of a request's first tokens, from its slots."""
        rows, self.ledger.segments[request] = self.pool.table.layout(self.slots_of[request, :length])
        self.rows_of[request, :length] = rows
        self.ledger.moved.discard(request)

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
        """Attend a prompt exactly and store it.

        Args:
            q, k, v: after RoPE, one row per token of the forward.

        Returns:
            ``[tokens, H_q * D_v]``.
        """
        refuse_extras(kwargs)
        q, k, v = heads_of(q, k, v, layer)
        output = q.new_empty(q.shape[0], q.shape[1], layer.v_head_dim)
        storage = self.pool.layer(layer.layer_id)
        sealer = self.pool.sealers[layer.layer_id - self.pool.start_layer]
        for part in self.parts:
            q_part, k_part, v_part = (tensor[part.tokens] for tensor in (q, k, v))
            if part.prefix is None:
                output[part.tokens] = attend_prompt(q_part, k_part, v_part, layer.scaling)
            else:
                views = storage.views(part.prefix)
                assert part.own is not None
                output[part.tokens] = attend_continuation(q_part, k_part, v_part, views, part.own, layer.scaling)
            self._store(part, storage, sealer, q_part, k_part, v_part)
        return output.flatten(1)

    def _store(self, part: PromptPart, storage: LayerStorage, sealer: Sealer, q: Tensor, k: Tensor, v: Tensor) -> None:
        queries = self._window(part, sealer, q)
        if part.visual is None:
            storage.write_text(part.text_rows, k, v)
            return
        keys, values = k[part.visual], v[part.visual]
        if part.waiting is not None:
            keys = torch.cat([storage.text_keys[part.waiting], keys])
            values = torch.cat([storage.text_values[part.waiting], values])
        keys, values, queries = keys.transpose(0, 1), values.transpose(0, 1), queries.transpose(0, 1)[None]
        span = [(0, keys.shape[1])]
        # Dense attention would answer this request with NaN, and so does this, by way of its text; a basis cannot be
        # fitted. The other requests of the batch are none of its business, and nothing waits for the device.
        finite = keys.isfinite().all() & values.isfinite().all() & queries.isfinite().all()
        marked = torch.where(finite, 0.0, torch.nan).to(k.dtype)
        message = f"Layer {sealer.layer} holds NaN or infinity for a prompt with an image"
        self.unanswered.append(FiniteCheck(marked, message))
        storage.write_text(part.text_rows, k[part.text] + marked, v[part.text] + marked)
        for states in (keys, values):  # picked out of the forward's: no other's
            states.masked_fill_(~finite, 0.0)
        queries = torch.where(finite, queries, 0.0)
        stored_keys = sealer.store_keys(keys, span, queries, None)
        stored_values = sealer.store_values(values, span)
        assert part.visual_rows is not None
        storage.keys.write(stored_keys, part.visual_rows, part.basis)
        storage.values.write(stored_values, part.visual_rows, part.basis)

    @staticmethod
    def _window(part: PromptPart, sealer: Sealer, q: Tensor) -> Tensor:
        """Give the last queries ``[n, H_q, D]`` of the prompt so far; those of earlier chunks stay until its last."""
        count = sealer.options.query_window
        if part.prompt is None:
            return q[-count:]
        earlier = part.prompt.queries.pop(sealer.layer, None)
        queries = q[-count:] if earlier is None else torch.cat([earlier, q])[-count:]
        if sealer.calibrated is None and not part.prompt.is_last and part.prompt.visual.any():
            part.prompt.queries[sealer.layer] = queries.clone()
        return queries

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
        storage.write_text(self.new_rows, k, v)
        assert self.table is not None
        output, _ = attend(q[:, :, None], storage.views(self.table), layer.scaling, return_lse=False)
        return output.flatten(1)

    def support_triton(self) -> bool:
        """Say whether SGLang may use its Triton helpers around this backend."""
        return bool(self.rows_of.is_cuda)


def report_unanswered(checks: list[FiniteCheck]) -> list[FiniteCheck]:
    """Say what is known by now of states that were not finite; returns the checks whose answers are on their way."""
    waiting = []
    for check in checks:
        try:
            if not check.passed():
                waiting.append(check)
        except ValueError as error:
            log.error("%s", error)  # noqa: TRY400 (where it was found out says nothing)
    return waiting


def refuse_extras(extras: dict[str, Any]) -> None:
    """Raise for what SGLang asks of attention beyond the plain kind."""
    for name, value in extras.items():
        if value is not None:
            raise NotImplementedError(f"the attention backend 'rotatek' does not support {name!r}")


def heads_of(q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention) -> tuple[Tensor, Tensor, Tensor]:
    """View rows as heads: ``[tokens, H, D]`` each."""
    return (
        q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
        k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
        v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
    )
