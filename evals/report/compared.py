"""Comparisons of methods on the same samples, read out of stored results, and the words for them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.store import Results
from evals.tasks.reader import tells_nothing

QUARTER = 0.75  # the paper's sparsity: a quarter of the channels is kept
PAPER_BASIS = dict.fromkeys(("basis", "tokens", "key_bits", "query_window"))


@dataclass(frozen=True)
class Verdict:
    """A claim, in how much of what was measured it holds, and the numbers that say so.

    Attributes:
        claim: in words.
        share: of the comparisons in which it holds, in [0, 1]; None where nothing was measured.
        evidence: the numbers.
        why: what the diagnostics say about it.
    """

    claim: str
    share: float | None
    evidence: str = ""
    why: str = ""

    def words(self) -> str:
        """Write the verdict as a table does."""
        if self.share is None:
            return "not measured"
        return "holds" if self.share == 1 else "holds in part" if self.share > 0 else "does not hold"


def points(share: float | None) -> str:
    """Write a share in points of a hundred."""
    return "" if share is None else f"{100 * share:.1f}"


def interval(mean: float, bounds: Sequence[float]) -> str:
    """Write a signed difference with its interval, in points."""
    middle, low, high = (round(100 * value, 1) + 0.0 for value in (mean, *bounds))  # no negative zero
    return f"{middle:+.1f} [{low:.1f}, {high:.1f}]"


def count_of(turn: Mapping[str, Any]) -> int:
    """Count the samples of a turn's scores, in results of fidelity and of token pruning."""
    return int(turn.get("images", turn.get("pages", 0)))


def negated(bounds: Sequence[float]) -> list[float]:
    """Return the interval of the negative quantity."""
    return [-bounds[1], -bounds[0]]


def tables(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """List each task's tables, those of most samples first; leave out tasks that tell nothing about Keys."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for stored in results.accuracy.values():
        for task, table in stored["tasks"].items():
            if table["samples"] and not tells_nothing(task):
                model = stored["model"]["name"].rsplit("/", 1)[-1]
                found.setdefault(task if task.startswith("reader") else f"{task} ({model})", []).append(table)
    return {task: sorted(held, key=lambda table: -table["samples"]) for task, held in found.items()}


def holds(options: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Tell whether options hold all that is wanted; None asks for an absent one."""
    return all(options.get(key) == value for key, value in wanted.items())


def method_with(table: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Find the method whose options hold `wanted`; None asks for an absent option."""
    for name, row in table["methods"].items():
        if row.get("options") is not None and holds(row["options"], wanted):
            return str(name)
    return None


Difference = tuple[str, float, float, int]  # task, difference, standard error, n


def pairs(results: Results, wanted: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    """List what a method scores above another on the same samples, task by task."""
    found = {}
    for task, held in tables(results).items():
        for table in held:
            names = [method_with(table, options) for options in (wanted, other)]
            for pair in table["pairs"]:
                if set(pair["methods"]) == set(names) and task not in found:
                    sign = 1 if pair["methods"][0] == names[0] else -1
                    found[task] = (task, sign * pair["mean"], pair["se"] or 0.0, pair["n"])
    return list(found.values())


def count_span(counts: Iterable[int]) -> str:
    """Write a number of samples, or the least and the most."""
    ordered = sorted(set(counts))
    return " to ".join(map(str, ordered[:: max(1, len(ordered) - 1)]))


def sort_by_sign(found: Sequence[Difference]) -> tuple[list[Difference], list[Difference], list[Difference]]:
    """Sort into those that are better, level (within two standard errors) and worse."""
    better = [one for one in found if one[1] > 2 * one[2]]
    worse = [one for one in found if one[1] < -2 * one[2]]
    return better, [one for one in found if one not in better and one not in worse], worse


def differences_in_words(found: Sequence[Difference]) -> str:
    """Write on how many tasks a method is better, level and worse."""
    better, level, worse = sort_by_sign(found)
    parts = []
    if better:
        low, high = min(one[1] for one in better), max(one[1] for one in better)
        parts.append(f"better on {len(better)} tasks, by {points(low)} to {points(high)} points")
    if level:
        parts.append(f"level (two standard errors) on {len(level)}")
    if worse:
        named = "; ".join(f"{task} {100 * mean:+.1f} ± {100 * error:.1f}" for task, mean, error, _ in worse)
        parts.append(f"worse on {len(worse)}: {named}")
    return "; ".join(parts) + f"; n = {count_span(one[3] for one in found)}"


def share_won(found: Sequence[Difference]) -> float:
    """Return the share of wins among the tasks that are not level."""
    better, _, worse = sort_by_sign(found)
    return len(better) / max(1, len(better) + len(worse))
