"""Calibration: moments of visual Keys and Values over many images in one pass, and the basis file made of them."""

import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rotatek_cache.basis import key_moments
from rotatek_cache.coding import BITS, CodeLayout, quantise
from rotatek_cache.methods.calibrated import FORMAT, STATES

STATE_FORMAT = "rotatek-calibration-1"
SAMPLE_PER_IMAGE = 32  # tokens per image kept to find clip ranges
SAMPLE_MOST = 8192  # tokens kept in all


@dataclass
class Moments:
    """Sums over images for the Keys or Values of one layer.

    Attributes:
        scatter: sum of the scatter within images, each around its own mean, ``[H, D, D]`` float64.
        tokens: visual tokens seen.
        sample: some tokens less their image's mean, ``[H, n, D]`` float32.
    """

    scatter: Tensor
    tokens: int
    sample: Tensor

    @classmethod
    def of(cls, states: Tensor, seed: int) -> "Moments":
        """Moments of the visual states ``[H, S, D]`` of one image; `seed` picks the sample."""
        mean, scatter = key_moments(states.float())
        generator = torch.Generator().manual_seed(seed)
        picked = torch.randperm(states.shape[1], generator=generator)[:SAMPLE_PER_IMAGE].to(states.device)
        sample = states[:, picked].float() - mean[:, None]
        return cls(scatter.double().cpu(), states.shape[1], sample.cpu())

    def __add__(self, other: "Moments") -> "Moments":
        sample = torch.cat([self.sample, other.sample], 1)[:, :SAMPLE_MOST]
        return Moments(self.scatter + other.scatter, self.tokens + other.tokens, sample)

    def basis(self) -> dict[str, Tensor]:
        """What a basis file holds of it."""
        values, vectors = torch.linalg.eigh(self.scatter)
        directions = vectors.flip(-1)
        tensors = {"directions": directions.float(), "spectrum": (values.flip(-1).clamp_min(0) / self.tokens).float()}
        coefficients = self.sample @ directions.float()
        for bits in BITS:
            _, low, step = quantise(coefficients, CodeLayout(((bits, coefficients.shape[-1]),)))
            tensors[f"low{bits}"], tensors[f"step{bits}"] = low, step
        return tensors


class Calibration:
    """Moments of all layers, which can be stored, added to and turned into a basis file."""

    def __init__(self, fingerprint: str, model_type: str) -> None:
        self.fingerprint = fingerprint
        self.model_type = model_type
        self.images = 0
        self.moments: dict[tuple[int, str], Moments] = {}

    def add(self, layer: int, which: str, states: Tensor) -> None:
        """Take the visual states ``[H, S, D]`` of one image at one layer."""
        new = Moments.of(states, seed=self.images)
        old = self.moments.get((layer, which))
        self.moments[layer, which] = new if old is None else old + new

    def save(self, path: str | Path) -> None:
        """Write the state, so that a later run can go on from it."""
        tensors = {}
        for (layer, which), moments in self.moments.items():
            tensors[f"layers.{layer}.{which}.scatter"] = moments.scatter
            tensors[f"layers.{layer}.{which}.sample"] = moments.sample.contiguous()
            tensors[f"layers.{layer}.{which}.tokens"] = torch.tensor(moments.tokens)
        provenance = {"fingerprint": self.fingerprint, "model_type": self.model_type, "images": self.images}
        _write(tensors, {"format": STATE_FORMAT, "provenance": json.dumps(provenance)}, path)

    @classmethod
    def load(cls, path: str | Path, fingerprint: str) -> "Calibration":
        """Read a state written by `save`; a ValueError if it is unreadable or of another model."""
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"calibration state {path} cannot be read: {error}") from None
        if metadata.get("format") != STATE_FORMAT:
            raise ValueError(
                f"{path} is no calibration state: expected {STATE_FORMAT!r}, got {metadata.get('format')!r}"
            )
        provenance = json.loads(metadata["provenance"])
        if provenance["fingerprint"] != fingerprint:
            raise ValueError(f"calibration state {path} belongs to another model ({provenance['model_type']})")
        state = cls(fingerprint, provenance["model_type"])
        state.images = provenance["images"]
        for name, tensor in tensors.items():
            _, layer, which, part = name.split(".")
            if part == "scatter":
                prefix = f"layers.{layer}.{which}."
                state.moments[int(layer), which] = Moments(
                    tensor, int(tensors[prefix + "tokens"]), tensors[prefix + "sample"]
                )
        return state

    def write_basis(self, path: str | Path, source: str = "") -> None:
        """Write the basis file, with where it comes from."""
        if not self.moments:
            raise ValueError("no visual token was seen: the images or prompts hold none")
        tensors = {
            f"layers.{layer}.{which}.{name}": tensor.contiguous()
            for (layer, which), moments in self.moments.items()
            for name, tensor in moments.basis().items()
        }
        provenance = {
            "fingerprint": self.fingerprint,
            "model_type": self.model_type,
            "images": self.images,
            "source": source,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        _write(tensors, {"format": FORMAT, "provenance": json.dumps(provenance)}, path)


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: str | Path) -> None:
    # Written beside the target and moved there, so that a run that is stopped leaves no half file.
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(target)


def fingerprint(model: torch.nn.Module) -> str:
    """A hash that tells models apart: shapes of the text model, and some of each layer's Key and Value projections.

    The numbers are rounded to bfloat16, so that a model has one fingerprint in every dtype it is loaded in.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    digest = hashlib.sha256()
    shape = [getattr(config, name, None) for name in ("num_hidden_layers", "num_key_value_heads", "hidden_size")]
    digest.update(json.dumps([config.model_type, shape]).encode())
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith(("k_proj.weight", "v_proj.weight", "qkv_proj.weight")) and "vision" not in name:
            flat = parameter.detach().flatten()
            numbers = flat[:: max(1, flat.numel() // 256)].to(torch.bfloat16).float().cpu().tolist()
            digest.update(json.dumps(numbers).encode())
    return digest.hexdigest()


@torch.no_grad()
def calibrate(model: torch.nn.Module, prompts: Iterable[dict[str, Any]], state: Calibration) -> Calibration:
    """Run the prompts (what a processor returns, one image each) through an attached model and gather moments.

    Args:
        model: a model prepared by `attach`.
        prompts: model inputs with a batch of one.
        state: what was gathered before, added to.

    Returns:
        `state`.
    """
    from rotatek_cache.cache import RotateKCache, RotateKLayer  # noqa: PLC0415 (the maths needs no transformers)

    for prompt in prompts:
        cache = RotateKCache(sparsity=0)
        model(**prompt, past_key_values=cache, use_cache=True)
        for index, layer in enumerate(cache.layers):
            for segment in layer.kv.segments if isinstance(layer, RotateKLayer) else ():
                state.add(index, STATES[0], segment.keys.data)
                state.add(index, STATES[1], segment.values.data)
        state.images += 1
    return state
