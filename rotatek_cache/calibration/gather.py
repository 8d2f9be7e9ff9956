"""One pass over images and texts: a model runs, and what stores everything as it is gathers moments on the way."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rotatek_cache.cache.coordinator import Coordinator
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.dense import Dense
from rotatek_cache.codecs.interface import Ranges, StateOptions
from rotatek_cache.codecs.token_rows import SINK_TOKENS
from rotatek_cache.core.fitting import KeyStatistics
from rotatek_cache.core.segments import Stored


@torch.inference_mode(False)  # what is differentiated must not have been made within it
@torch.no_grad()
def calibrate(
    model: torch.nn.Module,
    prompts: Iterable[dict[str, Any]],
    state: Calibration,
    *,
    text: bool = False,
    sensitivity: bool = True,
) -> Calibration:
    """Run the prompts (what a processor returns, one image each) through an attached model and gather moments.

    Args:
        model: a model prepared by `attach`.
        prompts: model inputs with a batch of one and no padding.
        state: what was gathered before, added to.
        text: whether these prompts show the text that will be cached, so that all of their tokens are taken for rows
            of all tokens (``text="coded"``), besides the visual ones for bases of images. Prompts may be text alone
            then, and should be as long as those to come: a Key depends on its position.
        sensitivity: whether the model also answers each prompt and its answer is differentiated, for bases of images
            that weigh errors by what they do to answers (method "fisher"). Questions of several kinds tell more.

    Returns:
        `state`.

    Raises:
        ValueError: the model is in training mode, or has weights that are offloaded or cannot be differentiated by; a
            prompt holds several rows, padding, or no visual token where `text` is not set; or its answer is not finite.
    """
    # The maths needs no transformers.
    from rotatek_cache.calibration.sensitivity import answer_sensitivity, text_sensitivity  # noqa: PLC0415
    from rotatek_cache.hf.cache import RotateKCache, RotateKLayer  # noqa: PLC0415
    from rotatek_cache.hf.calls import cache_argument  # noqa: PLC0415

    _check_model(model, sensitivity=sensitivity)
    projections = output_projections(model)
    for prompt in prompts:
        _check_prompt(prompt, sensitivity=sensitivity)
        cache = RotateKCache(sparsity=0)
        if text:
            cache.coordinator = TokenGatherer(cache.positions, state, projections)
        cache.learn_config(model.config)  # type: ignore[arg-type]
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, RotateKLayer) and isinstance(layer.kv, LayerKV):
                sealer = layer.kv.sealer
                sealer.keys = KeyMoments(sealer.keys.wanted, state)
                sealer.values = ValueMoments(sealer.values.wanted, state, projections.get(index))
        if text:
            # A model of text alone has no hook that says so; one with images says more.
            ids = prompt["input_ids"]
            cache.positions.announce(0, ids.shape[1], None)
        model(**prompt, **cache_argument(model, cache), use_cache=True)
        visual = cache.positions.visual(0, cache.positions.end)
        del cache  # the answer is read from another one
        if visual is None and not text:
            raise ValueError("prompts hold no visual token: give prompts with an image, or text=True for text alone")
        if visual is None:
            if sensitivity:
                layers = sorted({layer for layer, _, _ in state.token_moments})
                found = text_sensitivity(model, prompt["input_ids"], SINK_TOKENS, layers, state.texts)
                state.add_sensitivity("text", found)
            state.texts += 1
        else:
            if sensitivity:
                layers = sorted({layer for layer, _ in state.moments})
                found = answer_sensitivity(model, prompt, visual[0].cpu(), layers, state.images)
                state.add_sensitivity("image", found)
            state.images += 1
    return state


def _check_model(model: torch.nn.Module, *, sensitivity: bool) -> None:
    """Raise a ValueError unless `model` computes what it will compute in use, from weights that can be looked at."""
    if model.training:
        raise ValueError("the model is in training mode, which is not how it will answer: call model.eval() first")
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise ValueError(
                f"{name} is offloaded, and a basis file holds a mark of all weights: load the model with all weights "
                "in memory, in a smaller dtype or on the CPU"
            )
        if sensitivity and weight.is_inference():
            raise ValueError(
                f"{name} was made within torch.inference_mode(), so that nothing can be differentiated: load the model "
                "outside, or calibrate with sensitivity=False (method 'pca')"
            )


def _check_prompt(prompt: Mapping[str, Any], *, sensitivity: bool) -> None:
    """Raise a ValueError unless `prompt` is one row without padding."""
    if prompt.get("input_ids") is None:
        raise ValueError(f"prompts need input_ids, what a processor returns; got {', '.join(prompt)}")
    rows, mask = prompt["input_ids"].shape[0], prompt.get("attention_mask")
    if rows != 1:
        raise ValueError(f"prompts must have one row each, got input_ids of {rows} rows: give them one by one")
    if mask is not None and not mask.all():
        raise ValueError(
            f"prompts must have no padding, got an attention_mask that hides {int((mask == 0).sum())} positions: "
            "process them one by one, with padding=False"
        )
    if sensitivity and prompt.get("position_ids") is not None:
        raise ValueError(
            "prompts must not bring position_ids where sensitivity is gathered: the model numbers prompt and answer "
            "itself; leave them out, or give sensitivity=False"
        )


def output_projections(model: torch.nn.Module) -> dict[int, Tensor]:
    """Find the weight ``[hidden, H_q * D_v]`` of each self-attention's output projection, where it is `o_proj`."""
    found: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        layer, projection = getattr(module, "layer_idx", None), getattr(module, "o_proj", None)
        if isinstance(layer, int) and isinstance(projection, torch.nn.Linear) and "vis" not in name:
            found[layer] = projection.weight.detach()
    return found


