"""Why it works, or does not: the geometry of the visual Keys, and what each part of the method is worth.

    python -m evals.diagnostics --out evals/results/diagnostics_reader.json --figures evals/results/figures

Geometry, for any model and task (`--model`, `--task`; `--options "{path: folder}"` for a dataset at hand; the second
reader is `--model runs/smol_reader --task smol-easy-second --pages 0`): outlier channels, explained variance and logit
energy per layer and head, the rank that keeps 99 % of them, principal angles between images, between visual and text
Keys, and between the prompt's window and the queries of the answers, and the error of each basis against its rank.
Sequences are read one by one with a dense cache that listens. Ablations, on the reader's pages: answers without the
rotation, the query weight, the centring or delta, with the exact solver, and with windows of 4 to 128 queries, scored
as `evals/fidelity.py` does.

Errors are relative: that of Keys to their distance from the image's mean, that of logits to their spread over the
image's tokens (a constant per query changes no attention), over the queries that answer.
"""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from evals import fidelity, figures
from evals.accuracy import READER, environment, sample_order
from evals.fidelity import natural, positive
from evals.reader.pages import ADDRESS_KINDS, LEVELS
from evals.store import rounded, write_json
from evals.tasks import Sample, SampleError, Task, TaskError, load_task
from rotatek_cache import RotateKCache
from rotatek_cache.cache.coordinator import Coordinator
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.codecs.registry import BASES
from rotatek_cache.core.fitting import KeyStatistics, key_moments, matrix_roots, principal_directions
from rotatek_cache.hf.chat import Chat, InputError

SHARES = (0.9, 0.99, 0.999)
ANGLE_RANKS = (4, 8, 16, 32)
WINDOWS = (4, 8, 16, 32, 64, 128)


@dataclass
class Heard:
    """One sequence in one layer.

    Attributes:
        visual, text: Keys ``[H, S, D]`` of the image and of everything else.
        window: the prompt's last 32 queries, ``[H, G * W, D]``.
        answer: the queries that answer, of all turns (of the later ones where there are several), ``[H, G * n, D]``.
        stats: what a basis is fitted from, with the window's queries.
    """

    visual: Tensor
    text: Tensor
    window: Tensor
    answer: Tensor
    stats: KeyStatistics


class ListeningCache(RotateKCache):
    """A dense cache that keeps the Keys and queries of every forward, for one sequence."""

    def __init__(self) -> None:
        super().__init__(sparsity=0)
        self.coordinator = _ListeningCoordinator(self.positions)

    def learn_config(self, config: Any) -> None:
        """Build the layers and listen to them."""
        if self.layers:
            return
        super().learn_config(config)
        for layer in self.layers:
            layer.kv.__class__ = _ListeningKV
            layer.kv.keys, layer.kv.queries = [], []


class _ListeningCoordinator(Coordinator):
    def observe(self, layer: Any, query: Tensor, mask: Tensor | None, scale: float | None = None) -> None:
        layer.queries.append(query[0].float())
        super().observe(layer, query, mask, scale)


class _ListeningKV(LayerKV):
    keys: list[Tensor]
    queries: list[Tensor]

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys.append(keys[0].float())
        super().append(keys, values)


def listen(chat: Chat, sample: Sample, max_new_tokens: int, window: int = 32) -> list[Heard]:
    """Record what each layer holds of one conversation.

    Raises:
        SampleError: its answers ended with their first token, which the prompt's last query gives.
    """
    cache = ListeningCache()
    first, *later = sample.turns
    batch = chat.begin([sample.images], [first.text], cache, max_new_tokens=max_new_tokens)
    prompt = cache.layers[0].kv.queries[0].shape[1]
    answers_from = 1  # forwards that answer
    for turn in later:
        answers_from = len(cache.layers[0].kv.queries)
        chat.go_on(batch, [turn.text])
    if len(cache.layers[0].kv.queries) <= answers_from:
        raise SampleError(f"sample {sample.id}: the answer ended with its first token, so that no query answers")
    visual = batch.ids[0, :-1] == chat.model.config.image_token_id
    heard = []
    for layer in cache.layers:
        keys, queries = torch.cat(layer.kv.keys, 1), torch.cat(layer.kv.queries, 1)
        begin = sum(part.shape[1] for part in layer.kv.queries[:answers_from])
        heads = keys.shape[0]

        def grouped(part: Tensor, heads: int = heads) -> Tensor:
            return part.unflatten(0, (heads, -1)).flatten(1, 2)

        last = queries[:, max(0, prompt - window) : prompt]
        mean, scatter = key_moments(keys[:, visual])
        stats = KeyStatistics(mean[:, None], scatter[:, None], visual.sum()[None], last[None])
        heard.append(Heard(keys[:, visual], keys[:, ~visual], grouped(last), grouped(queries[:, begin:]), stats))
    return heard


