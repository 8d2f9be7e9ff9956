"""A small token method: the best attended. `codecs/test_adding.py` adds it."""

from dataclasses import dataclass

from rotatek_cache.token_pruning.interface import AttentionMethod, Stage
from rotatek_cache.token_pruning.selection import best_tokens, share_of


@dataclass(frozen=True)
class BestAttended(AttentionMethod):
    """Each layer keeps the visual tokens that all queries behind them attend to most."""

    def stages(self, compressed):
        return [Stage((layer,), (layer,)) for layer in compressed]

    def summarise(self, rows):
        return (rows.weights.sum((1, 2)),)

    def select(self, seen, visual, pruned):
        counts = share_of(visual.sum(1), self.share)
        return {layer: best_tokens(seen[layer][0], visual, counts) for layer in pruned}
