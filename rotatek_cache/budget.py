"""Budgets in absolute terms: how many visual tokens and how many channels of them fit into so many bytes.

A plan is made when the prompt is known, before its first layer seals. It counts what the cache holds right after the
prompt: text with its free room, coefficients or codes, bases, deltas, row tables, positions and flags.
"""

import dataclasses
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rotatek_cache.basis import RANK_MULTIPLE, FitOptions, padded_rank
from rotatek_cache.layer import LayerKV
from rotatek_cache.ledger import SealPlan
from rotatek_cache.report import readable_bytes
from rotatek_cache.segments import room_for
from rotatek_cache.tokens import AttentionMethod, TokenMethod, TokenSelection

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
DEFAULT_SPARSITY = 0.75  # the paper's: where neither tokens nor channels are given, channels are cut so far first
STEPS = 1 << 16  # parts of one in which a share of tokens is sought
POSITION_BYTES, FLAG_BYTES, ROW_BYTES = 4, 10, 28  # of a stored token, of a prompt's position, of a row of a layer


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
        head_width: D.
    """

    budget: str | int
    budget_bytes: float
    planned_bytes: float
    text_bytes: float
    keep: float
    ranks: dict[int, int]
    head_width: int

    def __str__(self) -> str:
        counts = {rank: list(self.ranks.values()).count(rank) for rank in sorted(set(self.ranks.values()))}
        ranks = ", ".join(f"{rank} in {layers} layers" for rank, layers in counts.items())
        whole, text, planned = (
            readable_bytes(round(count)) for count in (self.budget_bytes, self.text_bytes, self.planned_bytes)
        )
        return (
            f"budget {self.budget} = {whole}: {text} for text, {100 * self.keep:.1f} % of the visual tokens, Key rank "
            f"of {self.head_width}: {ranks}; planned {planned}"
        )


class Planner:
    """Divides a budget between tokens and channels: fixes whichever of both the user left open.

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
        if options.basis_per == "image":
            raise ValueError("budget needs basis_per='prompt': how many images there will be is not known to the plan")
        self.layers: Sequence[Any] = ()  # with a `kv` each, as the cache holds them
        self.selection: TokenSelection | None = None
        self.made: BudgetPlan | None = None
        self._for: weakref.ref[SealPlan] | None = None

    def prepare(self, layer: LayerKV, plan: SealPlan) -> None:
        """Plan for the prompt that seals by `plan`, once, and tell all layers."""
        if self._for is not None and self._for() is plan:
            return
        self._for = weakref.ref(plan)
        self.made = made = self._plan(layer, plan)
        if self.selection is not None and self.keep_open:
            self.selection.method = self.selection.method.with_keep(made.keep)
        if self.rank_open:
            for held in self.layers:
                rank = made.ranks[held.kv.index]
                held.kv.use(dataclasses.replace(self.options, sparsity=None, rank=rank))

    def learn_layers(self, layers: Sequence[Any], selection: TokenSelection | None) -> None:
        """Learn the layers of the cache, which all have to be ours."""
        stock = [index for index, held in enumerate(layers) if not hasattr(held, "kv")]
        if stock:
            raise ValueError(
                f"a budget cannot be kept where layers {stock} have the stock cache layer (sliding window), which is "
                "not compressed: give sparsity or tokens with a share"
            )
        self.layers, self.selection = layers, selection

    def _plan(self, layer: LayerKV, plan: SealPlan) -> BudgetPlan:
        assert layer.shape is not None
        assert layer.dtype is not None
        batch, heads, key_width, value_width = layer.shape
        count = len(self.layers)
        token = batch * heads * (key_width + value_width) * layer.dtype.itemsize * count
        budget = self.budget.bytes_of(layer.length * token, token)
        estimate = _Estimate(layer, plan, [held.kv for held in self.layers], self._pruned())
        fixed_rank = padded_rank(self.options.rank_for(key_width) or key_width)
        if self.options.is_identity:
            fixed_rank = key_width
        text = estimate.total(0.0, [fixed_rank] * count, everything=False)
        ranks, keep = [fixed_rank] * count, 1.0
        # A feature method has dropped its tokens before.
        given = self.tokens.keep if isinstance(self.tokens, AttentionMethod) else None
        whole = 1.0 if given is None else given
        widest = key_width // RANK_MULTIPLE * count
        if self.keep_open and not (self.rank_open and estimate.total(1.0, ranks) <= budget):
            keep = _largest(lambda step: estimate.total(step / STEPS, ranks), STEPS, budget) / STEPS
        else:
            keep = whole
            units = _largest(lambda units: estimate.total(whole, _dealt(units, count)), widest, budget)
            ranks = _dealt(units, count)
        keep = max(keep, 1 / STEPS)
        planned = estimate.total(keep, ranks)
        if planned > budget * 1.001:
            least = "all visual tokens dropped" if self.keep_open else f"{RANK_MULTIPLE} channels of visual Keys"
            raise ValueError(
                f"budget={self.budget.given!r} is {readable_bytes(round(budget))} for this prompt, of which all but "
                f"visual tokens takes {readable_bytes(round(text))}, and the least possible ({least}) "
                f"{readable_bytes(round(planned))}: raise the budget"
            )
        return BudgetPlan(
            self.budget.given,
            budget,
            planned,
            text,
            keep,
            {held.kv.index: rank for held, rank in zip(self.layers, ranks, strict=True)},
            key_width,
        )

    def _pruned(self) -> set[int]:
        indices = [held.kv.index for held in self.layers]
        return set(self.tokens.pruned(indices)) if isinstance(self.tokens, AttentionMethod) else set(indices)


