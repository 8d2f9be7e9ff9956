"""Calibrate a basis file for the shipped reader on pages drawn from its training seeds.

python evals/calibrate_reader.py --pages 512 --out runs/reader_basis.safetensors
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import trange
from transformers import AutoModelForImageTextToText, AutoProcessor

from evals.reader.pages import ADDRESS_KINDS, LEVELS, TRAIN_SEEDS, ask, make_page
from rotatek_cache import attach
from rotatek_cache.calibration import METHODS, VALUE_METHODS, Calibration, calibrate, fingerprint

READER = Path(__file__).parent.parent / "rotatek_cache" / "reader"


def prompts(processor: Any, pages: int, level: str) -> Iterator[dict[str, Any]]:
    """One page and question after the other, as model inputs."""
    for index in trange(pages, desc="pages"):
        # From the end of the range: training draws from its beginning.
        seed = TRAIN_SEEDS[-1 - index]
        page = make_page(seed, level=level)
        generator = np.random.default_rng(seed)
        question = ask(page, generator, str(generator.choice(ADDRESS_KINDS)))
        yield dict(processor(images=[page.image], text=f"<image>\n{question.text}", return_tensors="pt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=READER)
    parser.add_argument("--pages", type=int, default=512)
    parser.add_argument("--level", choices=sorted(LEVELS), default="hard")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0])
    parser.add_argument("--value-method", choices=VALUE_METHODS, default=VALUE_METHODS[0])
    parser.add_argument("--out", type=Path, default=Path("runs/reader_basis.safetensors"))
    args = parser.parse_args()
    processor = AutoProcessor.from_pretrained(args.model)
    model = attach(AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval())
    state = Calibration(fingerprint(model), model.config.model_type)
    calibrate(model, prompts(processor, args.pages, args.level), state)
    source = f"{args.pages} drawn pages, level {args.level}"
    state.write_basis(args.out, source=source, method=args.method, value_method=args.value_method)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes from {state.images} pages")


if __name__ == "__main__":
    main()
