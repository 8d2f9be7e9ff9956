"""The Walsh-Hadamard rotation, which spreads what is in one channel over all of them."""

import torch
from torch import Tensor


def hadamard(width: int, seed: int | None = None) -> Tensor:
    """Make the orthonormal Walsh-Hadamard matrix in Sylvester's order, float32 ``[width, width]`` on the CPU.

    States ``[*, width]`` are rotated by ``states @ H`` and back by ``@ H.T``. A width that is no power of two is
    rotated in equal blocks of the largest power of two that divides it, so that an odd width stays as it is.

    Args:
        width: channels, at least 1; else a ValueError.
        seed: draws a sign for each channel, by which it is multiplied before it is rotated; None draws none.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1 channel, got {width}: give the width of a head")
    block = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while width % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    matrix = torch.block_diag(*[block / len(block) ** 0.5] * (width // len(block)))
    if seed is None:
        return matrix
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randint(2, (width, 1), generator=generator, device="cpu") - 1) * matrix
