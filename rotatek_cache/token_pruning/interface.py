"""Token pruning: which visual tokens each layer keeps, beside how many channels it keeps of them.

A token method names the visual tokens that each layer keeps. An `AttentionMethod` looks at the attention that text
queries pay to them in some or all layers; only the rows that it asks for are computed, from the layer's Keys before
their seal, and the model's own attention stays as it is. A `FeatureMethod` looks at the image's features, before the
language model. Dropped tokens are never stored; positions and masks of the others stay what they were.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from rotatek_cache.options import FitOptions

Summary = tuple[Tensor, ...]


@dataclass(frozen=True)
class AttentionRows:
    """Attention of some queries of a layer over the P tokens that wait for their seal.

    Attributes:
        weights: probabilities ``[B, H_q, q, P]`` in float32, softmax over all that the layer holds; zero for queries
            that are not `valid` and for tokens that a query does not see.
        seen: bool ``[B, q, P]``, which tokens each query sees; False for queries that are not `valid`.
        valid: bool ``[B, q]``, which queries the method asked for.
        visual: bool ``[B, P]``, which tokens are visual.
        heads: KV heads; the query heads of one follow each other.
    """

    weights: Tensor
    seen: Tensor
    valid: Tensor
    visual: Tensor
    heads: int = 1


@dataclass(frozen=True)
class HeadChoice:
    """The visual tokens that each KV head of a layer stores, and how many of them a decode step reads.

    Attributes:
        stored: bool ``[B, H, P]``.
        retrieves: bool ``[B, H]``, heads that read in each step those chunks that its query asks for.
        read: int64 ``[B, H]``, how many tokens these heads read, whole chunks of them.
        chunk: tokens of a chunk.
    """

    stored: Tensor
    retrieves: Tensor
    read: Tensor
    chunk: int


@dataclass(frozen=True)
class Stage:
    """Layers whose attention says what others keep.

    Attributes:
        watched: layers that are read, in order; tokens are chosen once the last of them has attended.
        pruned: layers that drop tokens then.
    """

    watched: tuple[int, ...]
    pruned: tuple[int, ...]


@dataclass(frozen=True)
class TokenMethod:
    """A way to choose visual tokens; the settings of one, without state.

    Args:
        keep: share in (0, 1] of the visual tokens that the method keeps (of which layers: see the method); None where
            a budget is to set it.

    Attributes:
        drops: tokens that are not kept are dropped; else they are stored as the options say, and the kept ones better.
    """

    keep: float | None = None
    drops: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.keep is not None:
            self._check_share("keep", low_allowed=False)

    @property
    def share(self) -> float:
        """`keep`, once it is known."""
        if self.keep is None:
            raise ValueError(f"{type(self).__name__}: keep must be given where no budget sets it")
        return self.keep

    def _check_share(self, name: str, *, low_allowed: bool = True) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{type(self).__name__}: {name} must be a number, got {type(value).__name__}")
        if not (0 <= value <= 1 if low_allowed else 0 < value <= 1):
            interval = "[0, 1]" if low_allowed else "(0, 1]"
            raise ValueError(f"{type(self).__name__}: {name} must be in {interval}, got {value}")

    def _check_whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{type(self).__name__}: {name} must be an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{type(self).__name__}: {name} must be at least {least}, got {value}")

    def with_keep(self, keep: float) -> Self:
        """Return the same method with another share."""
        return dataclasses.replace(self, keep=keep)


@dataclass(frozen=True)
class FeatureMethod(TokenMethod, abc.ABC):
    """Chooses from an image's features, before the language model.

    Attributes:
        reads_encoder: needs attention and Keys of the vision encoder, not only the features.
    """

    reads_encoder: ClassVar[bool] = False

    def count_of(self, tokens: int) -> int:
        """Count how many of an image's `tokens` the share keeps."""
        return max(1, round(self.share * tokens))

    @abc.abstractmethod
    def choose(
        self, features: Tensor, wanted: int, scores: Tensor | None, keys: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Choose the tokens of one image that stay, and the ones that take the others in.

        Args:
            features: ``[n, d]``, one of each placeholder.
            wanted: how many are to stay, from 1 to n.
            scores: attention in the encoder ``[n]``, if the method reads it; -inf for tokens that show no patch.
            keys: of the same layer, averaged over heads, ``[n, k]``.

        Returns:
            bool ``[n]``, and int64 ``[n]``: which kept token takes a dropped one in, -1 where none does; None where
            nothing is merged.
        """

    def merged(self, features: Tensor, taken_by: Tensor) -> Tensor:
        """Let kept tokens' features ``[n, d]`` take in others, as `choose` says; dropped ones matter not."""
        raise NotImplementedError(f"{type(self).__name__} merges nothing")


@dataclass(frozen=True)
class AttentionMethod(TokenMethod, abc.ABC):
    """Chooses by the attention that text pays to visual tokens inside the language model.

    Attributes:
        last_query_only: read the prompt's last query only, not all of those behind the last visual token.
        in_parts: the summary of many queries is the sum of those of their parts, so that memory can be bounded.
        pools_layers: `keep` is that of all layers together, of which some keep more than others.
        alike: the layers of a stage drop the same tokens.
        by_head: the KV heads of a layer keep tokens of their own, as a `HeadChoice` says.
    """

    last_query_only: ClassVar[bool] = False
    in_parts: ClassVar[bool] = True
    pools_layers: ClassVar[bool] = False
    alike: ClassVar[bool] = False
    by_head: ClassVar[bool] = False

    @property
    def drops_text(self) -> bool:
        """Whether text of the prompt is dropped as visual tokens are."""
        return False

    def options_of_kept(self, options: FitOptions) -> FitOptions | None:
        """Say how kept tokens are stored where the others are stored by `options`; None: as the model gave them.

        Asked of methods that drop nothing. Raises a ValueError where `options` cannot do with them.
        """
        raise NotImplementedError(f"{type(self).__name__} drops what it does not keep")

    def check_layers(self, compressed: Sequence[int], layers: int) -> None:
        """Raise if the method cannot work where only the layers `compressed` of `layers` are ours."""

    def _check_masked(self, first: int, compressed: Sequence[int], layers: int) -> None:
        """Raise unless all layers from `first` on are ours, where dropped tokens are masked in those behind it."""
        missing = sorted(set(range(first, layers)) - set(compressed))
        if missing:
            raise ValueError(
                f"{type(self).__name__} reads layer {first} and masks dropped tokens in all from {first + 1} on, "
                f"but the layers {missing} of this model keep the stock cache layer (sliding window or linear "
                "attention), which cannot: use a method that masks none, such as VLCache"
            )

    def stages(self, compressed: Sequence[int]) -> Sequence[Stage]:
        """List which layers of `compressed` are read and drop tokens together: by default all, once all have attended.

        Stages follow one another. The layers that one reads hold what the stages before have left them, and alike.
        """
        return (Stage(tuple(compressed), tuple(compressed)),)

    def times_dropped(self, compressed: Sequence[int]) -> dict[int, int]:
        """Count for each layer the stages whose share it keeps: those before what its stage reads, and its own."""
        times = dict.fromkeys(compressed, 0)
        for stage in self.stages(compressed):
            before = times[stage.watched[0]]
            times |= dict.fromkeys(stage.pruned, before + 1)
        return times

    def masks_prefill(self, compressed: Sequence[int]) -> bool:
        """Say whether layers drop tokens before they attend to the prompt: its hidden states follow the choice."""
        return any(layer > max(stage.watched) for stage in self.stages(compressed) for layer in stage.pruned)

    @abc.abstractmethod
    def summarise(self, rows: AttentionRows) -> Summary:
        """Return what to keep of a layer's attention: tensors that add up over parts of the queries."""

    @abc.abstractmethod
    def select(
        self, seen: Mapping[int, Summary], visual: Tensor, pruned: Sequence[int]
    ) -> Mapping[int, "Tensor | HeadChoice"]:
        """Choose what each layer of a stage's `pruned` keeps, bool ``[B, P]``; text counts if it `drops_text`.

        Args:
            seen: of each layer that the stage reads, its summary.
            visual: bool ``[B, P]``, the visual tokens that these layers hold.
            pruned: the layers.
        """

    def merged(self, keys: Tensor, values: Tensor, kept: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Make Keys and Values ``[B, H, P, D]`` of a layer what is to be stored; most methods change nothing.

        Args:
            keys, values: of the tokens that wait for their seal; not to be written to.
            kept, dropped: bool ``[B, P]``, visual tokens.
        """
        return keys, values