def _dealt(units: int, layers: int) -> list[int]:
    """Ranks of `layers` layers that share `units` blocks of channels, earlier ones first."""
    return [RANK_MULTIPLE * (units // layers + (index < units % layers)) for index in range(layers)]


def _largest(cost: Callable[[int], float], most: int, budget: float) -> int:
    """The largest whole number up to `most` whose rising `cost` is within `budget`, or the least that makes sense."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if cost(middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


class _Estimate:
    """Bytes that a cache will hold after a prompt, for any share of tokens and any ranks."""

    def __init__(self, layer: LayerKV, plan: SealPlan, layers: Sequence[LayerKV], pruned: set[int]) -> None:
        assert layer.shape is not None
        assert layer.dtype is not None
        self.layers, self.pruned = layers, pruned
        self.batch, self.heads, self.key_width, self.value_width = layer.shape
        self.dtype: torch.dtype = layer.dtype
        self.visual = plan.counts
        old = layer.text.length
        self.text = [old + int(row) for row in (plan.visible & ~plan.visual).sum(1).tolist()]
        self.sealer = layer.sealer
        self.flags = FLAG_BYTES * self.batch * layer.length
        self.held = sum(tensor.nbytes for held in layers for segment in held.segments for tensor in segment.tensors())

    def total(self, keep: float, ranks: Sequence[int], *, everything: bool = True) -> float:
        """Bytes of the cache; without `everything`, of all but visual tokens."""
        kept = [0 if not count else max(1, round(keep * count)) for count in self.visual]
        none = [0] * len(kept)
        found = float(self.flags + self.held)
        for layer, rank in zip(self.layers, ranks, strict=True):
            counts = kept if layer.index in self.pruned else self.visual
            found += self._layer(counts if everything else none, rank)
        return found

    def _layer(self, counts: Sequence[int], rank: int) -> float:
        shape = (self.key_width, self.value_width, self.dtype)
        worth = [bool(count) and self.sealer.is_worth(count, *shape, rank) for count in counts]
        segment = sum(
            self.heads * self.sealer.stored_bytes(count, *shape, rank) + POSITION_BYTES * count
            for count, pays in zip(counts, worth, strict=True)
            if pays
        )
        columns = [text + (0 if pays else count) for text, count, pays in zip(self.text, counts, worth, strict=True)]
        width = max(columns)
        token = self.heads * (self.key_width + self.value_width) * self.dtype.itemsize
        return segment + self.batch * (room_for(width) * token + POSITION_BYTES * width + ROW_BYTES)
