"""The options of a user: how visual Keys and Values are stored. Each is documented and checked by its field.

``python -m rotatek_cache.options`` prints the table of docs/options.md; the docstring of `RotateKCache` and the flags
of the SGLang adapter are made of the same texts.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from textwrap import indent, wrap
from typing import Any, Literal, NamedTuple, TypeVar

Bits = Literal[8, 4, 2, "fp8", "auto"] | None
Solver = Literal["subspace", "eigh"]
Worth = Literal["gain", "variance", "relative"]
RowBits = float | tuple[float, float] | None
T = TypeVar("T")

BIT_CHOICES: tuple[Bits, ...] = (None, 8, 4, 2, "fp8", "auto")
ROW_BITS = 4.0  # of a channel, where all tokens are coded
WHOLE_BITS = 16  # coefficients are kept as numbers of the model's dtype
STUDY_OPTIONS = ("solver", "always_compress")  # those that `RotateKCache` takes only through `for_study`


class Allocation(NamedTuple):
    """A way to deal a budget out to layers and heads, from a calibrated spectrum.

    Attributes:
        over: "uniform" gives every head the same, "layers" shares the budget between layers, "heads" between the heads
            of all layers.
        worth: what a coefficient's distortion costs: its variance, its variance times what it adds to the squared error
            of logits or outputs ("gain"), or its share of its head's variance ("relative").
        floor: share in [0, 1] of an equal part that each head gets in any case.
    """

    over: Literal["uniform", "layers", "heads"] = "uniform"
    worth: Worth = "gain"
    floor: float = 0.25

    @classmethod
    def of(cls, given: object) -> "Allocation":
        """Make an allocation from its name, or from a sequence of its attributes; errors name what was expected."""
        parts = (given,) if isinstance(given, str) else given
        if not isinstance(parts, Sequence) or not 1 <= len(parts) <= len(cls._fields):
            raise TypeError(f"allocation must be a name or (over, worth, floor), got {given!r}")
        found = cls(*parts)
        if found.over not in ("uniform", "layers", "heads"):
            raise ValueError(f"allocation must be 'uniform', 'layers' or 'heads', got {found.over!r}")
        if found.worth not in ("gain", "variance", "relative"):
            raise ValueError(f"allocation's worth must be 'gain', 'variance' or 'relative', got {found.worth!r}")
        if isinstance(found.floor, bool) or not isinstance(found.floor, int | float) or not 0 <= found.floor <= 1:
            raise ValueError(f"allocation's floor must be in [0, 1], got {found.floor!r}")
        return found


UNIFORM = Allocation()


def about(
    text: str,
    *,
    interval: str | None = None,
    least: int | None = None,
    choices: Sequence[object] = (),
    takes: str | None = None,
) -> dict[str, Any]:
    """Describe an option, as the metadata of its field.

    Args:
        text: what it means, for docstrings, tables and flags.
        interval: the numbers that it may be, from 0 to 1, as in ``"[0, 1)"``.
        least: the least integer that it may be.
        choices: all that it may be, where that is a few values.
        takes: what a table says that it may be; by default what the limits above say.
    """
    return {"help": text, "interval": interval, "least": least, "choices": tuple(choices), "takes": takes}


def listed(words: Iterable[object]) -> str:
    """Write words as in ``8, 4 or auto``."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


