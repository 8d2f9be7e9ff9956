"""Count the bytes of storage behind tensors."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of the distinct storages behind `tensors`; those of meta tensors have no address."""
    held = [tensor.untyped_storage() for tensor in tensors]
    storages = {(part.device, part.data_ptr() or part._cdata): part.nbytes() for part in held}
    return sum(storages.values())


def stock_tensors(layer: Any) -> list[Tensor]:
    """List the tensors that a cache layer of transformers holds."""
    held = [part for value in vars(layer).values() for part in (value.values() if isinstance(value, dict) else [value])]
    return [tensor for tensor in held if isinstance(tensor, Tensor)]
