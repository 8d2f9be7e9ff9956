"""How many bytes a `RotateKCache` will hold, before any model is loaded: the cache's own code, run on shapes alone.

A cache is filled with meta tensors, which have a shape and a dtype and no numbers, and then counted as any other. Where
what is stored follows from the numbers, the code is run for the extremes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from rotatek_cache.cache.expected_prompt import ExpectedPrompt
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.cache.seal_plan import SealPlan
from rotatek_cache.cache.selection import TokenSelection
from rotatek_cache.codecs.fitted import Fitted
from rotatek_cache.codecs.sealing import Sealer
from rotatek_cache.core.basis import RANK_MULTIPLE
from rotatek_cache.core.quantization import CHANNEL_BLOCK
from rotatek_cache.core.seal import Places, SealImplementation
from rotatek_cache.core.segments import Stored
from rotatek_cache.hf.config_shapes import META, StateShape, dtype_of, probe, state_shapes
from rotatek_cache.hf.families import FAMILIES, refusal
from rotatek_cache.hf.storage import stock_tensors, storage_bytes
from rotatek_cache.hf.versions import installed
from rotatek_cache.report import readable_bytes
from rotatek_cache.token_pruning.interface import AttentionMethod, AttentionRows, FeatureMethod, Summary
from rotatek_cache.token_pruning.selection import best_tokens, share_of, spread


@dataclass(frozen=True)
class CacheEstimate:
    """The bytes that a cache is going to hold.

    Attributes:
        nbytes: what `RotateKCache.nbytes` will say, or the most that it can.
        least: the least that it can; the same as `nbytes` where nothing follows from what the model computes, and
            where they are an estimate.
        dense_nbytes: what `DynamicCache` takes for the same tokens.
        follows: what the bytes follow from beside the shapes, and what was assumed of it; empty if they are certain.
    """

    nbytes: int
    least: int
    dense_nbytes: int
    follows: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether the bytes are certain."""
        return not self.follows

    @property
    def compression_ratio(self) -> float:
        """Dense bytes over stored bytes, where these are a range over the most."""
        return self.dense_nbytes / self.nbytes

    def __int__(self) -> int:
        return self.nbytes

    def __str__(self) -> str:
        stored = readable_bytes(self.nbytes)
        if not self.is_exact:
            span = "about" if self.least == self.nbytes else f"{readable_bytes(self.least)} to"
            stored = f"{span} {stored} ({self.follows})"
        ratio = self.compression_ratio
        change = f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x larger"
        return f"{stored} stored, {readable_bytes(self.dense_nbytes)} dense: {change}"


@dataclass(frozen=True)
class Tokens:
    """The tokens of a prompt and its answer, by row.

    Attributes:
        images: visual tokens of each image of each row.
        text: tokens of the prompt that are not visual.
        answer: tokens of the answer, alike in all rows.
    """

    images: tuple[tuple[int, ...], ...]
    text: tuple[int, ...]
    answer: int

    @property
    def length(self) -> int:
        """Tokens of the longest row of the prompt, to which the others are padded."""
        return max(sum(images) + text for images, text in zip(self.images, self.text, strict=True))

    def flags(self) -> tuple[Tensor, Tensor]:
        """Return bool ``[B, T]``: visual tokens, and all that are not padding; a row's text stands behind its image."""
        visual = torch.zeros(len(self.text), self.length, dtype=torch.bool, device="cpu")
        seen = visual.clone()
        for row, (images, text) in enumerate(zip(self.images, self.text, strict=True)):
            begin = self.length - text - sum(images)
            visual[row, begin : begin + sum(images)] = True
            seen[row, begin:] = True
        return visual, seen


