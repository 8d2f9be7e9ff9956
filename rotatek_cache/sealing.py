"""The seal of a segment: fit a basis to visual states and store their coefficients, as numbers or as codes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rotatek_cache.basis import (
    Bits,
    FitOptions,
    KeyBasis,
    KeyStatistics,
    compute_dtype,
    key_moments,
    padded_rank,
    rank_for_energy,
    rank_of_share,
)
from rotatek_cache.coding import CHANNEL_BLOCK, CodeLayout, allocate_bits, encode_codes, quantise
from rotatek_cache.methods import BASES, KeyMethod, key_method
from rotatek_cache.methods.calibrated import StateBasis, load_basis
from rotatek_cache.segments import Stored, select_basis

LARGE = 1 << 22  # numbers of a row above which temporaries are made for one head at a time
Ranges = Sequence[tuple[int, int]]  # (first token, tokens) of each row of packed states


class Sealer:
    """Stores the visual Keys and Values of one layer as its options say."""

    def __init__(self, options: FitOptions, layer: int) -> None:
        self.options = options
        self.layer = layer
        self.key_method: KeyMethod
        self.value_method: KeyMethod
        if options.is_calibrated:
            basis = load_basis(options.basis)
            self.key_method, self.value_method = basis.state(layer, "key"), basis.state(layer, "value")
        else:
            self.key_method = key_method(options.basis if options.query_weight else "pca")
            self.value_method = BASES["pca"]

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
        share = options.value_sparsity or 0.0
        stored = 0
        if options.is_identity:
            stored += tokens * key_width * dtype.itemsize
        else:
            rank = rank or options.rank_for(key_width) or 1
            stored += self._bytes(tokens, rank, options.sparsity, key_width, options.key_bits, dtype)
        if options.codes_values:
            value_rank = rank_of_share(share, value_width)
            stored += self._bytes(tokens, value_rank, share, value_width, options.value_bits, dtype)
        else:
            stored += tokens * value_width * dtype.itemsize
        return stored < tokens * (key_width + value_width) * dtype.itemsize

    def _bytes(
        self, tokens: int, rank: int | None, sparsity: float | None, width: int, bits: Bits, dtype: torch.dtype
    ) -> int:
        """Bytes of `tokens` tokens and their basis for one head, at most (a spectrum may need fewer)."""
        assert rank is not None
        if bits == "auto":
            assert sparsity is not None
            token_bytes = int((1 - sparsity) * 2 * width)
            rank = min(width, max(CHANNEL_BLOCK, token_bytes * 4))  # at 2 bits each
        else:
            rank = padded_rank(rank)
            token_bytes = rank * dtype.itemsize if bits is None else rank * bits // 8
        matrix = 0 if self.options.is_calibrated else width * rank
        return tokens * token_bytes + (matrix + width) * dtype.itemsize

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
        rank = options.rank_for(keys.shape[-1])
        return self._store(
            "Keys", keys, ranges, self.key_method, rank, options.sparsity, options.key_bits, queries, valid
        )

    def store_values(self, values: Tensor, ranges: Ranges) -> Stored:
        """Store packed Values ``[H, N, D_v]``."""
        options = self.options
        if not options.codes_values:
            return Stored(values)
        share = options.value_sparsity or 0.0
        rank = rank_of_share(share, values.shape[-1])
        return self._store("Values", values, ranges, self.value_method, rank, share, options.value_bits, None, None)

    def _store(
        self,
        what: str,
        states: Tensor,
        ranges: Ranges,
        method: KeyMethod,
        rank: int | None,
        sparsity: float | None,
        bits: Bits,
        queries: Tensor | None,
        valid: Tensor | None,
    ) -> Stored:
        moments = [_moments(states[:, start : start + length]) for start, length in ranges]
        mean, scatter = (torch.stack(parts, 1) for parts in zip(*moments, strict=True))
        if not bool(torch.isfinite(scatter).all()):
            raise ValueError(
                f"the visual {what} of layer {self.layer} hold NaN or infinity, so no basis can be fitted to them: the "
                "model's weights, inputs or dtype overflow before they reach the cache"
            )
        tokens = torch.tensor([length for _, length in ranges], device=states.device)
        stats = KeyStatistics(mean, scatter, tokens, queries, valid)
        if rank is None:
            assert self.options.energy is not None
            rank = rank_for_energy(method.energy_matrix(stats), self.options.energy)
        # Spending bits freely needs all directions, the best ones first.
        basis = method.fit(stats, states.shape[-1] if bits == "auto" else rank, self.options.solver, states.dtype)
        kept = states.dtype if bits is None else compute_dtype(states.dtype)
        coefficients = [_encode_row(states, basis, row, span, kept) for row, span in enumerate(ranges)]
        if bits is None:
            whole = coefficients[0] if len(coefficients) == 1 else torch.cat(coefficients, 1)
            return Stored(whole, basis.sealed())
        budget = int((1 - (sparsity or 0.0)) * 16 * states.shape[-1])
        least = 2 * CHANNEL_BLOCK
        if bits == "auto" and budget < least:
            option = "sparsity" if what == "Keys" else "value_sparsity"
            raise ValueError(
                f"{option}={sparsity} leaves {budget} bits for a token of head width {states.shape[-1]}; automatic "
                f"bits need at least {least}, that is {option} of at most {1 - least / (16 * states.shape[-1]):g}"
            )
        if isinstance(method, StateBasis):
            layout = method.layout(budget) if bits == "auto" else CodeLayout(((bits, coefficients[0].shape[-1]),))
            return _store_calibrated_codes(coefficients, basis, method, layout)
        return _store_codes(coefficients, basis, bits, budget)


def _moments(states: Tensor) -> tuple[Tensor, Tensor]:
    """`key_moments` of one row's states ``[H, S, D]``; head by head where a wide copy of all would be large."""
    if states.numel() <= LARGE:
        return key_moments(states)
    mean, scatter = zip(*map(key_moments, states), strict=True)
    return torch.stack(mean), torch.stack(scatter)


