"""RotateK: a KV cache for vision-language models that keeps visual Keys as a few coefficients.

Public names are imported when they are first used, so that the maths never pulls in transformers or triton.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "FitOptions": "basis",
    "KeyBasis": "basis",
    "LayerKV": "layer",
    "RotateKCache": "cache",
    "SegmentView": "segments",
    "attach": "wiring",
    "attend": "attention",
    "detach": "wiring",
    "families": "wiring",
    "merge_state": "attention",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
