"""What the tests share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def host(request: pytest.FixtureRequest):
    """The `Host` of the family that the test is parametrized with (indirectly)."""
    from hosts import build_host  # here, so that tests of the maths need no transformers

    return build_host(request.param)


@pytest.fixture
def llava():
    """The `Host` of the plainest family."""
    from hosts import build_host

    return build_host("llava")


@pytest.fixture(autouse=True)
def _seed_and_no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield
