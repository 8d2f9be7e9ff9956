"""Calls of functions whose signatures transformers fixes."""

import functools
import inspect
from typing import Any


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def arguments_of(function: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Name the arguments of a call."""
    given = _signature(function).bind_partial(*args, **kwargs).arguments
    more = given.pop("kwargs", {})
    return given | more
