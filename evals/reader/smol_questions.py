"""The questions of `evals.reader.pages` in English, with answers of whole words, for a reader that speaks English.

A digit is answered by its word and a bar by its height, so that every symbol, colour and number is one token of
SmolLM2 with the space before it; an address is two. An answer begins with that space.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evals.reader.pages import GLYPHS, KINDS, Page, Question, ask_grid

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BARS = {"bar1": "low", "bar2": "half", "bar3": "high", "bar4": "full"}
"""A bar's height, of its cell."""
SPOKEN = {glyph: NUMBERS[int(glyph)] if glyph.isdecimal() else BARS.get(glyph, glyph) for glyph in GLYPHS}
"""How a symbol is said."""

WORDINGS: dict[str, tuple[str, ...]] = {
    "glyph": ("Which symbol is at {0}?", "What is in {0}?"),
    "colour": ("Which colour is at {0}?", "What colour is {0}?"),
    "row": ("Which symbols are in row {0}?", "Read row {0}."),
    "column": ("Which symbols are in column {0}?", "Read column {0}."),
    "row_colours": ("Which colours are in row {0}?", "Name the colours of row {0}."),
    "column_colours": ("Which colours are in column {0}?", "Name the colours of column {0}."),
    "where": ("Where is the {0} {1}?", "Which cell has the {0} {1}?"),
    "count": ("How many symbols are {0}?", "Count the {0} symbols."),
    "compare": ("Do {0} and {1} have the same colour?", "Are {0} and {1} of one colour?"),
}


def ask_english(page: Page, rng: np.random.Generator, kind: str) -> Question:
    """Ask as `pages.ask` does, in one of two wordings."""
    return Question(kind, *ask_english_grid(page.glyphs, page.colours, rng, kind))


def ask_english_grid(
    glyphs: Sequence[Sequence[str]], colours: Sequence[Sequence[str]], rng: np.random.Generator, kind: str
) -> tuple[str, str]:
    """Ask without a drawn page: (question, answer)."""
    text, answer = ask_grid(glyphs, colours, rng, kind)
    words = [SPOKEN.get(word, word) for word in text.removesuffix("?").split()]
    slots = words[-2:] if kind in ("where", "compare") else words[-1:]
    if kind in ("row", "row_colours"):
        slots = [text.removesuffix("?").split()[-1]]  # a row's number is no symbol
    form = WORDINGS[kind][rng.integers(2)]
    if kind == "count":
        told = _number(int(answer))
    elif kind == "compare":
        told = "yes" if answer == "same" else "no"
    else:
        told = " ".join(SPOKEN.get(word, word) for word in answer.split())
    return form.format(*slots), f" {told}"


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else "many"


assert set(WORDINGS) == set(KINDS)
