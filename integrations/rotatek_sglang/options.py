"""What the adapter is asked to do: read from the environment, which SGLang's processes inherit.

Each field of `ServingOptions` has a variable, such as `ROTATEK_SPARSITY`; any of them switches it on. The launcher
offers all of them as flags.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from rotatek_cache.codecs.calibrated import load_basis
from rotatek_cache.codecs.registry import BASES
from rotatek_cache.core.fitting import Solver
from rotatek_cache.options import Allocation, Bits, FitOptions

PREFIX = "ROTATEK_"


@dataclass(frozen=True)
class ServingOptions:
    """How a server compresses; `HELP` says what each field means, `rotatek_cache.FitOptions` more of most of them."""

    sparsity: float | None = None
    rank: int | None = None
    energy: float | None = None
    basis: str = "rotatek"
    query_window: int = 32
    solver: Solver = "subspace"
    key_bits: Bits = None
    value_sparsity: float | None = None
    value_bits: Bits = None
    basis_bits: Literal[8] | None = None
    allocation: str = "uniform"
    always_compress: bool = False
    text_share: float = 0.25
    bases: int | None = None
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.text_share <= 1:
            raise ValueError(f"text_share must be in (0, 1], got {self.text_share}")
        if self.bases is not None and self.bases < 1:
            raise ValueError(f"bases must be at least 1, got {self.bases}")
        fit = self.fit  # checks the rest
        if not fit.is_calibrated:
            if self.basis not in BASES:
                raise ValueError(
                    f"basis must be one of {', '.join(sorted(BASES))}, which are stored as rotated coefficients, or "
                    f"the path of a calibrated basis (a .safetensors file), got {self.basis!r}"
                )
            if self.energy is not None:
                raise ValueError(
                    "energy needs a calibrated basis (basis=file.safetensors): ranks that differ from request to "
                    "request cannot size a pool"
                )
            for name in ("key_bits", "value_bits"):
                if getattr(self, name) == "auto":
                    raise ValueError(
                        f"{name}='auto' needs a calibrated basis (basis=file.safetensors): widths that differ from "
                        "request to request cannot size a pool; give 8, 4 or 2"
                    )

    @property
    def fit(self) -> FitOptions:
        """The part that the method knows."""
        names = {field.name for field in fields(FitOptions)} & {field.name for field in fields(self)}
        given = {name: getattr(self, name) for name in names}
        return FitOptions(**{**given, "allocation": Allocation.of(self.allocation)})

    def check_basis_file(self) -> None:
        """Raise a ValueError if a basis file is asked for and cannot be read; later checks need the model."""
        if self.fit.is_calibrated:
            load_basis(self.basis)

    def environment(self) -> dict[str, str]:
        """The variables that say this."""
        chosen = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        return {PREFIX + name.upper(): str(value) for name, value, default in chosen if value != default}


def _bits(text: str) -> Bits:
    if text not in ("auto", "8", "4", "2"):
        raise ValueError(f"expected 8, 4, 2 or auto, got {text!r}")
    return "auto" if text == "auto" else int(text)  # type: ignore[return-value]


def _flag(text: str) -> bool:
    if text not in ("True", "False", "1", "0"):
        raise ValueError(f"expected 1 or 0, got {text!r}")
    return text in ("True", "1")


HELP: dict[str, tuple[Callable[[str], Any], str]] = {
    "sparsity": (float, "share of Key channels removed from visual tokens, in [0, 1)"),
    "rank": (int, "coefficients kept per visual Key"),
    "energy": (float, "share of the calibrated Key variance that each layer keeps; needs a calibrated basis"),
    "basis": (str, f"how Keys are rotated: {', '.join(BASES)} (default: rotatek), or a calibrated basis file"),
    "query_window": (int, "how many of a prompt's last queries weigh the channels (default: 32)"),
    "solver": (str, "subspace (default) or eigh"),
    "key_bits": (_bits, "code coefficients of Keys with 8, 4 or 2 bits, or, with a calibrated basis, auto"),
    "value_sparsity": (float, "share of Value channels removed from visual tokens (default: Values stay dense)"),
    "value_bits": (_bits, "as key-bits, for Values"),
    "basis_bits": (int, "8 keeps the bases that requests own as int8, half the bytes of half precision"),
    "allocation": (
        str,
        "uniform (default), or layers or heads: a calibrated basis deals coefficients or bits out to them by worth",
    ),
    "always_compress": (_flag, "compress images too small to earn their basis back, too"),
    "text_share": (
        float,
        "share of the tokens that are text, in (0, 1], for which memory is set aside (default: 0.25)",
    ),
    "cuda_graphs": (_flag, "decode in CUDA graphs; off by default, since they have not been run on a GPU yet"),
    "bases": (int, "prompts whose images can be held, in use or cached (default: twice the requests that run at once)"),
}


def asked_for(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment asks for compression; options without a rank do so, too, and are an error."""
    return any(name.startswith(PREFIX) for name in environment)


def read(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The options that the environment states, by name; a ValueError that names the variable where one is wrong."""
    given = {}
    for name, value in environment.items():
        if not name.startswith(PREFIX):
            continue
        option = name.removeprefix(PREFIX).lower()
        if option not in HELP:
            known = ", ".join(PREFIX + known.upper() for known in HELP)
            raise ValueError(f"unknown option {name} in the environment; known are {known}")
        try:
            given[option] = HELP[option][0](value)
        except ValueError as error:
            raise ValueError(f"{name}={value!r} in the environment: {error}") from None
    return given


def from_environment(environment: Mapping[str, str] = os.environ) -> ServingOptions:
    """The options of `read`, checked together."""
    return ServingOptions(**read(environment))


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, which drops what an ordinary ValueError says."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Offer every option as a flag; those not given stay out of the namespace."""
    for name, (parse, text) in HELP.items():
        flag = "--" + name.replace("_", "-")
        if parse is _flag:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(flag, type=_argument(parse), default=argparse.SUPPRESS, help=text)
