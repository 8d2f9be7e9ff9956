"""`rotatek demo`: ask a model about an image with the dense cache and with `RotateKCache`, and measure.

Nothing here prints; `app` shows the result and `demo_figure` draws it.
"""

import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer

from rotatek_cache.codecs.sealing import Sealer
from rotatek_cache.hf.cache import RotateKCache
from rotatek_cache.hf.chat import READER, Chat, Conversations, InputError, open_image
from rotatek_cache.hf.families import placeholder_ids
from rotatek_cache.hf.storage import storage_bytes
from rotatek_cache.options import FitOptions
from rotatek_cache.report import CacheReport

READER_PAGE = READER / "pages" / "page3_hard.png"
READER_QUESTIONS = ("row 1?", "column A?", "glyph B2?", "colour B2?")  # every page of the reader has these
ANY_QUESTION = "Describe this image."
# A calibration asks several kinds, since what an answer reads of an image depends on the question.
READER_CALIBRATION = (*READER_QUESTIONS, "count red?", "count blue?", "compare A1 B2?", "compare A2 B1?")
ANY_CALIBRATION = (
    ANY_QUESTION,
    "What is written in this image?",
    "How many things are there, and which?",
    "Where in the image is each thing?",
)
SPARSITIES = (0.0, 0.5, 0.75, 0.875)
LONG_PROMPT = 3800  # visual tokens: twelve pages of the reader, whose model reads 4096 positions
TIMED_TOKENS = 32
TIMED_ROUNDS = 3


@dataclass(frozen=True)
class Question:
    """A question with its true answer, if that is known."""

    text: str
    truth: str | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Page:
    """An image from disk with the questions that the `pages.json` beside it holds, if there is one."""

    path: Path
    image: Image.Image
    questions: tuple[Question, ...] = ()

    def question(self, text: str) -> Question:
        """Pose the question `text`, with its answer if this page knows it."""
        known = {known.text.rstrip("? "): known.truth for known in self.questions}
        return Question(text, known.get(text.rstrip("? ")))

    def samples(self) -> list[Question]:
        """Take the first question of each kind that this page knows."""
        first: dict[str | None, Question] = {}
        for known in self.questions:
            first.setdefault(known.kind, known)
        return list(first.values())


@dataclass(frozen=True)
class Setting:
    """A cache to run with.

    Args:
        label: short name for tables.
        options: of `RotateKCache`; None for the dense cache.
    """

    label: str
    options: Mapping[str, Any] | None = field(default=None, hash=False)

    @classmethod
    def of_sparsity(cls, sparsity: float) -> "Setting":
        """Remove that share of Key channels."""
        return cls(f"{sparsity:g}", {"sparsity": sparsity})

    @property
    def is_dense(self) -> bool:
        """Whether it is the model's usual cache."""
        return self.options is None

    @property
    def sparsity(self) -> float | None:
        """The share of Key channels removed, if that is all that is done."""
        return self.options["sparsity"] if self.options is not None and len(self.options) == 1 else None

    def new_cache(self, model: Any) -> Cache:
        """Make an empty cache."""
        if self.options is None:
            return DynamicCache(config=model.config.get_text_config(decoder=True))
        return RotateKCache(**self.options)


DENSE = Setting("dense")
# Codes of a few bits for Keys and Values, in bases fitted to the prompt: nothing is calibrated.
CODED = Setting(
    "coded",
    {
        "basis": "pca",
        "sparsity": 0.875,
        "key_bits": 4,
        "value_sparsity": 0.94,
        "value_bits": "auto",
        "basis_bits": 8,
    },
)


@dataclass(frozen=True)
class Answer:
    """The model's answer to `question`; `same` if it is that of the dense cache."""

    question: Question
    text: str
    same: bool

    @property
    def right(self) -> bool | None:
        """Whether it is the true answer; None if that is not known."""
        return None if self.question.truth is None else self.text.split() == self.question.truth.split()


@dataclass(frozen=True)
class Cost:
    """Bytes and time of one setting in a run with a fixed number of new tokens.

    Attributes:
        setting: the cache.
        tokens: tokens in the cache when `nbytes` was taken.
        nbytes: of all tensors that the cache holds.
        ms_per_token: median time of a decode step of the whole model.
        report: what the cache says of itself; None for the dense one.
    """

    setting: Setting
    tokens: int
    nbytes: int
    ms_per_token: float
    report: CacheReport | None


@dataclass(frozen=True)
class Measurement(Cost):
    """One setting: its cost, and its answers.

    Attributes:
        answers: one per question, each with a cache of its own.
        follow_up: the second question asked as the second turn of the first one's conversation, on the same cache.
    """

    answers: tuple[Answer, ...]
    follow_up: Answer | None


