"""SGLang's two entry points. Both do nothing unless the environment asks for compression (`options.asked_for`)."""

import importlib.metadata
import os
from typing import Any

from rotatek_sglang import SGLANG_VERSION, options

BACKEND = "rotatek"

# Around what SGLang offers no seam for: how its memory is planned, which requests are let in, which slots they have.
POOL_CONFIGURATOR = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator"
ADD_REQUEST = "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req"
ALLOCATE_PROMPT = "sglang.srt.managers.schedule_batch.alloc_for_extend"
STASH_CHUNK = "sglang.srt.managers.scheduler.Scheduler.stash_chunked_request"
WRITE_SLOTS = "sglang.srt.mem_cache.memory_pool.ReqToTokenPool.write"
CAN_RUN_GRAPH = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.can_run_graph"
BEAM_SEARCH = "sglang.srt.beam_search.coordinator.BeamCoordinator.validate_and_init"
FUSED_WRITE = "sglang.srt.models.utils.enable_fused_set_kv_buffer"
LIMIT_REQUEST = "sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens"


def stop_unless_supported() -> None:
    """End the process with a clear message for another SGLang or wrong options.

    SGLang logs an exception of a plug-in and goes on without it, which would serve dense Keys in silence.
    """
    version = importlib.metadata.version("sglang")
    if version != SGLANG_VERSION:
        raise SystemExit(f"rotatek_sglang needs sglang {SGLANG_VERSION}, found {version}")
    try:
        options.from_environment().check_basis_file()
    except (TypeError, ValueError) as error:
        raise SystemExit(f"rotatek_sglang: {error}") from None


def activate_platform() -> str | None:
    """Return the platform's class path if it is asked for: by an option, or by name for dense serving on a CPU."""
    import torch  # noqa: PLC0415 (SGLang asks every process, also those that need nothing of this)

    on_gpu = torch.cuda.is_available()
    if options.asked_for():
        stop_unless_supported()
        if torch.version.hip is not None:
            raise SystemExit("rotatek_sglang serves on CUDA and on a CPU, not on ROCm")
        return f"rotatek_sglang.platforms.RotateK{'Cuda' if on_gpu else 'Cpu'}Platform"
    if os.environ.get("SGLANG_PLATFORM") == "rotatek" and not on_gpu:
        return "rotatek_sglang.platforms.TorchCpuPlatform"
    return None


def register() -> None:
    """Make the attention backend known and hook admission; runs in every process of the server."""
    if not options.asked_for():
        return
    stop_unless_supported()
    from sglang.srt.arg_groups.choices import add_attention_backend_choices  # noqa: PLC0415
    from sglang.srt.layers.attention.attention_registry import register_attention_backend  # noqa: PLC0415
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415

    add_attention_backend_choices([BACKEND])

    @register_attention_backend(BACKEND)
    def _create(runner: object) -> object:
        from rotatek_sglang.backend import RotateKBackend  # noqa: PLC0415
        from rotatek_sglang.coded_backend import CodedBackend  # noqa: PLC0415
        from rotatek_sglang.coded_pool import CodedPool  # noqa: PLC0415

        coded = isinstance(runner.token_to_kv_pool, CodedPool)  # type: ignore[attr-defined]
        return CodedBackend(runner) if coded else RotateKBackend(runner)

    HookRegistry.register(POOL_CONFIGURATOR + ".__init__", _plan_memory, HookType.AFTER)
    HookRegistry.register(BEAM_SEARCH, _refuse_beams, HookType.REPLACE)
    HookRegistry.register(FUSED_WRITE, _write_through_us, HookType.REPLACE)
    if options.from_environment().fit.codes_text:
        HookRegistry.register(ADD_REQUEST, _admit_coded, HookType.AROUND)
        HookRegistry.register(ALLOCATE_PROMPT, _assign_coded_prompt, HookType.AFTER)
        return
    HookRegistry.register(ADD_REQUEST, _admit, HookType.AROUND)
    HookRegistry.register(ALLOCATE_PROMPT, _assign_prompt, HookType.AFTER)
    HookRegistry.register(STASH_CHUNK, _stash_chunk, HookType.AROUND)
    HookRegistry.register(WRITE_SLOTS, _note_new_slots, HookType.AFTER)
    HookRegistry.register(CAN_RUN_GRAPH, _can_run_graph, HookType.AROUND)
    HookRegistry.register(LIMIT_REQUEST, _refuse_too_large, HookType.AFTER)


# The hooks import what they need when they first run: SGLang's modules must not be imported while it is starting.


def _plan_memory(result: object, *args: object, **kwargs: object) -> None:
    from rotatek_sglang.planning import plan_memory  # noqa: PLC0415

    plan_memory(*args, **kwargs)


def _admit(add_one_req: object, *args: object, **kwargs: object) -> object:
    from rotatek_sglang.requests import admit  # noqa: PLC0415

    return admit(add_one_req, *args, **kwargs)


def _assign_prompt(allocated: object, *args: object, **kwargs: object) -> None:
    from rotatek_sglang.requests import assign_prompt  # noqa: PLC0415

    assign_prompt(allocated, *args, **kwargs)


def _admit_coded(add_one_req: object, *args: object, **kwargs: object) -> object:
    from rotatek_sglang.coded_requests import admit  # noqa: PLC0415

    return admit(add_one_req, *args, **kwargs)


def _assign_coded_prompt(allocated: object, *args: object, **kwargs: object) -> None:
    from rotatek_sglang.coded_requests import assign_prompt  # noqa: PLC0415

    assign_prompt(allocated, *args, **kwargs)


def _write_through_us(forward_batch: object) -> bool:
    """Say whether a model writes into the KV pool itself, from a fused kernel: never, the backend does."""
    return False


def _stash_chunk(stash: object, *args: object, **kwargs: object) -> None:
    from rotatek_sglang.requests import keep_to_itself  # noqa: PLC0415

    keep_to_itself(stash, *args, **kwargs)


def _note_new_slots(result: object, *args: Any, **kwargs: Any) -> None:
    from rotatek_sglang.requests import note_new_slots  # noqa: PLC0415

    note_new_slots(*args, **kwargs)


def _can_run_graph(can_run: Any, runner: Any, batch: Any) -> bool:
    """Give SGLang's own answer, unless our buffers do not hold the batch."""
    return bool(can_run(runner, batch) and runner.attn_backend.can_run_graph(batch))


def _refuse_beams(*args: object, **kwargs: object) -> str:
    """Make the error for a request that asks for beam search, whose beams trade slots behind everyone's back."""
    return "rotatek_sglang does not support beam search"


def _refuse_too_large(result: object, *args: object, **kwargs: object) -> None:
    from rotatek_sglang.requests import refuse_too_large  # noqa: PLC0415

    refuse_too_large(*args, **kwargs)
