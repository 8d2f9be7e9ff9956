"""What `evals.bench.gpu` found, as text."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def wrongs(found: Mapping[str, Any]) -> list[str]:
    """List what went wrong."""
    listed = []
    for part, section in found["parts"].items():
        listed += [f"{part}: {section['failed']}"] if "failed" in section else []
        listed += [f"{part}, {row['item']}: {row['wrong']}" for row in section["rows"] if "wrong" in row]
    return listed


def number(value: Any, form: str = ".1f") -> str:
    """Return a figure as a table has it; "-" for none."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return format(value, form) if known else "-"


def table(found: Mapping[str, Any]) -> str:
    """Return all figures that matter as text."""
    lines = ["", "=" * 100, ", ".join(f"{name} {value}" for name, value in found["hardware"].items())]
    lines.append(", ".join(f"{name} {value}" for name, value in found["versions"].items()))
    lines.append(f"{found['date']}, commit {found['commit']}")
    for part, section in found["parts"].items():
        lines += ["", f"{part}: {section['seconds']:.0f} of {section['budget s']:.0f} s"]
        good = [row for row in section["rows"] if "wrong" not in row or part == "tests"]
        lines += LINES[part](good)
        if section["not reached"]:
            lines.append(f"  NOT REACHED: {'; '.join(section['not reached'])}")
    listed = wrongs(found)
    lines += ["", f"WRONG: {len(listed)}" if listed else "nothing went wrong", *(f"  {one}" for one in listed)]
    return "\n".join(lines)


def compile_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"  {name}: {number(time)} s" for row in rows for name, time in row["seconds"].items()]


def test_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if "passed" in row:
            lines.append(
                f"  {row['item']}: {row['passed']} passed, {row['skipped']} skipped, {len(row['failed'])} failed"
            )
            lines += [f"  FAILED {name}: {why}" for name, why in row["failed"].items()]
            lines += [f"  {number(time)} s {name}" for name, time in row["slowest, s"].items()]
        elif "ended" in row:
            lines.append(f"  {row['item']}, out of time: {row['ended']} of {row['begun']} begun tests ended; running:")
            lines += [f"  RUNNING {name}" for name in row["stopped while running"]]
    return lines


def decode_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if "ours" not in row:
            lines.append(f"  copy {number(row['copy GB/s'], ',.0f')} GB/s, graph {number(row['smallest graph us'])} us")
            continue
        best = row["dense"].get(row["best dense"], {}).get("graph ms", math.nan)
        told = [f"{row['item']:>12}  {row['best dense']} {number(best * 1e3)} us"]
        for kind, one in row["ours"].items():
            share, gain = number(one["share of copy"], ".2f"), number(one["over best dense"], ".2f")
            told.append(f"{kind} {number(one['graph ms'] * 1e3)} ({share}, {gain}x)")
        lines.append(" | ".join(told))
    return lines


def split_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"  {row['item']}: {number(row['chosen us'])} us, {number(row['over best'], '.2f')} of the best, which has "
        f"{row['best splits']} splits"
        for row in rows
    ]


def variant_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    changed = importlib.import_module("evals.bench.block_sizes").changed
    lines = []
    for row in rows:
        own = row["candidates"][0]["sizes"]
        told = [f"{changed(one['sizes'], own)} {number(one['ms'] * 1e3)}" for one in row["candidates"]]
        lines.append(f"  {row['item']}, us: {' | '.join(told)}")
    return lines


def call_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"  {name}: {number(time, '.0f')} us" for row in rows for name, time in row["us a call"].items()]


def host_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"  {name:24} generate {number(one['generate ms']['median'], '.2f')} ms a token, "
        f"plain loop {number(one['loop ms']['median'], '.2f')}"
        for row in rows
        for name, one in row["ms a token"].items()
    ]


def seal_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if "device ms a layer" in row:
            parts = ", ".join(f"{part} {number(time * 1e3, '.0f')}" for part, time in row["device ms a layer"].items())
            wall, own = number(row["wall ms a layer"] * 1e3, ".0f"), number(row["host ms a layer"] * 1e3, ".0f")
            lines.append(f"  {row['item']}: {wall} us a layer, host {own}; device: {parts}")
        else:
            walls = ", ".join(f"{name} {number(one['median'])}" for name, one in row["wall ms"].items())
            share = number(row["share of seals"]["median"], ".1%")
            on_device = number(row["share of seals on the device"], ".1%")
            lines.append(f"  {row['item']}: {walls} ms; seals {share}, on the device {on_device}")
    return lines


def layer_seal_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    line = importlib.import_module("evals.bench.seal").seal_line
    return [f"  {line(row)}" for row in rows]


def token_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    title = f"{'ms':>8} {'GEMMs':>7} {'small':>7} {'attn.':>7} {'MiB':>8} {'gain':>6} {'bound':>6}"
    lines = [f"  {'':58}{title}"]
    for row in rows:
        if "token ms" not in row:
            lines.append(f"  {row['item']:58}{row['skipped']}")
            continue
        device = row["device ms"]
        kinds = " ".join(f"{number(device[kind], '.2f'):>7}" for kind in ("GEMMs", "small kernels", "attention"))
        lines.append(
            f"  {row['item']:58}{number(row['token ms']['median'], '.2f'):>8} {kinds} "
            f"{number(row['cache bytes'] / 2**20, ',.0f'):>8} {number(row.get('over best dense'), '.2f'):>6} "
            f"{number(row.get('bound by bytes'), '.2f'):>6} {row['decoding']}"
        )
    return lines


LINES: dict[str, Callable[[Sequence[Mapping[str, Any]]], list[str]]] = {
    "compile": compile_lines,
    "tests": test_lines,
    "decode": decode_lines,
    "splits": split_lines,
    "variants": variant_lines,
    "call": call_lines,
    "host": host_lines,
    "seal": seal_lines,
    "seals": layer_seal_lines,
    "token": token_lines,
    "compiled": token_lines,
}
