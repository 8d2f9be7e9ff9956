"""Does the compressed cache still read the page? Exact match and KL per method and budget, first and second question.

    python evals/fidelity.py --pages 512 --out evals/results/fidelity.json

Every page gets two questions. The prompt (image and first question) is prefilled once, densely; each method then seals
the same Keys and Values, with the first question's queries as its window, and answers both questions from the
compressed cache. Greedy answers are exact exactly if every answer token is the argmax given the right ones before it,
so one teacher-forced forward per method scores both answers and gives the KL of the next-token distribution against
the dense cache on the same tokens.

Keys and Values are held in half precision, and bytes are those of storage: of the visual Keys and Values of a request
with everything it owns (coefficients or codes, means, scales folded into bases, an online basis). A calibrated basis is
counted once per model and reported beside.
"""

import argparse
import concurrent.futures
import datetime
import functools
import importlib.metadata
import itertools
import json
import multiprocessing
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from evals.reader.pages import ADDRESS_KINDS, CHOOSE_SEEDS, LEVELS, REPORT_SEEDS, Question, ask, make_page
from rotatek_cache import RotateKCache, attach
from rotatek_cache.cache import storage_bytes
from rotatek_cache.layer import LayerKV

READER = Path(__file__).parent.parent / "rotatek_cache" / "reader"
METHODS = Path(__file__).parent / "fidelity.yaml"
SEEDS = {"choose": CHOOSE_SEEDS, "report": REPORT_SEEDS}


class RecordingCache(RotateKCache):
    """A dense cache that keeps what each layer was given in a prefill: Keys, Values and queries."""

    def __init__(self) -> None:
        super().__init__(sparsity=0)
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def learn_config(self, config: Any) -> None:
        """Build the layers and listen to them."""
        if self.layers:
            return
        super().learn_config(config)
        for layer in self.layers:
            layer.kv.__class__ = _RecordingKV
            layer.kv.record = self.seen


class _RecordingKV(LayerKV):
    record: dict[int, tuple[Tensor, Tensor, Tensor]]

    def observe(self, query: Tensor, mask: Tensor | None) -> None:
        assert self.pending is not None
        window = query[:, :, -self.options.query_window :]
        self.record[self.index] = (self.pending.keys.half(), self.pending.values.half(), window)


@dataclass
class Batch:
    """Pages and two questions each, tokenised: the prompt, and the rest of the conversation right-padded.

    Attributes:
        prompt: the model's inputs for image and first question, left-padded.
        rest: ids ``[B, n]`` of first answer, second question, second answer; 0 where padded.
        kinds: kind of the two questions of each page.
        answer: int ``[B, n]``, 1 or 2 on tokens of that answer, 0 elsewhere.
    """

    prompt: dict[str, Tensor]
    rest: Tensor
    rest_mask: Tensor
    answer: Tensor
    kinds: list[tuple[str, str]]


def make_batch(processor: Any, seeds: Sequence[int], level: str, kinds: Sequence[str]) -> Batch:
    """Draw the pages of `seeds` and tokenise two different questions about each."""
    images, prompts, rests, answers, asked = [], [], [], [], []
    tokenizer = processor.tokenizer
    for seed in seeds:
        page = make_page(seed, level=level)
        generator = np.random.default_rng(seed)
        first, second = (ask(page, generator, str(kind)) for kind in generator.choice(kinds, 2))
        images.append([page.image])
        prompts.append(f"<image>\n{first.text}")
        rest, answer = _conversation(tokenizer, first, second)
        rests.append(rest)
        answers.append(answer)
        asked.append((first.kind, second.kind))
    prompt = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    length = max(map(len, rests))
    padded = torch.tensor([rest + [0] * (length - len(rest)) for rest in rests])
    mask = torch.tensor([[1] * len(rest) + [0] * (length - len(rest)) for rest in rests])
    marks = torch.tensor([answer + [0] * (length - len(answer)) for answer in answers])
    return Batch(dict(prompt), padded, mask, marks, asked)


def _conversation(tokenizer: Any, first: Question, second: Question) -> tuple[list[int], list[int]]:
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    end = [tokenizer.eos_token_id]
    parts = [(ids(first.answer) + end, 1), (ids(second.text), 0), (ids(second.answer) + end, 2)]
    return [t for part, _ in parts for t in part], [mark for part, mark in parts for _ in part]


