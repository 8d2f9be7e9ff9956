"""One page out of the stored results: tables beside the papers' numbers, figures, and what holds and what does not.

    python -m evals.report --results evals/results --out report

writes `report.html`, which needs no other file, and `report.md` with its pictures in `figures/`. Result files are known
by what they hold (accuracy, fidelity, token pruning, diagnostics, latency); of any other the page lists where it comes
from. Verdicts are computed from the numbers on the page, so that they change with them.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evals import figures
from evals.report.compared import count_of, interval, negated, pairs, points
from evals.report.page import Picture, Section, Table, to_html, to_markdown
from evals.report.verdicts import verdicts
from evals.store import Results, StoreError, read
from evals.tasks.reader import tells_nothing

PAPERS = Path(__file__).parent / "papers.yaml"
TEXTS = yaml.safe_load((Path(__file__).parent / "texts.yaml").read_text(encoding="utf-8"))
READER_NOTE = (
    "The reader is one small model that reads one kind of page. What holds on it is a hint at what other models do, "
    "no proof."
)


def with_error(row: Mapping[str, Any]) -> str:
    """Write mean and standard error in points."""
    return points(row["mean"]) + ("" if row.get("se") is None else f" ± {100 * row['se']:.1f}")


def against_dense(row: Mapping[str, Any]) -> str:
    """Write the paired difference in points, with its interval."""
    paired = row.get("against_dense")
    return "" if paired is None else interval(paired["mean"], paired["interval_95"])


def titled(name: str, kind: str) -> Section:
    """Start a section with the title and the introduction of a stored result."""
    known = TEXTS["results"].get(name, {})
    return Section(known.get("title", f"{kind}: {name}"), [known["note"]] if "note" in known else [])


def described(method: str, options: Mapping[str, Any] | None) -> str:
    """Name a method with those of its options that its name leaves out."""
    shown = {name: Path(str(value)).stem if name == "basis" else value for name, value in (options or {}).items()}
    left = [f"{name}={value}" for name, value in shown.items() if name != "always_compress"]
    return " ".join([method, *(text for text in left if text not in method)])


def accuracy_sections(results: Results) -> Iterable[Section]:
    """Show the accuracy script's results, with the trade-off and robustness pictures."""
    for name, stored in results.accuracy.items():
        tasks = stored["tasks"]
        model = f"Model {stored['model']['name'].rsplit('/', 1)[-1]}, {stored['model']['dtype']}."
        section = titled(name, "Accuracy")
        section.blocks.append(model)
        section.blocks += _accuracy_tables(tasks)
        measured = "; ".join(
            f"{task}: {found['metric']}, n = {found['samples']}"
            + (f", {len(found['failed'])} left out" if found["failed"] else "")
            for task, found in tasks.items()
        )
        section.blocks.append(f"Metrics and samples: {measured}.")
        if controls := {task: why for task in tasks if (why := tells_nothing(task))}:
            told = "; ".join(f"{_task_title(task)}: {why}" for task, why in controls.items())
            section.blocks.append(f"Controls, which no verdict counts: {told}.")
        if memory := stored.get("resident_mib"):
            section.blocks.append(
                f"Resident memory of the main process: {memory['after_a_tenth']:.0f} MiB after a tenth of its "
                f"{memory['batches']} batches, {memory['end']:.0f} MiB at the end, at most {memory['most']:.0f} MiB."
            )
        section.blocks += _accuracy_pictures(name, stored)
        yield section


