"""Budgets in absolute terms: how many visual tokens and how many channels of them fit into so many bytes.

A plan is made when the prompt is known, before its first layer seals, or before its images are encoded where tokens are
chosen from features. It counts what the cache holds right after the prompt: text with its free columns, coefficients
or codes, bases, deltas, row tables, positions and flags.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rotatek_cache.cache.expected_prompt import ExpectedPrompt
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.cache.seal_plan import SealPlan
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.core.basis import RANK_MULTIPLE, padded_rank
from rotatek_cache.core.row_layout import ROW_BYTES, TOKEN_BYTES
from rotatek_cache.core.segments import capacity_for
from rotatek_cache.options import FitOptions
from rotatek_cache.report import readable_bytes
from rotatek_cache.token_pruning.interface import AttentionMethod, FeatureMethod, TokenMethod

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
DEFAULT_SPARSITY = 0.75  # the paper's: where neither tokens nor channels are given, channels are cut so far first
STEPS = 1 << 16  # parts of one in which a share of tokens is sought
PARTS = 1 << 7  # coarser ones, tried first
NEAR = 0.01  # a budget is met within this share
TRIES = 64  # how many steps of ranks are tried to come that near


@dataclass(frozen=True)
class Budget:
    """The bytes that a cache may take right after its prompt.

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
        """Convert it to bytes: the prompt takes `dense` bytes in a dense cache, a token of all rows `token` bytes."""
        if isinstance(self.given, int):
            return self.given * token
        amount = self._amount()
        assert amount is not None
        return amount[0] * (dense if amount[1] == "x" else UNITS[amount[1]])


@dataclass(frozen=True)
class BudgetPlan:
    """A divided budget; its text is what `report` prints.

    Attributes:
        budget: as it was given.
        budget_bytes: what it is for this prompt.
        planned_bytes: what the cache is expected to hold.
        text_bytes: of these, what everything but visual tokens takes.
        keep: share of the visual tokens that stays, in the layers that drop any.
        ranks: channels of visual Keys by layer, padded.
        last_dense: how many of the last visual tokens of each row stay dense, by layer, out of what ranks left over.
        head_width: D.
    """

    budget: str | int
    budget_bytes: float
    planned_bytes: float
    text_bytes: float
    keep: float
    ranks: dict[int, int]
    last_dense: dict[int, int]
    head_width: int

    def __str__(self) -> str:
        counts = {rank: list(self.ranks.values()).count(rank) for rank in sorted(set(self.ranks.values()))}
        ranks = ", ".join(f"{rank} in {layers} layers" for rank, layers in counts.items())
        whole, text, planned = (
            readable_bytes(round(count)) for count in (self.budget_bytes, self.text_bytes, self.planned_bytes)
        )
        last = sorted(set(self.last_dense.values()))
        dense = f", the last {' or '.join(map(str, last))} of each row exact" if any(last) else ""
        below = 1 - self.planned_bytes / self.budget_bytes
        distance = f", {100 * below:.1f} % below, the nearest that can be stored" if below > NEAR else ""
        return (
            f"budget {self.budget} = {whole}: {text} for text, {100 * self.keep:.1f} % of the visual tokens, Key rank "
            f"of {self.head_width}: {ranks}{dense}; planned {planned}{distance}"
        )