def _encode_row(states: Tensor, basis: KeyBasis, row: int, span: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Coefficients ``[H, S, r]`` of one row of packed states ``[H, N, D]``."""
    start, length = span
    part = states[:, None, start : start + length]
    one = select_basis(basis, torch.tensor([row], device=states.device))
    if part.numel() <= LARGE:
        return one.encode(part)[:, 0].to(dtype)
    return torch.cat([one.head(index).encode(part[index : index + 1])[:, 0].to(dtype) for index in range(len(part))])


def _store_codes(coefficients: list[Tensor], basis: KeyBasis, bits: Bits, budget: int) -> Stored:
    """Codes with ranges (and, for "auto", widths) of this segment's own coefficients ``[H, S, r]`` of each row."""
    if bits == "auto":
        variance = torch.stack([part.var(1, correction=0) for part in coefficients], 1)  # [H, R, D]
        variance, order = variance.sort(-1, descending=True)
        layout = CodeLayout.from_bits(allocate_bits(variance.mean((0, 1)), budget))
        order = order[..., : layout.channels]
        basis = basis.columns(order)
        coefficients = [
            part.gather(-1, order[:, row, None].expand(-1, part.shape[1], -1)) for row, part in enumerate(coefficients)
        ]
    else:
        assert isinstance(bits, int)
        layout = CodeLayout(((bits, coefficients[0].shape[-1]),))
    coded = [quantise(part, layout) for part in coefficients]
    packed = torch.cat([layout.pack(codes) for codes, _, _ in coded], 1)
    low, step = (torch.stack([part[i] for part in coded], 1) for i in (1, 2))
    return Stored(packed, basis.for_codes(low, step), layout)


def _store_calibrated_codes(
    coefficients: list[Tensor], basis: KeyBasis, method: StateBasis, layout: CodeLayout
) -> Stored:
    """Codes with the file's ranges, so that the scaled decoder is shared and only delta belongs to the request."""
    assert basis.delta is not None
    dtype, device = basis.delta.dtype, basis.delta.device
    low, step = method.ranges(layout, device)
    packed = torch.cat(
        [layout.pack(encode_codes(part[..., : layout.channels], low, step, layout)) for part in coefficients], 1
    )
    decoder, shift = method.code_decoder(layout, dtype, device)
    delta = (basis.delta.float() + shift[:, None]).to(dtype)
    rows = basis.delta.shape[1]
    shared = KeyBasis(
        B=decoder[:, None].expand(-1, rows, -1, -1), delta=delta, fitted_rank=layout.channels, shared=True
    )
    return Stored(packed, shared, layout)
