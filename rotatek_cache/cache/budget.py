"""Budgets in absolute terms: how many visual tokens and how many channels of them fit into so many bytes.

A plan is made when the prompt is known, before its first layer seals, or before its images are encoded where tokens are
chosen from features. It counts what the cache holds right after the prompt: text with its free room, coefficients or
codes, bases, deltas, row tables, positions and flags.
"""

import dataclasses
import functools
import itertools
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.cache.seal_plan import Coming, SealPlan
from rotatek_cache.cache.selection import TokenSelection
from rotatek_cache.core.basis import RANK_MULTIPLE, padded_rank
from rotatek_cache.core.segments import room_for
from rotatek_cache.options import FitOptions
from rotatek_cache.report import readable_bytes
from rotatek_cache.token_pruning.interface import AttentionMethod, FeatureMethod, TokenMethod

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
DEFAULT_SPARSITY = 0.75  # the paper's: where neither tokens nor channels are given, channels are cut so far first
STEPS = 1 << 16  # parts of one in which a share of tokens is sought
PARTS = 1 << 7  # coarser ones, tried first
POSITION_BYTES, FLAG_BYTES, ROW_BYTES = 4, 10, 28  # of a stored token, of a prompt's position, of a row of a layer
NEAR = 0.01  # a budget is met within this share
TRIES = 64  # how many steps of ranks are tried to come that near


@dataclass(frozen=True)
class Budget:
    """What a cache may take right after its prompt.

    Args:
        given: ``"0.25x"``, a share of the dense cache of the same prompt; ``"512MiB"`` (B, KiB, MiB, GiB), bytes of the
            whole cache; or a number of tokens, as many bytes as so many dense tokens of each row take.
    """

    given: str | int

    def __post_init__(self) -> None:
        example = "such as '0.25x', '512MiB' or 2048 (tokens)"
        if isinstance(self.given, bool) or not isinstance(self.given, str | int):
            raise TypeError(f"budget must be a string or an int {example}, got {type(self.given).__name__}")
        if isinstance(self.given, str) and self._amount() is None:
            raise ValueError(f"budget must be {example}, got {self.given!r}")
        if self.bytes_of(1.0, 1.0) <= 0:
            raise ValueError(f"budget must be positive, got {self.given!r}")

    def _amount(self) -> tuple[float, str] | None:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(x|B|KiB|MiB|GiB)", str(self.given))
        return None if found is None else (float(found[1]), found[2])

    def bytes_of(self, dense: float, token: float) -> float:
        """Bytes, where the prompt takes `dense` bytes in a dense cache and a token of all rows `token` bytes."""
        if isinstance(self.given, int):
            return self.given * token
        amount = self._amount()
        assert amount is not None
        return amount[0] * (dense if amount[1] == "x" else UNITS[amount[1]])


@dataclass(frozen=True)
class BudgetPlan:
    """How a budget was divided; its text is what `report` prints.

    Attributes:
        budget: as it was given.
        budget_bytes: what it is for this prompt.
        planned_bytes: what the cache is expected to hold.
        text_bytes: of these, what everything but visual tokens takes.
        keep: share of the visual tokens that stays, in the layers that drop any.
        ranks: channels of visual Keys by layer, padded.
        exact: how many of the last visual tokens of each row stay as they are, by layer, out of what ranks left over.
        head_width: D.
    """

    budget: str | int
    budget_bytes: float
    planned_bytes: float
    text_bytes: float
    keep: float
    ranks: dict[int, int]
    exact: dict[int, int]
    head_width: int

    def __str__(self) -> str:
        counts = {rank: list(self.ranks.values()).count(rank) for rank in sorted(set(self.ranks.values()))}
        ranks = ", ".join(f"{rank} in {layers} layers" for rank, layers in counts.items())
        whole, text, planned = (
            readable_bytes(round(count)) for count in (self.budget_bytes, self.text_bytes, self.planned_bytes)
        )
        spared = sorted(set(self.exact.values()))
        exact = f", the last {' or '.join(map(str, spared))} of each row exact" if any(spared) else ""
        below = 1 - self.planned_bytes / self.budget_bytes
        distance = f", {100 * below:.1f} % below, the nearest that can be stored" if below > NEAR else ""
        return (
            f"budget {self.budget} = {whole}: {text} for text, {100 * self.keep:.1f} % of the visual tokens, Key rank "
            f"of {self.head_width}: {ranks}{exact}; planned {planned}{distance}"
        )


