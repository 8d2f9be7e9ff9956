"""Does the compressed cache still read the page? Exact match and KL per method and budget, first and second question.

    python -m evals.fidelity --pages 512 --out evals/results/fidelity.json
    python -m evals.fidelity --reader smol --level easy --third where count --out runs/fidelity_smol.json
    python -m evals.fidelity --model name-or-path --images folder --question "What is it?" --question "Where?"

Every image gets two questions. The prompt (image and first question) is prefilled once, densely; each method then seals
the same Keys and Values, with the first question's queries as its window, and answers both questions from the
compressed cache. Greedy answers are exact exactly if every answer token is the argmax given the right ones before it,
so one teacher-forced forward per method scores both answers and gives the KL of the next-token distribution against
the dense cache on the same tokens.

Without --images the images are pages drawn for one of the readers (`evals.reader.readers`), whose true answers are
known; the questions ask by address, unless --second names other kinds for the second, or --third adds one more of the
kinds that it names. With images the dense cache's own greedy answers stand for the true ones. A row's basis file
`runs/reader_...` stands for that of the reader asked.

Keys and Values are held in half precision, and bytes are those of storage: of the visual Keys and Values of a request
with everything it owns (coefficients or codes, means, scales folded into bases, an online basis). A calibrated basis is
counted once per model and reported beside.

A row of the methods file holds options of RotateKCache, or names another cache and holds the options of that one, as in
`{cache: quantized, backend: quanto, nbits: 4}` for transformers' QuantizedCache. Such a cache is filled with the same
states and read through the model's own sdpa. It knows nothing of images: it compresses the text too, every position
alike, so that the visual tokens' share of the prompt is their share of its bytes, and its ratio that of the whole
prompt; so it is with ``text="coded"``, where all tokens are coded and the last 64 are dense. QuantizedCache compresses
a whole prompt at once; its window of full precision (`residual_length`) holds what comes later, here both answers and
the second question. Its fp8 backend has one scale a layer for a whole batch. The peers of `evals.peers` code all tokens
too, but for the first 4 and the last 64.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import datetime
import functools
import importlib.metadata
import itertools
import json
import multiprocessing
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, Cache, DynamicCache, QuantizedCache

from evals import figures
from evals.peers.cache import PeerCache
from evals.peers.registry import PEERS
from evals.reader.pages import ADDRESS_KINDS, CHOOSE_SEEDS, KINDS, LEVELS, REPORT_SEEDS, Question, ask, make_page
from evals.reader.readers import READERS, Reader
from rotatek_cache import RotateKCache
from rotatek_cache.cache.coordinator import Coordinator
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.calibration.images import find_images
from rotatek_cache.core.attention import causal_mask
from rotatek_cache.hf.cache import RotateKLayer
from rotatek_cache.hf.chat import READER, Chat, InputError, open_image
from rotatek_cache.hf.storage import storage_bytes

DEFAULT_METHODS = Path(__file__).parent / "settings" / "fidelity.yaml"
ANSWERS = ("first", "second", "third")
SEEDS = {"choose": CHOOSE_SEEDS, "report": REPORT_SEEDS}
OTHER_CACHES: dict[str, Callable[..., Cache]] = {"quantized": QuantizedCache, **PEERS}


class RecordingCache(RotateKCache):
    """A dense cache that keeps what each layer was given in a prefill: Keys, Values, queries and the logits' scale."""

    def __init__(self) -> None:
        super().__init__(sparsity=0)
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor, float | None]] = {}
        self.visual: Tensor | None = None
        self.coordinator = _RecordingCoordinator(self.positions, self.seen)

    @property
    def recorded_bytes(self) -> int:
        """Count the bytes of the recorded Keys and Values, which are in half precision."""
        return sum(keys.nbytes + values.nbytes for keys, values, _, _ in self.seen.values())

    def announce_visual(self, visual: Tensor | None, tokens: int) -> None:
        """Keep which positions are visual, bool ``[B, T]``."""
        self.visual = visual
        super().announce_visual(visual, tokens)


class _RecordingCoordinator(Coordinator):
    """A coordinator that records and lets no layer seal."""

    def __init__(
        self, positions: VisualPositions, record: dict[int, tuple[Tensor, Tensor, Tensor, float | None]]
    ) -> None:
        super().__init__(positions)
        self.record = record

    def observe(self, layer: LayerKV, query: Tensor, mask: Tensor | None, scale: float | None = None) -> None:
        """Record the states of a layer."""
        dense = layer.dense()
        assert dense is not None  # nothing of a prompt read at once is sealed
        keys, values = dense
        if keys.dtype == torch.float32:
            keys, values = keys.half(), values.half()
        self.record[layer.index] = (keys, values, query, scale)


