"""Full rank gives what DynamicCache gives, for every family and every way of calling."""

import functools
from typing import Any

import pytest
import torch
import ways
from conftest import Host, build_host
from tiny_models import FAMILIES
from torch import Tensor
from transformers import DynamicCache

from rotatek_cache import RotateKCache

EXACT = (
    {"sparsity": 0},
    {"rank": 32, "always_compress": True},
)


def _dynamic(host: Host) -> Any:
    return lambda visual_mask=None: DynamicCache(config=host.plain.config.get_text_config(decoder=True))


@functools.cache
def _expected(family: str, way: str) -> list[Tensor] | str:
    """What the plain model does with DynamicCache, or why this transformers cannot do it."""
    host = build_host(family)
    if way == "video" and host.tiny.video is None:
        return "the tiny model takes no video"
    try:
        return ways.WAYS[way](host.tiny, host.plain, _dynamic(host))
    except Exception as error:
        return f"not possible with DynamicCache either: {type(error).__name__}: {error}"


def _same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        if theirs.is_floating_point():
            torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-5)
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("way", list(ways.WAYS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_full_rank_is_dynamic_cache(family: str, way: str) -> None:
    expected = _expected(family, way)
    if isinstance(expected, str):
        pytest.skip(expected)
    host = build_host(family)
    for options in EXACT:
        _same(ways.WAYS[way](host.tiny, host.attached, lambda visual_mask=None, o=options: RotateKCache(**o, visual_mask=visual_mask)), expected)
