"""The seal of a segment: fit a basis to visual states and store their coefficients, as numbers or as codes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rotatek_cache.codecs.calibrated import CalibratedBasis, HeadBudget, load_basis
from rotatek_cache.codecs.registry import BASES, BasisMethod, NoRotation, SparK, key_method
from rotatek_cache.core.basis import KeyBasis, coded_delta_dtype, compute_dtype, padded_rank
from rotatek_cache.core.fitting import KeyStatistics, key_moments, rank_for_energy
from rotatek_cache.core.quantization import (
    CHANNEL_BLOCK,
    FP8,
    FP8_MOST,
    CodeLayout,
    Numbers,
    TokenCode,
    allocate_bits,
    join_tokens,
    middle_codes,
    pack_coefficients,
    quantise,
)
from rotatek_cache.core.row_layout import integers
from rotatek_cache.core.segments import Stored
from rotatek_cache.options import Bits, FitOptions, rank_of_share

# Numbers that temporaries are made of at once, in as many heads as fit, at least one: on a CPU and on a GPU, where few
# heads at a time would leave most of it idle.
LARGE, LARGE_ON_GPU = 1 << 22, 1 << 26
Ranges = Sequence[tuple[int, int]]  # (first token, tokens) of each row of packed states


class Verdict:
    """Whether states are finite, on its way from the device: a GPU is not waited for."""

    def __init__(self, states: Tensor, message: str) -> None:
        self.message = message
        self.finite = torch.isfinite(states).all()
        self.arrived: torch.cuda.Event | None = None
        if self.finite.is_cuda:
            self.finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(self.finite, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def __deepcopy__(self, memo: dict) -> "Verdict":
        return self

    def known(self) -> bool:
        """Whether it has arrived; a ValueError if the states are not finite."""
        if self.arrived is not None and (torch.cuda.is_current_stream_capturing() or not self.arrived.query()):
            return False
        if not bool(self.finite):
            raise ValueError(self.message)
        return True


class Sealer:
    """Stores the visual Keys and Values of one layer as its options say.

    Args:
        options: how.
        layer: of the model, from 0.
        heads: which of the layer's KV heads come; None if all do.
    """

    def __init__(self, options: FitOptions, layer: int, heads: slice | None = None) -> None:
        self.options = options
        self.layer = layer
        self.verdicts: list[Verdict] = []
        self.calibrated: CalibratedBasis | None = None
        if options.is_calibrated:
            basis = load_basis(options.basis)
            basis.state(layer, "key")
            self.calibrated = basis if heads is None else basis.of_heads(heads)
        else:
            self.key_method = key_method(options.basis if options.query_weight else "pca")

    def is_worth(
        self, tokens: int, key_width: int, value_width: int, dtype: torch.dtype, rank: int | None = None
    ) -> bool:
        """Whether `tokens` tokens of a head take fewer bytes compressed, basis included, than dense.

        With `energy` the Keys decide on the rank: give it once it is known; before, the least is assumed.
        """
        options = self.options
        if options.always_compress:
            return True
        if options.is_identity and not options.codes_values:
            return True  # nothing is gained and nothing lost
        dense = tokens * (key_width + value_width) * dtype.itemsize
        return self.stored_bytes(tokens, key_width, value_width, dtype, rank) < dense

    def stored_bytes(
        self, tokens: int, key_width: int, value_width: int, dtype: torch.dtype, rank: int | None = None
    ) -> int:
        """Bytes of `tokens` compressed tokens of a head with their bases, at most (a spectrum may need fewer)."""
        options = self.options
        stored = 0
        if options.is_identity:
            stored += tokens * key_width * dtype.itemsize
        else:
            rank = rank or options.rank_for(key_width) or 1
            stored += self._key_bytes(tokens, rank, key_width, dtype)
        if not options.codes_values:
            stored += tokens * value_width * dtype.itemsize
        elif options.value_basis == "none":
            assert isinstance(options.value_bits, int)
            stored += tokens * (value_width * options.value_bits // 8 + 2 * dtype.itemsize)
        else:
            share = options.value_sparsity or 0.0
            value_rank = rank_of_share(share, value_width)
            stored += self._bytes(tokens, value_rank, share, value_width, options.value_bits, dtype)
        return stored

    def _key_bytes(self, tokens: int, rank: int, width: int, dtype: torch.dtype) -> int:
        options = self.options
        if self.calibrated is None and isinstance(self.key_method, SparK):
            code = self.key_method.code(width, rank, dtype)
            return tokens * code.row_bytes + width * dtype.itemsize
        if self.calibrated is None and isinstance(self.key_method, NoRotation):
            scales = width * (dtype.itemsize + coded_delta_dtype(dtype).itemsize)
            return tokens * _coded_bytes(width, options.key_bits, dtype) + scales
        return self._bytes(tokens, rank, options.sparsity, width, options.key_bits, dtype)

    def _bytes(self, tokens: int, rank: int, sparsity: float | None, width: int, bits: Bits, dtype: torch.dtype) -> int:
        """Bytes of `tokens` tokens and their basis for one head, at most (a spectrum may need fewer)."""
        if bits == "auto":
            assert sparsity is not None
            token_bytes = int((1 - sparsity) * 2 * width)
            rank = min(width, max(CHANNEL_BLOCK, token_bytes * 4))  # at 2 bits each
        else:
            rank = padded_rank(rank)
            token_bytes = _coded_bytes(rank, bits, dtype)
        delta = dtype if bits is None else coded_delta_dtype(dtype)
        stored = tokens * token_bytes + width * delta.itemsize
        if self.options.is_calibrated:
            return stored
        if self.options.basis_bits is None:
            return stored + width * rank * dtype.itemsize
        return stored + width * rank + rank * compute_dtype(dtype).itemsize

    def store_keys(self, keys: Tensor, ranges: Ranges, queries: Tensor | None, valid: Tensor | None) -> Stored:
        """Store packed Keys ``[H, N, D]``.

        Args:
            keys: rows one after the other.
            ranges: where they lie.
            queries: the window's queries ``[R, H_q, W, D]``.
            valid: bool ``[R, W]``, False for padding.
        """
        options = self.options
        if options.is_identity:
            return Stored(keys, KeyBasis())
        rank, bits = options.rank_for(keys.shape[-1]), options.key_bits
        _check_width("key_bits", bits, keys.shape[-1])
        if self.calibrated is not None:
            return self._store_calibrated("key", keys, ranges, rank, options.sparsity, bits)
        if isinstance(self.key_method, NoRotation):
            self._check_finite("Keys", keys)
            coefficients = [keys[:, start : start + length] for start, length in ranges]
            return _store_coefficients(coefficients, KeyBasis(), bits)
        if isinstance(self.key_method, SparK):
            assert rank is not None
            self._check_finite("Keys", keys)
            return _store_sparse(self.key_method, keys, ranges, rank, queries, valid)
        return self._store_fitted("Keys", keys, ranges, self.key_method, rank, options.sparsity, bits, queries, valid)

    def store_values(self, values: Tensor, ranges: Ranges) -> Stored:
        """Store packed Values ``[H, N, D_v]``."""
        options = self.options
        if not options.codes_values:
            return Stored(values)
        _check_width("value_bits", options.value_bits, values.shape[-1])
        if options.value_basis == "none":
            assert isinstance(options.value_bits, int)
            self._check_finite("Values", values)
            code = TokenCode(options.value_bits, values.shape[-1], values.dtype)
            return Stored(code.pack(values), code=code)
        share = options.value_sparsity or 0.0
        rank = rank_of_share(share, values.shape[-1])
        if self.calibrated is not None:
            return self._store_calibrated("value", values, ranges, rank, share, options.value_bits)
        return self._store_fitted("Values", values, ranges, BASES["pca"], rank, share, options.value_bits, None, None)

    def _store_fitted(
        self,
        what: str,
        states: Tensor,
        ranges: Ranges,
        method: BasisMethod,
        rank: int | None,
        sparsity: float | None,
        bits: Bits,
        queries: Tensor | None,
        valid: Tensor | None,
    ) -> Stored:
        """Fit a basis to the states and store their coefficients."""
        mean, scatter = _moments(states, ranges)
        self._check_finite(what, scatter)
        tokens = integers([length for _, length in ranges], states.device)
        stats = KeyStatistics(mean, scatter, tokens, queries, valid)
        if rank is None:
            assert self.options.energy is not None
            rank = rank_for_energy(method.energy_matrix(stats), self.options.energy)
        # Spending bits freely needs all directions, the best ones first.
        basis = method.fit(stats, states.shape[-1] if bits == "auto" else rank, self.options.solver, states.dtype)
        layout = None
        if bits == "auto":
            assert sparsity is not None
            variance, order = _coefficient_variance(basis, stats).sort(-1, descending=True)
            budget = self._bit_budget(what, sparsity, states.shape[-1])
            layout = CodeLayout.from_bits(allocate_bits(variance.mean((0, 1))[None], budget)[0])
            basis = basis.columns(order[..., : layout.channels])
        if self.options.basis_bits is not None:
            basis = basis.in_int8()
        kept = states.dtype if bits is None else compute_dtype(states.dtype)
        coefficients = [_encode_row(states, basis, row, span, kept) for row, span in enumerate(ranges)]
        if layout is not None:
            return _store_codes(coefficients, basis, layout)
        assert bits != "auto"
        return _store_coefficients(coefficients, basis, bits)

    def _store_calibrated(
        self, which: str, states: Tensor, ranges: Ranges, rank: int | None, sparsity: float | None, bits: Bits
    ) -> Stored:
        """Store coefficients in the file's basis: what belongs to the request is the codes and its own mean."""
        assert self.calibrated is not None
        what = "Keys" if which == "key" else "Values"
        if bits == "auto":
            assert sparsity is not None
            budget = HeadBudget(bits=self._bit_budget(what, sparsity, states.shape[-1]))
        else:
            budget = HeadBudget(energy=self.options.energy) if rank is None else HeadBudget(rank=rank)
        code = self.calibrated.code(self.layer, which, bits, budget, self.options.allocation)
        state = self.calibrated.state(self.layer, which)
        mean = torch.stack([_mean(states[:, start : start + length]) for start, length in ranges], 1)
        self._check_finite(what, mean)
        basis = state.basis(mean, code.channels, states.dtype)
        kept = states.dtype if bits is None else compute_dtype(states.dtype)
        coefficients = [_encode_row(states, basis, row, span, kept) for row, span in enumerate(ranges)]
        assert basis.delta is not None
        dtype, device = basis.delta.dtype, basis.delta.device
        if isinstance(code, Numbers) and bits is None:
            return Stored(torch.cat(coefficients, 1), basis.sealed())
        low, step = state.ranges(code, device)
        if bits == "fp8":
            step = state.float8_scale(code.channels, device)
            coefficients = [_float8(part, step) for part in coefficients]
        stored = join_tokens([pack_coefficients(part, low, step, code) for part in coefficients], code)
        decoder, shift = state.scaled_decoder((code, bits), low, step, middle_codes(code, device), dtype)
        shared = KeyBasis(
            B=decoder[:, None].expand(-1, mean.shape[1], -1, -1),
            delta=(basis.delta.float() + shift[:, None]).to(coded_delta_dtype(dtype)),
            fitted_rank=code.channels,
            shared=True,
        )
        return Stored(stored, shared, None if isinstance(code, Numbers) else code)

    def _bit_budget(self, what: str, sparsity: float, width: int) -> int:
        """Bits of a token that a share `sparsity` leaves to spend freely; a ValueError where nothing can be done."""
        budget = int((1 - sparsity) * 16 * width)
        least = 2 * CHANNEL_BLOCK
        if budget < least:
            option = "sparsity" if what == "Keys" else "value_sparsity"
            raise ValueError(
                f"{option}={sparsity} leaves {budget} bits for a token of head width {width}; automatic bits need at "
                f"least {least}, that is {option} of at most {1 - least / (16 * width):g}"
            )
        return budget

    def _check_finite(self, what: str, states: Tensor) -> None:
        message = (
            f"the visual {what} of layer {self.layer} hold NaN or infinity, so no basis can be fitted to them: the "
            "model's weights, inputs or dtype overflow before they reach the cache"
        )
        self.verdicts.append(Verdict(states, message))
        self.check()

    def check(self) -> None:
        """Raise a ValueError if states that were stored are known not to have been finite.

        On a CPU that is known at once. A GPU is not waited for: there the error comes with the layer's next tokens,
        before which the host has read the token that the prefill gave.
        """
        self.verdicts = [verdict for verdict in self.verdicts if not verdict.known()]


