"""Codes under a Walsh-Hadamard rotation: what they are read as, what they take, and what they are for."""

import pytest
import torch

from rotatek_cache import FitOptions
from rotatek_cache.codecs.registry import codecs_for


def codec_of(name, bits):
    return codecs_for(FitOptions(sparsity=0, basis=name, key_bits=bits, value_basis=name, value_bits=bits))


def read(stored):
    """Tokens ``[H, N, D]`` as attention reads them, where all rows have as many."""
    rows = stored.code.unpack(stored.data).float().unflatten(1, (stored.basis.scale.shape[1], -1))
    return stored.basis.reconstruct(rows).flatten(1, 2)


def test_two_tokens_by_hand():
    # The first is 1 in channel 0: all of its 8 rotated channels are 8 ** -0.5. The second is its negative.
    states = torch.zeros(1, 2, 8)
    states[0, :, 0] = torch.tensor([1.0, -1.0])
    for codec in codec_of("hadamard", 2):
        stored = codec.store(states, [(0, 2)])
        assert stored.data.tolist() == [[[255, 255], [0, 0]]]  # the ends of each range: codes 3, and 0
        torch.testing.assert_close(stored.basis.scale, torch.full((1, 1, 8), 2 / 3 / 8))
        torch.testing.assert_close(read(stored), states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 24, 64, 80])
def test_errors_and_bytes(width, dtype):
    """Two rows of as many tokens, with ranges of their own."""
    states = torch.randn(3, 60, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    states[:, 30:] *= 10
    errors = {}
    for bits in (8, 4, 2):
        for codec in codec_of("hadamard", bits):
            stored = codec.store(states, [(0, 30), (30, 30)])
            error = (read(stored) - states.float()).square().mean(-1)
            errors[bits] = error / states.float().square().mean(-1)
            held = stored.data.nbytes + sum(tensor.nbytes for tensor in stored.basis.tensors())
            assert held == 3 * (codec.stored_bytes(30, width, dtype) * 2)
    assert [float(errors[bits].mean()) < most for bits, most in ((8, 2e-4), (4, 0.02), (2, 0.3))] == [True] * 3


def test_outlier_channels_are_spread():
    """A channel that is large for a few tokens costs unrotated codes its own resolution, rotated ones little."""
    states = torch.randn(1, 400, 64, generator=torch.Generator().manual_seed(1))
    states[..., 5] *= torch.where(torch.arange(400) % 40 == 0, 60.0, 1.0)
    error = {name: _error(codec_of(name, 4)[0].store(states, [(0, 400)]), states) for name in ("hadamard", "none")}
    assert error["hadamard"] < 0.5 * error["none"]


def _error(stored, states):
    """Worst squared error of a channel over the tokens without an outlier."""
    kept = torch.arange(400) % 40 != 0
    found = stored.basis.reconstruct(stored.code.unpack(stored.data).float()[:, None])[:, 0]
    return float((found - states)[:, kept].square().mean((0, 1)).amax())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.5, "key_bits": 4}, "basis='hadamard' takes sparsity=0 and key_bits of 8, 4 or 2"),
        ({"sparsity": 0, "key_bits": "fp8"}, "basis='hadamard' takes sparsity=0 and key_bits of 8, 4 or 2"),
        ({"sparsity": 0, "key_bits": 4, "basis_bits": 8}, "here it owns none"),
        ({"sparsity": 0, "value_basis": "hadamard"}, "value_basis='hadamard' takes no value_sparsity and value_bits"),
    ],
)
def test_what_cannot_be_done_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        codecs_for(FitOptions(**{"basis": "hadamard"} | options))
