"""PyramidDrop (arXiv 2410.17247): visual tokens leave in stages, as the last prompt token attends to them less."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from rotatek_cache.token_pruning.interface import AttentionMethod, AttentionRows, Stage, Summary
from rotatek_cache.token_pruning.selection import best_tokens, share_of


@dataclass(frozen=True)
class PyramidDrop(AttentionMethod):
    """Divides the layers into stages of equal length; behind each but the last, a share of the tokens held goes on.

    What goes on are the tokens to which the prompt's last query attends most in the last layer of the stage, averaged
    over heads. So the first stage holds all visual tokens, the next `keep` of them, the one after `keep` of these. A
    layer neither stores nor attends to what was dropped before it, in the prefill itself too, which saves the attention
    but not what projections and MLPs compute of them. In a chunked prefill the last query is that of the chunk at which
    the images are complete, and earlier chunks have attended to all tokens.

    The authors rank by query times Key; the softmax here ranks alike in each head, but weighs heads by how much of
    their attention is on the image.

    Args:
        keep: share in (0, 1] of the visual tokens of one stage that the next one keeps (the paper's lambda, 0.5).
        parts: how many stages (the paper's 4: layers 8, 16 and 24 of 32 begin one). A model of fewer layers has as many
            stages as layers.
    """

    parts: int = 4
    last_query_only: ClassVar[bool] = True
    alike: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole("parts", 2)

    def _beginnings(self, layers: int) -> list[int]:
        """List the first layer of each stage, and the end of the last."""
        parts = min(self.parts, layers)
        return [round(layers * part / parts) for part in range(parts + 1)]

    def check_layers(self, compressed: Sequence[int], layers: int) -> None:
        """Raise unless the layers from the first that is read on are all ours."""
        if layers < 2:
            raise ValueError(f"PyramidDrop needs a model of two layers or more, got {layers}")
        self._check_masked(self._beginnings(layers)[1] - 1, compressed, layers)

    def stages(self, compressed: Sequence[int]) -> Sequence[Stage]:
        """Let the last layer of each part say what the next part keeps."""
        beginnings = self._beginnings(compressed[-1] + 1)[1:]
        return tuple(Stage((begin - 1,), tuple(range(begin, end))) for begin, end in pairwise(beginnings))

    def summarise(self, rows: AttentionRows) -> Summary:
        """Average the attention ``[B, P]`` of the last query over heads."""
        return (rows.weights.mean(1).sum(1),)

    def select(self, seen: Mapping[int, Summary], visual: Tensor, pruned: Sequence[int]) -> dict[int, Tensor]:
        """Choose the tokens that got most, the same ones in all layers of the stage."""
        ((scores,),) = seen.values()
        visual = visual.to(scores.device)
        return dict.fromkeys(pruned, best_tokens(scores, visual, share_of(visual.sum(1), self.share)))
