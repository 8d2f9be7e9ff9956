"""AKVQ-VL (arXiv 2501.15021): the tokens that attention rests on keep more bits than the others."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rotatek_cache.options import FitOptions
from rotatek_cache.token_pruning.interface import AttentionMethod, AttentionRows, Stage, Summary
from rotatek_cache.token_pruning.selection import best_share

PIVOT_BITS = (16, 8, 4)  # 16: as the model gave them


@dataclass(frozen=True)
class AKVQVL(AttentionMethod):
    """Drops nothing: stores the visual tokens that are attended to most with `bits` bits, the others as options say.

    In the first layers of a model, text is what attention rests on (the paper's text-salient attention): there all
    visual tokens have the fewer bits. In the layers behind them it rests on a few pivot tokens (pivot-token-salient
    attention): those to which heads and the queries behind the image pay most in sum keep more, in each layer its own.
    Both kinds are segments of codes of one width each, so that the kernels read them as they read any; too few pivots
    to pay for ranges of their own stay as the model gave them.

    The paper rotates Keys and Values by a Walsh-Hadamard transform before they are coded in 2 bits::

        RotateKCache(
            sparsity=0, basis="hadamard", key_bits=2, value_basis="hadamard", value_bits=2, tokens="akvq_vl:0.1"
        )

    Here text stays dense in all layers, which is what more bits for it come to; in the paper it has few bits behind the
    first layers. The public notes give neither how many layers are the first ones, nor the share and the bits of
    pivots: the values here are ours. Ranges are those of a channel over a segment, for Keys and Values alike.

    Args:
        keep: share in (0, 1] of the visual tokens that keep more bits, in the layers that have pivots.
        bits: of each number of these, 8, 4, or 16 for the model's own.
        text_layers: how many layers are the first ones.
    """

    bits: int = 8
    text_layers: int = 2
    drops: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole("text_layers", 0)
        if self.bits not in PIVOT_BITS or isinstance(self.bits, bool):
            raise ValueError(f"AKVQVL: bits must be one of {', '.join(map(str, PIVOT_BITS))}, got {self.bits!r}")

    def options_of_kept(self, options: FitOptions) -> FitOptions | None:
        """Give the kept tokens' `bits` where `options` have fewer; None where they stay as they are."""
        coded = {name: bits for name in ("key_bits", "value_bits") if (bits := getattr(options, name)) is not None}
        if not coded or any(not isinstance(bits, int) or bits >= self.bits for bits in coded.values()):
            raise ValueError(
                f"tokens={self} give some tokens {self.bits} bits in place of those of key_bits and value_bits, which "
                f"must be numbers below {self.bits} then, at least one of them given (the paper: 2), got "
                f"key_bits={options.key_bits!r}, value_bits={options.value_bits!r}"
            )
        more: dict[str, Any] = dict.fromkeys(coded, self.bits)
        return None if self.bits == 16 else dataclasses.replace(options, **more)

    def check_layers(self, compressed: Sequence[int], layers: int) -> None:
        """Raise unless a layer is left behind the first ones."""
        if self.text_layers > compressed[-1]:
            raise ValueError(
                f"AKVQVL: text_layers must leave one of the layers that are compressed (the last of which is "
                f"{compressed[-1]}), got {self.text_layers}"
            )

    def stages(self, compressed: Sequence[int]) -> Sequence[Stage]:
        """Take each layer behind the first ones by itself."""
        return tuple(Stage((layer,), (layer,)) for layer in compressed if layer >= self.text_layers)

    def summarise(self, rows: AttentionRows) -> Summary:
        """Sum up columns ``[B, P]``."""
        return (rows.weights.sum((1, 2)),)

    def select(self, seen: Mapping[int, Summary], visual: Tensor, pruned: Sequence[int]) -> dict[int, Tensor]:
        """Choose the pivots."""
        return best_share({layer: seen[layer][0] for layer in pruned}, visual, self.share)
