"""Tasks for the readers of drawn pages: pages follow from seeds, so they need no network.

A name is "reader-<level>-<what>", or "smol-..." for the second reader (`evals.reader.readers`). What is asked: `cell`
(the glyph or colour at an address), `row` (a whole row or column), `address` (either), `count`, `compare`, `where`. The
first token of a first answer comes from the prefill, which attends to dense Keys: answers of one word (`cell`, `count`,
`compare`, `where`) say nothing about a cache that is compressed after it. `then-cell` and so on ask the same when a
first question is answered, on the same cache, and count that second answer only; `second` is `then-` any other question
by address; `conversation` asks for every row of the page in turn (some forty tokens read from one compressed cache) and
counts all but the first; `images` shows two pages and asks about the first.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from evals.reader.pages import ADDRESS_KINDS, LEVELS, REPORT_SEEDS, Page, Question, ask, make_page
from evals.reader.readers import READERS, Reader
from evals.tasks import Sample, TaskError, Turn

SEED_OFFSET = 500_000  # of the seeds for reporting, those that the other scripts have not used
LEVEL_OFFSET = 100_000
SIZE = LEVEL_OFFSET  # samples that a task can draw


@dataclass(frozen=True)
class What:
    """The questions of a task about a page, and whether its first question counts."""

    ask: Callable[[Page, np.random.Generator], list[Question]]
    first_counts: bool = True
    pages: int = 1


def _one_of(*kinds: str) -> What:
    return What(lambda page, rng: [ask(page, rng, str(rng.choice(kinds)))])


def _then(*kinds: str) -> What:
    def ask_twice(page: Page, rng: np.random.Generator) -> list[Question]:
        first = str(rng.choice(ADDRESS_KINDS))
        others = [kind for kind in kinds if kind != first] or list(kinds)
        return [ask(page, rng, first), ask(page, rng, str(rng.choice(others)))]

    return What(ask_twice, first_counts=False)


def _every_row(page: Page, rng: np.random.Generator) -> list[Question]:
    rows = rng.permutation(page.size).tolist()
    return [Question("row", f"row {row + 1}?", " ".join(page.glyphs[row])) for row in rows]


CELL = ("glyph", "colour")
LINE = ("row", "column", "row_colours", "column_colours")
KINDS = {
    "cell": CELL,
    "row": LINE,
    "address": ADDRESS_KINDS,
    "count": ("count",),
    "compare": ("compare",),
    "where": ("where",),
}
WHAT = {
    **{name: _one_of(*kinds) for name, kinds in KINDS.items()},
    **{f"then-{name}": _then(*kinds) for name, kinds in KINDS.items() if name != "address"},
    "second": _then(*ADDRESS_KINDS),
    "conversation": What(_every_row, first_counts=False),
    "images": What(_one_of(*ADDRESS_KINDS).ask, pages=2),
}


def tells_nothing(task: str) -> str:
    """Say why no answer to a task tells how well Keys are kept, "" if answers do."""
    if task.split("-", maxsplit=1)[0] not in READERS:
        return ""
    what = "-".join(task.split("-")[2:])
    if what in ("cell", "count", "compare", "where"):
        return "a first answer of one token, which comes from the dense prefill"
    if what == "then-compare":
        return "the reader guesses"
    return "the reader was not trained to read two images" if what == "images" else ""


def reader_names() -> list[str]:
    """List the names of all readers' tasks."""
    return ["-".join(parts) for parts in itertools.product(READERS, LEVELS, WHAT)]


@dataclass(frozen=True)
class ReaderTask:
    """Pages of one level and what is asked about them."""

    name: str
    level: str
    what: What
    reader: Reader = READERS["reader"]
    metric: str = "exact_match"
    max_new_tokens: int = 16

    @classmethod
    def named(cls, name: str) -> "ReaderTask":
        """Make the task of that name."""
        reader, level, what = name.split("-", 2)
        return cls(name, level, WHAT[what], READERS[reader])

    def __len__(self) -> int:
        return SIZE

    def sample(self, index: int) -> Sample:
        """Draw the page of that number with its questions."""
        if not 0 <= index < SIZE:
            raise TaskError(f"sample must lie in 0 ... {SIZE - 1}, got {index}")
        seed = REPORT_SEEDS[SEED_OFFSET + list(LEVELS).index(self.level) * LEVEL_OFFSET + index]
        pages = [make_page(seed + number * SIZE * len(LEVELS), self.level) for number in range(self.what.pages)]
        rng = np.random.default_rng([seed, 11])
        questions = [self.reader.say(question, rng) for question in self.what.ask(pages[0], rng)]
        turns = tuple(
            Turn(q.text, {"answers": [q.answer]}, q.kind, scored=self.what.first_counts or number > 0)
            for number, q in enumerate(questions)
        )
        return Sample(str(seed), tuple(page.image for page in pages), turns)
