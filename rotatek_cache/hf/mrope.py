"""M-RoPE: the offset of a conversation's positions goes with its cache.

The model keeps the offset (`rope_deltas`) of the conversation that it last read, and others may follow on it.
"""

import threading
from collections.abc import Callable
from typing import Any

from rotatek_cache.hf.cache import RotateKCache

_POSITIONS = threading.Lock()  # while a model's offset is that of one conversation


def begin_forward(inner: Any, cache: RotateKCache, begin: int, position_ids: Any) -> None:
    """Put the offset of the cache's conversation on the model, none for a new one; `begin` tokens are cached."""
    with _POSITIONS:
        if not begin and position_ids is None:
            inner.rope_deltas = cache.rope_deltas = None  # of another conversation, or an attempt that failed
        elif begin or cache.rope_deltas is not None:
            inner.rope_deltas = cache.rope_deltas


def end_forward(inner: Any, cache: RotateKCache) -> None:
    """Let the cache keep the offset that its first forward left on the model."""
    if cache.rope_deltas is None:
        cache.rope_deltas = inner.rope_deltas


def prepare_positions(inner: Any, cache: RotateKCache, rows: int, prepare: Callable[[], Any]) -> Any:
    """Call `prepare` with the offset of the cache's conversation, which it changes where the turn brings images.

    Args:
        inner: the attached model below the head.
        cache: its rows may have been repeated already, as generate is going to repeat those of the ids.
        rows: of the ids.
        prepare: computes positions.
    """
    with _POSITIONS:
        if cache.rope_deltas is not None and cache.get_seq_length():
            repeats = max(1, cache.rope_deltas.shape[0] // rows)
            inner.rope_deltas = cache.rope_deltas[::repeats]
        positions = prepare()
        cache.rope_deltas = inner.rope_deltas
    return positions
