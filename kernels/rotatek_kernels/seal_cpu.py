"""Steps of a seal on a CPU, compiled from `cpu/seal.cpp`: moments, directions of a basis, coefficients, codes."""

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from rotatek_kernels import cpu_library
from rotatek_kernels.cpu_layout import TYPES

MOST_CLIPS = 8  # `CLIPS` of cpu/seal.cpp
STATES = (torch.float32, torch.bfloat16, torch.float16)


def is_compiled() -> bool:
    """Return whether there is a compiled library on this machine."""
    return cpu_library.load() is not None


def moments(states: Tensor) -> tuple[Tensor, Tensor]:
    """Find mean ``[*, D]`` and centred scatter ``[*, D, D]`` of `states` ``[*, S, D]``, as `fitting.key_moments`."""
    *leading, _, width = states.shape
    heads = _heads(states)
    mean = torch.empty(*leading, width, dtype=torch.float32, device="cpu")
    scatter = torch.empty(*leading, width, width, dtype=torch.float32, device="cpu")
    _library().rotatek_moments(*_described(heads), mean.data_ptr(), scatter.data_ptr(), cpu_library.threads())
    return mean, scatter


def encode(states: Tensor, encoder: Tensor, offset: Tensor) -> Tensor:
    """Encode `states` ``[*, S, D]``, less `offset` ``[*, D]``, by `encoder` ``[*, D, r]``: float32 ``[*, S, r]``."""
    leading, width, rank = states.shape[:-2], states.shape[-1], encoder.shape[-1]
    if encoder.shape != (*leading, width, rank) or offset.shape != (*leading, width):
        raise ValueError(
            f"encoder must be {[*leading, width, 'r']} and offset {[*leading, width]} for states {list(states.shape)}, "
            f"got {list(encoder.shape)} and {list(offset.shape)}"
        )
    heads = _heads(states)
    encoder, offset = _checked(encoder, "encoder"), _checked(offset, "offset")
    out = torch.empty(*states.shape[:-1], rank, dtype=torch.float32, device="cpu")
    _library().rotatek_encode(
        *_described(heads), offset.data_ptr(), encoder.data_ptr(), rank, out.data_ptr(), cpu_library.threads()
    )
    return out


def _heads(states: Tensor) -> Tensor:
    """View states ``[*, S, D]`` as ``[n, S, D]``; copied where no one stride leads from head to head."""
    if states.dtype not in STATES or states.device.type != "cpu":
        raise TypeError(
            f"states must be float32, bfloat16 or float16 on the CPU, got {states.dtype} on {states.device}"
        )
    if not states.numel():
        raise ValueError(f"states must have at least one number, got {list(states.shape)}")
    heads = states.reshape(-1, *states.shape[-2:])
    return heads if heads.stride(-1) == 1 else heads.contiguous()


def _described(heads: Tensor) -> tuple[int, ...]:
    """Tell where states ``[n, S, D]`` lie."""
    return heads.data_ptr(), TYPES[heads.dtype], *heads.shape, heads.stride(0), heads.stride(1)


def directions(matrix: Tensor, rank: int, iterations: int) -> Tensor:
    """Find the directions ``[*, D, rank]`` of `matrix` ``[*, D, D]`` as `fitting.subspace_iteration` does."""
    matrix = _checked(matrix, "matrix")
    *leading, width, other = matrix.shape
    if width != other or not 1 <= rank <= width:
        raise ValueError(f"matrix must be [*, D, D] and rank in [1, D], got {list(matrix.shape)} and {rank}")
    out = torch.empty(*leading, width, rank, dtype=torch.float32, device="cpu")
    count = out.numel() // (width * rank)
    _library().rotatek_directions(
        matrix.data_ptr(), count, width, rank, iterations, out.data_ptr(), cpu_library.threads()
    )
    return out


def codes(
    coefficients: Tensor, blocks: Sequence[tuple[int, int]], clips: Sequence[float], packed: Tensor
) -> tuple[Tensor, Tensor]:
    """Quantise coefficients ``[H, S, channels]`` as `quantization.quantise` does, and pack the codes.

    Args:
        coefficients: finite.
        blocks: bits and channels of each block of `CodeLayout`.
        clips: shares of the full range tried as clip range.
        packed: uint8 ``[H, S, token bytes]``, where the codes are written; rows of a head lie side by side.

    Returns:
        ``low`` and ``step`` ``[H, channels]``.
    """
    if not 1 <= len(clips) <= MOST_CLIPS:
        raise ValueError(f"clips must be 1 at least and at most {MOST_CLIPS}, got {len(clips)}")
    heads, _, channels = coefficients.shape
    low, step = torch.empty(2, heads, channels, dtype=torch.float32, device="cpu")
    _code(coefficients, blocks, clips, packed, low, step)
    return low, step


def codes_within(
    coefficients: Tensor, low: Tensor, step: Tensor, blocks: Sequence[tuple[int, int]], packed: Tensor
) -> None:
    """Write codes as `codes` does, with ranges ``low`` and ``step [H, channels]`` that are given."""
    low, step = _checked(low, "low"), _checked(step, "step")
    heads, _, channels = coefficients.shape
    if low.shape != (heads, channels) or step.shape != (heads, channels):
        raise ValueError(f"low and step must be {[heads, channels]}, got {list(low.shape)} and {list(step.shape)}")
    _code(coefficients, blocks, (), packed, low, step)


def _code(
    coefficients: Tensor,
    blocks: Sequence[tuple[int, int]],
    clips: Sequence[float],
    packed: Tensor,
    low: Tensor,
    step: Tensor,
) -> None:
    coefficients = _checked(coefficients, "coefficients")
    heads, tokens, channels = coefficients.shape
    token_bytes = sum(bits * own // 8 for bits, own in blocks)
    if tokens < 1 or sum(own for _, own in blocks) != channels:
        raise ValueError(
            f"coefficients must be [H, S >= 1, channels of blocks {blocks}], got {[heads, tokens, channels]}"
        )
    if (
        packed.shape != (heads, tokens, token_bytes)
        or packed.dtype != torch.uint8
        or packed.stride()[1:] != (token_bytes, 1)
    ):
        raise ValueError(
            f"packed must be uint8 {[heads, tokens, token_bytes]} with tokens side by side, got {packed.dtype} "
            f"{list(packed.shape)} of strides {packed.stride()}"
        )
    described, tried = array("q", [number for block in blocks for number in block]), array("f", clips)
    _library().rotatek_codes(
        coefficients.data_ptr(),
        coefficients.stride(0),
        heads,
        tokens,
        channels,
        described.buffer_info()[0],
        len(blocks),
        tried.buffer_info()[0],
        len(clips),
        packed.data_ptr(),
        packed.stride(0),
        low.data_ptr(),
        step.data_ptr(),
        cpu_library.threads(),
    )


def _checked(tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise TypeError(f"{name} must be float32 on the CPU, got {tensor.dtype} on {tensor.device}")
    return tensor.contiguous()


def _library() -> ctypes.CDLL:
    library = cpu_library.load()
    if library is None:
        raise RuntimeError("the compiled steps of a seal need a C++ compiler that works, on Linux")
    return library
