"""Calibration: moments of visual Keys and Values over many images in one pass, and the basis file made of them."""

import datetime
import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rotatek_cache.basis import FitOptions, KeyStatistics, key_moments, matrix_roots
from rotatek_cache.coding import BITS, CodeLayout, quantise
from rotatek_cache.methods.calibrated import FORMAT, read_tensors, same_fingerprint
from rotatek_cache.sealing import Ranges, Sealer
from rotatek_cache.segments import Stored

STATE_FORMAT = "rotatek-calibration-1"
METHODS = ("pca", "oblique", "leank")
SAMPLE_PER_IMAGE = 32  # tokens per image kept to find clip ranges
SAMPLE_MOST = 8192  # tokens kept in all


@dataclass
class Moments:
    """Sums over images for the Keys or Values of one layer.

    Attributes:
        scatter: sum of the scatter within images, each around its own mean, ``[H, D, D]`` float64.
        tokens: visual tokens seen.
        sample: some tokens less their image's mean, ``[H, n, D]`` float32.
        query_moment: sum over images of the mean second moment of the prompt's last queries, all heads of a group,
            ``[H, D, D]`` float64; None for Values.
    """

    scatter: Tensor
    tokens: int
    sample: Tensor
    query_moment: Tensor | None = None

    @classmethod
    def of(cls, states: Tensor, seed: int, query_moment: Tensor | None = None) -> "Moments":
        """Moments of the visual states ``[H, S, D]`` of one image; `seed` picks the sample."""
        mean, scatter = key_moments(states.float())
        generator = torch.Generator().manual_seed(seed)
        picked = torch.randperm(states.shape[1], generator=generator)[:SAMPLE_PER_IMAGE].to(states.device)
        sample = states[:, picked].float() - mean[:, None]
        moment = None if query_moment is None else query_moment.double().cpu()
        return cls(scatter.double().cpu(), states.shape[1], sample.cpu(), moment)

    def __add__(self, other: "Moments") -> "Moments":
        sample = torch.cat([self.sample, other.sample], 1)[:, :SAMPLE_MOST]
        moment = None
        if self.query_moment is not None and other.query_moment is not None:
            moment = self.query_moment + other.query_moment
        return Moments(self.scatter + other.scatter, self.tokens + other.tokens, sample, moment)

    def basis(self, method: str = "pca") -> dict[str, Tensor]:
        """What a basis file holds of it.

        Args:
            method: "pca", "oblique" (weighted by the query moment, shrunk by half) or "leank" (static selection of
                channels by query times Key power; a dropped one reads as its mean). Without queries all are "pca".
        """
        covariance = self.scatter / self.tokens
        if self.query_moment is None or method == "pca":
            spectrum, vectors = torch.linalg.eigh(covariance)
            spectrum, encoder = spectrum.flip(-1), vectors.flip(-1)
            decoder = encoder
        elif method == "oblique":
            power = self.query_moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
            eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
            root, inverse = matrix_roots(0.5 * self.query_moment / power + 0.5 * eye)
            spectrum, vectors = torch.linalg.eigh(root @ covariance @ root)
            spectrum, vectors = spectrum.flip(-1), vectors.flip(-1)
            encoder, decoder = root @ vectors, inverse @ vectors
        else:
            score = covariance.diagonal(dim1=-2, dim2=-1) * self.query_moment.diagonal(dim1=-2, dim2=-1)
            spectrum, order = score.sort(-1, descending=True)
            encoder = torch.nn.functional.one_hot(order, order.shape[-1]).mT.to(covariance.dtype)
            decoder = encoder
        tensors = {"encoder": encoder.float(), "spectrum": spectrum.clamp_min(0).float()}
        if decoder is not encoder:
            tensors["decoder"] = decoder.float()
        coefficients = self.sample @ encoder.float()
        for bits in BITS:
            _, low, step = quantise(coefficients, CodeLayout(((bits, coefficients.shape[-1]),)))
            tensors[f"low{bits}"], tensors[f"step{bits}"] = low, step
        return tensors


