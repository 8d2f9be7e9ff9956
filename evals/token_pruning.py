"""Fewer tokens, fewer channels, or both? Answers of the reader at matched bytes, per token method and budget.

    python -m evals.token_pruning --seeds report --pages 384 --out evals/results/token_pruning.json

Every token method runs alone and joint with channel methods. At each budget the share of tokens is set so that all
variants hold the same bytes of visual Keys and Values, read from storage, bases, deltas and row tables included; a
method that cannot get so small (FastV and PyramidDrop keep their first layers whole) has no row there. Where the
methods file lists shares of tokens (`keep`) in place of budgets, as VL-Cache's paper does, each row keeps that share;
`prompt_share` is what the whole cache holds, text and its free columns included. Each page gets two questions:
the first is in the prompt, so that methods that look at attention know it; the second comes after the compression.
Differences are paired by page, with 95 % bounds of the bootstrap. Keys and Values are sealed in half precision.

Images are encoded once. Methods that act during the prefill (FastV, PyramidDrop, VisionZip, DivPrune) have their own;
the others seal the states of one dense prefill, as in `fidelity.py`.

The reader was trained on pages of which it saw, with 2 of 9 patches of each cell mostly shown, the rest hidden: it
learned to read from few patches, which is kind to methods that drop tokens.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from evals import figures
from evals.fidelity import SEEDS, Batch, RecordingCache, Scores, bootstrap, fill, load, make_batch, replay, score
from evals.reader.pages import ADDRESS_KINDS, CHOOSE_SEEDS, LEVELS
from evals.store import rounded, write_json
from rotatek_cache import HybridKV, RotateKCache, VisionZip
from rotatek_cache.cache.layer import LayerKV, Merge
from rotatek_cache.cache.seal_plan import SealPlan
from rotatek_cache.hf.encoders import encoder_tap, token_signal
from rotatek_cache.hf.feature_choice import choose
from rotatek_cache.hf.storage import storage_bytes
from rotatek_cache.options import FitOptions
from rotatek_cache.token_pruning.interface import AttentionMethod, FeatureMethod, TokenMethod
from rotatek_cache.token_pruning.registry import token_method

DEFAULT_METHODS = Path(__file__).parent / "settings" / "token_pruning.yaml"
QUESTIONS = ("first", "second")
LEAST_KEPT = 0.01  # of the tokens, that are tried to meet a budget
NEAR, FAR = 0.01, 0.05  # a budget is met within a share of it, where whole tokens allow, and must be within another
TRIES = 5


class HalfCache(RotateKCache):
    """Seals in half precision what the model computes in float32."""

    def learn_config(self, config: Any) -> None:
        """Build the layers; they seal half-precision states."""
        fresh = not self.layers
        super().learn_config(config)
        if fresh:
            for layer in self.layers:
                layer.kv.__class__ = _HalfKV


class _HalfKV(LayerKV):
    def seal(self, plan: SealPlan, merge: Merge | None = None, better: FitOptions | None = None) -> None:
        assert self.pending is not None
        self.pending.keys, self.pending.values = self.pending.keys.half(), self.pending.values.half()
        super().seal(plan, merge, better)


@dataclass
class Variant:
    """One row: a token method (None: all tokens stay) with options for the channels, and what it scored."""

    tokens: str
    channels: str
    budget: float | None
    method: TokenMethod | None
    options: dict[str, Any]
    share: float = 1.0  # of the dense bytes of visual tokens, measured
    prompt_share: float = 1.0  # of those of the whole prompt
    scores: Scores = field(default_factory=Scores)

    def place(self, **other: str | None) -> tuple[Any, ...]:
        """Say where the row stands among all, or where one does that differs in `other`."""
        keep = None if self.method is None or self.budget is not None else self.method.share
        return other.get("tokens", self.tokens), other.get("channels", self.channels), self.budget, keep

    def cache(self) -> RotateKCache:
        """Make a fresh cache."""
        return HalfCache.for_study(**self.options, tokens=self.method)


def visual_share(cache: RotateKCache, pages: int) -> float:
    """Compare the bytes of all that is held for visual tokens with those of dense ones in half precision."""
    layers = [layer.kv for layer in cache.layers]
    held = storage_bytes([tensor for kv in layers for segment in kv.segments for tensor in segment.tensors()])
    _, heads, width, value_width = layers[0].shape
    tokens = sum(int(visual.sum()) for _, _, visual in cache.positions.flags if visual is not None)
    assert all(not kv.kept_dense for kv in layers), f"visual tokens of {pages} pages stayed dense and were not counted"
    return held / (tokens * heads * (width + value_width) * 2 * len(layers))


def prompt_share(cache: RotateKCache) -> float:
    """Compare all bytes of a cache that holds a prompt with those of a dense one in half precision, without padding."""
    layers = [layer.kv for layer in cache.layers]
    batch, heads, width, value_width = layers[0].shape
    tokens = sum(cache.positions.own_before(cache.get_seq_length(), batch))
    return cache.nbytes() / (tokens * heads * (width + value_width) * 2 * len(layers))


def prefill(model: Any, batch: Batch, cache: RotateKCache) -> torch.Tensor:
    """Read the prompts; returns the logits of the next token."""
    output = model(**batch.prompt, position_ids=batch.positions()[0], past_key_values=cache, use_cache=True)
    return output.logits[:, -1]


class Prompts:
    """A batch whose images are encoded once, and whose dense prefill is read once, for all variants."""

    def __init__(self, model: Any, batch: Batch) -> None:
        self.model, self.batch = model, batch
        with encoder_tap(model.model, VisionZip(1.0), {}) as tap:
            self.features = model.model.get_image_features(batch.prompt["pixel_values"], return_dict=True).pooler_output
        self.signal = token_signal(tap, model.model, {}, [len(image) for image in self.features])
        self.dense = RecordingCache()
        self.dense_logits = self._prefill(self.dense, self.features)

    def _prefill(self, cache: RotateKCache, features: list[torch.Tensor]) -> torch.Tensor:
        """Read the prompts with features in place of the images, as generate does."""
        prompt = {name: tensor for name, tensor in self.batch.prompt.items() if name != "pixel_values"}
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        return prefill(
            self.model, dataclasses.replace(self.batch, prompt=prompt | {"mm_encoder_outputs": encoded}), cache
        )

    def read(self, variant: Variant) -> tuple[RotateKCache, torch.Tensor]:
        """Read the prompts; return the variant's cache and the logits of the next token."""
        cache = variant.cache()
        if isinstance(variant.method, FeatureMethod):
            counts = [variant.method.count_of(len(image)) for image in self.features]
            signal = self.signal if variant.method.reads_encoder else None
            choices = choose(variant.method, self.features, counts, signal)
            chosen = [choice.apply(image) for choice, image in zip(choices, self.features, strict=True)]
            cache.chosen = True
            return cache, self._prefill(cache, chosen)
        layers = range(self.model.config.get_text_config().num_hidden_layers)
        if isinstance(variant.method, AttentionMethod) and variant.method.masks_prefill(layers):
            return cache, self._prefill(cache, self.features)
        fill(cache, self.model.config, self.batch, self.dense)
        return cache, self.dense_logits


