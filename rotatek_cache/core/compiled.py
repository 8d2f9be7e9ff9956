"""Steps of a seal that are compiled for CPUs, where they can be had; those of torch are their specification."""

import functools
import importlib
import importlib.util
from typing import Any, Protocol

import torch
from torch import Tensor

# Imported by name where it is called, as the attention's kernels are.
STEPS = "rotatek_kernels.seal_cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Steps(Protocol):
    """What `rotatek_kernels.seal_cpu` offers."""

    @staticmethod
    def moments(states: Tensor) -> tuple[Tensor, Tensor]:
        """See `fitting.key_moments`."""

    @staticmethod
    def encode(states: Tensor, encoder: Tensor, offset: Tensor) -> Tensor:
        """See `KeyBasis.encode`."""

    @staticmethod
    def directions(matrix: Tensor, rank: int, iterations: int) -> Tensor:
        """See `fitting.principal_directions`."""

    @staticmethod
    def codes(
        coefficients: Tensor, blocks: tuple[tuple[int, int], ...], clips: tuple[float, ...], packed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `quantization.quantise_packed`."""

    @staticmethod
    def codes_within(
        coefficients: Tensor, low: Tensor, step: Tensor, blocks: tuple[tuple[int, int], ...], packed: Tensor
    ) -> None:
        """See `quantization.pack_coefficients`."""


def steps_for(tensor: Tensor) -> Steps | None:
    """Return the compiled steps for work on `tensor`; None where torch has to do it."""
    if tensor.device.type != "cpu" or tensor.dtype not in DTYPES or tensor.numel() == 0:
        return None
    return None if tensor.requires_grad and torch.is_grad_enabled() else _steps()


@functools.cache
def _steps() -> Steps | None:
    if importlib.util.find_spec("rotatek_kernels") is None:
        return None
    steps: Any = importlib.import_module(STEPS)
    return steps if steps.is_compiled() else None