def _accuracy_tables(tasks: Mapping[str, Any]) -> Iterable[Table]:
    """Show scores and differences of each method: side by side for few tasks, one table each for many."""
    options = {name: row.get("options") for found in tasks.values() for name, row in found["methods"].items()}
    few = len(tasks) <= 3
    for caption, cells in (
        [("Scores, and differences from the dense cache", (with_error, against_dense))]
        if few
        else [("Scores", (with_error,)), ("Against the dense cache", (against_dense,))]
    ):
        rows = [
            [described(method, options[method]), _ratios(tasks, method)]
            + [cell(row) if (row := found["methods"].get(method)) else "" for found in tasks.values() for cell in cells]
            for method in options
            if method != "dense" or with_error in cells
        ]
        head = [
            _task_title(task) + (", against dense" if few and cell is against_dense else "")
            for task in tasks
            for cell in cells
        ]
        yield Table(caption, ["method", "cache", *head], rows)


def _task_title(task: str) -> str:
    return task.removeprefix("reader-").replace("-", " ")


def _ratios(tasks: Mapping[str, Any], method: str) -> str:
    """Write by how much a method's cache is smaller, over the tasks."""
    found = [row["ratio"] for task in tasks.values() if (row := task["methods"].get(method)) and row["ratio"]]
    low, high = (f"{limit:.2f}" for limit in (min(found, default=0), max(found, default=0)))
    return "" if not found else f"{low}x" if low == high else f"{low} to {high}x"


def _accuracy_pictures(name: str, stored: Mapping[str, Any]) -> Iterable[Picture]:
    if len(next(iter(stored["tasks"].values()))["methods"]) > 2:
        drawn = figures.png(figures.trade_off(stored))
        yield Picture(f"{name}_trade_off", "Score against the bytes of the cache: channels, tokens, both.", drawn)
    robust = figures.robustness(stored)
    if robust is not None:
        caption = "Score against the share of channels removed."
        yield Picture(f"{name}_robustness", caption, figures.png(robust))


def paper_section(papers: Mapping[str, Any], results: Results) -> Section:
    """Show what the papers state beside what came out here."""
    stated = papers["accuracy"]
    rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in stated["rows"].items()]
    gains = [
        [title, f"{stated['rows'][better][-1] - stated['rows'][worse][-1]:+.1f}", *_here(results, here)]
        for title, (better, worse, here) in papers["gains"].items()
    ]
    return Section(
        "Beside the papers' numbers",
        [
            (
                "Differences in points of the papers' three tasks (mean) and, in the same row, of the reader's second "
                "question on hard pages, with its 95 % interval or standard error, at the nearest budget measured."
            ),
            Table("Gains", ["comparison", "paper", "reader", "at"], gains),
            Table(stated["source"], ["method", *stated["columns"]], rows),
            Table("Speed, as stated", ["paper", "setting", "gain"], papers["speed"]),
        ],
    )


def _here(results: Results, wanted: Mapping[str, Any]) -> list[str]:
    """Find the reader's difference for a row of the papers' gains, and at what it was measured."""
    if "tokens" in wanted:
        for stored in results.tokens.values():
            for row in stored["rows"]:
                asked = (wanted["tokens"], wanted["channels"], wanted["budget"])
                second = row["second"]
                if (row["tokens"], row["channels"], row["budget"]) == asked and "loss_to_tokens_only" in second:
                    gain = interval(-second["loss_to_tokens_only"], negated(second["loss_to_tokens_only_95"]))
                    return [gain, f"{row['bytes_share']:.2f} of the bytes, n = {count_of(second)}"]
    else:
        for task, mean, error, count in pairs(results, wanted["better"], wanted["worse"]):
            if task == wanted["task"]:
                return [f"{100 * mean:+.1f} ± {100 * error:.1f}", f"{wanted['at']}, n = {count}"]
    return ["not measured", ""]


