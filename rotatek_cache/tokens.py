"""Token pruning: which visual tokens each layer keeps, beside how many channels it keeps of them.

A token method names the visual tokens that each layer keeps. An `AttentionMethod` looks at the attention that text
queries pay to them in some or all layers; only the rows that it asks for are computed, from the layer's Keys before
their seal, and the model's own attention stays as it is. A `FeatureMethod` looks at the image's features, before the
language model. Dropped tokens are never stored; positions and masks of the others stay what they were.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from rotatek_cache.attention import MAX_SCORES, causal_mask
from rotatek_cache.ledger import SealPlan

if TYPE_CHECKING:
    from rotatek_cache.layer import LayerKV

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
    """

    weights: Tensor
    seen: Tensor
    valid: Tensor
    visual: Tensor


@dataclass(frozen=True)
class TokenMethod:
    """A way to choose visual tokens; the settings of one, without state.

    Args:
        keep: share in (0, 1] of the visual tokens that the method keeps (of which layers: see the method); None where
            a budget is to set it.
    """

    keep: float | None = None

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
        """The same method with another share."""
        return dataclasses.replace(self, keep=keep)


@dataclass(frozen=True)
class FeatureMethod(TokenMethod, abc.ABC):
    """Chooses from an image's features, before the language model.

    Attributes:
        reads_encoder: needs attention and Keys of the vision encoder, not only the features.
    """

    reads_encoder: ClassVar[bool] = False

    def count_of(self, tokens: int) -> int:
        """How many of an image's `tokens` the share keeps."""
        return max(1, round(self.share * tokens))

    @abc.abstractmethod
    def choose(
        self, features: Tensor, wanted: int, scores: Tensor | None, keys: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens of one image that stay, and the ones that take the others in.

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
        """Features ``[n, d]`` of which kept tokens have taken in others, as `choose` says; dropped ones matter not."""
        raise NotImplementedError(f"{type(self).__name__} merges nothing")


@dataclass(frozen=True)
class AttentionMethod(TokenMethod, abc.ABC):
    """Chooses by the attention that text pays to visual tokens inside the language model.

    Attributes:
        last_query_only: read the prompt's last query only, not all of those behind the last visual token.
        in_parts: the summary of many queries is the sum of those of their parts, so that memory can be bounded.
        layer_by_layer: each layer's tokens follow from its own attention, so that none has to wait for the others.
        pools_layers: `keep` is that of all layers together, of which some keep more than others.
        alike: all layers that drop tokens drop the same ones.
    """

    last_query_only: ClassVar[bool] = False
    in_parts: ClassVar[bool] = True
    layer_by_layer: ClassVar[bool] = False
    pools_layers: ClassVar[bool] = False
    alike: ClassVar[bool] = False

    def check_layers(self, compressed: Sequence[int], layers: int) -> None:
        """Raise if the method cannot work where only the layers `compressed` of `layers` are ours."""

    def watched(self, compressed: Sequence[int]) -> Sequence[int]:
        """Layers whose attention is read, in order; tokens are chosen once the last of them has attended."""
        return compressed

    def pruned(self, compressed: Sequence[int]) -> Sequence[int]:
        """Layers that drop tokens."""
        return compressed

    @abc.abstractmethod
    def summarise(self, rows: AttentionRows) -> Summary:
        """What is kept of a layer's attention: tensors that add up over parts of the queries."""

    @abc.abstractmethod
    def select(self, seen: Mapping[int, Summary], visual: Tensor, pruned: Sequence[int]) -> dict[int, Tensor]:
        """The tokens that each layer of `pruned` keeps: bool ``[B, P]``, within `visual` ``[B, P]``."""

    def merged(self, keys: Tensor, values: Tensor, kept: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and Values ``[B, H, P, D]`` of a layer as they are to be stored; most methods change nothing.

        Args:
            keys, values: of the tokens that wait for their seal; not to be written to.
            kept, dropped: bool ``[B, P]``, visual tokens.
        """
        return keys, values


def share_of(counts: Tensor, keep: float) -> Tensor:
    """How many tokens a share `keep` of `counts` is: int64, rounded, at least one where there are any."""
    return (counts.double() * keep).round().long().clamp(min=1).minimum(counts)


def best_tokens(scores: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
    """bool ``[B, P]``: the `counts` ``[B]`` best of the candidates of each row; earlier tokens win ties."""
    ranked = scores.double().masked_fill(~candidates, -math.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.empty_like(ranked).scatter_(1, ranked, torch.arange(ranked.shape[1]).to(ranked).expand_as(ranked))
    return (places < counts[:, None]) & candidates


def spread(shares: Tensor, total: Tensor, least: Tensor, capacity: Tensor) -> Tensor:
    """Whole numbers ``[L, B]`` in proportion to `shares` that sum to `total` ``[B]``, each in `least` to `capacity`.

    What a layer cannot take goes to the others in proportion, so that nothing of the total is lost; the parts below one
    are dealt out largest first.
    """
    shares, layers = shares.double(), shares.shape[0]
    limit, low = capacity.double().expand_as(shares), least.double().expand_as(shares)
    total = total.minimum(layers * capacity).maximum(layers * least).double()
    found = low.clone()
    fixed = torch.zeros_like(shares, dtype=torch.bool)
    for _ in range(2 * layers):  # each round fixes a layer, or none is left to fix
        free = shares.masked_fill(fixed, 0.0)
        rest = total - found.masked_fill(~fixed, 0.0).sum(0)
        part = free / free.sum(0).clamp_min(1e-300) * rest
        found = torch.where(fixed, found, part)
        # Excess and lack at once would correct each other's excess: the larger is settled first.
        over, under = (part - limit).clamp_min(0) * ~fixed, (low - part).clamp_min(0) * ~fixed
        settle_over = over.sum(0) >= under.sum(0)
        hit = torch.where(settle_over, over > 0, under > 0)
        if not bool(hit.any()):
            break
        found = torch.where(hit, torch.where(settle_over, limit, low), found)
        fixed |= hit
    whole = found.add(1e-9).floor()
    left = (total - whole.sum(0)).round().long()
    remainder = (found - whole).masked_fill(whole >= limit, -1.0)
    order = remainder.argsort(dim=0, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(layers).to(order)[:, None].expand_as(order))
    return (whole.long() + (place < left)).minimum(capacity)


class TokenSelection:
    """Lets the layers of one cache decide together: what they have seen in this forward, and what each keeps."""

    def __init__(self, method: AttentionMethod) -> None:
        self.method = method
        self.compressed: tuple[int, ...] = ()
        self._forget()

    def _forget(self, plan: SealPlan | None = None) -> None:
        self._plan = plan
        self._seen: dict[int, Summary] = {}
        self._kept: dict[int, Tensor] | None = None
        self._waiting: list[LayerKV] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenSelection":
        copy = TokenSelection(self.method)  # nothing lasts beyond a forward
        copy.compressed = self.compressed
        return copy

    def learn_layers(self, compressed: Sequence[int], layers: int) -> None:
        """Learn which of the model's `layers` layers are ours (the others keep the stock cache layer)."""
        self.method.check_layers(compressed, layers)
        self.compressed = tuple(compressed)

    def kept(self, layer: int, plan: SealPlan | None) -> Tensor | None:
        """bool ``[B, P]``: what has been decided for a layer that seals by `plan`; None if nothing has been."""
        if plan is None or plan is not self._plan or self._kept is None:
            return None
        return self._kept.get(layer)

    def decide(
        self, layer: "LayerKV", plan: SealPlan, query: Tensor, mask: Tensor | None, scale: float
    ) -> list[tuple["LayerKV", Tensor | None]]:
        """See a layer attend; returns the layers that can seal now, with what each keeps (None: all).

        Args:
            layer: the layer, with its tokens pending.
            plan: their seal, the same object for all layers of a forward.
            query: queries of this forward ``[B, H_q, Q, D]``.
            mask: the model's mask, bool ``[B or 1, 1, Q, T]`` or additive.
            scale: factor on the logits.
        """
        if self.method.layer_by_layer:
            seen = self._summary(layer, plan, query, mask, scale)
            return [(layer, self.method.select({layer.index: seen}, plan.visual, (layer.index,))[layer.index])]
        if plan is not self._plan:
            self._forget(plan)
        watched = self.method.watched(self.compressed)
        if layer.index in watched and self._kept is None:
            self._seen[layer.index] = self._summary(layer, plan, query, mask, scale)
            if layer.index == watched[-1]:
                pruned = self.method.pruned(self.compressed)
                self._kept = self.method.select(self._seen, plan.visual, pruned)
        self._waiting.append(layer)
        kept, pruned = self._kept, self.method.pruned(self.compressed)
        ready = [held for held in self._waiting if kept is not None or held.index not in pruned]
        self._waiting = [held for held in self._waiting if held not in ready]
        if layer.index == self.compressed[-1]:
            self._forget()
        return [(held, None if kept is None else kept.get(held.index)) for held in ready]

    def _summary(self, layer: "LayerKV", plan: SealPlan, query: Tensor, mask: Tensor | None, scale: float) -> Summary:
        queries = query.shape[2]
        valid = plan.queries_behind_visual(last_only=self.method.last_query_only)[:, -queries:].to(query.device)
        begin = int(valid.any(0).int().argmax())  # queries before it are nobody's
        columns = plan.end - plan.begin
        size = max(1, MAX_SCORES // max(1, query.shape[0] * query.shape[1] * columns))
        size = size if self.method.in_parts else queries
        visual = plan.visual.to(query.device)
        visible = self._visible(mask, queries, layer.length, query.device)
        total: Summary | None = None
        for start in range(begin, queries, size):
            chosen = slice(start, min(start + size, queries))
            seen = visible[:, chosen]
            weights = layer.pending_attention(query[:, :, chosen], seen, scale)
            part = valid[:, chosen]
            seen = seen[..., plan.begin :] & part[..., None]
            rows = AttentionRows(weights * seen[:, None], seen, part, visual)
            summary = self.method.summarise(rows)
            total = summary if total is None else tuple(a + b for a, b in zip(total, summary, strict=True))
        assert total is not None
        return total

    @staticmethod
    def _visible(mask: Tensor | None, queries: int, tokens: int, device: torch.device) -> Tensor:
        """bool ``[B or 1, Q, T]``."""
        if mask is None:
            return causal_mask(queries, tokens, device)[:, 0]
        return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