def variants(config: dict[str, Any], model: Any, batch: Batch, only: list[str] | None) -> Iterator[Variant]:
    """List all rows, with shares of tokens that give the budgets' bytes on the pages of `batch`."""
    prompts = Prompts(model, batch)

    def measured(variant: Variant) -> Variant:
        cache, _ = prompts.read(variant)
        variant.share, variant.prompt_share = visual_share(cache, len(batch)), prompt_share(cache)
        return variant

    def row(tokens: str, channels: str, keep: float, budget: float | None = None) -> Variant:
        method = _with_keep(config["tokens"][tokens], keep)
        return measured(Variant(tokens, channels, budget, method, config["channels"][channels]))

    yield measured(Variant("none", "dense", None, None, {"sparsity": 0}))
    for channels, options in config.get("alone", {}).items():
        yield measured(Variant("none", channels, None, None, options))
    names = [tokens for tokens in config["tokens"] if not only or any(word in tokens for word in only)]
    for tokens, channels in itertools.product(names, config["channels"]):
        make = functools.partial(row, tokens, channels)
        yield from map(make, config.get("keep", []))
        yield from matched(make, config.get("budgets", []))


def matched(make: Callable[[float, float | None], Variant], budgets: Sequence[float]) -> Iterator[Variant]:
    """Make the rows whose bytes are those of the budgets, each by secants from the shares .2 and .8 of the tokens."""
    starts = [(keep, make(keep, None).share) for keep in (0.2, 0.8)] if budgets else []
    for budget in budgets:
        (before, share_before), (last, share_last) = starts
        tried: list[Variant] = []
        for _ in range(TRIES):
            keep = last + (budget - share_last) * (last - before) / (share_last - share_before)
            if not LEAST_KEPT < keep <= 1:
                break  # out of reach
            tried.append(make(keep, budget))
            share = tried[-1].share
            if abs(share - budget) <= NEAR * budget or share == share_last:  # whole tokens are all alike then
                break
            (before, share_before), (last, share_last) = (last, share_last), (keep, share)
        best = min(tried, key=lambda row: abs(row.share - budget), default=None)
        if best is not None and abs(best.share - budget) <= FAR * budget:
            yield best


