"""Fingerprints of models: a basis file belongs to one, and is refused by others."""

import torch
from torch import Tensor


def fingerprint(model: torch.nn.Module) -> Tensor:
    """Pick some weights of each layer's Key and Value projections, float32 ``[n]``: models differ in them.

    `same_fingerprint` compares them within the rounding of half precision, so that a model is itself in every dtype.
    """
    picked = []
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith(("k_proj.weight", "v_proj.weight", "qkv_proj.weight")) and "vision" not in name:
            picked.append(sample_weight(parameter))
    return torch.cat(picked) if picked else torch.zeros(0, dtype=torch.float32, device="cpu")


def sample_weight(part: Tensor, first: int = 0, total: int | None = None) -> Tensor:
    """Pick up to 64 evenly spaced numbers of a weight, float32.

    Args:
        part: the weight, or some of its rows.
        first: where the part begins among the weight's numbers.
        total: how many numbers the weight has; None if the part is all of it. Numbers that are not in the part are NaN.
    """
    flat = part.detach().flatten()
    total = total or flat.numel()
    at = torch.arange(0, total, max(1, total // 64), device="cpu")[:64] - first
    inside = (at >= 0) & (at < flat.numel())
    sample = torch.full(at.shape, torch.nan, dtype=torch.float32, device="cpu")
    sample[inside] = flat[at[inside].to(flat.device)].float().cpu()
    return sample


def same_fingerprint(one: Tensor, other: Tensor) -> bool:
    """Tell whether two fingerprints agree within the rounding of half precisions; NaN in `one` agrees with all."""
    if one.shape != other.shape:
        return False
    known = ~one.isnan()
    return torch.allclose(one[known], other[known], rtol=1e-2, atol=1e-6)
