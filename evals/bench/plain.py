"""Results of any script as tables: what holds one entry for each of several things becomes a row for each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evals.page import Block, Table

PROVENANCE = (
    "environment",
    "versions",
    "command",
    "date",
    "hardware",
    "machine",
)  # these stand in a table of their own
SETTINGS = ("setting", "settings")
LONGEST = 48  # rows that are shown
WIDEST = 10  # columns


def blocks(stored: Mapping[str, Any]) -> list[Block]:
    """What a result holds besides its provenance."""
    return list(_blocks("", {name: part for name, part in stored.items() if name not in PROVENANCE}))


def _blocks(path: str, value: Mapping[str, Any]) -> Iterable[Block]:
    single = {str(name): part for name, part in value.items() if _is_leaf(part)}
    if single:
        yield _sentence(path, single)
    parts = {f"{path} / {name}" if path else str(name): part for name, part in value.items() if name not in single}
    while parts:
        own = next(iter(parts))
        part = parts.pop(own)
        if isinstance(part, Mapping) and part and all(map(_is_leaf, part.values())):
            # Figures of the same things stand side by side.
            alike = [
                name for name, other in parts.items() if isinstance(other, Mapping) and other.keys() == part.keys()
            ]
            columns = {own: part} | {name: parts.pop(name) for name in alike}
            if own in SETTINGS:
                yield _sentence(own, part)
            else:
                rows = [[str(name), *(cell(column[name]) for column in columns.values())] for name in part]
                yield Table(path, ["", *columns], rows)
            continue
        rows_of = list(part.items()) if isinstance(part, Mapping) else [("", entry) for entry in part]
        if len(rows_of) > 1 and all(isinstance(entry, Mapping) for _, entry in rows_of) and _alike(rows_of):
            yield _matrix(own, rows_of)
        elif isinstance(part, Mapping):
            yield from _blocks(own, part)
        else:
            for number, entry in enumerate(part):
                yield from _blocks(f"{own} [{number}]", entry if isinstance(entry, Mapping) else {"": entry})


def _sentence(path: str, value: Mapping[str, Any]) -> str:
    told = "; ".join(f"{name}: {cell(part)}" if name else cell(part) for name, part in value.items())
    return f"{path.capitalize()}. {told}." if path else f"{told}."


def _is_leaf(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and not any(isinstance(part, Mapping | list) for part in value)
    return not isinstance(value, Mapping)


def _alike(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> bool:
    """Whether the entries hold much the same."""
    names = [set(entry) for _, entry in rows]
    return len(set.union(*names)) <= 2 * max(1, min(map(len, names)))


def _matrix(caption: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """A row for each entry, a column for each thing that it holds."""
    flat = [(label, dict(_flat(_chosen(entry)))) for label, entry in rows]
    columns = list(dict.fromkeys(name for _, entry in flat for name in entry))
    more = f", the first {LONGEST} of {len(flat)}" if len(flat) > LONGEST else ""
    shown = flat[:LONGEST]
    if len(columns) > WIDEST and len(shown) <= WIDEST:  # things across, what they hold down
        head = ["", *(str(label) or str(number) for number, (label, _) in enumerate(shown))]
        return Table(caption + more, head, [[name, *(entry.get(name, "") for _, entry in shown)] for name in columns])
    labels = [[str(label)] if any(label for label, _ in flat) else [] for label, _ in shown]
    body = [
        [*label, *(entry.get(name, "") for name in columns)] for label, (_, entry) in zip(labels, shown, strict=True)
    ]
    return Table(caption + more, [*([""] if labels[0] else []), *columns], body)


def _chosen(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """An entry that chose among candidates with the one it chose in their place."""
    candidates, best = entry.get("candidates"), entry.get("best")
    if not isinstance(candidates, list) or not isinstance(best, int):
        return entry
    kept = {name: part for name, part in entry.items() if name not in ("candidates", "best")}
    return kept | {"candidates": len(candidates)} | candidates[best]


def _flat(entry: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, str]]:
    for name, part in entry.items():
        own = f"{path} / {name}" if path else str(name)
        if isinstance(part, Mapping):
            yield from _flat(part, own)
        elif _is_leaf(part):
            yield own, cell(part)
        else:
            yield own, f"{len(part)} entries"


def cell(value: Any) -> str:
    """A value as a table says it."""
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 1e5 else str(value)
