"""HybridKV (arXiv 2604.05887): heads that look at few tokens keep those, the others keep all and retrieve chunks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rotatek_cache.token_pruning.interface import AttentionMethod, AttentionRows, HeadChoice, Summary
from rotatek_cache.token_pruning.selection import best_tokens, share_of, spread

TOP = 0.1  # share of the visual tokens, the best of a head, whose attention says how concentrated it is


@dataclass(frozen=True)
class HybridKV(AttentionMethod):
    """Classes KV heads by how concentrated the text's attention to the image is, and shares a budget of reads.

    Concentration is how much of the attention that text behind the image pays to visual tokens goes to the best tenth
    of them. Heads at `static` or above are static: they keep the best tokens of their budget, chosen once by that text,
    and drop the others. The rest are dynamic: they store all visual tokens, and each decode step reads the chunks of
    their budget whose mean Key has the largest product with the query. Budgets are dealt out from the top: first to
    layers, by the mean of ``1 - concentration`` of their heads, then to the heads of a layer by their own; a share
    `uniform` of both is alike for all.

    The paper's authors have published no code, and the notes that we read give no formulas: the measure, the shares and
    the chunk's mean are ours. They hold the tokens of dynamic heads in the host's memory, which their 7.9x leaves out;
    here these stay on the device and are counted. Where a forward brings several tokens, dynamic heads read all.

    Every layer must have attended before any can drop tokens, so during the prefill all layers are held densely.

    Args:
        keep: share in (0, 1] of the visual tokens that a decode step reads, on average over layers and heads.
        static: concentration in [0, 1] from which on a head is static; 0: all are, 1: (nearly) none is.
        uniform: share of the budget that layers, and heads of a layer, get alike.
        chunk: tokens of a chunk.
    """

    static: float = 0.5
    uniform: float = 0.2
    chunk: int = 16
    pools_layers: ClassVar[bool] = True
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("static")
        self._check_share("uniform")
        self._check_whole("chunk", 1)

    def summarise(self, rows: AttentionRows) -> Summary:
        """Sum up ``[B, H, P]`` over queries and the query heads of each KV head."""
        return (rows.weights.unflatten(1, (rows.heads, -1)).sum((2, 3)),)

    def select(self, seen: Mapping[int, Summary], visual: Tensor, pruned: Sequence[int]) -> dict[int, HeadChoice]:
        """Choose the best tokens of each static head, all of the others."""
        visual = visual.to(seen[pruned[0]][0].device)
        scores = torch.stack([seen[layer][0] for layer in pruned])  # [L, B, H, P]
        concentrated = self.concentration(scores, visual)
        budgets = self.head_budgets(concentrated, visual.sum(1))
        retrieves = concentrated < self.static
        choices = {}
        for number, layer in enumerate(pruned):
            heads = scores.shape[2]
            candidates = visual[:, None].expand(-1, heads, -1).flatten(0, 1)
            best = best_tokens(scores[number].flatten(0, 1), candidates, budgets[number].flatten()).unflatten(
                0, (-1, heads)
            )
            stored = torch.where(retrieves[number][..., None], visual[:, None], best)
            choices[layer] = HeadChoice(stored, retrieves[number], budgets[number], self.chunk)
        return choices

    @staticmethod
    def concentration(scores: Tensor, visual: Tensor) -> Tensor:
        """Find the share ``[L, B, H]`` of attention to visual tokens that their best tenth gets; 1 without any."""
        scores = scores.double() * visual[:, None]
        top = share_of(visual.sum(1), TOP)
        ranked = scores.sort(dim=-1, descending=True).values
        inside = torch.arange(scores.shape[-1], device=scores.device) < top[:, None, None]
        total = scores.sum(-1)
        return torch.where(total > 0, (ranked * inside).sum(-1) / total.clamp_min(1e-300), torch.ones_like(total))

    def head_budgets(self, concentration: Tensor, counts: Tensor) -> Tensor:
        """Deal out how many of `counts` ``[B]`` tokens heads of a concentration ``[L, B, H]`` read: ``[L, B, H]``."""
        layers, _, heads = concentration.shape
        wide = 1 - concentration
        least = counts.clamp(max=1)
        total = share_of(layers * heads * counts, self.share)
        by_layer = spread(self._shares(wide.mean(2)), total, heads * least, heads * counts)  # [L, B]
        by_head = [
            spread(self._shares(layer.mT), budget, least, counts).mT  # [B, H]
            for layer, budget in zip(wide, by_layer, strict=True)
        ]
        return torch.stack(by_head)

    def _shares(self, wide: Tensor) -> Tensor:
        """Make shares ``[n, B]`` in proportion to `wide`, a part of which is alike for all n."""
        adaptive = wide / wide.sum(0).clamp_min(1e-300)
        return self.uniform / len(wide) + (1 - self.uniform) * torch.where(
            wide.sum(0) > 0, adaptive, torch.full_like(wide, 1 / len(wide))
        )
