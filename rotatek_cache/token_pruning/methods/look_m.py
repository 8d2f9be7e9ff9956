"""LOOK-M (arXiv 2406.18139): text stays, visual tokens are evicted by attention and merged into those that stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.token_pruning.interface import AttentionMethod, AttentionRows, Stage, Summary
from rotatek_cache.token_pruning.selection import best_share

MERGES = ("pivotal", "average", "weighted", "none")


@dataclass(frozen=True)
class LookM(AttentionMethod):
    """Keeps the visual tokens that are attended to most, and merges each other one into the most similar of them.

    Text has priority to the point that all of it stays. Scores are sums of attention over heads and over the queries
    behind the image, not over those of the whole prompt, whose attention would have to be computed a second time. The
    same share stays in every layer, and, unlike in the authors' code, the same tokens in all heads. An evicted token's
    Key and Value go, head by head, into the kept visual token whose Key has the largest cosine with its own: kept
    tokens become the mean of themselves and of what they are given, which is the evicted token itself ("average"), its
    mean with the kept one ("pivotal"), or its multiple by the cosine ("weighted").

    Args:
        keep: share in (0, 1] of the visual tokens of each layer.
        merge: "pivotal", "average", "weighted", or "none", which only evicts.
    """

    merge: str = "pivotal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge not in MERGES:
            raise ValueError(f"LookM: merge must be one of {', '.join(MERGES)}, got {self.merge!r}")

    def stages(self, compressed: Sequence[int]) -> Sequence[Stage]:
        """Take each layer by itself."""
        return tuple(Stage((layer,), (layer,)) for layer in compressed)

    def summarise(self, rows: AttentionRows) -> Summary:
        """Sum up columns ``[B, P]``."""
        return (rows.weights.sum((1, 2)),)

    def select(self, seen: Mapping[int, Summary], visual: Tensor, pruned: Sequence[int]) -> dict[int, Tensor]:
        """Choose the best tokens of each layer."""
        return best_share({layer: seen[layer][0] for layer in pruned}, visual, self.share)

    def merged(self, keys: Tensor, values: Tensor, kept: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Merge the dropped tokens of Keys and Values ``[B, H, P, D]`` into the kept visual ones."""
        if self.merge == "none" or not bool(dropped.any()):
            return keys, values
        keys, values = keys.clone(), values.clone()
        for row in range(keys.shape[0]):
            pivots, gone = kept[row].nonzero()[:, 0], dropped[row].nonzero()[:, 0]
            if not len(gone):
                continue
            directions = torch.nn.functional.normalize(keys[row].float(), dim=-1)
            cosine, nearest = (directions[:, gone] @ directions[:, pivots].mT).max(-1)  # [H, gone]
            members = torch.ones(keys.shape[1], len(pivots), dtype=torch.float32, device=keys.device)
            members.scatter_add_(1, nearest, torch.ones_like(cosine))
            for states in (keys, values):
                own, given = states[row][:, pivots].float(), states[row][:, gone].float()
                index = nearest[..., None].expand_as(given)
                if self.merge == "pivotal":
                    given = (given + own.gather(1, index)) / 2
                elif self.merge == "weighted":
                    given = given * cosine[..., None]
                mean = own.scatter_add(1, index, given) / members[..., None]
                states[row, :, pivots] = mean.to(states.dtype)
        return keys, values
