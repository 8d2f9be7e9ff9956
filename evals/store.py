"""How results are written, as JSON that people read and version control compares, and how they are found again."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write `value` as a JSON file, in folders made for it; numbers and texts alone take one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    # No text of JSON holds a raw line break, so that these are all between its parts.
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda leaf: re.sub(r"\n *", " ", leaf.group()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def rounded(value: Any, digits: int = 5) -> Any:
    """Round the floats in `value` to significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {name: rounded(part, digits) for name, part in value.items()}
    return [rounded(part, digits) for part in value] if isinstance(value, list | tuple) else value


class StoreError(Exception):
    """A result cannot be read; the message names the file and what is wrong."""


@dataclass
class Results:
    """Stored results by kind, each by the name of its file."""

    accuracy: dict[str, dict[str, Any]] = field(default_factory=dict)
    diagnostics: dict[str, dict[str, Any]] = field(default_factory=dict)
    latency: dict[str, dict[str, Any]] = field(default_factory=dict)
    fidelity: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)
    decoded: dict[str, dict[str, Any]] = field(default_factory=dict)
    other: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)

    def kind_of(self, stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Choose where a result belongs."""
        if "tasks" in stored and "settings" in stored:
            return self.accuracy
        rows = stored.get("settings")
        rows = list(rows.values()) if isinstance(rows, Mapping) else []
        if rows and all(isinstance(row, Mapping) and "loss_to_last" in row for row in rows):
            return self.decoded
        if "geometry" in stored:
            return self.diagnostics
        if {"rows", "largest", "environment"} <= stored.keys():
            return self.latency
        if stored.get("rows") and all("tokens" in row and "channels" in row for row in stored["rows"]):
            return self.tokens
        methods = stored.get("methods")
        if (
            methods
            and isinstance(methods, Mapping)
            and all("second" in row and "kv_ratio" in row for row in methods.values())
        ):
            return self.fidelity
        return self.other


def read(folders: Iterable[Path]) -> Results:
    """Read all results in the folders."""
    results = Results()
    for folder in folders:
        if not folder.is_dir():
            raise StoreError(f"--results: there is no folder '{folder}'")
        for path in sorted(folder.rglob("*.json")):
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise StoreError(f"'{path}' is no JSON: {error}") from error
            if isinstance(stored, dict):
                # The scores of a run lie in a folder that has its name.
                name = path.parent.name if path.name == "scores.json" else path.stem
                if path.name != "run.json":
                    results.kind_of(stored)[name] = stored
        results.pictures |= {path.stem: path for path in sorted(folder.rglob("*.png"))}
    return results
