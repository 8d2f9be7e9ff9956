"""The readers that answer questions about drawn pages: where they are, how they are asked, their files and tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evals.reader.pages import Question
from evals.reader.smol_questions import in_english
from rotatek_cache.hf.chat import READER


def _as_it_is(question: Question, rng: np.random.Generator) -> Question:
    return question


@dataclass(frozen=True)
class Reader:
    """A model that reads drawn pages.

    Attributes:
        name: begins the names of its tasks and of the basis files that are calibrated on it.
        folder: what transformers loads.
        made_by: the command that makes the folder, "" where it comes with the package.
        say: puts a question of `evals.reader.pages` and its answer into the words that the reader knows.
    """

    name: str
    folder: Path
    made_by: str = ""
    say: Callable[[Question, np.random.Generator], Question] = _as_it_is

    def path(self) -> str:
        """Return its folder; raise FileNotFoundError, which says how to make it, where it is missing."""
        if not self.folder.is_dir():
            raise FileNotFoundError(f"reader '{self.name}' is not in {self.folder}: {self.made_by} makes it")
        return str(self.folder)


READERS = {
    reader.name: reader
    for reader in (
        Reader("reader", READER),
        Reader("smol", Path("runs/smol_reader"), "python -m evals.reader.smol", in_english),
    )
}
