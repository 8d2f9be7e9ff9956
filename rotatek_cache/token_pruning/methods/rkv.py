"""R-KV (arXiv 2505.24133): of an answer's tokens those stay that are attended to and say what no other says."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.token_pruning.decoded import DecodedMethod

MAX_SIMILARITIES = 1 << 26  # of one part of the heads, in numbers: 256 MiB of float32


@dataclass(frozen=True)
class RKV(DecodedMethod):
    """Ranks the tokens of an answer by ``importance * I - (1 - importance) * R``, in each KV head on its own.

    I, importance: attention of the last `window` queries, the largest of the heads of a group, then the largest among
    `pool` neighbours, then the mean over queries. R, redundancy: the softmax over tokens of the mean cosine similarity
    of a token's Key with all others, where each of these leaves out the `spared` last tokens that are more similar to
    it than `similar`: of tokens that say the same, the last stay.

    The authors evict from all of the cache, prompt included; here the prompt is compressed by other means, and both
    sums run over the answer alone, so that I and R each sum to one over what is to be chosen from. Of their buffer and
    budget, `cap` is the sum.

    Args:
        importance: the weight of I, in [0, 1] (the paper's lambda, 0.1).
        similar: cosine similarity, in [0, 1], above which a token repeats another (the paper's T).
        spared: how many of the last tokens that repeat one are not held to repeat it (the paper's beta).
        pool: neighbours among which the largest attention counts, an odd number.
    """

    importance: float = 0.1
    similar: float = 0.5
    spared: int = 1
    pool: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("importance", "similar"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"RKV: {name} must be a number, got {type(value).__name__}")
            if not 0 <= value <= 1:
                raise ValueError(f"RKV: {name} must be in [0, 1], got {value}")
        if self.pool % 2 == 0:
            raise ValueError(f"RKV: pool must be odd, a token and as many neighbours on both sides, got {self.pool}")

    def choose(self, keys: Tensor, queries: Tensor, visible: Tensor) -> Tensor:
        """Choose the best tokens before the window, earlier ones where two are equal."""
        keys = keys.float()
        scores = self.importance * self.attention(keys, queries.float(), visible)
        scores = scores - (1 - self.importance) * self.redundancy(keys)[..., : -self.window]
        order = scores.argsort(dim=-1, descending=True, stable=True)
        return order[..., : self.kept - self.window].sort(dim=-1).values

    def attention(self, keys: Tensor, queries: Tensor, visible: Tensor) -> Tensor:
        """Compute I of the tokens before the window, ``[B, H, n - window]``."""
        if not queries.shape[3]:
            return keys.new_zeros(*keys.shape[:2], keys.shape[2] - self.window)
        logits = (queries @ keys.mT[:, :, None]).masked_fill(~visible, -torch.inf)  # [B, H, G, q, n]
        weights = logits.softmax(-1).amax(2)[..., : -self.window]
        pooled = torch.nn.functional.max_pool1d(weights.flatten(0, 1), self.pool, 1, self.pool // 2)
        return pooled.unflatten(0, keys.shape[:2]).mean(2)

    def redundancy(self, keys: Tensor) -> Tensor:
        """Compute R of all tokens, ``[B, H, n]``."""
        tokens = keys.shape[2]
        directions = torch.nn.functional.normalize(keys, dim=-1).flatten(0, 1)
        places = torch.arange(1, tokens + 1, device=keys.device)
        means = []
        for part in directions.split(max(1, MAX_SIMILARITIES // tokens**2)):
            similarity = part @ part.mT  # of token i (row) with token j (column)
            similarity.diagonal(dim1=-2, dim2=-1).zero_()
            # The last tokens that repeat token i: their similarity with it is not held against them.
            last = ((similarity > self.similar) * places).topk(min(self.spared, tokens)).values[..., -1:]
            similarity.masked_fill_((similarity > self.similar) & (places >= last.clamp(min=1)), 0.0)
            means.append(similarity.mean(-2))
        return torch.cat(means).softmax(-1).unflatten(0, keys.shape[:2])
