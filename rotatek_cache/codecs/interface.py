"""One interface for all ways to store visual Keys and Values: `KeyCodec`."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rotatek_cache.codecs.finite import FiniteCheck
from rotatek_cache.core.quantization import CHANNEL_BLOCK, PLAIN_BITS
from rotatek_cache.core.seal import Sealed, SealJob
from rotatek_cache.core.segments import Stored
from rotatek_cache.options import Bits, FitOptions, rank_of_share

Ranges = Sequence[tuple[int, int]]  # (first token, tokens) of each row of packed states


@dataclass(frozen=True)
class StateOptions:
    """The options of the Keys, or of the Values, of one layer.

    Attributes:
        options: all options.
        kind: which states.
        layer: of the model, from 0.
        heads: which of the layer's KV heads come; None if all do.
    """

    options: FitOptions
    kind: Literal["key", "value"]
    layer: int
    heads: slice | None = None

    @property
    def bits(self) -> Bits:
        """Bits of a coefficient."""
        return self.options.key_bits if self.kind == "key" else self.options.value_bits

    @property
    def sparsity(self) -> float | None:
        """Share of the channels removed; None where Keys have a rank or an energy."""
        return self.options.sparsity if self.kind == "key" else self.options.value_sparsity or 0.0

    @property
    def energy(self) -> float | None:
        """Share of the variance to keep, where it sets the rank."""
        return self.options.energy if self.kind == "key" else None

    def rank_for(self, width: int) -> int | None:
        """Find the rank for a head of `width` channels before padding; None if it follows from the states."""
        return self.options.rank_for(width) if self.kind == "key" else rank_of_share(self.sparsity or 0.0, width)

    def bit_budget(self, width: int) -> int:
        """Count the bits of a token that automatic bits may spend; a ValueError where they are too few for any."""
        assert self.sparsity is not None
        budget = int((1 - self.sparsity) * PLAIN_BITS * width)
        least = 2 * CHANNEL_BLOCK
        if budget < least:
            name = "sparsity" if self.kind == "key" else "value_sparsity"
            raise ValueError(
                f"{name}={self.sparsity} leaves {budget} bits for a token of head width {width}; automatic bits need "
                f"at least {least}, that is {name} of at most {1 - least / (PLAIN_BITS * width):g}"
            )
        return budget

    def check_width(self, width: int) -> None:
        """Raise a ValueError where heads of `width` channels cannot be packed."""
        if self.bits not in (None, "fp8") and width % CHANNEL_BLOCK:
            raise ValueError(
                f"{self.kind}_bits={self.bits!r} needs a head width that is a multiple of {CHANNEL_BLOCK}, got {width}"
            )


class KeyCodec(abc.ABC):
    """A way to store the visual Keys, or Values, of one layer.

    Attributes:
        owns_basis: each request stores a basis of its own beside its tokens.
        supports_bits: all that `key_bits`, or `value_bits`, may be.
        supports_sparsity: channels, or coefficients, can be left out.
        supports_energy: the rank can follow from a share of the variance.
    """

    owns_basis: bool = False
    supports_bits: tuple[Bits, ...] = (None,)
    supports_sparsity: bool = True
    supports_energy: bool = False

    def __init__(self, wanted: StateOptions) -> None:
        self.wanted = wanted
        self.unanswered: list[FiniteCheck] = []

    @abc.abstractmethod
    def stored_bytes(self, tokens: int, width: int, dtype: torch.dtype, rank: int | None = None) -> int:
        """Count the bytes of `tokens` tokens of one head and of what they need to be read, at most.

        Args:
            tokens: of one row.
            width: channels of a head.
            dtype: of the states.
            rank: coefficients kept; by default as many as the options say, or one where they follow from the states.
        """

    @abc.abstractmethod
    def store(
        self, states: Tensor, ranges: Ranges, queries: Tensor | None = None, valid: Tensor | None = None
    ) -> Stored:
        """Store packed states ``[H, N, D]``.

        Args:
            states: rows one after the other.
            ranges: where they lie.
            queries: the window's queries ``[R, H_q, W, D]``; None for Values, and where there are none.
            valid: bool ``[R, W]``, False for padding; None if nothing is.
        """

    def seal_job(self, states: Tensor, queries: Tensor | None = None, valid: Tensor | None = None) -> SealJob | str:
        """Tell a kernel how to do what `store` does, or say why none can.

        Args:
            states: ``[B, H, P, D]``, some of whose tokens are to be stored.
            queries, valid: as for `store`.
        """
        return f"{type(self).__name__} is stored by torch alone"

    def take(self, job: SealJob, sealed: Sealed) -> Stored:
        """Take what a kernel has made of a `seal_job`."""
        raise NotImplementedError

    def expect_finite(self, states: Tensor) -> None:
        """Have `check_finite` raise a ValueError if `states` are not finite; see `FiniteCheck` for what they may be."""
        what = "Keys" if self.wanted.kind == "key" else "Values"
        message = (
            f"the visual {what} of layer {self.wanted.layer} hold NaN or infinity, so no basis can be fitted to them: "
            "the model's weights, inputs or dtype overflow before they reach the cache"
        )
        self.unanswered.append(FiniteCheck(states, message))
        self.check_finite()

    def check_finite(self, *, wait: bool = False) -> None:
        """Raise a ValueError if states that were stored are known not to have been finite.

        On a CPU that is known at once. A GPU is not waited for, unless asked to `wait`: there the error comes with the
        layer's next tokens, before which the host has read the token that the prefill gave.
        """
        for check in self.unanswered if wait else ():
            check.wait()
        self.unanswered = [check for check in self.unanswered if not check.passed()]
