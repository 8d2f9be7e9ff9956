"""Calibration from a folder of images or a dataset, and from texts: what `rotatek calibrate` does."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from rotatek_cache.calibration.gather import calibrate
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.fingerprint import fingerprint
from rotatek_cache.hf.chat import Chat, InputError, open_image

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Counts:
    """The number of images that went into a basis file, of those that could not be read, and of passages of text."""

    images: int
    skipped: int
    texts: int


@dataclass(frozen=True)
class Texts:
    """Passages of text as ids, each of a prompt of its own."""

    passages: Sequence[Sequence[int]]
    description: str

    def __len__(self) -> int:
        return len(self.passages)


NO_TEXTS = Texts((), "no text")


class Images(Protocol):
    """Images by number."""

    @property
    def description(self) -> str:
        """A mark of these images: the same for the same ones only."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Image.Image:
        """Read the image; an InputError where it cannot be read."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files, opened when they are asked for."""

    folder: Path
    paths: Sequence[Path]

    @property
    def description(self) -> str:
        """Their number, and a digest of names and sizes."""
        listed = "\n".join(f"{path.relative_to(self.folder)} {path.stat().st_size}" for path in self.paths)
        return f"{len(self.paths)} files, {hashlib.sha256(listed.encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Image.Image:
        return open_image(self.paths[index])


@dataclass(frozen=True)
class DatasetImages:
    """The first image column of a dataset of the library `datasets`."""

    rows: Any
    column: str

    @property
    def description(self) -> str:
        """The dataset's own fingerprint."""
        return f"{len(self.rows)} rows of a dataset, column {self.column}, {self.rows._fingerprint}"  # noqa: SLF001

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Image.Image:
        try:
            image = self.rows[index][self.column]
            image.load()
        except (OSError, ValueError, SyntaxError, AttributeError, Image.DecompressionBombError) as error:
            raise InputError(f"row {index} of the dataset holds no readable image: {error}") from error
        converted: Image.Image = image.convert("RGB")
        return converted


NO_IMAGES = ImageFiles(Path(), ())


def find_images(folder: Path) -> list[Path]:
    """List the image files below `folder`, in the order of their names."""
    if not folder.is_dir():
        raise InputError(f"--images must be a folder, got '{folder}'")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"no image below '{folder}' (looked for {', '.join(sorted(SUFFIXES))})")
    return found


def open_texts(source: Path, tokenizer: Any, length: int, most: int | None = None) -> Texts:
    """Read a text file, or those of a folder, and cut them into passages of `length` tokens, at least half as many.

    Args:
        source: file, or folder whose ``.txt`` files are read with its subfolders in the order of their names.
        tokenizer: of the model.
        length: tokens of a passage: as long as what will be cached, since a Key depends on its position.
        most: the first so many passages only.
    """
    files = sorted(source.rglob("*.txt")) if source.is_dir() else [source]
    passages: list[list[int]] = []
    digest = hashlib.sha256()
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--text '{file}' cannot be read as UTF-8 text: {error}") from error
        digest.update(text.encode())
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        parts = [ids[at : at + length - len(begin)] for at in range(0, len(ids), length - len(begin))]
        passages += [begin + part for part in parts if len(part) >= length // 2]
    if not passages:
        raise InputError(f"--text '{source}' holds no .txt file with a passage of {length // 2} tokens or more")
    passages = passages[:most]
    return Texts(passages, f"{len(passages)} passages of up to {length} tokens, {digest.hexdigest()[:16]}")


def open_images(source: str, split: str = "train", most: int | None = None) -> Images:
    """Open the images of a folder, or of a dataset: a name on the hub, or a folder that `save_to_disk` wrote.

    Args:
        source: folder, or ``owner/name`` or ``owner/name/configuration``.
        split: of a dataset.
        most: the first so many only.
    """
    folder = Path(source)
    saved = any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    if folder.is_dir() and not saved:
        return ImageFiles(folder, find_images(folder)[:most])
    if not saved and (source.startswith((".", "/", "~")) or source.count("/") not in (1, 2)):
        raise InputError(f"--images must be a folder, or a dataset as owner/name, got '{source}'")
    try:
        import datasets  # noqa: PLC0415 (an extra; folders need none)
    except ImportError:
        raise InputError(
            f"--images '{source}' is no folder, and datasets need `pip install datasets` (part of the extra `evals`)"
        ) from None
    owner, *rest = source.split("/")
    name, configuration = "/".join([owner, *rest[:1]]), "/".join(rest[1:]) or None
    try:
        rows = datasets.load_from_disk(source) if saved else datasets.load_dataset(name, configuration, split=split)
        if isinstance(rows, datasets.DatasetDict):
            rows = rows[split]
    except KeyError:
        raise InputError(f"--split must be one of {', '.join(rows)}, got '{split}'") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"--images '{source}' is neither a folder nor a dataset that can be read: {error}") from error
    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise InputError(f"dataset '{source}' has no image column, only {', '.join(rows.column_names)}")
    return DatasetImages(rows if most is None else rows.take(min(most, len(rows))), columns[0])


