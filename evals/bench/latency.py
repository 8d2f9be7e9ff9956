"""How fast, how large: prefill, basis fit, decode step, attention alone, cache bytes and peak memory of a whole model.

    python -m evals.bench.latency --shape four-layers --contexts 1024 4096 --out runs/latency.json
    python -m evals.bench.latency --shape llava-next-8b --contexts 1024 4096 16384 65536 131072 --batches 1 4 16 \
        --largest 65536 --device cuda --out evals/results/latency_llava_next_8b.json
    python -m evals.bench.latency --shape llava-next-8b --methods evals/bench/latency_vl_cache.yaml \
        --contexts 16384 131072 --batches 4 --tokens 100 --device cuda --out evals/results/latency_vl_cache.json
    python -m evals.bench.latency --model llava-hf/llama3-llava-next-8b-hf --images page.png --contexts 16384

A model comes by name, or as a *shape* with random weights (`evals/bench/shapes.yaml`). The vision tower is bypassed:
the prompt is random embeddings whose variance falls as 1 / rank, all visual but `--text` of them. With `--images` the
model's own tower reads them instead, as many as the context holds. In every round each method prefills a cache of its
own and decodes `--tokens` tokens, so that all methods meet the same machine; figures are medians over rounds with their
range. "end to end" is a prefill with all its tokens. "attention" is a decode step's appending and attending in all
layers, without the model around them. "fit" is the share of a prefill that goes into sealing (fit, encode, copy), taken
in a prefill of its own, when all is warm. Bytes are those of the cache's storage.
"""

import argparse
import gc
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from evals.accuracy import environment
from evals.bench.workload import (
    DENSE,
    NotHereError,
    Prompt,
    PromptError,
    attention_steps,
    build,
    decode,
    draw_prompt,
    fill,
    fit_share,
    held_bytes,
    make_cache,
    prefill,
    read_prompt,
    spread,
    switch_attention,
    visual_span,
)
from evals.fidelity import natural, positive
from evals.store import rounded, write_json
from rotatek_cache import RotateKCache
from rotatek_cache.hf.chat import InputError, check_device

SHAPES = Path(__file__).parent / "shapes.yaml"
DEFAULT_METHODS = Path(__file__).parent / "latency.yaml"
REFUSALS = (NotHereError, ValueError, ImportError, NotImplementedError)  # a method's, which the others go on without


class MethodsError(Exception):
    """The methods cannot be used; the message names what, what was expected and what came."""


