"""Entropy of codes, by hand."""

import pytest
import torch

from evals import disk_bytes


def test_entropy_of_codes_by_hand():
    # Of one head: a channel with four codes alike (2 bits), one with a single code, one with shares 1/4 and 3/4.
    codes = torch.tensor([[0, 1, 0], [1, 1, 0], [2, 1, 0], [3, 1, 1]], dtype=torch.uint8)[None]
    found = disk_bytes.entropies(codes, torch.tensor([4.0, 4.0, 2.0]))
    assert found[4] == [2, 0] and found[2] == pytest.approx([0.8113], abs=1e-4)
