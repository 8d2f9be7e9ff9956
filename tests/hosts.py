"""Models with a cache's two sides: as transformers has them, and attached. Built once per run."""

import copy
import functools
import gc
from dataclasses import dataclass

import torch
from tiny_more import EVERY
from tiny_parts import Tiny

from rotatek_cache import attach


@dataclass(frozen=True)
class Host:
    """A family's tiny model as transformers has it, and an attached twin with the same weights."""

    tiny: Tiny
    plain: torch.nn.Module
    attached: torch.nn.Module


@functools.cache
def build_host(name: str) -> Host:
    """The `Host` of the family `name`; a test that changes a model takes a copy."""
    tiny = EVERY[name]
    plain = tiny.build()
    host = Host(tiny, plain, attach(copy.deepcopy(plain)))
    gc.freeze()  # it stays, and no collection has to go through it
    return host
