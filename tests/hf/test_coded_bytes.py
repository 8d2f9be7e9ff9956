"""Bytes of a cache whose tokens are all coded, at the window of `RotateKCache`, whatever share of them is text."""

import pytest
import torch

from rotatek_cache import RotateKCache
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.hf.storage import storage_bytes


@pytest.mark.parametrize(("bits", "least", "of_a_thousand"), [(4, 3.5, 2.9), (2.28, 6, 4)])
def test_bytes_of_a_large_model(tmp_path, bits, least, of_a_thousand):
    """One layer of an 8B model (8 heads of width 128, bfloat16): ring, sinks and free columns counted from storage."""
    state = Calibration(torch.ones(1), "drawn")
    for which in ("key", "value"):
        state.add_tokens(0, which, "text", torch.randn(8, 300, 128) * torch.logspace(1, -1, 128))
    state.texts = 1
    state.write_basis(tmp_path / "b.safetensors")
    for tokens, expected in ((4096, least), (1024, of_a_thousand)):
        cache = RotateKCache(basis=tmp_path / "b.safetensors", text="coded", bits=bits)
        states = torch.zeros(1, 8, tokens, 128, dtype=torch.bfloat16)
        handle, _ = cache.update(states, states, 0)
        handle.observe(torch.zeros(1, 32, 1, 128, dtype=torch.bfloat16), None)
        for _ in range(3):
            cache.update(states[:, :, :1], states[:, :, :1], 0)
        dense = 2 * states[:, :, :1].nbytes * (tokens + 3)
        ratio = dense / storage_bytes(cache.tensors())
        assert ratio >= expected
