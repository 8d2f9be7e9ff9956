"""Scores of methods that answered the same samples: means with errors, and paired differences."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evals.fidelity import bootstrap
from evals.metrics import METRICS

DENSE = "dense"  # the method that every other is compared with


def score(metric: str, table: Mapping[str, list[dict[str, Any]]], options: Mapping[str, Any]) -> dict[str, Any]:
    """Score every method of a task, with paired differences.

    Args:
        metric: name of the metric.
        table: lines of each method, sample by sample in the same order; the first method is the reference. Each turn
            gets its "score" written into it.
        options: of the methods.
    """
    failed = [{"index": line["index"], "error": line["error"]} for line in table[DENSE] if "error" in line]
    usable = {method: [line for line in lines if "error" not in line] for method, lines in table.items()}
    per_sample: dict[str, np.ndarray] = {}
    rows: dict[str, Any] = {}
    for method, lines in usable.items():
        turns = [turn for line in lines for turn in line["turns"]]
        points = METRICS[metric]([t["prediction"] for t in turns], [t["reference"] for t in turns]) if turns else []
        for turn, points_of_turn in zip(turns, points, strict=True):
            turn["score"] = points_of_turn
        per_sample[method] = np.array(
            [np.mean([turn["score"] for turn in line["turns"] if turn["scored"]]) for line in lines]
        )
        row = mean_and_error(per_sample[method]) | {"options": options.get(method)}
        scored = [turn for turn in turns if turn["scored"]]
        kinds = sorted({turn["kind"] for turn in scored} - {""})
        row["kinds"] = {kind: mean_and_error([t["score"] for t in scored if t["kind"] == kind]) for kind in kinds}
        longest = max((len(line["turns"]) for line in lines), default=0)
        row["turns"] = [
            mean_and_error([line["turns"][turn]["score"] for line in lines if len(line["turns"]) > turn])
            for turn in range(longest)
        ]
        row["cache_bytes"] = float(np.mean([line["cache_bytes"] for line in lines])) if lines else None
        rows[method] = row
    dense = rows[DENSE]["cache_bytes"]
    for method, row in rows.items():
        row["ratio"] = dense / row["cache_bytes"] if dense else None
        if method != DENSE and len(per_sample[method]):
            difference = per_sample[method] - per_sample[DENSE]
            low, high = bootstrap(difference)
            row["against_dense"] = mean_and_error(difference) | {"interval_95": [low, high]}
    pairs = [
        {"methods": [a, b]} | mean_and_error(per_sample[a] - per_sample[b])
        for a, b in itertools.combinations(options, 2)
    ]
    return {"samples": len(usable[DENSE]), "failed": failed, "methods": rows, "pairs": pairs}


def mean_and_error(scores: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Return the mean, its standard error (None below two samples) and the count."""
    values = np.asarray(scores, float)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(values.mean()) if len(values) else None, "se": error, "n": len(values)}


def print_table(result: Mapping[str, Any]) -> None:
    """Print a line for each task and method."""
    for name, task in result["tasks"].items():
        print(f"\n{name}: {task['metric']}, {task['samples']} samples, {len(task['failed'])} left out")
        for method, row in task["methods"].items():
            if row["mean"] is None:
                continue
            error = "" if row["se"] is None else f" +- {100 * row['se']:.2f}"
            line = f"  {method:44} {100 * row['mean']:6.2f}{error:9} {row['ratio']:5.2f}x"
            if "against_dense" in row:
                paired = row["against_dense"]
                low, high = (100 * bound for bound in paired["interval_95"])
                line += f"   {100 * paired['mean']:+6.2f} [{low:.2f}, {high:.2f}]"
            print(line)