def _check_width(option: str, bits: Bits, width: int) -> None:
    if bits not in (None, "fp8") and width % CHANNEL_BLOCK:
        raise ValueError(f"{option}={bits!r} needs a head width that is a multiple of {CHANNEL_BLOCK}, got {width}")


def _coded_bytes(channels: int, bits: Bits, dtype: torch.dtype) -> int:
    """Bytes of a token's `channels` coefficients of one head."""
    if bits == "fp8":
        return channels
    return channels * dtype.itemsize if bits is None else channels * int(bits) // 8


def _mean(states: Tensor) -> Tensor:
    """Mean over tokens ``[H, D]`` of ``[H, S, D]``, in float32 for half precisions."""
    return states.mean(1, dtype=compute_dtype(states.dtype))


def _head_groups(states: Tensor) -> list[slice]:
    """Heads of states ``[H, ...]`` that temporaries may be made for at once."""
    most = LARGE_ON_GPU if states.is_cuda else LARGE
    heads = len(states)
    size = max(1, most * heads // max(1, states.numel()))
    return [slice(first, first + size) for first in range(0, heads, size)]


def _alike(states: Tensor, ranges: Ranges) -> Tensor | None:
    """Packed states as ``[H, R, S, D]``, a view, where all rows have the same number of tokens."""
    if len({length for _, length in ranges}) != 1 or states.shape[1] != len(ranges) * ranges[0][1]:
        return None
    return states.unflatten(1, (len(ranges), -1))


def _moments(states: Tensor, ranges: Ranges) -> tuple[Tensor, Tensor]:
    """`key_moments` of each row of packed states ``[H, N, D]``: ``[H, R, D]`` and ``[H, R, D, D]``."""
    alike = _alike(states, ranges)
    if alike is None:
        rows = [_moments(states[:, start : start + length], [(0, length)]) for start, length in ranges]
        mean, scatter = zip(*rows, strict=True)
        return torch.cat(mean, 1), torch.cat(scatter, 1)
    mean, scatter = zip(*(key_moments(alike[heads]) for heads in _head_groups(states)), strict=True)
    return torch.cat(mean), torch.cat(scatter)


def _coefficient_variance(basis: KeyBasis, stats: KeyStatistics) -> Tensor:
    """Variance over its tokens of each coefficient, ``[H, R, r]``, from the scatter of what is encoded."""
    assert basis.A is not None
    encoder = basis.A.to(stats.scatter.dtype)
    variance = (encoder * (stats.scatter @ encoder)).sum(-2)
    return variance / stats.tokens.clamp_min(1).to(variance)[None, :, None]


def _encode_row(states: Tensor, basis: KeyBasis, row: int, span: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Coefficients ``[H, S, r]`` of one row of packed states ``[H, N, D]``."""
    start, length = span
    part = states[:, None, start : start + length]

    def encode(heads: slice) -> Tensor:
        own = basis.select(lambda tensor: tensor[heads, row : row + 1])
        return own.encode(part[heads])[:, 0].to(dtype)

    encoded = [encode(heads) for heads in _head_groups(part)]
    return encoded[0] if len(encoded) == 1 else torch.cat(encoded)


def _store_coefficients(coefficients: list[Tensor], basis: KeyBasis, bits: Bits) -> Stored:
    """Store each row's coefficients ``[H, S, r]`` with one width for all: as numbers, as float8 or as codes."""
    if bits is None:
        return Stored(coefficients[0] if len(coefficients) == 1 else torch.cat(coefficients, 1), basis.sealed())
    if bits == "fp8":
        most = torch.stack([part.abs().amax(1).to(compute_dtype(part.dtype)) for part in coefficients], 1)  # [H, R, r]
        scale = torch.where(most > 0, most, torch.ones_like(most)) / FP8_MOST
        stored = torch.cat([_float8(part, scale[:, row]) for row, part in enumerate(coefficients)], 1)
        nothing = torch.zeros_like(scale)
        scaled = basis.for_codes(nothing, scale, nothing[0, 0])
        return Stored(stored, scaled)
    assert isinstance(bits, int)
    return _store_codes(coefficients, basis, CodeLayout(((bits, coefficients[0].shape[-1]),)))


def _float8(coefficients: Tensor, scale: Tensor) -> Tensor:
    """Float8 ``[H, S, r]`` of coefficients over their scale ``[H, r]``."""
    return (coefficients.to(scale.dtype) / scale[:, None]).clamp_(-FP8_MOST, FP8_MOST).to(FP8)


def _store_codes(coefficients: list[Tensor], basis: KeyBasis, layout: CodeLayout) -> Stored:
    """Codes with ranges of this segment's own coefficients ``[H, S, r]`` of each row."""
    dtype = coefficients[0].dtype
    coded = [quantise(part.to(compute_dtype(dtype)), layout) for part in coefficients]
    packed = torch.cat([layout.pack(codes) for codes, _, _ in coded], 1)
    low, step = (torch.stack([part[i] for part in coded], 1).to(dtype) for i in (1, 2))
    return Stored(packed, basis.for_codes(low, step, middle_codes(layout, packed.device)), layout)


def _store_sparse(
    method: SparK, keys: Tensor, ranges: Ranges, rank: int, queries: Tensor | None, valid: Tensor | None
) -> Stored:
    """Keys of which each token keeps its own channels."""
    nothing = keys.new_zeros(keys.shape[0], len(ranges), keys.shape[-1], dtype=compute_dtype(keys.dtype))
    tokens = integers([length for _, length in ranges], keys.device)
    moment = KeyStatistics(nothing, nothing[..., None], tokens, queries, valid).query_moment()
    weight = None if moment is None else method.weight(moment)
    code = method.code(keys.shape[-1], rank, keys.dtype)
    packed = [
        method.pack(keys[:, start : start + length], None if weight is None else weight[:, row], code)
        for row, (start, length) in enumerate(ranges)
    ]
    return Stored(torch.cat(packed, 1), method.basis(moment, keys.dtype), code)
