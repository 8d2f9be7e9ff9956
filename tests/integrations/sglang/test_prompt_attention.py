"""Chunks of prompts; needs no SGLang."""

import pytest
import torch

from rotatek_cache.core.segments import SegmentView
from rotatek_sglang.prompt_attention import OwnTokens, attend_continuation, attend_prompt


@pytest.mark.parametrize("block", [3, 5, 20, 64])
def test_a_chunk_in_blocks_attends_as_the_whole_prompt_does(block):
    """13 tokens are stored, 20 new ones follow: the last 20 outputs of a prompt of 33, whatever the block."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(33, heads, 8, generator=generator) for heads in (4, 2, 2))
    stored = SegmentView(
        keys=k[:13].transpose(0, 1),
        values=v[:13].transpose(0, 1),
        starts=torch.zeros(1, dtype=torch.int64),
        lengths=torch.tensor([13], dtype=torch.int32),
        max_length=13,
    )
    own = OwnTokens.of(20, q.device, block)
    found = attend_continuation(q[13:], k[13:], v[13:], [stored], own, 0.3)
    torch.testing.assert_close(found, attend_prompt(q, k, v, 0.3)[13:])
    assert own.mask.numel() == min(block, 20) ** 2