def check_option(described: "Field[Any]", value: Any) -> None:
    """Raise a TypeError or ValueError where `value` is not within the limits that the metadata of its field states."""
    name, limits = described.name, described.metadata
    choices, interval, least = limits["choices"], limits["interval"], limits["least"]
    if choices:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ValueError(f"{name} must be {listed(map(repr, choices))}, got {value!r}")
    elif value is None and described.default is None:
        return
    elif isinstance(described.default, bool):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    elif interval is not None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        low = value >= 0 if interval[0] == "[" else value > 0
        high = value <= 1 if interval[-1] == "]" else value < 1
        if not (low and high):
            raise ValueError(f"{name} must be in {interval}, got {value}")
    elif least is not None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class FitOptions:
    """The way visual Keys and Values are stored; exactly one of `sparsity`, `rank` and `energy` sets the rank of Keys.

    What options go together depends on what a basis can do, and is checked where its codec is chosen
    (`rotatek_cache.codecs.registry.codecs_for`).
    """

    sparsity: float | None = field(
        default=None,
        metadata=about(
            "share of the Key channels removed; 0 keeps Keys as they are. Exactly one of sparsity, rank and energy is "
            "given",
            interval="[0, 1)",
        ),
    )
    rank: int | None = field(
        default=None, metadata=about("coefficients kept per visual Key, up to the head width", least=1)
    )
    energy: float | None = field(
        default=None,
        metadata=about(
            "share of the (query-weighted) variance that each head of a layer keeps; the layer's rank follows, for "
            "each row of a batch on its own",
            interval="(0, 1]",
        ),
    )
    query_window: int = field(
        default=32,
        metadata=about(
            "how many of the last queries weigh the channels. They are the prompt's last, unless a chunked prefill "
            "ends a chunk between an image and the end",
            least=1,
        ),
    )
    solver: Solver = field(
        default="subspace",
        metadata=about("subspace is the paper's five subspace iterations, eigh exact", choices=("subspace", "eigh")),
    )
    always_compress: bool = field(
        default=False, metadata=about("compress also where the basis costs more bytes than it saves")
    )
    basis: str = field(
        default="rotatek",
        metadata=about(
            "how Keys are stored: a name of rotatek_cache.codecs.registry.CODECS (rotatek is the paper's, pca the same "
            "without the query weight, hadamard and none take key_bits and sparsity=0), or a basis file made by "
            "`rotatek calibrate`",
            takes="a name, or a .safetensors file",
        ),
    )
    key_bits: Bits = field(
        default=None,
        metadata=about(
            "quantise coefficients to 8, 4 or 2 bits per channel, or to float8 (e4m3) with a scale per channel; auto "
            "spends (1 - sparsity) * 16 bits per Key channel on all channels by reverse water-filling; each row's "
            "delta comes on top, with the bytes of one dense token (two in bfloat16): n visual tokens take "
            "1 / (1 - sparsity + 1 / n) times fewer bytes. None keeps the model's dtype",
            choices=BIT_CHOICES,
        ),
    )
    value_sparsity: float | None = field(
        default=None,
        metadata=about(
            "rotate Values too and remove this share of their channels; None keeps Values dense", interval="[0, 1)"
        ),
    )
    value_bits: Bits = field(
        default=None, metadata=about("as key_bits, for the coefficients of Values", choices=BIT_CHOICES)
    )
    value_basis: Literal["auto", "none", "hadamard"] = field(
        default="auto",
        metadata=about(
            "auto is PCA, or the file's basis where basis is a file; none quantises Values per token as they are; "
            "hadamard quantises them per channel under a Walsh-Hadamard rotation",
            choices=("auto", "none", "hadamard"),
        ),
    )
    basis_bits: Literal[8] | None = field(
        default=None,
        metadata=about(
            "8 stores the bases that a request owns as int8 with a scale per column, half the bytes of half precision; "
            "None keeps the model's dtype",
            choices=(None, 8),
        ),
    )
    allocation: Allocation = field(
        default=UNIFORM,
        metadata=about(
            "uniform, or layers or heads to deal sparsity, rank or energy out to them by the spectrum of a calibrated "
            "basis; an Allocation says how in detail",
            takes="'uniform', 'layers', 'heads' or an Allocation",
        ),
    )
    streaming: bool = field(
        default=False,
        metadata=about(
            "seal visual tokens after every forward in place of waiting for the end of their image, so that a chunked "
            "prefill never holds an image densely; later chunks then attend to compressed Keys. Calibrated bases only, "
            "since a basis for each chunk would cost more than it saves",
        ),
    )
    text: Literal["dense", "coded"] = field(
        default="dense",
        metadata=about(
            "coded stores Keys and Values of all tokens, text and images alike, as codes in the basis of a file that "
            "was calibrated with text, but for each row's first 4 tokens and its last 64; what a token is stored as "
            "follows from that token alone. dense compresses visual tokens only",
            choices=("dense", "coded"),
        ),
    )
    bits: RowBits = field(
        default=None,
        metadata=about(
            "with text='coded', bits of a token per channel, spent on coefficients by reverse water-filling: a number "
            "for Keys and Values alike, or (Keys, Values); 16 keeps whole coefficients. None is 4",
            takes="a number up to 8, 16, or a pair of them",
        ),
    )
    decoded: str | None = field(
        default=None,
        metadata=about(
            "a bound on what an answer adds: 'rkv:512' holds at most 512 of its tokens in each head, by R-KV. When as "
            "many are held, 128 of them go (or a quarter of the bound), those that are least attended to and most like "
            "others; settings follow as in 'rkv:512,every=64,window=8'. None keeps all",
            takes="a name of rotatek_cache.token_pruning.registry.DECODED and a number of tokens, as 'rkv:512'",
        ),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "basis", _basis_name(self.basis))
        object.__setattr__(self, "allocation", Allocation.of(self.allocation))
        for described in fields(self):
            if described.name != "bits":
                check_option(described, getattr(self, described.name))
        if self.codes_text:
            object.__setattr__(self, "bits", _row_bits(ROW_BITS if self.bits is None else self.bits))
            self._check_coded_text()
            return
        if self.bits is not None:
            raise ValueError(f"bits needs text='coded'; visual tokens take key_bits and value_bits, got {self.bits!r}")
        amounts = {name: getattr(self, name) for name in ("sparsity", "rank", "energy")}
        given = ", ".join(f"{name}={value}" for name, value in amounts.items() if value is not None)
        if sum(value is not None for value in amounts.values()) != 1:
            raise ValueError(f"exactly one of sparsity, rank and energy sets the rank; got {given or 'none of them'}")
        for name, share in (("key_bits", "sparsity"), ("value_bits", "value_sparsity")):
            if getattr(self, name) == "auto" and getattr(self, share) is None:
                raise ValueError(f"{name}='auto' needs {share}, which sets the bits to spend")
        if self.allocation.over == "layers" and self.energy is not None:
            raise ValueError("energy is kept by each head or layer on its own: allocation must be 'uniform' or 'heads'")
        if self.is_calibrated:
            if (self.solver, self.query_window) != (FitOptions.solver, FitOptions.query_window):
                raise ValueError(
                    "solver and query_window fit a basis to a prompt; a calibrated basis is fitted already: leave them "
                    f"out, got {self}"
                )
            return
        for name, chosen in (("streaming", self.streaming), ("allocation", self.allocation.over != "uniform")):
            if chosen:
                raise ValueError(f"{name} needs a calibrated basis (a .safetensors file), got basis={self.basis!r}")

    def _check_coded_text(self) -> None:
        """Raise a ValueError for what does not go with codes of all tokens."""
        if not self.is_calibrated:
            raise ValueError(
                "text='coded' needs a basis file (.safetensors) that `rotatek calibrate --text` has made, got "
                f"basis={self.basis!r}"
            )
        together = ("basis", "text", "bits", "allocation")
        others = [f.name for f in fields(self) if f.name not in together and getattr(self, f.name) != f.default]
        if others:
            raise ValueError(
                f"text='coded' is set by bits alone, for all tokens, and takes no {listed(others)}: leave out what "
                f"concerns visual tokens only, got {self}"
            )

    def __str__(self) -> str:
        """Name the options that differ from their defaults."""
        chosen = ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default)
        return ", ".join(f"{name}={value!r}" for name, value in chosen)

    @property
    def is_identity(self) -> bool:
        """Whether Keys stay what they are, so that nothing is fitted and nothing is lost."""
        return self.sparsity == 0 and self.key_bits is None

    @property
    def is_calibrated(self) -> bool:
        """Whether `basis` names a basis file."""
        return self.basis.endswith(".safetensors")

    @property
    def follows_content(self) -> bool:
        """Whether what a token is stored as follows from the states themselves, so that rows may differ in it."""
        return not self.is_calibrated and (self.energy is not None or "auto" in (self.key_bits, self.value_bits))

    @property
    def codes_text(self) -> bool:
        """Whether all tokens are coded, text too."""
        return self.text == "coded"

    @property
    def row_bits(self) -> tuple[float, float]:
        """Bits per channel of Keys and of Values where all tokens are coded."""
        assert isinstance(self.bits, tuple)
        return self.bits

    @property
    def codes_values(self) -> bool:
        """Whether Values are stored as coefficients too."""
        return self.value_sparsity is not None or self.value_bits is not None

    def rank_for(self, head_width: int) -> int | None:
        """Find the rank for a head of `head_width` channels before padding; None if it follows from the Keys."""
        if self.energy is not None:
            return None
        if self.sparsity is not None:
            return rank_of_share(self.sparsity, head_width)
        assert self.rank is not None
        if self.rank > head_width:
            raise ValueError(f"rank must be at most the head width {head_width}, got {self.rank}")
        return self.rank


