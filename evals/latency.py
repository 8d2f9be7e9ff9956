"""How fast, how large: prefill, basis fit, decode step, cache bytes and peak memory of a whole model.

    python -m evals.latency --shape four-layers --contexts 1024 4096 --out runs/latency.json
    python -m evals.latency --shape llava-next-8b --contexts 1024 4096 16384 65536 131072 --batches 1 4 16 \
        --largest 65536 --device cuda --out evals/results/latency_llava_next_8b.json
    python -m evals.latency --model llava-hf/llama3-llava-next-8b-hf --contexts 16384 --tokens 100 --device cuda ...

A model comes by name, or as a *shape* with random weights (`evals/shapes.yaml`). The vision tower is bypassed: the
prompt is random embeddings whose variance falls as 1 / rank, all visual but `--text` of them. In every round each
method prefills a cache of its own and decodes `--tokens` tokens, so that all methods meet the same machine; figures are
medians over rounds with their range. Bytes are those of the cache's storage. "fit" is the share of a prefill that goes
into sealing (fit, encode, copy), taken in a prefill of its own.
"""

import argparse
import gc
import importlib.util
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Cache,
    CLIPVisionConfig,
    DynamicCache,
    LlavaConfig,
    QuantizedCache,
    StaticCache,
)

from evals.accuracy import environment
from evals.fidelity import stored_tensors
from evals.figures import rounded
from rotatek_cache import RotateKCache, attach, detach
from rotatek_cache.cache import storage_bytes
from rotatek_cache.layer import LayerKV

SHAPES = Path(__file__).parent / "shapes.yaml"
METHODS = Path(__file__).parent / "latency.yaml"


class NotHereError(Exception):
    """A method cannot run on this machine; the message says what is missing."""


