"""The papers' claims against what was measured: each verdict is computed from stored numbers and changes with them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals import figures
from evals.store import Results
from evals.tasks.reader import tells_nothing

QUARTER = 0.75  # the paper's sparsity: a quarter of the channels is kept
PAPER_BASIS = dict.fromkeys(("basis", "tokens", "key_bits", "query_window"))
ALIKE = 0.5  # mean squared cosine from which on two subspaces are called alike
CHEAP = 0.05
FASTER = 1.5


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


def verdicts(results: Results) -> list[Verdict]:
    """Judge all claims."""
    checks: list[Callable[[Results], Verdict]] = [
        _keeps_answers,
        _beats_think,
        _level_with_spark,
        _beats_tokens,
        _joint_beats_tokens,
        _tenth_of_tokens,
        _stages_beat_one,
        _heads_beat_layers,
        _chunks_keep,
        _an_eighth_of_bytes,
        _chunks_are_faster,
        _answers_in_part,
        _salient_bits_keep,
        _salient_bits_beat_kivi,
        _low_rank,
        _weight_helps,
        _stable_subspace,
        _window_tells,
        _cheap_fit,
        _faster,
        _end_to_end,
        _attention_alone,
    ]
    return [check(results) for check in checks]


def tables(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """List each task's tables, those of most samples first; leave out tasks that tell nothing about Keys."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for stored in results.accuracy.values():
        for task, table in stored["tasks"].items():
            if table["samples"] and not tells_nothing(task):
                model = stored["model"]["name"].rsplit("/", 1)[-1]
                found.setdefault(task if task.startswith("reader") else f"{task} ({model})", []).append(table)
    return {task: sorted(held, key=lambda table: -table["samples"]) for task, held in found.items()}