def _with_keep(spec: str, keep: float) -> TokenMethod:
    return token_method(spec).with_keep(keep)


def run(args: argparse.Namespace) -> tuple[list[Variant], dict[str, float]]:
    """Score all variants on all pages; also how much longer a prefill takes with each token method."""
    torch.set_num_threads(args.threads)
    reader = load(None)
    model = reader.model
    config = yaml.safe_load(args.methods.read_text())
    seeds = SEEDS[args.seeds][args.skip : args.skip + args.pages]
    with torch.inference_mode():
        sample = make_batch(reader.processor, CHOOSE_SEEDS[:2], args.level, ADDRESS_KINDS)
        rows = list(variants(config, model, sample, args.only)) if args.pages else []
        starts = tqdm(range(0, len(seeds), args.batch), desc="batches", mininterval=5)
        with contextlib.suppress(KeyboardInterrupt):  # what has been scored by then is reported
            for start in starts:
                batch = make_batch(reader.processor, seeds[start : start + args.batch], args.level, ADDRESS_KINDS)
                for row, scores in zip(rows, score_batch(model, batch, rows), strict=True):
                    row.scores.extend(scores)
        times = prefill_times(config, model, sample, args.only, args.timed) if args.timed else {}
    return rows, times


def score_batch(model: Any, batch: Batch, rows: list[Variant]) -> list[Scores]:
    """Score all variants on one batch; the first is the dense one."""
    prompts = Prompts(model, batch)
    dense, all_scores = None, []
    for row in rows:
        cache, next_logits = prompts.read(row)
        # Heads that retrieve do so for a token that comes alone; several read all.
        retrieves = isinstance(row.method, HybridKV) and row.method.static > 0
        found = replay(model, cache, batch, next_logits, one_by_one=retrieves)
        dense = found if dense is None else dense
        scores = Scores()
        score(scores, batch, found, dense)
        all_scores.append(scores)
    return all_scores


def prefill_times(
    config: dict[str, Any], model: Any, batch: Batch, only: list[str] | None, rounds: int
) -> dict[str, float]:
    """Time a prefill with each token method (0.3 kept) over one without just before; return medians over rounds."""
    ratios: dict[str, list[float]] = {}
    for _ in range(rounds):
        for tokens, spec in config["tokens"].items():
            if only and not any(word in tokens for word in only):
                continue
            taken = []
            for method in (None, _with_keep(spec, 0.3)):
                begin = time.perf_counter()
                prefill(model, batch, RotateKCache(sparsity=0, tokens=method))
                taken.append(time.perf_counter() - begin)
            ratios.setdefault(tokens, []).append(taken[1] / taken[0])
    return {tokens: statistics.median(found) for tokens, found in ratios.items()}


def compared(row: Variant, rows: Sequence[Variant], rivals: Mapping[str, Any]) -> dict[str, Variant]:
    """Find the rows that a row is compared with, beside the dense one, by what they are to it.

    `tokens_only` is its token method at the same bytes, `channels_only` its channels with all tokens, `rival` what the
    methods file names: another token method, or a row of `alone`.
    """
    places = {}
    if row.method is not None:
        places["tokens_only"] = row.place(channels="tokens only")
        places["channels_only"] = ("none", row.channels, None, None)
    rival = rivals.get(row.tokens)
    if rival is not None:
        places["rival"] = ("none", rival["alone"], None, None) if isinstance(rival, dict) else row.place(tokens=rival)
    known = {other.place(): other for other in rows}
    found = {name: known[place] for name, place in places.items() if place in known}
    return {name: other for name, other in found.items() if other is not row}


