"""Platforms for SGLang: CUDA and plain torch on a CPU, each with our pool and allocator."""

import logging
from typing import Any

import torch
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.cuda import CudaSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from rotatek_sglang import options
from rotatek_sglang.plugin import BACKEND

log = logging.getLogger(__name__)

PAGE_SIZE = 2  # the smallest for which SGLang lets a platform choose the allocator; rows are given out singly anyway
# Each has a row of the request table and, with an online basis, a basis; where all tokens are coded, a ring.
MAX_RUNNING_REQUESTS = 32
MAX_RUNNING_REQUESTS_CODED = 64

# Field of ServerArgs, what it may be, what it stands for, and why it is refused where that is not plain.
COPIES = "it copies or moves dense Keys by their slots"
UNTRIED = "not tried, since SGLang runs adapters on no CPU; serve the model with the adapter merged, and its own basis"
FITTED = "bases of a request are fitted to its own states; code all tokens (--bits), which is served with it"
REFUSED: tuple[tuple[str, tuple[object, ...], str] | tuple[str, tuple[object, ...], str, str], ...] = (
    (
        "speculative_algorithm",
        (None,),
        "speculative decoding",
        "a token that is refused has already taken the place of one that is still read, 64 tokens before it",
    ),
    ("disaggregation_mode", ("null",), "disaggregation of prefill and decoding", COPIES),
    ("encoder_only", (False,), "a separate encoder"),
    ("language_only", (False,), "a separate encoder"),
    (
        "kv_cache_dtype",
        ("auto", "bfloat16", "bf16"),
        "quantised KV caches (fp8, fp4)",
        "codes of a few bits take their place",
    ),
    (
        "enable_mixed_chunk",
        (False,),
        "mixed chunks",
        "rows of a prompt are counted before those of the step; code all tokens (--bits), which is served with them",
    ),
    ("enable_hierarchical_cache", (False,), "the hierarchical cache (HiCache)", COPIES),
    ("enable_unified_cache_external_linker", (False,), "an external cache", COPIES),
    ("enable_lmcache", (False,), "LMCache", COPIES),
    ("enable_flexkv", (False,), "FlexKV", COPIES),
    ("enable_hisparse", (False,), "HiSparse"),
    ("enable_unified_memory", (False,), "a unified memory pool"),
    ("enable_page_major_kv_layout", (False,), "the page-major layout"),
    ("enable_kv_cache_sharding", (False,), "KV cache sharding"),
    ("enable_streaming_session", (False,), "streaming sessions"),
    ("enable_session_radix_cache", (False,), "sessions in the radix cache"),
    ("enable_two_batch_overlap", (False,), "two-batch overlap"),
    ("enable_pdmux", (False,), "PD multiplexing"),
    ("enable_dp_attention", (False,), "data-parallel attention"),
    ("enable_memory_saver", (False,), "the memory saver", COPIES),
    ("dllm_algorithm", (None,), "diffusion language models"),
    ("enable_lora", (None, False), "LoRA adapters", UNTRIED),
    ("lora_paths", (None, [], {}), "LoRA adapters", UNTRIED),
    ("kv_canary", ("none",), "the KV canary"),
    ("prefill_only_disable_kv_cache", (False,), "prefill without a KV cache"),
    ("dp_size", (1,), "data parallelism in one server", FITTED),
    ("pp_size", (1,), "pipeline parallelism"),
    ("dcp_size", (1,), "decode context parallelism"),
    ("attn_cp_size", (1,), "context parallelism"),
    ("prefill_attention_backend", (None, BACKEND), "another attention backend for prefill"),
    ("decode_attention_backend", (None, BACKEND), "another attention backend for decoding"),
    ("attention_backend", (None, BACKEND), "another attention backend"),
)


# Served where all tokens are coded. A row then follows from its token alone, whoever computed it.
SERVED_CODED = ("enable_mixed_chunk", "dp_size")


