"""FastV (arXiv 2403.06764): what the last prompt token attends to in an early layer stays, for all later layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rotatek_cache.token_pruning.interface import AttentionMethod, AttentionRows, Stage, Summary
from rotatek_cache.token_pruning.selection import best_tokens, share_of


@dataclass(frozen=True)
class FastV(AttentionMethod):
    """Ranks visual tokens by the attention of the prompt's last query in layer ``layer - 1``, averaged over heads.

    Layers before `layer` keep all tokens. Later ones neither store nor attend to the dropped ones, in the prefill
    itself too, which saves their attention, but not what projections and MLPs compute of them. In a chunked prefill the
    last query is that of the chunk at which the images are complete, and earlier chunks have attended to all tokens.

    Args:
        keep: share in (0, 1] of the visual tokens that layers from `layer` on keep.
        layer: the first layer that drops tokens, counted from 0 (the paper's K, 2); at least 1.
    """

    layer: int = 2
    last_query_only: ClassVar[bool] = True
    alike: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole("layer", 1)

    def check_layers(self, compressed: Sequence[int], layers: int) -> None:
        """Raise unless the layers from the watched one on are all ours."""
        if self.layer >= layers:
            raise ValueError(f"FastV: layer must be below the model's {layers} layers, got {self.layer}")
        self._check_masked(self.layer - 1, compressed, layers)

    def stages(self, compressed: Sequence[int]) -> Sequence[Stage]:
        """Let the layer before `layer` say what all from there on keep."""
        return (Stage((self.layer - 1,), tuple(index for index in compressed if index >= self.layer)),)

    def summarise(self, rows: AttentionRows) -> Summary:
        """Average the attention ``[B, P]`` of the last query over heads."""
        return (rows.weights.mean(1).sum(1),)

    def select(self, seen: Mapping[int, Summary], visual: Tensor, pruned: Sequence[int]) -> dict[int, Tensor]:
        """Choose the tokens that got most, the same ones in all layers."""
        (scores,) = seen[self.layer - 1]
        visual = visual.to(scores.device)
        kept = best_tokens(scores, visual, share_of(visual.sum(1), self.share))
        return dict.fromkeys(pruned, kept)
