"""Benchmarks through `datasets`, from the hub or a local directory, with the fields that they have on the hub.

Prompts are those of the benchmarks' usual settings: the question, then how to answer.
"""

import dataclasses
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from evals.metrics import METRICS
from evals.tasks import Sample, SampleError, TaskError, Turn

LEAST_PEOPLE = 4  # whose answers the VQA accuracy compares
SHORT = "\nAnswer the question using a single word or phrase."
WORD = "\nAnswer the question with a single word."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
CAPTION = "Provide a one-sentence caption for the provided image."


@dataclass(frozen=True)
class HubFields:
    """Where a benchmark lies, what its fields are called, and how it asks.

    Attributes:
        path: name on the hub, or a local directory in the same layout (or made by `Dataset.save_to_disk`).
        config: name of the configuration on the hub.
        split: the split that is scored.
        metric: name of `evals.metrics.METRICS`.
        max_new_tokens: longest answer.
        image, question, answers, id, kind: names of the fields; an empty id is the row's number, an empty kind none.
        prompt: what is asked where there is no field with a question.
        suffix: what follows the question.
        capitalise: write the question as a sentence begins (TextVQA and VizWiz are asked so).
        extra: further fields that the metric needs.
    """

    path: str
    metric: str
    split: str
    config: str | None = None
    max_new_tokens: int = 32
    image: str = "image"
    question: str = "question"
    answers: str = "answers"
    id: str = ""
    kind: str = ""
    prompt: str = ""
    suffix: str = ""
    capitalise: bool = False
    extra: tuple[str, ...] = ()

    def needed(self) -> list[str]:
        """List the fields that a row must have."""
        named = [self.image, "" if self.prompt else self.question, self.answers, self.id, self.kind, *self.extra]
        return [name for name in named if name]


HUB = {
    "textvqa": HubFields(
        "lmms-lab/textvqa", "vqa_accuracy", "validation", id="question_id", suffix=SHORT, capitalise=True
    ),
    "infovqa": HubFields("lmms-lab/DocVQA", "anls", "validation", "InfographicVQA", id="questionId", suffix=SHORT),
    "docvqa": HubFields("lmms-lab/DocVQA", "anls", "validation", "DocVQA", id="questionId", suffix=SHORT),
    "chartqa": HubFields(
        "lmms-lab/ChartQA", "relaxed_accuracy", "test", answers="answer", kind="type", max_new_tokens=16, suffix=WORD
    ),
    "vizwiz": HubFields(
        "lmms-lab/VizWiz-VQA",
        "vqa_accuracy",
        "val",
        id="question_id",
        kind="category",
        suffix=UNANSWERABLE + SHORT,
        capitalise=True,
    ),
    "ocrbench": HubFields(
        "echo840/OCRBench",
        "ocrbench_match",
        "test",
        answers="answer",
        kind="question_type",
        extra=("dataset",),
        max_new_tokens=128,
    ),
    "coco-caption": HubFields(
        "lmms-lab/COCO-Caption", "cider", "val", answers="answer", id="question_id", prompt=CAPTION, max_new_tokens=64
    ),
    "mathvista": HubFields(
        "AI4Math/MathVista",
        "mathvista_match",
        "testmini",
        image="decoded_image",
        question="query",
        answers="answer",
        id="pid",
        kind="question_type",
        extra=("choices", "answer_type", "precision"),
        max_new_tokens=512,
    ),
}


