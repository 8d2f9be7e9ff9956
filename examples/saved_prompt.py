"""Read a page once and store its cache; ask about it in another process, without the image.

    python examples/saved_prompt.py --file page.cache --image photo.jpg --model llava-hf/llava-1.5-7b-hf
    python examples/saved_prompt.py --file page.cache --questions "What is on the table?" "What colour is it?" \
        --model llava-hf/llava-1.5-7b-hf

The file is safetensors, without pickle. Questions are answered as one batch that shares what the file holds.
`basis="pca"` keeps what the Keys hold: nothing was asked yet when the page is read.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import rotatek_cache
from rotatek_cache import RotateKCache, attach

READER = Path(rotatek_cache.__file__).parent / "reader"
QUESTION = "QUESTION"  # stands in the chat for what is asked later


def around_the_question(processor: Any) -> tuple[str, str]:
    """Split the chat of one image and one question: what stands before the question, and what follows it."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    before, _, after = chat.rpartition(QUESTION)
    return before, after


def read_page(model: Any, processor: Any, image: Path) -> RotateKCache:
    """Read the chat up to the question."""
    before, _ = around_the_question(processor)
    has_begin = before.startswith(processor.tokenizer.bos_token or QUESTION)
    page = Image.open(image).convert("RGB")
    inputs = processor(images=[page], text=before, return_tensors="pt", add_special_tokens=not has_begin)
    cache = RotateKCache(sparsity=0.75, basis="pca")
    model.generate(**inputs, cache=cache, max_new_tokens=1, do_sample=False)
    cache.seal()  # where nothing follows the image
    return cache


def ask(model: Any, processor: Any, cache: RotateKCache, questions: Sequence[str]) -> list[str]:
    """Answer the questions; the cache stays what it is."""
    _, after = around_the_question(processor)
    texts = [question + after for question in questions]
    ids = processor.tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    ).to(model.device)
    asked = cache.ask_many(ids["input_ids"], ids["attention_mask"])
    output = model.generate(**asked, max_new_tokens=32, do_sample=False)
    answers = output[:, asked["input_ids"].shape[1] :]
    return [answer.strip() for answer in processor.batch_decode(answers, skip_special_tokens=True)]


def main(argv: Sequence[str] | None = None) -> None:
    """Store a page, or ask about the one that is stored, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(READER), help="name or path")
    parser.add_argument("--file", type=Path, default=Path("page.cache"))
    parser.add_argument("--image", type=Path, help="a page to read and store")
    parser.add_argument("--questions", nargs="+", default=[])
    parser.add_argument("--compress", action="store_true", help="smaller on disk, slower to store and load")
    args = parser.parse_args(argv)

    model = attach(AutoModelForImageTextToText.from_pretrained(args.model).eval())
    processor = AutoProcessor.from_pretrained(args.model)
    if args.image is not None:
        print(read_page(model, processor, args.image).save(args.file, compress=args.compress))
    if args.questions:
        cache = RotateKCache.load(args.file, device=model.device)
        for question, answer in zip(args.questions, ask(model, processor, cache, args.questions), strict=True):
            print(f"{question} {answer}")


if __name__ == "__main__":
    main()