@dataclass
class Batch:
    """Images and two or three questions each, tokenised: the prompt, and the rest of the conversation right-padded.

    Attributes:
        prompt: the model's inputs for image and first question, left-padded.
        rest: ids ``[B, n]`` of first answer, second question, second answer and so on; 0 where padded.
        answer: int ``[B, n]``, 1, 2 or 3 on tokens of that answer, 0 elsewhere.
    """

    prompt: dict[str, Tensor]
    rest: Tensor
    rest_mask: Tensor
    answer: Tensor

    def __len__(self) -> int:
        return len(self.rest)

    def positions(self) -> tuple[Tensor | None, Tensor | None]:
        """Return positions of prompt and rest: None, the model's own, where nothing is padded."""
        mask = torch.cat([self.prompt["attention_mask"], self.rest_mask], 1)
        if bool(mask.all()):
            return None, None
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return positions[:, : -self.rest.shape[1]], positions[:, -self.rest.shape[1] :]


def make_batch(
    processor: Any,
    seeds: Sequence[int],
    level: str,
    kinds: Sequence[str],
    second: Sequence[str] | None = None,
    reader: Reader = READERS["reader"],
    third: Sequence[str] = (),
) -> Batch:
    """Draw the pages of `seeds` and tokenise two or three questions about each.

    Args:
        kinds: of questions.
        second: kinds of the second question, where they are others; the first question stays what it is.
        reader: says them in its words.
        third: kinds of a third question, if there is one.
    """
    images, prompts, rests, answers = [], [], [], []
    tokenizer = processor.tokenizer
    for seed in seeds:
        page = make_page(seed, level=level)
        generator = np.random.default_rng(seed)
        chosen = [str(kind) for kind in generator.choice(kinds, 2)]
        asked = [reader.say(ask(page, generator, chosen[0]), generator)]
        later = [chosen[1] if second is None else str(generator.choice(second))]
        later += [str(generator.choice(third))] if third else []
        asked += [reader.say(ask(page, generator, kind), generator) for kind in later]
        images.append([page.image])
        prompts.append(f"<image>\n{asked[0].text}")
        rest, answer = _conversation(tokenizer, asked)
        rests.append(rest)
        answers.append(answer)
    prompt = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    length = max(map(len, rests))
    padded = torch.tensor([rest + [0] * (length - len(rest)) for rest in rests])
    mask = torch.tensor([[1] * len(rest) + [0] * (length - len(rest)) for rest in rests])
    marks = torch.tensor([answer + [0] * (length - len(answer)) for answer in answers])
    return Batch(dict(prompt), padded, mask, marks)


def _conversation(tokenizer: Any, asked: Sequence[Question]) -> tuple[list[int], list[int]]:
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    end = [tokenizer.eos_token_id]
    parts = [(ids(asked[0].answer) + end, 1)]
    for number, question in enumerate(asked[1:], 2):
        parts += [(ids(question.text), 0), (ids(question.answer) + end, number)]
    return [t for part, _ in parts for t in part], [mark for part, mark in parts for _ in part]


def converse(chat: Chat, path: Path, questions: Sequence[str], most: int) -> Batch:
    """Ask two questions about the image at `path`; the dense cache's greedy answers, of at most `most` tokens."""
    first, second = questions
    prompt = chat.prompt([open_image(path)], first)
    ids = prompt["input_ids"]
    cache = DynamicCache(config=chat.model.config.get_text_config(decoder=True))
    options = {"past_key_values": cache, "max_new_tokens": most, "do_sample": False, "num_beams": 1}
    answered = chat.model.generate(**prompt, **options)
    try:
        more = chat.follow_up(second)
    except InputError:  # the processor's chat template has no later turns, or there is none
        more = chat.processor.tokenizer(second, add_special_tokens=False)["input_ids"]
    asked = torch.cat([answered, torch.tensor([more], device=ids.device)], 1)
    again = chat.model.generate(input_ids=asked, attention_mask=torch.ones_like(asked), **options)
    rest = again[:, ids.shape[1] :]
    answer = torch.zeros_like(rest)
    answer[:, : answered.shape[1] - ids.shape[1]] = 1
    answer[:, asked.shape[1] - ids.shape[1] :] = 2
    return Batch(dict(prompt), rest, torch.ones_like(rest), answer)