def spectrum(matrix: Tensor) -> Tensor:
    """Return the cumulative share of the eigenvalues ``[*, D]`` of positive ``matrix [*, D, D]``, largest first."""
    values = torch.linalg.eigvalsh(matrix).flip(-1).clamp_min(0)
    return values.cumsum(-1) / values.sum(-1, keepdim=True)


def logit_energy(scatter: Tensor, queries: Tensor) -> Tensor:
    """Return ``Cq^1/2 Ck Cq^1/2``, of Keys' scatter ``[H, D, D]`` and queries ``[H, n, D]``: logit energy."""
    moment = queries.mT @ queries / queries.shape[1]
    scale = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    root, _ = matrix_roots(moment / scale)
    matrix = root @ scatter @ root
    return (matrix + matrix.mT) / 2


def rank_for(cumulative: Tensor, share: float) -> Tensor:
    """Find the least rank whose cumulative share reaches `share`."""
    return (cumulative < share - 1e-6).sum(-1) + 1


def outlier_channels(states: Tensor) -> Tensor:
    """Return how far the largest channel stands out, ``[H]``: its root mean square over the median channel's.

    States are ``[H, n, D]``. RoPE spreads an outlier over the two channels that it turns together; either counts.
    """
    sizes = states.square().mean(1).sqrt()
    return sizes.amax(-1) / sizes.median(-1).values


def directions(states: Tensor, rank: int, *, centred: bool = True) -> Tensor:
    """Find the top directions ``[H, D, r]`` of states ``[H, n, D]``, orthonormal; r is at most what n states span."""
    rank = min(rank, states.shape[1] - centred, states.shape[2])
    centre = states.mean(1, keepdim=True) if centred else 0.0
    moved = states - centre
    return principal_directions(moved.mT @ moved, rank, "eigh")


def overlap(one: Tensor, other: Tensor) -> dict[str, list[float]]:
    """Measure the principal angles between subspaces ``[H, D, r]`` and ``[H, D, r']``, over the heads' mean.

    "shared" is the mean squared cosine: 1 for the same subspace (or one inside the other), r / D by chance.
    """
    cosines = torch.linalg.svdvals(one.mT @ other).clamp(max=1.0)
    angles = torch.rad2deg(torch.arccos(cosines)).mean(0)
    return {"shared": cosines.square().mean(-1).tolist(), "degrees": angles.tolist()}


def basis_errors(heard: Heard, name: str, rank: int) -> tuple[float, float]:
    """Measure squared errors of Keys and of logits under a basis, each relative, over all heads of a layer."""
    keys = heard.visual
    basis = BASES[name].fit(heard.stats, rank, "eigh", keys.dtype)
    found = basis.reconstruct(basis.encode(keys[:, None]))[:, 0]
    logits, told = heard.answer @ keys.mT, heard.answer @ found.mT
    spread = (logits - logits.mean(-1, keepdim=True)).square().sum()
    wrong = told - logits
    wrong = (wrong - wrong.mean(-1, keepdim=True)).square().sum()
    distance = (keys - keys.mean(1, keepdim=True)).square().sum()
    return float((found - keys).square().sum() / distance), float(wrong / spread)


def mean_of(tensors: Sequence[Tensor]) -> list[Any]:
    """Average over samples, as lists."""
    return torch.stack([tensor.float() for tensor in tensors]).mean(0).tolist()


