"""What models are asked: samples of images and questions with their true answers, by task name.

A task is a sequence of samples that are made when they are asked for, so that a long run holds only its batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image


class SampleError(Exception):
    """One sample cannot be used (its image is unreadable, it has no answer); the run goes on without it."""


class TaskError(Exception):
    """A task cannot be run at all; the message says what was wanted and what there is."""


@dataclass(frozen=True)
class Turn:
    """A question, and what its metric needs to know of the truth.

    Attributes:
        text: the question.
        reference: "answers", a list of strings, and what else the metric asks for.
        kind: what sort of question it is, for scores by sort.
        scored: whether it counts. A first question that only makes the cache seal does not.
    """

    text: str
    reference: Mapping[str, Any]
    kind: str = ""
    scored: bool = True


@dataclass(frozen=True)
class Sample:
    """Images, and the questions of one conversation about them."""

    id: str
    images: tuple[Image.Image, ...] = field(repr=False)
    turns: tuple[Turn, ...] = ()


class Task(Protocol):
    """Samples by number, with the metric that scores them."""

    name: str
    metric: str
    max_new_tokens: int

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample:
        """Make the sample of that number; raise SampleError if it cannot be used."""
        ...


def load_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """Load the task `name`, a name of `task_names`.

    Args:
        name: "reader-<level>-<what>" or the name of a dataset task.
        options: for dataset tasks, `path` (a local directory in the hub's layout, or another hub name) and the fields
            of `hub.HubTask`.
    """
    from evals.tasks.hub import HUB, HubTask  # noqa: PLC0415 - `datasets` is loaded for those who use it
    from evals.tasks.reader import ReaderTask, reader_names  # noqa: PLC0415

    options = dict(options or {})
    if name in HUB:
        return HubTask.open(name, **options)
    if name in reader_names():
        if options:
            raise TaskError(f"task '{name}' takes no options, got {', '.join(options)}")
        return ReaderTask.named(name)
    raise TaskError(f"unknown task '{name}'; known are {', '.join(task_names())}")


def task_names() -> list[str]:
    """List all names of tasks."""
    from evals.tasks.hub import HUB  # noqa: PLC0415
    from evals.tasks.reader import reader_names  # noqa: PLC0415

    return [*reader_names(), *HUB]
