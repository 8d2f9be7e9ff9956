"""How much `evals.bench.gpu` measures: on a GPU, and in a rehearsal without one."""

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Extent:
    """The amount of work that is measured.

    Attributes:
        device: "cuda" or "cpu".
        dtype: of the kernel's part and of the model, by torch's name.
        model_dtype: of the model.
        common: fields of every `Setting` of the kernel's part.
        sizes: batch and visual tokens of the decode table.
        kinds: of segments.
        swept: batch, visual tokens and kind of a sweep of splits.
        most_splits: numbers of splits tried; None for all.
        varied, variants: batch and visual tokens, and kinds of segments, whose variants are timed.
        most_variants: of each; None for all.
        called: batch and visual tokens of the host's time for a call.
        shape: of the model, in `shapes.yaml`.
        rank: of the model's methods.
        prefills: prompt lengths.
        rounds: of a prefill.
        sealed: visual tokens and batch of the seals by their parts.
        settings: batch and context of a token.
        compiled: the same of compiled steps.
        text, tokens: of a prompt, and timed.
        host: layers, context, tokens and rounds of the host's time for a token.
        processes: that compile, and that test.
        test_limit: seconds a test.
    """

    device: str = "cuda"
    dtype: str = "bfloat16"
    model_dtype: str = "bfloat16"
    common: Mapping[str, Any] = field(default_factory=dict)
    sizes: Sequence[tuple[int, int]] = ((1, 4096), (1, 16384), (1, 65536), (8, 16384), (8, 65536), (64, 16384))
    kinds: Sequence[str] = ("r = 16", "r = 32", "r = 64", "4 bit", "per head")
    swept: Sequence[tuple[int, int, str]] = (
        (1, 16384, "r = 32"),
        (8, 16384, "r = 32"),
        (8, 32768, "r = 32"),
        (64, 16384, "r = 32"),
        (1, 16384, "4 bit"),
        (8, 32768, "4 bit"),
    )
    most_splits: int | None = None
    varied: Sequence[tuple[int, int]] = ((8, 32768), (1, 16384))
    variants: Sequence[str] = ("4 bit", "per head", "r = 32")
    most_variants: int | None = None
    called: tuple[int, int] = (1, 4096)
    shape: str = "llava-next-8b"
    rank: int = 32
    prefills: Sequence[int] = (4096, 16384)
    rounds: int = 3
    sealed: Sequence[tuple[int, int]] = ((4096, 1), (16384, 1), (16384, 8))
    settings: Sequence[tuple[int, int]] = ((1, 16384), (1, 65536), (8, 16384), (32, 16384), (1, 4096))
    compiled: Sequence[tuple[int, int]] = ((1, 16384), (1, 65536), (1, 4096))
    text: int = 64
    tokens: int = 24
    host: tuple[int, int, int, int] = (32, 512, 16, 2)
    processes: int = min(12, os.cpu_count() or 1)
    test_limit: float = 60.0


REHEARSAL = Extent(
    device="cpu",
    dtype="float16",
    model_dtype="float32",
    common={"q_heads": 4, "kv_heads": 2, "text": 5, "device": "cpu"},
    sizes=((2, 40),),
    kinds=("r = 32", "4 bit"),
    swept=((1, 200, "r = 32"),),
    most_splits=2,
    varied=((2, 20),),
    variants=("4 bit",),
    most_variants=4,
    called=(1, 40),
    shape="rehearsal",
    rank=8,
    prefills=(96,),
    rounds=1,
    sealed=((96, 2),),
    settings=((2, 96),),
    compiled=(),
    text=16,
    tokens=2,
    host=(2, 64, 2, 1),
    processes=1,
)


def ranked(methods: Mapping[str, Mapping[str, Any]], rank: int) -> dict[str, dict[str, Any]]:
    """Return methods with another rank where they have one."""
    other = {"rank": rank, "always_compress": True} if rank != Extent.rank else {"rank": rank}
    return {name: dict(options) | (other if "rank" in options else {}) for name, options in methods.items()}


def kernel_common(extent: Extent) -> dict[str, Any]:
    """Return the fields of every `Setting` of the kernel's part."""
    return {"dtype": getattr(importlib.import_module("torch"), extent.dtype), **extent.common}


def shape_of(extent: Extent) -> dict[str, Any]:
    """Return the fields of the model's text config."""
    if extent.shape == "rehearsal":
        narrow: dict[str, Any] = importlib.import_module("evals.bench.gpu_model").HOST_SHAPE
        return narrow | {"num_hidden_layers": 2, "head_dim": 32}
    yaml = importlib.import_module("yaml")
    shapes: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text())
    return shapes[extent.shape]