def fidelity_sections(results: Results) -> Iterable[Section]:
    """Show the fidelity script's results."""
    for name, stored in results.fidelity.items():
        count = count_of(next(iter(stored["methods"].values()))["second"])
        rows = [
            [
                method,
                f"{row['key_ratio']:.1f}x",
                f"{row['value_ratio']:.1f}x",
                f"{row['kv_ratio']:.1f}x",
                points(row["second"]["exact_match"]),
                "" if method == "dense" else interval(-row["second"]["loss"], negated(row["second"]["loss_95"])),
                f"{row['second']['kl']:.2g}",
            ]
            for method, row in stored["methods"].items()
        ]
        head = ["method", "Keys", "Values", "both", "second question", "against dense", "KL"]
        caption = f"Exact match of the second question after compression, n = {count}; bytes of the visual part"
        section = titled(name, "Fidelity")
        section.blocks.append(Table(caption, head, rows))
        if len(stored["methods"]) > 2:
            caption_of_picture = (
                "What the second question loses against the bytes of the visual part, with 95 % intervals."
            )
            section.blocks.append(Picture(name, caption_of_picture, figures.png(figures.fidelity(stored))))
        yield section


def tokens_sections(results: Results) -> Iterable[Section]:
    """Show token pruning at matched bytes."""
    for name, stored in results.tokens.items():
        rows = []
        for row in stored["rows"]:
            second, kept = row["second"], row["keep"]
            gain = ""
            if "loss_to_tokens_only" in second:
                gain = interval(-second["loss_to_tokens_only"], negated(second["loss_to_tokens_only_95"]))
            rows.append(
                [
                    row["tokens"],
                    row["channels"],
                    "all" if kept is None else f"{100 * kept:.0f} %",
                    f"{row['bytes_share']:.3f}",
                    points(row["first"]["exact_match"]),
                    points(second["exact_match"]),
                    gain,
                    f"{second['kl']:.2g}",
                ]
            )
        head = ["tokens", "channels", "kept", "bytes", "first question", "second question", "over tokens only", "KL"]
        count = count_of(stored["rows"][0]["second"]) if stored["rows"] else 0
        caption = (
            f"Exact match and bytes of the visual Keys and Values (dense: 1), KL of the second answer, n = {count}"
        )
        section = titled(name, "Tokens and channels")
        section.blocks.append(Table(caption, head, rows))
        told = "Exact match against bytes; stars keep all tokens."
        if name in results.pictures:
            section.blocks.append(Picture(name, told, results.pictures[name].read_bytes()))
        yield section


def diagnostics_sections(results: Results) -> Iterable[Section]:
    """Show why it works: numbers and pictures."""
    for name, stored in results.diagnostics.items():
        geometry = stored["geometry"]
        section = titled(name, "Why it works")
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
                    interval(-row["second"]["loss"], negated(row["second"]["loss_95"])) if method != "dense" else "",
                    f"{row['second']['kl']:.2g}",
                ]
                for method, row in table.items()
            ]
            count = count_of(table["dense"]["second"])
            section.blocks.append(
                Table(f"Ablations, n = {count}", ["method", "second question", "against dense", "KL"], rows)
            )
        yield section


def latency_sections(results: Results) -> Iterable[Section]:
    """Show times and bytes of whole models."""
    for name, stored in results.latency.items():
        measured = [row for row in stored["rows"] if "skipped" not in row]
        peaks = any(_peaks(row) for row in measured)  # a GPU's
        first: dict[tuple[int, int], Mapping[str, Any]] = {}
        rows = []
        for row in measured:
            reference = first.setdefault((row["context"], row["batch"]), row)
            share = "" if row["fit_share"] is None else f"{100 * row['fit_share']:.1f} %"
            rows.append(
                [
                    f"{row['context']:,} x {row['batch']}",
                    row["method"],
                    f"{row['prefill_ms']['median']:.0f}\u00a0ms",
                    share,
                    *(_time(row, reference, time) for time in ("token_ms", "attention_ms", "end_to_end_ms")),
                    f"{row['cache_bytes'] / 2**20:.1f}\u00a0MiB",
                    *([_peaks(row)] if peaks else []),
                ]
            )
        tokens = stored["setting"]["tokens"]
        head = ["tokens x batch", "method", "prefill", "of it fit", "a token", "its attention", f"{tokens} tokens",
                "cache", *(["peak: prefill, decode"] if peaks else [])]  # fmt: skip
        section = titled(name, "Latency and memory")
        section.blocks.append(
            f"Medians of {stored['setting']['rounds']} rounds with their range; in brackets how often a time goes into "
            f"that of the first method of the setting. '{tokens} tokens' is end to end, prefill included. Prompt: "
            f"{stored['setting']['prompt']}."
        )
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


