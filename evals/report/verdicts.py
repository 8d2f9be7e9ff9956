"""The papers' claims against what was measured: each verdict is computed from stored numbers and changes with them.

This file has those on Keys; `token_verdicts` and `speed_verdicts` have the others.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from evals import figures
from evals.report.compared import (
    PAPER_BASIS,
    QUARTER,
    Verdict,
    count_of,
    count_span,
    differences_in_words,
    holds,
    interval,
    method_with,
    pairs,
    points,
    share_won,
    sort_by_sign,
    tables,
)
from evals.report.speed_verdicts import attention_alone, cheap_fit, chunks_are_faster, end_to_end, faster
from evals.report.token_verdicts import (
    an_eighth_of_bytes,
    answers_in_part,
    beats_tokens,
    chunks_keep,
    heads_beat_layers,
    joint_beats_tokens,
    salient_bits_beat_kivi,
    salient_bits_keep,
    stages_beat_one,
    tenth_of_tokens,
)
from evals.store import Results

ALIKE = 0.5  # mean squared cosine from which on two subspaces are called alike


def verdicts(results: Results) -> list[Verdict]:
    """Judge all claims."""
    checks: list[Callable[[Results], Verdict]] = [
        _keeps_answers,
        _beats_think,
        _level_with_spark,
        beats_tokens,
        joint_beats_tokens,
        tenth_of_tokens,
        stages_beat_one,
        heads_beat_layers,
        chunks_keep,
        an_eighth_of_bytes,
        chunks_are_faster,
        answers_in_part,
        salient_bits_keep,
        salient_bits_beat_kivi,
        _low_rank,
        _weight_helps,
        _stable_subspace,
        _window_tells,
        cheap_fit,
        faster,
        end_to_end,
        attention_alone,
    ]
    return [check(results) for check in checks]


def _keeps_answers(results: Results) -> Verdict:
    claim = "A quarter of the Key channels (sparsity 0.75) keeps the answers"
    losses = {}
    for task, held in tables(results).items():
        for table in held:
            name = method_with(table, {"sparsity": QUARTER, **PAPER_BASIS})
            if name is not None:
                losses.setdefault(task, table["methods"][name]["against_dense"])
    if not losses:
        return Verdict(claim, None)
    lost = {task: row for task, row in losses.items() if row["interval_95"][1] < 0}
    told = f"no loss beyond the 95 % interval on {len(losses) - len(lost)} of {len(losses)} tasks"
    told += f", n = {count_span([row['n'] for row in losses.values()])}"
    worst = sorted(lost.items(), key=lambda entry: entry[1]["mean"])
    named = [f"{task} {interval(row['mean'], row['interval_95'])}, n = {row['n']}" for task, row in worst]
    evidence = "; ".join([told, *(["lost on " + "; ".join(named)] if named else [])])
    return Verdict(claim, 1 - len(lost) / len(losses), evidence, _logit_errors(results, ("rotatek", "pca")))


def _beats_think(results: Results) -> Verdict:
    claim = "RotateK answers better than ThinK at the same rank (sparsity 0.75)"
    think = {"sparsity": QUARTER, "basis": "think", "tokens": None}
    found = pairs(results, {"sparsity": QUARTER, **PAPER_BASIS}, think)
    if not found:
        return Verdict(claim, None)
    return Verdict(claim, share_won(found), differences_in_words(found), _logit_errors(results, ("rotatek", "think")))


def _level_with_spark(results: Results) -> Verdict:
    claim = "RotateK and SparK are level (sparsity 0.75)"
    spark = {"sparsity": QUARTER, "basis": "spark", "tokens": None}
    found = pairs(results, {"sparsity": QUARTER, **PAPER_BASIS}, spark)
    if not found:
        return Verdict(claim, None)
    return Verdict(claim, len(sort_by_sign(found)[1]) / len(found), differences_in_words(found))


def _error(layers: Sequence[Mapping[str, Any]], basis: str, rank: int) -> float | None:
    errors = [layer["errors"].get(basis, {}).get(str(rank)) for layer in layers]
    if not errors or None in errors:
        return None
    return float(np.sqrt(np.mean([error["logits"] ** 2 for error in errors])))


def _logit_errors(results: Results, bases: Sequence[str]) -> str:
    """Write the relative error of the answers' logits under some bases at a quarter of the width, by task."""
    told = []
    for stored in results.diagnostics.values():
        layers, rank = stored["geometry"]["layers"], stored["head_width"] // 4
        errors = {figures.NAMES.get(basis, basis): _error(layers, basis, rank) for basis in bases}
        if None not in errors.values():
            listed = ", ".join(f"{name} {error:.2f}" for name, error in errors.items())
            told.append(f"{stored['setting']['task']}: {listed}")
    return f"relative error of the answers' logits at rank 1/4: {'; '.join(told)}" if told else ""


