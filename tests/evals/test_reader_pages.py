"""Pages, questions, tokenizer and the sample pages of the reader."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evals.reader.model import BOS, EOS, IMAGE, UNK, VISUAL_TOKENS, VOCABULARY, build_processor, build_tokenizer
from evals.reader.pages import (
    CHOOSE_SEEDS,
    COLUMN_NAMES,
    IMAGE_SIZE,
    KINDS,
    LEVELS,
    REPORT_SEEDS,
    SAMPLE_SEEDS,
    TRAIN_SEEDS,
    Page,
    ask,
    make_page,
)

READER = Path(__file__).parents[2] / "rotatek_cache" / "reader"


def expected(page: Page, text: str) -> str | None:
    """Answer read off the grid, written independently of the questions' own code; None where several would do."""
    words = text.rstrip("?").split()
    n = page.size

    def at(name: str) -> tuple[int, int]:
        return int(name[1:]) - 1, COLUMN_NAMES.index(name[0])

    match words:
        case ["glyph" | "colour" as what, name]:
            row, column = at(name)
            return (page.glyphs if what == "glyph" else page.colours)[row][column]
        case ["row", number]:
            return " ".join(page.glyphs[int(number) - 1])
        case ["colours", "row", number]:
            return " ".join(page.colours[int(number) - 1])
        case ["column", letter]:
            return " ".join(page.glyphs[row][COLUMN_NAMES.index(letter)] for row in range(n))
        case ["colours", "column", letter]:
            return " ".join(page.colours[row][COLUMN_NAMES.index(letter)] for row in range(n))
        case ["where", colour, glyph]:
            places = [
                f"{COLUMN_NAMES[c]}{r + 1}"
                for r in range(n)
                for c in range(n)
                if (page.glyphs[r][c], page.colours[r][c]) == (glyph, colour)
            ]
            return places[0] if len(places) == 1 else None
        case ["count", colour]:
            return str(sum(line.count(colour) for line in page.colours))
        case ["compare", one, other]:
            (r, c), (s, d) = at(one), at(other)
            return "same" if page.colours[r][c] == page.colours[s][d] else "different"
    raise AssertionError(text)


@pytest.mark.parametrize("level", LEVELS)
def test_pages_are_determined_by_their_seed(level: str) -> None:
    page, again, other = make_page(5, level), make_page(5, level), make_page(6, level)
    assert page.image.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert page.size in LEVELS[level].grids
    assert (page.glyphs, page.colours) == (again.glyphs, again.colours)
    assert np.array_equal(page.image, again.image)
    assert not np.array_equal(page.image, other.image)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_agree_with_the_grid(kind: str) -> None:
    rng = np.random.default_rng(0)
    checked = 0
    for seed in range(40):
        page = make_page(seed, list(LEVELS)[seed % len(LEVELS)])
        question = ask(page, rng, kind)
        answer = expected(page, question.text)
        if answer is not None:
            assert question.answer == answer, question
            checked += 1
    assert checked >= 30


def test_the_ink_has_the_colour_that_the_grid_names() -> None:
    page = make_page(3, "easy")
    pixels = np.asarray(page.image, float) / 255
    side = IMAGE_SIZE // 6
    for row in range(page.size):
        for column in range(page.size):
            cell = pixels[row * side : (row + 1) * side, column * side : (column + 1) * side].reshape(-1, 3)
            inked = cell[cell.sum(1) < 2.4]
            assert len(inked), (row, column)
            red, green, blue = np.median(inked, 0)
            name = page.colours[row][column]
            assert {"red": red > blue, "green": green > red, "blue": blue > red}.get(name, True)


def test_seed_ranges_are_disjoint() -> None:
    ranges = sorted((TRAIN_SEEDS, CHOOSE_SEEDS, REPORT_SEEDS, SAMPLE_SEEDS), key=lambda r: r.start)
    assert all(before.stop <= after.start for before, after in itertools.pairwise(ranges))


def test_tokenizer_round_trip() -> None:
    tokenizer = build_tokenizer()
    rng = np.random.default_rng(0)
    page = make_page(0, "hard")
    for question in [ask(page, rng, kind) for kind in KINDS for _ in range(5)]:
        asked = tokenizer(question.text)["input_ids"]
        answered = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        assert asked[0] == BOS
        assert UNK not in asked + answered
        assert tokenizer.decode(asked, skip_special_tokens=True) == question.text.rstrip("?")
        assert tokenizer.decode([*answered, EOS], skip_special_tokens=True) == question.answer
    assert tokenizer("glyph B4?")["input_ids"] == [BOS, VOCABULARY["glyph"], VOCABULARY["B4"]]
    assert UNK in tokenizer("please tell me the glyph B4")["input_ids"]


def test_processor_pads_on_the_left_and_takes_any_image_size() -> None:
    processor = build_processor()
    page = make_page(0, "hard")
    images = [page.image, page.image.resize((640, 200))]
    inputs = processor(
        images=images,
        text=["<image>\nglyph B4?", "<image>\nrow 3? 7<eos>\ncount red?"],
        padding=True,
        return_tensors="np",
    )
    assert inputs["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [VISUAL_TOKENS, VISUAL_TOKENS]
    assert inputs["attention_mask"][0].argmin() == 0
    assert inputs["attention_mask"][:, -1].all()


def test_chat_template_gives_the_prompt_format() -> None:
    processor = build_processor()
    page = make_page(0, "hard")
    chat = [
        {"role": "user", "content": [{"type": "image", "image": page.image}, {"type": "text", "text": "glyph B4?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "7"}]},
        {"role": "user", "content": [{"type": "text", "text": "row 3?"}]},
    ]
    from_chat = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="np", add_generation_prompt=True
    )
    plain = processor(images=page.image, text="<image>glyph B4? 7<eos>row 3?", return_tensors="np")
    assert np.array_equal(from_chat["input_ids"], plain["input_ids"])
    assert np.array_equal(from_chat["pixel_values"], plain["pixel_values"])


def test_sample_pages_match_their_answers() -> None:
    entries = json.loads((READER / "pages" / "pages.json").read_text())
    assert len(entries) == 4
    for index, entry in enumerate(entries):
        page = make_page(SAMPLE_SEEDS[index], entry["level"])
        with Image.open(READER / "pages" / entry["file"]) as image:
            assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
            # The noise may differ between versions of the drawing libraries by rounding, the grid may not.
            difference = np.abs(np.asarray(image, float) - np.asarray(page.image, float))
        assert np.mean(difference) < 2
        assert {question["kind"] for question in entry["questions"]} == set(KINDS)
        for question in entry["questions"]:
            assert expected(page, question["question"]) in (question["answer"], None)
