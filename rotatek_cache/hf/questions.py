"""What `RotateKCache.ask_many` asks of questions, and of the rows that they are about."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def checked_questions(questions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ids ``[N, n]`` and bool ``[N, n]``, False on padding, which has to be on the left."""
    if not isinstance(questions, Tensor) or questions.ndim != 2 or questions.is_floating_point():
        what = list(questions.shape) if isinstance(questions, Tensor) else type(questions).__name__
        raise ValueError(f"questions: expected a tensor of ids [questions, tokens], got {what}")
    if 0 in questions.shape:
        raise ValueError(f"questions: expected at least one, of one token or more, got {list(questions.shape)}")
    seen = torch.ones_like(questions, dtype=torch.bool) if mask is None else mask.bool().to(questions.device)
    if seen.shape != questions.shape:
        raise ValueError(
            f"attention_mask: expected the shape of questions {list(questions.shape)}, got {list(seen.shape)}"
        )
    if not bool(seen[:, -1:].all()) or bool((seen[:, :-1] & ~seen[:, 1:]).any()):
        raise ValueError(
            "attention_mask hides tokens behind others: expected questions padded on the left, as by "
            'processor.tokenizer(..., padding=True, padding_side="left")'
        )
    return questions, seen


def rows_asked(questions: int, rows: Sequence[int] | Tensor | None, batch: int) -> Tensor:
    """Say which of `batch` rows each of so many questions is about: int64 ``[questions]``."""
    if rows is None:
        if batch not in (1, questions):
            raise ValueError(
                f"rows: the cache holds {batch} rows and there are {questions} questions: say which row each is "
                "about, as in rows=[0, 0, 1]"
            )
        rows = range(batch) if batch == questions else [0] * questions
    given: Any = rows.tolist() if isinstance(rows, Tensor) else rows
    chosen: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    whole = all(hasattr(row, "__index__") and not isinstance(row, bool) and 0 <= row < batch for row in chosen)
    if len(chosen) != questions or not whole:
        raise ValueError(
            f"rows: expected {questions} numbers from 0 to {batch - 1}, one for each question, got {given}"
        )
    return torch.tensor([int(row) for row in chosen], dtype=torch.int64, device="cpu")


def check_questions_are_new(known: Tensor, ids: Tensor, seen: Tensor, index: Tensor, visible: Tensor | None) -> None:
    """Raise a ValueError for questions that begin with the prompt, which would be read again, without its images.

    Args:
        known: ids ``[N, cached tokens]`` of what each question is about.
        ids, seen: the questions ``[N, n]``, False on their padding.
        index: the cache's row that each question is about.
        visible: bool ``[B, prompt]``, which ids of the cache's rows are no padding; None: all.
    """
    for number, row in enumerate(index.tolist()):
        held, asked = known[number], ids[number][seen[number]]
        if visible is not None:
            shown = visible[row, : len(held)].to(held.device)
            held = torch.cat([held[: len(shown)][shown], held[len(shown) :]])
        if 1 < len(held) <= len(asked) and torch.equal(held.to(asked.dtype), asked[: len(held)]):
            raise ValueError(
                f"questions: number {number} begins with all {len(held)} tokens that the cache holds of its row: "
                "pass what follows them alone, and leave out the images"
            )
