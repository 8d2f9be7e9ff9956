"""The table of `rotatek estimate`: the bytes of caches before anything runs."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, PreTrainedConfig

from rotatek_cache import RotateKCache
from rotatek_cache.cli.demo import CODED, SPARSITIES
from rotatek_cache.hf.chat import InputError
from rotatek_cache.hf.config_shapes import dtype_of
from rotatek_cache.hf.estimate import CacheEstimate
from rotatek_cache.options import FitOptions
from rotatek_cache.report import readable_bytes

OPTIONS = (*(described.name for described in dataclasses.fields(FitOptions)), "tokens", "budget")


def load_config(model: str) -> PreTrainedConfig:
    """Load the config of a model by its name or path, or from a config file; an InputError says what is wrong."""
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"the config of '{model}' cannot be read: {reason}") from error


def options_of(spec: str) -> dict[str, Any]:
    """Read options from ``"sparsity=0.75 basis=pca key_bits=4"``; an InputError names what is none."""
    options: dict[str, Any] = {}
    for word in spec.split():
        name, separator, value = word.partition("=")
        if not separator:
            raise InputError(f"--cache must be options as in 'sparsity=0.75 basis=pca', got '{word}' in '{spec}'")
        if name not in OPTIONS:
            raise InputError(f"--cache: '{name}' is no option of RotateKCache, which has {', '.join(OPTIONS)}")
        options[name] = _value(value)
    return options


def _value(text: str) -> Any:
    """Read a number, true, false or null; anything else is a string."""
    for read in (json.loads, float):
        with contextlib.suppress(ValueError):
            return read(text)
    return text


def default_caches() -> list[dict[str, Any]]:
    """List the options that are shown where none are asked for: some sparsities, and codes."""
    return [*({"sparsity": sparsity} for sparsity in SPARSITIES if sparsity), dict(CODED.options or {})]


def dtype_named(name: str | None) -> torch.dtype | None:
    """Look up a dtype of torch; None is the checkpoint's."""
    found = None if name is None else getattr(torch, name, None)
    if name is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InputError(f"--dtype must be a floating-point dtype of torch, such as bfloat16, got '{name}'")
    return found


def estimates(
    config: PreTrainedConfig, caches: Sequence[dict[str, Any]], **prompt: Any
) -> list[tuple[str, CacheEstimate]]:
    """Estimate each cache for one prompt; an InputError says which options cannot be.

    Args:
        config: the model's.
        caches: options of each.
        prompt: as `RotateKCache.estimate` takes it.
    """
    found = []
    for options in caches:
        named = " ".join(f"{name}={value}" for name, value in options.items())
        try:
            found.append((named, RotateKCache.estimate(config, **prompt, **options)))
        except (ValueError, TypeError) as error:
            raise InputError(f"{named}: {error}") from error
    return found


def table(found: Sequence[tuple[str, CacheEstimate]]) -> Table:
    """Lay out estimates, the dense cache first."""
    lines = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    lines.add_column("cache")
    for column in ("bytes", "dense / stored"):
        lines.add_column(column, justify="right", no_wrap=True)
    dense = found[0][1].dense_nbytes
    lines.add_row("dense (DynamicCache)", f"{dense:,} ({readable_bytes(dense)})", "")
    for named, estimate in found:
        sizes = sorted({estimate.least, estimate.nbytes})
        span = " to ".join(f"{size:,}" for size in sizes)
        ratios = " to ".join(f"{dense / size:.2f}x" for size in reversed(sizes))
        lines.add_row(named, span, ratios)
    return lines


def notes(
    config: PreTrainedConfig, dtype: torch.dtype | None, found: Sequence[tuple[str, CacheEstimate]]
) -> list[Text]:
    """Say what the numbers are of."""
    lines = [f"Keys and Values in {str(dtype_of(config, dtype)).removeprefix('torch.')}; all bytes of storage counted."]
    lines += [f"{named}: {estimate.follows}." for named, estimate in found if not estimate.is_exact]
    return [Text(line, style="dim") for line in lines]