def _row_bits(given: object) -> tuple[float, float]:
    """Make the bits of Keys and Values of a number or a pair; errors name what was expected."""
    pair = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given, given)
    if len(pair) != 2:
        raise ValueError(f"bits must be a number or (Keys, Values), got {given!r}")
    for bits in pair:
        if isinstance(bits, bool) or not isinstance(bits, int | float):
            raise TypeError(f"bits must be a number or two, got {given!r}")
        if not (0 < bits <= max(b for b in BIT_CHOICES if isinstance(b, int)) or bits == WHOLE_BITS):
            raise ValueError(f"bits must be above 0 and at most 8, or {WHOLE_BITS} for whole coefficients, got {bits}")
    return float(pair[0]), float(pair[1])  # type: ignore[arg-type]


def rank_of_share(sparsity: float, head_width: int) -> int:
    """Count the channels left when a share `sparsity` of `head_width` is removed."""
    return head_width - int(head_width * sparsity)


def _basis_name(basis: Any) -> str:
    """Name a basis file by its whole path, so that the working directory may change; a name stays."""
    if isinstance(basis, os.PathLike):
        basis = os.fspath(basis)
    if not isinstance(basis, str):
        raise TypeError(f"basis must be a name or the path of a basis file, got {type(basis).__name__}")
    return str(Path(basis).expanduser().absolute()) if basis.endswith(".safetensors") else basis


