"""Ask several questions about several images at once; prompts of different lengths are padded on the left.

python examples/batch.py --model llava-hf/llava-1.5-7b-hf --images a.jpg b.jpg --questions "What is this?" "And this?"
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

import rotatek_cache
from rotatek_cache import RotateKCache, attach

READER = Path(rotatek_cache.__file__).parent / "reader"
PAGES = [READER / "pages" / "page1_easy.png", READER / "pages" / "page2_medium.png"]


def main(argv: Sequence[str] | None = None) -> None:
    """Answer a question about each image, and print the answers and the bytes of the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(READER), help="name or path")
    parser.add_argument("--images", type=Path, nargs="+", default=PAGES)
    parser.add_argument("--questions", nargs="+", default=["row 1?", "colours row 2?"], help="one for each image")
    args = parser.parse_args(argv)

    model = attach(AutoModelForImageTextToText.from_pretrained(args.model).eval())
    processor = AutoProcessor.from_pretrained(args.model)
    processor.tokenizer.padding_side = "left"
    conversations = [
        [{"role": "user", "content": [{"type": "image", "path": str(image)}, {"type": "text", "text": question}]}]
        for image, question in zip(args.images, args.questions, strict=True)
    ]
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    cache = RotateKCache(sparsity=0.75)
    output = model.generate(**inputs, cache=cache, max_new_tokens=32, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for question, answer in zip(args.questions, answers, strict=True):
        print(f"{question} {answer.strip()}")
    print(f"{cache.nbytes():,} bytes for {len(answers)} prompts of {inputs['input_ids'].shape[1]} tokens")


if __name__ == "__main__":
    main()