@dataclass
class Scores:
    """Per image: exact match and mean KL of its answers; bytes of its visual Keys and Values, and of the model's."""

    exact: list[list[float]] = field(default_factory=lambda: [[] for _ in ANSWERS])
    divergence: list[list[float]] = field(default_factory=lambda: [[] for _ in ANSWERS])
    key_bytes: list[float] = field(default_factory=list)
    value_bytes: list[float] = field(default_factory=list)
    shared_bytes: int = 0

    def extend(self, other: "Scores") -> None:
        """Add the pages of `other`."""
        for index in range(len(ANSWERS)):
            self.exact[index] += other.exact[index]
            self.divergence[index] += other.divergence[index]
        self.key_bytes += other.key_bytes
        self.value_bytes += other.value_bytes
        self.shared_bytes = max(self.shared_bytes, other.shared_bytes)


def new_cache(options: dict[str, Any], config: Any) -> Cache:
    """Make the empty cache of a row, for a model of that config: RotateKCache, or the other cache that it names."""
    options = dict(options)
    if "cache" not in options:
        # Also where the basis costs more bytes than it saves: what is asked here is what a method loses.
        always = {} if options.get("text") == "coded" else {"always_compress": True}
        return RotateKCache.for_study(**{**always, **options})
    name = options.pop("cache")
    if name not in OTHER_CACHES:
        raise ValueError(f"cache must be one of {', '.join(OTHER_CACHES)}, or left out for RotateKCache, got {name!r}")
    return OTHER_CACHES[name](config=config, **options)


def stored_tensors(held: Any) -> list[Tensor]:
    """List the plain tensors in nested containers and behind wrapper subclasses, such as packed data and scales."""
    if isinstance(held, dict):
        held = list(held.values())
    if isinstance(held, (list, tuple)):
        return [tensor for part in held for tensor in stored_tensors(part)]
    if not isinstance(held, Tensor):
        return []
    if hasattr(held, "__tensor_flatten__"):
        return stored_tensors([getattr(held, name) for name in held.__tensor_flatten__()[0]])
    return [held]


def visual_bytes(cache: Cache, visual: Tensor) -> tuple[float, float]:
    """Count the bytes that requests own for visual Keys and Values; `visual`, bool ``[B, T]``, marks the tokens."""
    if not isinstance(cache, RotateKCache):
        share = visual.double().mean().item()
        if isinstance(cache, PeerCache):
            keys, values = (storage_bytes(held) for held in cache.held())
            return share * keys, share * values
        of_kind = [
            [getattr(layer, name, None) for layer in cache.layers for name in (kind, f"_quantized_{kind}")]
            for kind in ("keys", "values")
        ]
        keys, values = (storage_bytes(stored_tensors(held)) for held in of_kind)
        return share * keys, share * values
    layers = [layer.kv for layer in cache.layers if isinstance(layer, RotateKLayer)]
    if cache.options.codes_text:
        share = visual.double().mean().item()
        held = [[tensor for kv in layers for tensor in (kv.dense_states[i], kv.codes[i].data)] for i in (0, 1)]
        return share * storage_bytes(held[0]), share * storage_bytes(held[1])
    segments = [segment for layer in layers for segment in layer.segments]
    keys = storage_bytes([t for segment in segments for t in segment.keys.tensors()])
    values = storage_bytes([t for segment in segments for t in segment.values.tensors()])
    return keys, values


def fill(cache: Cache, config: Any, batch: Batch, recorder: RecordingCache) -> None:
    """Give a cache the prompt's recorded states, as its prefill would have."""
    mask = batch.prompt["attention_mask"].bool()
    if isinstance(cache, RotateKCache):
        cache.learn_config(config)
        cache.announce_visual(recorder.visual, mask.shape[1])
    elif isinstance(cache, PeerCache):
        cache.pad(mask)
    seen = mask[:, None, None, :] & causal_mask(mask.shape[1], mask.shape[1], mask.device)
    for index, layer in enumerate(recorder.layers):
        if index not in recorder.seen:
            cache.layers[index] = copy.deepcopy(layer)  # a stock layer, such as one of a sliding window
            continue
        keys, values, query, scale = recorder.seen[index]
        handle, _ = cache.update(keys, values, index)
        if isinstance(cache, RotateKCache):
            handle.observe(query, seen, scale)
        else:
            stored = cache.layers[index]
            stored.dtype = query.dtype  # what it returns; half precision is what it was given to store
            if not stored.keys.numel():  # these say so, where all is stored elsewhere
                stored.keys, stored.values = stored.keys.to(query.dtype), stored.values.to(query.dtype)


