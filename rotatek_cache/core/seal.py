"""What a kernel is told to seal: states where they lie, the basis to be fitted or taken, and how they are stored."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rotatek_cache.core import attention
from rotatek_cache.core.quantization import CodeLayout

# Imported by name where it is dispatched to, as the attention's kernels are.
KERNEL = "rotatek_kernels.seal"
SealImplementation = Literal["auto", "torch", "triton"]


@dataclass(frozen=True)
class Places:
    """Where the tokens of a seal lie in states ``[B, H, P, D]``.

    Attributes:
        ranges: (first token, tokens) of each compressed row; they follow one another.
        token_rows, token_columns: int64 ``[N]``, row and column of each token in the states. None: the states have one
            row, which holds the tokens in their order.
    """

    ranges: tuple[tuple[int, int], ...]
    token_rows: Tensor | None = None
    token_columns: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(length for _, length in self.ranges)

    def gather(self, states: Tensor) -> Tensor:
        """Copy the tokens of ``[B, H, P, D]`` together: packed states ``[H, N, D]``."""
        heads_first = states.transpose(0, 1)
        if self.token_rows is None:
            return heads_first[:, 0]
        return heads_first[:, self.token_rows, self.token_columns]


@dataclass(frozen=True)
class Fit:
    """A centred orthogonal basis that is to be fitted by subspace iteration (`fitting.orthogonal_basis`).

    Attributes:
        rank: directions.
        exponent: of the channel weights (`fitting.query_channel_norm`); 0: none.
        queries: the window's queries ``[R, H_q, W, D]``; None: no weights.
        valid: bool ``[R, W]``, False for padding; None if nothing is.
    """

    rank: int
    exponent: float = 0.0
    queries: Tensor | None = None
    valid: Tensor | None = None


@dataclass(frozen=True)
class Shared:
    """A basis of the model's own.

    Attributes:
        encoder: ``[H, D, channels]`` in the states' dtype.
        low, step: float32 ``[H, channels]``, ranges of the codes; None where numbers are stored.
        shift: float32 ``[H, D]``, what the codes' ranges add to delta; None where numbers are stored.
    """

    encoder: Tensor
    low: Tensor | None = None
    step: Tensor | None = None
    shift: Tensor | None = None


@dataclass(frozen=True)
class SealJob:
    """The Keys or the Values of a layer, with how they are to be stored.

    Attributes:
        name: for errors.
        states: ``[B, H, P, D]``.
        channels: stored coefficients of a token, padding included.
        basis: fitted or taken.
        code: packing of the coefficients; None: numbers of the states' dtype.
    """

    name: str
    states: Tensor
    channels: int
    basis: Fit | Shared
    code: CodeLayout | None = None


class Sealed(NamedTuple):
    """States as a kernel has stored them.

    Attributes:
        data: ``[H, N, channels]``, or the bytes of the codes.
        decoder: ``[H, R, D, channels]`` of a basis that was fitted, with the codes' steps folded in; else None.
        delta: ``[H, R, D]``.
        finite: bool ``[H * R]``, whether the states of each head and row were.
    """

    data: Tensor
    decoder: Tensor | None
    delta: Tensor
    finite: Tensor


def seal_states(jobs: Sequence[SealJob], places: Places, impl: SealImplementation = "auto") -> list[Sealed] | None:
    """Store the states of a layer by a kernel; None where there is none, or where it does not take these jobs.

    The codecs (`rotatek_cache.codecs`) are the specification, and what stores them then.

    Args:
        jobs: Keys, Values or both: they share the launches.
        places: where the tokens lie.
        impl: "auto" is the kernel where the states are on CUDA and Triton is installed; "triton" raises an
            UnsupportedError that says why where it cannot run.
    """
    if not jobs or not is_asked(jobs[0].states.device, impl):
        return None
    try:
        return importlib.import_module(KERNEL).seal_states(jobs, places)
    except attention.UnsupportedError:
        if impl != "auto":
            raise
        return None


def is_asked(device: torch.device, impl: SealImplementation) -> bool:
    """Tell whether a kernel is to be asked at all for states on `device`."""
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl must be 'auto', 'torch' or 'triton', got {impl!r}")
    # Where attention has a kernel in Triton, so has the seal.
    return impl == "triton" or (impl == "auto" and attention._kernel_for(device) == "triton")  # noqa: SLF001
