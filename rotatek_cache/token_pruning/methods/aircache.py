"""AirCache (arXiv 2503.23956): visual tokens by what a few telling text tokens read, layers by strength and skew."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rotatek_cache.token_pruning.interface import AttentionMethod, AttentionRows, Summary
from rotatek_cache.token_pruning.selection import best_tokens, share_of, spread


@dataclass(frozen=True)
class AirCache(AttentionMethod):
    """Scores tokens by an elite window of text, and gives more to layers that look at the image much and pointedly.

    The elite are the text tokens behind the image to which the last one attends, among text, at least `elite` times as
    much as to any. A visual token's score is its mean weight over the elite's queries and all heads, where their
    softmax is over visual tokens and the elite alone. A layer's budget is the mean of its strength (sum of scores) and
    of the skewness of its scores, each relative to the mean over layers; a negative skewness counts as none. As in
    `VLCache`, what a full layer cannot take goes to the others, and during the prefill all layers are held densely.

    The formulas are those that published notes on the paper quote; it has no public code. How it normalises across
    layers they do not say: against the mean, budgets sum to the whole, and a variance may be that of a sample or not.
    Its window is of all text; text before an image cannot see it, and is left out here.

    Args:
        keep: share in (0, 1] of the visual tokens, on average over layers.
        elite: threshold in [0, 1] of the elite window (the paper: 0.9).
    """

    elite: float = 0.9
    in_parts: ClassVar[bool] = False
    pools_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("elite")

    def summarise(self, rows: AttentionRows) -> Summary:
        """Return scores ``[B, P]``."""
        queries, columns = rows.valid.shape[1], rows.visual.shape[1]
        # The text behind the image is both: queries, and the last columns.
        text = torch.nn.functional.pad(rows.valid, (columns - queries, 0))
        places = torch.arange(1, queries + 1, device=rows.valid.device)
        last = (rows.valid * places).argmax(1)  # 0 in rows without an image, which is not read
        among_text = rows.weights[torch.arange(len(last), device=last.device), :, last] * text[:, None]  # [B, H_q, P]
        among_text = (among_text / among_text.sum(-1, keepdim=True).clamp_min(1e-30)).mean(1)
        chosen = text & (among_text >= self.elite * among_text.amax(-1, keepdim=True))
        elite = chosen[:, columns - queries :]
        read = rows.weights * (rows.visual | chosen)[:, None, None]
        read = read / read.sum(-1, keepdim=True).clamp_min(1e-30) * elite[:, None, :, None]
        return (read.sum(2).mean(1) / elite.sum(1, keepdim=True).clamp(min=1),)

    def select(self, seen: Mapping[int, Summary], visual: Tensor, pruned: Sequence[int]) -> dict[int, Tensor]:
        """Choose the best tokens of each layer's budget."""
        scores = torch.stack([seen[layer][0] for layer in pruned])
        visual = visual.to(scores.device)
        counts = visual.sum(1)
        total = share_of(len(pruned) * counts, self.share)
        budgets = spread(self.layer_shares(scores, visual), total, counts.clamp(max=1), counts)
        return {
            layer: best_tokens(score, visual, budget)
            for layer, score, budget in zip(pruned, scores, budgets, strict=True)
        }

    @staticmethod
    def layer_shares(scores: Tensor, visual: Tensor) -> Tensor:
        """Weigh the layers against one another, ``[L, B]``, from the scores ``[L, B, P]`` of visual tokens."""
        scores = scores.double() * visual
        strength = scores.sum(-1)
        count = visual.sum(1).double()
        deviation = (scores - (strength / count.clamp(min=1))[..., None]) * visual
        spread_out = (deviation.square().sum(-1) / count.clamp(min=1)).sqrt()
        standard = deviation / spread_out.clamp_min(1e-30)[..., None]
        factor = count / ((count - 1) * (count - 2)).clamp(min=1)
        skewness = (factor * standard.pow(3).sum(-1)).clamp(min=0)

        def relative(values: Tensor) -> Tensor:
            mean = values.mean(0)
            return torch.where(mean > 0, values / mean.clamp_min(1e-30), torch.ones_like(values))

        return (relative(strength) + relative(skewness)) / 2