def geometry(samples: Sequence[list[Heard]], ranks: Sequence[int]) -> dict[str, Any]:
    """Compute all numbers of the module's first half, from what was recorded of each sample in each layer."""
    layers = range(len(samples[0]))
    result: dict[str, Any] = {
        "samples": len(samples),
        "answer_queries": sum(sample[0].answer.shape[1] for sample in samples),
        "layers": [],
    }
    for layer in layers:
        heard = [sample[layer] for sample in samples]
        text, windows, answers = (
            torch.cat([getattr(one, name) for one in heard], 1) for name in ("text", "window", "answer")
        )
        variance = [spectrum(one.stats.scatter[:, 0]) for one in heard]
        # The queries of all samples: those of one answer are too few to span anything.
        energy = [spectrum(logit_energy(one.stats.scatter[:, 0], answers)) for one in heard]
        row: dict[str, Any] = {
            "explained_variance": mean_of(variance),
            "logit_energy": mean_of(energy),
            "rank_for": {
                str(share): {
                    "variance": mean_of([rank_for(part, share) for part in variance]),
                    "logit_energy": mean_of([rank_for(part, share) for part in energy]),
                }
                for share in SHARES
            },
        }
        row["outlier_channels"] = {
            name: mean_of([outlier_channels(getattr(one, name)) for one in heard]) for name in ("visual", "text")
        }
        row["angles"] = {
            # Neighbours in a ring, so that each image meets two others.
            "images": {
                str(rank): _mean_overlap(
                    [
                        overlap(directions(a.visual, rank), directions(b.visual, rank))
                        for a, b in zip(heard, heard[1:] + heard[:1], strict=True)
                    ]
                )
                for rank in ANGLE_RANKS
            },
            "visual and text": {
                str(rank): _mean_overlap(
                    [overlap(directions(one.visual, rank), directions(text, rank)) for one in heard]
                )
                for rank in ANGLE_RANKS
            },
            "window and answer queries": {
                str(rank): overlap(directions(windows, rank, centred=False), directions(answers, rank, centred=False))
                for rank in ANGLE_RANKS
            },
        }
        row["errors"] = {
            name: {str(rank): _root_mean([basis_errors(one, name, rank) for one in heard]) for rank in ranks}
            for name in BASES
        }
        result["layers"].append(row)
    return result


