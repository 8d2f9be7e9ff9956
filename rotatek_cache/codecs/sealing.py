"""The seal of a layer: its Keys and Values, each stored by the codec that the options choose."""

import torch
from torch import Tensor

from rotatek_cache.codecs.basis_file import load_basis
from rotatek_cache.codecs.dense import Dense
from rotatek_cache.codecs.interface import Ranges
from rotatek_cache.codecs.registry import codecs_for
from rotatek_cache.codecs.shared_basis import CalibratedBasis
from rotatek_cache.core.precision import without_autocast
from rotatek_cache.core.segments import Stored
from rotatek_cache.options import FitOptions


class Sealer:
    """Stores the visual Keys and Values of one layer as its options say.

    Args:
        options: how.
        layer: of the model, from 0.
        heads: which of the layer's KV heads come; None if all do.
    """

    def __init__(self, options: FitOptions, layer: int, heads: slice | None = None) -> None:
        self.options = options
        self.layer = layer
        self.keys, self.values = codecs_for(options, layer, heads)
        self.calibrated: CalibratedBasis | None = None
        if options.is_calibrated:
            file = load_basis(options.basis)
            file.state(layer, "key")  # raises where the file has no such layer
            self.calibrated = file if heads is None else file.of_heads(heads)

    def is_worth(
        self, tokens: int, key_width: int, value_width: int, dtype: torch.dtype, rank: int | None = None
    ) -> bool:
        """Tell whether `tokens` tokens of a head take fewer bytes compressed, basis included, than dense.

        With `energy` the Keys decide on the rank: give it once it is known; before, the least is assumed.
        """
        if self.options.always_compress:
            return True
        if isinstance(self.keys, Dense) and isinstance(self.values, Dense):
            return True  # nothing is gained and nothing lost
        dense = tokens * (key_width + value_width) * dtype.itemsize
        return self.stored_bytes(tokens, key_width, value_width, dtype, rank) < dense

    def stored_bytes(
        self, tokens: int, key_width: int, value_width: int, dtype: torch.dtype, rank: int | None = None
    ) -> int:
        """Count the bytes of `tokens` compressed tokens of a head with their bases, at most."""
        keys = self.keys.stored_bytes(tokens, key_width, dtype, rank)
        return keys + self.values.stored_bytes(tokens, value_width, dtype)

    @without_autocast
    def store_keys(self, keys: Tensor, ranges: Ranges, queries: Tensor | None, valid: Tensor | None) -> Stored:
        """Store packed Keys ``[H, N, D]``; see `KeyCodec.store`."""
        self.keys.wanted.check_width(keys.shape[-1])
        return self.keys.store(keys, ranges, queries, valid)

    @without_autocast
    def store_values(self, values: Tensor, ranges: Ranges) -> Stored:
        """Store packed Values ``[H, N, D_v]``."""
        self.values.wanted.check_width(values.shape[-1])
        return self.values.store(values, ranges)

    def check(self, *, wait: bool = False) -> None:
        """Raise a ValueError if states that were stored are known not to have been finite; `wait` until it is."""
        for codec in (self.keys, self.values):
            if codec.unanswered:
                codec.check_finite(wait=wait)
