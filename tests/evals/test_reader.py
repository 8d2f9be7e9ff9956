"""The shipped reader reads its sample pages, also from a compressed cache, and loses less at higher rank."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import rotatek_cache
from rotatek_cache import RotateKCache, attach
from rotatek_cache.codecs.registry import BASES
from rotatek_cache.core.attention import attend
from rotatek_cache.core.fitting import KeyStatistics, key_moments
from rotatek_cache.hf import attention as hf_attention

READER = Path(rotatek_cache.__file__).parent / "reader"
ADDRESS = ("glyph", "colour", "row", "column", "row_colours", "column_colours")
RANKS = (8, 16, 32, 64, 128)


@pytest.fixture(scope="module")
def reader():
    model = AutoModelForImageTextToText.from_pretrained(READER, dtype=torch.float32).eval()
    return attach(model), AutoProcessor.from_pretrained(READER)


@pytest.fixture(scope="module")
def pages():
    listed = json.loads((READER / "pages" / "pages.json").read_text())
    return [(Image.open(READER / "pages" / page["file"]).convert("RGB"), page["questions"]) for page in listed]


def prompts(processor, asked):
    images, questions = zip(*asked, strict=True)
    return processor(
        images=[[image] for image in images],
        text=[f"<image>\n{question['question']}" for question in questions],
        padding=True,
        return_tensors="pt",
    )


@pytest.mark.parametrize("options", [None, {"sparsity": 0.75}], ids=str)
def test_it_reads_its_pages_in_one_padded_batch(reader, pages, options):
    model, processor = reader
    asked = [(image, question) for image, listed in pages for question in listed if question["kind"] in ADDRESS]
    inputs = prompts(processor, asked)
    cache = {} if options is None else {"past_key_values": RotateKCache.for_study(**options)}
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, **cache)
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [answer.strip() == question["answer"] for answer, (_, question) in zip(answers, asked, strict=True)]
    assert sum(right) >= 0.95 * len(right)


@pytest.fixture(scope="module")
def decode_steps(reader, pages):
    """Query and dense views of every layer in the first decode step after some prompts, one page each."""
    model, processor = reader
    seen = []

    def listen(query, segments, scale, **kwargs):
        seen.append((query, segments, scale))
        return attend(query, segments, scale, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(hf_attention, "attend", listen)
        for image, questions in pages:
            for question in questions[:3]:
                inputs = prompts(processor, [(image, question)])
                model.generate(**inputs, max_new_tokens=2, do_sample=False, past_key_values=RotateKCache(sparsity=0))
    return seen


def error_at(step, basis_of, rank: int) -> float:
    """Relative error of one layer's attention output with its visual Keys at `rank`."""
    query, (visual, text), scale = step
    keys = visual.keys[:, None].double()
    mean, scatter = key_moments(keys)
    stats = KeyStatistics(mean, scatter, torch.tensor([keys.shape[2]]), query.double())
    basis = basis_of.fit(stats, rank, "eigh", torch.float64)
    wide = [dataclasses.replace(view, keys=view.keys.double(), values=view.values.double()) for view in (visual, text)]
    exact, _ = attend(query.double(), wide, scale)
    compressed = dataclasses.replace(wide[0], keys=basis.encode(keys)[:, 0], basis=basis)
    out, _ = attend(query.double(), [compressed, wide[1]], scale)
    return float((out - exact).norm() / exact.norm())


@pytest.mark.parametrize("method", ["rotatek", "pca", "oblique"])
def test_the_error_of_the_attention_output_falls_with_the_rank(decode_steps, method):
    means = [sum(error_at(step, BASES[method], rank) for step in decode_steps) / len(decode_steps) for rank in RANKS]
    assert all(later < earlier for earlier, later in itertools.pairwise(means)), means
    assert means[-1] < 1e-10


def test_a_second_question_is_answered_from_the_compressed_cache(reader, pages):
    model, processor = reader
    image, questions = pages[-1]
    first, second = [question for question in questions if question["kind"] in ADDRESS][:2]
    cache = RotateKCache(sparsity=0.75)
    inputs = prompts(processor, [(image, first)])
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, past_key_values=cache)
    more = processor.tokenizer(second["question"], add_special_tokens=False, return_tensors="pt")["input_ids"]
    whole = torch.cat([ids, more], 1)
    ids = model.generate(
        input_ids=whole,
        attention_mask=torch.ones_like(whole),
        max_new_tokens=12,
        do_sample=False,
        past_key_values=cache,
    )
    assert processor.tokenizer.decode(ids[0, whole.shape[1] :], skip_special_tokens=True).strip() == second["answer"]
