"""Keep autocast out of what is computed in the dtypes that the code names."""

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Make `function` run as it does outside of `torch.autocast`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        enabled = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        with contextlib.ExitStack() as off:
            for kind in enabled:
                off.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return run


def attention_dtype(states: Tensor) -> torch.dtype:
    """Find the dtype in which attention reads `states`: that of autocast where it is on, or their own."""
    kind = states.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return states.dtype