def replay(model: Any, cache: Cache, batch: Batch, first_logits: Tensor, *, one_by_one: bool = False) -> Tensor:
    """Predict each token of `batch.rest` from the cache of its prompt; return log-probabilities ``[B, n, V]``.

    One by one where what a cache reads depends on how many tokens come: questions, too, are read so then.
    """
    mask, positions = torch.cat([batch.prompt["attention_mask"], batch.rest_mask], 1), batch.positions()[1]
    parts = batch.rest.split(1, 1) if one_by_one else (batch.rest,)
    begin, ends, found = batch.rest.shape[1] - mask.shape[1], 0, []
    for part in parts:
        first, ends = ends, ends + part.shape[1]
        output = model(
            input_ids=part,
            attention_mask=mask[:, : ends - begin],
            position_ids=None if positions is None else positions[:, first:ends],
            past_key_values=cache,
            use_cache=True,
        )
        found.append(output.logits)
    logits = torch.cat(found, 1)
    return torch.cat([first_logits[:, None], logits[:, :-1]], 1).float().log_softmax(-1)


def score(scores: Scores, batch: Batch, found: Tensor, dense: Tensor) -> None:
    """Add the pages of a batch: log-probabilities `found` against `dense`, ``[B, n, V]``."""
    right = found.argmax(-1) == batch.rest
    divergence = (dense.exp() * (dense - found)).sum(-1)
    for which in range(1, int(batch.answer.max()) + 1):
        marked = batch.answer == which
        scores.exact[which - 1] += (right | ~marked).all(1).double().tolist()
        scores.divergence[which - 1] += ((divergence * marked).sum(1) / marked.sum(1)).tolist()


