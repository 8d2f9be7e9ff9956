"""VisionZip (arXiv 2412.04467): the tokens that the vision encoder itself attends to, and merged ones for the rest."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rotatek_cache.tokens import FeatureMethod


@dataclass(frozen=True)
class VisionZip(FeatureMethod):
    """Dominant tokens by the encoder's attention, contextual ones by merging, before the language model.

    Dominant are the tokens to which the class token attends most in the layer that the features come from; in encoders
    without one, those that receive most attention from all. Of the others, evenly spaced targets are kept, and each of
    the rest is averaged into the target with the most similar Key (cosine). Merging happens behind the projector, so
    that it is the same for all families. Kept and merged tokens keep their positions.

    Args:
        keep: share in (0, 1] of the visual tokens of each image, dominant and contextual together.
        contextual: share of the visual tokens that are contextual; the rest of `keep` is dominant.
    """

    contextual: float = 0.05
    reads_encoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("contextual")
        if self.keep is not None and self.contextual > self.keep:
            raise ValueError(f"VisionZip: contextual must be at most keep={self.keep}, got {self.contextual}")

    def choose(self, features: Tensor, scores: Tensor | None, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """Dominant and contextual tokens, and the features with the others merged into the contextual ones."""
        assert scores is not None
        assert keys is not None
        count = len(features)
        kept_count = max(1, round(self.share * count))
        contextual = min(round(self.contextual * count), kept_count)
        order = scores.argsort(descending=True, stable=True)
        kept = torch.zeros(count, dtype=torch.bool, device=features.device)
        kept[order[: kept_count - contextual]] = True
        if not contextual:
            return kept, features
        others = (~kept).nonzero()[:, 0]
        places = torch.arange(contextual, device=others.device) * (len(others) // contextual)
        is_target = torch.zeros(len(others), dtype=torch.bool, device=others.device)
        is_target[places] = True
        targets, rest = others[is_target], others[~is_target]
        directions = torch.nn.functional.normalize(keys, dim=-1)
        nearest = (directions[rest] @ directions[targets].mT).argmax(-1) if len(rest) else rest
        total = features[targets].float().index_add(0, nearest, features[rest].float())
        members = torch.ones(contextual, device=features.device).index_add(
            0, nearest, torch.ones(len(rest), device=features.device)
        )
        kept[targets] = True
        merged = features.clone()
        merged[targets] = (total / members[:, None]).to(features.dtype)
        return kept, merged
