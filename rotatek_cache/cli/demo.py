"""What `rotatek demo` does: ask a model about an image with the dense cache and with `RotateKCache`, and measure.

Nothing here prints; `app` shows the result and `demo_figure` draws it.
"""

import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Cache,
    DynamicCache,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar

from rotatek_cache.codecs.sealing import Sealer
from rotatek_cache.hf.attach import attach
from rotatek_cache.hf.cache import RotateKCache, storage_bytes
from rotatek_cache.options import FitOptions
from rotatek_cache.report import CacheReport

READER = Path(__file__).parents[1] / "reader"
READER_PAGE = READER / "pages" / "page3_hard.png"
READER_QUESTIONS = ("row 1?", "column A?", "glyph B2?", "colour B2?")  # every page of the reader has these
ANY_QUESTION = "Describe this image."
SPARSITIES = (0.0, 0.5, 0.75, 0.875)
TIMED_TOKENS = 32
TIMED_ROUNDS = 3


class DemoError(Exception):
    """Something that the user gave cannot be used; the message says what and why."""


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
        """The question `text`, with its answer if this page knows it."""
        known = {known.text.rstrip("? "): known.truth for known in self.questions}
        return Question(text, known.get(text.rstrip("? ")))

    def samples(self) -> list[Question]:
        """The first question of each kind that this page knows."""
        first: dict[str | None, Question] = {}
        for known in self.questions:
            first.setdefault(known.kind, known)
        return list(first.values())


@dataclass(frozen=True)
class Setting:
    """A cache to run with: dense, or `RotateKCache` at a sparsity."""

    sparsity: float | None = None

    @property
    def label(self) -> str:
        """Short name for tables."""
        return "dense" if self.sparsity is None else f"{self.sparsity:g}"


@dataclass(frozen=True)
class Answer:
    """What the model said to `question`; `same` says whether it said so with the dense cache too."""

    question: Question
    text: str
    same: bool

    @property
    def right(self) -> bool | None:
        """Whether it is the true answer; None if that is not known."""
        return None if self.question.truth is None else self.text.split() == self.question.truth.split()


@dataclass(frozen=True)
class Measurement:
    """One setting: its answers, and bytes and time of a run with a fixed number of new tokens.

    Attributes:
        answers: one per question, each with a cache of its own.
        follow_up: the second question asked as the second turn of the first one's conversation, on the same cache.
        tokens: tokens in the cache when `nbytes` was taken.
        ms_per_token: median time of a decode step of the whole model.
        report: what the cache says of itself; None for the dense one.
    """

    setting: Setting
    answers: tuple[Answer, ...]
    follow_up: Answer | None
    tokens: int
    nbytes: int
    ms_per_token: float
    report: CacheReport | None


@dataclass(frozen=True)
class BreakEven:
    """Fewest visual tokens of a row from which compression at `sparsity` saves bytes; None if it never does."""

    sparsity: float
    tokens: int | None


@dataclass(frozen=True)
class DemoResult:
    """All that was measured; `measurements` begins with the dense cache."""

    model: str
    device: str
    dtype: str
    page: Page
    visual_tokens: int
    head_width: int | None
    measurements: tuple[Measurement, ...]

    @property
    def dense(self) -> Measurement:
        """The dense cache's."""
        return self.measurements[0]

    @property
    def compressed(self) -> tuple[Measurement, ...]:
        """Those of `RotateKCache`."""
        return self.measurements[1:]

    def ratio(self, measurement: Measurement) -> float:
        """Bytes of the dense cache over those of `measurement`, which holds as many tokens."""
        return self.dense.nbytes / measurement.nbytes

    def comparison(self, measurement: Measurement) -> str:
        """`ratio` in words."""
        ratio = self.ratio(measurement)
        if round(ratio, 2) == 1:
            return "as large"
        return f"{ratio:.2f}x smaller" if ratio > 1 else f"{1 / ratio:.2f}x larger"

    def break_even(self) -> list[BreakEven]:
        """For each sparsity, the segment length from which compression saves bytes."""
        if self.head_width is None:
            return []
        return [
            BreakEven(m.setting.sparsity, fewest_tokens(self.head_width, m.setting.sparsity))
            for m in self.compressed
            if m.setting.sparsity
        ]