@dataclass(frozen=True)
class LongPrompt:
    """The first question asked of the same image many times over; `costs` begins with the dense cache.

    Attributes:
        copies: how often the image stands in the prompt.
        visual_tokens: of the prompt.
    """

    copies: int
    visual_tokens: int
    costs: tuple[Cost, ...]

    @property
    def dense(self) -> Cost:
        """The dense cache's."""
        return self.costs[0]


@dataclass(frozen=True)
class BreakEven:
    """Fewest visual tokens of a row from which compression at `sparsity` saves bytes; None if it never does."""

    sparsity: float
    tokens: int | None


@dataclass(frozen=True)
class DemoResult:
    """All that was measured; `measurements` begins with the dense cache."""

    model: str
    is_shipped_reader: bool
    device: str
    dtype: str
    page: Page
    visual_tokens: int
    head_width: int | None
    measurements: tuple[Measurement, ...]
    long_prompt: LongPrompt | None

    @property
    def dense(self) -> Measurement:
        """The dense cache's."""
        return self.measurements[0]

    @property
    def compressed(self) -> tuple[Measurement, ...]:
        """Those of `RotateKCache`."""
        return self.measurements[1:]

    def break_even(self) -> list[BreakEven]:
        """Find the segment length from which compression saves bytes, for each sparsity."""
        if self.head_width is None:
            return []
        return [
            BreakEven(m.setting.sparsity, fewest_tokens(self.head_width, m.setting.sparsity))
            for m in self.compressed
            if m.setting.sparsity
        ]


def comparison(dense: Cost, other: Cost) -> str:
    """Compare bytes with those of the dense cache, which holds as many tokens, in words."""
    ratio = dense.nbytes / other.nbytes
    if round(ratio, 2) == 1:
        return "as large"
    return f"{ratio:.2f}x smaller" if ratio > 1 else f"{1 / ratio:.2f}x larger"


def fewest_tokens(head_width: int, sparsity: float) -> int | None:
    """Find the fewest tokens that take fewer bytes compressed than dense; None if none do."""
    sealer = Sealer(FitOptions(sparsity=sparsity), 0)
    # A token saves at least one number and a basis holds fewer than 2 D D of them.
    lengths = range(1, 2 * head_width**2)
    return next((n for n in lengths if sealer.is_worth(n, head_width, head_width, torch.float32)), None)


def open_page(path: Path) -> Page:
    """Read the image at `path`, and its questions from a `pages.json` beside it.

    Raises:
        InputError: there is no such file, or it is no readable image.
    """
    return Page(path, open_image(path), _known_questions(path))


def _known_questions(path: Path) -> tuple[Question, ...]:
    """Read what a `pages.json` beside the image says of it; nothing if there is none of this form."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        entries = json.loads((path.parent / "pages.json").read_text(encoding="utf-8"))
        for entry in entries:
            if entry["file"] == path.name:
                return tuple(Question(q["question"], q["answer"], q.get("kind")) for q in entry["questions"])
    return ()


def run(
    chat: Chat,
    page: Page,
    questions: Sequence[Question],
    *,
    settings: Sequence[Setting],
    max_new_tokens: int = 32,
    timed_tokens: int = TIMED_TOKENS,
    long_prompt: int = 0,
    advance: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Ask all `questions` with the dense cache and with those of `settings`, then measure bytes and time.

    Args:
        chat: the model.
        page: the image.
        questions: at least one; with two or more, the second is also asked as a second turn on the first one's cache.
        settings: of the compressed caches.
        max_new_tokens: limit on each answer.
        timed_tokens: new tokens of the measured runs.
        long_prompt: visual tokens of a prompt that repeats the image, in which bytes and time are measured once more;
            none if the image has as many by itself.
        advance: called with a word on what is next before each of the `steps(...)` steps.

    Raises:
        InputError: model and image do not go together.
    """
    settings = [DENSE, *settings]
    try:
        prompts = [chat.prompt([page.image], question.text) for question in questions]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"the processor of {chat.name} does not take this image and question: {error}") from error
    tokens = visual_tokens(chat, prompts[0])
    copies = -(-long_prompt // tokens) if tokens else 0
    many = None
    if copies > 1:
        try:
            many = chat.prompt([page.image] * copies, questions[0].text)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"the processor of {chat.name} does not take the image {copies} times in one prompt: {error}; "
                "--long-prompt 0 leaves this out"
            ) from error
    asked = [_ask_all(chat, setting, questions, prompts, max_new_tokens, advance) for setting in settings]
    costs = measure(chat, settings, prompts[0], timed_tokens, advance)
    dense_answers, dense_follow_up = asked[0]
    measurements = []
    for (answers, follow_up), cost in zip(asked, costs, strict=True):
        compared = [
            Answer(question, text, text == dense)
            for question, text, dense in zip(questions, answers, dense_answers, strict=True)
        ]
        turn = None if follow_up is None else Answer(questions[1], follow_up, follow_up == dense_follow_up)
        measurements.append(Measurement(**vars(cost), answers=tuple(compared), follow_up=turn))
    repeated = None
    if many is not None:
        many_costs = measure(chat, settings, many, timed_tokens, advance)
        repeated = LongPrompt(copies, visual_tokens(chat, many), tuple(many_costs))
    text_config = chat.model.config.get_text_config(decoder=True)
    width = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return DemoResult(
        model="the reader that comes with rotatek_cache" if chat.name == str(READER) else chat.name,
        is_shipped_reader=chat.name == str(READER),
        device=str(chat.model.device),
        dtype=str(chat.model.dtype).removeprefix("torch."),
        page=page,
        visual_tokens=tokens,
        head_width=width,
        measurements=tuple(measurements),
        long_prompt=repeated,
    )


