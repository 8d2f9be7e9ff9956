"""RotateK: a KV cache for vision-language models that keeps visual Keys as a few coefficients.

Public names are imported when they are first used, so that the maths never pulls in transformers or triton.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotatek_cache.attention import attend, merge_state
    from rotatek_cache.basis import KeyBasis
    from rotatek_cache.cache import RotateKCache
    from rotatek_cache.layer import LayerKV
    from rotatek_cache.methods.aircache import AirCache
    from rotatek_cache.methods.divprune import DivPrune
    from rotatek_cache.methods.fastv import FastV
    from rotatek_cache.methods.look_m import LookM
    from rotatek_cache.methods.visionzip import VisionZip
    from rotatek_cache.methods.vl_cache import VLCache
    from rotatek_cache.options import FitOptions
    from rotatek_cache.segments import SegmentView
    from rotatek_cache.wiring import attach, detach, families

__version__ = "0.1.0"

__all__ = [
    "AirCache",
    "DivPrune",
    "FastV",
    "FitOptions",
    "KeyBasis",
    "LayerKV",
    "LookM",
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
    "AirCache": "methods.aircache",
    "DivPrune": "methods.divprune",
    "FastV": "methods.fastv",
    "FitOptions": "options",
    "KeyBasis": "basis",
    "LayerKV": "layer",
    "LookM": "methods.look_m",
    "RotateKCache": "cache",
    "SegmentView": "segments",
    "VLCache": "methods.vl_cache",
    "VisionZip": "methods.visionzip",
    "attach": "wiring",
    "attend": "attention",
    "detach": "wiring",
    "families": "wiring",
    "merge_state": "attention",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    if name == "RotateKCache":
        # Makes `attn_implementation={"text_config": "rotatek"}` known to transformers, for use without attach.
        importlib.import_module(f"{__name__}.hf_attention")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