def fewest_tokens(head_width: int, sparsity: float) -> int | None:
    """Fewest tokens that take fewer bytes compressed than dense; None if none do."""
    sealer = Sealer(FitOptions(sparsity=sparsity), 0)
    # A token saves at least one number and a basis holds fewer than 2 D D of them.
    lengths = range(1, 2 * head_width**2)
    return next((n for n in lengths if sealer.is_worth(n, head_width, head_width, torch.float32)), None)


def open_page(path: Path) -> Page:
    """Read the image at `path`, and its questions from a `pages.json` beside it.

    Raises:
        DemoError: there is no such file, or it is no readable image.
    """
    if not path.is_file():
        raise DemoError(f"there is no image file '{path}'")
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DemoError(f"'{path}' cannot be read as an image: {error}") from error
    return Page(path, image, _known_questions(path))


def _known_questions(path: Path) -> tuple[Question, ...]:
    """What a `pages.json` beside the image says of it; nothing if there is none of this form."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        entries = json.loads((path.parent / "pages.json").read_text(encoding="utf-8"))
        for entry in entries:
            if entry["file"] == path.name:
                return tuple(Question(q["question"], q["answer"], q.get("kind")) for q in entry["questions"])
    return ()


class Reader:
    """A vision-language model with its processor, attached and ready for questions."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model = model
        self.processor = processor
        self.name = name

    @classmethod
    def load(cls, name: str | Path | None = None, *, device: str = "auto", dtype: str = "auto") -> "Reader":
        """Load and attach a model by name or path; None is the reader that comes with the package.

        Args:
            name: what `from_pretrained` of transformers takes.
            device: "auto" (CUDA where there is one), or what torch takes.
            dtype: "auto" (the checkpoint's; float32 for the reader), or the name of a torch dtype.

        Raises:
            DemoError: there is no such model, it is no vision-language model, or `attach` does not know it.
        """
        disable_progress_bar()
        source = str(READER if name is None else name)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        wanted: Any = "auto"
        if dtype != "auto":
            wanted = getattr(torch, dtype, None)
            if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
                raise DemoError(f"dtype must be 'auto' or the name of a floating torch dtype, got '{dtype}'")
        elif name is None:
            wanted = torch.float32
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise DemoError(f"torch cannot use the device '{device}': {_first_sentence(error)}") from error
        _check_is_vlm(source)
        processor = _load_processor(source)
        try:
            model = AutoModelForImageTextToText.from_pretrained(source, dtype=wanted).to(device).eval()
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise DemoError(f"model '{source}' cannot be loaded: {_first_sentence(error)}") from error
        try:
            attach(model)
        except (TypeError, ValueError) as error:
            raise DemoError(str(error)) from error
        return cls(model, processor, "the reader that comes with rotatek_cache" if name is None else source)

    def prompt(self, image: Image.Image, question: str) -> Any:
        """Model inputs for one question about `image`."""
        if getattr(self.processor, "chat_template", None):
            turns = [_user(question, image)]
            inputs = self.processor.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        else:
            placeholder = getattr(self.processor, "image_token", "<image>")
            inputs = self.processor(images=[image], text=[f"{placeholder}\n{question}"], return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    def second_turn(self, first: str, answer: str, second: str) -> list[int] | None:
        """Token ids behind the first answer that ask `second`; None if the chat template rewrites what is past."""
        if not getattr(self.processor, "chat_template", None):
            return None
        turns: list[dict[str, Any]] = [_user(first)]
        template = self.processor.apply_chat_template
        before = template(turns, add_generation_prompt=True, tokenize=False) + answer
        turns += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}, _user(second, image=False)]
        after = template(turns, add_generation_prompt=True, tokenize=False)
        if not after.startswith(before):
            return None
        ids: list[int] = self.processor.tokenizer(after.removeprefix(before), add_special_tokens=False)["input_ids"]
        return ids

    def new_cache(self, setting: Setting) -> Cache:
        """An empty cache of that kind."""
        if setting.sparsity is None:
            return DynamicCache(config=self.model.config.get_text_config(decoder=True))
        return RotateKCache(sparsity=setting.sparsity)

    @torch.inference_mode()
    def answer(self, inputs: Any, cache: Cache, max_new_tokens: int) -> tuple[str, Tensor]:
        """The greedy answer, and prompt and answer as token ids ``[1, n]``."""
        ids = self.model.generate(
            **inputs, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
        )
        new = ids[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True).strip(), ids

    @torch.inference_mode()
    def decode_times(self, inputs: Any, cache: Cache, tokens: int) -> list[float]:
        """Seconds of each decode step while exactly `tokens` tokens are generated."""
        watch = _Stopwatch()
        self.model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            streamer=watch,
        )
        # The first two stamps are those of the prompt and of the prefill's token.
        return [after - before for before, after in itertools.pairwise(watch.stamps[1:])]

    def visual_tokens(self, inputs: Any) -> int:
        """Placeholder tokens of the prompt."""
        config = self.model.config
        names = ("image_token_id", "image_token_index")
        token = next((t for name in names if (t := getattr(config, name, None)) is not None), None)
        return 0 if token is None else int((inputs["input_ids"] == token).sum())