@dataclass(frozen=True)
class Sizes:
    """What a plan has to know of a prompt and of what the cache holds already.

    Attributes:
        shape: rows, KV heads, width of Keys and of Values.
        dtype: of Keys and Values.
        length: logical tokens when the prompt has been read.
        visual, text: by row, visual tokens that are to be sealed, and all others, those held already included.
        held: bytes of visual segments that are sealed.
        images: by row, visual tokens of each image, where a share is taken of each by itself.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    length: int
    visual: tuple[int, ...]
    text: tuple[int, ...]
    held: int
    images: tuple[tuple[int, ...], ...] = ()

    def kept(self, keep: float) -> list[int]:
        """Visual tokens of each row that a share `keep` leaves."""
        if self.images:
            return [sum(image_counts(keep, images)) for images in self.images]
        return [max(1, round(keep * count)) if count else 0 for count in self.visual]

    @property
    def token_bytes(self) -> int:
        """Bytes of a dense token of all rows in one layer."""
        batch, heads, key_width, value_width = self.shape
        return batch * heads * (key_width + value_width) * self.dtype.itemsize


class Planner:
    """Divides a budget between tokens and channels: fixes whichever of both the user left open.

    What ranks in steps of 8 leave over keeps the last visual tokens as they are, as ThinK (arXiv 2407.21018) and KIVI
    (arXiv 2402.02750) do with the newest ones.

    Args:
        budget: what the cache may take.
        options: how Keys and Values are stored; their rank is replaced where it is open.
        tokens: the token method, if any; its share is replaced where it is None.
        rank_open: whether the user left the rank open.
    """

    def __init__(self, budget: Budget, options: FitOptions, tokens: TokenMethod | None, *, rank_open: bool) -> None:
        self.budget, self.options, self.tokens, self.rank_open = budget, options, tokens, rank_open
        self.keep_open = tokens is not None and tokens.keep is None
        if options.energy is not None:
            raise ValueError("budget and energy cannot both decide on the rank: give one of them")
        if not rank_open and not self.keep_open:
            raise ValueError(
                f"budget={budget.given!r} has nothing left to choose: leave out sparsity and rank, or the share of a "
                'token method, as in tokens="vl_cache"'
            )
        if rank_open and not self.keep_open and options.key_bits == "auto":
            raise ValueError("budget sets a rank here, which key_bits='auto' does not have: give key_bits a number")
        if options.allocation.over != "uniform":
            raise ValueError("budget and allocation cannot both deal channels out to layers: give one of them")
        self.layers: Sequence[Any] = ()  # with a `kv` each, as the cache holds them
        self.selection: TokenSelection | None = None
        self.made: BudgetPlan | None = None
        self.share: float | None = None  # of visual tokens, where it was settled before the language model
        self._for: weakref.ref[SealPlan] | None = None

    def learn_layers(self, layers: Sequence[Any], selection: TokenSelection | None) -> None:
        """Learn the layers of the cache, which all have to be ours."""
        stock = [index for index, held in enumerate(layers) if not hasattr(held, "kv")]
        if stock:
            raise ValueError(
                f"a budget cannot be kept where layers {stock} have the stock cache layer (sliding window), which is "
                "not compressed: give sparsity or tokens with a share"
            )
        self.layers, self.selection = layers, selection

    def forget(self) -> None:
        """Forget what was planned, for another prompt."""
        self.made = self.share = self._for = None

    def counts_before(
        self, coming: Coming, shape: tuple[int, int, int, int], dtype: torch.dtype, lengths: Sequence[int]
    ) -> tuple[float, list[int]]:
        """A share for a method that chooses before the language model reads `coming`, and tokens to keep of each image.

        Args:
            coming: the prompt.
            shape: rows, KV heads, width of Keys and of Values.
            dtype: of Keys and Values.
            lengths: visual tokens of each image, row after row.
        """
        old = self.layers[0].kv.text.length
        visual, text = coming.counts()
        rows = _by_row(lengths, visual[:: coming.repeats])
        repeated = tuple(images for images in rows for _ in range(coming.repeats))
        all_text = tuple(old + count for count in text)
        sizes = Sizes(shape, dtype, coming.end, visual, all_text, self._held(), repeated)
        self.share = self._keep(sizes, _Estimate(sizes, self), self._first_ranks(shape[2]))
        return self.share, [count for images in rows for count in image_counts(self.share, images)]

    def prepare(self, layer: LayerKV, plan: SealPlan) -> None:
        """Plan for the prompt that seals by `plan`, once, and tell all layers."""
        if self._for is not None and self._for() is plan:
            return
        self._for = weakref.ref(plan)
        self._settle(self._sizes(layer, plan), None)
        if self.selection is not None and self.keep_open:
            assert self.made is not None
            self.selection.method = self.selection.method.with_keep(self.made.keep)

    def settle(self, layer: LayerKV, plan: SealPlan, counts: Sequence[Sequence[int]]) -> None:
        """Plan ranks anew once it is known how many visual tokens each layer keeps of each row: ``counts[layer]``."""
        if self.rank_open:
            self._settle(self._sizes(layer, plan), counts)

    def _settle(self, sizes: Sizes, counts: Sequence[Sequence[int]] | None) -> None:
        count = len(self.layers)
        dense = sizes.token_bytes * count
        budget = self.budget.bytes_of(sizes.length * dense, dense)
        estimate = _Estimate(sizes, self, counts)
        ranks, keep = self._first_ranks(sizes.shape[2]), 1.0
        if counts is not None:
            assert self.made is not None
            keep = self.made.keep
        elif isinstance(self.tokens, AttentionMethod):  # a feature method has dropped its tokens before
            keep = self._keep(sizes, estimate, ranks) if self.keep_open else self.tokens.share
        exact = [0] * count
        if self.rank_open or keep < 1:
            ranks, exact = self._nearest(sizes, estimate, keep, ranks, budget)
        planned = estimate.total(keep, ranks, exact)
        text = estimate.total(0.0, ranks, everything=False)
        if planned > budget * (1.001 if counts is None else 1 + NEAR):
            raise self._too_small(budget, text, planned, counts)
        stated = keep if self.share is None else self.share
        if isinstance(self.tokens, FeatureMethod) and not self.keep_open:
            stated = self.tokens.share
        held = [layer.kv for layer in self.layers]
        ranks_of, exact_of = (
            {kv.index: part for kv, part in zip(held, parts, strict=True)} for parts in (ranks, exact)
        )
        self.made = BudgetPlan(self.budget.given, budget, planned, text, stated, ranks_of, exact_of, sizes.shape[2])
        for kv in held:
            options = self.options
            if self.rank_open:
                options = dataclasses.replace(options, sparsity=None, rank=ranks_of[kv.index])
            kv.use(options, exact_of[kv.index])

    def _nearest(
        self, sizes: Sizes, estimate: "_Estimate", keep: float, ranks: list[int], budget: float
    ) -> tuple[list[int], list[int]]:
        """Ranks, and how many tokens stay as they are, by layer: as many channels as fit, then as many tokens.

        A row whose rest would no longer pay for a basis stays dense, so costs jump; fewer channels may then be nearer.
        """
        count, most = len(ranks), max(sizes.visual, default=0) * len(ranks)
        tried = [ranks]
        if self.rank_open:
            blocks = sizes.shape[2] // RANK_MULTIPLE * count
            units = _largest(lambda units: estimate.total(keep, _dealt(units, count)), count, blocks, budget)
            tried = [_dealt(fewer, count) for fewer in range(units, max(count, units - TRIES) - 1, -1)]
            tried = tried[:1] if units == blocks else tried  # fewer channels would only take less
        best: tuple[float, list[int], list[int]] = (0.0, tried[0], [0] * count)
        for candidate in tried:
            cost = functools.partial(_cost_of_exact, estimate, keep, candidate)
            spared = _largest(cost, 0, most, budget)
            found = estimate.total(keep, candidate, _even(spared, count))
            if found == estimate.total(keep, candidate):
                spared = 0  # nothing is gained
            if best[0] < found <= budget:
                best = (found, candidate, _even(spared, count))
            if best[0] > budget * (1 - NEAR / 4):
                break
        return best[1], best[2]

    def _keep(self, sizes: Sizes, estimate: "_Estimate", ranks: Sequence[int]) -> float:
        """The largest share of visual tokens that fits with `ranks`."""
        dense = sizes.token_bytes * len(self.layers)
        budget = self.budget.bytes_of(sizes.length * dense, dense)
        # Costs fall where a row gets enough tokens for a basis, whose absence made all rows' text wider.
        fitting = (part for part in range(PARTS, 0, -1) if estimate.total(part / PARTS, ranks) <= budget)
        part = next(fitting, 0) * STEPS // PARTS
        most = min(STEPS, part + STEPS // PARTS)
        steps = _largest(lambda step: estimate.total(step / STEPS, ranks), max(1, part), most, budget)
        if (planned := estimate.total(steps / STEPS, ranks)) > budget * 1.001:
            raise self._too_small(budget, estimate.total(0.0, ranks, everything=False), planned)
        return steps / STEPS

    def _too_small(
        self, budget: float, text: float, planned: float, counts: Sequence[Sequence[int]] | None = None
    ) -> ValueError:
        least = f"{RANK_MULTIPLE} channels of visual Keys"
        if counts is not None or self.share is not None:
            least = "of the tokens that were chosen"
        elif self.keep_open:
            least = "all visual tokens but one dropped"
        return ValueError(
            f"budget={self.budget.given!r} is {readable_bytes(round(budget))} for this prompt, of which all but "
            f"visual tokens takes {readable_bytes(round(text))}, and the least possible ({least}) "
            f"{readable_bytes(round(planned))}: raise the budget"
        )

    def _first_ranks(self, width: int) -> list[int]:
        """Ranks as they were given, or those that channels are cut to before any token goes."""
        rank = width if self.options.is_identity else padded_rank(self.options.rank_for(width) or width)
        return [rank] * len(self.layers)

    def _held(self) -> int:
        return sum(
            tensor.nbytes for held in self.layers for segment in held.kv.segments for tensor in segment.tensors()
        )

    def _sizes(self, layer: LayerKV, plan: SealPlan) -> Sizes:
        assert layer.shape is not None
        assert layer.dtype is not None
        text = [layer.text.length + int(row) for row in (plan.visible & ~plan.visual).sum(1).tolist()]
        visual, length = list(plan.counts), layer.length
        coming = layer.ledger.coming
        if coming is not None and coming.end > length:  # a chunk of a prompt: the rest is counted as if it were here
            later_visual, later_text = coming.counts(length)
            keep = self.share or (self.tokens.share if isinstance(self.tokens, FeatureMethod) else 1.0)
            visual = [have + round(keep * more) for have, more in zip(visual, later_visual, strict=True)]
            text = [have + more for have, more in zip(text, later_text, strict=True)]
            length = coming.end
        return Sizes(layer.shape, layer.dtype, length, tuple(visual), tuple(text), self._held())


def image_counts(keep: float, images: Sequence[int]) -> list[int]:
    """Tokens that stay of the images of a row, at least one of each; in all as many as a share `keep` of the row is."""
    bounds = [round(keep * total) for total in itertools.accumulate(images, initial=0)]
    return [max(1, end - begin) for begin, end in itertools.pairwise(bounds)]


def _by_row(lengths: Sequence[int], visual: Sequence[int]) -> list[tuple[int, ...]]:
    """The images of each row, where rows have `visual` tokens and images follow one another."""
    rows: list[tuple[int, ...]] = []
    rest = list(lengths)
    for count in visual:
        row: list[int] = []
        while rest and sum(row) < count:
            row.append(rest.pop(0))
        rows.append(tuple(row))
    return rows


def _even(units: int, layers: int) -> list[int]:
    """`units` over `layers` layers as evenly as can be, earlier ones first."""
    return [units // layers + (index < units % layers) for index in range(layers)]


def _dealt(units: int, layers: int) -> list[int]:
    """Ranks of `layers` layers that share `units` blocks of channels."""
    return [RANK_MULTIPLE * blocks for blocks in _even(units, layers)]


def _cost_of_exact(estimate: "_Estimate", keep: float, ranks: Sequence[int], spared: int) -> float:
    """Bytes where `spared` tokens of each row stay as they are, over all layers."""
    return estimate.total(keep, ranks, _even(spared, len(ranks)))


def _largest(cost: Callable[[int], float], least: int, most: int, budget: float) -> int:
    """The largest whole number from `least` to `most` whose rising `cost` is within `budget`; `least` if none is."""
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        if cost(middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


class _Estimate:
    """Bytes that a cache will hold after a prompt, for any share of tokens and any ranks.

    `counts`: by layer, visual tokens of each row, where that is known and a share has no say.
    """

    def __init__(self, sizes: Sizes, planner: Planner, counts: Sequence[Sequence[int]] | None = None) -> None:
        self.sizes, self.counts = sizes, counts
        self.layers = [held.kv.index for held in planner.layers]
        method = planner.tokens
        attends = method if isinstance(method, AttentionMethod) else None
        self.pruned = set(self.layers if attends is None else attends.pruned(self.layers))
        self.pools = attends is not None and attends.pools_layers
        self.alike = attends is None or attends.alike
        self.sealer = planner.layers[0].kv.sealer
        flags = FLAG_BYTES + int(isinstance(method, FeatureMethod))
        self.rest = flags * sizes.shape[0] * sizes.length + sizes.held

    def total(
        self, keep: float, ranks: Sequence[int], exact: Sequence[int] | None = None, *, everything: bool = True
    ) -> float:
        """Bytes of the cache, with ``exact[layer]`` visual tokens of each row as they are.

        Without `everything`: of all but visual tokens.
        """
        count, found = len(self.layers), float(self.rest)
        known: set[object] = set()  # layers that keep the same tokens share their tables
        same: dict[object, tuple[float, float, object]] = {}
        for place, (layer, rank) in enumerate(zip(self.layers, ranks, strict=True)):
            if not everything:
                counts = [0] * len(self.sizes.visual)
            elif self.counts is not None:
                counts = list(self.counts[place])
            elif layer not in self.pruned:
                counts = list(self.sizes.visual)
            elif self.pools:
                counts = [max(1, _even(round(keep * n * count), count)[place]) if n else 0 for n in self.sizes.visual]
            else:
                counts = self.sizes.kept(keep)
            spared = 0 if exact is None else exact[place]
            case = (tuple(counts), rank, spared)
            if case not in same:
                same[case] = self._layer(counts, rank, spared)
            states, tables, key = same[case]
            found += states
            if not self.alike or key not in known:
                found += tables
                known.add(key)
        return found

    def _layer(self, counts: Sequence[int], rank: int, exact: int) -> tuple[float, float, object]:
        """Bytes of Keys and Values with bases, bytes of the tables, and what the latter depend on."""
        batch, heads, key_width, value_width = self.sizes.shape
        shape = (key_width, value_width, self.sizes.dtype)
        coded = [max(0, count - exact) for count in counts]
        coded = [count if count and self.sealer.is_worth(count, *shape, rank) else 0 for count in coded]
        segment = sum(heads * self.sealer.stored_bytes(count, *shape, rank) for count in coded if count)
        width = max(text + count - less for text, count, less in zip(self.sizes.text, counts, coded, strict=True))
        token = heads * (key_width + value_width) * self.sizes.dtype.itemsize
        tables = batch * (POSITION_BYTES * width + ROW_BYTES) + POSITION_BYTES * sum(coded)
        return segment + batch * room_for(width) * token, tables, (tuple(counts), tuple(coded))