def steps(questions: int, settings: int, *, long_prompt: bool = False) -> int:
    """Count the steps that `run` takes at most."""
    timed = (1 + TIMED_ROUNDS) * (1 + long_prompt)
    return (1 + settings) * (questions + (questions > 1) + timed)


def visual_tokens(chat: Chat, inputs: Any) -> int:
    """Count the placeholder tokens of a prompt."""
    placeholders = torch.tensor(placeholder_ids(chat.model.config), device="cpu")
    return int(torch.isin(inputs["input_ids"].cpu(), placeholders).sum())


def _ask_all(
    chat: Chat,
    setting: Setting,
    questions: Sequence[Question],
    prompts: Sequence[Any],
    max_new_tokens: int,
    advance: Callable[[str], None],
) -> tuple[list[str], str | None]:
    """Ask each question of a new cache, and the second one as a second turn on the first one's cache too."""
    answers: list[str] = []
    follow_up = None
    for index, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
        advance(f"{setting.label}: {question.text}")
        batch = chat.begin_with(prompt, setting.new_cache(chat.model), max_new_tokens=max_new_tokens)
        answers += batch.answers
        if index == 0 and len(questions) > 1:
            advance(f"{setting.label}: second turn")
            with contextlib.suppress(InputError):  # a chat template that allows no later turn
                chat.go_on(batch, [questions[1].text])
                (follow_up,) = batch.answers
    return answers, follow_up


def measure(
    chat: Chat, settings: Sequence[Setting], prompt: Any, tokens: int, advance: Callable[[str], None]
) -> list[Cost]:
    """Time decode steps after a prompt, and count the bytes of the caches after the first `tokens` of them.

    Each cache reads the prompt once, then all decode in turn, so that what else the machine does meets all of them.
    """
    batches: list[Conversations] = []
    held: list[tuple[int, int, CacheReport | None]] = []
    times: list[list[float]] = []
    for setting in settings:
        advance(f"{setting.label}: prompt")
        batches.append(chat.begin_with(prompt, setting.new_cache(chat.model), max_new_tokens=1))
        times.append([])
    for number in range(TIMED_ROUNDS):
        for setting, batch, seconds in zip(settings, batches, times, strict=True):
            advance(f"{setting.label}: time and bytes")
            watch = _Stopwatch()
            batch.max_new_tokens = tokens
            batch.options |= {"min_new_tokens": tokens, "streamer": watch}
            batch.mask = torch.ones_like(batch.ids)  # tokens after an early end count too
            chat.answer(batch)
            # The first two stamps are those of what was there before and of the first step, which may prepare others.
            seconds += [after - before for before, after in itertools.pairwise(watch.stamps[1:])]
            if number == 0:
                cache = batch.cache
                report = cache.report() if isinstance(cache, RotateKCache) else None
                held.append((cache.get_seq_length(), cache_bytes(cache), report))
    return [
        Cost(setting, length, nbytes, 1000 * statistics.median(seconds), report)
        for setting, (length, nbytes, report), seconds in zip(settings, held, times, strict=True)
    ]


def cache_bytes(cache: Cache) -> int:
    """Count the bytes of the storage that a cache holds, read off its tensors."""
    if isinstance(cache, RotateKCache):
        return cache.nbytes()
    return storage_bytes(_dense_tensors(cache))


def _dense_tensors(cache: Cache) -> Iterator[Tensor]:
    for layer in cache.layers:
        yield from (t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor))


class _Stopwatch(BaseStreamer):
    """A streamer that notes when generate hands out tokens; by then the device has finished them."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time."""
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: nothing is left to do."""
