"""The questions of `evals.reader.pages` in English, with answers of whole words, for a reader that speaks English.

A digit is answered by its word and a bar by its height, so that every symbol, colour and number is one token of
SmolLM2 with the space before it; an address is two. An answer begins with that space.
"""

from __future__ import annotations

import numpy as np

from evals.reader.pages import GLYPHS, KINDS, Question

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
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
SLOTS = {"where": 2, "compare": 2}
"""How many of a question's last words are asked about, 1 where it is not said."""
assert set(WORDINGS) == set(KINDS)


def in_english(question: Question, rng: np.random.Generator) -> Question:
    """Say a question of `pages.ask` and its answer in English, in one of two wordings.

    >>> in_english(Question("where", "where red 7?", "B4"), np.random.default_rng(0))
    Question(kind='where', text='Which cell has the red seven?', answer=' B4')
    """
    slots = question.text.removesuffix("?").split()[-SLOTS.get(question.kind, 1) :]
    if question.kind == "where":
        slots = [SPOKEN.get(word, word) for word in slots]
    words = question.answer.split()
    match question.kind:
        case "count":
            count = int(question.answer)
            told = NUMBERS[count] if count < len(NUMBERS) else "many"
        case "compare":
            told = "yes" if words == ["same"] else "no"
        case _:
            told = " ".join(SPOKEN.get(word, word) for word in words)
    form = WORDINGS[question.kind][rng.integers(2)]
    return Question(question.kind, form.format(*slots), f" {told}")
