"""The smallest codec: numbers as float16. CONTRIBUTING.md shows by it how one is added."""

import torch

from rotatek_cache.codecs.interface import KeyCodec
from rotatek_cache.core.segments import Stored


class HalfPrecision(KeyCodec):
    """Stores states as float16, whatever rank is asked for."""

    def stored_bytes(self, tokens, width, dtype, rank=None):
        return tokens * width * 2

    def store(self, states, ranges, queries=None, valid=None):
        self.expect_finite(states)
        return Stored(states.to(torch.float16))
