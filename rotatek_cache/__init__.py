"""RotateK: a KV cache for vision-language models that keeps visual Keys as a few coefficients.

Public names are imported when they are first used, so that the maths never pulls in transformers or triton.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotatek_cache.cache.layer import LayerKV
    from rotatek_cache.core.attention import attend, merge_state
    from rotatek_cache.core.basis import KeyBasis
    from rotatek_cache.core.segments import SegmentView
    from rotatek_cache.hf.attach import attach, detach
    from rotatek_cache.hf.cache import RotateKCache
    from rotatek_cache.hf.families import families
    from rotatek_cache.options import FitOptions
    from rotatek_cache.token_pruning.methods.aircache import AirCache
    from rotatek_cache.token_pruning.methods.akvq_vl import AKVQVL
    from rotatek_cache.token_pruning.methods.divprune import DivPrune
    from rotatek_cache.token_pruning.methods.fastv import FastV
    from rotatek_cache.token_pruning.methods.hybrid_kv import HybridKV
    from rotatek_cache.token_pruning.methods.look_m import LookM
    from rotatek_cache.token_pruning.methods.pyramid_drop import PyramidDrop
    from rotatek_cache.token_pruning.methods.visionzip import VisionZip
    from rotatek_cache.token_pruning.methods.vl_cache import VLCache

__version__ = "0.1.0"

__all__ = [
    "AKVQVL",
    "AirCache",
    "DivPrune",
    "FastV",
    "FitOptions",
    "HybridKV",
    "KeyBasis",
    "LayerKV",
    "LookM",
    "PyramidDrop",
    "RotateKCache",
    "SegmentView",
    "VLCache",
    "VisionZip",
    "attach",
    "attend",
    "detach",
    "families",
    "merge_state",
]

_HOMES = {
    "AKVQVL": "token_pruning.methods.akvq_vl",
    "AirCache": "token_pruning.methods.aircache",
    "DivPrune": "token_pruning.methods.divprune",
    "FastV": "token_pruning.methods.fastv",
    "FitOptions": "options",
    "HybridKV": "token_pruning.methods.hybrid_kv",
    "KeyBasis": "core.basis",
    "LayerKV": "cache.layer",
    "LookM": "token_pruning.methods.look_m",
    "PyramidDrop": "token_pruning.methods.pyramid_drop",
    "RotateKCache": "hf.cache",
    "SegmentView": "core.segments",
    "VLCache": "token_pruning.methods.vl_cache",
    "VisionZip": "token_pruning.methods.visionzip",
    "attach": "hf.attach",
    "attend": "core.attention",
    "detach": "hf.attach",
    "families": "hf.families",
    "merge_state": "core.attention",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    if name == "RotateKCache":
        # Makes `attn_implementation={"text_config": "rotatek"}` known to transformers, for use without attach.
        importlib.import_module(f"{__name__}.hf.attention")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
