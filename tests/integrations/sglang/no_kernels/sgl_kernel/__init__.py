"""Stands in for SGLang's CUDA kernels, hundreds of megabytes: can be imported from, and is an error where it is used.

SGLang imports them by name wherever there is CUDA. With `SGLANG_FORCE_FUSED_OP_BACKEND=native` it calls none of them.
"""

import sys
import types


class Missing:
    """What has been imported."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, part):
        if part.startswith("__"):
            raise AttributeError(part)
        return Missing(f"{self.name}.{part}")

    def __call__(self, *args, **kwargs):
        raise RuntimeError(f"{self.name} is not installed (this is its stand-in): pip install sglang-kernel")


class Module(types.ModuleType):
    __path__ = ()

    def __getattr__(self, part):
        if part.startswith("__"):
            raise AttributeError(part)
        return Missing(f"{self.__name__}.{part}")


for _name in ("", ".kvcacheio", ".quantization", ".scalar_type"):
    sys.modules[__name__ + _name] = Module(__name__ + _name)