@dataclass
class Scores:
    """Per page: exact match and mean KL of both answers; bytes of one page's visual Keys and Values."""

    exact: list[list[float]] = field(default_factory=lambda: [[], []])
    divergence: list[list[float]] = field(default_factory=lambda: [[], []])
    key_bytes: list[float] = field(default_factory=list)
    value_bytes: list[float] = field(default_factory=list)

    def extend(self, other: "Scores") -> None:
        """Add the pages of `other`."""
        for index in range(2):
            self.exact[index] += other.exact[index]
            self.divergence[index] += other.divergence[index]
        self.key_bytes += other.key_bytes
        self.value_bytes += other.value_bytes


def visual_bytes(cache: RotateKCache) -> tuple[int, int]:
    """Bytes that the requests of a cache own for visual Keys and Values."""
    segments = [segment for layer in cache.layers for segment in layer.kv.segments]
    keys = storage_bytes([t for segment in segments for t in segment.keys.tensors()])
    values = storage_bytes([t for segment in segments for t in segment.values.tensors()])
    return keys, values


def fill(
    cache: RotateKCache, config: Any, batch: Batch, seen: dict[int, tuple[Tensor, Tensor, Tensor]], image: int
) -> None:
    """Give a cache the prompt's recorded states, as its prefill would have."""
    cache.learn_config(config)
    ids, mask = batch.prompt["input_ids"], batch.prompt["attention_mask"].bool()
    cache.announce_visual(ids == image, ids.shape[1])
    # The last query's view of the prompt is all that a seal asks of the mask.
    last = mask[:, None, None, :]
    for index, (keys, values, window) in sorted(seen.items()):
        handle, _ = cache.update(keys, values, index)
        handle.kv.observe(window, last)


def replay(model: Any, cache: RotateKCache, batch: Batch, first_logits: Tensor) -> Tensor:
    """Log-probabilities ``[B, n, V]`` that predict each token of `batch.rest`, from the cache of its prompt."""
    mask = torch.cat([batch.prompt["attention_mask"], batch.rest_mask], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -batch.rest.shape[1] :]
    logits = model(
        input_ids=batch.rest, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).logits
    return torch.cat([first_logits[:, None], logits[:, :-1]], 1).float().log_softmax(-1)


def score(scores: Scores, batch: Batch, found: Tensor, dense: Tensor) -> None:
    """Add the pages of a batch: log-probabilities `found` against `dense`, ``[B, n, V]``."""
    right = found.argmax(-1) == batch.rest
    divergence = (dense.exp() * (dense - found)).sum(-1)
    for which in (1, 2):
        marked = batch.answer == which
        scores.exact[which - 1] += (right | ~marked).all(1).double().tolist()
        scores.divergence[which - 1] += ((divergence * marked).sum(1) / marked.sum(1)).tolist()


