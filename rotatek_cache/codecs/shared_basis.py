"""Bases that all requests of a model share, and how a budget is dealt out to its layers and heads."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rotatek_cache.codecs.fingerprint import same_fingerprint
from rotatek_cache.core.basis import KeyBasis, padded_rank
from rotatek_cache.core.quantization import (
    BITS,
    CHANNEL_BLOCK,
    FP8_MOST,
    PLAIN_BITS,
    CodeLayout,
    HeadCodes,
    Numbers,
    allocate_bits,
    middle_codes,
    modelled_distortion,
)
from rotatek_cache.options import Allocation, Bits

T = TypeVar("T")


Code = CodeLayout | HeadCodes | Numbers


class HeadBudget(NamedTuple):
    """The amount that the heads of a layer may keep on average; one of the three is given.

    Attributes:
        bits: of a token and head, to be spent freely.
        rank: coefficients of a token and head.
        energy: share of its spectrum that each head keeps.
    """

    bits: int | None = None
    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True, eq=False)
class StateBasis:
    """The basis of the Keys or Values of one layer, all directions, best first.

    Attributes:
        encoder, decoder: A and B, ``[H, D, D]``; the same tensor for an orthogonal basis.
        spectrum: what each coefficient is worth (its mean variance within an image), ``[H, D]``, falling.
        gain: what a unit of its distortion adds to the squared error of logits (Keys) or outputs (Values), ``[H, D]``.
        low, step: of the codes of each width in `BITS`, ``[H, D]``, for coefficients of states less their image's mean.
        mean: ``[H, D]`` around which all tokens are coded, whose spectrum and ranges are then around it too; None for
            a basis of visual tokens, each image of which has a mean of its own.
    """

    encoder: Tensor
    decoder: Tensor
    spectrum: Tensor
    gain: Tensor
    low: dict[int, Tensor]
    step: dict[int, Tensor]
    mean: Tensor | None = None
    _memo: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict[int, object]) -> "StateBasis":
        return self  # of the model, never changed: copies of a cache share it

    def of_heads(self, heads: slice) -> "StateBasis":
        """Take the part of some heads."""
        encoder = self.encoder[heads]
        return StateBasis(
            encoder,
            encoder if self.decoder is self.encoder else self.decoder[heads],
            self.spectrum[heads],
            self.gain[heads],
            {bits: low[heads] for bits, low in self.low.items()},
            {bits: step[heads] for bits, step in self.step.items()},
            None if self.mean is None else self.mean[heads],
        )

    def tensors(self) -> list[Tensor]:
        """List what the file holds of it."""
        matrices = [self.encoder] if self.decoder is self.encoder else [self.encoder, self.decoder]
        mean = [] if self.mean is None else [self.mean]
        return [*matrices, self.spectrum, self.gain, *self.low.values(), *self.step.values(), *mean]

    def basis(self, mean: Tensor, rank: int, dtype: torch.dtype) -> KeyBasis:
        """Take the first `rank` directions (padded), shared by all requests, around the image's mean ``[H, R, D]``."""
        directions = self.directions(rank, dtype, mean.device)
        encoder, decoder = (matrix[:, None].expand(-1, mean.shape[1], -1, -1) for matrix in directions)
        mean = mean.to(dtype).contiguous()
        return KeyBasis(encoder, encoder if self.decoder is self.encoder else decoder, mean, mean, rank, shared=True)

    def directions(self, rank: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Give the first `rank` columns (padded) of encoder and decoder, ``[H, D, r]``; one tensor where they agree."""
        key = ("basis", rank, dtype, device)
        if key not in self._memo:
            encoder = self._columns(self.encoder, rank, dtype, device)
            same = self.decoder is self.encoder
            self._memo[key] = encoder, encoder if same else self._columns(self.decoder, rank, dtype, device)
        return self._memo[key]

    @staticmethod
    def _columns(matrix: Tensor, rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        columns = torch.nn.functional.pad(matrix[..., :rank], (0, padded_rank(rank) - rank))
        return columns.to(device, dtype).contiguous()

    def encoder_around(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Give the encoder ``[H, D, D]`` and the mean ``[H, D]`` of a basis of all tokens, as they are in the file."""
        mean = self.mean
        assert mean is not None
        return self.remembered(("around", device), lambda: (self.encoder.to(device), mean.to(device)))

    def remembered(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """Return what `make` makes, made once for each `key`, which must say all that it follows from."""
        if key not in self._memo:
            self._memo[key] = make()
        found: T = self._memo[key]
        return found

    def worth(self, kind: str) -> Tensor:
        """Price the distortion of each coefficient, ``[H, D]``; see `Allocation`."""
        if kind == "gain":
            return self.spectrum * self.gain
        total = self.spectrum.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return self.spectrum / total if kind == "relative" else self.spectrum

    def distortion(self, kind: str, widths: Sequence[int]) -> Tensor:
        """Price what is left of each coefficient at no bits and at each of `widths`, rising: ``[H, 1 + widths, D]``.

        Codes leave what rounding does within the ranges of the file. Two bits leave twice the sixteenth of the variance
        that is often assumed of them, and far more where few tokens lie far from the others.
        """
        worth = self.worth(kind)
        left_over = modelled_distortion(worth, widths)
        price = worth / self.spectrum.clamp_min(torch.finfo(torch.float32).tiny)
        for index, bits in enumerate(sorted(widths), 1):
            if bits in self.step:
                left_over[:, index] = (price * self.step[bits].square() / 12).minimum(worth)
        return left_over

    def ranks_for_energy(self, energy: float) -> list[int]:
        """Find the smallest rank at which each head keeps a share `energy` of its spectrum."""
        kept = self.spectrum.cumsum(-1) / self.spectrum.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return ((kept < energy - 1e-6).sum(-1) + 1).clamp(max=self.spectrum.shape[-1]).tolist()

    def ranges(self, code: CodeLayout | HeadCodes | Numbers, device: torch.device) -> tuple[Tensor, Tensor]:
        """Give ``low`` and ``step`` ``[H, channels]`` for what `code` stores; zero and one for plain numbers."""
        key = ("ranges", code, device)
        if key not in self._memo:
            self._memo[key] = self._ranges(code, device)
        return self._memo[key]

    def _ranges(self, code: CodeLayout | HeadCodes | Numbers, device: torch.device) -> tuple[Tensor, Tensor]:
        parts = code.parts if isinstance(code, HeadCodes) else (code,) * len(self.spectrum)
        low = self.spectrum.new_zeros(len(parts), code.channels)
        step = torch.zeros_like(low)
        for head, part in enumerate(parts):
            if isinstance(part, Numbers):
                step[head, : part.channels] = 1
                continue
            start = 0
            for bits, channels in part.blocks:
                end = start + channels
                low[head, start:end] = self.low[bits][head, start:end]
                step[head, start:end] = self.step[bits][head, start:end]
                start = end
        return low.to(device), step.to(device)

    def float8_scale(self, channels: int, device: torch.device) -> Tensor:
        """Give the scale ``[H, channels]`` that brings coefficients into the range of float8."""
        key = ("float8", channels, device)
        if key not in self._memo:
            low, step = self.low[8][:, :channels], self.step[8][:, :channels]
            most = low.abs().maximum((low + 255 * step).abs())
            self._memo[key] = (torch.where(most > 0, most, torch.ones_like(most)) / FP8_MOST).to(device)
        return self._memo[key]

    def coded_ranges(self, code: Code, bits: Bits, device: torch.device) -> tuple[Tensor, Tensor]:
        """Give ``low`` and ``step`` ``[H, channels]`` of what is stored: codes, or float8."""
        low, step = self.ranges(code, device)
        return low, self.float8_scale(code.channels, device) if bits == "fp8" else step

    def codes(
        self, code: Code, bits: Bits, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give what `coded_ranges` and `scaled_decoder` do."""
        return *self.coded_ranges(code, bits, device), *self.scaled_decoder(code, bits, dtype, device)

    def scaled_decoder(self, code: Code, bits: Bits, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Fold the steps into the decoder ``[H, D, channels]``; also give what the low ends add to delta, ``[H, D]``.

        They belong to all requests and are made once. See `KeyBasis.for_codes`.
        """
        memo = ("decoder", code, bits, dtype, device)
        if memo not in self._memo:
            low, step = self.coded_ranges(code, bits, device)
            columns = self.decoder[..., : low.shape[-1]].to(device)
            exact = columns * step[:, None]
            scaled = exact.to(dtype).contiguous()
            shift = columns @ low[..., None] + (exact - scaled.float()) @ middle_codes(code, device)[..., None]
            self._memo[memo] = scaled, shift[..., 0]
        return self._memo[memo]

    def derived(self) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        """Yield the tensors that requests share, each with what `derive` makes it of."""
        for key, made in list(self._memo.items()):
            how = key[1:-1]  # without the device
            if key[0] == "basis":
                yield ("encoder", *how), made[0]
                yield ("decoder", *how), made[1]
            elif key[0] == "decoder":
                yield ("scaled", *how), made[0]

    def derive(self, how: tuple[Any, ...], device: torch.device) -> Tensor:
        """Make a tensor that requests share, as `derived` names it, or find it made."""
        if how[0] == "scaled":
            _, code, bits, dtype = how
            return self.scaled_decoder(code, bits, dtype, device)[0]
        kind, rank, dtype = how
        return self.directions(rank, dtype, device)[kind == "decoder"]


@dataclass(frozen=True, eq=False)
class CalibratedBasis:
    """A basis file: per layer the bases of Keys and Values, and the model that they belong to."""

    path: str
    fingerprint: Tensor
    model_type: str
    images: int
    layers: dict[int, dict[str, StateBasis]]
    _memo: dict[object, dict[int, CodeLayout | HeadCodes | Numbers]] = field(default_factory=dict, repr=False)

    def of_heads(self, heads: slice) -> "CalibratedBasis":
        """Take the basis of some heads of each layer, where others keep the rest; all agree on what is kept."""
        layers = {
            layer: {which: state.of_heads(heads) for which, state in states.items()}
            for layer, states in self.layers.items()
        }
        return _Part(self.path, self.fingerprint, self.model_type, self.images, layers, whole=self, heads=heads)

    def state(self, layer: int, which: str) -> StateBasis:
        """Look up a basis of a layer; a ValueError if the file has none.

        Args:
            layer: of the model, from 0.
            which: "key" or "value" of visual tokens around each image's mean; "token_key" or "token_value" of all
                tokens around the file's.
        """
        if layer not in self.layers:
            raise ValueError(f"basis file {self.path} has no layer {layer}; it holds {sorted(self.layers)}")
        if which not in self.layers[layer]:
            lacks = "text: it codes visual tokens only" if which.startswith("token") else "images: it codes all tokens"
            flag, option = ("--text", "") if which.startswith("token") else ("--images", ", or use text='coded'")
            raise ValueError(
                f"basis file {self.path} was calibrated without {lacks}. Run `rotatek calibrate {flag}` anew{option}"
            )
        return self.layers[layer][which]

    def code(
        self, layer: int, which: str, bits: Bits, budget: HeadBudget, allocation: Allocation
    ) -> CodeLayout | HeadCodes | Numbers:
        """Decide what is kept of the coefficients of a layer.

        Args:
            layer, which: as in `state`.
            bits: as `FitOptions.key_bits`.
            budget: bits per token with "auto", else rank or energy.
            allocation: how the average is dealt out.
        """
        self.state(layer, which)
        key = (which, bits, budget, allocation)
        if key not in self._memo:
            self._memo[key] = self._codes(which, bits, budget, allocation)
        return self._memo[key][layer]

    def _codes(
        self, which: str, bits: Bits, budget: HeadBudget, allocation: Allocation
    ) -> dict[int, CodeLayout | HeadCodes | Numbers]:
        states = {layer: parts[which] for layer, parts in sorted(self.layers.items())}
        width = bits if isinstance(bits, int) else PLAIN_BITS
        codes: dict[int, CodeLayout | HeadCodes | Numbers] = {}
        if budget.energy is not None:
            for layer, state in states.items():
                ranks = [padded_rank(rank) for rank in state.ranks_for_energy(budget.energy)]
                parts = [_code([width] * rank) for rank in ranks]
                codes[layer] = _heads(parts) if allocation.over == "heads" else parts[ranks.index(max(ranks))]
            return codes
        if budget.rank is not None and allocation.over == "uniform":
            return dict.fromkeys(states, _code([width] * padded_rank(budget.rank)))
        widths = BITS if budget.rank is None else (width,)
        each = budget.bits if budget.rank is None else padded_rank(budget.rank) * width
        assert each is not None
        worth = "variance" if allocation.over == "uniform" else allocation.worth
        left_over = [state.distortion(worth, widths) for state in states.values()]
        if allocation.over == "heads":
            dealt = iter(_share(torch.cat(left_over), each, widths, allocation.floor))
            return {layer: _heads([_code(next(dealt)) for _ in state.spectrum]) for layer, state in states.items()}
        means = torch.stack([heads.mean(0) for heads in left_over])
        if allocation.over == "layers":
            shared = _share(means, each, widths, allocation.floor)
        else:
            shared = [_deal(mean[None], each, widths)[0] for mean in means]
        return {layer: _code(channel_bits) for layer, channel_bits in zip(states, shared, strict=True)}

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all that it holds, by which a saved cache knows the basis that it was made with."""
        found = hashlib.sha256()
        for layer, parts in sorted(self.layers.items()):
            for which, state in sorted(parts.items()):
                found.update(f"{layer} {which}".encode())
                for tensor in state.tensors():
                    found.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def derived(self) -> dict[int, tuple[Any, ...]]:
        """Name the tensors that requests share, by the address of their storage, as `derive` takes them."""
        return {
            tensor.untyped_storage().data_ptr(): (layer, which, *how)
            for layer, parts in self.layers.items()
            for which, state in parts.items()
            for how, tensor in state.derived()
        }

    def derive(self, how: tuple[Any, ...], device: torch.device) -> Tensor:
        """Make a tensor that requests share, as `derived` names it."""
        layer, which, *rest = how
        return self.state(layer, which).derive(tuple(rest), device)

    def nbytes(self) -> int:
        """Count the bytes of its tensors as they are read from the file."""
        states = [state for parts in self.layers.values() for state in parts.values()]
        return sum(tensor.nbytes for state in states for tensor in state.tensors())

    def check_model(self, fingerprint: Tensor) -> None:
        """Raise unless the file was calibrated on the model with this fingerprint."""
        if not same_fingerprint(fingerprint, self.fingerprint):
            raise ValueError(
                f"basis file {self.path} was calibrated on another model ({self.model_type}): run `rotatek calibrate` "
                "for this one"
            )

    def __deepcopy__(self, memo: dict[int, object]) -> "CalibratedBasis":
        return self


@dataclass(frozen=True, eq=False, kw_only=True)
class _Part(CalibratedBasis):
    """Some heads of a `CalibratedBasis`: bits and ranks are dealt out over all of them."""

    whole: CalibratedBasis
    heads: slice

    def code(
        self, layer: int, which: str, bits: Bits, budget: HeadBudget, allocation: Allocation
    ) -> CodeLayout | HeadCodes | Numbers:
        """See `CalibratedBasis.code`."""
        code = self.whole.code(layer, which, bits, budget, allocation)
        return HeadCodes(code.parts[self.heads]) if isinstance(code, HeadCodes) else code


def _deal(
    distortion: Tensor, budget: int, widths: Sequence[int], start: list[list[int]] | None = None
) -> list[list[int]]:
    """Deal bits out to channels by their `distortion`, as `StateBasis.distortion` gives it."""
    return allocate_bits(distortion[:, 0], budget, widths, start, distortion)


def _share(distortion: Tensor, budget: int, widths: Sequence[int], floor: float) -> list[list[int]]:
    """Share ``n * budget`` bits a token between n spectra, each with its `floor` first: bits per channel."""
    least = min(widths) * CHANNEL_BLOCK  # no head goes empty
    start = [_deal(spectrum[None], max(least, int(floor * budget)), widths)[0] for spectrum in distortion]
    return _deal(distortion, len(distortion) * budget, widths, start)


def _code(bits: Sequence[int]) -> CodeLayout | Numbers:
    """Make what stores channels of these falling widths."""
    return Numbers(sum(width > 0 for width in bits)) if PLAIN_BITS in bits else CodeLayout.from_bits(bits)


def _heads(parts: list[CodeLayout | Numbers]) -> HeadCodes:
    return HeadCodes(tuple(parts))  # type: ignore[arg-type]  # all parts are of one kind
