"""Moments of visual Keys and Values over many images, of all tokens over texts too, and the basis file made of them."""

import datetime
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rotatek_cache.codecs.basis_file import FORMAT, read_tensors
from rotatek_cache.codecs.fingerprint import same_fingerprint
from rotatek_cache.core.fitting import key_moments, matrix_roots
from rotatek_cache.core.precision import without_autocast
from rotatek_cache.core.quantization import BITS, CLIP_GRID, FINE_CLIP_GRID, CodeLayout, quantise

STATE_FORMAT = "rotatek-calibration-4"
KEY_METHODS = ("fisher", "pca", "oblique", "leank")
VALUE_METHODS = ("fisher", "pca", "output")
SAMPLE_PER_IMAGE = 32  # tokens per image kept to find clip ranges
SAMPLE_MOST = 8192  # tokens kept in all
SAMPLE_PER_TEXT = 256  # tokens per prompt kept where all tokens are coded
KINDS = ("text", "image")
SHRINKAGE = 0.5  # of the metric that weighs directions towards one in which all are alike


@dataclass
class Moments:
    """Sums over images for the Keys or Values of one layer.

    Attributes:
        scatter: sum of the scatter within images, each around its own mean, ``[H, D, D]`` float64.
        tokens: visual tokens seen.
        sample: some tokens less their image's mean, ``[H, n, D]`` float32.
        cost: ``[H, D, D]`` float64, such that an error e of a state adds ``e^T cost e``, times the images, to the
            squared error of what is made of it: for Keys the second moment of the prompt's last queries, summed over
            images, all heads of a group, for Values that of the output projection's columns. None if it is not known.
    """

    scatter: Tensor
    tokens: int
    sample: Tensor
    cost: Tensor | None = None

    @classmethod
    def of(cls, states: Tensor, seed: int, cost: Tensor | None = None) -> "Moments":
        """Take the moments of the visual states ``[H, S, D]`` of one image; `seed` picks the sample."""
        mean, scatter = key_moments(states.float())
        generator = torch.Generator().manual_seed(seed)
        picked = torch.randperm(states.shape[1], generator=generator, device="cpu")[:SAMPLE_PER_IMAGE].to(states.device)
        sample = states[:, picked].float() - mean[:, None]
        cost = None if cost is None else cost.double().cpu()
        return cls(scatter.double().cpu(), states.shape[1], sample.cpu(), cost)

    def __add__(self, other: "Moments") -> "Moments":
        sample = torch.cat([self.sample, other.sample], 1)[:, :SAMPLE_MOST]
        cost = None if self.cost is None or other.cost is None else self.cost + other.cost
        return Moments(self.scatter + other.scatter, self.tokens + other.tokens, sample, cost)

    @without_autocast
    def basis(
        self,
        method: str = "pca",
        shares: Sequence[float] = CLIP_GRID,
        *,
        sensitivity: Tensor | None = None,
        spare_outlying: bool = False,
    ) -> dict[str, Tensor]:
        """Make the tensors that a basis file holds of it.

        Args:
            sensitivity: ``[H, D, D]`` float64, an error's price in the divergence of what is said next, so that Keys
                and Values, layers and heads compare.
            spare_outlying: choose ranges of codes by errors that weigh as much as a token lies far from its image's
                mean, squared. Clipping hits the few tokens that stand out (what is written on an empty page), and among
                Keys those are the ones that queries look for.
            shares: clip ranges to try for codes, as shares of the full range of a coefficient.
            method: "fisher" (weighted by the sensitivity, shrunk by half); "oblique" (so by the cost; "output" is its
                name for Values); "leank" (static selection of channels by query times Key power; a dropped one reads
                as its mean); or "pca". Where what a method weighs by is not known it is "pca".
        """
        covariance = self.scatter / self.tokens
        by_cost = method in ("oblique", "output", "leank") or sensitivity is None
        price = self.cost if by_cost else sensitivity
        if price is not None and (method in ("oblique", "output") or (method == "fisher" and not by_cost)):
            power, metric = _shrunk(price)
            root, inverse = matrix_roots(metric)
            spectrum, vectors = torch.linalg.eigh(root @ covariance @ root)
            spectrum, vectors = spectrum.flip(-1), vectors.flip(-1)
            encoder, decoder = root @ vectors, inverse @ vectors
            gain = power[..., 0].expand(-1, covariance.shape[-1])
        elif price is not None and method == "leank":
            score = covariance.diagonal(dim1=-2, dim2=-1) * price.diagonal(dim1=-2, dim2=-1)
            spectrum, order = score.sort(-1, descending=True)
            encoder = torch.nn.functional.one_hot(order, order.shape[-1]).mT.to(covariance.dtype)
            decoder, gain = encoder, torch.ones_like(spectrum)
        else:
            spectrum, vectors = torch.linalg.eigh(covariance)
            spectrum, encoder = spectrum.flip(-1), vectors.flip(-1)
            decoder, gain = encoder, torch.ones_like(spectrum)
            if price is not None:
                gain = (decoder * (price @ decoder)).sum(-2)
        tensors = {"encoder": encoder.float(), "spectrum": spectrum.clamp_min(0).float(), "gain": gain.float()}
        if decoder is not encoder:
            tensors["decoder"] = decoder.float()
        coefficients = self.sample @ encoder.float()
        weight = self.sample.square().sum(-1) if spare_outlying else None
        for bits in BITS:
            _, low, step = quantise(coefficients, CodeLayout(((bits, coefficients.shape[-1]),)), shares, weight)
            tensors[f"low{bits}"], tensors[f"step{bits}"] = low, step
        return tensors


