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


def heads_here(configurator: Any) -> HeadShape:
    """The heads of the model in this process, whose pool SGLang is about to size (a `KVCacheConfigurator`)."""
    model = configurator.model_config
    if configurator.kv_cache_dtype != model.dtype:
        raise ValueError(
            f"rotatek_sglang keeps the KV cache in the model's dtype, {model.dtype}; --kv-cache-dtype or the model's "
            f"files ask for {configurator.kv_cache_dtype}: start the server with --dtype bfloat16 --kv-cache-dtype "
            "bfloat16"
        )
    parallel = get_parallel()
    return HeadShape.of_rank(
        model.num_attention_heads,
        model.get_total_num_kv_heads(),
        model.head_dim,
        model.v_head_dim,
        parallel.attn_tp_rank,
        parallel.attn_tp_size,
    )


def plan_for(configurator: Any) -> Plan | CodedPlan:
    """The plan for a model whose pool SGLang is about to size."""
    model, layers = configurator.model_config, configurator.layer_info
    asked, heads = options.from_environment(), heads_here(configurator)
    if asked.fit.allocation.over == "heads" and get_parallel().attn_tp_size > 1:
        raise ValueError(
            "rotatek_sglang does not serve allocation='heads' with tensor parallelism: a token would take more bytes "
            "in one process than in another; use 'layers' or 'uniform'"
        )
    indices, requests = range(layers.start_layer, layers.end_layer), get_schedule().max_running_requests
    if asked.fit.codes_text:
        return CodedPlan.make(
            asked.fit, indices, heads, model.dtype, requests, asked.beginnings, model.context_len, configurator.device
        )
    sealers = [Sealer(asked.fit, index, heads.kv_slice) for index in indices]
    layout = find_layout(sealers, heads, model.dtype, configurator.device)
    bases = asked.bases or BASES_PER_REQUEST * requests
    tables = 2 if asked.cuda_graphs else 1  # graphs read a table of their own
    return Plan.make(sealers, layout, asked.text_share, bases, requests, model.context_len, tables)


def plan_memory(configurator: Any, sizes: Any) -> None:
    """Let SGLang size the pool with our bytes; runs after `DefaultPoolConfigurator.__init__`."""
    if sizes.use_mla_backend:
        raise ValueError("rotatek_sglang does not serve models with multi-head latent attention (MLA)")
    plan = plan_for(sizes)
    if isinstance(plan, CodedPlan):
        CodedPool.plan = plan
    else:
        RotateKPool.plan = plan
    configurator._cell_size = plan.slot_bytes  # noqa: SLF001 (no seam for it)
    configurator._fixed_overhead_bytes += plan.fixed_bytes  # noqa: SLF001