class Calibration:
    """Moments of all layers, which can be stored, added to and turned into a basis file."""

    def __init__(self, fingerprint: Tensor, model_type: str) -> None:
        self.fingerprint = fingerprint
        self.model_type = model_type
        self.images = 0
        self.skipped = 0  # images that could not be read
        self.moments: dict[tuple[int, str], Moments] = {}

    def add(self, layer: int, which: str, states: Tensor, query_moment: Tensor | None = None) -> None:
        """Take the visual states ``[H, S, D]`` of one image at one layer, and the moment of its queries for Keys."""
        new = Moments.of(states, self.images, query_moment)
        old = self.moments.get((layer, which))
        self.moments[layer, which] = new if old is None else old + new

    def save(self, path: str | Path) -> None:
        """Write the state, so that a later run can go on from it."""
        tensors = {}
        for (layer, which), moments in self.moments.items():
            tensors[f"layers.{layer}.{which}.scatter"] = moments.scatter
            tensors[f"layers.{layer}.{which}.sample"] = moments.sample.contiguous()
            tensors[f"layers.{layer}.{which}.tokens"] = torch.tensor(moments.tokens)
            if moments.query_moment is not None:
                tensors[f"layers.{layer}.{which}.query_moment"] = moments.query_moment
        tensors["fingerprint"] = self.fingerprint
        provenance = {
            "model_type": self.model_type,
            "images": self.images,
            "skipped": self.skipped,
        }
        _write(tensors, {"format": STATE_FORMAT, "provenance": json.dumps(provenance)}, path)

    @classmethod
    def load(cls, path: str | Path, fingerprint: Tensor) -> "Calibration":
        """Read a state written by `save`; a ValueError if it is unreadable or of another model."""
        tensors, provenance = read_tensors(path, STATE_FORMAT, "calibration state")
        if not same_fingerprint(tensors.pop("fingerprint"), fingerprint):
            raise ValueError(f"calibration state {path} belongs to another model ({provenance['model_type']})")
        state = cls(fingerprint, provenance["model_type"])
        state.images, state.skipped = provenance["images"], provenance["skipped"]
        for name, tensor in tensors.items():
            _, layer, which, part = name.split(".")
            if part == "scatter":
                prefix = f"layers.{layer}.{which}."
                state.moments[int(layer), which] = Moments(
                    tensor,
                    int(tensors[prefix + "tokens"]),
                    tensors[prefix + "sample"],
                    tensors.get(prefix + "query_moment"),
                )
        return state

    def write_basis(self, path: str | Path, source: str = "", method: str = "pca") -> None:
        """Write the basis file of a method ("pca", "oblique" or "leank"), with where it comes from."""
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if not self.moments:
            raise ValueError("no visual token was seen: the images or prompts hold none")
        tensors = {
            f"layers.{layer}.{which}.{name}": tensor.contiguous()
            for (layer, which), moments in self.moments.items()
            for name, tensor in moments.basis(method).items()
        }
        tensors["fingerprint"] = self.fingerprint
        provenance = {
            "model_type": self.model_type,
            "images": self.images,
            "method": method,
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


def fingerprint(model: torch.nn.Module) -> Tensor:
    """Some weights of each layer's Key and Value projections, float32 ``[n]``: models differ in them.

    `same_fingerprint` compares them within the rounding of half precision, so that a model is itself in every dtype.
    """
    picked = []
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith(("k_proj.weight", "v_proj.weight", "qkv_proj.weight")) and "vision" not in name:
            flat = parameter.detach().flatten()
            picked.append(flat[:: max(1, flat.numel() // 64)][:64].float().cpu())
    return torch.cat(picked) if picked else torch.zeros(0)


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
        cache.learn_config(model.config)  # type: ignore[arg-type]
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, RotateKLayer):
                layer.kv.sealer = MomentSealer(cache.options, index, state)
        model(**prompt, past_key_values=cache, use_cache=True)
        state.images += 1
    return state


class MomentSealer(Sealer):
    """Stores states as they are and gives them to a calibration."""

    def __init__(self, options: FitOptions, layer: int, state: Calibration) -> None:
        super().__init__(options, layer)
        self.state = state

    def store_keys(self, keys: Tensor, ranges: Ranges, queries: Tensor | None, valid: Tensor | None) -> Stored:
        """Gather the Keys of each row, with the moment of its queries."""
        for row, (start, length) in enumerate(ranges):
            moment = None
            if queries is not None:
                # Mean and scatter are not asked for: only the queries' part of the statistics.
                nothing = keys.new_zeros(keys.shape[0], 1, keys.shape[-1], dtype=torch.float32)
                row_valid = None if valid is None else valid[row : row + 1]
                stats = KeyStatistics(nothing, nothing, torch.ones(1), queries[row : row + 1].float(), row_valid)
                found = stats.query_moment()
                moment = None if found is None else found[:, 0]
            self.state.add(self.layer, "key", keys[:, start : start + length], moment)
        return super().store_keys(keys, ranges, queries, valid)

    def store_values(self, values: Tensor, ranges: Ranges) -> Stored:
        """Gather the Values of each row."""
        for start, length in ranges:
            self.state.add(self.layer, "value", values[:, start : start + length])
        return super().store_values(values, ranges)
