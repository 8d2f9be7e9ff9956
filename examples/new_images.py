"""Hold a conversation whose later turns bring images of their own, on one compressed cache.

    python examples/new_images.py --model Qwen/Qwen2.5-VL-3B-Instruct --images kitchen.jpg - garden.jpg \
        --questions "What is this room?" "What colour is the table?" "Does this table match it?"

A turn passes the ids of the whole conversation and the images of this turn alone: those of earlier turns are in the
cache. So the processor renders both: the conversation for the ids, and the turn for all that belongs to its images.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import rotatek_cache
from rotatek_cache import RotateKCache, attach

READER = Path(rotatek_cache.__file__).parent / "reader"
OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def main(argv: Sequence[str] | None = None) -> None:
    """Hold the conversation and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(READER), help="name or path")
    pages = [str(READER / "pages" / "page1_easy.png"), "-", str(READER / "pages" / "page2_medium.png")]
    parser.add_argument("--images", nargs="+", default=pages, help="of each turn; - where it brings none")
    parser.add_argument("--questions", nargs="+", default=["row 1?", "column B?", "row 1?"], help="of each turn")
    args = parser.parse_args(argv)

    model = attach(AutoModelForImageTextToText.from_pretrained(args.model).eval())
    processor = AutoProcessor.from_pretrained(args.model)
    cache = RotateKCache(sparsity=0.75, basis="pca")

    def render(turns: list) -> dict[str, torch.Tensor]:
        return processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    messages = []
    for image, question in zip(args.images, args.questions, strict=True):
        shown = [] if image == "-" else [{"type": "image", "path": image}]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        conversation, turn = render(messages), render(messages[-1:])
        inputs = {name: value for name, value in turn.items() if name not in OF_TOKENS}
        inputs |= {name: conversation[name] for name in OF_TOKENS if name in conversation}
        output = model.generate(**inputs, cache=cache, max_new_tokens=32, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        print(f"{question} {answer}")
    print(cache.report())


if __name__ == "__main__":
    main()
