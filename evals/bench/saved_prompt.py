"""Time and bytes of a stored prompt against reading it again, and of many questions on one prompt against as many.

    python -m evals.bench.saved_prompt --out evals/results/saved_prompt_cpu.json

The prompt is the reader's pages, one after the other, read up to the question. Ways that are compared take turns in
each round, so that what else the machine does meets all of them; times are medians over the rounds, ratios medians of
the rounds' own ratios, with the quartiles of the latter. Bytes are counted from storage, and on disk from the file. No
time is reported unless the loaded cache answers as the saved one, bit for bit, and the batch of questions as its
questions one by one.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from evals.accuracy import READER, environment
from evals.store import rounded, write_json
from rotatek_cache import RotateKCache, attach
from rotatek_cache.hf.calls import cache_name
from rotatek_cache.hf.storage import storage_bytes

STORED: Mapping[str, Mapping[str, Any]] = {
    "dense": {"sparsity": 0},
    "pca 32 of 128": {"sparsity": 0.75, "basis": "pca"},
    "pca 32, codes of 4 bits, Values too": {
        "sparsity": 0.75,
        "basis": "pca",
        "key_bits": 4,
        "value_sparsity": 0.75,
        "value_bits": 4,
        "basis_bits": 8,
    },
}
ANSWER = 4  # tokens
Question = dict[str, Tensor]


class Bench:
    """The reader with a prompt of some pages.

    Args:
        pages: how many pages, of 324 visual tokens each.
        dtype: of the model.
        rounds: how often each way is timed.
    """

    def __init__(self, pages: int, dtype: torch.dtype, rounds: int) -> None:
        self.rounds = rounds
        self.model = attach(AutoModelForImageTextToText.from_pretrained(READER, dtype=dtype).eval())
        self.processor = AutoProcessor.from_pretrained(READER)
        files = sorted((READER / "pages").glob("*.png"))
        images = [Image.open(files[number % len(files)]).convert("RGB") for number in range(pages)]
        self.prompt = self.processor(images=images, text="<bos>" + "<image>\n" * pages, return_tensors="pt")
        self.prompt["pixel_values"] = self.prompt["pixel_values"].to(dtype)
        self.length = self.prompt["input_ids"].shape[1]

    def read(self, options: Mapping[str, Any]) -> RotateKCache:
        """Read the prompt."""
        cache = RotateKCache(**options)
        self.generate(cache, self.prompt, 1)
        cache.seal()
        return cache

    def generate(self, cache: Any, inputs: Mapping[str, Any], tokens: int) -> Tensor:
        """Return logits ``[steps, N, V]``."""
        found = self.model.generate(
            **{**inputs, cache_name(): cache},
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.stack(found.logits)

    def questions(self, count: int) -> Question:
        """Draw questions by address, padded on the left."""
        texts = [f"{'row' if number % 2 else 'colours row'} {1 + number % 3}?\n" for number in range(count)]
        tokenizer = self.processor.tokenizer
        found: Question = dict(
            tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        )
        return found

    def whole(self, question: Question) -> dict[str, Tensor]:
        """Make the inputs of as many prompts as questions, each with the images."""
        count = len(question["input_ids"])
        longest = question["input_ids"].shape[1]
        rows = []
        for ids, mask in zip(question["input_ids"], question["attention_mask"], strict=True):
            pads = longest - int(mask.sum())
            rows.append(torch.cat([ids[:pads], self.prompt["input_ids"][0], ids[pads:]]))
        ids = torch.stack(rows)
        shown = torch.nn.functional.pad(question["attention_mask"].sort(1).values, (self.length, 0), value=1)
        pixels = self.prompt["pixel_values"].repeat(count, 1, 1, 1)
        return {"input_ids": ids, "attention_mask": shown.sort(1).values, "pixel_values": pixels}

    def alternately(self, ways: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Time ways in turn, after one round that does not count: milliseconds of each round."""
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(self.rounds + 1):
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                if number:
                    times[name].append((time.perf_counter() - begin) * 1e3)
        return times