def summary(row: Variant, dense: Variant, others: Mapping[str, Variant]) -> dict[str, Any]:
    """Sum up exact match, KL and paired differences of a row: to the dense one, and to `others` by name."""
    found: dict[str, Any] = {
        "tokens": row.tokens,
        "channels": row.channels,
        "budget": row.budget,
        "keep": None if row.method is None else row.method.share,
        "bytes_share": row.share,
        "prompt_share": row.prompt_share,
        "method": str(row.method),
        "options": row.options,
    }
    if "rival" in others:
        found["rival"] = others["rival"].channels if others["rival"].method is None else others["rival"].tokens
    for index, which in enumerate(QUESTIONS):
        exact, divergence = np.array(row.scores.exact[index]), np.array(row.scores.divergence[index])
        part = {"pages": len(exact), "exact_match": float(exact.mean()), "kl": float(divergence.mean())}

        def difference(name: str, values: np.ndarray, part: dict[str, Any] = part) -> None:
            part[name], part[f"{name}_95"] = float(values.mean()), list(bootstrap(values))

        if row is not dense:
            difference("loss", np.array(dense.scores.exact[index]) - exact)
        for name, other in others.items():
            difference(f"loss_to_{name}", np.array(other.scores.exact[index]) - exact)
            difference(f"kl_over_{name}", divergence - np.array(other.scores.divergence[index]))
        found[which] = part
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Write Markdown: a line a row."""
    lines = [
        "| tokens | channels | kept | bytes | first question | second question | second: over tokens only, points |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        second, kept = row["second"], row["keep"]
        gain = ""
        if "loss_to_tokens_only" in second:
            bounds = second["loss_to_tokens_only_95"]
            points, low, high = (0.0 - 100 * loss for loss in (second["loss_to_tokens_only"], bounds[1], bounds[0]))
            gain = f"{points:+.1f} [{low:+.1f}, {high:+.1f}]"
        lines.append(
            f"| {row['tokens']} | {row['channels']} | {'all' if kept is None else f'{100 * kept:.1f} %'} | "
            f"{row['bytes_share']:.3f} | {row['first']['exact_match']:.3f} | {second['exact_match']:.3f} | {gain} |"
        )
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw exact match of both questions against bytes: a panel a channel option, a line a token method."""
    chosen = [row for row in result["rows"] if row["tokens"] != "none"]
    channels = list(dict.fromkeys(row["channels"] for row in chosen))
    figure, axes = figures.new(2, len(channels), 3.2, sharex=True, sharey=True)
    names = list(dict.fromkeys(row["tokens"] for row in chosen))
    for column, channel in enumerate(channels):
        for line, which in enumerate(QUESTIONS):
            axis = axes[line, column]
            for number, name in enumerate(names):
                rows = [row for row in result["rows"] if (row["tokens"], row["channels"]) == (name, channel)]
                points = sorted((row["bytes_share"], row[which]["exact_match"]) for row in rows)
                style = {"marker": "osD^v<>P"[number % 8], "color": f"C{number}", "markersize": 4}
                axis.plot(*(zip(*points, strict=True) if points else ([], [])), label=name, **style)
            for row in result["rows"]:
                if row["tokens"] == "none" and row["channels"] != "dense":
                    axis.plot(row["bytes_share"], row[which]["exact_match"], marker="*", color="black", linestyle="")
            axis.set_title(f"{channel}\n{which} question", fontsize=9)
            axis.axhline(result["rows"][0][which]["exact_match"], color="grey", linestyle=":", linewidth=1)
        axes[1, column].set_xlabel("bytes of the visual KV, dense = 1")
    for line in range(2):
        axes[line, 0].set_ylabel("exact match")
    axes[0, -1].legend(fontsize=6)
    figures.save(figure, path)


def main() -> None:
    """Parse, run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=Path, default=DEFAULT_METHODS, help="YAML: tokens, channels, budgets, alone")
    parser.add_argument("--only", nargs="*", help="token methods whose name holds one of these words")
    parser.add_argument("--level", choices=sorted(LEVELS), default="hard")
    parser.add_argument("--seeds", choices=sorted(SEEDS), default="choose", help="report: for reported figures only")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--pages", type=int, default=64, help="0: only time prefills")
    parser.add_argument("--batch", type=int, default=16, help="pages that are scored at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timed", type=int, default=9, help="rounds of timed prefills; 0 times none")
    parser.add_argument("--out", type=Path, help="JSON file to write; a PNG of the same name is drawn beside it")
    args = parser.parse_args()
    rows, times = run(args)
    rivals = yaml.safe_load(args.methods.read_text()).get("rivals", {})
    result = {
        "rows": [summary(row, rows[0], compared(row, rows, rivals)) for row in rows],
        "prefill_time_ratio": times,
        "setting": {
            "level": args.level,
            "seeds": args.seeds,
            "skip": args.skip,
            "pages": len(rows[0].scores.exact[0]) if rows else 0,
        },
        "model": "reader",
        "command": shlex.join(["python", "-m", "evals.token_pruning", *sys.argv[1:]]),
        "hardware": f"{platform.machine()}, one process of {args.threads} threads",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    print(table(result["rows"]))
    for tokens, ratio in times.items():
        print(f"prefill with {tokens}: {ratio:.2f} times as long")
    if args.out:
        write_json(args.out, rounded(result))
        if rows:
            draw(result, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
