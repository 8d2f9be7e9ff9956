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


SCOPES = ("visual", "prompt")


@dataclass(frozen=True)
class VLCache(AttentionMethod):
    """Keeps the tokens that the queries behind the image attend to most, more of them where attention is dense.

    With gamma the share of a layer's causal weights below 1 % of their row's largest, a layer keeps
    ``keep * L * (1 - gamma) / sum(1 - gamma)`` of the tokens, at least 1 % and at most all; what a full layer cannot
    take goes to the others, so that the budgets sum to the whole (in the paper it is lost). A token's score is the sum
    of its weights over queries and heads.

    The paper's budget is of the whole prompt, text and image alike, and its recent window is that of the prompt's last
    tokens: ``scope="prompt"``. With ``scope="visual"`` text is never dropped, which costs few bytes beside an image,
    and the recent window is that of the last visual tokens.

    Every layer must have attended before any can drop tokens, so during the prefill all layers are held densely.

    Args:
        keep: share in (0, 1] of the tokens, on average over layers.
        recent: share of a layer's budget that goes to its last tokens.
        uniform: share of the budget that all layers get alike (0 in the paper); 0.8 keeps late layers from starving at
            small budgets.
        scope: "visual" tokens alone, or all of the "prompt" that comes with an image.
    """

    recent: float = 0.1
    uniform: float = 0.0
    scope: str = "visual"
    pools_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("recent")
        self._check_share("uniform")
        if self.scope not in SCOPES:
            raise ValueError(f"VLCache: scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")

    @property
    def drops_text(self) -> bool:
        """Whether text counts."""
        return self.scope == "prompt"

    def summarise(self, rows: AttentionRows) -> Summary:
        """Sum up columns ``[B, P]``; count sparse causal weights, and all of them ``[B]``; count columns' queries.

        The last is ``[B, P]``, how many queries see each token: 0 for padding and for what comes behind the prompt.
        """
        largest = rows.weights.amax(-1, keepdim=True)
        sparse = (rows.weights < SPARSE_BELOW * largest) & rows.seen[:, None]
        total = rows.seen.sum((1, 2)) * rows.weights.shape[1]
        return rows.weights.sum((1, 2)), sparse.sum((1, 2, 3)), total, rows.seen.sum(1)

    def select(self, seen: Mapping[int, Summary], visual: Tensor, pruned: Sequence[int]) -> dict[int, Tensor]:
        """Choose the recent and the best tokens of each layer's budget."""
        scores, _, _, readers = seen[pruned[0]]
        candidates = readers > 0 if self.drops_text else visual.to(scores.device)
        budgets = self.layer_budgets(seen, candidates.sum(1), pruned)
        kept = {}
        for layer, budget in zip(pruned, budgets, strict=True):
            recent = (budget.double() * self.recent).floor().long()
            from_end = candidates.flip(1).cumsum(1).flip(1)  # 1 for the last one, 2 for the one before
            window = candidates & (from_end <= recent[:, None])
            best = best_tokens(seen[layer][0], candidates & ~window, budget - recent)
            kept[layer] = window | best | ~candidates if self.drops_text else window | best
        return kept

    def layer_budgets(self, seen: Mapping[int, Summary], counts: Tensor, pruned: Sequence[int]) -> Tensor:
        """Deal out how many of the `counts` ``[B]`` that may be dropped the layers `pruned` keep: ``[L, B]``."""
        parts = (seen[layer][1:3] for layer in pruned)
        dense = torch.stack([1 - sparse / total.clamp(min=1) for sparse, total in parts])
        adaptive = dense.double() / dense.double().sum(0).clamp_min(1e-300)
        shares = self.uniform / len(pruned) + (1 - self.uniform) * adaptive
        least = share_of(counts, min(self.share, LEAST_SHARE))
        return spread(shares, share_of(len(pruned) * counts, self.share), least, counts)
