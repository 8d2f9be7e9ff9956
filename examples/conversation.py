"""Ask two questions about one image on one compressed cache: the second reads what the first one's prompt left.

    python examples/conversation.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg \
        --questions "What is on the table?" "What colour is it?"

`basis="pca"` suits conversations: it keeps what the Keys hold, not only what the first question asked for.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

import rotatek_cache
from rotatek_cache import RotateKCache, attach

READER = Path(rotatek_cache.__file__).parent / "reader"


def main(argv: Sequence[str] | None = None) -> None:
    """Hold the conversation and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(READER), help="name or path")
    parser.add_argument("--image", type=Path, default=READER / "pages" / "page1_easy.png")
    parser.add_argument("--questions", nargs="+", default=["row 1?", "column B?"])
    args = parser.parse_args(argv)

    model = attach(AutoModelForImageTextToText.from_pretrained(args.model).eval())
    processor = AutoProcessor.from_pretrained(args.model)
    cache = RotateKCache(sparsity=0.75, basis="pca")
    messages = []
    for turn, question in enumerate(args.questions):
        content = [{"type": "text", "text": question}]
        if turn == 0:
            content.insert(0, {"type": "image", "path": str(args.image)})
        messages.append({"role": "user", "content": content})
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        if turn > 0:
            inputs.pop("pixel_values")  # the image is in the cache
        output = model.generate(**inputs, cache=cache, max_new_tokens=32, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        print(f"{question} {answer}")
    print(cache.report())


if __name__ == "__main__":
    main()
