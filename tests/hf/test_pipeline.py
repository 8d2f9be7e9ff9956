"""The shipped reader and its processor, through the high-level calls of transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, pipeline

import rotatek_cache
from rotatek_cache import RotateKCache, attach

READER = Path(rotatek_cache.__file__).parent / "reader"
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def reader():
    model = AutoModelForImageTextToText.from_pretrained(READER, dtype=torch.float32).eval()
    return attach(model), AutoProcessor.from_pretrained(READER)


@pytest.fixture
def image():
    return Image.open(min((READER / "pages").glob("*.png"))).convert("RGB")


def _question(image, text):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


@pytest.mark.parametrize("options", [{"sparsity": 0}, {"rank": 128, "always_compress": True}])
def test_pipeline(reader, image, options):
    model, processor = reader
    pipe = pipeline("image-text-to-text", model=model, processor=processor)

    def ask(cache):
        messages = _question(image, "row 3?")
        arguments = {"max_new_tokens": 6, "past_key_values": cache}
        return pipe(text=messages, generate_kwargs=arguments, return_full_text=False)[0]["generated_text"]

    cache = RotateKCache.for_study(**options)
    assert ask(cache) == ask(None)
    assert cache.report().layers[0].segments[0].tokens == 324


def test_two_turns_through_the_chat_template(reader, image):
    model, processor = reader

    def talk(cache):
        messages = _question(image, "row 3?")
        answers = []
        for question in ("column B?", None):
            inputs = processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
            )
            if answers:
                inputs.pop("pixel_values")  # the image is in the cache
            output = model.generate(
                **inputs, past_key_values=cache, max_new_tokens=8, do_sample=False, eos_token_id=None
            )
            answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
            answer = processor.decode(answers[-1])
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            if question:
                messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        return answers

    assert talk(RotateKCache(rank=128)) == talk(DynamicCache())


def test_half_the_channels_save_bytes(reader, image):
    model, processor = reader
    inputs = processor(images=[image], text=["<image>\nrow 3?"], return_tensors="pt")
    cache = RotateKCache(sparsity=0.5)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=4)
    segment = cache.report().layers[0].segments[0]
    assert segment.key_bytes * 2 == segment.value_bytes
    assert cache.report().compression_ratio > 1
