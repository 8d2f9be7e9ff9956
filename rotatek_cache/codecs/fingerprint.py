"""Fingerprints of models: basis files and caches belong to one, and are refused by others."""

from dataclasses import dataclass

import torch
from torch import Tensor

PROJECTIONS = ("k_proj.weight", "v_proj.weight", "qkv_proj.weight", "query_key_value.weight")


def fingerprint(model: torch.nn.Module) -> Tensor:
    """Pick some weights of each layer's Key and Value projections, float32 ``[n]``: models differ in them.

    `same_fingerprint` compares them within the rounding of half precision, so that a model is itself in every dtype.
    """
    picked = []
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith(PROJECTIONS) and "vision" not in name:
            picked.append(sample_weight(parameter) if not parameter.is_meta else _unknown(parameter))
    return torch.cat(picked) if picked else torch.zeros(0, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class ModelMark:
    """What a cache knows of the model that filled it.

    Attributes:
        model_type: of its config.
        numbers: its fingerprint.
    """

    model_type: str
    numbers: tuple[float, ...]

    @classmethod
    def of(cls, model: torch.nn.Module, model_type: str) -> "ModelMark":
        """Mark a model."""
        return cls(model_type, tuple(fingerprint(model).tolist()))

    def fingerprint(self) -> Tensor:
        """Give the fingerprint as `fingerprint` does."""
        return torch.tensor(self.numbers, dtype=torch.float32, device="cpu")

    def agrees(self, other: "ModelMark") -> bool:
        """Tell whether both are of one model, in any dtype."""
        if self.model_type != other.model_type:
            return False
        mine, theirs = self.fingerprint(), other.fingerprint()
        return same_fingerprint(mine, theirs) or same_fingerprint(theirs, mine)


def _unknown(parameter: Tensor) -> Tensor:
    """Stand for a weight that is not in memory (offloaded); NaN agrees with any."""
    count = min(64, -(-parameter.numel() // max(1, parameter.numel() // 64)))
    return torch.full((count,), torch.nan, dtype=torch.float32, device="cpu")


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