def bootstrap(losses: np.ndarray, seed: int = 0, rounds: int = 4000) -> tuple[float, float]:
    """Bound the mean of paired differences by resampling pages, at 95 %."""
    generator = np.random.default_rng(seed)
    some = max(1, 1_000_000 // len(losses))  # rounds at once, for bounded memory
    sizes = [min(some, rounds - done) for done in range(0, rounds, some)]
    means = np.concatenate([losses[generator.integers(0, len(losses), (n, len(losses)))].mean(1) for n in sizes])
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


@functools.cache
def load(name: str | None) -> Chat:
    """Load a model and its processor, attached, once per process."""
    return Chat.load(name, template_needed=False)


def score_part(
    args: argparse.Namespace, methods: dict[str, dict[str, Any]], part: Sequence[int] | Sequence[Path]
) -> dict[str, Scores]:
    """Score every method on one batch: drawn pages by their seeds, or one image by its path."""
    torch.set_num_threads(args.threads)
    chat = load(args.model)
    model = chat.model
    scores = {name: Scores() for name in methods}
    with torch.inference_mode():
        if args.images is None:
            reader = READERS[args.reader]
            batch = make_batch(chat.processor, part, args.level, ADDRESS_KINDS, args.second, reader, args.third)
        else:
            batch = converse(chat, part[0], args.question, args.max_new_tokens)
        recorder = RecordingCache()
        prefill = model(**batch.prompt, position_ids=batch.positions()[0], past_key_values=recorder, use_cache=True)
        first_logits = prefill.logits[:, -1]
        dense: Tensor | None = None
        for name, options in methods.items():
            cache = new_cache(options, model.config)
            fill(cache, model.config, batch, recorder)
            keys, values = visual_bytes(cache, recorder.visual)
            found = replay(model, cache, batch, first_logits)
            dense = found if dense is None else dense
            score(scores[name], batch, found, dense)
            scores[name].key_bytes += [keys / len(batch)] * len(batch)
            scores[name].value_bytes += [values / len(batch)] * len(batch)
            scores[name].shared_bytes = cache.shared_nbytes() if isinstance(cache, RotateKCache) else 0
    return scores


def read_methods(path: Path, only: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Read options by "family: variant" from a file; with `only`, those whose name holds one of its words."""
    families: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(path.read_text())
    named = {f"{family}: {variant}": options for family, rows in families.items() for variant, options in rows.items()}
    return {name: options for name, options in named.items() if not only or any(word in name for word in only)}


def chosen_methods(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """List the rows to run, dense first; a ValueError names the row where one cannot be."""
    methods = read_methods(args.methods, args.only)
    if args.images is None:
        own = {"basis": f"runs/{args.reader}_", "value_basis": f"runs/{args.reader}_"}
        methods = {
            name: {key: re.sub("^runs/reader_", own[key], text) if key in own else text for key, text in row.items()}
            for name, row in methods.items()
        }
    else:
        # Rows of the reader's own files have no meaning for another model.
        reader_basis = "runs/reader_basis.safetensors"
        files = {name for name, options in methods.items() if str(options.get("basis")).endswith(".safetensors")}
        kept = {name for name in files if args.basis and methods[name]["basis"] == reader_basis}
        if files - kept:
            print(f"left out: {len(files - kept)} rows with a calibrated basis of the reader; --basis gives another")
        methods = {
            name: {**options, "basis": str(args.basis)} if name in kept else options
            for name, options in methods.items()
            if name not in files - kept
        }
    config = AutoConfig.from_pretrained(READER if args.images is not None else READERS[args.reader].path())
    for name, options in methods.items():
        try:
            new_cache(options, config)
        except (ImportError, TypeError, ValueError) as error:
            hint = (
                f"; python -m evals.reader.calibrate --reader {args.reader} makes the reader's"
                if "does not exist" in str(error)
                else ""
            )
            raise ValueError(f"row '{name}': {error}{hint}") from error
    if args.model is not None:
        config = AutoConfig.from_pretrained(args.model)
        for name in [name for name, options in methods.items() if "cache" in options]:
            try:
                new_cache(methods[name], config)
            except ValueError as error:
                print(f"left out: row '{name}': {error}")
                del methods[name]
    if not methods:
        raise ValueError(f"no row of {args.methods} is left to run")
    return {"dense": {"sparsity": 0}, **methods}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Score every method on every image, batches dealt out to processes."""
    methods = chosen_methods(args)
    parts: list[Any]
    if args.images is None:
        seeds = SEEDS[args.seeds][args.skip : args.skip + args.pages]
        parts = [seeds[start : start + args.batch] for start in range(0, len(seeds), args.batch)]
    else:
        parts = [[path] for path in find_images(args.images)[args.skip : args.skip + args.pages]]
    if not parts:
        raise ValueError(f"no image is left behind the first {args.skip}")
    results = {name: Scores() for name in methods}
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(tqdm(total=sum(map(len, parts)), desc="images", mininterval=5))
        deal: Callable[..., Iterable[dict[str, Scores]]] = map
        if args.workers > 1:
            context = multiprocessing.get_context("spawn")
            deal = stack.enter_context(concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=context)).map
        with contextlib.suppress(KeyboardInterrupt):  # what has been scored by then is reported
            for part in deal(score_part, itertools.repeat(args), itertools.repeat(methods), parts):
                for name, scores in part.items():
                    results[name].extend(scores)
                progress.update(len(part["dense"].key_bytes))
    if not results["dense"].key_bytes:
        raise ValueError("stopped before the first images were scored: nothing to report")
    return {"methods": {name: summary(results[name], results["dense"], options) for name, options in methods.items()}}


def summary(found: Scores, dense: Scores, options: dict[str, Any]) -> dict[str, Any]:
    """Sum up means, paired losses against dense with their bounds, and byte ratios of one method."""
    key_bytes, value_bytes = float(np.mean(found.key_bytes)), float(np.mean(found.value_bytes))
    dense_keys, dense_values = float(np.mean(dense.key_bytes)), float(np.mean(dense.value_bytes))
    row: dict[str, Any] = {
        "options": options,
        "key_ratio": dense_keys / key_bytes,
        "value_ratio": dense_values / value_bytes,
        "kv_ratio": (dense_keys + dense_values) / (key_bytes + value_bytes),
        "visual_bytes_per_image": key_bytes + value_bytes,
        "shared_bytes_per_model": found.shared_bytes,
    }
    for index, which in enumerate(ANSWERS):
        if not found.exact[index]:
            continue
        exact, reference = np.array(found.exact[index]), np.array(dense.exact[index])
        low, high = bootstrap(reference - exact)
        row[which] = {
            "images": len(exact),
            "exact_match": float(exact.mean()),
            "loss": float((reference - exact).mean()),
            "loss_95": [low, high],
            "kl": float(np.mean(found.divergence[index])),
        }
    return row


def print_table(result: dict[str, Any]) -> None:
    """Print a line a method."""
    asked = [which for which in ANSWERS if which in result["methods"]["dense"]]
    heads = "   ".join(f"{f'{which} EM':>9} {'KL':>8}  {'loss, 95 %':22}" for which in asked)
    print(f"{'method':70} {'K':>6} {'V':>6} {'KV':>6}   {heads}")
    for name, row in result["methods"].items():
        parts = []
        for which in asked:
            loss, low, high = (100 * value for value in (row[which]["loss"], *row[which]["loss_95"]))
            bounds = f"{loss:.2f} [{low:.2f}, {high:.2f}]"
            parts.append(f"{row[which]['exact_match']:9.4f} {row[which]['kl']:8.5f}  {bounds:22}")
        ratios = " ".join(f"{row[ratio]:5.1f}x" for ratio in ("key_ratio", "value_ratio", "kv_ratio"))
        print(f"{name:70} {ratios}   {'   '.join(parts)}")
    shared = {
        row["options"]["basis"]: row["shared_bytes_per_model"]
        for row in result["methods"].values()
        if row["shared_bytes_per_model"]
    }
    for basis, size in shared.items():
        print(f"{basis}: {size:,} bytes once per model, not counted above")


def natural(text: str) -> int:
    """Read a number from 0 on, of a flag."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 on, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """Read a number from 1 on, of a flag."""
    if natural(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or path, with --images; by default the shipped reader")
    parser.add_argument("--reader", choices=READERS, default="reader", help="that reads drawn pages")
    parser.add_argument(
        "--second", nargs="+", choices=KINDS, help="kinds of the second questions, in place of those by address"
    )
    parser.add_argument("--third", nargs="+", choices=KINDS, default=[], help="kinds of a third question about a page")
    parser.add_argument("--images", type=Path, help="folder of images, in place of drawn pages")
    parser.add_argument("--question", action="append", help="with --images: give it twice")
    parser.add_argument("--basis", type=Path, help="with --images: file of `rotatek calibrate` for the calibrated rows")
    parser.add_argument("--max-new-tokens", type=positive, default=32, help="longest answer, with --images")
    parser.add_argument(
        "--methods", type=Path, default=DEFAULT_METHODS, help="YAML: family -> variant -> RotateKCache options"
    )
    parser.add_argument("--only", nargs="*", help='methods whose "family: variant" holds one of these words')
    parser.add_argument("--level", choices=sorted(LEVELS), default="hard", help="of drawn pages")
    parser.add_argument("--seeds", choices=sorted(SEEDS), default="choose", help="report: for reported figures only")
    parser.add_argument("--skip", type=natural, default=0)
    parser.add_argument("--pages", type=positive, default=512, help="number of pages or images")
    parser.add_argument("--batch", type=positive, default=32, help="drawn pages that are scored at once")
    parser.add_argument("--workers", type=positive, default=2, help="processes")
    parser.add_argument("--threads", type=positive, default=1, help="threads of each")
    parser.add_argument("--out", type=Path, help="JSON file to write; a PNG of the same name is drawn beside it")
    args = parser.parse_args(arguments)
    if args.images is not None and len(args.question or ()) != 2:
        parser.error(f"--images needs two --question, got {len(args.question or ())}")
    if args.images is None and (args.question or args.model or args.basis):
        parser.error("--model, --question and --basis need --images: drawn pages are the shipped reader's")
    try:
        if args.images is None and args.reader != "reader":
            args.model = READERS[args.reader].path()
        result = run(args)
    except (InputError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    drawn = {
        "second": args.second or list(ADDRESS_KINDS),
        "third": args.third,
        "level": args.level,
        "seeds": args.seeds,
        "skip": args.skip,
        "pages": args.pages,
    }
    asked = {"images": str(args.images), "questions": args.question, "skip": args.skip, "most": args.pages}
    result |= {
        "setting": drawn if args.images is None else asked,
        "model": args.model or args.reader,
        "command": shlex.join(["python", "-m", "evals.fidelity", *(sys.argv[1:] if arguments is None else arguments)]),
        "hardware": f"{platform.machine()}, {args.workers} processes of {args.threads} threads",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    print_table(result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        figures.save(figures.fidelity(result), args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
