"""VL-Cache (arXiv 2410.23317): layer budgets by the sparsity of attention, tokens by what later text reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rotatek_cache.token_pruning.interface import AttentionMethod, AttentionRows, Summary
from rotatek_cache.token_pruning.selection import best_tokens, share_of, spread

SPARSE_BELOW = 0.01  # of the largest weight of its row
LEAST_SHARE = 0.01  # of the visual tokens that a layer keeps at any sparsity


@dataclass(frozen=True)
class VLCache(AttentionMethod):
    """Keeps the tokens that the queries behind the image attend to most, more of them where attention is dense.

    With gamma the share of a layer's causal weights below 1 % of their row's largest, a layer keeps
    ``keep * L * (1 - gamma) / sum(1 - gamma)`` of the visual tokens, at least 1 % and at most all; what a full layer
    cannot take goes to the others, so that the budgets sum to the whole. A token's score is the sum of its weights over
    queries and heads. Text is never dropped here: the recent window is that of the last visual tokens.

    Every layer must have attended before any can drop tokens, so during the prefill all layers are held densely.

    Args:
        keep: share in (0, 1] of the visual tokens, on average over layers.
        recent: share of a layer's budget that goes to its last visual tokens.
        uniform: share of the budget that all layers get alike (0 in the paper); 0.8 keeps late layers from starving at
            small budgets.
    """

    recent: float = 0.1
    uniform: float = 0.0
    pools_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("recent")
        self._check_share("uniform")

    def summarise(self, rows: AttentionRows) -> Summary:
        """Column sums ``[B, P]``, and per row how many causal weights are sparse, and how many there are, ``[B]``."""
        largest = rows.weights.amax(-1, keepdim=True)
        sparse = (rows.weights < SPARSE_BELOW * largest) & rows.seen[:, None]
        return rows.weights.sum((1, 2)), sparse.sum((1, 2, 3)), rows.seen.sum((1, 2)) * rows.weights.shape[1]

    def select(self, seen: Mapping[int, Summary], visual: Tensor, pruned: Sequence[int]) -> dict[int, Tensor]:
        """The recent and the best tokens of each layer's budget."""
        visual = visual.to(seen[pruned[0]][0].device)
        budgets = self.layer_budgets(seen, visual.sum(1), pruned)
        kept = {}
        for layer, budget in zip(pruned, budgets, strict=True):
            recent = (budget.double() * self.recent).floor().long()
            from_end = visual.flip(1).cumsum(1).flip(1)  # 1 for the last visual token, 2 for the one before
            window = visual & (from_end <= recent[:, None])
            kept[layer] = window | best_tokens(seen[layer][0], visual & ~window, budget - recent)
        return kept

    def layer_budgets(self, seen: Mapping[int, Summary], counts: Tensor, pruned: Sequence[int]) -> Tensor:
        """Tokens ``[L, B]`` that the layers `pruned` keep of the `counts` ``[B]`` visual tokens."""
        dense = torch.stack([1 - sparse / total.clamp(min=1) for _, sparse, total in (seen[layer] for layer in pruned)])
        adaptive = dense.double() / dense.double().sum(0).clamp_min(1e-300)
        shares = self.uniform / len(pruned) + (1 - self.uniform) * adaptive
        least = share_of(counts, min(self.share, LEAST_SHARE))
        return spread(shares, share_of(len(pruned) * counts, self.share), least, counts)