def _holds(options: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(options.get(key) == value for key, value in wanted.items())


def _method(table: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Find the method whose options hold `wanted`; None asks for an absent option."""
    for name, row in table["methods"].items():
        if row.get("options") is not None and _holds(row["options"], wanted):
            return str(name)
    return None


def _keeps_answers(results: Results) -> Verdict:
    claim = "A quarter of the Key channels (sparsity 0.75) keeps the answers"
    losses = {}
    for task, held in tables(results).items():
        for table in held:
            name = _method(table, {"sparsity": QUARTER, **PAPER_BASIS})
            if name is not None:
                losses.setdefault(task, table["methods"][name]["against_dense"])
    if not losses:
        return Verdict(claim, None)
    lost = {task: row for task, row in losses.items() if row["interval_95"][1] < 0}
    told = f"no loss beyond the 95 % interval on {len(losses) - len(lost)} of {len(losses)} tasks"
    told += f", n = {_counts([row['n'] for row in losses.values()])}"
    worst = sorted(lost.items(), key=lambda entry: entry[1]["mean"])
    named = [f"{task} {interval(row['mean'], row['interval_95'])}, n = {row['n']}" for task, row in worst]
    evidence = "; ".join([told, *(["lost on " + "; ".join(named)] if named else [])])
    return Verdict(claim, 1 - len(lost) / len(losses), evidence, _logit_errors(results, ("rotatek", "pca")))


Difference = tuple[str, float, float, int]  # task, difference, standard error, n


def pairs(results: Results, wanted: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    """List what a method scores above another on the same samples, task by task."""
    found = {}
    for task, held in tables(results).items():
        for table in held:
            names = [_method(table, options) for options in (wanted, other)]
            for pair in table["pairs"]:
                if set(pair["methods"]) == set(names) and task not in found:
                    sign = 1 if pair["methods"][0] == names[0] else -1
                    found[task] = (task, sign * pair["mean"], pair["se"] or 0.0, pair["n"])
    return list(found.values())


def _counts(counts: Iterable[int]) -> str:
    """Write a number of samples, or the least and the most."""
    ordered = sorted(set(counts))
    return " to ".join(map(str, ordered[:: max(1, len(ordered) - 1)]))


def _sorted(found: Sequence[Difference]) -> tuple[list[Difference], list[Difference], list[Difference]]:
    """Sort into those that are better, level (within two standard errors) and worse."""
    better = [one for one in found if one[1] > 2 * one[2]]
    worse = [one for one in found if one[1] < -2 * one[2]]
    return better, [one for one in found if one not in better and one not in worse], worse


def _told(found: Sequence[Difference]) -> str:
    better, level, worse = _sorted(found)
    parts = []
    if better:
        low, high = min(one[1] for one in better), max(one[1] for one in better)
        parts.append(f"better on {len(better)} tasks, by {points(low)} to {points(high)} points")
    if level:
        parts.append(f"level (two standard errors) on {len(level)}")
    if worse:
        named = "; ".join(f"{task} {100 * mean:+.1f} ± {100 * error:.1f}" for task, mean, error, _ in worse)
        parts.append(f"worse on {len(worse)}: {named}")
    return "; ".join(parts) + f"; n = {_counts(one[3] for one in found)}"


def _won(found: Sequence[Difference]) -> float:
    better, _, worse = _sorted(found)
    return len(better) / max(1, len(better) + len(worse))


def _beats_think(results: Results) -> Verdict:
    claim = "RotateK answers better than ThinK at the same rank (sparsity 0.75)"
    think = {"sparsity": QUARTER, "basis": "think", "tokens": None}
    found = pairs(results, {"sparsity": QUARTER, **PAPER_BASIS}, think)
    if not found:
        return Verdict(claim, None)
    return Verdict(claim, _won(found), _told(found), _logit_errors(results, ("rotatek", "think")))


def _level_with_spark(results: Results) -> Verdict:
    claim = "RotateK and SparK are level (sparsity 0.75)"
    spark = {"sparsity": QUARTER, "basis": "spark", "tokens": None}
    found = pairs(results, {"sparsity": QUARTER, **PAPER_BASIS}, spark)
    if not found:
        return Verdict(claim, None)
    return Verdict(claim, len(_sorted(found)[1]) / len(found), _told(found))


def _beats_tokens(results: Results) -> Verdict:
    claim = "Pruning channels loses less than pruning tokens at as many bytes or more"
    found = []
    for task, held in tables(results).items():
        compared = [one for table in held if (one := _with_best_tokens(task, table)) is not None]
        found += compared[:1]
    equals = [one for stored in results.tokens.values() for one in _as_good_at_fewer_bytes(stored["rows"])]
    if not found and not equals:
        return Verdict(claim, None)
    told = ["against the best such token method: " + _told(found)] if found else []
    told += ["as good at fewer bytes: " + ", ".join(equals)] if equals else []
    better, _, worse = _sorted(found)
    return Verdict(claim, len(better) / max(1, len(better) + len(worse) + len(equals)), "; ".join(told))


def _as_good_at_fewer_bytes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name token methods at their least bytes with which a second question loses no more than with RotateK alone."""
    (alone,) = [row for row in rows if row["tokens"] == "none" and row["channels"] == "RotateK 1/4"] or [None]
    if alone is None:
        return []
    least: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        second = row["second"]
        if row["channels"] == "tokens only" and row["bytes_share"] < alone["bytes_share"]:
            as_good = second["loss_95"][0] <= max(0.0, alone["second"]["loss_95"][1])
            if as_good and row["bytes_share"] < least.get(row["tokens"], alone)["bytes_share"]:
                least[row["tokens"]] = row
    return [
        f"{name} at {row['bytes_share']:.2f} of the bytes (channels alone: {alone['bytes_share']:.2f}), "
        f"{points(row['second']['exact_match'])} and {points(alone['second']['exact_match'])}, "
        f"n = {count_of(row['second'])}"
        for name, row in least.items()
    ]


def _with_best_tokens(task: str, table: Mapping[str, Any]) -> Difference | None:
    """Compare RotateK's score with that of the best token method whose cache is not smaller."""
    name = _method(table, {"sparsity": QUARTER, **PAPER_BASIS})
    if name is None:
        return None
    methods = table["methods"]
    rivals = [
        other
        for other, row in methods.items()
        if row.get("options") is not None
        and figures.family(row["options"]) == "tokens only"
        and row["cache_bytes"] >= methods[name]["cache_bytes"]
    ]
    if not rivals:
        return None
    best = max(rivals, key=lambda other: float(methods[other]["mean"]))
    (pair,) = [pair for pair in table["pairs"] if set(pair["methods"]) == {name, best}]
    sign = 1 if pair["methods"][0] == name else -1
    return f"{task} ({best})", sign * pair["mean"], pair["se"] or 0.0, pair["n"]


def _joint_beats_tokens(results: Results) -> Verdict:
    claim = "At the same bytes, tokens and rotated Keys together answer better than tokens alone"
    joint = [
        row for stored in results.tokens.values() for row in stored["rows"] if "loss_to_tokens_only_95" in row["second"]
    ]
    papers = [row for row in joint if row["channels"].startswith("RotateK 1/4")]
    if not papers:
        return Verdict(claim, None)
    better, worse, told = _won_pairs(papers)
    coded = [row for row in joint if row not in papers]
    if coded:
        told += "; with coefficients of a few bits: " + _won_pairs(coded)[2]
    return Verdict(claim, better / max(1, better + worse), "second question, beyond the 95 % interval: " + told)


def _won_pairs(
    rows: Sequence[Mapping[str, Any]], turn: str = "second", against: str = "loss_to_tokens_only"
) -> tuple[int, int, str]:
    """Count rows that do better and worse in a paired comparison, by a stored loss to the other; say so in words."""
    turns = [row[turn] for row in rows]
    bounds = [negated(one[f"{against}_95"]) for one in turns]
    better, worse = sum(low > 0 for low, _ in bounds), sum(high < 0 for _, high in bounds)
    counts = _counts(map(count_of, turns))
    return better, worse, f"better in {better}, worse in {worse} of {len(bounds)} pairs, n = {counts}"


def _token_rows(results: Results, tokens: Sequence[str], channels: str | None = None) -> list[Mapping[str, Any]]:
    """List the stored rows of token methods, with all channels or some."""
    rows = [row for stored in results.tokens.values() for row in stored["rows"] if row["tokens"] in tokens]
    return [row for row in rows if channels is None or row["channels"] == channels]


def _tenth_of_tokens(results: Results) -> Verdict:
    claim = "A tenth of the cache, chosen by VL-Cache, keeps the answers"
    rows = [
        row
        for row in _token_rows(results, ("VL-Cache", "VL-Cache, whole prompt"), "tokens only")
        if 0.1 in (row["budget"], row["keep"])
    ]
    if not rows:
        return Verdict(claim, None)
    named = {row["tokens"]: row for row in rows}  # two sweeps may hold it
    turns = [(f"{row['tokens']}, {turn}", row[turn]) for row in named.values() for turn in ("first", "second")]
    kept = [row["loss_95"][0] <= 0 for _, row in turns]
    told = "; ".join(
        f"{name} question {points(row['exact_match'])}, loss {interval(row['loss'], row['loss_95'])}"
        for name, row in turns
    )
    told += f"; n = {_counts(count_of(row) for _, row in turns)}"
    return Verdict(claim, sum(kept) / len(kept), told)


def _stages_beat_one(results: Results) -> Verdict:
    claim = "Tokens dropped in stages (PyramidDrop) answer better than those dropped at once (FastV) at the same bytes"
    rows = [row for row in _token_rows(results, ("PyramidDrop",)) if "loss_to_rival" in row["second"]]
    if not rows:
        return Verdict(claim, None)
    won = {turn: _won_pairs(rows, turn, "loss_to_rival") for turn in ("first", "second")}
    better, worse = (sum(found[place] for found in won.values()) for place in (0, 1))
    told = "; ".join(f"{turn} question {found[2]}" for turn, found in won.items())
    best = [max(-row[turn]["loss_to_rival"] for row in rows) for turn in won]
    return Verdict(
        claim, better / max(1, better + worse), f"{told}; by up to {points(best[0])} and {points(best[1])} points"
    )


def _heads_beat_layers(results: Results) -> Verdict:
    claim = "Budgets over heads answer better than budgets over layers at the same bytes (HybridKV, VL-Cache)"
    rows = [row for row in _token_rows(results, ("HybridKV, all heads static",)) if "loss_to_rival" in row["second"]]
    if not rows:
        return Verdict(claim, None)
    won = {turn: _won_pairs(rows, turn, "loss_to_rival") for turn in ("first", "second")}
    better, worse = (sum(found[place] for found in won.values()) for place in (0, 1))
    told = "; ".join(f"{turn} question {found[2]}" for turn, found in won.items())
    return Verdict(claim, better / max(1, better + worse), told)


def _chunk_rows(results: Results) -> list[Mapping[str, Any]]:
    """List rows of HybridKV in which heads retrieve, and read a tenth of the tokens."""
    names = ("HybridKV", "HybridKV, all heads dynamic", "HybridKV, all heads dynamic, chunks of 4")
    return [row for row in _token_rows(results, names) if row["keep"] == 0.1]


def _chunks_keep(results: Results) -> Verdict:
    claim = "A decode step that reads a tenth of the visual tokens, by chunks, keeps the answers (HybridKV)"
    rows = _chunk_rows(results)
    if not rows:
        return Verdict(claim, None)
    turns = [(f"{row['tokens']}, {row['channels']}, {turn}", row[turn]) for row in rows for turn in ("first", "second")]
    told = "; ".join(
        f"{name} question {points(row['exact_match'])}, loss {interval(row['loss'], row['loss_95'])}"
        for name, row in turns
    )
    kept = [row["loss_95"][0] <= 0 for _, row in turns]
    return Verdict(claim, sum(kept) / len(kept), f"{told}; n = {_counts(count_of(row) for _, row in turns)}")


def _an_eighth_of_bytes(results: Results) -> Verdict:
    claim = "Where a tenth is read, the cache is 7.9 times smaller (HybridKV)"
    rows = _chunk_rows(results)
    if not rows:
        return Verdict(claim, None)
    ratios = [1 / row["bytes_share"] for row in rows]
    told = f"{min(ratios):.2f}x to {max(ratios):.2f}x, with what dynamic heads store, which the paper moves to the host"
    return Verdict(claim, sum(ratio >= 7.9 for ratio in ratios) / len(ratios), told)


def _chunks_are_faster(results: Results) -> Verdict:
    claim = "A decode step that reads a tenth by chunks is 1.52 times as fast (HybridKV)"
    found = [
        (gain, row, not stored["environment"]["device"].startswith("CPU"))
        for stored in results.latency.values()
        for gain, row in gains(stored["rows"], "token_ms", "HybridKV, .1 read, all heads dynamic")
    ]
    if not found:
        return Verdict(claim, None, NO_GPU)
    best, row, on_gpu = max(found, key=lambda gain: (gain[2], gain[0]))
    told = f"{best:.2f}x at {row['context']:,} tokens, batch {row['batch']}, over the fastest dense cache"
    if not on_gpu:
        return Verdict(claim, None, f"{NO_GPU}; on a CPU {told}")
    return Verdict(claim, float(best >= 1.52), told)


def _answers_in_part(results: Results) -> Verdict:
    claim = "Attention less redundancy chooses an answer's tokens better than their age (R-KV)"
    rows = {
        name: row
        for stored in results.decoded.values()
        for name, row in stored["settings"].items()
        if name.endswith(", R-KV")
    }
    if not rows:
        return Verdict(claim, None)
    better = [row["loss_to_last_95"][1] < 0 for row in rows.values()]
    told = "; ".join(
        f"{name}: {row['loss_to_last']:+.3f} [{low:+.3f}, {high:+.3f}] nats a token to the last ones, "
        f"{row['loss']:+.3f} to dense"
        for name, row in rows.items()
        for low, high in [row["loss_to_last_95"]]
    )
    return Verdict(claim, sum(better) / len(better), f"{told}; n = {_counts(row['passages'] for row in rows.values())}")


def _salient_bits_keep(results: Results) -> Verdict:
    claim = "Codes of 2 bits, and of 8 for the tokens that attention rests on, keep the answers (AKVQ-VL)"
    rows = _token_rows(results, ("AKVQ-VL",), "Hadamard, 2 bit")
    turns = [row[turn] for row in rows for turn in ("first", "second")]
    if not turns:
        return Verdict(claim, None)
    worst = max(turns, key=lambda turn: turn["loss"])
    shares = [row["bytes_share"] for row in rows]
    told = (
        f"largest loss {interval(worst['loss'], worst['loss_95'])} of {len(turns)}, at {min(shares):.3f} to "
        f"{max(shares):.3f} of the bytes; n = {_counts(map(count_of, turns))}"
    )
    return Verdict(claim, sum(turn["loss_95"][0] <= 0 for turn in turns) / len(turns), told)


def _salient_bits_beat_kivi(results: Results) -> Verdict:
    claim = "They answer better than codes of 2 bits that are not rotated and alike for all tokens (KIVI's form)"
    rows = [row for row in _token_rows(results, ("AKVQ-VL",), "Hadamard, 2 bit") if "kl_over_rival" in row["second"]]
    if not rows:
        return Verdict(claim, None)
    won = {
        f"{turn} question, {word}": _won_pairs(rows, turn, name)
        for turn in ("first", "second")
        for name, word in (("loss_to_rival", "exact match"), ("kl_over_rival", "KL"))
    }
    told = "; ".join(f"{name} {found[2]}" for name, found in won.items())
    why = ""
    if all("kl_over_channels_only" in row["second"] for row in rows):
        alone = _won_pairs(rows, "second", "kl_over_channels_only")[2]
        kept = min(row["second"]["kl"] for row in rows)
        why = (
            "against the same rotation with 2 bits for all tokens, the second question's KL is "
            f"{alone}; the least KL is {kept:.2g}"
        )
    return Verdict(claim, sum(found[0] for found in won.values()) / (len(won) * len(rows)), told, why)


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
    return Verdict(claim, _won(found), _told(found).replace(" tasks", " tasks and sparsities"), why)


def _sparsities(table: Mapping[str, Any]) -> set[float]:
    """List the sparsities at which a table holds the paper's method."""
    options = [row.get("options") or {} for row in table["methods"].values()]
    return {held["sparsity"] for held in options if held.get("sparsity") and _holds(held, PAPER_BASIS)}


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


def _cheap_fit(results: Results) -> Verdict:
    claim = f"The prefill overhead is negligible (taken as below {100 * CHEAP:.0f} %)"
    shares = [
        (row["fit_share"], row, stored)
        for stored in results.latency.values()
        for row in stored["rows"]
        if row.get("fit_share") is not None and row["method"].startswith("RotateK") and "bit" not in row["method"]
    ]
    if not shares:
        return Verdict(claim, None)
    share, row, stored = max(shares, key=lambda entry: entry[0])
    where = f"{stored['model']}; {stored['environment']['device']}"
    told = f"at most {100 * share:.1f} % of a prefill, at {row['context']:,} tokens ({where})"
    return Verdict(claim, sum(one[0] < CHEAP for one in shares) / len(shares), told)


def on_gpus(results: Results) -> Iterable[Mapping[str, Any]]:
    """Yield the latency results that do not come from a CPU."""
    return (stored for stored in results.latency.values() if not stored["environment"]["device"].startswith("CPU"))


def gains(rows: Sequence[Mapping[str, Any]], time: str, name: str) -> list[tuple[float, Mapping[str, Any]]]:
    """Compute how often `time` of methods whose name begins so goes into that of the setting's fastest dense cache."""
    measured = [row for row in rows if time in row]
    found = []
    for row in measured:
        if row["method"].startswith(name):
            dense = [
                other[time]["median"]
                for other in measured
                if other["method"].startswith("dense")
                and (other["context"], other["batch"]) == (row["context"], row["batch"])
            ]
            if dense:
                found.append((min(dense) / row[time]["median"], row))
    return found


NO_GPU = "no result of it from a GPU is stored"


def _faster(results: Results) -> Verdict:
    claim = "A decode step is about 1.5 to 2 times as fast on a GPU from 16k tokens on"
    found = [
        gain
        for stored in on_gpus(results)
        for gain in gains(stored["rows"], "token_ms", "RotateK")
        if gain[1]["context"] >= 16384
    ]
    if not found:
        return Verdict(claim, None, NO_GPU)
    low, high = (choose(found, key=lambda gain: gain[0]) for choose in (min, max))
    told = (
        f"{low[0]:.2f}x at {low[1]['context']:,} to {high[0]:.2f}x at {high[1]['context']:,} tokens, over the fastest "
        "dense cache"
    )
    return Verdict(claim, sum(gain >= FASTER for gain, _ in found) / len(found), told)


def _vl_cache(results: Results, claim: str, time: str, stated: float) -> Verdict:
    name = "VL-Cache, .1 of the bytes"
    found = [gain for stored in on_gpus(results) for gain in gains(stored["rows"], time, name)]
    if not found:
        held = [stored["rows"] for stored in results.latency.values()]
        held += [stored["attention"] for stored in results.other.values() if "attention" in stored]
        on_cpu = [f"{gain:.2f}x at {row['context']:,} tokens" for rows in held for gain, row in gains(rows, time, name)]
        return Verdict(claim, None, NO_GPU + (f"; on a CPU {', '.join(on_cpu)}" if on_cpu else ""))
    best, row = max(found, key=lambda gain: gain[0])
    ours = [
        (gain, other["method"])
        for stored in on_gpus(results)
        for name in ("VL-Cache and", "all tokens")
        for gain, other in gains(stored["rows"], time, name)
        if (other["context"], other["batch"]) == (row["context"], row["batch"])
    ]
    told = f"{best:.2f}x at {row['context']:,} tokens, batch {row['batch']}"
    told += "".join(f"; {name}: {gain:.2f}x" for gain, name in ours)
    return Verdict(claim, float(best >= stated), f"{told}; over the fastest dense cache")


def _end_to_end(results: Results) -> Verdict:
    claim = "100 tokens come up to 2.33 times as fast at a tenth of the cache, prefill included (VL-Cache)"
    return _vl_cache(results, claim, "end_to_end_ms", 2.33)


def _attention_alone(results: Results) -> Verdict:
    claim = "Attention alone decodes up to 7.08 times as fast at a tenth of the cache (VL-Cache)"
    return _vl_cache(results, claim, "attention_ms", 7.08)
