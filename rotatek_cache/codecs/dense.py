"""States as they are."""

import torch
from torch import Tensor

from rotatek_cache.codecs.interface import KeyCodec, Ranges
from rotatek_cache.core.segments import Stored


class Dense(KeyCodec):
    """Stores states as they are."""

    supports_sparsity = False

    def stored_bytes(self, tokens: int, width: int, dtype: torch.dtype, rank: int | None = None) -> int:
        """Count the bytes of the states."""
        return tokens * width * dtype.itemsize

    def store(
        self, states: Tensor, ranges: Ranges, queries: Tensor | None = None, valid: Tensor | None = None
    ) -> Stored:
        """Store the states."""
        return Stored(states)
