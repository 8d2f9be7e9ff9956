"""Count the bytes of storage behind tensors."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def storage_bytes(tensors: Iterable[Tensor], beside: Iterable[Tensor] = ()) -> int:
    """Count the bytes of the distinct storages behind `tensors` that are not behind those `beside`."""
    others, storages = (
        {_place(tensor): tensor.untyped_storage().nbytes() for tensor in held} for held in (beside, tensors)
    )
    return sum(size for place, size in storages.items() if place not in others)


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    """Name the storage behind a tensor; that of a meta tensor has no address."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr() or storage._cdata


def stock_tensors(layer: Any) -> list[Tensor]:
    """List the tensors that a cache layer of transformers holds."""
    held = [part for value in vars(layer).values() for part in (value.values() if isinstance(value, dict) else [value])]
    return [tensor for tensor in held if isinstance(tensor, Tensor)]