class HubTask:
    """A benchmark whose rows are read, and whose images are decoded, when they are asked for."""

    def __init__(self, name: str, fields: HubFields, rows: Any) -> None:
        missing = [field for field in fields.needed() if field not in rows.column_names]
        if missing:
            raise TaskError(
                f"task '{name}': '{fields.path}' has no field {', '.join(map(repr, missing))}; it has "
                f"{', '.join(rows.column_names)}. Name another field in the task's options, such as "
                "{answers: answer}"
            )
        self.name = name
        self.metric = fields.metric
        self.max_new_tokens = fields.max_new_tokens
        self.fields = fields
        # Decoded by us, so that an unreadable image costs its sample and not the run.
        try:
            self.rows = rows.cast_column(fields.image, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:  # what Arrow and NumPy raise
            raise TaskError(
                f"task '{name}': the field '{fields.image}' of '{fields.path}' must hold one image a row, it holds "
                f"{rows.features[fields.image]}. Name another field in the task's option `image`"
            ) from error

    @classmethod
    def open(cls, name: str, **options: Any) -> "HubTask":
        """Load the benchmark `name` with fields overridden by `options` (those of `HubFields`)."""
        known = {field.name for field in dataclasses.fields(HubFields)}
        if unknown := sorted(set(options) - known):
            raise TaskError(
                f"task '{name}' has no option {', '.join(map(repr, unknown))}; known are {', '.join(sorted(known))}"
            )
        fields = dataclasses.replace(HUB[name], **options)
        if fields.metric not in METRICS:
            raise TaskError(f"task '{name}': metric must be one of {', '.join(METRICS)}, got {fields.metric!r}")
        return cls(name, fields, _rows(name, fields))

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int) -> Sample:
        """Make the sample of row `index`."""
        fields, row = self.fields, self.rows[index]
        label = str(row[fields.id]) if fields.id else str(index)
        given = row[fields.answers]
        told = ["" if answer is None else str(answer) for answer in (given if isinstance(given, list) else [given])]
        answers = [answer for answer in told if answer.strip()]
        if not answers:
            raise SampleError(
                f"sample {label} of '{self.name}' has no answer: its field '{fields.answers}' is {given!r}"
            )
        if fields.metric == "vqa_accuracy":
            answers = told  # one for each person; a blank one matches no other person's
            if len(answers) < LEAST_PEOPLE:
                raise SampleError(
                    f"sample {label} of '{self.name}': 'vqa_accuracy' asks that three others agree, so it needs the "
                    f"answers of at least {LEAST_PEOPLE} people, got {len(answers)}; another metric is the task's "
                    "option `metric`"
                )
        image = _open_image(row[fields.image], Path(fields.path), f"the image of sample {label} of '{self.name}'")
        question = fields.prompt or str(row[fields.question]).strip()
        if fields.capitalise:
            question = question.capitalize()
        reference: Mapping[str, Any] = {"answers": answers} | {name: row[name] for name in fields.extra}
        kind = str(row[fields.kind]) if fields.kind else ""
        return Sample(label, (image,), (Turn(question + fields.suffix, reference, kind),))


def _rows(name: str, fields: HubFields) -> Any:
    """Load the split's rows, from a local directory if `path` is one."""
    folder = Path(fields.path).expanduser()
    try:
        if not folder.is_dir():
            return datasets.load_dataset(fields.path, fields.config, split=fields.split)
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            saved = datasets.load_from_disk(folder)
            return saved[fields.split] if isinstance(saved, datasets.DatasetDict) else saved
        # A copy of the hub's repository declares its configurations; a plain folder has none.
        declared = fields.config in datasets.get_dataset_config_names(str(folder))
        config = fields.config if declared else None
        return datasets.load_dataset(str(folder), config, split=fields.split, cache_dir=_cache_of(folder))
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # what datasets and the hub's client raise
        raise TaskError(
            f"task '{name}': split '{fields.split}' of '{fields.path}' cannot be loaded: "
            f"{type(error).__name__}: {error}. Give another split or a local directory as the task's option `split` or "
            "`path`, or check the connection to the hub"
        ) from error


def _cache_of(folder: Path) -> str:
    """Choose where `datasets` keeps what it makes of a folder: a place for these very files.

    Its own names for folders that declare configurations leave out what the files hold, so that another folder's, or
    an older state's, rows would come back.
    """
    files = ((path, path.stat()) for path in sorted(folder.resolve().rglob("*")) if path.is_file())
    state = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files]
    digest = hashlib.sha256(repr(state).encode()).hexdigest()
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "local" / digest[:16])


def _open_image(stored: Mapping[str, Any] | None, folder: Path, what: str) -> Image.Image:
    """Open the image of a row; a path that a table of the dataset states is one in the dataset's folder."""
    if not stored or (stored.get("bytes") is None and not stored.get("path")):
        raise SampleError(f"{what} is missing")
    source = folder.expanduser() / stored["path"] if stored.get("bytes") is None else io.BytesIO(stored["bytes"])
    try:
        with Image.open(source) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError(f"{what} cannot be read: {error}") from error