def _low_rank(results: Results) -> Verdict:
    claim = "The visual Keys of a head lie close to a subspace of a quarter of its width (99 % of their variance)"
    for stored in results.diagnostics.values():
        width, layers = stored["head_width"], stored["geometry"]["layers"]
        kept = [head[width // 4 - 1] for layer in layers for head in layer["explained_variance"]]
        energy = [head[width // 4 - 1] for layer in layers for head in layer["logit_energy"]]
        needed = [rank for layer in layers for rank in layer["rank_for"]["0.99"]["variance"]]
        told = (
            f"rank {width // 4} of {width} keeps {points(min(kept))} to {points(max(kept))} % of the variance; 99 % of "
            f"it needs rank {min(needed):.0f} to {max(needed):.0f}; {stored['geometry']['samples']} images"
        )
        why = f"of the logit energy it keeps {points(min(energy))} to {points(max(energy))} %"
        return Verdict(claim, sum(share >= 0.99 for share in kept) / len(kept), told, why)
    return Verdict(claim, None)


def _ablation(results: Results, part: str) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """List (rank, the paper's row, the row without `part`) of the stored ablations."""
    return [
        (rank, table[f"{rank}, the paper"], table[f"{rank}, {part}"])
        for stored in results.diagnostics.values()
        if (table := stored.get("ablations"))
        for rank in dict.fromkeys(name.split(",")[0] for name in table if name != "dense")
        if f"{rank}, {part}" in table
    ]


def _weight_helps(results: Results) -> Verdict:
    claim = "The query weight helps (RotateK over PCA at the same rank)"
    found = []
    for sparsity in sorted({s for held in tables(results).values() for table in held for s in _sparsities(table)}):
        weighted = {"sparsity": sparsity, **PAPER_BASIS}
        plain = {"sparsity": sparsity, "basis": "pca", "tokens": None, "key_bits": None}
        found += [(f"{task} at {sparsity:g}", *rest) for task, *rest in pairs(results, weighted, plain)]
    why = "; ".join(
        f"KL {rank} {paper['second']['kl']:.2g} with it, {without['second']['kl']:.2g} without, "
        f"n = {count_of(paper['second'])}"
        for rank, paper, without in _ablation(results, "no query weight")
    )
    shared = _shared(results, "window and answer queries")
    if shared is not None:
        why += f"; the window it comes from shares {_range(shared[0])} with the queries of the answers"
    if not found:
        return Verdict(claim, None)
    return Verdict(claim, share_won(found), differences_in_words(found).replace(" tasks", " tasks and sparsities"), why)


def _sparsities(table: Mapping[str, Any]) -> set[float]:
    """List the sparsities at which a table holds the paper's method."""
    options = [row.get("options") or {} for row in table["methods"].values()]
    return {held["sparsity"] for held in options if held.get("sparsity") and holds(held, PAPER_BASIS)}


def _shared(results: Results, pair: str) -> tuple[list[float], float, int] | None:
    """Sum up all stored diagnostics: what 8 dimensions share by layer, what they would by chance, and conversations."""
    shares, chance, count = [], 0.0, 0
    for stored in results.diagnostics.values():
        shares += [float(np.mean(layer["angles"][pair]["8"]["shared"])) for layer in stored["geometry"]["layers"]]
        chance, count = 8 / stored["head_width"], count + stored["geometry"]["samples"]
    return (shares, chance, count) if shares else None


def _range(values: Iterable[float]) -> str:
    values = list(values)
    return f"{min(values):.2f} to {max(values):.2f}"


def _alike(results: Results, claim: str, pair: str) -> Verdict:
    found = _shared(results, pair)
    if found is None:
        return Verdict(claim, None)
    shares, chance, count = found
    told = (
        f"8 dimensions share {_range(shares)} by layer and question (1: the same, {chance:.2f}: by chance); "
        f"{count} conversations"
    )
    return Verdict(claim, sum(share >= ALIKE for share in shares) / len(shares), told)


def _stable_subspace(results: Results) -> Verdict:
    return _alike(results, "The subspace of the visual Keys is much the same from image to image", "images")


def _window_tells(results: Results) -> Verdict:
    return _alike(results, "The prompt's last queries span what the answers will ask", "window and answer queries")
