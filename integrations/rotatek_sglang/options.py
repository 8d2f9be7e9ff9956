"""The adapter's options, read from the environment, which SGLang's processes inherit.

Each option has a variable, such as `ROTATEK_SPARSITY`; any of them switches the adapter on. The launcher offers all of
them as flags. Most are those of `FitOptions`, from whose fields names, checks and help texts are taken.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from rotatek_cache.codecs.basis_file import load_basis
from rotatek_cache.codecs.registry import BASES, codecs_for
from rotatek_cache.codecs.token_rows import token_rows
from rotatek_cache.options import FitOptions, about, check_option, listed

PREFIX = "ROTATEK_"
# Pools hold Values rotated and all text, and SGLang decides when a prompt is complete.
NOT_SERVED = ("value_basis", "streaming", "decoded")
NOT_SERVED_BITS = ("fp8",)  # the pools have not been tried with float8


@dataclass(frozen=True)
class ServingOptions:
    """The settings of a server that compresses: the options of the method, and the memory set aside for what."""

    fit: FitOptions
    text_share: float = field(
        default=0.25,
        metadata=about("share of the tokens that are text, for which memory is set aside", interval="(0, 1]"),
    )
    bases: int | None = field(
        default=None,
        metadata=about(
            "prompts whose images can be held, in use or cached; by default twice the requests that run at once",
            least=1,
        ),
    )
    beginnings: int | None = field(
        default=None,
        metadata=about(
            "with bits, prompts without first tokens in common that can be held, in use or cached: the first 4 tokens "
            "of each stay dense; by default 4 times the requests that run at once",
            least=1,
        ),
    )
    cuda_graphs: bool = field(
        default=False,
        metadata=about(
            "decode in CUDA graphs where text is dense; where all tokens are coded, SGLang's own flags say so, and "
            "they are on by default"
        ),
    )

    @classmethod
    def of(cls, **given: Any) -> "ServingOptions":
        """Make the options from all of them by name."""
        own = {described.name for described in fields(cls)}
        if given.get("bits") is not None:
            given = {"text": "coded", **given}
        fit = FitOptions(**{name: value for name, value in given.items() if name not in own})
        return cls(fit, **{name: value for name, value in given.items() if name in own})

    def __post_init__(self) -> None:
        for described in _own_fields():
            check_option(described, getattr(self, described.name))
        fit = self.fit
        idle = ("text_share", "bases", "cuda_graphs") if fit.codes_text else ("beginnings",)
        for described in _own_fields():
            if described.name in idle and getattr(self, described.name) != described.default:
                other = "text dense" if fit.codes_text else "all tokens coded (bits)"
                raise ValueError(f"{described.name} is for a server with {other}: leave it out")
        if fit.is_calibrated:
            return
        if fit.basis not in BASES:
            raise ValueError(
                f"basis must be one of {', '.join(sorted(BASES))}, which are stored as rotated coefficients, or "
                f"the path of a calibrated basis (a .safetensors file), got {fit.basis!r}"
            )
        codecs_for(fit)
        if fit.energy is not None:
            raise ValueError(
                "energy needs a calibrated basis (basis=file.safetensors): ranks that differ from request to "
                "request cannot size a pool"
            )
        for name in ("key_bits", "value_bits"):
            if getattr(fit, name) == "auto":
                raise ValueError(
                    f"{name}='auto' needs a calibrated basis (basis=file.safetensors): widths that differ from "
                    "request to request cannot size a pool; give 8, 4 or 2"
                )

    def check_basis_file(self) -> None:
        """Raise a ValueError if a basis file is asked for and cannot be read; later checks need the model."""
        if not self.fit.is_calibrated:
            return
        layers = load_basis(self.fit.basis).layers
        if self.fit.codes_text:
            for kind in ("key", "value"):
                token_rows(self.fit, min(layers), kind)

    def environment(self) -> dict[str, str]:
        """Name the variables that ask for this."""
        chosen = {}
        for name, described in OPTIONS.items():
            value = getattr(self if name in self.__dict__ else self.fit, name)
            if value != described.default:
                chosen[PREFIX + name.upper()] = _written(name, value)
        return chosen


def _written(name: str, value: Any) -> str:
    """Write the value of an option as `parser_of` reads it."""
    if name == "bits":
        return ",".join(f"{bits:g}" for bits in value)
    return str(value.over if name == "allocation" else value)


def _own_fields() -> "list[Field[Any]]":
    return [described for described in fields(ServingOptions) if described.name != "fit"]


OPTIONS: "dict[str, Field[Any]]" = {
    described.name: described for described in (*fields(FitOptions), *_own_fields()) if described.name not in NOT_SERVED
}


def parser_of(described: "Field[Any]") -> Callable[[str], Any]:
    """Make the function that reads an option's value from text; it raises a ValueError where it cannot."""
    limits = described.metadata
    if described.name == "bits":
        return _bits
    if limits["choices"]:
        known = {str(c): c for c in limits["choices"] if c is not None and c not in NOT_SERVED_BITS}
        return lambda text: _chosen(known, text)
    if isinstance(described.default, bool):
        return lambda text: _chosen({"True": True, "1": True, "False": False, "0": False}, text)
    if limits["interval"] is not None:
        return float
    return int if limits["least"] is not None else str


def _bits(text: str) -> float | tuple[float, ...]:
    """Read a number, or one for Keys and one for Values."""
    numbers = tuple(float(part) for part in text.split(","))
    return numbers[0] if len(numbers) == 1 else numbers


def _chosen(known: Mapping[str, Any], text: str) -> Any:
    if text not in known:
        raise ValueError(f"expected {listed(known)}, got {text!r}")
    return known[text]


def asked_for(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether the environment asks for compression; options without a rank do so, too, and are an error."""
    return any(name.startswith(PREFIX) for name in environment)


def read(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Read the options that the environment states, by name; a ValueError names the variable where one is wrong."""
    given = {}
    for name, value in environment.items():
        if not name.startswith(PREFIX):
            continue
        asked = name.removeprefix(PREFIX).lower()
        if asked not in OPTIONS:
            known = ", ".join(PREFIX + known.upper() for known in OPTIONS)
            raise ValueError(f"unknown option {name} in the environment; known are {known}")
        try:
            given[asked] = parser_of(OPTIONS[asked])(value)
        except ValueError as error:
            raise ValueError(f"{name}={value!r} in the environment: {error}") from None
    return given


def from_environment(environment: Mapping[str, str] = os.environ) -> ServingOptions:
    """Read the options of the environment and check them together."""
    return ServingOptions.of(**read(environment))


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return `parse` for argparse, which drops the message of an ordinary ValueError."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Offer every option as a flag; those not given stay out of the namespace."""
    for name, described in OPTIONS.items():
        flag, text = "--" + name.replace("_", "-"), described.metadata["help"]
        if described.default not in (None, False):
            text += f" (default: {_written(name, described.default)})"
        if isinstance(described.default, bool):
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(flag, type=_argument(parser_of(described)), default=argparse.SUPPRESS, help=text)
