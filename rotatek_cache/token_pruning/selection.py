"""Choose tokens: shares as whole numbers, the best by score, a total spread over layers."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def share_of(counts: Tensor, keep: float) -> Tensor:
    """Count how many tokens a share `keep` of `counts` is: int64, rounded, at least one where there are any."""
    return (counts.double() * keep).round().long().clamp(min=1).minimum(counts)


def best_tokens(scores: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
    """Find the `counts` ``[B]`` best of the candidates of each row, bool ``[B, P]``; earlier tokens win ties."""
    ranked = scores.double().masked_fill(~candidates, -math.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.empty_like(ranked).scatter_(
        1, ranked, torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked)
    )
    return (places < counts[:, None]) & candidates


def best_share(scores: Mapping[int, Tensor], candidates: Tensor, keep: float) -> dict[int, Tensor]:
    """Find the best share `keep` of the candidates in each layer, bool ``[B, P]``, by the layer's scores ``[B, P]``."""
    candidates = candidates.to(next(iter(scores.values())).device)
    counts = share_of(candidates.sum(1), keep)
    return {layer: best_tokens(found, candidates, counts) for layer, found in scores.items()}


def spread(shares: Tensor, total: Tensor, least: Tensor, capacity: Tensor) -> Tensor:
    """Give whole numbers ``[L, B]`` in proportion to `shares` that sum to `total` ``[B]``, in `least` to `capacity`.

    What a layer cannot take goes to the others in proportion, so that nothing of the total is lost; the parts below one
    are dealt out largest first.
    """
    shares, layers = shares.double(), shares.shape[0]
    limit, low = capacity.double().expand_as(shares), least.double().expand_as(shares)
    total = total.minimum(layers * capacity).maximum(layers * least).double()
    found = low.clone()
    fixed = torch.zeros_like(shares, dtype=torch.bool)
    for _ in range(2 * layers):  # each round fixes a layer, or none is left to fix
        free = shares.masked_fill(fixed, 0.0)
        rest = total - found.masked_fill(~fixed, 0.0).sum(0)
        part = free / free.sum(0).clamp_min(1e-300) * rest
        found = torch.where(fixed, found, part)
        # Excess and lack at once would correct each other's excess: the larger is settled first.
        over, under = (part - limit).clamp_min(0) * ~fixed, (low - part).clamp_min(0) * ~fixed
        settle_over = over.sum(0) >= under.sum(0)
        hit = torch.where(settle_over, over > 0, under > 0)
        if not bool(hit.any()):
            break
        found = torch.where(hit, torch.where(settle_over, limit, low), found)
        fixed |= hit
    whole = found.add(1e-9).floor()
    left = (total - whole.sum(0)).round().long()
    remainder = (found - whole).masked_fill(whole >= limit, -1.0)
    order = remainder.argsort(dim=0, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        0, order, torch.arange(layers, device=order.device)[:, None].expand_as(order)
    )
    return (whole.long() + (place < left)).minimum(capacity)
