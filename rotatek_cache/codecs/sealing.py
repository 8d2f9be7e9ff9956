"""The seal of a layer: its Keys and Values, each stored by the codec that the options choose."""

import torch
from torch import Tensor

from rotatek_cache.codecs.basis_file import load_basis
from rotatek_cache.codecs.dense import Dense
from rotatek_cache.codecs.interface import KeyCodec, Ranges
from rotatek_cache.codecs.registry import codecs_for
from rotatek_cache.codecs.shared_basis import CalibratedBasis
from rotatek_cache.core.attention import UnsupportedError
from rotatek_cache.core.precision import without_autocast
from rotatek_cache.core.seal import Places, SealImplementation, SealJob, is_asked, seal_states
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
        places = Places(tuple(ranges))
        stored = self._store_fused({self.keys: (keys[None], queries, valid)}, places, "auto").get(self.keys)
        return self.keys.store(keys, ranges, queries, valid) if stored is None else stored

    @without_autocast
    def store_values(self, values: Tensor, ranges: Ranges) -> Stored:
        """Store packed Values ``[H, N, D_v]``."""
        self.values.wanted.check_width(values.shape[-1])
        places = Places(tuple(ranges))
        stored = self._store_fused({self.values: (values[None], None, None)}, places, "auto").get(self.values)
        return self.values.store(values, ranges) if stored is None else stored

    @without_autocast
    def store(
        self,
        keys: Tensor,
        values: Tensor,
        places: Places,
        queries: Tensor | None = None,
        valid: Tensor | None = None,
        *,
        impl: SealImplementation = "auto",
    ) -> tuple[Stored, Stored]:
        """Store the tokens at `places` of Keys and Values ``[B, H, P, D]``, by the same kernels where there are any.

        Args:
            keys, values: the states.
            places: of the tokens; their rows are in the order of `queries`.
            queries, valid: see `KeyCodec.store`.
            impl: see `rotatek_cache.core.seal.seal_states`.
        """
        self.keys.wanted.check_width(keys.shape[-1])
        self.values.wanted.check_width(values.shape[-1])
        given = {self.keys: (keys, queries, valid), self.values: (values, None, None)}
        stored = self._store_fused(given, places, impl)
        return (
            stored.get(self.keys) or self.keys.store(places.gather(keys), places.ranges, queries, valid),
            stored.get(self.values) or self.values.store(places.gather(values), places.ranges),
        )

    @staticmethod
    def _store_fused(
        given: dict[KeyCodec, tuple[Tensor, Tensor | None, Tensor | None]], places: Places, impl: SealImplementation
    ) -> dict[KeyCodec, Stored]:
        """Have a kernel store what it can of states, each with its queries and which of them are valid."""
        device = next(iter(given.values()))[0].device
        if not is_asked(device, impl):
            return {}
        asked = {codec: codec.seal_job(*arguments) for codec, arguments in given.items()}
        jobs = {codec: job for codec, job in asked.items() if isinstance(job, SealJob)}
        reasons = [job for codec, job in asked.items() if isinstance(job, str) and not isinstance(codec, Dense)]
        if impl == "triton" and reasons:
            raise UnsupportedError("; ".join(reasons))
        sealed = seal_states(list(jobs.values()), places, impl)
        if sealed is None:
            return {}
        return {codec: codec.take(job, one) for (codec, job), one in zip(jobs.items(), sealed, strict=True)}

    def answer_for(self, other: "Sealer") -> None:
        """Check by `check`, from now on, what another has stored, too."""
        if other is not self:
            for own, codec in ((self.keys, other.keys), (self.values, other.values)):
                own.unanswered += codec.unanswered

    def check(self, *, wait: bool = False) -> None:
        """Raise a ValueError if states that were stored are known not to have been finite; `wait` until it is."""
        for codec in (self.keys, self.values):
            if codec.unanswered:
                codec.check_finite(wait=wait)