def measure(
    model: Any, methods: Mapping[str, Mapping[str, Any]], prompt: Prompt, tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Measure every method on one prompt, a result row for each."""
    cuda = model.device.type == "cuda"
    gathered: dict[str, dict[str, Any]] = {}

    def peak() -> int | None:
        if not cuda:
            return None
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most

    for number in range(rounds + 1):  # the first one warms up, and takes the share of the fit
        for name, options in methods.items():
            fresh = {"method": name, "context": prompt.context, "batch": prompt.batch, "rounds": []}
            row = gathered.setdefault(name, fresh)
            if "skipped" in row:
                continue
            try:
                switch_attention(model, options)
                compiled = options.get("compiled", False)
                longest = prompt.context + 2 * tokens + 8
                cache = make_cache(options, model.config, prompt.visual, longest)
                if number == 0:
                    prefill(model, cache, prompt)
                    decode(model, cache, prompt.batch, min(3, tokens), compiled=compiled)
                    attention_steps(model, cache, prompt.batch, 1)
                    cache = None  # freed before the next one is made
                    cache = make_cache(options, model.config, prompt.visual, longest)
                    row["fit_share"] = fit_share(model, cache, prompt)
                    continue
                peak()
                first = prefill(model, cache, prompt)
                row["prefill_peak_bytes"] = peak()
                steps = decode(model, cache, prompt.batch, tokens, compiled=compiled)
                row["decode_peak_bytes"] = peak()
                row["cache_bytes"] = held_bytes(cache)
                attention = attention_steps(model, cache, prompt.batch, tokens)
            except REFUSALS as error:
                row["skipped"] = str(error)
            except torch.OutOfMemoryError:
                row["skipped"] = "out of memory"
            else:
                row["rounds"].append(
                    (first, statistics.median(steps), statistics.median(attention), first + sum(steps))
                )
            finally:
                cache = None
                gc.collect()
    return [_row(row, prompt.batch, tokens) for row in gathered.values()]


def _row(gathered: dict[str, Any], batch: int, tokens: int) -> dict[str, Any]:
    rounds = gathered.pop("rounds")
    if "skipped" in gathered or not rounds:
        return gathered
    first, step, attention, whole = (spread([1e3 * part for part in column]) for column in zip(*rounds, strict=True))
    return gathered | {
        "prefill_ms": first,
        "token_ms": step,
        "attention_ms": attention,
        "tokens_per_second": batch / step["median"] * 1e3,
        "end_to_end_ms": whole | {"tokens": tokens},
    }


def largest(fits: Callable[[int], bool], limit: int = 1 << 14) -> int:
    """Find the largest number up to `limit` that fits, 0 if none does; `fits` is true up to some number."""
    high = 1
    while high <= limit and fits(high):
        high *= 2
    low, high = high // 2, min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_batches(
    model: Any, methods: Mapping[str, Mapping[str, Any]], context: int, text: int
) -> list[dict[str, Any]]:
    """Find the largest batch of each method whose caches, filled by `fill`, and decode step fit into the GPU."""
    rows = []
    for name, options in methods.items():

        def fits(batch: int, options: Mapping[str, Any] = options) -> bool:
            try:
                visual = visual_span(batch, context, text, model.device)
                cache = make_cache(options, model.config, visual, context + 4)
                fill(model, cache, batch, context, text)
                decode(model, cache, batch, 2)
            except torch.OutOfMemoryError:
                return False
            finally:
                cache = None
                gc.collect()
                torch.cuda.empty_cache()
            return True

        row: dict[str, Any] = {"method": name, "context": context}
        try:
            if options.get("compiled"):
                raise NotHereError("holds what the cache that is not compiled holds")
            switch_attention(model, options)
            row["largest_batch"] = largest(fits)
        except REFUSALS as error:
            row["skipped"] = str(error)
        rows.append(row)
    return rows


COLUMNS = {
    "prefill": "prefill_ms",
    "token": "token_ms",
    "attention": "attention_ms",
    "end to end": "end_to_end_ms",
}


def references(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], Mapping[str, Any]]:
    """Find the first measured row of each setting (context, batch): the one that others are compared with."""
    first: dict[tuple[int, int], Mapping[str, Any]] = {}
    for row in rows:
        if "skipped" not in row:
            first.setdefault((row["context"], row["batch"]), row)
    return first


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a line a row; each time with how often it goes into that of the setting's first method."""
    first = references(rows)
    titles = " ".join(f"{title:>20}" for title in COLUMNS)
    print(f"{'context':>8} {'batch':>5}  {'method':44}{titles} {'fit':>6} {'cache':>10}")
    for row in rows:
        setting = f"{row['context']:8} {row['batch']:5}  {row['method']:44}"
        if "skipped" in row:
            print(f"{setting} {row['skipped']}")
            continue
        reference = first[row["context"], row["batch"]]
        times = " ".join(
            f"{row[name]['median']:10.2f} ms {reference[name]['median'] / row[name]['median']:5.2f}x"
            for name in COLUMNS.values()
        )
        fit = "" if row["fit_share"] is None else f"{100 * row['fit_share']:.1f}%"
        print(f"{setting}{times} {fit:>6} {row['cache_bytes'] / 2**20:6.1f} MiB")


def _check(options: Mapping[str, Any]) -> None:
    """Raise what is wrong with a method, as far as it shows without a model."""
    if "dense" in options:
        if options["dense"] not in DENSE:
            raise ValueError(f"dense must be one of {', '.join(DENSE)}, got {options['dense']!r}")
    elif "quantized" not in options:
        RotateKCache.for_study(**options)


def read_methods(path: Path, only: Sequence[str] | None) -> dict[str, Mapping[str, Any]]:
    """Read the methods of a YAML file, those whose name holds a word of `only` if there are some.

    Raises:
        MethodsError: the file cannot be read, a method cannot be made, or none is left.
    """
    try:
        methods = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MethodsError(f"--methods '{path}' cannot be read: {error}") from error
    if not isinstance(methods, dict) or not methods:
        raise MethodsError(f"--methods '{path}' must map names of methods to their options")
    for name, options in methods.items():
        if not isinstance(options, dict):
            raise MethodsError(f"method '{name}' must be a mapping of options, got {options!r}")
        try:
            _check(options)
        except (TypeError, ValueError, OSError) as error:
            raise MethodsError(f"method '{name}': {error}") from error
    kept = {name: options for name, options in methods.items() if not only or any(word in name for word in only)}
    if not kept:
        raise MethodsError(f"--only {' '.join(only or ())} is in no name of {', '.join(methods)}")
    return kept


def parse() -> argparse.Namespace:
    """Read and check the flags, with `methods` read."""
    shapes = yaml.safe_load(SHAPES.read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="name or path of a vision-language model")
    which.add_argument("--shape", choices=sorted(shapes), help="random weights of that shape")
    parser.add_argument("--methods", type=Path, default=DEFAULT_METHODS, help="YAML: name -> options")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="methods whose name holds one of these words")
    parser.add_argument("--contexts", type=positive, nargs="+", default=[1024, 4096], help="prompt lengths, at batch 1")
    parser.add_argument("--batches", type=positive, nargs="*", default=[], help="batches, at --batch-context")
    parser.add_argument("--batch-context", type=positive, default=16384)
    parser.add_argument("--largest", type=positive, help="prompt length at which the largest batch is sought (CUDA)")
    parser.add_argument("--images", type=Path, nargs="+", help="with --model: pictures that its own tower reads")
    parser.add_argument("--question", default="What does the picture show?", help="with --images: what follows them")
    parser.add_argument("--text", type=natural, default=64, help="text tokens of the prompt, half before the image")
    parser.add_argument("--tokens", type=positive, default=32, help="decoded tokens")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on CUDA, float32 on the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write, which must not be there; kept up after each setting"
    )
    args = parser.parse_args()
    if args.images and not args.model:
        parser.error("--images needs a model with a trained tower: give --model in place of --shape")
    if args.out and args.out.exists():
        parser.error(f"--out '{args.out}' is there already and is not overwritten")
    try:
        check_device(args.device)
        args.methods = read_methods(args.methods, args.only)
        args.pictures = [Image.open(path).convert("RGB") for path in args.images or []]
    except (InputError, MethodsError, OSError) as error:
        parser.error(str(error))
    if args.largest and not args.device.startswith("cuda"):
        parser.error(f"--largest looks for the end of a GPU's memory; --device is '{args.device}'")
    args.settings = [(context, 1) for context in args.contexts]
    args.settings += [(args.batch_context, batch) for batch in args.batches]
    lengths = [context for context, _ in args.settings] + ([args.largest] if args.largest else [])
    if least := [length for length in lengths if length <= args.text]:
        parser.error(f"--contexts, --batch-context and --largest must be longer than --text ({args.text}), got {least}")
    args.longest = max(lengths) + 2 * args.tokens + 8
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    if not isinstance(getattr(torch, args.dtype, None), torch.dtype):
        parser.error(f"--dtype must be 'auto' or the name of a torch dtype, got {args.dtype!r}")
    args.shape_fields = shapes.get(args.shape)
    return args


