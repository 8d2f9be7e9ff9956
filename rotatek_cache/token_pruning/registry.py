"""Token methods by name: one paper, one file in `methods`. Tests and evals walk through `TOKENS` and `DECODED`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from rotatek_cache.token_pruning.decoded import DecodedMethod
from rotatek_cache.token_pruning.interface import TokenMethod
from rotatek_cache.token_pruning.methods.aircache import AirCache
from rotatek_cache.token_pruning.methods.akvq_vl import AKVQVL
from rotatek_cache.token_pruning.methods.divprune import DivPrune
from rotatek_cache.token_pruning.methods.fastv import FastV
from rotatek_cache.token_pruning.methods.hybrid_kv import HybridKV
from rotatek_cache.token_pruning.methods.look_m import LookM
from rotatek_cache.token_pruning.methods.pyramid_drop import PyramidDrop
from rotatek_cache.token_pruning.methods.rkv import RKV
from rotatek_cache.token_pruning.methods.visionzip import VisionZip
from rotatek_cache.token_pruning.methods.vl_cache import VLCache

TOKENS: dict[str, type[TokenMethod]] = {
    "aircache": AirCache,
    "akvq_vl": AKVQVL,
    "divprune": DivPrune,
    "fastv": FastV,
    "hybrid_kv": HybridKV,
    "look_m": LookM,
    "pyramid_drop": PyramidDrop,
    "visionzip": VisionZip,
    "vl_cache": VLCache,
}


DECODED: dict[str, type[DecodedMethod]] = {"rkv": RKV}

M = TypeVar("M")


def token_method(spec: TokenMethod | str) -> TokenMethod:
    """Take a token method as it is, or make one of a name, a share and further settings: ``"vl_cache:0.4"``.

    Settings follow as ``name=value``, separated by commas: ``"vl_cache:0.4,uniform=0.8"``. Without a share, which a
    budget then sets: ``"vl_cache"``.
    """
    if isinstance(spec, TokenMethod):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"tokens must be a token method or a string such as 'fastv:0.4', got {type(spec).__name__}")
    return _made("tokens", spec, TOKENS, "keep")


def decoded_method(spec: str) -> DecodedMethod:
    """Make a method for decoded tokens of its name, cap and further settings: ``"rkv:512,every=64"``."""
    if not isinstance(spec, str):
        raise TypeError(f"decoded must be a string such as 'rkv:512', got {type(spec).__name__}")
    if ":" not in spec and spec in DECODED:
        raise ValueError(
            f"decoded={spec!r}: expected how many tokens of an answer are held at most, as in '{spec}:512'"
        )
    return _made("decoded", spec, DECODED, "cap")


def _made(option: str, spec: str, kinds: Mapping[str, type[M]], first: str) -> M:
    """Make a method of the `kinds` from the text of an option; the setting without a name is `first`."""
    name, _, settings = spec.partition(":")
    if name not in kinds:
        raise ValueError(f"{option} must name one of {', '.join(sorted(kinds))}, got {spec!r}")
    parts = [part.partition("=") for part in settings.split(",")] if settings else []
    pairs = [(key, value) if separator else (first, key) for key, separator, value in parts]
    types = {field.name: field.type for field in dataclasses.fields(kinds[name])}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in pairs:
        if key not in types or key in arguments:
            raise ValueError(
                f"{option}={spec!r}: {key!r} is no setting of {name} (or given twice), which has {sorted(types)}"
            )
        if types[key] is str:
            arguments[key] = value
            continue
        try:
            arguments[key] = int(value) if value.isdigit() and key != "keep" else float(value)
        except ValueError:
            raise ValueError(
                f"{option}={spec!r}: {key} must be a number, got {value!r}; expected '<name>:<{first}>,"
                "<setting>=<value>'"
            ) from None
    return kinds[name](**arguments)