def build(shape: Mapping[str, Any], device: str, dtype: torch.dtype, longest: int) -> Any:
    """A LLaVA with a text model of that shape, random weights and a vision tower that is never run."""
    fields = {name: value for name, value in shape.items() if name != "model_type"}
    text = AutoConfig.for_model(shape["model_type"], **fields, max_position_embeddings=longest)
    tower = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_id=text.vocab_size - 1)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def draw_prompt(model: Any, batch: int, context: int, text: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings ``[B, T, hidden]`` whose variance falls as 1 / rank, and which positions are visual ``[B, T]``."""
    weight = model.get_input_embeddings().weight
    generator = torch.Generator(weight.device).manual_seed(seed)

    def normal(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=generator, device=weight.device)

    rank = min(256, weight.shape[1])
    scales = torch.arange(1, rank + 1, device=weight.device).rsqrt()
    mixing = scales[:, None] * normal(rank, weight.shape[1]) / rank**0.5
    embeddings = torch.stack([(normal(context, rank) @ mixing).to(weight.dtype) for _ in range(batch)])
    visual = torch.zeros(batch, context, dtype=torch.bool, device=weight.device)
    visual[:, text // 2 : context - (text - text // 2)] = True
    return embeddings, visual


def make_cache(options: Mapping[str, Any], config: Any, visual: Tensor, longest: int) -> Cache:
    """The empty cache that a method's options describe."""
    text = config.get_text_config(decoder=True)
    if "dense" in options:
        kinds: dict[str, Callable[[], Cache]] = {
            "dynamic": lambda: DynamicCache(config=text),
            "static": lambda: StaticCache(config=text, max_cache_len=longest),
        }
        return kinds[options["dense"]]()
    if "quantized" in options:
        try:
            return QuantizedCache(config=text, **options["quantized"])
        except ImportError as error:
            raise NotHereError(str(error)) from error
    return RotateKCache(**options, visual_mask=visual)


def held_bytes(cache: Cache) -> int:
    """Bytes of all storage that a cache's layers hold."""
    if isinstance(cache, RotateKCache):
        return cache.nbytes()
    return storage_bytes(stored_tensors([list(vars(layer).values()) for layer in cache.layers]))


def switch_attention(model: Any, options: Mapping[str, Any]) -> None:
    """Select the attention that a method reads its cache with."""
    name = options.get("attention", "sdpa") if "dense" in options or "quantized" in options else "rotatek"
    if name == "flash_attention_2" and (model.device.type != "cuda" or importlib.util.find_spec("flash_attn") is None):
        raise NotHereError("FlashAttention 2 needs a CUDA device and the package flash_attn")
    detach(model)
    if name == "rotatek":
        attach(model)
    else:
        model.set_attn_implementation({"text_config": name})


class _TimedKV(LayerKV):
    """A layer that measures its seals."""

    seconds = 0.0

    def observe(self, query: Tensor, mask: Tensor | None, scale: float | None = None) -> None:
        _synchronise(query.device)
        begin = time.perf_counter()
        super().observe(query, mask, scale)
        _synchronise(query.device)
        self.seconds += time.perf_counter() - begin


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clock(device: torch.device) -> float:
    _synchronise(device)
    return time.perf_counter()


def prefill(model: Any, cache: Cache, embeddings: Tensor) -> float:
    """Seconds of the prompt's forward."""
    begin = _clock(embeddings.device)
    model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return _clock(embeddings.device) - begin


def fit_share(model: Any, cache: Cache, embeddings: Tensor) -> float | None:
    """Share of a prefill that goes into seals; None for caches without."""
    if not isinstance(cache, RotateKCache):
        return None
    cache.learn_config(model.config)
    for layer in cache.layers:
        layer.kv.__class__ = _TimedKV
    whole = prefill(model, cache, embeddings)
    return sum(layer.kv.seconds for layer in cache.layers) / whole


def decode(model: Any, cache: Cache, batch: int, tokens: int) -> list[float]:
    """Seconds of each of `tokens` decode steps."""
    ids = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    times = []
    for _ in range(tokens):
        begin = _clock(model.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        times.append(_clock(model.device) - begin)
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def measure(
    model: Any, methods: Mapping[str, Mapping[str, Any]], context: int, batch: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row a method, for one prompt length and batch."""
    embeddings, visual = draw_prompt(model, batch, context, args.text, args.seed)
    gathered: dict[str, dict[str, Any]] = {}
    for number in range(args.rounds + 1):  # the first one warms up, and takes the share of the fit
        for name, options in methods.items():
            row = gathered.setdefault(name, {"method": name, "context": context, "batch": batch, "rounds": []})
            if "skipped" in row:
                continue
            try:
                switch_attention(model, options)
                cache = make_cache(options, model.config, visual, context + args.tokens)
                if number == 0:
                    row["fit_share"] = fit_share(model, cache, embeddings)
                    continue
                if model.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                first = prefill(model, cache, embeddings)
                steps = decode(model, cache, batch, args.tokens)
            except (NotHereError, ValueError, ImportError, NotImplementedError) as error:
                row["skipped"] = str(error)
            except torch.OutOfMemoryError:
                row["skipped"] = "out of memory"
            else:
                row["rounds"].append((first, statistics.median(steps), first + sum(steps)))
                row["cache_bytes"] = held_bytes(cache)
                cuda = model.device.type == "cuda"
                row["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
            finally:
                cache = None
                gc.collect()
    return [_row(row, batch, args.tokens) for row in gathered.values()]


def _row(gathered: dict[str, Any], batch: int, tokens: int) -> dict[str, Any]:
    rounds = gathered.pop("rounds")
    if "skipped" in gathered or not rounds:
        return gathered
    first, step, whole = (spread([1e3 * part for part in column]) for column in zip(*rounds, strict=True))
    return gathered | {
        "prefill_ms": first,
        "token_ms": step,
        "tokens_per_second": batch / step["median"] * 1e3,
        "end_to_end_ms": whole | {"tokens": tokens},
    }


def largest(fits: Callable[[int], bool], limit: int = 1 << 14) -> int:
    """The largest number up to `limit` that fits, 0 if none does; `fits` is true up to some number."""
    high = 1
    while high <= limit and fits(high):
        high *= 2
    low, high = high // 2, min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_batches(
    model: Any, methods: Mapping[str, Mapping[str, Any]], context: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The largest batch of each method whose caches and decode step fit into the GPU.

    Prompts are read one by one into the batch's cache where the cache can be filled so, or else prefill itself is what
    runs out; both say what a user meets.
    """
    rows = []
    for name, options in methods.items():

        def fits(batch: int, options: Mapping[str, Any] = options) -> bool:
            try:
                embeddings, visual = draw_prompt(model, batch, context, args.text, args.seed)
                cache = make_cache(options, model.config, visual, context + args.tokens)
                prefill(model, cache, embeddings)
                decode(model, cache, batch, 2)
            except torch.OutOfMemoryError:
                return False
            finally:
                cache = embeddings = None
                gc.collect()
                torch.cuda.empty_cache()
            return True

        try:
            switch_attention(model, options)
            rows.append({"method": name, "context": context, "largest_batch": largest(fits)})
        except (NotHereError, ValueError, ImportError, NotImplementedError) as error:
            rows.append({"method": name, "context": context, "skipped": str(error)})
    return rows


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line a row, beside the first method of the same setting."""
    reference: dict[tuple[int, int], Mapping[str, Any]] = {}
    print(
        f"{'context':>8} {'batch':>5}  {'method':38} {'prefill':>10} {'fit':>6} {'token':>9} {'speed':>6} {'cache':>10}"
    )
    for row in rows:
        setting = f"{row['context']:8} {row['batch']:5}  {row['method']:38}"
        if "skipped" in row:
            print(f"{setting} {row['skipped']}")
            continue
        first = reference.setdefault((row["context"], row["batch"]), row)
        fit = "" if row["fit_share"] is None else f"{100 * row['fit_share']:.1f}%"
        speed = first["token_ms"]["median"] / row["token_ms"]["median"]
        prefilled, token = row["prefill_ms"]["median"], row["token_ms"]["median"]
        mebibytes = row["cache_bytes"] / 2**20
        print(f"{setting} {prefilled:7.1f} ms {fit:>6} {token:6.2f} ms {speed:5.2f}x {mebibytes:6.1f} MiB")


def main() -> None:
    """Parse, measure, print, store."""
    shapes = yaml.safe_load(SHAPES.read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="name or path of a vision-language model")
    which.add_argument("--shape", choices=sorted(shapes), help="random weights of that shape")
    parser.add_argument("--methods", type=Path, default=METHODS, help="YAML: name -> options")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="methods whose name holds one of these words")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096], help="prompt lengths, at batch 1")
    parser.add_argument("--batches", type=int, nargs="*", default=[], help="batches, at --batch-context")
    parser.add_argument("--batch-context", type=int, default=16384)
    parser.add_argument("--largest", type=int, help="prompt length at which the largest batch is sought (CUDA)")
    parser.add_argument("--text", type=int, default=64, help="text tokens of the prompt, half of them before the image")
    parser.add_argument("--tokens", type=int, default=32, help="decoded tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on CUDA, float32 on the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.largest and not args.device.startswith("cuda"):
        parser.error(f"--largest looks for the end of a GPU's memory; --device is '{args.device}'")
    if least := [context for context in args.contexts if context <= args.text]:
        parser.error(f"--contexts must be longer than --text ({args.text}), got {least}")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    dtype = getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype):
        parser.error(f"--dtype must be 'auto' or the name of a torch dtype, got {args.dtype!r}")
    methods = yaml.safe_load(args.methods.read_text())
    if args.only:
        methods = {name: options for name, options in methods.items() if any(word in name for word in args.only)}
    settings = [(context, 1) for context in args.contexts] + [(args.batch_context, batch) for batch in args.batches]
    longest = max([context for context, _ in settings] + [args.largest or 0]) + args.tokens
    if args.shape:
        model = build(shapes[args.shape], args.device, dtype, longest)
    else:
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for context, batch in tqdm(settings, desc="settings"):
            rows += measure(model, methods, context, batch, args)
        found = largest_batches(model, methods, args.largest, args) if args.largest else []
    print_table(rows)
    for row in found:
        print(f"{row['context']:8}        {row['method']:38} {row.get('skipped') or row['largest_batch']}")
    result = {
        "model": args.model or f"{args.shape}, random weights",
        "dtype": args.dtype,
        "command": shlex.join(["python", "-m", "evals.latency", *sys.argv[1:]]),
        "setting": {"text": args.text, "tokens": args.tokens, "rounds": args.rounds, "seed": args.seed},
        "rows": rows,
        "largest": found,
        "environment": environment(args.device),
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rounded(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
