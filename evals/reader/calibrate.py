"""Calibrate a reader on pages drawn from its training seeds, all levels in turn, and write basis files.

    python -m evals.reader.calibrate --pages 768
    python -m evals.reader.calibrate --reader smol --pages 96 --conversations 0 --levels easy

writes runs/reader_fisher.safetensors (Keys and Values weighted by what their errors do to answers, questions of all
kinds), runs/reader_basis.safetensors (PCA of Keys and Values), runs/reader_oblique.safetensors (Keys weighted by
queries, Values by the output projection) and runs/reader_leank.safetensors (static channels), the files that
evals/settings/fidelity.yaml names, and, from fewer pages with the rest of a conversation, runs/reader_rows.safetensors,
by which all tokens are coded (evals/settings/fidelity_coded.yaml), runs/reader_weighted.safetensors and
runs/reader_fisher_rows.safetensors (the same with weighted directions) and runs/reader_oscar.safetensors (a peer's
rotations) for evals/settings/coded_peers.yaml. With --reader they begin with that reader's name.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import trange
from transformers import AutoModelForImageTextToText, AutoProcessor

from evals.fidelity import make_batch
from evals.peers import oscar
from evals.peers.recording import recorded
from evals.reader.pages import KINDS, LEVELS, TRAIN_SEEDS, ask, make_page
from evals.reader.readers import READERS, Reader
from rotatek_cache import attach
from rotatek_cache.calibration.gather import calibrate
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.fingerprint import fingerprint

ROTATION_PAGES = 64  # OSCAR's moments of 128 x 128 are of all tokens of a page, and settle soon
FILES = {
    "fisher": ("fisher", "fisher"),
    "basis": ("pca", "pca"),
    "oblique": ("oblique", "output"),
    "leank": ("leank", "pca"),
}
ROW_FILES = {"rows": ("pca", "pca"), "weighted": ("oblique", "output"), "fisher_rows": ("fisher", "fisher")}


def prompts(
    processor: Any, pages: int, levels: Sequence[str], reader: Reader = READERS["reader"]
) -> Iterator[dict[str, Any]]:
    """Yield one page and question after the other, as model inputs."""
    for index in trange(pages, desc="pages"):
        # From the end of the range: training draws from its beginning.
        seed = TRAIN_SEEDS[-1 - index]
        page = make_page(seed, level=levels[index % len(levels)])
        generator = np.random.default_rng(seed)
        question = reader.say(ask(page, generator, str(generator.choice(KINDS))), generator)
        yield dict(processor(images=[page.image], text=f"<image>\n{question.text}", return_tensors="pt"))


def conversations(
    processor: Any, pages: int, levels: Sequence[str], reader: Reader = READERS["reader"]
) -> Iterator[dict[str, Any]]:
    """Yield one page after the other with two questions and the answer to the first, as model inputs."""
    for index in trange(pages, desc="conversations"):
        seed, level = TRAIN_SEEDS[-1 - index], levels[index % len(levels)]
        batch = make_batch(processor, [seed], level, KINDS, reader=reader)
        ids = torch.cat([batch.prompt["input_ids"], batch.rest[batch.answer < 2][None]], 1)
        yield {**batch.prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", choices=READERS, default="reader")
    parser.add_argument("--pages", type=int, default=768)
    parser.add_argument("--conversations", type=int, default=192, help="pages of the file for all tokens")
    parser.add_argument("--levels", nargs="+", choices=sorted(LEVELS), default=sorted(LEVELS))
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder")
    args = parser.parse_args()
    reader = READERS[args.reader]
    processor = AutoProcessor.from_pretrained(reader.path())
    model = attach(AutoModelForImageTextToText.from_pretrained(reader.path(), dtype=torch.float32).eval())
    if args.conversations:
        rows = Calibration(fingerprint(model), model.config.model_type)
        calibrate(model, conversations(processor, args.conversations, args.levels, reader), rows, text=True)
        source = f"{args.conversations} conversations"
        for name, (method, value_method) in ROW_FILES.items():
            path = args.out / f"{reader.name}_{name}.safetensors"
            rows.write_basis(path, source=source, method=method, value_method=value_method)
        given = conversations(processor, min(args.conversations, ROTATION_PAGES), args.levels, reader)
        oscar.fit(recorded(model, given), args.out / f"{reader.name}_oscar.safetensors")
    if not args.pages:
        return
    state = Calibration(fingerprint(model), model.config.model_type)
    calibrate(model, prompts(processor, args.pages, args.levels, reader), state)
    source = f"{args.pages} drawn pages, levels {' '.join(args.levels)}"
    for name, (method, value_method) in FILES.items():
        path = args.out / f"{reader.name}_{name}.safetensors"
        state.write_basis(path, source=source, method=method, value_method=value_method)
        print(f"{path}: {path.stat().st_size:,} bytes from {state.images} pages")


if __name__ == "__main__":
    main()
