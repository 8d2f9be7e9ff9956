"""What the tests share."""

import faulthandler
import gc
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_finish():
    """Leave what the imports made out of every later garbage collection, which takes half a second otherwise."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # so that nothing is left when the process ends


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


GPU_SECONDS = 120  # that a test on a GPU may take
HANGING_SECONDS = 30  # more, after which a process that waits for the GPU is ended


@pytest.fixture(autouse=True)
def _time_limit(request: pytest.FixtureRequest):
    """Fail a GPU test that takes too long; where it hangs outside of Python, print where and end the process."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return

    def stop(*_):
        pytest.fail(f"took more than {GPU_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(GPU_SECONDS)
    faulthandler.dump_traceback_later(GPU_SECONDS + HANGING_SECONDS, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def _seed_and_no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield
