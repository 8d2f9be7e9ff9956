"""Keep a cache within so many bytes: a share of a dense one, an amount of memory, or so many tokens' worth.

    python examples/budget.py --budget 0.25x
    python examples/budget.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg --question "What is it?" --budget 64MiB

What the budget leaves open follows from it: here the share of visual tokens that DivPrune keeps, and the rank.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

import rotatek_cache
from rotatek_cache import RotateKCache, attach

READER = Path(rotatek_cache.__file__).parent / "reader"


def main(argv: Sequence[str] | None = None) -> None:
    """Answer one question within the budget, and print the answer and the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(READER), help="name or path")
    parser.add_argument("--image", type=Path, default=READER / "pages" / "page1_easy.png")
    parser.add_argument("--question", default="row 1?")
    parser.add_argument("--budget", default="0.5x", help='such as "0.25x", "512MiB" or 2048 (tokens)')
    args = parser.parse_args(argv)

    model = attach(AutoModelForImageTextToText.from_pretrained(args.model).eval())
    processor = AutoProcessor.from_pretrained(args.model)
    content = [{"type": "image", "path": str(args.image)}, {"type": "text", "text": args.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    budget = int(args.budget) if args.budget.isdigit() else args.budget
    cache = RotateKCache(budget=budget, tokens="divprune")
    output = model.generate(**inputs, cache=cache, max_new_tokens=32, do_sample=False)
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    print(cache.report())


if __name__ == "__main__":
    main()
