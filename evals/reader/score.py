"""Held-out exact match of a reader, per kind and level, by real greedy generation.

    python -m evals.reader.score --out evals/results/reader_score.json
    python -m evals.reader.score --reader smol --levels easy --out evals/results/reader_score_smol.json

Every page is fresh (from the seeds for reporting), every question stands alone after its image, and an answer counts
only when the decoded text equals the expected one. `--turns` also asks a second question in the same conversation.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from evals.reader.pages import ADDRESS_KINDS, KINDS, LEVELS, REPORT_SEEDS, Page, Question, ask, make_page
from evals.reader.readers import READERS, Reader

LEVEL_OFFSET = 100_000
"""Each level has its own stretch of the seeds for reporting."""


def answers(model: Any, processor: Any, pages: list[Page], prompts: list[str]) -> list[str]:
    """Generate a text for one prompt per page."""
    inputs = processor(images=[page.image for page in pages], text=prompts, padding=True, return_tensors="pt")
    inputs = inputs.to(model.device)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def score(
    model: Any,
    processor: Any,
    level: str,
    kinds: tuple[str, ...],
    count: int,
    batch: int,
    turns: int,
    reader: Reader = READERS["reader"],
) -> dict[str, list[list[bool]]]:
    """Mark each answer of each kind and turn as right or wrong; a batch mixes kinds, so prompts differ in length."""
    first = REPORT_SEEDS[list(LEVELS).index(level) * LEVEL_OFFSET]
    # Kind after kind for every page, so each page gets one kind and each kind `count` pages.
    tasks = [(first + index, kinds[index % len(kinds)]) for index in range(count * len(kinds))]
    right: dict[str, list[list[bool]]] = {kind: [[] for _ in range(turns)] for kind in kinds}
    for at in tqdm(range(0, len(tasks), batch), desc=level, mininterval=5):
        part = tasks[at : at + batch]
        pages = [make_page(seed, level) for seed, _ in part]
        rngs = [np.random.default_rng([seed, 7]) for seed, _ in part]
        histories = ["<image>\n"] * len(part)
        for turn in range(turns):
            # The later turns ask about something else on the same page, after the right earlier answers.
            asked: list[Question] = [
                reader.say(ask(page, rng, kinds[(kinds.index(kind) + turn) % len(kinds)]), rng)
                for page, rng, (_, kind) in zip(pages, rngs, part, strict=True)
            ]
            prompts = [history + question.text for history, question in zip(histories, asked, strict=True)]
            for question, answer in zip(asked, answers(model, processor, pages, prompts), strict=True):
                right[question.kind][turn].append(answer.split() == question.answer.split())
            end = processor.tokenizer.eos_token
            histories = [f"{prompt} {q.answer.strip()}{end}" for prompt, q in zip(prompts, asked, strict=True)]
    return right


def summary(outcomes: list[bool]) -> dict[str, float | int]:
    """Return the share of right answers, with its standard error and count."""
    share, count = float(np.mean(outcomes)), len(outcomes)
    return {"exact": round(share, 4), "se": round(math.sqrt(share * (1 - share) / count), 4), "n": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", choices=READERS, default="reader")
    parser.add_argument("--model", help="folder, in place of the reader's")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=list(LEVELS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--count", type=int, default=300, help="questions per kind")
    parser.add_argument("--batch", type=int, default=36)
    parser.add_argument("--turns", type=int, default=1, help="questions in one conversation")
    parser.add_argument("--device", default="cpu")
    flags = parser.parse_args()

    reader = READERS[flags.reader]
    flags.model = flags.model or reader.path()
    processor = AutoProcessor.from_pretrained(flags.model)
    model = AutoModelForImageTextToText.from_pretrained(flags.model, dtype=torch.float32).to(flags.device).eval()
    weights = Path(flags.model, "model.safetensors")
    result: dict[str, Any] = {
        "weights sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "seeds": {"start": REPORT_SEEDS.start, "level offset": LEVEL_OFFSET},
    }
    for level in flags.levels:
        right = score(model, processor, level, tuple(flags.kinds), flags.count, flags.batch, flags.turns, reader)
        table: dict[str, Any] = {kind: summary(turns[0]) for kind, turns in right.items()}
        gate = [kind for kind in flags.kinds if kind in ADDRESS_KINDS]
        table["address"] = summary([ok for kind in gate for ok in right[kind][0]]) if gate else None
        if gate and flags.turns > 1:
            table["address, later turns"] = summary([ok for k in gate for turn in right[k][1:] for ok in turn])
        print(f"\n{level:8}{'exact match':>22}{'n':>8}")
        for kind, values in table.items():
            if values:
                print(f"  {kind:20}{values['exact']:8.3f} +- {values['se']:.3f}{values['n']:8d}")
        if flags.out:
            table |= {"flags": {key: value for key, value in vars(flags).items() if key not in ("out", "levels")}}
            table |= {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")}
            name = level if flags.turns == 1 else f"{level}, {flags.turns} turns"
            out = Path(flags.out)
            # Levels scored earlier stay when they are about the same weights and versions.
            before = json.loads(out.read_text()) if out.exists() else {}
            levels = before.pop("levels", {})
            result["levels"] = (levels if before == {k: v for k, v in result.items() if k != "levels"} else {}) | {
                name: table
            }
            out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
