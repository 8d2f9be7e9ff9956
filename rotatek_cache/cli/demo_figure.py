"""The picture of a demo: the image, who answered what, and what each cache cost."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rotatek_cache.cli.demo import Answer, Cost, DemoResult, Measurement, comparison
from rotatek_cache.report import readable_bytes

INK, FAINT, GRID = "#1c2430", "#6b7684", "#d8dde3"
GOOD, BAD, DENSE, ROTATED = "#1b7f4b", "#c0362c", "#8a94a1", "#2f6fb0"
LINE = 0.21  # inches per line of text
LABELS = 0.075  # share of the width that the names of the caches take, left of each group of bars
MARK_WIDTH = 0.085  # share of the answers' width that one setting's marks take


def draw(result: DemoResult, path: Path) -> None:
    """Write the picture of `result` to `path`, a PNG file."""
    rows = _rows(result)
    lines = sum(max(len(left), 1 + len(right)) for left, right, _ in rows) + 0.6 * len(rows)
    top = max(4.0, LINE * (lines + 2.5))
    bottom = 0.36 * len(result.measurements) + 1.15
    height = top + bottom + 0.75
    figure = Figure(figsize=(13, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.025, 1 - 0.28 / height, "One image, one model, several KV caches", size=15, weight="bold", color=INK)
    subtitle = (
        f"{result.model} · {result.dtype} on {result.device} · {result.visual_tokens} visual tokens · "
        f"head width {result.head_width}"
    )
    figure.text(0.025, 1 - 0.54 / height, subtitle, size=9.5, color=FAINT)
    bottom_edge, top_edge = bottom / height, 1 - 0.7 / height
    side = min(4.0, top - 0.45)
    image = figure.add_axes((0.025, top_edge - (side + 0.2) / height, side / 13, side / height))
    _draw_image(image, result)
    left = 0.025 + side / 13 + 0.03
    answers = figure.add_axes((left, bottom_edge, 0.985 - left, top_edge - bottom_edge))
    _draw_answers(answers, result, rows, top - 0.05)
    parts: list[tuple[str, Sequence[Cost]]] = [
        (f"One image: {result.visual_tokens} visual tokens", result.measurements)
    ]
    if result.long_prompt is not None:
        many = result.long_prompt
        parts.append((f"The image {many.copies} times: {many.visual_tokens} visual tokens, not answered", many.costs))
    for number, (title, costs) in enumerate(parts):
        width = 0.97 / len(parts)
        place = (0.02 + number * width + LABELS, 0.42 / height, width - LABELS - 0.02, (bottom - 1.15) / height)
        _draw_bars(figure.add_axes(place), title, costs)
    figure.savefig(path)


def _draw_image(axes: Any, result: DemoResult) -> None:
    image = result.page.image
    axes.imshow(image, interpolation="nearest" if max(image.size) < 600 else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_anchor("N")
    for spine in axes.spines.values():
        spine.set_color(GRID)
    axes.set_title(f"{result.page.path.name}, {image.width} x {image.height}", size=9, color=FAINT, loc="left")


Row = tuple[list[str], list[tuple[str, str]], list[Answer | None]]


def _rows(result: DemoResult) -> list[Row]:
    """List for each question its lines, those of the answers (text, colour), and the answer of each setting."""
    columns: list[tuple[str, list[Answer | None]]] = [
        (answer.question.text, [m.answers[index] for m in result.measurements])
        for index, answer in enumerate(result.dense.answers)
    ]
    if result.dense.follow_up is not None:
        turn = [m.follow_up for m in result.measurements]
        columns.append((f"second turn, same cache: {result.dense.follow_up.question.text}", turn))
    rows: list[Row] = []
    wide = _characters(result)
    for question, answers in columns:
        given = [(m, a) for m, a in zip(result.measurements, answers, strict=True) if a is not None]
        rows.append((textwrap.wrap(question, wide), _answer_lines(given, wide), answers))
    return rows


def _characters(result: DemoResult) -> int:
    """Count the characters that fit left of the marks."""
    return int(94 * (1 - MARK_WIDTH * len(result.measurements)))


def _answer_lines(given: list[tuple[Measurement, Answer]], wide: int) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    truth = given[0][1].question.truth
    given_by: dict[str, list[str]] = {}
    for m, answer in given:
        given_by.setdefault(" ".join(answer.text.split()) or "(nothing)", []).append(m.setting.label)
    if truth is not None:
        lines += [(line, GOOD) for line in textwrap.wrap(truth, wide)]
        given_by.pop(" ".join(truth.split()), None)
    for text, labels in given_by.items():
        who = "all" if len(labels) == len(given) else ", ".join(labels)
        prefix = "" if truth is None and "dense" in labels else f"{who}: "
        colour = INK if truth is None and "dense" in labels else BAD
        lines += [(line, colour) for line in textwrap.wrap(prefix + text, wide, max_lines=3, placeholder=" ...")]
    return lines


def _draw_answers(axes: Any, result: DemoResult, rows: list[Row], inches: float) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(inches, 0)
    axes.axis("off")
    count = len(result.measurements)
    places = [1 - MARK_WIDTH * (count - index - 0.5) for index in range(count)]
    y = LINE
    known = any(a is not None and a.right is not None for _, _, answers in rows for a in answers)
    axes.text(0, y, "question and true answer" if known else "question and dense answer", size=9, color=FAINT)
    middle = (places[min(1, count - 1)] + places[-1]) / 2
    axes.text(middle, y - 0.85 * LINE, "RotateKCache: sparsity, or coded", size=9, color=FAINT, ha="center")
    for place, m in zip(places, result.measurements, strict=True):
        axes.text(place, y, m.setting.label, size=9.5, weight="bold", color=INK, ha="center")
    y += 0.4 * LINE
    for question, answer_lines, answers in rows:
        axes.plot([0, 1], [y, y], color=GRID, lw=0.8)
        y += LINE
        first = y
        for line in question:
            axes.text(0, y, line, size=10.5, weight="bold", color=INK)
            y += LINE
        for line, colour in answer_lines:
            axes.text(0.012, y, line, size=9.5, color=colour)
            y += LINE
        for place, answer in zip(places, answers, strict=True):
            if answer is not None and (answer.right is not None or place != places[0]):
                good = answer.same if answer.right is None else answer.right
                mark = ("✓" if good else "✗") if answer.right is not None else ("=" if good else "≠")
                axes.text(place, first, mark, size=13, ha="center", color=GOOD if good else BAD)
        y -= 0.4 * LINE


def _draw_bars(axes: Any, title: str, costs: Sequence[Cost]) -> None:
    """Draw the bytes of each cache, the dense one's first, with its time beside them."""
    dense = costs[0]
    for index, cost in enumerate(costs):
        axes.barh(index, cost.nbytes, height=0.62, color=DENSE if cost.setting.is_dense else ROTATED)
        parts = [readable_bytes(cost.nbytes), f"{cost.ms_per_token:.1f} ms per token"]
        if not cost.setting.is_dense:
            parts.insert(1, comparison(dense, cost))
            speed = dense.ms_per_token / cost.ms_per_token
            parts[-1] += f" ({speed:.1f}x as fast)" if speed >= 1.05 else ""
        axes.text(cost.nbytes + 0.01 * dense.nbytes, index, "   ".join(parts), va="center", size=9, color=INK)
    labels = [cost.setting.label for cost in costs]
    axes.set_yticks(range(len(costs)), labels, size=9, color=INK)
    axes.set_ylim(len(costs) - 0.4, -0.6)
    axes.set_xlim(0, 2.4 * max(cost.nbytes for cost in costs))
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(GRID)
    axes.set_title(title, size=10, weight="bold", color=INK, loc="left")
    axes.set_xlabel(
        f"bytes that the cache holds at {dense.tokens} tokens; time of a decode step", size=9, color=FAINT, loc="left"
    )
