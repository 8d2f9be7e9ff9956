"""The same requests in transformers, with this project's cache."""

import base64
import functools
import io

import torch
from PIL import Image

from rotatek_cache import RotateKCache, attach


@functools.cache
def _model(folder):
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # as `ignore_eos`
    return attach(model), transformers.AutoProcessor.from_pretrained(folder)


def _inputs(processor, messages):
    images, told = [], []
    for each in messages:
        parts = []
        for part in each["content"]:
            if part["type"] == "image_url":
                encoded = part["image_url"]["url"].partition(",")[2]
                images.append(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
                parts.append({"type": "image"})
            else:
                parts.append(part)
        told.append({"role": each["role"], "content": parts})
    text = processor.apply_chat_template(told, add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=images or None, return_tensors="pt")


def _generate(model, inputs, cache, tokens):
    out = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    chosen = out.sequences[0, inputs["input_ids"].shape[1] :]
    steps = torch.stack(out.logits, 1)[0].float().log_softmax(-1)
    return tuple(steps[range(tokens), chosen].tolist())


def greedy_logprobs(folder, messages, tokens=10, **options):
    """Log-probabilities of the greedy tokens with `RotateKCache.for_study(**options)`."""
    model, processor = _model(folder)
    return _generate(model, _inputs(processor, messages), RotateKCache.for_study(**options), tokens)


def second_question_logprobs(folder, first, second, kept, tokens=10, **options):
    """The same for `second`, which goes on from the first `kept` tokens of what `first` left in the cache."""
    model, processor = _model(folder)
    cache = RotateKCache.for_study(**options)
    _generate(model, _inputs(processor, first), cache, tokens)
    cache.crop(kept - cache.get_seq_length())
    inputs = _inputs(processor, second)  # the image is in what is kept
    return _generate(model, {name: inputs[name] for name in ("input_ids", "attention_mask")}, cache, tokens)


def calibrate_basis(folder, requests, path, *, text=False):
    """Write a basis file for the model, from the images of the requests; with `text`, from all their tokens."""
    from rotatek_cache.calibration.gather import calibrate
    from rotatek_cache.calibration.moments import Calibration
    from rotatek_cache.codecs.fingerprint import fingerprint

    model, processor = _model(folder)
    state = Calibration(fingerprint(model), "tiny")
    # Heads of random models differ by logits, which pools have to cope with; their answers say next to nothing.
    prompts = (_inputs(processor, request) for request in requests)
    calibrate(model, prompts, state, text=text, sensitivity=False)
    state.write_basis(path)
