"""Fit a basis once, on images of your own, and use its file for every later prompt.

    python examples/calibrate.py --model llava-hf/llava-1.5-7b-hf --images folder --questions "What is this?" \
        --out basis.safetensors

`rotatek calibrate` does the same for large folders and datasets, and goes on where it was stopped. Ask questions of
every kind that will come: a calibrated basis keeps what its calibration asked for.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor

import rotatek_cache
from rotatek_cache import RotateKCache, attach
from rotatek_cache.calibration.gather import calibrate
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.fingerprint import fingerprint

READER = Path(rotatek_cache.__file__).parent / "reader"


def prompts(processor: Any, images: Sequence[Path], questions: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield model inputs: each image with the questions in turn."""
    for image, question in zip(images, itertools.cycle(questions), strict=False):
        content = [{"type": "image", "path": str(image)}, {"type": "text", "text": question}]
        yield processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrate, write the file, and answer a question with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(READER), help="name or path")
    parser.add_argument("--images", type=Path, default=READER / "pages", help="folder of PNG or JPEG files")
    parser.add_argument("--questions", nargs="+", default=["row 1?", "column B?", "colours row 2?"])
    parser.add_argument("--out", type=Path, default=Path("basis.safetensors"))
    args = parser.parse_args(argv)
    images = sorted(path for path in args.images.iterdir() if path.suffix in (".png", ".jpg", ".jpeg"))

    model = attach(AutoModelForImageTextToText.from_pretrained(args.model).eval())
    processor = AutoProcessor.from_pretrained(args.model)
    state = Calibration(fingerprint(model), model.config.model_type)
    calibrate(model, prompts(processor, images, args.questions), state)
    state.write_basis(args.out, source=str(args.images))
    print(f"{args.out}: {args.out.stat().st_size:,} bytes from {state.images} images")

    cache = RotateKCache(basis=args.out, sparsity=0.75, value_sparsity=0.75)
    inputs = next(prompts(processor, images, args.questions))
    output = model.generate(**inputs, cache=cache, max_new_tokens=32, do_sample=False)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{args.questions[0]} {answer.strip()}")
    print(cache.report())


if __name__ == "__main__":
    main()
