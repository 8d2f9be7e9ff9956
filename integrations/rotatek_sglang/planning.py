"""The division of memory that SGLang sizes its pool with: found before there is a pool, for either kind."""

from typing import Any

from sglang.srt.runtime_context import get_parallel, get_schedule

from rotatek_cache.codecs.sealing import Sealer
from rotatek_sglang import options
from rotatek_sglang.coded_layout import CodedPlan
from rotatek_sglang.coded_pool import CodedPool
from rotatek_sglang.layout import HeadShape, Plan, find_layout
from rotatek_sglang.pool import RotateKPool

BASES_PER_REQUEST = 2  # half of them for images that are only cached


def heads_of_ranks(configurator: Any) -> list[HeadShape]:
    """List the heads of the model in each process that shares it, whose pool SGLang sizes (a `KVCacheConfigurator`)."""
    model = configurator.model_config
    if configurator.kv_cache_dtype != model.dtype:
        raise ValueError(
            f"rotatek_sglang keeps the KV cache in the model's dtype, {model.dtype}; --kv-cache-dtype or the model's "
            f"files ask for {configurator.kv_cache_dtype}: start the server with --dtype bfloat16 --kv-cache-dtype "
            "bfloat16"
        )
    size, heads = get_parallel().attn_tp_size, model.get_total_num_kv_heads()
    # On a CPU SGLang adds heads until they can be split, which no basis file knows of.
    own = getattr(model.hf_text_config, "original_total_num_kv_heads", heads)
    if heads != own or (heads % size and size % heads):
        raise ValueError(
            f"rotatek_sglang cannot split {own} KV heads between {size} processes: give a --tp-size that divides them"
        )
    return [
        HeadShape.of_rank(
            model.num_attention_heads,
            heads,
            model.head_dim,
            model.v_head_dim,
            rank,
            size,
        )
        for rank in range(size)
    ]


def coded_plans(configurator: Any) -> tuple[CodedPlan, list[CodedPlan]]:
    """Make the plan of this process with all tokens coded, and those of all that take other bytes than it."""
    model, layers, asked = configurator.model_config, configurator.layer_info, options.from_environment()
    indices, requests = range(layers.start_layer, layers.end_layer), get_schedule().max_running_requests

    def plan(heads: HeadShape) -> CodedPlan:
        return CodedPlan.make(
            asked.fit, indices, heads, model.dtype, requests, asked.beginnings, model.context_len, configurator.device
        )

    ranks, rank = heads_of_ranks(configurator), get_parallel().attn_tp_rank
    own = plan(ranks[rank])
    if asked.fit.allocation.over != "heads":
        return own, []
    return own, [plan(heads) for heads in ranks if heads != ranks[rank]]


def plan_for(configurator: Any) -> Plan:
    """Make the plan with text dense, for a model whose pool SGLang is about to size."""
    model, layers = configurator.model_config, configurator.layer_info
    asked, parallel = options.from_environment(), get_parallel()
    heads = heads_of_ranks(configurator)[parallel.attn_tp_rank]
    if asked.fit.allocation.over == "heads" and parallel.attn_tp_size > 1:
        raise ValueError(
            "rotatek_sglang does not serve allocation='heads' with tensor parallelism where text is dense: a token "
            "would take more bytes in one process than in another; use 'layers' or 'uniform', or code all tokens "
            "(bits)"
        )
    indices, requests = range(layers.start_layer, layers.end_layer), get_schedule().max_running_requests
    sealers = [Sealer(asked.fit, index, heads.kv_slice) for index in indices]
    layout = find_layout(sealers, heads, model.dtype, configurator.device)
    bases = asked.bases or BASES_PER_REQUEST * requests
    tables = 2 if asked.cuda_graphs else 1  # graphs read a table of their own
    return Plan.make(sealers, layout, asked.text_share, bases, requests, model.context_len, tables)


def plan_memory(configurator: Any, sizes: Any) -> None:
    """Let SGLang size the pool with our bytes; runs after `DefaultPoolConfigurator.__init__`."""
    if sizes.use_mla_backend:
        raise ValueError("rotatek_sglang does not serve models with multi-head latent attention (MLA)")
    if options.from_environment().fit.codes_text:
        own, others = coded_plans(sizes)
        CodedPool.plan = own
        # Each process counts its slots by itself, and all have to come to the number of the one with the widest rows.
        slot, fixed = (max(getattr(plan, each) for plan in (own, *others)) for each in ("slot_bytes", "fixed_bytes"))
    else:
        RotateKPool.plan = plan = plan_for(sizes)
        slot, fixed = plan.slot_bytes, plan.fixed_bytes
    configurator._cell_size = slot  # noqa: SLF001 (no seam for it)
    configurator._fixed_overhead_bytes += fixed  # noqa: SLF001