def calibrate_images(
    chat: Chat,
    images: Images,
    questions: Sequence[str],
    out: Path,
    *,
    method: str,
    value_method: str,
    save_every: int,
    texts: Texts = NO_TEXTS,
    advance: Callable[[int], None] = lambda _: None,
) -> Counts:
    """Calibrate on `images`, the questions asked in turn, then on `texts`, and write the basis file `out`.

    The state is saved beside it every `save_every` images, and taken up again; it goes when the basis is written.

    Args:
        chat: the attached model.
        images: one that cannot be read is skipped and counted.
        questions: at least one.
        out: the basis file.
        method, value_method: of `rotatek_cache.calibration.moments.KEY_METHODS` and `VALUE_METHODS`; with "fisher" for
            one of them the model answers each question, and its answers are differentiated.
        save_every: images and passages between two saves.
        texts: with any, all tokens are taken, those of the images' prompts too, and the file serves ``text="coded"``.
        advance: called with the number of images and passages done.

    Raises:
        InputError: the saved state cannot be used, or no image gave a visual token.
    """
    weighed = "fisher" in (method, value_method)
    mark = fingerprint(chat.model)
    saved = out.with_name(out.name + ".state")
    try:
        source = f"{images.description}; asked {json.dumps(list(questions))}; {texts.description}"
        source += "; answers weighed" if weighed else ""
        if saved.exists():
            state = _resumed(saved, mark, source)
        else:
            state = Calibration(mark, chat.model.config.model_type, source)
            state.save(saved)  # before the work: where this fails, the basis could not be written either
        for number in range(state.images + state.skipped, len(images)):
            try:
                image = images[number]
            except InputError:
                state.skipped += 1
            else:
                prompt = chat.prompt([image], questions[number % len(questions)])
                calibrate(chat.model, [prompt], state, text=len(texts) > 0, sensitivity=weighed)
            if (number + 1) % save_every == 0:
                state.save(saved)
            advance(number + 1)
        for number in range(state.texts, len(texts)):
            ids = torch.tensor([texts.passages[number]], device=chat.model.device)
            passage = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            calibrate(chat.model, [passage], state, text=True, sensitivity=weighed)
            if (number + 1) % save_every == 0:
                state.save(saved)
            advance(len(images) + number + 1)
        state.write_basis(out, source=source, method=method, value_method=value_method)
    except ValueError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(f"'{out}' cannot be written: {error}") from error
    saved.unlink(missing_ok=True)
    return Counts(state.images, state.skipped, state.texts)


def _resumed(saved: Path, mark: Tensor, source: str) -> Calibration:
    """Load the state saved at `saved`; a ValueError if it is unreadable or was begun with something else."""
    remedy = "delete it, or give another --out"
    try:
        state = Calibration.load(saved, mark)
    except ValueError as error:
        raise ValueError(f"{error}: {remedy}") from error
    if state.source != source:
        raise ValueError(
            f"'{saved}' was begun with other images, questions or texts ({state.source}; now {source}): {remedy}"
        )
    return state