@dataclass
class TokenMoments:
    """Sums over prompts for the text tokens, or the visual ones, of the Keys or Values of one layer.

    Attributes:
        tokens: how many were seen.
        total: sum of the states, ``[H, D]`` float64.
        square: sum of their outer products, ``[H, D, D]`` float64.
        sample: some of them as they are, ``[H, n, D]`` float32.
        cost: as in `Moments`, over the queries of the prompts.
    """

    tokens: int
    total: Tensor
    square: Tensor
    sample: Tensor
    cost: Tensor | None = None

    @classmethod
    def of(cls, states: Tensor, seed: int, cost: Tensor | None = None) -> "TokenMoments":
        """Take the moments of states ``[H, S, D]`` of one prompt; `seed` picks the sample."""
        tokens = states.shape[1]
        mean, scatter = (part.double().cpu() for part in key_moments(states.float()))
        square = scatter + tokens * mean[..., :, None] * mean[..., None, :]
        generator = torch.Generator().manual_seed(seed)
        picked = torch.randperm(tokens, generator=generator, device="cpu")[:SAMPLE_PER_TEXT].to(states.device)
        cost = None if cost is None else cost.double().cpu()
        return cls(tokens, mean * tokens, square, states[:, picked].float().cpu(), cost)

    def __add__(self, other: "TokenMoments") -> "TokenMoments":
        sample = torch.cat([self.sample, other.sample], 1)[:, :SAMPLE_MOST]
        cost = None if self.cost is None or other.cost is None else self.cost + other.cost
        return TokenMoments(
            self.tokens + other.tokens, self.total + other.total, self.square + other.square, sample, cost
        )

    @staticmethod
    def basis(
        kinds: Sequence["TokenMoments"],
        method: str = "pca",
        shares: Sequence[float] = CLIP_GRID,
        sensitivity: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Make the tensors that a basis file holds for rows of all tokens.

        Each kind of token weighs as much as the other, however many of it were seen: a basis serves any share of text.
        """
        means = torch.stack([kind.total / kind.tokens for kind in kinds])
        mean = means.mean(0)
        second = torch.stack([kind.square / kind.tokens for kind in kinds]).mean(0)
        covariance = second - mean[..., :, None] * mean[..., None, :]
        size = min(kind.sample.shape[1] for kind in kinds)
        sample = torch.cat([kind.sample[:, :size] for kind in kinds], 1) - mean.float()[:, None]
        costs = [kind.cost for kind in kinds if kind.cost is not None]
        whole = Moments(covariance, 1, sample, sum(costs[1:], costs[0]) if costs else None)
        return {**whole.basis(method, shares, sensitivity=sensitivity), "mean": mean.float()}


class Calibration:
    """Moments of all layers, which can be stored, added to and turned into a basis file."""

    def __init__(self, fingerprint: Tensor, model_type: str, source: str = "") -> None:
        self.fingerprint = fingerprint
        self.model_type = model_type
        self.source = source  # what the images are, for whoever goes on
        self.images = 0
        self.skipped = 0  # images that could not be read
        self.texts = 0  # prompts of text alone
        self.moments: dict[tuple[int, str], Moments] = {}
        self.sensitivities: dict[tuple[int, str, str], Tensor] = {}  # by layer, state and kind: sums over prompts
        self.weighed = dict.fromkeys(KINDS, 0)  # prompts of each kind in these sums
        self.token_moments: dict[tuple[int, str, str], TokenMoments] = {}  # by layer, state and kind of token

    def add(self, layer: int, which: str, states: Tensor, cost: Tensor | None = None) -> None:
        """Take the visual states ``[H, S, D]`` of one image at one layer, and what their errors cost."""
        new = Moments.of(states, self.images, cost)
        old = self.moments.get((layer, which))
        self.moments[layer, which] = new if old is None else old + new

    def add_sensitivity(self, kind: str, found: dict[tuple[int, str], Tensor]) -> None:
        """Take what `answer_sensitivity` found of an image, or `text_sensitivity` of a text: `kind` is of `KINDS`."""
        self.weighed[kind] += 1
        for (layer, which), matrix in found.items():
            before = self.sensitivities.get((layer, which, kind))
            self.sensitivities[layer, which, kind] = matrix if before is None else before + matrix

    def sensitivity(self, layer: int, which: str, kinds: Sequence[str]) -> Tensor | None:
        """Sum the means over prompts of these kinds, ``[H, D, D]`` float64; None if none was gathered."""
        found = [
            self.sensitivities[at] / self.weighed[k] for k in kinds if (at := (layer, which, k)) in self.sensitivities
        ]
        return sum(found[1:], found[0]) if found else None

    def add_tokens(self, layer: int, which: str, kind: str, states: Tensor, cost: Tensor | None = None) -> None:
        """Take states ``[H, S, D]`` of tokens of one of `KINDS` of a prompt at one layer, for rows of all tokens."""
        if states.shape[1]:
            new = TokenMoments.of(states, self.images + self.texts, cost)
            old = self.token_moments.get((layer, which, kind))
            self.token_moments[layer, which, kind] = new if old is None else old + new

    def save(self, path: str | Path) -> None:
        """Write the state, so that a later run can go on from it."""
        tensors = {}
        for (layer, which), moments in self.moments.items():
            tensors[f"layers.{layer}.{which}.scatter"] = moments.scatter
            tensors[f"layers.{layer}.{which}.sample"] = moments.sample.contiguous()
            tensors[f"layers.{layer}.{which}.tokens"] = torch.tensor(moments.tokens, device="cpu")
            if moments.cost is not None:
                tensors[f"layers.{layer}.{which}.cost"] = moments.cost
        for (layer, which, kind), matrix in self.sensitivities.items():
            tensors[f"sensitivity.{layer}.{which}.{kind}.matrix"] = matrix
        for (layer, which, kind), token_moments in self.token_moments.items():
            for name in ("total", "square", "sample", "cost"):
                if getattr(token_moments, name) is not None:
                    tensors[f"tokens.{layer}.{which}.{kind}.{name}"] = getattr(token_moments, name).contiguous()
            tensors[f"tokens.{layer}.{which}.{kind}.tokens"] = torch.tensor(token_moments.tokens, device="cpu")
        tensors["fingerprint"] = self.fingerprint
        provenance = {
            "model_type": self.model_type,
            "images": self.images,
            "texts": self.texts,
            "skipped": self.skipped,
            "weighed": self.weighed,
            "source": self.source,
        }
        _write(tensors, {"format": STATE_FORMAT, "provenance": json.dumps(provenance)}, path)

    @classmethod
    def load(cls, path: str | Path, fingerprint: Tensor) -> "Calibration":
        """Read a state written by `save`; a ValueError if it is unreadable or of another model."""
        tensors, provenance = read_tensors(path, STATE_FORMAT, "calibration state")
        if not same_fingerprint(tensors.pop("fingerprint"), fingerprint):
            raise ValueError(f"calibration state {path} belongs to another model ({provenance['model_type']})")
        state = cls(fingerprint, provenance["model_type"], provenance["source"])
        state.images, state.skipped, state.texts = (provenance[name] for name in ("images", "skipped", "texts"))
        state.weighed = provenance["weighed"]
        for name, tensor in tensors.items():
            of, layer, which, *kind, part = name.split(".")
            if of == "tokens" and part == "tokens":
                prefix = name.removesuffix("tokens")
                parts = (tensors.get(prefix + name) for name in ("total", "square", "sample", "cost"))
                state.token_moments[int(layer), which, kind[0]] = TokenMoments(int(tensor), *parts)  # type: ignore[arg-type]
            if part == "scatter":
                prefix = f"layers.{layer}.{which}."
                state.moments[int(layer), which] = Moments(
                    tensor,
                    int(tensors[prefix + "tokens"]),
                    tensors[prefix + "sample"],
                    tensors.get(prefix + "cost"),
                )
            if of == "sensitivity":
                state.sensitivities[int(layer), which, kind[0]] = tensor
        return state

    def write_basis(
        self, path: str | Path, source: str = "", method: str | None = None, value_method: str | None = None
    ) -> None:
        """Write the basis file of a method for Keys and one for Values, with where it comes from.

        Args:
            path: of the file.
            source: what was calibrated on, in words.
            method, value_method: of `KEY_METHODS` and `VALUE_METHODS`; by default "fisher" where sensitivities were
                gathered, else "pca".

        Raises:
            ValueError: a method is unknown, or what it weighs by was not gathered.
        """
        default = "fisher" if self.sensitivities else "pca"
        method, value_method = method or default, value_method or default
        if method not in KEY_METHODS:
            raise ValueError(f"method must be one of {', '.join(KEY_METHODS)}, got {method!r}")
        if value_method not in VALUE_METHODS:
            raise ValueError(f"value_method must be one of {', '.join(VALUE_METHODS)}, got {value_method!r}")
        prompts = {"image": self.images, "text": self.texts}
        lacking = [kind for kind in KINDS if prompts[kind] and not self.weighed[kind]]
        if "fisher" in (method, value_method) and lacking:
            raise ValueError(
                f"method 'fisher' weighs by the sensitivity of the answers, which was not gathered of any prompt with "
                f"{' or '.join(lacking)}: calibrate with sensitivity=True, or choose 'pca'"
            )
        layers = sorted({layer for layer, _, kind in self.token_moments if kind == "text"})
        if not self.moments and not layers:
            raise ValueError("no visual token was seen: the images or prompts hold none")
        costs = [moments.cost for (_, which), moments in self.moments.items() if which == "value"]
        costs += [moments.cost for (_, which, _), moments in self.token_moments.items() if which == "value"]
        if value_method == "output" and any(cost is None for cost in costs):
            raise ValueError("value_method='output' needs the output projections, and this model has no `o_proj`")
        methods = {"key": method, "value": value_method}
        tensors = {
            f"layers.{layer}.{which}.{name}": tensor.contiguous()
            for (layer, which), moments in self.moments.items()
            for name, tensor in moments.basis(
                methods[which], sensitivity=self.sensitivity(layer, which, ("image",)), spare_outlying=which == "key"
            ).items()
        }
        for layer in layers:
            for which, chosen in methods.items():
                kinds = [self.token_moments[layer, which, k] for k in KINDS if (layer, which, k) in self.token_moments]
                # A Value that is clipped costs its error; a Key that is, perhaps the one that a query looks for.
                shares = FINE_CLIP_GRID if which == "value" else CLIP_GRID
                sensitivity = self.sensitivity(layer, which, KINDS)
                for name, tensor in TokenMoments.basis(kinds, chosen, shares, sensitivity).items():
                    tensors[f"layers.{layer}.token_{which}.{name}"] = tensor.contiguous()
        tensors["fingerprint"] = self.fingerprint
        provenance = {
            "model_type": self.model_type,
            "images": self.images,
            "texts": self.texts,
            "text_tokens": max((m.tokens for (_, _, k), m in self.token_moments.items() if k == "text"), default=0),
            "method": method,
            "value_method": value_method,
            "source": source,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        _write(tensors, {"format": FORMAT, "provenance": json.dumps(provenance)}, path)


def _shrunk(price: Tensor) -> tuple[Tensor, Tensor]:
    """Give the mean diagonal of `price` ``[H, D, D]``, ``[H, 1, 1]``, and a metric of power one, nearer the identity.

    A few thousand gradients or queries say which directions matter most, not that others never will.
    """
    power = price.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(price.shape[-1], dtype=price.dtype, device=price.device)
    tiny = torch.finfo(price.dtype).tiny
    return power, (1 - SHRINKAGE) * price / power.clamp_min(tiny) + SHRINKAGE * eye


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: str | Path) -> None:
    # Written beside the target and moved there, so that a run that is stopped leaves no half file.
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.touch()
    mode = partial.stat().st_mode  # as the umask has it; safetensors leaves a file that its owner alone may read
    try:
        save_file(tensors, partial, metadata=metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    partial.chmod(mode)
    partial.replace(target)
