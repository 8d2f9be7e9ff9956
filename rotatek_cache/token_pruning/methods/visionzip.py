"""VisionZip (arXiv 2412.04467): the tokens that the vision encoder itself attends to, and merged ones for the rest."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from rotatek_cache.token_pruning.interface import FeatureMethod


@dataclass(frozen=True)
class VisionZip(FeatureMethod):
    """Dominant tokens by the encoder's attention, contextual ones by merging, before the language model.

    Dominant are the tokens to which the class token attends most in the layer that the features come from; in encoders
    without one, those that receive most attention from all. Of the others, evenly spaced targets are kept, and each of
    the rest goes to the target with the most similar Key (cosine of the Keys' mean over heads). A target becomes itself
    plus the mean of what it was given, as in the authors' code; the paper's text calls that merging. Here it happens
    behind the projector, so that it is the same for all families. A visual token that shows several patches has the
    mean of their attention and Keys; one that shows none (a line break) is kept last and not merged. Kept and merged
    tokens keep their positions.

    Args:
        keep: share in (0, 1] of the visual tokens of each image, dominant and contextual together.
        contextual: share of the visual tokens that are contextual; the rest of `keep` is dominant. Where a budget sets
            `keep`, at most a quarter of it.
    """

    contextual: float = 0.05
    reads_encoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("contextual")
        if self.keep is not None and self.contextual > self.keep:
            raise ValueError(f"VisionZip: contextual must be at most keep={self.keep}, got {self.contextual}")

    def with_keep(self, keep: float) -> Self:
        """Return the method with another share, of which contextual tokens are a quarter at most."""
        return dataclasses.replace(self, keep=keep, contextual=min(self.contextual, keep / 4))

    def choose(
        self, features: Tensor, wanted: int, scores: Tensor | None, keys: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Choose dominant and contextual tokens, and which of the latter takes in each of the rest."""
        assert scores is not None
        assert keys is not None
        count = len(features)
        patches = int(scores.isfinite().sum())
        chosen = min(wanted, patches)
        contextual = min(round(self.contextual * count), chosen)
        order = scores.argsort(descending=True, stable=True)  # what shows no patch comes last
        kept = torch.zeros(count, dtype=torch.bool, device=features.device)
        kept[order[: chosen - contextual]] = True
        others = (~kept & scores.isfinite()).nonzero()[:, 0]
        kept[order[patches : patches + wanted - chosen]] = True
        if not contextual:
            return kept, None
        places = torch.arange(contextual, device=others.device) * (len(others) // contextual)
        is_target = torch.zeros(len(others), dtype=torch.bool, device=others.device)
        is_target[places] = True
        targets, rest = others[is_target], others[~is_target]
        directions = torch.nn.functional.normalize(keys, dim=-1)
        taken_by = torch.full((count,), -1, dtype=torch.long, device=features.device)
        if len(rest):
            taken_by[rest] = targets[(directions[rest] @ directions[targets].mT).argmax(-1)]
        kept[targets] = True
        return kept, taken_by

    def merged(self, features: Tensor, taken_by: Tensor) -> Tensor:
        """Add to each target the mean of the tokens that it takes in."""
        rest = (taken_by >= 0).nonzero()[:, 0]
        target = taken_by[rest]
        given = torch.zeros_like(features, dtype=torch.float32).index_add(0, target, features[rest].float())
        members = given.new_zeros(len(features)).index_add(0, target, given.new_ones(len(rest)))
        return (features.float() + given / members.clamp(min=1)[:, None]).to(features.dtype)