def with_option_docs(documented: type[T]) -> type[T]:
    """Replace the line ``<options>`` in a class's docstring by the options that are no study's, as of `FitOptions`."""
    if documented.__doc__:  # python -OO has none
        lines = []
        for described in fields(FitOptions):
            if described.name not in STUDY_OPTIONS:
                first, *rest = wrap(f"{described.name}: {described.metadata['help']}.", 108)
                lines += [first, *(f"    {line}" for line in rest)]
        documented.__doc__ = documented.__doc__.replace("        <options>", indent("\n".join(lines), " " * 8))
    return documented


def options_table() -> str:
    """Write all options as a Markdown table."""
    rows = ["| option | takes | default | meaning |", "|---|---|---|---|"]
    for described in fields(FitOptions):
        limits, default = described.metadata, described.default
        if limits["takes"] is not None:
            takes = limits["takes"]
        elif limits["choices"]:
            takes = listed(map(repr, limits["choices"]))
        elif limits["interval"] is not None:
            takes = f"a number in {limits['interval']}"
        else:
            takes = "True or False" if isinstance(default, bool) else f"an integer from {limits['least']}"
        shown = default.over if isinstance(default, Allocation) else default
        study = " (`RotateKCache.for_study` only)" if described.name in STUDY_OPTIONS else ""
        rows.append(f"| `{described.name}` | {takes} | `{shown!r}` | {limits['help']}{study} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(options_table())  # noqa: T201 (that is its purpose)
