"""Let the layers of one cache decide together which visual tokens each keeps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.cache.seal_plan import SealPlan
from rotatek_cache.cache.visual_positions import seen_by_mask
from rotatek_cache.core.attention import MAX_SCORES, causal_mask
from rotatek_cache.token_pruning.interface import AttentionMethod, AttentionRows, HeadChoice, Stage, Summary


class TokenSelection:
    """The tokens that each layer of a cache keeps, chosen by a method from what the layers see in one forward."""

    def __init__(self, method: AttentionMethod) -> None:
        self.method = method
        self.compressed: tuple[int, ...] = ()
        self._forget()

    def _forget(self, plan: SealPlan | None = None) -> None:
        self._plan = plan
        self._seen: dict[int, Summary] = {}
        self._kept: dict[int, Tensor | HeadChoice] = {}
        self._stages: list[Stage] = [] if plan is None else list(self.method.stages(self.compressed))  # still to come
        self._waiting: list[int] = []  # layers that have attended and are not decided on

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenSelection":
        copy = TokenSelection(self.method)  # nothing lasts beyond a forward
        copy.compressed = self.compressed
        return copy

    def learn_layers(self, compressed: Sequence[int], layers: int) -> None:
        """Learn which of the model's `layers` layers are ours (the others keep the stock cache layer)."""
        self.method.check_layers(compressed, layers)
        self.compressed = tuple(compressed)

    def part_of(self, layer: int, plan: SealPlan) -> SealPlan:
        """Return the part of `plan` that a layer keeps, `plan` itself while no stage has decided on that."""
        return plan if plan is not self._plan else self._keeping(layer, plan)

    def _keeping(self, layer: int, plan: SealPlan) -> SealPlan:
        kept = self._kept.get(layer)
        if isinstance(kept, HeadChoice):
            return plan.dividing(kept)
        return plan.keeping(kept, text_too=self.method.drops_text) if self.method.drops else plan.preferring(kept)

    def decide(
        self, layer: LayerKV, plan: SealPlan, query: Tensor, mask: Tensor | None, scale: float
    ) -> list[tuple[int, SealPlan]]:
        """See a layer attend; returns the layers that can seal now, with the part of `plan` that each keeps.

        Args:
            layer: the layer, with its tokens pending.
            plan: their seal, the same object for all layers of a forward.
            query: queries of this forward ``[B, H_q, Q, D]``.
            mask: the model's mask, bool ``[B or 1, 1, Q, T]`` or additive.
            scale: factor on the logits.
        """
        if plan is not self._plan:
            self._forget(plan)
        if self._stages and layer.index in self._stages[0].watched:
            self._seen[layer.index] = self._summary(layer, plan, query, mask, scale)
            if layer.index == self._stages[0].watched[-1]:
                held = self._keeping(layer.index, plan).visual
                self._kept |= self.method.select(self._seen, held, self._stages.pop(0).pruned)
                self._seen = {}
        self._waiting.append(layer.index)
        undecided = {index for stage in self._stages for index in stage.pruned}
        ready = [(index, self._keeping(index, plan)) for index in self._waiting if index not in undecided]
        self._waiting = [index for index in self._waiting if index in undecided]
        if layer.index == self.compressed[-1]:
            self._forget()
        return ready

    def _summary(self, layer: LayerKV, plan: SealPlan, query: Tensor, mask: Tensor | None, scale: float) -> Summary:
        queries = query.shape[2]
        valid = plan.queries_behind_visual(last_only=self.method.last_query_only)[:, -queries:].to(query.device)
        begin = int(valid.any(0).int().argmax())  # the method asked for no query before it
        columns = plan.end - plan.begin
        size = max(1, MAX_SCORES // max(1, query.shape[0] * query.shape[1] * columns))
        size = size if self.method.in_parts else queries
        visual = plan.visual.to(query.device)
        visible = self._visible(mask, queries, layer.length, query.device)
        dropped = self._keeping(layer.index, plan).dropped
        if dropped is not None:  # the layer does not attend to them
            gone = torch.nn.functional.pad(dropped.to(query.device), (plan.begin, 0))
            visible = visible & ~gone[:, None]
        total: Summary | None = None
        for start in range(begin, queries, size):
            chosen = slice(start, min(start + size, queries))
            seen = visible[:, chosen]
            weights = layer.pending_attention(query[:, :, chosen], seen, scale)
            part = valid[:, chosen]
            seen = seen[..., plan.begin :] & part[..., None]
            assert layer.shape is not None
            rows = AttentionRows(weights * seen[:, None], seen, part, visual, layer.shape[1])
            summary = self.method.summarise(rows)
            total = summary if total is None else tuple(a + b for a, b in zip(total, summary, strict=True))
        assert total is not None
        return total

    @staticmethod
    def _visible(mask: Tensor | None, queries: int, tokens: int, device: torch.device) -> Tensor:
        """Return bool ``[B or 1, Q, T]``."""
        if mask is None:
            return causal_mask(queries, tokens, device)[:, 0]
        return seen_by_mask(mask[:, 0])
