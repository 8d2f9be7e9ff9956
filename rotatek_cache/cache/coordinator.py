"""The coordinator of a cache: decides when its layers seal, which tokens each keeps and with what options."""

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rotatek_cache.cache.budget import Planner
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.cache.seal_plan import SealPlan
from rotatek_cache.cache.selection import TokenSelection
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.core.precision import without_autocast
from rotatek_cache.token_pruning.interface import AttentionMethod, TokenMethod


class Coordinator:
    """All that concerns several layers of one cache: it sees them attend and tells them to seal.

    Args:
        positions: which positions are visual.
        tokens: the token method, if any.
        planner: divides a budget, if there is one.
    """

    def __init__(
        self, positions: VisualPositions, tokens: TokenMethod | None = None, planner: Planner | None = None
    ) -> None:
        self.positions = positions
        self.selection = TokenSelection(tokens) if isinstance(tokens, AttentionMethod) else None
        self.planner = planner
        self.layers: dict[int, LayerKV] = {}
        self._planned: weakref.ref[SealPlan] | None = None  # the seal that the budget was divided for

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_planned": None}  # nothing of it lasts beyond a forward

    @property
    def needs_layers(self) -> bool:
        """Whether it has to know all layers before the first of them attends."""
        return self.selection is not None or self.planner is not None

    def learn_layers(self, layers: Sequence[LayerKV | None]) -> None:
        """Learn the layers of the model; None is one that keeps the stock cache layer."""
        compressed = {index: layer for index, layer in enumerate(layers) if layer is not None}
        if self.selection is not None:
            self.selection.learn_layers(list(compressed), len(layers))
        if self.planner is not None:
            self.planner.learn_layers(layers)
        self.layers = compressed

    def reset(self) -> None:
        """Forget what was planned, for another prompt."""
        self._planned = None
        if self.planner is not None:
            self.planner.forget()

    def hidden(self, layer: LayerKV) -> Tensor | None:
        """Return bool ``[B, T]``: tokens that a token method has dropped, not to be attended to in this forward."""
        if layer.pending is None:
            return None
        begin, plan = layer.pending.begin, self.positions.known_plan
        dropped = self.positions.dropped_of(begin, layer.length)
        if self.selection is not None and plan is not None and plan.end == layer.length:
            dropped = self.selection.part_of(layer.index, plan).dropped
        return None if dropped is None else torch.nn.functional.pad(dropped, (begin, 0))

    @without_autocast
    def observe(self, layer: LayerKV, query: Tensor, mask: Tensor | None, scale: float | None = None) -> None:
        """See a layer whose attention is done; seal it, and those that waited for it, if the images are complete.

        Args:
            layer: the layer.
            query: queries of this forward ``[B, H_q, Q, D]``; layers that share Keys come one after the other.
            mask: the model's, bool ``[B or 1, 1, Q, T]`` or additive; None is causal.
            scale: factor on the logits, ``D ** -0.5`` by default.
        """
        if layer.pending is None:
            return
        first = layer.keep_queries(query, mask)
        if first is None:
            return  # other layers will attend to the same Keys
        query, mask = first
        plan = self.positions.plan(layer.pending.begin, layer.length, mask, wait=not layer.options.streaming)
        if plan is None:
            return
        self._divide_budget(layer, plan)
        if self.selection is None:
            self._seal(layer, plan)
            return
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        ready = self.selection.decide(layer, plan, query, mask, scale)
        if self.planner is not None and self.planner.rank_open and len(ready) == len(self.layers):
            # No layer has sealed yet, and it is known how many tokens each keeps: their ranks can be planned anew.
            self.planner.divide(layer, plan, [part.counts for _, part in ready])
            self._set_options()
        for index, part in ready:
            self._seal(self.layers[index], part)

    @without_autocast
    def seal_waiting(self, layers: Sequence[LayerKV]) -> None:
        """Seal what waits for text behind an image without it, and so without the weight of any query.

        Raises:
            ValueError: tokens are to be chosen by the attention of that text.
        """
        waiting = [layer for layer in layers if layer.pending is not None]
        if waiting and self.selection is not None:
            raise ValueError(
                f"tokens={self.selection.method} are chosen by the attention of text behind the image, which this "
                "prompt has none of yet: let text follow the image, or choose tokens by features (divprune, visionzip)"
            )
        for layer in waiting:
            assert layer.pending is not None
            layer.pending.window = None
            plan = self.positions.plan(layer.pending.begin, layer.length, None, wait=False)
            assert plan is not None
            self._divide_budget(layer, plan)
            self._seal(layer, plan)
        self.positions.end_forward()

    def _divide_budget(self, layer: LayerKV, plan: SealPlan) -> None:
        """Divide the budget for the prompt that seals by `plan`, once for all layers."""
        if self.planner is None or (self._planned is not None and self._planned() is plan):
            return
        self._planned = weakref.ref(plan)
        made = self.planner.divide(layer, plan)
        if self.selection is not None and self.planner.keep_open:
            self.selection.method = self.selection.method.with_keep(made.keep)
        self._set_options()

    def _set_options(self) -> None:
        assert self.planner is not None
        for layer in self.layers.values():
            layer.use(self.planner.options_of(layer.index))

    def _seal(self, layer: LayerKV, plan: SealPlan) -> None:
        merge, better = None, None
        if self.selection is not None and plan.better is not None:
            better = self.selection.method.options_of_kept(layer.options)
        if self.selection is not None and plan.dropped is not None:
            merge = functools.partial(self.selection.method.merged, kept=plan.visual, dropped=plan.dropped)
        if self.planner is not None and self.planner.made is not None:
            plan = plan.keep_last_dense(self.planner.made.last_dense[layer.index])
        layer.seal(plan, merge, better)