def run(
    reader: Reader,
    page: Page,
    questions: Sequence[Question],
    *,
    sparsities: Sequence[float] = SPARSITIES,
    max_new_tokens: int = 32,
    timed_tokens: int = TIMED_TOKENS,
    advance: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Ask all `questions` with the dense cache and with `RotateKCache` at each sparsity, then measure bytes and time.

    Args:
        reader: the model.
        page: the image.
        questions: at least one; with two or more, the second is also asked as a second turn on the first one's cache.
        sparsities: of the compressed caches.
        max_new_tokens: limit on each answer.
        timed_tokens: new tokens of the measured runs.
        advance: called with a word on what is next before each of the `steps(...)` steps.

    Raises:
        DemoError: model and image do not go together.
    """
    settings = [Setting(), *(Setting(sparsity) for sparsity in sparsities)]
    try:
        prompts = [reader.prompt(page.image, question.text) for question in questions]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DemoError(f"the processor of {reader.name} does not take this image and question: {error}") from error
    asked = {setting: _ask_all(reader, setting, questions, prompts, max_new_tokens, advance) for setting in settings}
    times, caches = _measure(reader, settings, prompts[0], timed_tokens, advance)
    dense_answers, dense_follow_up = asked[settings[0]]
    measurements = []
    for setting in settings:
        answers, follow_up = asked[setting]
        cache = caches[setting]
        compared = [
            Answer(question, text, text == dense)
            for question, text, dense in zip(questions, answers, dense_answers, strict=True)
        ]
        turn = None
        if follow_up is not None:
            turn = Answer(questions[1], follow_up, follow_up == dense_follow_up)
        measurements.append(
            Measurement(
                setting=setting,
                answers=tuple(compared),
                follow_up=turn,
                tokens=cache.get_seq_length(),
                nbytes=cache_bytes(cache),
                ms_per_token=1000 * statistics.median(times[setting]),
                report=cache.report() if isinstance(cache, RotateKCache) else None,
            )
        )
    text_config = reader.model.config.get_text_config(decoder=True)
    width = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return DemoResult(
        model=reader.name,
        device=str(reader.model.device),
        dtype=str(reader.model.dtype).removeprefix("torch."),
        page=page,
        visual_tokens=reader.visual_tokens(prompts[0]),
        head_width=width,
        measurements=tuple(measurements),
    )


def steps(questions: int, sparsities: int) -> int:
    """How many steps `run` takes."""
    return (1 + sparsities) * (questions + (questions > 1) + TIMED_ROUNDS)


def _ask_all(
    reader: Reader,
    setting: Setting,
    questions: Sequence[Question],
    prompts: Sequence[Any],
    max_new_tokens: int,
    advance: Callable[[str], None],
) -> tuple[list[str], str | None]:
    """Answers, each from a new cache, and that of the second question asked on the first one's cache."""
    answers: list[str] = []
    follow_up = None
    for index, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
        advance(f"{setting.label}: {question.text}")
        cache = reader.new_cache(setting)
        text, ids = reader.answer(prompt, cache, max_new_tokens)
        answers.append(text)
        if index == 0 and len(questions) > 1:
            advance(f"{setting.label}: second turn")
            more = reader.second_turn(question.text, text, questions[1].text)
            if more is not None:
                follow_up, _ = reader.answer(_continued(prompt, ids, more), cache, max_new_tokens)
    return answers, follow_up


def _continued(prompt: Any, ids: Tensor, more: list[int]) -> dict[str, Tensor]:
    """Inputs of a second turn: the conversation as token ids, without the image, which the cache holds."""
    # The answer ends with the token that stops generation; a template writes it too.
    if more and more[0] == int(ids[0, -1]):
        more = more[1:]
    ids = torch.cat([ids, torch.tensor([more], dtype=ids.dtype, device=ids.device)], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in prompt:
            types = prompt[name]
            inputs[name] = torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
    return inputs


def _measure(
    reader: Reader, settings: Sequence[Setting], prompt: Any, tokens: int, advance: Callable[[str], None]
) -> tuple[dict[Setting, list[float]], dict[Setting, Cache]]:
    """Times of decode steps and the filled caches, each holding the prompt and ``tokens - 1`` new tokens."""
    times: dict[Setting, list[float]] = {setting: [] for setting in settings}
    caches: dict[Setting, Cache] = {}
    for _ in range(TIMED_ROUNDS):  # in turn, so that what else the machine does meets all of them
        for setting in settings:
            advance(f"{setting.label}: time and bytes")
            caches[setting] = reader.new_cache(setting)
            times[setting] += reader.decode_times(prompt, caches[setting], tokens)
    return times, caches


def cache_bytes(cache: Cache) -> int:
    """Bytes of the storage that a cache holds, read off its tensors."""
    if isinstance(cache, RotateKCache):
        return cache.nbytes()
    return storage_bytes(_dense_tensors(cache))


def _dense_tensors(cache: Cache) -> Iterator[Tensor]:
    for layer in cache.layers:
        yield from (t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor))


class _Stopwatch(BaseStreamer):
    """Notes when generate hands out tokens; by then they are on the host, so the device has finished."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time."""
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def _user(text: str, image: Image.Image | bool = True) -> dict[str, Any]:
    """A user's turn; `image` may be the image, or whether one stands there."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not False:
        content.insert(0, {"type": "image"} if image is True else {"type": "image", "image": image})
    return {"role": "user", "content": content}


def _check_is_vlm(source: str) -> None:
    if (source.startswith((".", "/", "~")) or source.count("/") > 1) and not Path(source).is_dir():
        raise DemoError(f"there is no folder '{source}' with a model")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise DemoError(f"there is no model '{source}' that transformers can load: {_first_sentence(error)}") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise DemoError(
            f"model '{source}' ({config.model_type}) is no vision-language model: transformers has no "
            "image-text-to-text class for it"
        )


def _load_processor(source: str) -> Any:
    message = f"model '{source}' has no processor for images and text (AutoProcessor): "
    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, ImportError, TypeError, AttributeError, KeyError) as error:
        raise DemoError(message + _first_sentence(error)) from error
    missing = [name for name in ("image_processor", "tokenizer") if getattr(processor, name, None) is None]
    if missing:
        raise DemoError(f"{message}what is saved with it lacks {' and '.join(missing).replace('_', ' ')}")
    return processor


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