def main() -> None:
    """Parse, measure, print, store."""
    args = parse()
    dtype = getattr(torch, args.dtype)
    processor = None
    if args.shape:
        model = build(args.shape_fields, args.device, dtype, args.longest)
    else:
        try:
            model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
            processor = AutoProcessor.from_pretrained(args.model) if args.pictures else None
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise SystemExit(f"error: --model '{args.model}' cannot be used: {error}") from error
    result: dict[str, Any] = {
        "model": args.model or f"{args.shape}, random weights",
        "dtype": args.dtype,
        "command": shlex.join(["python", "-m", "evals.bench.latency", *sys.argv[1:]]),
        "setting": {
            "prompt": "images through the model's tower" if args.pictures else "drawn embeddings",
            "text": args.question if args.pictures else args.text,
            "tokens": args.tokens,
            "rounds": args.rounds,
            "seed": args.seed,
        },
        "rows": [],
        "largest": [],
        "environment": environment(args.device),
    }
    with torch.inference_mode():
        for context, batch in tqdm(args.settings, desc="settings"):
            try:
                prompt = (
                    read_prompt(model, processor, args.pictures, args.question, batch, context)
                    if args.pictures
                    else draw_prompt(model, batch, context, args.text, args.seed)
                )
            except PromptError as error:
                raise SystemExit(f"error: {error}") from error
            result["rows"] += measure(model, args.methods, prompt, args.tokens, args.rounds)
            del prompt
            if args.out:  # what is measured stays, whatever comes
                write_json(args.out, rounded(result))
        if args.largest:
            result["largest"] = largest_batches(model, args.methods, args.largest, args.text)
    print_table(result["rows"])
    for row in result["largest"]:
        print(f"{row['context']:8}        {row['method']:38} {row.get('skipped') or row['largest_batch']}")
    if args.out:
        write_json(args.out, rounded(result))


if __name__ == "__main__":
    main()
