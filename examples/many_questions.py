"""Ask many questions about one image at once: the image is read once and stored once, however many are asked.

    python examples/many_questions.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg \
        --questions "What is on the table?" "What colour is it?" "Who sits there?"

The prompt is read up to the question, and sealed; each question begins behind it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import rotatek_cache
from rotatek_cache import RotateKCache, attach

READER = Path(rotatek_cache.__file__).parent / "reader"
QUESTION = "QUESTION"  # stands in the chat for each of the questions


def main(argv: Sequence[str] | None = None) -> None:
    """Print the answers, and the bytes of the prompt and of the whole batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(READER), help="name or path")
    parser.add_argument("--image", type=Path, default=READER / "pages" / "page1_easy.png")
    parser.add_argument("--questions", nargs="+", default=["row 1?", "colours row 2?", "column B?", "glyph A2?"])
    args = parser.parse_args(argv)

    model = attach(AutoModelForImageTextToText.from_pretrained(args.model).eval())
    processor = AutoProcessor.from_pretrained(args.model)
    tokenizer = processor.tokenizer
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    before, _, after = chat.rpartition(QUESTION)
    has_begin = before.startswith(tokenizer.bos_token or QUESTION)

    # The prompt, up to the question.
    page = Image.open(args.image).convert("RGB")
    prompt = processor(images=[page], text=before, return_tensors="pt", add_special_tokens=not has_begin)
    cache = RotateKCache(sparsity=0.75, basis="pca")
    model.generate(**prompt, cache=cache, max_new_tokens=1, do_sample=False)
    cache.seal()  # where nothing follows the image

    # The questions, without the image: it is in the cache.
    texts = [question + after for question in args.questions]
    ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    asked = cache.ask_many(ids["input_ids"], ids["attention_mask"])
    output = model.generate(**asked, max_new_tokens=32, do_sample=False)
    answers = processor.batch_decode(output[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    for question, answer in zip(args.questions, answers, strict=True):
        print(f"{question} {answer.strip()}")
    more = asked["cache"].nbytes(beside=cache)
    print(f"{cache.nbytes():,} bytes for the prompt, {more:,} more for {len(answers)} questions and answers")


if __name__ == "__main__":
    main()
