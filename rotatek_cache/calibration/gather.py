"""One pass over images: a model runs, and codecs that store everything as it is gather moments on the way."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.dense import Dense
from rotatek_cache.codecs.interface import Ranges, StateOptions
from rotatek_cache.core.fitting import KeyStatistics
from rotatek_cache.core.segments import Stored


@torch.no_grad()
def calibrate(model: torch.nn.Module, prompts: Iterable[dict[str, Any]], state: Calibration) -> Calibration:
    """Run the prompts (what a processor returns, one image each) through an attached model and gather moments.

    Args:
        model: a model prepared by `attach`.
        prompts: model inputs with a batch of one.
        state: what was gathered before, added to.

    Returns:
        `state`.
    """
    # The maths needs no transformers.
    from rotatek_cache.hf.cache import RotateKCache, RotateKLayer  # noqa: PLC0415
    from rotatek_cache.hf.calls import cache_argument  # noqa: PLC0415

    projections = output_projections(model)
    for prompt in prompts:
        cache = RotateKCache(sparsity=0)
        cache.learn_config(model.config)  # type: ignore[arg-type]
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, RotateKLayer):
                sealer = layer.kv.sealer
                sealer.keys = KeyMoments(sealer.keys.wanted, state)
                sealer.values = ValueMoments(sealer.values.wanted, state, projections.get(index))
        model(**prompt, **cache_argument(model, cache), use_cache=True)
        state.images += 1
    return state


def output_projections(model: torch.nn.Module) -> dict[int, Tensor]:
    """Find the weight ``[hidden, H_q * D_v]`` of each self-attention's output projection, where it is `o_proj`."""
    found: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        layer, projection = getattr(module, "layer_idx", None), getattr(module, "o_proj", None)
        if isinstance(layer, int) and isinstance(projection, torch.nn.Linear) and "vis" not in name:
            found[layer] = projection.weight.detach()
    return found


class KeyMoments(Dense):
    """Stores Keys as they are and gives them to a calibration, with the moment of each row's queries."""

    def __init__(self, wanted: StateOptions, state: Calibration) -> None:
        super().__init__(wanted)
        self.state = state

    def store(
        self, states: Tensor, ranges: Ranges, queries: Tensor | None = None, valid: Tensor | None = None
    ) -> Stored:
        """Gather the Keys of each row."""
        for row, (start, length) in enumerate(ranges):
            cost = None
            if queries is not None:
                # Mean and scatter are not asked for: only the queries' part of the statistics.
                nothing = states.new_zeros(states.shape[0], 1, states.shape[-1], dtype=torch.float32)
                row_valid = None if valid is None else valid[row : row + 1]
                stats = KeyStatistics(
                    nothing, nothing, states.new_ones(1, dtype=torch.float32), queries[row : row + 1].float(), row_valid
                )
                found = stats.query_moment()
                cost = None if found is None else found[:, 0]
            self.state.add(self.wanted.layer, "key", states[:, start : start + length], cost)
        return super().store(states, ranges, queries, valid)


class ValueMoments(Dense):
    """Stores Values as they are and gives them to a calibration, with what the output projection makes of an error."""

    def __init__(self, wanted: StateOptions, state: Calibration, projection: Tensor | None) -> None:
        super().__init__(wanted)
        self.state = state
        self.projection = projection

    def store(
        self, states: Tensor, ranges: Ranges, queries: Tensor | None = None, valid: Tensor | None = None
    ) -> Stored:
        """Gather the Values of each row."""
        heads, _, width = states.shape
        cost = None
        if self.projection is not None and self.projection.shape[1] % (heads * width) == 0:
            columns = self.projection.float().unflatten(1, (heads, -1, width))  # [hidden, H, G, D_v]
            cost = torch.einsum("ohgd,ohge->hde", columns, columns)
        for start, length in ranges:
            self.state.add(self.wanted.layer, "value", states[:, start : start + length], cost)
        return super().store(states, ranges, queries, valid)