@dataclass(frozen=True)
class Sizes:
    """The sizes of a prompt and of what the cache holds already, as a plan needs them.

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

    def kept(self, keep: float, times: int = 1) -> list[int]:
        """Count the visual tokens of each row that a share `keep` leaves, taken `times` times."""
        if self.images:
            return [sum(image_counts(keep, images)) for images in self.images]
        counts = list(self.visual)
        for _ in range(times):
            counts = [max(1, round(keep * count)) if count else 0 for count in counts]
        return counts

    @property
    def token_bytes(self) -> int:
        """Bytes of a dense token of all rows in one layer."""
        batch, heads, key_width, value_width = self.shape
        return batch * heads * (key_width + value_width) * self.dtype.itemsize


class Planner:
    """Divides a budget between tokens and channels: fixes whichever of both the user left open.

    Ranks are multiples of 8, so part of a budget may remain. It is spent on keeping each row's last visual tokens
    dense, as ThinK (arXiv 2407.21018) and KIVI (arXiv 2402.02750) do with the newest ones.

    Args:
        budget: what the cache may take.
        options: how Keys and Values are stored; their rank is replaced where it is open.
        tokens: the token method, if any; its share is replaced where it is None.
        rank_open: whether the user left the rank open.
    """

    def __init__(self, budget: Budget, options: FitOptions, tokens: TokenMethod | None, *, rank_open: bool) -> None:
        self.budget, self.options, self.tokens, self.rank_open = budget, options, tokens, rank_open
        self.keep_open = tokens is not None and tokens.keep is None
        if isinstance(tokens, AttentionMethod) and not tokens.drops:
            raise ValueError(
                f"budget={budget.given!r} is divided between dropped tokens and channels, and tokens={tokens} drop "
                "none: leave out budget"
            )
        if isinstance(tokens, AttentionMethod) and tokens.drops_text:
            raise ValueError(
                f"budget={budget.given!r} is divided among visual tokens, and tokens={tokens} drop text as well: give "
                "keep in place of a budget, or leave text as it is (scope='visual')"
            )
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
        self.layers: Sequence[LayerKV] = ()
        self.made: BudgetPlan | None = None
        self.share: float | None = None  # of visual tokens, where it was settled before the language model

    def learn_layers(self, layers: Sequence[LayerKV | None]) -> None:
        """Learn the layers of the cache; None is a stock one, which a budget cannot count."""
        stock = [index for index, layer in enumerate(layers) if layer is None]
        if stock:
            raise ValueError(
                f"a budget cannot be kept where layers {stock} have the stock cache layer (sliding window or linear "
                "attention), which is not compressed: give sparsity or tokens with a share"
            )
        self.layers = [layer for layer in layers if layer is not None]

    def forget(self) -> None:
        """Forget what was planned, for another prompt."""
        self.made = self.share = None

    def counts_before(
        self, expected: ExpectedPrompt, shape: tuple[int, int, int, int], dtype: torch.dtype, lengths: Sequence[int]
    ) -> tuple[float, list[int]]:
        """Settle the share of a method that chooses before the language model reads the prompt.

        Args:
            expected: the prompt.
            shape: rows, KV heads, width of Keys and of Values.
            dtype: of Keys and Values.
            lengths: visual tokens of each image, row after row.

        Returns:
            The share, and the tokens to keep of each image.
        """
        old = self.layers[0].text.length
        visual, text = expected.counts()
        rows = _by_row(lengths, visual[:: expected.repeats])
        repeated = tuple(images for images in rows for _ in range(expected.repeats))
        all_text = tuple(old + count for count in text)
        sizes = Sizes(shape, dtype, expected.end, visual, all_text, self._held(), repeated)
        self.share = self._keep(sizes, _Estimate(sizes, self), self._first_ranks(shape[2]))
        return self.share, [count for images in rows for count in image_counts(self.share, images)]

    def divide(self, layer: LayerKV, plan: SealPlan, counts: Sequence[Sequence[int]] | None = None) -> BudgetPlan:
        """Divide the budget for a prompt that all layers seal by `plan`.

        Args:
            layer: one of them, with the prompt pending.
            plan: the seal.
            counts: by layer, how many visual tokens it keeps of each row, once that is known; ranks are planned anew.
        """
        sizes = self._sizes(layer, plan)
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
        last = [0] * count
        if self.rank_open or keep < 1:
            ranks, last = self._nearest(sizes, estimate, keep, ranks, budget)
        planned = estimate.total(keep, ranks, last)
        text = estimate.total(0.0, ranks, everything=False)
        if planned > budget * (1.001 if counts is None else 1 + NEAR):
            raise self._too_small(budget, text, planned, counts)
        stated = keep if self.share is None else self.share
        if isinstance(self.tokens, FeatureMethod) and not self.keep_open:
            stated = self.tokens.share
        ranks_of, last_of = (
            {layer.index: part for layer, part in zip(self.layers, parts, strict=True)} for parts in (ranks, last)
        )
        self.made = BudgetPlan(self.budget.given, budget, planned, text, stated, ranks_of, last_of, sizes.shape[2])
        return self.made

    def options_of(self, layer: int) -> FitOptions:
        """Return the options that a layer seals with by the plan made last."""
        if self.made is None or not self.rank_open:
            return self.options
        return dataclasses.replace(self.options, sparsity=None, rank=self.made.ranks[layer])

    def _nearest(
        self, sizes: Sizes, estimate: "_Estimate", keep: float, ranks: list[int], budget: float
    ) -> tuple[list[int], list[int]]:
        """Find ranks, and how many tokens stay dense, by layer: as many channels as fit, then as many tokens.

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
            cost = functools.partial(_cost_of_last_dense, estimate, keep, candidate)
            last = _largest(cost, 0, most, budget)
            found = estimate.total(keep, candidate, _even(last, count))
            if found == estimate.total(keep, candidate):
                last = 0  # nothing is gained
            if best[0] < found <= budget:
                best = (found, candidate, _even(last, count))
            if best[0] > budget * (1 - NEAR / 4):
                break
        return best[1], best[2]

    def _keep(self, sizes: Sizes, estimate: "_Estimate", ranks: Sequence[int]) -> float:
        """Find the largest share of visual tokens that fits with `ranks`."""
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
        least, advice = f"{RANK_MULTIPLE} channels of visual Keys", "raise the budget"
        if counts is not None or self.share is not None:
            least = "of the tokens that were chosen"
        elif self.keep_open:
            least = "all visual tokens but one dropped"
        else:
            advice += ', or leave open how many tokens are kept, as in tokens="divprune"'
        return ValueError(
            f"budget={self.budget.given!r} is {readable_bytes(round(budget))} for this prompt, of which all but "
            f"visual tokens takes {readable_bytes(round(text))}, and the least possible ({least}) "
            f"{readable_bytes(round(planned))}: {advice}"
        )

    def _first_ranks(self, width: int) -> list[int]:
        """Return the ranks that were given, or those that channels are cut to before any token goes."""
        rank = width if self.options.is_identity else padded_rank(self.options.rank_for(width) or width)
        return [rank] * len(self.layers)

    def _held(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for segment in layer.segments for tensor in segment.tensors())

    def _sizes(self, layer: LayerKV, plan: SealPlan) -> Sizes:
        assert layer.shape is not None
        assert layer.dtype is not None
        text = [layer.text.length + int(row) for row in (plan.visible & ~plan.visual).sum(1).tolist()]
        visual, length = list(plan.counts), layer.length
        expected = layer.positions.expected
        if (
            expected is not None and expected.end > length
        ):  # a chunk of a prompt: the rest is counted as if it were here
            later_visual, later_text = expected.counts(length)
            keep = self.share or (self.tokens.share if isinstance(self.tokens, FeatureMethod) else 1.0)
            visual = [have + round(keep * more) for have, more in zip(visual, later_visual, strict=True)]
            text = [have + more for have, more in zip(text, later_text, strict=True)]
            length = expected.end
        return Sizes(layer.shape, layer.dtype, length, tuple(visual), tuple(text), self._held())