def _time(row: Mapping[str, Any], reference: Mapping[str, Any], name: str) -> str:
    own = row[name]
    faster = reference[name]["median"] / own["median"]
    return f"{own['median']:.4g} ms, {own['least']:.4g} to {own['most']:.4g} ({faster:.2f}x)"


def _peaks(row: Mapping[str, Any]) -> str:
    peaks = [row["prefill_peak_bytes"], row["decode_peak_bytes"]]
    return "" if None in peaks else ", ".join(f"{peak / 2**30:.2f} GiB" for peak in peaks)


def provenance(results: Results) -> Section:
    """List commands, hardware, versions and dates."""
    rows = []
    kinds = (results.accuracy, results.diagnostics, results.latency, results.fidelity, results.tokens, results.other)
    for name, stored in ((name, stored) for kind in kinds for name, stored in kind.items()):
        environment = stored.get("environment", {})
        machine = stored.get("machine", "")
        hardware = environment.get("device") or stored.get("hardware") or machine
        if isinstance(hardware, Mapping):
            hardware = ", ".join(f"{part} {value}" for part, value in hardware.items())
        if "load_average" in environment:
            hardware += f", load average {environment['load_average']:g}"
        versions = environment.get("versions", stored.get("versions", {}))
        packages = ", ".join(f"{package} {version}" for package, version in versions.items())
        date = environment.get("date", stored.get("date", ""))
        rows.append([name, _command(stored), str(hardware), packages, str(date)])
    head = ["result", "command or setting", "hardware", "versions", "date"]
    return Section("Where the numbers come from", [Table("", head, rows)])


def _command(stored: Mapping[str, Any]) -> str:
    setting = stored.get("setting") or stored.get("settings") or {}
    if isinstance(setting, Mapping):
        setting = ", ".join(f"{name} {value}" for name, value in setting.items())
    return str(stored.get("command") or setting)


def compose(results: Results, papers: Mapping[str, Any]) -> list[Section]:
    """Put the page together, section by section."""
    rows = [[verdict.claim, verdict.words(), verdict.evidence, verdict.why] for verdict in verdicts(results)]
    head = ["claim", "here", "numbers", "diagnostics"]
    return [
        Section("What holds, and what does not", [READER_NOTE, Table("", head, rows)]),
        Section("How to read the tables", TEXTS["how to read"]),
        paper_section(papers, results),
        *accuracy_sections(results),
        *fidelity_sections(results),
        *tokens_sections(results),
        *diagnostics_sections(results),
        *latency_sections(results),
        provenance(results),
    ]


MARKS = {"holds": "holds", "holds in part": "part", "does not hold": "does", "not measured": "not"}
TITLE = "RotateK: measured"


def build(folders: Sequence[Path], out: Path) -> None:
    """Write both pages."""
    results = read(folders)
    sections = compose(results, yaml.safe_load(PAPERS.read_text(encoding="utf-8")))
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(to_html(TITLE, sections, MARKS), encoding="utf-8")
    (out / "report.md").write_text(to_markdown(TITLE, sections, out / "figures"), encoding="utf-8")


def main() -> None:
    """Parse and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", default=[Path(__file__).parents[1] / "results"])
    parser.add_argument("--out", type=Path, default=Path("report"))
    args = parser.parse_args()
    try:
        build(args.results, args.out)
    except StoreError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{args.out / 'report.html'} and {args.out / 'report.md'}")