def tokens_of(
    visual: int | Sequence[int], text: int | Sequence[int], batch: int | None, images: int, answer: int
) -> Tokens:
    """Check and lay out numbers of tokens; see `RotateKCache.estimate`."""
    given = {"visual_tokens": visual, "text_tokens": text}
    lengths = {name: len(value) for name, value in given.items() if isinstance(value, Sequence)}
    lengths |= {} if batch is None else {"batch": batch}
    if len(set(lengths.values())) > 1:
        named = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"the numbers of rows must agree, got {named}: give one number for all rows, or one for each")
    count = next(iter(lengths.values()), 1)
    rows = {name: list(value) if isinstance(value, Sequence) else [value] * count for name, value in given.items()}
    least = {"batch": (count, 1), "images": (images, 1), "answer_tokens": (answer, 0)}
    least |= {f"{name}[{row}]": (value, 0) for name, values in rows.items() for row, value in enumerate(values)}
    for name, (value, lowest) in least.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}")
    if not any(map(any, rows.values())):
        raise ValueError("visual_tokens and text_tokens are both 0: a prompt has at least one token")
    parts = tuple(
        tuple(n for i in range(images) if (n := total // images + (i < total % images)))
        for total in rows["visual_tokens"]
    )
    return Tokens(parts, tuple(rows["text_tokens"]), answer)


def estimate_bytes(
    make: Callable[[], Any], config: PreTrainedConfig, tokens: Tokens, dtype: torch.dtype | None
) -> CacheEstimate:
    """Fill caches with shapes and count them.

    Args:
        make: makes an empty cache.
        config: the model's.
        tokens: what the prompt and its answer hold.
        dtype: of Keys and Values; None is the checkpoint's.
    """
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"config must be the config of a transformers model, got {type(config).__name__}")
    reason = refusal(config)
    if reason:
        raise ValueError(f"a model of '{config.model_type}' cannot use RotateKCache: {reason}")
    dtype = dtype_of(config, dtype)
    probed = probe(config, len(tokens.text), dtype)
    shapes = state_shapes(config, probed)
    found, follows = [], ""
    for extreme in extremes(make(), max(shape.width for shape in shapes if shape is not None)):
        cache = make()
        cache.learn_config(config)
        _keep_states(cache, shapes, probed)
        follows = extreme.follows
        extreme.apply(cache)
        _fill(cache, config, shapes, tokens, dtype)
        found.append(cache.nbytes() + extreme.unjoined(cache, len(tokens.text)))
    dense = DynamicCache(config=config.get_text_config(decoder=True))
    _keep_states(dense, shapes, probed)
    _fill_dense(dense, shapes, tokens, dtype)
    held = [tensor for layer in dense.layers for tensor in stock_tensors(layer)]
    return CacheEstimate(max(found), min(found), storage_bytes(held), follows)


# --- the run ----------------------------------------------------------------------------------------------------------


def _fill(
    cache: Any, config: PreTrainedConfig, shapes: Sequence[StateShape | None], tokens: Tokens, dtype: torch.dtype
) -> None:
    """Give a cache the states of a prompt and its answer, as `generate` with an attached model does."""
    visual, seen = tokens.flags()
    rows = len(tokens.text)
    cache.positions.expect(ExpectedPrompt(0, visual, seen))
    cache.announce_visual(visual, tokens.length)
    if isinstance(cache.tokens, FeatureMethod):
        lengths = [length for images in tokens.images for length in images]
        _, counts = cache.counts_before(config, dtype, lengths)
        kept = [torch.arange(n, device="cpu") < count for n, count in zip(lengths, counts, strict=True)]
        if kept:
            cache.positions.drop(torch.cat(kept))
    cache.positions.begin_prompt(torch.zeros(rows, tokens.length, dtype=torch.int64, device="cpu"))
    # What the last query sees says as much of padding as a whole mask does.
    family = FAMILIES.get(config.model_type)
    # Older versions hand on a mask of ones; where nothing is padding, newer ones leave it out.
    always_masked = family is not None and family.two_ways and installed() < (5, 19)
    mask = seen[:, None, None] if always_masked or not bool(seen.all()) else None
    _step(cache, shapes, rows, tokens.length, mask, dtype)
    cache.positions.expect(None)
    if family is not None and family.mrope:
        cache.rope_deltas = torch.zeros(rows, 1, dtype=torch.int64, device="cpu")
    for _ in range(tokens.answer):
        cache.announce_visual(None, 1)
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, 1), value=True)
        _step(cache, shapes, rows, 1, mask, dtype)


