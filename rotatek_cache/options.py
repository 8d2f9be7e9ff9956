"""What a user chooses: how a basis is fitted, how Keys and Values are stored; each option with its check."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from rotatek_cache.core.fitting import Solver

Bits = Literal[8, 4, 2, "fp8", "auto"] | None
Worth = Literal["gain", "variance", "relative"]


class Allocation(NamedTuple):
    """How a budget is dealt out to layers and heads, from a calibrated spectrum.

    Attributes:
        over: "uniform" gives every head the same, "layers" shares the budget between layers, "heads" between the heads
            of all layers.
        worth: what a coefficient's distortion costs: its variance, its variance times what it adds to the squared error
            of logits or outputs ("gain"), or its share of its head's variance ("relative").
        floor: share in [0, 1] of an equal part that each head gets in any case.
    """

    over: Literal["uniform", "layers", "heads"] = "uniform"
    worth: Worth = "gain"
    floor: float = 0.5

    @classmethod
    def of(cls, given: object) -> "Allocation":
        """An allocation from its name, or from a sequence of its attributes; errors name what was expected."""
        parts = (given,) if isinstance(given, str) else given
        if not isinstance(parts, Sequence) or not 1 <= len(parts) <= 3:
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


@dataclass(frozen=True)
class FitOptions:
    """How a basis is fitted; exactly one of `sparsity`, `rank` and `energy` sets its rank.

    Args:
        sparsity: share of Key channels removed, in [0, 1): ``r = D - int(D * sparsity)``. 0 is the identity basis.
        rank: coefficients kept per Key, from 1 to the head width.
        energy: share in (0, 1] of the (query-weighted) variance that each head of a layer must keep; the layer's rank
            follows, for each row of a batch on its own.
        query_window: number of queries that weigh the channels: the last ones seen when the segment is sealed, which
            are the prompt's last unless a chunked prefill ends a chunk between an image and the end (the paper: 32).
        query_weight: weigh Key channels by the norm of the window's queries (the paper: on).
        solver: "subspace" (the paper's five subspace iterations) or "eigh" (exact).
        always_compress: compress segments in which the basis costs more bytes than it saves too (for studies).
        basis: how Keys are stored: a name of `rotatek_cache.methods.METHODS` ("rotatek" is the paper's), or the path of
            a basis file (``.safetensors``) made by `rotatek calibrate`.
        key_bits: None keeps coefficients in the model's dtype; 8, 4 or 2 quantises them per channel, "fp8" stores them
            as float8 (e4m3) with a scale per channel; "auto" spends ``(1 - sparsity) * 16`` bits per Key channel on
            all channels by reverse water-filling.
        value_sparsity: share of Value channels removed after a rotation of their own; None keeps Values dense.
        value_bits: as `key_bits`, for the Values' coefficients.
        value_basis: "auto" is PCA, or the file's where `basis` is one; "none" does not rotate and quantises per token.
        basis_bits: 8 stores the bases of Keys and Values that a request owns as int8, with a scale per column
            (`KeyBasis.in_int8`); None keeps the model's dtype.
        allocation: how `sparsity`, `rank` or `energy` is dealt out to layers and heads; calibrated bases only.
        basis_per: "prompt" fits one basis to all visual tokens of a seal, "image" one to each image (a run of visual
            tokens, in which single other tokens do not count).
        streaming: seal visual tokens after every forward in place of waiting for the end of their image, so that a
            chunked prefill never holds an image densely; later chunks then attend to compressed Keys. Calibrated
            bases only, since a basis of its own for each chunk would cost more than it saves.
    """

    sparsity: float | None = None
    rank: int | None = None
    energy: float | None = None
    query_window: int = 32
    query_weight: bool = True
    solver: Solver = "subspace"
    always_compress: bool = False
    basis: str = "rotatek"
    key_bits: Bits = None
    value_sparsity: float | None = None
    value_bits: Bits = None
    value_basis: Literal["auto", "none"] = "auto"
    basis_bits: Literal[8] | None = None
    allocation: Allocation = UNIFORM
    basis_per: Literal["prompt", "image"] = "prompt"
    streaming: bool = False

    def __post_init__(self) -> None:
        given = {
            name: getattr(self, name) for name in ("sparsity", "rank", "energy") if getattr(self, name) is not None
        }
        if len(given) != 1:
            got = ", ".join(f"{name}={value}" for name, value in given.items()) or "none of them"
            raise ValueError(f"exactly one of sparsity, rank and energy sets the rank; got {got}")
        for name in ("sparsity", "energy", "value_sparsity"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if self.value_sparsity is not None and not 0 <= self.value_sparsity < 1:
            raise ValueError(f"value_sparsity must be in [0, 1), got {self.value_sparsity}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {self.energy}")
        for name in ("rank", "query_window"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("query_weight", "always_compress", "streaming"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.solver not in ("subspace", "eigh"):
            raise ValueError(f"solver must be 'subspace' or 'eigh', got {self.solver!r}")
        if not isinstance(self.basis, str):
            raise TypeError(f"basis must be a name or the path of a basis file, got {type(self.basis).__name__}")
        if not self.query_weight and self.basis not in ("rotatek", "pca"):
            raise ValueError(f"query_weight=False is plain PCA: it does not go with basis={self.basis!r}")
        if self.streaming and not self.is_calibrated:
            raise ValueError(f"streaming needs a calibrated basis (a .safetensors file), got basis={self.basis!r}")
        for name, share in (("key_bits", self.sparsity), ("value_bits", self.value_sparsity)):
            bits = getattr(self, name)
            if bits is not None and (type(bits) not in (int, str) or bits not in (8, 4, 2, "fp8", "auto")):
                raise ValueError(f"{name} must be None, 8, 4, 2, 'fp8' or 'auto', got {bits!r}")
            if bits == "auto" and share is None:
                budget = "sparsity" if name == "key_bits" else "value_sparsity"
                raise ValueError(f"{name}='auto' needs {budget}, which sets the bits to spend")
        self._check_combination()

    def _check_combination(self) -> None:
        """Refuse options that do not go together."""
        if self.basis == "none" and (self.sparsity != 0 or self.key_bits in ("auto", "fp8")):
            raise ValueError(
                "basis='none' keeps every channel where it is: it takes sparsity=0, with key_bits of 8, 4 or 2, "
                f"got {self}"
            )
        if self.allocation.over == "layers" and self.energy is not None:
            raise ValueError("energy is kept by each head or layer on its own: allocation must be 'uniform' or 'heads'")
        if self.basis in ("spark", "spark_mean") and (self.key_bits is not None or self.energy is not None):
            raise ValueError(
                f"basis={self.basis!r} keeps channels of each token as they are: it takes sparsity or "
                f"rank and no key_bits, got {self}"
            )
        if self.basis_per not in ("prompt", "image"):
            raise ValueError(f"basis_per must be 'prompt' or 'image', got {self.basis_per!r}")
        if self.value_basis not in ("auto", "none"):
            raise ValueError(f"value_basis must be 'auto' or 'none', got {self.value_basis!r}")
        if self.value_basis == "none" and (self.value_bits not in (8, 4, 2) or self.value_sparsity):
            raise ValueError(
                "value_basis='none' quantises Values per token as they are: it takes value_bits of 8, 4 or 2 and no "
                f"value_sparsity, got {self}"
            )
        if self.is_calibrated and (self.solver, self.query_window) != (FitOptions.solver, FitOptions.query_window):
            raise ValueError(
                "solver and query_window fit a basis to a prompt; a calibrated basis is fitted already: leave them "
                f"out, got {self}"
            )
        if self.basis_bits is not None and (type(self.basis_bits) is not int or self.basis_bits != 8):
            raise ValueError(f"basis_bits must be None or 8, got {self.basis_bits!r}")
        if self.basis_bits is not None and not self.owns_basis:
            raise ValueError(
                "basis_bits codes the basis that a request owns, and here it owns none: it needs a basis fitted to the "
                f"prompt or value_sparsity, got {self}"
            )
        if self.allocation.over != "uniform" and not self.is_calibrated:
            raise ValueError(f"allocation needs a calibrated basis (a .safetensors file), got basis={self.basis!r}")

    def __str__(self) -> str:
        """The options that differ from their defaults."""
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
    def owns_basis(self) -> bool:
        """Whether Keys or Values get a rotation of their own from the request, which it then has to store."""
        if self.is_calibrated:
            return False
        rotates_keys = self.basis not in ("none", "spark", "spark_mean") and not self.is_identity
        return rotates_keys or (self.codes_values and self.value_basis == "auto")

    @property
    def codes_values(self) -> bool:
        """Whether Values are stored as coefficients too."""
        return self.value_sparsity is not None or self.value_bits is not None

    def rank_for(self, head_width: int) -> int | None:
        """Rank for a head of `head_width` channels before padding; None if it follows from the Keys (`energy`)."""
        if self.energy is not None:
            return None
        if self.sparsity is not None:
            return rank_of_share(self.sparsity, head_width)
        assert self.rank is not None
        if self.rank > head_width:
            raise ValueError(f"rank must be at most the head width {head_width}, got {self.rank}")
        return self.rank


def rank_of_share(sparsity: float, head_width: int) -> int:
    """Channels left when a share `sparsity` of `head_width` is removed."""
    return head_width - int(head_width * sparsity)
