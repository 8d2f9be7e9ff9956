"""Claims on keeping some of the tokens, against what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from evals import figures
from evals.report.compared import (
    PAPER_BASIS,
    QUARTER,
    Difference,
    Verdict,
    count_of,
    count_span,
    differences_in_words,
    interval,
    method_with,
    negated,
    points,
    sort_by_sign,
    tables,
)
from evals.store import Results


def beats_tokens(results: Results) -> Verdict:
    claim = "Pruning channels loses less than pruning tokens at as many bytes or more"
    found = []
    for task, held in tables(results).items():
        compared = [one for table in held if (one := _with_best_tokens(task, table)) is not None]
        found += compared[:1]
    equals = [one for stored in results.tokens.values() for one in _as_good_at_fewer_bytes(stored["rows"])]
    if not found and not equals:
        return Verdict(claim, None)
    told = ["against the best such token method: " + differences_in_words(found)] if found else []
    told += ["as good at fewer bytes: " + ", ".join(equals)] if equals else []
    better, _, worse = sort_by_sign(found)
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
    name = method_with(table, {"sparsity": QUARTER, **PAPER_BASIS})
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


def joint_beats_tokens(results: Results) -> Verdict:
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
    counts = count_span(map(count_of, turns))
    return better, worse, f"better in {better}, worse in {worse} of {len(bounds)} pairs, n = {counts}"


def _token_rows(results: Results, tokens: Sequence[str], channels: str | None = None) -> list[Mapping[str, Any]]:
    """List the stored rows of token methods, with all channels or some."""
    rows = [row for stored in results.tokens.values() for row in stored["rows"] if row["tokens"] in tokens]
    return [row for row in rows if channels is None or row["channels"] == channels]


def tenth_of_tokens(results: Results) -> Verdict:
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
    told += f"; n = {count_span(count_of(row) for _, row in turns)}"
    return Verdict(claim, sum(kept) / len(kept), told)


def stages_beat_one(results: Results) -> Verdict:
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


def heads_beat_layers(results: Results) -> Verdict:
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


def chunks_keep(results: Results) -> Verdict:
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
    return Verdict(claim, sum(kept) / len(kept), f"{told}; n = {count_span(count_of(row) for _, row in turns)}")


def an_eighth_of_bytes(results: Results) -> Verdict:
    claim = "Where a tenth is read, the cache is 7.9 times smaller (HybridKV)"
    rows = _chunk_rows(results)
    if not rows:
        return Verdict(claim, None)
    ratios = [1 / row["bytes_share"] for row in rows]
    told = f"{min(ratios):.2f}x to {max(ratios):.2f}x, with what dynamic heads store, which the paper moves to the host"
    return Verdict(claim, sum(ratio >= 7.9 for ratio in ratios) / len(ratios), told)


def answers_in_part(results: Results) -> Verdict:
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
    return Verdict(
        claim, sum(better) / len(better), f"{told}; n = {count_span(row['passages'] for row in rows.values())}"
    )


def salient_bits_keep(results: Results) -> Verdict:
    claim = "Codes of 2 bits, and of 8 for the tokens that attention rests on, keep the answers (AKVQ-VL)"
    rows = _token_rows(results, ("AKVQ-VL",), "Hadamard, 2 bit")
    turns = [row[turn] for row in rows for turn in ("first", "second")]
    if not turns:
        return Verdict(claim, None)
    worst = max(turns, key=lambda turn: turn["loss"])
    shares = [row["bytes_share"] for row in rows]
    told = (
        f"largest loss {interval(worst['loss'], worst['loss_95'])} of {len(turns)}, at {min(shares):.3f} to "
        f"{max(shares):.3f} of the bytes; n = {count_span(map(count_of, turns))}"
    )
    return Verdict(claim, sum(turn["loss_95"][0] <= 0 for turn in turns) / len(turns), told)


def salient_bits_beat_kivi(results: Results) -> Verdict:
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
