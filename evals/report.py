"""One page out of the stored results: tables beside the papers' numbers, figures, and what holds and what does not.

    python -m evals.report --results evals/results --out report

writes `report.html`, which needs no other file, and `report.md` with its pictures in `figures/`. Result files are known
by what they hold (those of accuracy, diagnostics, latency and fidelity); any other JSON is shown as it is. Verdicts
are computed from the numbers on the page, so that they change with them.
"""

import argparse
import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from evals import figures

PAPERS = Path(__file__).parent / "papers.yaml"
PAGE = Path(__file__).parent / "report.html.jinja"
READER_NOTE = (
    "The reader is one small model that reads one kind of page. What holds on it is a hint at what other models do, "
    "no proof."
)


class ReportError(Exception):
    """A result cannot be read; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a head."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG picture."""

    name: str
    caption: str
    png: bytes = field(repr=False)


Block = str | Table | Picture


@dataclass
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """A claim, whether it holds on what was measured (None: not measured), and the numbers that say so."""

    claim: str
    holds: bool | None
    evidence: str

    def words(self) -> str:
        """As a table says it."""
        return {True: "holds", False: "does not hold", None: "not measured"}[self.holds]


@dataclass
class Results:
    """Stored results by kind, each by the name of its file."""

    accuracy: dict[str, dict[str, Any]] = field(default_factory=dict)
    diagnostics: dict[str, dict[str, Any]] = field(default_factory=dict)
    latency: dict[str, dict[str, Any]] = field(default_factory=dict)
    fidelity: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)
    other: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)

    def kind_of(self, stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Where a result belongs."""
        if "tasks" in stored and "settings" in stored:
            return self.accuracy
        if "geometry" in stored:
            return self.diagnostics
        if "rows" in stored and "largest" in stored:
            return self.latency
        if stored.get("rows") and all("tokens" in row and "channels" in row for row in stored["rows"]):
            return self.tokens
        methods = stored.get("methods")
        if isinstance(methods, Mapping) and all("second" in row and "kv_ratio" in row for row in methods.values()):
            return self.fidelity
        return self.other


def read(folders: Iterable[Path]) -> Results:
    """All results in the folders."""
    results = Results()
    for folder in folders:
        if not folder.is_dir():
            raise ReportError(f"--results: there is no folder '{folder}'")
        for path in sorted(folder.rglob("*.json")):
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ReportError(f"'{path}' is no JSON: {error}") from error
            if isinstance(stored, dict):
                # The scores of a run lie in a folder that has its name.
                name = path.parent.name if path.name == "scores.json" else path.stem
                if path.name != "run.json":
                    results.kind_of(stored)[name] = stored
        results.pictures |= {path.stem: path for path in sorted(folder.rglob("*.png"))}
    return results


def points(share: float | None) -> str:
    """A share in points of a hundred."""
    return "" if share is None else f"{100 * share:.1f}"


def with_error(row: Mapping[str, Any]) -> str:
    """Mean and standard error in points."""
    return points(row["mean"]) + ("" if row.get("se") is None else f" ± {100 * row['se']:.1f}")


def interval(mean: float, bounds: Sequence[float]) -> str:
    """A signed difference with its interval, in points."""
    middle, low, high = (round(100 * value, 1) + 0.0 for value in (mean, *bounds))  # no negative zero
    return f"{middle:+.1f} [{low:.1f}, {high:.1f}]"


def accuracy_sections(results: Results) -> Iterable[Section]:
    """Tables of the accuracy script, with the trade-off and robustness pictures."""
    for name, stored in results.accuracy.items():
        section = Section(f"Accuracy: {name}")
        section.blocks.append(
            f"Model {stored['model']['name'].rsplit('/', 1)[-1]}, {stored['model']['dtype']}. Scores are means with "
            "their standard errors, in points; differences are paired with the dense cache on the same samples, with "
            "the 95 % interval of the bootstrap. Bytes are those of the whole cache, text and bases included. The "
            "first token of a first answer comes from the prefill, which attends to dense Keys, so that answers of "
            "one word (cell, count) say nothing about channels compressed after it; second questions do."
        )
        for task, found in stored["tasks"].items():
            rows = [
                [
                    method,
                    with_error(row),
                    f"{row['ratio']:.2f}x" if row["ratio"] else "",
                    interval(row["against_dense"]["mean"], row["against_dense"]["interval_95"])
                    if "against_dense" in row
                    else "",
                ]
                for method, row in found["methods"].items()
            ]
            left_out = f", {len(found['failed'])} left out" if found["failed"] else ""
            caption = f"{task}: {found['metric']}, n = {found['samples']}{left_out}"
            section.blocks.append(Table(caption, ["method", "score", "cache", "against dense"], rows))
        drawn = figures.trade_off(stored)
        section.blocks.append(
            Picture(
                f"{name}_trade_off", "Score against the bytes of the cache: channels, tokens, both.", figures.png(drawn)
            )
        )
        robust = figures.robustness(stored)
        if robust is not None:
            section.blocks.append(
                Picture(f"{name}_robustness", "Score against the share of channels removed.", figures.png(robust))
            )
        yield section


def paper_section(papers: Mapping[str, Any]) -> Section:
    """What the papers state."""
    stated = papers["accuracy"]
    rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in stated["rows"].items()]
    return Section(
        "What the papers state",
        [
            Table(stated["source"], ["method", *stated["columns"]], rows),
            Table("Speed, as stated", ["paper", "setting", "gain"], papers["speed"]),
        ],
    )


def fidelity_sections(results: Results) -> Iterable[Section]:
    """Tables of the fidelity script."""
    for name, stored in results.fidelity.items():
        count = _count(next(iter(stored["methods"].values()))["second"])
        rows = [
            [
                method,
                f"{row['key_ratio']:.1f}x",
                f"{row['value_ratio']:.1f}x",
                f"{row['kv_ratio']:.1f}x",
                points(row["second"]["exact_match"]),
                "" if method == "dense" else interval(-row["second"]["loss"], _negated(row["second"]["loss_95"])),
                f"{row['second']['kl']:.2g}",
            ]
            for method, row in stored["methods"].items()
        ]
        head = ["method", "Keys", "Values", "both", "second question", "against dense", "KL"]
        caption = f"Exact match of the second question after compression, n = {count}; bytes of the visual part"
        section = Section(f"Fidelity: {name}", [Table(caption, head, rows)])
        if name in results.pictures:
            section.blocks.append(Picture(name, "Exact match against bytes.", results.pictures[name].read_bytes()))
        yield section


def _negated(bounds: Sequence[float]) -> list[float]:
    return [-bounds[1], -bounds[0]]


def _count(turn: Mapping[str, Any]) -> int:
    return int(turn.get("images", turn.get("pages", 0)))


def tokens_sections(results: Results) -> Iterable[Section]:
    """Tables of token pruning at matched bytes."""
    for name, stored in results.tokens.items():
        rows = []
        for row in stored["rows"]:
            second, kept = row["second"], row["keep"]
            gain = ""
            if "loss_to_tokens_only" in second:
                gain = interval(-second["loss_to_tokens_only"], _negated(second["loss_to_tokens_only_95"]))
            rows.append(
                [
                    row["tokens"],
                    row["channels"],
                    "all" if kept is None else f"{100 * kept:.0f} %",
                    f"{row['bytes_share']:.3f}",
                    points(row["first"]["exact_match"]),
                    points(second["exact_match"]),
                    gain,
                ]
            )
        head = ["tokens", "channels", "kept", "bytes", "first question", "second question", "over tokens only"]
        count = _count(stored["rows"][0]["second"]) if stored["rows"] else 0
        caption = f"Exact match at matched bytes of the visual Keys and Values (dense: 1), n = {count}"
        section = Section(f"Tokens and channels: {name}", [Table(caption, head, rows)])
        if name in results.pictures:
            section.blocks.append(Picture(name, "Exact match against bytes.", results.pictures[name].read_bytes()))
        yield section


def diagnostics_sections(results: Results) -> Iterable[Section]:
    """Why it works: numbers and pictures."""
    for name, stored in results.diagnostics.items():
        geometry = stored["geometry"]
        section = Section(f"Why it works: {name}")
        section.blocks.append(
            f"Geometry over {geometry['samples']} conversations of '{stored['setting']['task']}', "
            f"{stored['visual_tokens']} visual tokens, head width {stored['head_width']}; logit energy over the "
            f"{geometry['answer_queries']} queries of a KV head that answer."
        )
        rows = []
        for index, layer in enumerate(geometry["layers"]):
            angles = layer["angles"]
            needed = layer["rank_for"]["0.99"]
            rows.append(
                [
                    str(index),
                    f"{np.mean(needed['variance']):.0f}",
                    f"{np.mean(needed['logit_energy']):.0f}",
                    *(f"{np.mean(angles[pair]['8']['shared']):.2f}" for pair in angles),
                ]
            )
        pairs = list(geometry["layers"][0]["angles"])
        head = ["layer", "rank for 99 % variance", "for 99 % logit energy", *(f"shared: {pair}" for pair in pairs)]
        chance = 8 / stored["head_width"]
        caption = f"Ranks, and how much 8-dimensional subspaces share (1: the same, {chance:.2f}: by chance)"
        section.blocks.append(Table(caption, head, rows))
        if f"{name}_heat" in results.pictures:
            heat = "Absolute Keys of one head of each layer, before and after the rotation."
            section.blocks.append(Picture(f"{name}_heat", heat, results.pictures[f"{name}_heat"].read_bytes()))
        captions = {
            "variance": "Cumulative share by rank; a curve a head. Dotted: 99 %.",
            "angles": "Principal angles between subspaces, as the mean squared cosine.",
            "errors": "Relative error of each basis against its rank, over all layers.",
            "ablations": "The paper's method less one part each: second question, and KL.",
        }
        for picture, drawn in figures.diagnostics(stored).items():
            section.blocks.append(Picture(f"{name}_{picture}", captions[picture], figures.png(drawn)))
        if "ablations" in stored:
            table = stored["ablations"]
            rows = [
                [
                    method,
                    points(row["second"]["exact_match"]),
                    interval(-row["second"]["loss"], _negated(row["second"]["loss_95"])) if method != "dense" else "",
                    f"{row['second']['kl']:.2g}",
                ]
                for method, row in table.items()
            ]
            count = _count(table["dense"]["second"])
            section.blocks.append(
                Table(f"Ablations, n = {count}", ["method", "second question", "against dense", "KL"], rows)
            )
        yield section


def latency_sections(results: Results) -> Iterable[Section]:
    """Times and bytes of whole models."""
    for name, stored in results.latency.items():
        measured = [row for row in stored["rows"] if "skipped" not in row]
        first: dict[tuple[int, int], float] = {}
        rows = []
        for row in measured:
            step = row["token_ms"]
            reference = first.setdefault((row["context"], row["batch"]), step["median"])
            share = "" if row["fit_share"] is None else f"{100 * row['fit_share']:.1f} %"
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB"
            rows.append(
                [
                    f"{row['context']:,} x {row['batch']}",
                    row["method"],
                    f"{row['prefill_ms']['median']:.0f} ms",
                    share,
                    f"{step['median']:.2f} ms ({step['least']:.2f} to {step['most']:.2f})",
                    f"{reference / step['median']:.2f}x",
                    f"{row['cache_bytes'] / 2**20:.1f} MiB",
                    peak,
                ]
            )
        head = ["tokens x batch", "method", "prefill", "of it fit", "a token", "speed", "cache", "peak memory"]
        section = Section(f"Latency and memory: {name}")
        section.blocks.append(
            Table(f"{stored['model']}, {stored['dtype']}, {stored['environment']['device']}", head, rows)
        )
        if measured:
            drawn = figures.latency(measured)
            section.blocks.append(
                Picture(f"{name}_latency", "Decode step and cache bytes by prompt length.", figures.png(drawn))
            )
        if stored["largest"]:
            found = [[row["method"], str(row.get("largest_batch", row.get("skipped")))] for row in stored["largest"]]
            caption = f"Largest batch at {stored['largest'][0]['context']:,} tokens"
            section.blocks.append(Table(caption, ["method", "batch"], found))
        skipped = {row["method"]: row["skipped"] for row in stored["rows"] if "skipped" in row}
        section.blocks += [f"Not run: {method}. {reason}" for method, reason in skipped.items()]
        yield section


def other_sections(results: Results) -> Iterable[Section]:
    """Results of other scripts, as they are."""
    for name, stored in results.other.items():
        rows = [[path, value] for path, value in _flat(stored) if not path.startswith(("environment", "versions"))]
        shown = rows[:120]
        note = [f"{len(rows) - len(shown)} more numbers are in the file."] if len(rows) > len(shown) else []
        yield Section(f"Other results: {name}", [Table(f"{name}.json", ["", ""], shown), *note])


def _flat(value: Any, path: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _flat(part, f"{path} / {name}" if path else str(name))
    elif isinstance(value, list) and any(isinstance(part, Mapping | list) for part in value):
        for index, part in enumerate(value):
            yield from _flat(part, f"{path} [{index}]")
    else:
        yield path, f"{value:.5g}" if isinstance(value, float) else str(value)


def provenance(results: Results) -> Section:
    """Commands, hardware, versions and dates."""
    rows = []
    kinds = (results.accuracy, results.diagnostics, results.latency, results.fidelity, results.tokens, results.other)
    for name, stored in ((name, stored) for kind in kinds for name, stored in kind.items()):
        environment = stored.get("environment", {})
        hardware = environment.get("device", stored.get("hardware", ""))
        if "load_average" in environment:
            hardware += f", load average {environment['load_average']:g}"
        versions = environment.get("versions", stored.get("versions", {}))
        packages = ", ".join(f"{package} {version}" for package, version in versions.items())
        date = environment.get("date", stored.get("date", ""))
        rows.append([name, str(stored.get("command", "")), str(hardware), packages, str(date)])
    return Section(
        "Where the numbers come from", [Table("", ["result", "command", "hardware", "versions", "date"], rows)]
    )


def verdicts(results: Results) -> list[Verdict]:
    """The papers' claims against what was measured."""
    checks: list[Callable[[Results], Verdict]] = [
        _keeps_answers,
        _beats_think,
        _level_with_spark,
        _beats_tokens,
        _joint_beats_tokens,
        _low_rank,
        _weight_helps,
        _stable_subspace,
        _window_tells,
        _cheap_fit,
        _faster,
    ]
    return [check(results) for check in checks]


def _rows(results: Results, **wanted: Any) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(task, method, row) of the accuracy results whose options hold `wanted`; None asks for an absent option."""
    return [
        (task, method, row)
        for stored in results.accuracy.values()
        for task, found in stored["tasks"].items()
        for method, row in found["methods"].items()
        if row.get("options") is not None and all(row["options"].get(key) == value for key, value in wanted.items())
    ]


PAPER_BASIS = {"basis": None, "tokens": None, "key_bits": None}


def _keeps_answers(results: Results) -> Verdict:
    claim = "A quarter of the Key channels (sparsity 0.75) keeps the answers"
    rows = _rows(results, sparsity=0.75, **PAPER_BASIS)
    if not rows:
        return Verdict(claim, None, "")
    worst = min(rows, key=lambda row: row[2]["against_dense"]["mean"])
    paired = worst[2]["against_dense"]
    holds = all(row["against_dense"]["interval_95"][1] >= 0 for _, _, row in rows)
    said = f"largest loss of {len(rows)} tasks on {worst[0]}: {interval(paired['mean'], paired['interval_95'])} points"
    return Verdict(claim, holds, f"{said}, n = {paired['n']}")


def _pair(results: Results, wanted: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, float, float, int]]:
    """(task, difference, standard error, n) between two methods on the same samples."""
    found = []
    for stored in results.accuracy.values():
        for task, table in stored["tasks"].items():
            names = [
                next(
                    (
                        name
                        for name, row in table["methods"].items()
                        if row.get("options") is not None and all(row["options"].get(k) == v for k, v in want.items())
                    ),
                    None,
                )
                for want in (wanted, other)
            ]
            for pair in table["pairs"]:
                if set(pair["methods"]) == set(names):
                    sign = 1 if pair["methods"][0] == names[0] else -1
                    found.append((task, sign * pair["mean"], pair["se"] or 0.0, pair["n"]))
    return found


def _comparison(found: Sequence[tuple[str, float, float, int]]) -> str:
    return "; ".join(f"{task} {100 * mean:+.1f} ± {100 * error:.1f}" for task, mean, error, _ in found)


def _beats_think(results: Results) -> Verdict:
    claim = "RotateK answers better than ThinK at the same rank (sparsity 0.75)"
    found = _pair(results, {"sparsity": 0.75, **PAPER_BASIS}, {"sparsity": 0.75, "basis": "think", "tokens": None})
    if not found:
        return Verdict(claim, None, "")
    holds = all(mean > -2 * error for _, mean, error, _ in found) and any(m > 2 * e > 0 for _, m, e, _ in found)
    return Verdict(claim, holds, f"RotateK less ThinK, points: {_comparison(found)}")


def _level_with_spark(results: Results) -> Verdict:
    claim = "RotateK and SparK are level (sparsity 0.75)"
    found = _pair(results, {"sparsity": 0.75, **PAPER_BASIS}, {"sparsity": 0.75, "basis": "spark", "tokens": None})
    if not found:
        return Verdict(claim, None, "")
    holds = all(abs(mean) <= 2 * error or mean == 0 for _, mean, error, _ in found)
    return Verdict(claim, holds, f"RotateK less SparK, points: {_comparison(found)}")


def _beats_tokens(results: Results) -> Verdict:
    claim = "Pruning channels loses less than pruning tokens at as many bytes or more"
    wins, said = [], []
    for stored in results.accuracy.values():
        for task, table in stored["tasks"].items():
            rows = [row for row in table["methods"].values() if row.get("options") is not None]
            ours = [row for row in rows if row["options"].get("sparsity") == 0.75 and _family(row) == "channels only"]
            ours = [row for row in ours if "basis" not in row["options"]]
            pruned = [row for row in rows if _family(row) == "tokens only"]
            for row in ours:
                rivals = [other for other in pruned if other["cache_bytes"] >= row["cache_bytes"]]
                if rivals:
                    best = max(rivals, key=lambda other: other["mean"])
                    wins.append(row["mean"] > best["mean"])
                    said.append(
                        f"{task}: {points(row['mean'])} at {row['ratio']:.2f}x against {points(best['mean'])} at "
                        f"{best['ratio']:.2f}x"
                    )
    return Verdict(claim, all(wins) if wins else None, "; ".join(said))


def _joint_beats_tokens(results: Results) -> Verdict:
    claim = "At the same bytes, tokens and rotated Keys together answer better than tokens alone"
    bounds = [
        _negated(row["second"]["loss_to_tokens_only_95"])
        for stored in results.tokens.values()
        for row in stored["rows"]
        if row["channels"].startswith("RotateK 1/4") and "loss_to_tokens_only_95" in row["second"]
    ]
    if not bounds:
        return Verdict(claim, None, "")
    better, worse = sum(low > 0 for low, _ in bounds), sum(high < 0 for _, high in bounds)
    said = f"second question, beyond the 95 % interval: better in {better}, worse in {worse} of {len(bounds)} pairs"
    return Verdict(claim, better > 0 and worse == 0, said)


def _family(row: Mapping[str, Any]) -> str:
    return figures.family(row["options"])


def _low_rank(results: Results) -> Verdict:
    claim = "The visual Keys of a head lie close to a subspace of a quarter of its width"
    for stored in results.diagnostics.values():
        width = stored["head_width"]
        kept = [head[width // 4 - 1] for layer in stored["geometry"]["layers"] for head in layer["explained_variance"]]
        energy = [head[width // 4 - 1] for layer in stored["geometry"]["layers"] for head in layer["logit_energy"]]
        needed = [r for layer in stored["geometry"]["layers"] for r in layer["rank_for"]["0.99"]["variance"]]
        said = (
            f"rank {width // 4} of {width} keeps {points(min(kept))} to {points(max(kept))} % of the variance and "
            f"{points(min(energy))} to {points(max(energy))} % of the logit energy; 99 % of the variance needs rank "
            f"{min(needed):.0f} to {max(needed):.0f}"
        )
        return Verdict(claim, min(kept) >= 0.99, said)
    return Verdict(claim, None, "")


def _ablation(results: Results, part: str) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """(rank, the paper's row, the row without `part`) of the stored ablations."""
    return [
        (rank, table[f"{rank}, the paper"], table[f"{rank}, {part}"])
        for stored in results.diagnostics.values()
        if (table := stored.get("ablations"))
        for rank in dict.fromkeys(name.split(",")[0] for name in table if name != "dense")
        if f"{rank}, {part}" in table
    ]


def _weight_helps(results: Results) -> Verdict:
    claim = "The query weight helps"
    found = _ablation(results, "no query weight")
    if not found:
        return Verdict(claim, None, "")
    said = "; ".join(
        f"{rank}: {points(paper['second']['exact_match'])} with it (KL {paper['second']['kl']:.2g}), "
        f"{points(without['second']['exact_match'])} without (KL {without['second']['kl']:.2g})"
        for rank, paper, without in found
    )
    holds = all(paper["second"]["kl"] < without["second"]["kl"] for _, paper, without in found)
    return Verdict(claim, holds, f"second question, {said}")


def _shared(results: Results, pair: str) -> tuple[list[float], float] | None:
    for stored in results.diagnostics.values():
        layers = stored["geometry"]["layers"]
        return [float(np.mean(layer["angles"][pair]["8"]["shared"])) for layer in layers], 8 / stored["head_width"]
    return None


def _stable_subspace(results: Results) -> Verdict:
    claim = "The subspace of the visual Keys is much the same from image to image"
    found = _shared(results, "images")
    if found is None:
        return Verdict(claim, None, "")
    shares, chance = found
    said = (
        f"8 dimensions share {min(shares):.2f} to {max(shares):.2f} between images, by layer (by chance {chance:.2f})"
    )
    return Verdict(claim, min(shares) >= 0.5, said)


def _window_tells(results: Results) -> Verdict:
    claim = "The prompt's last queries span what the answers will ask"
    found = _shared(results, "window and answer queries")
    if found is None:
        return Verdict(claim, None, "")
    shares, chance = found
    said = f"8 dimensions share {min(shares):.2f} to {max(shares):.2f} by layer (by chance {chance:.2f})"
    return Verdict(claim, min(shares) >= 0.5, said)


def _cheap_fit(results: Results) -> Verdict:
    claim = "The prefill overhead is negligible (below 5 % here)"
    shares = [
        (row["fit_share"], row, name)
        for name, stored in results.latency.items()
        for row in stored["rows"]
        if row.get("fit_share") is not None and row["method"].startswith("RotateK") and "bit" not in row["method"]
    ]
    if not shares:
        return Verdict(claim, None, "")
    share, row, name = max(shares, key=lambda entry: entry[0])
    said = f"at most {100 * share:.1f} % of a prefill, at {row['context']:,} tokens ({name})"
    return Verdict(claim, share < 0.05, said)


def _faster(results: Results) -> Verdict:
    claim = "A decode step is about 1.5 to 2 times as fast on a GPU from 16k tokens on"
    gains = []
    for stored in results.latency.values():
        if stored["environment"]["device"].startswith("CPU"):
            continue
        for row in stored["rows"]:
            if "skipped" not in row and row["method"].startswith("RotateK") and row["context"] >= 16384:
                dense = [
                    other["token_ms"]["median"]
                    for other in stored["rows"]
                    if "skipped" not in other
                    and other["method"].startswith("dense")
                    and (other["context"], other["batch"]) == (row["context"], row["batch"])
                ]
                if dense:
                    gains.append((min(dense) / row["token_ms"]["median"], row["context"]))
    if not gains:
        return Verdict(claim, None, "no result from a GPU is stored")
    low, high = min(gains), max(gains)
    said = f"{low[0]:.2f}x at {low[1]:,} to {high[0]:.2f}x at {high[1]:,} tokens, over the fastest dense cache"
    return Verdict(claim, low[0] >= 1.5, said)


def compose(results: Results, papers: Mapping[str, Any]) -> list[Section]:
    """The page, section by section."""
    found = verdicts(results)
    rows = [[verdict.claim, verdict.words(), verdict.evidence] for verdict in found]
    opening = Section("What holds, and what does not", [READER_NOTE, Table("", ["claim", "here", "numbers"], rows)])
    return [
        opening,
        *accuracy_sections(results),
        paper_section(papers),
        *fidelity_sections(results),
        *tokens_sections(results),
        *diagnostics_sections(results),
        *latency_sections(results),
        *other_sections(results),
        provenance(results),
    ]


def to_html(sections: Sequence[Section]) -> str:
    """One page with everything inside."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(PAGE.read_text(encoding="utf-8"))

    def kind(block: Block) -> str:
        return type(block).__name__

    def inline(picture: Picture) -> str:
        return base64.b64encode(picture.png).decode()

    return template.render(sections=sections, kind=kind, inline=inline)


def to_markdown(sections: Sequence[Section], folder: Path) -> str:
    """The same as Markdown, with pictures as files in `folder`."""
    lines = ["# RotateK: measured", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            if isinstance(block, Table):
                lines += [f"**{block.caption}**", ""] if block.caption else []
                lines += [_line(block.head), _line(["---"] * len(block.head)), *map(_line, block.rows), ""]
            elif isinstance(block, Picture):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{block.name}.png").write_bytes(block.png)
                lines += [f"![{block.caption}]({folder.name}/{block.name}.png)", "", block.caption, ""]
            else:
                lines += [block, ""]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def build(folders: Sequence[Path], out: Path) -> None:
    """Write both pages."""
    results = read(folders)
    sections = compose(results, yaml.safe_load(PAPERS.read_text(encoding="utf-8")))
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(to_html(sections), encoding="utf-8")
    (out / "report.md").write_text(to_markdown(sections, out / "figures"), encoding="utf-8")


def main() -> None:
    """Parse and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", default=[Path(__file__).parent / "results"])
    parser.add_argument("--out", type=Path, default=Path("report"))
    args = parser.parse_args()
    try:
        build(args.results, args.out)
    except ReportError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{args.out / 'report.html'} and {args.out / 'report.md'}")


if __name__ == "__main__":
    main()