def refuse_unsupported(args: Any) -> None:
    """Raise a ValueError that names what is asked for and not supported."""
    from sglang.srt.environ import envs  # noqa: PLC0415 (both need a platform)
    from sglang.srt.utils import is_host_cpu_arm64  # noqa: PLC0415

    if envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.get():
        raise ValueError(
            "rotatek_sglang does not support sizing the KV pool after CUDA graphs were captured "
            "(SGLANG_ENABLE_POST_CAPTURE_KV_SIZING=1 in the environment)"
        )
    # On a CPU SGLang has filled in its own before it asks a platform.
    filled_in = "torch_native" if is_host_cpu_arm64() else "intel_amx"
    coded = options.from_environment().fit.codes_text
    for field, allowed, what, *why in REFUSED:
        if field in SERVED_CODED and coded:
            continue
        value = getattr(args, field)
        if value not in allowed and (field, args.device, value) != ("attention_backend", "cpu", filled_in):
            flag = f"--{field.replace('_', '-')} {value}"
            raise ValueError(": ".join([f"rotatek_sglang does not support {what} ({flag})", *why]))


def switch_off(args: Any) -> None:
    """Switch off what is on by default and not supported, and say so."""
    off = []
    asked = options.from_environment()
    graphs = (asked.cuda_graphs or asked.fit.codes_text) and torch.cuda.is_available()
    config = args.cuda_graph_config
    for phase in (Phase.DECODE, Phase.PREFILL):
        if getattr(config, phase).backend != Backend.DISABLED and not (graphs and phase == Phase.DECODE):
            config = with_phase(config, phase, backend=Backend.DISABLED)
            off.append(f"CUDA graphs ({phase})")
    args.cuda_graph_config = config
    if off:
        log.warning("RotateK: switched off: %s", ", ".join(off))


def apply_defaults(args: Any) -> None:
    """Set what a compressed server needs of SGLang's arguments."""
    refuse_unsupported(args)
    switch_off(args)
    args.attention_backend = BACKEND
    if args.page_size in (None, 1):
        if args.page_size == 1:
            log.warning("RotateK: pages have %s tokens, the fewest that are supported, not 1", PAGE_SIZE)
        args.page_size = PAGE_SIZE
    if args.max_running_requests is None:
        coded = options.from_environment().fit.codes_text
        args.max_running_requests = MAX_RUNNING_REQUESTS_CODED if coded else MAX_RUNNING_REQUESTS
        log.warning("RotateK: --max-running-requests was not given; %s are served at once", args.max_running_requests)


def pool_class(kind: str) -> type | None:
    """Name our pool, for the one kind of attention that it serves (SGLang asks for all of them, whatever the model)."""
    # Not earlier: they need SGLang's runtime, which needs a platform.
    from rotatek_sglang.coded_pool import CodedPool  # noqa: PLC0415
    from rotatek_sglang.pool import RotateKPool  # noqa: PLC0415

    if kind != "mha":
        return None
    return CodedPool if options.from_environment().fit.codes_text else RotateKPool


def allocator_class() -> type:
    """Name our slot allocator."""
    from rotatek_sglang.coded_pool import CodedAllocator  # noqa: PLC0415 (as above)
    from rotatek_sglang.pool import RotateKAllocator  # noqa: PLC0415

    return CodedAllocator if options.from_environment().fit.codes_text else RotateKAllocator


def _as_it_is(tensor: torch.Tensor, device: object = None) -> torch.Tensor:
    return tensor


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU on which everything runs in plain torch: for trying things out, and for tests."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def __init__(self) -> None:
        super().__init__()
        # SGLang pins the frames of a video unless it runs on its own CPU engine; without an accelerator torch refuses.
        torch.Tensor.pin_memory = _as_it_is  # type: ignore[method-assign, assignment]

    def is_pin_memory_available(self, device: torch.device | None = None) -> bool:
        """Say no: there is no GPU to pin for."""
        return False

    def get_default_attention_backend(self) -> str:
        """Name dense attention in torch."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """Name the torch version of every operator."""
        return "native"


class RotateKCpuPlatform(TorchCpuPlatform):
    """`TorchCpuPlatform` with compressed storage."""

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """See `apply_defaults`."""
        apply_defaults(server_args)

    def get_default_attention_backend(self) -> str:
        """Name ours."""
        return BACKEND

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """Name ours."""
        return pool_class(kind)

    def get_paged_allocator_cls(self) -> type:
        """Name ours."""
        return allocator_class()


class RotateKCudaPlatform(CudaSRTPlatform):
    """SGLang's CUDA platform with compressed storage."""

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """See `apply_defaults`."""
        apply_defaults(server_args)

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """Name ours."""
        return pool_class(kind)

    def get_paged_allocator_cls(self) -> type:
        """Name ours."""
        return allocator_class()