def _ratio(times: Mapping[str, list[float]], of: str, to: str) -> dict[str, float]:
    ratios = [a / b for a, b in zip(times[of], times[to], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": middle, "lower quartile": low, "upper quartile": high}


def stored_prompt(bench: Bench, name: str, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Measure one way to store: bytes in memory and on disk, times to save, load and read again."""
    cache = bench.read(options)
    plain, packed = folder / "plain", folder / "packed"
    saved, compressed = cache.save(plain), cache.save(packed, compress=True)
    asked = bench.questions(2)
    expected = None
    for held in (cache, RotateKCache.load(plain), RotateKCache.load(packed)):
        inputs = held.ask_many(asked["input_ids"], asked["attention_mask"])
        logits = bench.generate(inputs[cache_name()], inputs, ANSWER)
        if expected is not None and not torch.equal(logits, expected):
            raise SystemExit(f"no time is reported: a loaded cache ({name}) answers otherwise than the saved one")
        expected = logits
    times = bench.alternately(
        {
            "read again": lambda: bench.read(options),
            "save": lambda: cache.save(plain),
            "load": lambda: RotateKCache.load(plain),
            "save compressed": lambda: cache.save(packed, compress=True),
            "load compressed": lambda: RotateKCache.load(packed),
        }
    )
    dense = cache.report().dense_bytes
    row = {
        "stored": name,
        "dense bytes": dense,
        "bytes in memory": cache.nbytes(),
        "bytes on disk": saved.on_disk,
        "bytes on disk, compressed": compressed.on_disk,
        "ms": {way: statistics.median(found) for way, found in times.items()},
        "read again / load": _ratio(times, "read again", "load"),
        "read again / load compressed": _ratio(times, "read again", "load compressed"),
    }
    print(
        f"{name}: {cache.nbytes():,} bytes in memory ({dense / cache.nbytes():.2f}x smaller than dense), "
        f"{saved.on_disk:,} on disk, {compressed.on_disk:,} compressed; reading again takes "
        f"{row['read again / load']['median']:.1f}x as long as loading, "
        f"{row['read again / load compressed']['median']:.1f}x compressed",
        flush=True,
    )
    return row


def many_questions(bench: Bench, count: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure questions on one prompt, as a batch, one by one, and as so many prompts, dense and compressed."""
    question = bench.questions(count)
    whole = bench.whole(question)
    dense_config = bench.model.config.get_text_config()
    held: dict[str, int] = {}

    def together() -> Tensor:
        cache = bench.read(options)
        inputs = cache.ask_many(question["input_ids"], question["attention_mask"])
        logits = bench.generate(inputs[cache_name()], inputs, ANSWER)
        held["one prompt, a batch of questions"] = cache.nbytes() + inputs[cache_name()].nbytes(beside=cache)
        return logits

    def one_by_one() -> Tensor:
        cache = bench.read(options)
        found = []
        for ids, mask in zip(question["input_ids"], question["attention_mask"], strict=True):
            inputs = cache.ask_many(ids[mask.bool()][None])
            found.append(bench.generate(inputs[cache_name()], inputs, ANSWER))
        return torch.cat(found, 1)

    def prompts() -> Tensor:
        cache = RotateKCache(**options)
        logits = bench.generate(cache, whole, ANSWER)
        held["as many prompts, compressed"] = cache.nbytes()
        return logits

    def dense() -> Tensor:
        cache = DynamicCache(config=dense_config)
        logits = bench.generate(cache, whole, ANSWER)
        held["as many prompts, dense"] = storage_bytes(
            [t for layer in cache.layers for t in (layer.keys, layer.values)]
        )
        return logits

    difference = float((together() - one_by_one()).abs().max())
    if not difference < 1e-2:
        raise SystemExit(f"no time is reported: a batch of questions differs by {difference:.3g} from one by one")
    times = bench.alternately(
        {
            "one prompt, a batch of questions": together,
            "one prompt, one question after the other": one_by_one,
            "as many prompts, compressed": prompts,
            "as many prompts, dense": dense,
        }
    )
    row = {
        "questions": count,
        "largest difference of a logit from one by one": difference,
        "bytes": held,
        "ms": {way: statistics.median(found) for way, found in times.items()},
        "time against as many prompts, dense": _ratio(
            times, "as many prompts, dense", "one prompt, a batch of questions"
        ),
        "time against one by one": _ratio(
            times, "one prompt, one question after the other", "one prompt, a batch of questions"
        ),
    }
    mine = held["one prompt, a batch of questions"]
    print(
        f"{count} questions: {mine:,} bytes, {held['as many prompts, dense'] / mine:.1f}x fewer than as many dense "
        f"prompts, {held['as many prompts, compressed'] / mine:.1f}x fewer than as many compressed ones; "
        f"{row['time against as many prompts, dense']['median']:.1f}x as fast as as many dense prompts, "
        f"{row['time against one by one']['median']:.1f}x as fast as one after the other",
        flush=True,
    )
    return row


@torch.no_grad()
def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=4)
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bench = Bench(args.pages, getattr(torch, args.dtype), args.rounds)
    print(f"{args.pages} pages, {bench.length} tokens, {args.dtype}")
    stored: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    result = {
        "pages": args.pages,
        "tokens": bench.length,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "stored prompt": stored,
        "many questions": asked,
        "environment": environment("cpu"),
    }

    def add(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
        rows.append(row)
        if args.out is not None:
            write_json(args.out, rounded(result))

    with tempfile.TemporaryDirectory() as folder:
        for name, options in STORED.items():
            add(stored, stored_prompt(bench, name, options, Path(folder)))
    for count in args.questions:
        add(asked, many_questions(bench, count, STORED["pca 32 of 128"]))


if __name__ == "__main__":
    main()
