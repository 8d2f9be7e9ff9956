"""The identity test: a `RotateKCache` that removes nothing gives what `DynamicCache` gives, on your model and prompt.

report = check_identity(attach(model, visual_token_ids=[151655]), inputs)
print(report)                       # and report.holds

It tells whether a model that no test of this project has seen is wired rightly: visual positions, masks, positions,
attention. `rotatek check` does it with a model's own processor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList

from rotatek_cache.hf.attachment import attachment_of, inner_model
from rotatek_cache.hf.cache import RotateKCache
from rotatek_cache.hf.calls import cache_name
from rotatek_cache.hf.prompt import placeholder_positions

# What is compared with DynamicCache: Keys stored as they are, and as all of their coefficients.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "Keys as they are": {"sparsity": 0},
    "all coefficients": {"sparsity": 1e-6, "always_compress": True},
}


@dataclass(frozen=True)
class Identity:
    """What the identity test has found.

    Attributes:
        rows, prompt: sequences, and the length of the longest.
        visual: visual tokens of each row.
        tokens: that were generated.
        differences: the largest difference of a logit from the one with DynamicCache, by setting.
        same: steps of all rows, of `rows * tokens`, in which the likeliest token is the same, by setting.
        allowed: difference that counts as rounding, the square root of the dtype's epsilon times the logits' deviation.
        segments: compressed segments of all layers, when all coefficients were kept.
    """

    rows: int
    prompt: int
    visual: list[int]
    tokens: int
    differences: Mapping[str, float]
    same: Mapping[str, int]
    allowed: float
    segments: int

    @property
    def holds(self) -> bool:
        """Whether something was compressed, and no logit differs by more than rounding."""
        return self.segments > 0 and all(difference <= self.allowed for difference in self.differences.values())

    def __str__(self) -> str:
        visual = ", ".join(map(str, self.visual))
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        lines = [f"{rows}, {self.prompt} tokens, of which visual: {visual}; {self.segments} compressed segments"]
        lines += [
            f"  {name}: largest difference of a logit {difference:.1e} (rounding: up to {self.allowed:.1e}), the "
            f"same token in {self.same[name]} of {self.rows * self.tokens} steps"
            for name, difference in self.differences.items()
        ]
        return "\n".join([*lines, "  the same as DynamicCache" if self.holds else "  NOT the same as DynamicCache"])


class _Follow:
    """A logits processor that makes generate write given tokens ``[B, prompt + n]``."""

    def __init__(self, sequences: Tensor) -> None:
        self.sequences = sequences

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.sequences[:, ids.shape[1], None], 0)


@torch.no_grad()
def check_identity(model: Any, inputs: Mapping[str, Any], *, tokens: int = 8) -> Identity:
    """Generate with `DynamicCache`, then the same tokens with caches that remove nothing, and compare the logits.

    Args:
        model: an attached model.
        inputs: arguments of its `generate`, as a processor makes them: `input_ids` with visual tokens, and what is
            behind these; several rows are padded on the left.
        tokens: how many to generate.

    Raises:
        ValueError: the model is not attached, or there are no `input_ids` with visual tokens.
    """
    attachment = attachment_of(inner_model(model))
    if attachment is None:
        raise ValueError("model must be attached: rotatek_cache.attach(model), or with visual_token_ids=[...]")
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError(f"inputs must have input_ids, got {', '.join(inputs) or 'nothing'}")
    visual = placeholder_positions(ids, attachment.placeholders).sum(1).tolist()
    if not any(visual):
        found, counts = ids.unique(return_counts=True)
        often = found[counts.argsort(descending=True)[:3]].tolist()
        raise ValueError(
            f"input_ids must hold visual tokens, got none: those of this model are {attachment.placeholders}; the ids "
            f"that occur most often in input_ids are {often}"
        )
    settings = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "num_beams": 1,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    text = model.config.get_text_config(decoder=True)
    dense = model.generate(**inputs, **{cache_name(): DynamicCache(config=text)}, **settings)
    expected = torch.stack(dense.logits).double()
    follow = LogitsProcessorList([_Follow(dense.sequences)])
    differences, same, segments = {}, {}, 0
    for name, options in SETTINGS.items():
        cache = RotateKCache.for_study(**options)
        output = model.generate(**inputs, **{cache_name(): cache}, logits_processor=follow, **settings)
        got = torch.stack(output.logits).double()
        differences[name] = float((got - expected).abs().amax())
        same[name] = int((got.argmax(-1) == expected.argmax(-1)).sum())
        segments = sum(len(layer.segments) for layer in cache.report().layers)
    allowed = float(torch.finfo(model.dtype).eps ** 0.5 * expected.std())
    return Identity(ids.shape[0], ids.shape[1], visual, tokens, differences, same, allowed, segments)
