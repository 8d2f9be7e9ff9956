"""Codecs by name: one paper, one file. Tests and evals walk through these tables."""

import functools
from collections.abc import Callable

from rotatek_cache.codecs.bases.oblique import Oblique
from rotatek_cache.codecs.bases.pca import UncentredPCA
from rotatek_cache.codecs.bases.rotatek import RotateK
from rotatek_cache.codecs.bases.think import ThinK
from rotatek_cache.codecs.calibrated import Calibrated
from rotatek_cache.codecs.dense import Dense
from rotatek_cache.codecs.fitted import BasisMethod, Fitted
from rotatek_cache.codecs.hadamard import HadamardCodes
from rotatek_cache.codecs.interface import KeyCodec, StateOptions
from rotatek_cache.codecs.quantized import ChannelCodes, TokenCodes
from rotatek_cache.codecs.spark import SparKCodec
from rotatek_cache.codecs.token_rows import token_rows
from rotatek_cache.options import FitOptions, listed

BASES: dict[str, BasisMethod] = {
    "rotatek": RotateK(),
    "tempered": RotateK(exponent=0.5),
    "pca": RotateK(exponent=0.0),
    "pca_uncentred": UncentredPCA(),
    "oblique": Oblique(),
    "think": ThinK(),
}
CODECS: dict[str, Callable[[StateOptions], KeyCodec]] = {
    **{name: functools.partial(Fitted, method=method) for name, method in BASES.items()},
    "spark": SparKCodec,
    "spark_mean": functools.partial(SparKCodec, signed_mean=True),
    "none": ChannelCodes,
    "hadamard": HadamardCodes,
}


def codecs_for(options: FitOptions, layer: int = 0, heads: slice | None = None) -> tuple[KeyCodec, KeyCodec]:
    """Choose the codecs of a layer's Keys and Values.

    Args:
        options: how both are stored; a ValueError says where the codecs cannot do what they ask.
        layer: of the model, from 0.
        heads: which of the layer's KV heads come; None if all do.
    """
    if options.codes_text:
        return token_rows(options, layer, "key", heads), token_rows(options, layer, "value", heads)
    keys = _key_codec(StateOptions(options, "key", layer, heads))
    values = _value_codec(StateOptions(options, "value", layer, heads))
    _check_support(keys, f"basis={options.basis!r}")
    _check_support(values, f"value_basis={options.value_basis!r}")
    if options.basis_bits is not None and not (keys.owns_basis or values.owns_basis):
        raise ValueError(
            "basis_bits codes the basis that a request owns, and here it owns none: it needs a basis fitted to the "
            f"prompt or value_sparsity, got {options}"
        )
    return keys, values


def _key_codec(wanted: StateOptions) -> KeyCodec:
    options = wanted.options
    if not options.is_calibrated and options.basis not in CODECS:
        raise ValueError(
            f"basis must be one of {', '.join(sorted(CODECS))}, or the path of a .safetensors file, "
            f"got {options.basis!r}"
        )
    if options.is_identity:
        return Dense(wanted)
    return Calibrated(wanted) if options.is_calibrated else CODECS[options.basis](wanted)


def _value_codec(wanted: StateOptions) -> KeyCodec:
    options = wanted.options
    if options.value_basis != "auto":
        return TokenCodes(wanted) if options.value_basis == "none" else HadamardCodes(wanted)
    if not options.codes_values:
        return Dense(wanted)
    return Calibrated(wanted) if options.is_calibrated else Fitted(wanted, BASES["pca"])


def _check_support(codec: KeyCodec, asked_for: str) -> None:
    """Raise a ValueError where a codec cannot store as many channels or bits as it is asked to."""
    wanted = codec.wanted
    fits = wanted.bits in codec.supports_bits and (codec.supports_energy or wanted.energy is None)
    if fits and (codec.supports_sparsity or wanted.sparsity == 0):
        return
    is_key = wanted.kind == "key"
    if not codec.supports_sparsity:
        amount = "sparsity=0" if is_key else "no value_sparsity"
    else:
        amount = "sparsity, rank or energy" if codec.supports_energy else "sparsity or rank"
    choices = [repr(bits) for bits in codec.supports_bits if bits is not None]
    bits = f"{wanted.kind}_bits of {listed(choices)}" if choices else f"no {wanted.kind}_bits"
    raise ValueError(f"{asked_for} takes {amount} and {bits}, got {wanted.options}")