class TokenGatherer(Coordinator):
    """A coordinator that gives all tokens of a prompt of one row to a calibration before its layers seal."""

    def __init__(self, positions: VisualPositions, state: Calibration, projections: dict[int, Tensor]) -> None:
        super().__init__(positions)
        self.state, self.projections = state, projections

    def observe(self, layer: LayerKV, query: Tensor, mask: Tensor | None, scale: float | None = None) -> None:
        """Gather the states of a layer, but for the first tokens, which no cache codes."""
        dense = layer.dense()
        assert dense is not None  # nothing of a prompt read at once is sealed yet
        keys, values = (states[0, :, SINK_TOKENS:] for states in dense)
        visual = self.positions.visual(SINK_TOKENS, layer.length)
        visual = torch.zeros(keys.shape[1], dtype=torch.bool, device="cpu") if visual is None else visual[0].cpu()
        for kind, picked in (("text", ~visual), ("image", visual)):
            index = picked.nonzero()[:, 0].to(keys.device)
            for which, states, cost in (
                ("key", keys, query_cost(query[:, :, SINK_TOKENS:], keys.shape[0])),
                ("value", values, output_cost(self.projections.get(layer.index), values)),
            ):
                self.state.add_tokens(layer.index, which, kind, states[:, index], cost)
        super().observe(layer, query, mask, scale)


def query_cost(queries: Tensor, heads: int, valid: Tensor | None = None) -> Tensor | None:
    """Find the second moment ``[H, D, D]`` of one row's queries ``[1, H_q, W, D]``; None where there are none."""
    if not queries.shape[2]:
        return None
    # Mean and scatter are not asked for: only the queries' part of the statistics.
    nothing = queries.new_zeros(heads, 1, queries.shape[-1], dtype=torch.float32)
    count = queries.new_ones(1, dtype=torch.float32)
    found = KeyStatistics(nothing, nothing, count, queries.float(), valid).query_moment()
    return None if found is None else found[:, 0]


def output_cost(projection: Tensor | None, values: Tensor) -> Tensor | None:
    """Find what the output projection ``[hidden, H_q * D_v]`` makes of errors of Values ``[H, S, D_v]``."""
    heads, _, width = values.shape
    if projection is None or projection.shape[1] % (heads * width):
        return None
    columns = projection.float().unflatten(1, (heads, -1, width))  # [hidden, H, G, D_v]
    return torch.einsum("ohgd,ohge->hde", columns, columns)


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
                row_valid = None if valid is None else valid[row : row + 1]
                cost = query_cost(queries[row : row + 1], states.shape[0], row_valid)
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
        cost = output_cost(self.projection, states)
        for start, length in ranges:
            self.state.add(self.wanted.layer, "value", states[:, start : start + length], cost)
        return super().store(states, ranges, queries, valid)
