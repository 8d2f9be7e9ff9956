"""The Walsh-Hadamard rotation."""

import pytest
import torch

from rotatek_cache.core.hadamard import hadamard


def test_hand_worked() -> None:
    """Four channels, by hand."""
    signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    torch.testing.assert_close(hadamard(4), torch.tensor(signs) / 2)


@pytest.mark.parametrize("width", [1, 24, 64, 80, 128])
@pytest.mark.parametrize("seed", [None, 3])
def test_orthonormal_and_spreading(width: int, seed: int | None) -> None:
    """Lengths stay, and one channel goes to all of its block in equal parts."""
    matrix = hadamard(width, seed)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(width))
    block = width & -width
    torch.testing.assert_close(
        matrix[:, 0].abs(), torch.cat([torch.full((block,), block**-0.5), torch.zeros(width - block)])
    )


def test_signs_follow_the_seed() -> None:
    """The same seed draws the same signs, another one others."""
    assert torch.equal(hadamard(64, 1), hadamard(64, 1))
    assert not torch.equal(hadamard(64, 1), hadamard(64, 2))
    assert torch.equal(hadamard(64, 1).abs(), hadamard(64).abs())


def test_no_channels() -> None:
    """A width of nothing is refused."""
    with pytest.raises(ValueError, match="width must be at least 1 channel, got 0"):
        hadamard(0)
