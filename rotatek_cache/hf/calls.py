"""Calls of functions whose signatures transformers fixes."""

import functools
import inspect
from typing import Any


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def arguments_of(function: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Name the arguments of a call."""
    signature = _signature(function)
    given = signature.bind_partial(*args, **kwargs).arguments
    rest = (name for name, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD)
    more = given.pop(next(rest, ""), {})
    return given | more