def image_counts(keep: float, images: Sequence[int]) -> list[int]:
    """Count the tokens that stay of a row's images: at least one of each, in all a share `keep` of the row."""
    bounds = [round(keep * total) for total in itertools.accumulate(images, initial=0)]
    return [max(1, end - begin) for begin, end in itertools.pairwise(bounds)]


def _by_row(lengths: Sequence[int], visual: Sequence[int]) -> list[tuple[int, ...]]:
    """Group images, which follow one another, by row, where rows have `visual` tokens."""
    rows: list[tuple[int, ...]] = []
    rest = list(lengths)
    for count in visual:
        row: list[int] = []
        while rest and sum(row) < count:
            row.append(rest.pop(0))
        rows.append(tuple(row))
    return rows


def _even(units: int, layers: int) -> list[int]:
    """Spread `units` over `layers` layers as evenly as can be, earlier ones first."""
    return [units // layers + (index < units % layers) for index in range(layers)]


def _dealt(units: int, layers: int) -> list[int]:
    """Deal `units` blocks of channels out to `layers` layers; returns their ranks."""
    return [RANK_MULTIPLE * blocks for blocks in _even(units, layers)]


def _cost_of_last_dense(estimate: "_Estimate", keep: float, ranks: Sequence[int], last: int) -> float:
    """Estimate the bytes where `last` tokens of each row stay dense, counted over all layers."""
    return estimate.total(keep, ranks, _even(last, len(ranks)))


def _largest(cost: Callable[[int], float], least: int, most: int, budget: float) -> int:
    """Find the largest whole number from `least` to `most` whose rising `cost` is within `budget`; else `least`."""
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
        self.layers = [layer.index for layer in planner.layers]
        method = planner.tokens
        attends = method if isinstance(method, AttentionMethod) else None
        once = dict.fromkeys(self.layers, 1)
        self.times_dropped = once if attends is None else attends.times_dropped(self.layers)
        self.pools = attends is not None and attends.pools_layers
        self.alike = attends is None or attends.alike
        self.sealer = planner.layers[0].sealer
        flags = VisualPositions.bytes_per_position(tokens_dropped=isinstance(method, FeatureMethod))
        self.rest = flags * sizes.shape[0] * sizes.length + sizes.held

    def total(
        self, keep: float, ranks: Sequence[int], last_dense: Sequence[int] | None = None, *, everything: bool = True
    ) -> float:
        """Estimate the bytes of the cache, with the last ``last_dense[layer]`` visual tokens of each row dense.

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
            elif self.pools:
                counts = [max(1, _even(round(keep * n * count), count)[place]) if n else 0 for n in self.sizes.visual]
            else:
                counts = self.sizes.kept(keep, self.times_dropped[layer])
            last = 0 if last_dense is None else last_dense[place]
            case = (tuple(counts), rank, last)
            if case not in same:
                same[case] = self._layer(counts, rank, last)
            states, tables, key = same[case]
            found += states
            key = (key, self.times_dropped[layer])
            if not self.alike or key not in known:
                found += tables
                known.add(key)
        return found

    def _layer(self, counts: Sequence[int], rank: int, last: int) -> tuple[float, float, object]:
        """Estimate the bytes of Keys and Values with bases, those of the tables, and what the latter depend on."""
        batch, heads, key_width, value_width = self.sizes.shape
        shape = (key_width, value_width, self.sizes.dtype)
        coded = [max(0, count - last) for count in counts]
        coded = [count if count and self.sealer.is_worth(count, *shape, rank) else 0 for count in coded]
        segment = sum(heads * self.sealer.stored_bytes(count, *shape, rank) for count in coded if count)
        width = max(text + count - less for text, count, less in zip(self.sizes.text, counts, coded, strict=True))
        token = heads * (key_width + value_width) * self.sizes.dtype.itemsize
        tables = batch * (TOKEN_BYTES * width + ROW_BYTES) + TOKEN_BYTES * sum(coded)
        return segment + batch * capacity_for(width) * token, tables, (tuple(counts), tuple(coded))