def _step(
    cache: Any,
    shapes: Sequence[StateShape | None],
    rows: int,
    count: int,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> None:
    for index, shape in enumerate(shapes):
        if shape is None:
            continue
        handle, _ = cache.update(*_states(shape, rows, count, dtype), index)
        for _ in range(handle.kv.readers if hasattr(handle, "observe") else 0):  # of a layer of ours
            handle.observe(torch.empty(rows, shape.query_heads, count, shape.width, dtype=dtype, device=META), mask)
    cache.positions.end_forward()


def _fill_dense(cache: DynamicCache, shapes: Sequence[StateShape | None], tokens: Tokens, dtype: torch.dtype) -> None:
    """Give a dense cache the same."""
    for count in (tokens.length, *[1] * tokens.answer):
        for index, shape in enumerate(shapes):
            if shape is not None:
                cache.update(*_states(shape, len(tokens.text), count, dtype), index)


def _states(shape: StateShape, rows: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Make Keys and Values of a layer."""
    keys = torch.empty(rows, shape.heads, count, shape.width, dtype=dtype, device=META)
    return keys, torch.empty(rows, shape.heads, count, shape.value_width, dtype=dtype, device=META)


def _keep_states(cache: Any, shapes: Sequence[StateShape | None], probed: DynamicCache) -> None:
    """Give a cache the layers whose state does not grow as a few tokens have left them."""
    for index, shape in enumerate(shapes):
        if shape is None:
            cache.layers[index] = probed.layers[index]


# --- what follows from numbers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extreme:
    """A case of what may come out where bytes follow from what the model computes.

    Attributes:
        follows: what they follow from.
        equal: of how many coefficients with equal variance all variance is, where ranks or bits follow from it.
    """

    follows: str = ""
    equal: int | None = None

    def apply(self, cache: Any) -> None:
        """Let a cache without numbers decide so."""
        seals: dict[object, tuple[Stored, Stored]] = {}
        for layer in cache.coordinator.layers.values():
            layer.sealer = AlikeSealer(layer.sealer, seals)
            if self.equal is not None:
                for codec in (layer.sealer.keys, layer.sealer.values):
                    if isinstance(codec, Fitted):
                        _decide(codec, self.equal)
        selection = cache.coordinator.selection
        if selection is not None:
            known = ShapeSelection(selection.method)
            known.compressed = selection.compressed
            cache.coordinator.selection = known

    def unjoined(self, cache: Any, rows: int) -> int:
        """Count the tables that come on top where each row of a batch gets another rank, and so its own segment."""
        if self.equal is None or rows == 1:
            return 0
        tables = [
            part
            for layer in cache.coordinator.layers.values()
            for segment in layer.segments
            for part in (segment.starts, segment.lengths, segment.basis_rows)
        ]
        return (rows - 1) * storage_bytes(tables) if self.equal > RANK_MULTIPLE else 0


def extremes(cache: Any, width: int) -> Iterator[Extreme]:
    """List the cases that bound the bytes of heads of `width` channels; one where they are certain."""
    options, method = cache.options, cache.tokens
    if isinstance(method, AttentionMethod) and method.by_head:
        raise ValueError(
            f"tokens={method}: which heads store all tokens, and which a few, follows from the prompt, and bytes with "
            "it: leave out tokens for about the most that they can be, or ask a cache that has read a prompt (nbytes)"
        )
    follows = []  # in the order in which they are named
    equal: Sequence[int | None] = (None,)
    if options.follows_content:
        follows.append("energy" if options.energy is not None else "automatic bits")
        # A rank may pay for its basis or not, so that all are tried; bits are the fewer the more channels have some.
        ranks = range(RANK_MULTIPLE, width + 1, RANK_MULTIPLE)
        equal = (1, *ranks) if options.energy is not None else (1, width)
    if isinstance(method, AttentionMethod) and method.pools_layers:
        follows.append("how many tokens a layer gets, taken to be alike")
    named = f"follows from the prompt: {' and '.join(follows)}" if follows else ""
    for count in equal:
        yield Extreme(named, count)


def _decide(codec: Fitted, equal: int) -> None:
    """Let a codec decide as if `equal` coefficients had all variance, and alike."""
    allocated = codec.bits_of

    def rank_of(_: Any) -> int:
        assert codec.wanted.energy is not None
        return max(1, math.ceil(codec.wanted.energy * equal - 1e-6))

    def bits_of(variance: Tensor) -> list[int]:
        spectrum = torch.zeros(1, 1, variance.shape[-1], dtype=torch.float64, device="cpu")
        spectrum[..., : max(equal, CHANNEL_BLOCK)] = 1
        return allocated(spectrum)

    codec.rank_of, codec.bits_of = rank_of, bits_of  # type: ignore[method-assign,assignment]


@dataclass(frozen=True)
class Alike(AttentionMethod):
    """A method whose layers share a number of tokens, of which here each layer gets the same.

    Args:
        inner: the method.
    """

    inner: AttentionMethod | None = None
    pools_layers: ClassVar[bool] = True

    @property
    def drops_text(self) -> bool:
        """Whether the method drops text."""
        return self.inner is not None and self.inner.drops_text

    def summarise(self, rows: AttentionRows) -> Summary:
        """Note which tokens are seen, bool ``[B, P]``."""
        return (rows.seen.any(1),)

    def select(self, seen: Mapping[int, Summary], visual: Tensor, pruned: Sequence[int]) -> dict[int, Tensor]:
        """Choose as many tokens of each layer."""
        candidates = seen[pruned[0]][0] if self.drops_text else visual
        counts, layers = candidates.sum(1), len(pruned)
        shares = torch.ones(layers, len(counts), dtype=torch.float64, device="cpu")
        dealt = spread(shares, share_of(layers * counts, self.share), counts.clamp(max=1), counts)
        nothing = torch.zeros(visual.shape, dtype=torch.float32, device="cpu")
        return {layer: best_tokens(nothing, candidates, budget) for layer, budget in zip(pruned, dealt, strict=True)}


class AlikeSealer(Sealer):
    """Stores the states of a layer as those of another one of the same shapes were stored, in storage of its own.

    Args:
        sealer: the layer's.
        seals: what was stored so far, by what it follows from.
    """

    def __init__(self, sealer: Sealer, seals: dict[object, tuple[Stored, Stored]]) -> None:
        self.__dict__.update(sealer.__dict__)
        self.seals = seals

    def store(
        self,
        keys: Tensor,
        values: Tensor,
        places: Places,
        queries: Tensor | None = None,
        valid: Tensor | None = None,
        *,
        impl: SealImplementation = "auto",
    ) -> tuple[Stored, Stored]:
        """Store the tokens at `places` of Keys and Values."""
        if self.options.is_calibrated:
            return super().store(keys, values, places, queries, valid, impl=impl)  # its layers differ
        shapes = ((states.shape[1], states.shape[3], states.dtype) for states in (keys, values))
        key = (self.options, *shapes, places.ranges)
        if key not in self.seals:
            self.seals[key] = super().store(keys, values, places, queries, valid, impl=impl)
        stored_keys, stored_values = self.seals[key]
        return _apart(stored_keys), _apart(stored_values)


def _apart(stored: Stored) -> Stored:
    """Give what is stored in storage of its own."""
    basis = None if stored.basis is None else stored.basis.select(torch.empty_like)
    return Stored(torch.empty_like(stored.data), basis, stored.code)


class ShapeSelection(TokenSelection):
    """A choice of tokens without attention: as many of each row and layer as the method keeps, whichever they are."""

    def __init__(self, method: AttentionMethod) -> None:
        super().__init__(Alike(method.keep, method) if method.pools_layers else method)

    def _summary(self, layer: LayerKV, plan: SealPlan, query: Tensor, mask: Tensor | None, scale: float) -> Summary:
        """Read an attention that no text pays to anything."""
        rows, columns = plan.visual.shape
        weights = torch.zeros(rows, 1, 1, columns, dtype=torch.float32, device="cpu")
        valid = torch.ones(rows, 1, dtype=torch.bool, device="cpu")
        return self.method.summarise(AttentionRows(weights, plan.visible[:, None].cpu(), valid, plan.visual.cpu()))
