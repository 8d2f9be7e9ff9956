"""What the tests share. Models are built once per run; a test that changes one takes a copy."""

import copy
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class Host:
    """A family's tiny model as transformers has it, and an attached twin with the same weights."""

    tiny: object
    plain: torch.nn.Module
    attached: torch.nn.Module


@functools.cache
def build_host(name: str) -> Host:
    """The `Host` of the family `name`."""
    import tiny_models

    from rotatek_cache import attach

    tiny = tiny_models.FAMILIES[name]
    plain = tiny.build()
    return Host(tiny, plain, attach(copy.deepcopy(plain)))


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Host:
    """The `Host` of the family that the test is parametrized with (indirectly)."""
    return build_host(request.param)


@pytest.fixture
def llava() -> Host:
    """The plainest family."""
    return build_host("llava")


@pytest.fixture(autouse=True)
def _one_thread_and_no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield
