"""Methods that bound what an answer adds to a cache: which of the tokens that were decoded stay.

A layer holds the tokens of an answer in a buffer of `cap` columns. Once it is full, `interval` of them go, in each KV
head others; a `DecodedMethod` says which, from the buffer's Keys and the last queries. The prompt is not touched.
"""

import abc
import dataclasses
from dataclasses import dataclass

from torch import Tensor

MOST_INTERVAL = 128  # tokens between two evictions, where nothing else is asked for (R-KV's buffer)


@dataclass(frozen=True)
class DecodedMethod(abc.ABC):
    """A way to choose among decoded tokens; the settings of one, without state.

    Args:
        cap: the most tokens of an answer that a head holds, at any time.
        every: how many go at once when it is full; None: 128, or a quarter of `cap` where that is less.
        window: the last tokens, which always stay, and by whose queries the others are judged.
    """

    cap: int
    every: int | None = None
    window: int = 8

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type not in (int, int | None) or (value is None and field.name == "every"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: {field.name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: {field.name} must be at least 1, got {value}")
        if self.kept <= self.window:
            raise ValueError(
                f"{name}: cap={self.cap} less the {self.interval} tokens that go at once leaves {self.kept}, which "
                f"must be more than window={self.window}, the last tokens, which always stay: raise cap, or lower "
                "every or window"
            )

    @property
    def interval(self) -> int:
        """Tokens between two evictions."""
        return min(MOST_INTERVAL, max(1, self.cap // 4)) if self.every is None else self.every

    @property
    def kept(self) -> int:
        """Tokens that an eviction leaves."""
        return self.cap - self.interval

    @abc.abstractmethod
    def choose(self, keys: Tensor, queries: Tensor, visible: Tensor) -> Tensor:
        """Choose the tokens before the window that stay: int64 ``[B, H, kept - window]``, in order.

        Args:
            keys: of the buffer, ``[B, H, n, D]``; the last `window` are not asked about.
            queries: those of the window that are known, scaled, ``[B, H, G, q, D]``.
            visible: bool ``[q, n]``, what each of them sees.
        """
