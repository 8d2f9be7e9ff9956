"""Calls of functions whose signatures transformers fixes."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from transformers import DynamicCache, GenerationMixin

CACHE_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, and before


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


@functools.cache
def cache_name(function: Any = GenerationMixin.prepare_inputs_for_generation) -> str:
    """Look up the name under which a function takes the cache: that of `generate` where the signature leaves it open.

    Args:
        function: a forward, or a method of `generate`.
    """
    named = [name for name in CACHE_NAMES if name in _signature(function).parameters]
    return named[0] if named else cache_name()


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Name a cache as the forward of `model` takes it, for ``model(**inputs, **cache_argument(model, cache))``."""
    return {cache_name(type(model).forward): cache}


def stock_cache(model: Any) -> DynamicCache:
    """Make an empty cache of transformers with the layers of the text model."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """Find the cache among named arguments, whose caller may use either name; None where there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
