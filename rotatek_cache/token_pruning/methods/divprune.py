"""DivPrune (arXiv 2503.02175): the most diverse visual tokens, before the language model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.token_pruning.interface import FeatureMethod


@dataclass(frozen=True)
class DivPrune(FeatureMethod):
    """Greedy max-min diversity: each next token is the one whose nearest chosen token is farthest away.

    The distance is 1 less the cosine of two tokens' features. The first token is the one whose nearest other token is
    farthest.

    Args:
        keep: share in (0, 1] of the visual tokens of each image.
    """

    def choose(
        self, features: Tensor, wanted: int, scores: Tensor | None, keys: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Choose tokens; nothing is merged."""
        count = len(features)
        kept = torch.ones(count, dtype=torch.bool, device=features.device)
        if wanted == count:
            return kept, None
        directions = torch.nn.functional.normalize(features.float(), dim=-1)
        distances = 1 - directions @ directions.mT
        distances.fill_diagonal_(torch.inf)
        nearest = distances.amin(1)
        kept = ~kept
        for number in range(wanted):
            best = nearest.masked_fill(kept, -torch.inf).argmax()
            kept[best] = True
            nearest = distances[best].clone() if number == 0 else nearest.minimum(distances[best])
        return kept, None