def bootstrap(losses: np.ndarray, seed: int = 0, rounds: int = 4000) -> tuple[float, float]:
    """95 % bounds of the mean of paired differences by resampling pages."""
    generator = np.random.default_rng(seed)
    means = [losses[generator.integers(0, len(losses), len(losses))].mean() for _ in range(rounds)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


@functools.cache
def load(path: Path) -> tuple[Any, Any]:
    """The attached model and its processor, once per process."""
    model = attach(AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval())
    return model, AutoProcessor.from_pretrained(path)


def score_pages(
    args: argparse.Namespace, methods: dict[str, dict[str, Any]], seeds: Sequence[int]
) -> dict[str, Scores]:
    """Score every method on the pages of `seeds`, as one batch."""
    torch.set_num_threads(args.threads)
    model, processor = load(args.model)
    scores = {name: Scores() for name in methods}
    with torch.inference_mode():
        batch = make_batch(processor, seeds, args.level, ADDRESS_KINDS)
        recorder = RecordingCache()
        positions = (batch.prompt["attention_mask"].cumsum(1) - 1).clamp_min(0)
        prefill = model(**batch.prompt, position_ids=positions, past_key_values=recorder, use_cache=True)
        first_logits = prefill.logits[:, -1]
        dense: Tensor | None = None
        for name, options in methods.items():
            cache = RotateKCache(**options)
            fill(cache, model.config, batch, recorder.seen, model.config.image_token_id)
            keys, values = visual_bytes(cache)
            found = replay(model, cache, batch, first_logits)
            dense = found if dense is None else dense
            score(scores[name], batch, found, dense)
            scores[name].key_bytes += [keys / len(batch.kinds)] * len(batch.kinds)
            scores[name].value_bytes += [values / len(batch.kinds)] * len(batch.kinds)
    return scores


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Score every method on every page, batches dealt out to processes."""
    methods: dict[str, dict[str, Any]] = yaml.safe_load(args.methods.read_text())
    if args.only:
        methods = {name: options for name, options in methods.items() if any(word in name for word in args.only)}
    methods = {"dense": {"sparsity": 0}, **methods}
    seeds = SEEDS[args.seeds][args.skip : args.skip + args.pages]
    parts = [seeds[start : start + args.batch] for start in range(0, len(seeds), args.batch)]
    results = {name: Scores() for name in methods}
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=context) as pool,
        tqdm(total=len(seeds), desc="pages", mininterval=5) as progress,
    ):
        for part in pool.map(score_pages, itertools.repeat(args), itertools.repeat(methods), parts):
            for name, scores in part.items():
                results[name].extend(scores)
            progress.update(len(part["dense"].key_bytes))
    return {"methods": {name: summary(results[name], results["dense"], options) for name, options in methods.items()}}


def summary(found: Scores, dense: Scores, options: dict[str, Any]) -> dict[str, Any]:
    """Means, paired losses against dense with their bounds, and byte ratios of one method."""
    key_bytes, value_bytes = float(np.mean(found.key_bytes)), float(np.mean(found.value_bytes))
    dense_keys, dense_values = float(np.mean(dense.key_bytes)), float(np.mean(dense.value_bytes))
    row: dict[str, Any] = {
        "options": options,
        "key_ratio": dense_keys / key_bytes,
        "value_ratio": dense_values / value_bytes,
        "kv_ratio": (dense_keys + dense_values) / (key_bytes + value_bytes),
        "visual_bytes_per_page": key_bytes + value_bytes,
    }
    for index, which in enumerate(("first", "second")):
        exact, reference = np.array(found.exact[index]), np.array(dense.exact[index])
        low, high = bootstrap(reference - exact)
        row[which] = {
            "pages": len(exact),
            "exact_match": float(exact.mean()),
            "loss": float((reference - exact).mean()),
            "loss_95": [low, high],
            "kl": float(np.mean(found.divergence[index])),
        }
    return row


def print_table(result: dict[str, Any]) -> None:
    """A line a method."""
    heads = f"{'first EM':>8} {'KL':>8}   {'second EM':>9} {'KL':>8}"
    print(f"{'method':34} {'K':>6} {'V':>6} {'KV':>6}   {heads}  loss, 95 %")
    for name, row in result["methods"].items():
        first, second = row["first"], row["second"]
        low, high = (100 * bound for bound in second["loss_95"])
        print(
            f"{name:34} {row['key_ratio']:5.1f}x {row['value_ratio']:5.1f}x {row['kv_ratio']:5.1f}x   "
            f"{first['exact_match']:8.4f} {first['kl']:8.5f}   {second['exact_match']:9.4f} {second['kl']:8.5f}  "
            f"{100 * second['loss']:.2f} [{low:.2f}, {high:.2f}]"
        )


def main() -> None:
    """Parse, run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=READER)
    parser.add_argument("--methods", type=Path, default=METHODS, help="YAML: name -> options of RotateKCache")
    parser.add_argument("--only", nargs="*", help="methods whose name holds one of these words")
    parser.add_argument("--level", choices=sorted(LEVELS), default="hard")
    parser.add_argument("--seeds", choices=sorted(SEEDS), default="choose", help="report: for reported figures only")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--pages", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32, help="pages that are scored at once")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    result = run(args)
    result |= {
        "setting": {"level": args.level, "seeds": args.seeds, "skip": args.skip, "pages": args.pages},
        "model": args.model.name,
        "hardware": f"{platform.machine()}, {args.workers} processes of {args.threads} threads",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    print_table(result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
