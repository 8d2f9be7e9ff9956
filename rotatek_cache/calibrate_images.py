"""Calibration from a folder of images: what `rotatek calibrate` does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rotatek_cache.calibration import Calibration, calibrate, fingerprint
from rotatek_cache.demo import DemoError, Reader, open_page

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Calibrated:
    """How many images went into a basis file, and how many could not be read."""

    images: int
    skipped: int


def find_images(folder: Path) -> list[Path]:
    """Image files below `folder`, in the order of their names."""
    if not folder.is_dir():
        raise DemoError(f"--images must be a folder, got '{folder}'")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise DemoError(f"no image below '{folder}' (looked for {', '.join(sorted(SUFFIXES))})")
    return found


def calibrate_reader(
    reader: Reader,
    paths: Sequence[Path],
    questions: Sequence[str],
    out: Path,
    *,
    method: str,
    value_method: str,
    save_every: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Calibrated:
    """Calibrate on the images at `paths`, the questions asked in turn, and write the basis file `out`.

    The state is saved beside it every `save_every` images, and taken up again; it goes when the basis is written.

    Args:
        reader: the attached model.
        paths: images; one that cannot be read is skipped and counted.
        questions: at least one.
        out: the basis file.
        method, value_method: of `rotatek_cache.calibration.METHODS` and `VALUE_METHODS`.
        save_every: images between two saves.
        advance: called with the number of images done.

    Raises:
        DemoError: the saved state cannot be used, or no image gave a visual token.
    """
    mark = fingerprint(reader.model)
    saved = out.with_name(out.name + ".state")
    try:
        state = Calibration.load(saved, mark) if saved.exists() else Calibration(mark, reader.model.config.model_type)
        for number, path in enumerate(paths):
            if number < state.images + state.skipped:
                continue
            try:
                page = open_page(path)
            except DemoError:
                state.skipped += 1
            else:
                calibrate(reader.model, [reader.prompt(page.image, questions[number % len(questions)])], state)
            if (number + 1) % save_every == 0:
                state.save(saved)
            advance(number + 1)
        state.write_basis(out, source=f"{state.images} images", method=method, value_method=value_method)
    except ValueError as error:
        raise DemoError(str(error)) from error
    except OSError as error:
        raise DemoError(f"'{out}' cannot be written: {error}") from error
    saved.unlink(missing_ok=True)
    return Calibrated(state.images, state.skipped)