def _mean_overlap(parts: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    return {name: np.mean([part[name] for part in parts], 0).tolist() for name in parts[0]}


def _root_mean(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    keys, logits = np.sqrt(np.mean(pairs, 0)).tolist()
    return {"keys": keys, "logits": logits}


def without_delta(cache: RotateKCache) -> None:
    """Make a filled cache forget what its basis leaves out of the mean: ``K R R^T`` in place of ``... + delta``."""
    for layer in cache.layers:
        for segment in layer.kv.segments:
            basis = segment.keys.basis
            left = basis.B @ (basis.B.mT @ basis.delta[..., None])
            kept = dataclasses.replace(basis, delta=left[..., 0])
            segment.keys = dataclasses.replace(segment.keys, basis=kept)


Change = Callable[[RotateKCache], None]


def ablations(rank: int) -> dict[str, tuple[dict[str, Any], Change | None]]:
    """List options of the paper's method less one of its parts, at a rank, and what is done to the filled cache."""
    paper: dict[str, Any] = {"rank": rank, "always_compress": True}
    table: dict[str, tuple[dict[str, Any], Change | None]] = {
        "the paper": (paper, None),
        "no rotation (ThinK)": (paper | {"basis": "think"}, None),
        "no query weight": (paper | {"basis": "pca"}, None),
        "no query weight, no centring": (paper | {"basis": "pca_uncentred"}, None),
        "no delta": (paper, without_delta),
        "exact solver": (paper | {"solver": "eigh"}, None),
    }
    return table | {f"window {window}": (paper | {"query_window": window}, None) for window in WINDOWS}


def answers_without(args: argparse.Namespace) -> dict[str, Any]:
    """Measure exact match and KL of the reader for each ablation and rank."""
    reader = fidelity.load(None)
    model = reader.model
    methods = {f"r={rank}, {name}": entry for rank in args.ablation_ranks for name, entry in ablations(rank).items()}
    dense_options = {"sparsity": 0}
    scores = {name: fidelity.Scores() for name in ("dense", *methods)}
    seeds = fidelity.SEEDS["report"][: args.pages]
    with torch.inference_mode():
        for start in tqdm(range(0, len(seeds), args.batch), desc="ablations", mininterval=5):
            batch = fidelity.make_batch(reader.processor, seeds[start : start + args.batch], args.level, ADDRESS_KINDS)
            recorder = fidelity.RecordingCache()
            positions, _ = batch.positions()
            prefill = model(**batch.prompt, position_ids=positions, past_key_values=recorder, use_cache=True)
            dense: Tensor | None = None
            for name, (options, change) in {"dense": (dense_options, None), **methods}.items():
                cache = RotateKCache.for_study(**options)
                fidelity.fill(cache, model.config, batch, recorder)
                if change is not None:
                    change(cache)
                keys, values = fidelity.visual_bytes(cache, recorder.visual)
                found = fidelity.replay(model, cache, batch, prefill.logits[:, -1])
                dense = found if dense is None else dense
                fidelity.score(scores[name], batch, found, dense)
                scores[name].key_bytes += [keys / len(batch)] * len(batch)
                scores[name].value_bytes += [values / len(batch)] * len(batch)
    options = {name: entry[0] for name, entry in methods.items()} | {"dense": dense_options}
    return {name: fidelity.summary(scores[name], scores["dense"], options[name]) for name in scores}


def heat(heard: list[Heard], layer: int, head: int) -> tuple[Tensor, Tensor]:
    """Return the Keys ``[S, D]`` of one head, and the same in the paper's basis at full rank."""
    one = heard[layer]
    basis = BASES["rotatek"].fit(one.stats, one.visual.shape[-1], "eigh", one.visual.dtype)
    return one.visual[head], basis.encode(one.visual[:, None])[head, 0]


def listen_to(chat: Chat, task: Task, numbers: Sequence[int], ranks: Sequence[int]) -> list[list[Heard]]:
    """Record each sample in each layer; samples that cannot be used are left out, with a word.

    Raises:
        TaskError: fewer than two samples can be used, or a rank is more than the model's head width.
    """
    found = []
    for number in tqdm(numbers, desc="samples", mininterval=5):
        try:
            found.append(listen(chat, task.sample(number), task.max_new_tokens))
        except SampleError as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        width = found[0][0].visual.shape[-1]
        if too_wide := [rank for rank in ranks if rank > width]:
            raise TaskError(f"--ranks must be at most the head width of the model, {width}, got {too_wide}")
    if len(found) < 2:
        raise TaskError(
            f"task '{task.name}': images are compared with one another, so two are needed, got {len(found)}"
        )
    return found


def mapping(text: str) -> dict[str, Any]:
    """Read a mapping in YAML, of a flag."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a mapping such as '{{path: folder}}', got {text!r}")
    return value


def parse() -> argparse.Namespace:
    """Read and check the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=READER, help="name or path")
    parser.add_argument("--task", default="reader-hard-second", help="conversations that are listened to")
    parser.add_argument("--options", type=mapping, default={}, help="of a dataset's task: '{path: folder}'")
    parser.add_argument("--samples", type=positive, default=32, help="at least two")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[4, 8, 16, 24, 32, 48, 64, 96])
    parser.add_argument("--pages", type=natural, default=256, help="pages of the ablations; 0 leaves them out")
    parser.add_argument("--ablation-ranks", type=positive, nargs="+", default=[16, 8])
    parser.add_argument("--level", choices=sorted(LEVELS), default="hard", help="of the pages of the ablations")
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--figures", type=Path, help="folder for PNG files")
    args = parser.parse_args()
    if args.pages and args.model != READER:
        parser.error("the ablations are scored on the reader's pages: give --pages 0 with another model")
    if args.samples < 2:
        parser.error("--samples must be at least 2: images are compared with one another")
    return args


def main() -> None:
    """Listen, compute, ablate, draw, store."""
    args = parse()
    try:
        task = load_task(args.task, args.options)
        chat = Chat.load(str(args.model), dtype=torch.float32, device=args.device)
        heard = listen_to(chat, task, sample_order(task, args.samples, args.seed), args.ranks)
    except (TaskError, InputError) as error:
        raise SystemExit(f"error: {error}") from error
    with torch.inference_mode():
        result: dict[str, Any] = {
            "model": args.model.name,
            "command": shlex.join(["python", "-m", "evals.diagnostics", *sys.argv[1:]]),
            "setting": {"task": args.task, "samples": len(heard), "seed": args.seed, "pages": args.pages},
            "visual_tokens": int(heard[0][0].visual.shape[1]),
            "head_width": int(heard[0][0].visual.shape[2]),
            "geometry": geometry(heard, args.ranks),
        }
        if args.figures:
            maps = {layer: heat(heard[0], layer, 0) for layer in figures.spaced(len(heard[0]), 5)}
            figures.save(figures.heat_maps(maps), args.figures / f"{args.out.stem}_heat.png")
    if args.pages:
        result["ablations"] = answers_without(args)
    result["environment"] = environment(args.device)
    write_json(args.out, rounded(result))
    if args.figures:
        for name, drawn in figures.diagnostics(result).items():
            figures.save(drawn, args.figures / f"{args.out.stem}_{name}.png")


if __name__ == "__main__":
    main()
