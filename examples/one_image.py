"""Ask a model about one image, with the dense cache and with a compressed one.

    python examples/one_image.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg --question "What is on the table?"

Without arguments the small reader that comes with the package reads one of its pages.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

import rotatek_cache
from rotatek_cache import RotateKCache, attach

READER = Path(rotatek_cache.__file__).parent / "reader"


def main(argv: Sequence[str] | None = None) -> None:
    """Answer one question twice, and print both answers and what the compressed cache stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(READER), help="name or path")
    parser.add_argument("--image", type=Path, default=READER / "pages" / "page1_easy.png")
    parser.add_argument("--question", default="row 1?")
    parser.add_argument("--sparsity", type=float, default=0.75, help="share of Key channels removed")
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
    for cache in (DynamicCache(), RotateKCache(sparsity=args.sparsity)):
        output = model.generate(**inputs, cache=cache, max_new_tokens=32, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{type(cache).__name__}: {answer.strip()}")
    print(cache.report())


if __name__ == "__main__":
    main()
