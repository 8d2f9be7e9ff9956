"""Does a model still answer right? Methods x budgets x tasks, scored on the same samples by each task's own metric.

    python -m evals.accuracy --config evals/settings/accuracy.yaml --out runs/accuracy
    python -m evals.accuracy --model Qwen/Qwen2.5-VL-7B-Instruct --tasks textvqa chartqa --limit 500 \
        --method "rotatek={sparsity: [0.5, 0.75]}" --method "think={sparsity: 0.75, basis: think}" --out runs/qwen

A method is the keyword arguments of `RotateKCache`; a list in place of a value makes one method of each of its values.
The dense cache always runs beside them, and differences against it are paired. A run writes `predictions.jsonl` and
`scores.json` into a folder of its own, which is never overwritten; one that was stopped goes on where it was when it
is started again. Several processes (`accelerate launch -m evals.accuracy ...`, `torchrun -m ...`) share the batches
and give the scores of one. Bytes are those of the cache's storage when the last answer is finished.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from accelerate import PartialState
from tqdm import tqdm
from transformers import Cache, DynamicCache

from evals.metrics import MetricError, require
from evals.scores import DENSE, print_table, score
from evals.store import write_json
from evals.tasks import Sample, SampleError, Task, TaskError, load_task, task_names
from rotatek_cache import RotateKCache
from rotatek_cache.hf.chat import Chat, InputError
from rotatek_cache.hf.storage import storage_bytes

READER = Path(__file__).parent.parent / "rotatek_cache" / "reader"


class RunError(Exception):
    """A setting cannot be used; the message names it, what was expected and what came."""


@dataclass(frozen=True)
class Settings:
    """All that determines the scores of a run.

    Attributes:
        model: name or path for `from_pretrained`; "reader" is the one that comes with the package.
        tasks: name -> options of the task.
        methods: name -> keyword arguments of `RotateKCache`.
        limit: samples of each task.
        seed: which samples: the first `limit` of a shuffle; None takes them in order.
        batch: samples that are answered at once.
        dtype: of the model, "auto" is that of its checkpoint.
        max_new_tokens: longest answer; None leaves it to the task.
    """

    model: str = "reader"
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    limit: int = 500
    seed: int | None = 0
    batch: int = 16
    dtype: str = "auto"
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("batch", 1), ("seed", 0), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if value is None and name in ("seed", "max_new_tokens"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RunError(f"{name} must be a whole number from {least} on, got {value!r}")
        if not self.tasks:
            raise RunError(f"tasks must name at least one of {', '.join(task_names())}")
        if DENSE in self.methods:
            raise RunError(f"methods: '{DENSE}' is the dense cache, which always runs; choose another name")
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise RunError(f"dtype must be 'auto' or the name of a torch dtype, got {self.dtype!r}")
        for name, options in self.methods.items():
            try:
                RotateKCache.for_study(**options)
            except (TypeError, ValueError, OSError) as error:
                raise RunError(f"method '{name}' ({options}): {error}") from error

    @property
    def torch_dtype(self) -> Any:
        """Return the dtype as `from_pretrained` takes it."""
        return "auto" if self.dtype == "auto" else getattr(torch, self.dtype)


def expand(methods: Iterable[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """Make one method of each combination of the options given as lists, named by them."""
    expanded: dict[str, dict[str, Any]] = {}
    for name, options in methods:
        if not isinstance(options, Mapping):
            raise RunError(f"method '{name}' must be a mapping of options of RotateKCache, got {options!r}")
        swept = {option: value for option, value in options.items() if isinstance(value, list)}
        for values in itertools.product(*swept.values()):
            chosen = dict(zip(swept, values, strict=True))
            label = " ".join([str(name), *(f"{option}={value}" for option, value in chosen.items())])
            if label in expanded:
                raise RunError(f"methods: two are called '{label}'; give one of them another name")
            expanded[label] = dict(options) | chosen
    return expanded


class Run:
    """A folder with the settings of a run, what each process has finished and, at its end, the scores."""

    def __init__(self, folder: Path, settings: Settings, state: PartialState) -> None:
        self.folder = folder
        self.state = state
        given = json.loads(json.dumps(asdict(settings)))
        if folder.exists() and not folder.is_dir():
            raise RunError(f"--out must be a folder, and '{folder}' is a file")
        if (folder / "scores.json").exists():
            raise RunError(f"'{folder}' holds a finished run, which is not overwritten: choose another --out")
        stored = folder / "run.json"
        # A run that failed before its first answer leaves its settings free to change.
        if stored.exists() and any(part.stat().st_size for part in self._parts()):
            before = json.loads(stored.read_text())
            if changed := [name for name in given if given[name] != before.get(name)]:
                raise RunError(
                    f"'{folder}' holds an unfinished run with other settings ({', '.join(changed)}): go on with its "
                    "own, or choose another --out"
                )
        state.wait_for_everyone()  # all have looked before one writes
        if state.is_main_process:
            write_json(stored, given)
            for part in self._parts():  # a process that was killed may have left half a line
                text = part.read_bytes()
                part.write_bytes(text[: text.rfind(b"\n") + 1])
        state.wait_for_everyone()
        self.done: dict[tuple[str, str, int], dict[str, Any]] = {}
        self.collect()

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.jsonl"))

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Keep finished samples, at once."""
        with (self.folder / f"part-{self.state.process_index}.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, order: Sequence[tuple[Any, ...]], result: dict[str, Any]) -> None:
        """Write predictions and scores, and drop the parts."""
        target = self.folder / "predictions.jsonl"
        target.write_text(
            "".join(json.dumps(self.done[key], ensure_ascii=False) + "\n" for key in order), encoding="utf-8"
        )
        write_json(self.folder / "scores.json", result)
        for part in self._parts():
            part.unlink()

    def collect(self) -> None:
        """Read what all processes have finished."""
        self.done |= {_key(line): line for part in self._parts() for line in _read_lines(part)}


def _key(line: Mapping[str, Any]) -> tuple[str, str, int]:
    return line["task"], line["method"], line["index"]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a JSONL file, which another process may be writing to."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def sample_order(task: Task, limit: int, seed: int | None) -> list[int]:
    """Draw the numbers of the samples of a run; a higher limit goes on with the same ones."""
    if seed is None:
        return list(range(min(limit, len(task))))
    return np.random.default_rng(seed).permutation(len(task))[:limit].tolist()


def cache_bytes(cache: Cache) -> int:
    """Count the bytes of all storage that a cache holds."""
    if isinstance(cache, RotateKCache):
        return cache.nbytes()
    return storage_bytes(t for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values))


def ask(chat: Chat, samples: Sequence[Sample], cache: Cache, max_new_tokens: int) -> tuple[list[list[str]], int, int]:
    """Ask each sample its questions (as many for all); return answers, bytes of the cache, and tokens of a row."""
    turns = list(zip(*(sample.turns for sample in samples), strict=True))
    first = [turn.text for turn in turns[0]]
    batch = chat.begin([sample.images for sample in samples], first, cache, max_new_tokens=max_new_tokens)
    answers = [batch.answers]
    for later in turns[1:]:
        chat.go_on(batch, [turn.text for turn in later])
        answers.append(batch.answers)
    return [list(row) for row in zip(*answers, strict=True)], cache_bytes(cache), cache.get_seq_length()


def answer_batch(
    chat: Chat, task: Task, numbers: Sequence[int], methods: Mapping[str, dict[str, Any] | None], limit: int | None
) -> list[dict[str, Any]]:
    """Make a line for each sample and method; samples that cannot be used get a line that says why."""
    usable: dict[int, list[tuple[int, Sample]]] = {}
    lines = []
    for number in numbers:
        try:
            sample = task.sample(number)
            usable.setdefault(len(sample.turns), []).append((number, sample))
        except SampleError as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            lines += [{"task": task.name, "method": name, "index": number, "error": str(error)} for name in methods]
    for name, options in methods.items():
        for part in usable.values():  # conversations of one length go together
            config = chat.model.config.get_text_config(decoder=True)
            cache = DynamicCache(config=config) if options is None else RotateKCache.for_study(**options)
            samples = [sample for _, sample in part]
            try:
                answers, stored, tokens = ask(chat, samples, cache, limit or task.max_new_tokens)
            except (ValueError, NotImplementedError) as error:  # what a cache refuses once it sees a prompt
                known = ", ".join(str(number) for number, _ in part)
                raise RunError(
                    f"method '{name}' cannot answer samples {known} of '{task.name}': {error}. Finished samples are "
                    "kept: go on with --only the others and another --out, or change the method"
                ) from error
            for (number, sample), given in zip(part, answers, strict=True):
                turns = [
                    {
                        "question": turn.text,
                        "prediction": text,
                        "reference": dict(turn.reference),
                        "kind": turn.kind,
                        "scored": turn.scored,
                    }
                    for turn, text in zip(sample.turns, given, strict=True)
                ]
                lines.append(
                    {
                        "task": task.name,
                        "method": name,
                        "index": number,
                        "id": sample.id,
                        "turns": turns,
                        "cache_bytes": stored / len(part),
                        "cache_tokens": tokens,
                    }
                )
    return lines


def run(settings: Settings, folder: Path, device: str = "auto", *, quiet: bool = False) -> dict[str, Any]:
    """Answer what is not answered yet, score everything, and return the scores (of the main process).

    Args:
        settings: what to run.
        folder: where results lie.
        device: "auto" (this process's GPU where there is one), or what torch takes.
        quiet: show no progress bar.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    tasks = {name: load_task(name, options) for name, options in settings.tasks.items()}
    for task in tasks.values():
        require(task.metric)  # what is missing to score answers should not show when all are there
    started = time.monotonic()
    progress_of = Run(folder, settings, state)
    source = str(READER) if settings.model == "reader" else settings.model
    chat = Chat.load(source, dtype=settings.torch_dtype, device=state.device if device == "auto" else device)
    methods: dict[str, dict[str, Any] | None] = {DENSE: None, **settings.methods}
    orders = {name: sample_order(task, settings.limit, settings.seed) for name, task in tasks.items()}
    batches = [
        (name, order[start : start + settings.batch])
        for name, order in orders.items()
        for start in range(0, len(order), settings.batch)
    ]
    own = batches[state.process_index :: state.num_processes]
    memory: list[tuple[int, float]] = []
    finished = 0
    for name, numbers in tqdm(own, desc="batches", disable=quiet or not state.is_main_process, mininterval=2):
        left = {
            method: options
            for method, options in methods.items()
            if any((name, method, number) not in progress_of.done for number in numbers)
        }
        if left:
            progress_of.add(answer_batch(chat, tasks[name], numbers, left, settings.max_new_tokens))
            finished += len(numbers)
            memory.append((finished, psutil.Process().memory_info().rss / 2**20))
    state.wait_for_everyone()
    result: dict[str, Any] = {}
    if state.is_main_process:
        progress_of.collect()
        result = {
            "settings": json.loads(json.dumps(asdict(settings))),
            "command": _command(state.num_processes),
            "model": {"name": settings.model, "dtype": str(chat.model.dtype).removeprefix("torch.")},
            "environment": environment(str(chat.model.device), state.num_processes),
            "seconds": round(time.monotonic() - started, 1),
            "resident_mib": _memory(memory),
            "tasks": {},
        }
        for name, task in tasks.items():
            table = {method: [progress_of.done[name, method, number] for number in orders[name]] for method in methods}
            result["tasks"][name] = {"metric": task.metric} | score(task.metric, table, settings.methods)
        keys = [(name, method, number) for name in tasks for number in orders[name] for method in methods]
        progress_of.finish(keys, result)
    state.wait_for_everyone()
    return result


def _command(processes: int) -> str:
    launch = ["torchrun", f"--nproc-per-node={processes}"] if processes > 1 else ["python"]
    return shlex.join([*launch, "-m", "evals.accuracy", *sys.argv[1:]])


def _memory(series: Sequence[tuple[int, float]], points: int = 200) -> dict[str, Any] | None:
    """Sum up the resident memory of the main process while it answered its samples.

    Args:
        series: samples that were finished (of all tasks), and MiB then, after each batch.
        points: how many of them the stored series holds at most, evenly chosen, the last among them.
    """
    if not series:
        return None
    resident = [mebibytes for _, mebibytes in series]
    step = -(-len(series) // points)
    return {
        "after_a_tenth": round(resident[len(resident) // 10], 1),
        "end": round(resident[-1], 1),
        "most": round(max(resident), 1),
        "batches": len(resident),
        "series": [[samples, round(mebibytes, 1)] for samples, mebibytes in series[::-1][::step][::-1]],
    }


def environment(device: str, processes: int = 1) -> dict[str, Any]:
    """Describe hardware, how busy it was, versions and date, as every result names them."""
    packages = ("torch", "transformers", "datasets", "triton", "numpy")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "device": gpu or f"CPU, {platform.machine()}, {psutil.cpu_count(logical=False)} cores",
        "threads": torch.get_num_threads(),
        "processes": processes,
        "load_average": round(os.getloadavg()[0], 1),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def parse(arguments: Sequence[str] | None = None) -> tuple[Settings, Path, str]:
    """Read settings from the YAML and the flags that override it; where results go; the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML with any of the settings below by their names")
    parser.add_argument("--model", help="name or path (default: the reader)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=", ".join(task_names()))
    parser.add_argument("--method", action="append", default=[], metavar="NAME={...}", help="in place of those of YAML")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="methods whose name holds one of these words")
    parser.add_argument("--limit", type=int, help="samples of each task")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--max-new-tokens", type=int, dest="max_new_tokens")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="folder for predictions.jsonl and scores.json")
    flags = parser.parse_args(arguments)
    given: dict[str, Any] = {}
    if flags.config:
        try:
            given = yaml.safe_load(flags.config.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RunError(f"--config '{flags.config}' cannot be read: {error}") from error
        if not isinstance(given, Mapping):
            raise RunError(f"--config '{flags.config}' must hold settings by their names, got {given!r}")
        known = Settings.__dataclass_fields__
        if unknown := sorted(set(given) - set(known)):
            raise RunError(f"--config: unknown {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
    for name in ("model", "limit", "seed", "batch", "dtype", "max_new_tokens"):
        if getattr(flags, name) is not None:
            given[name] = getattr(flags, name)
    given["tasks"] = _tasks(given.get("tasks") or {}, flags.tasks)
    methods = given.get("methods") or {}
    if not isinstance(methods, Mapping):
        raise RunError(f"methods must be a mapping of names to options, got {methods!r}")
    given["methods"] = expanded = expand([_method(text) for text in flags.method] or methods.items())
    if flags.only:
        given["methods"] = {n: o for n, o in expanded.items() if any(word in n for word in flags.only)}
        if not given["methods"]:
            raise RunError(f"--only {' '.join(flags.only)} is in no name of {', '.join(expanded) or 'no method'}")
    return Settings(**given), flags.out, flags.device


def _tasks(given: Any, chosen: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Return options of each task by its name: of those given in the YAML, or of those chosen by flags."""
    if not isinstance(given, Mapping | list):
        raise RunError(f"tasks must be a list of names or a mapping of names to options, got {given!r}")
    options = given if isinstance(given, Mapping) else {}
    names = list(chosen or given)
    if unknown := [name for name in names if name not in task_names()]:
        raise RunError(f"tasks: unknown {', '.join(map(repr, unknown))}; known are {', '.join(task_names())}")
    for name in names:
        if not isinstance(options.get(name) or {}, Mapping):
            raise RunError(f"tasks: options of '{name}' must be a mapping, got {options[name]!r}")
    return {name: dict(options.get(name) or {}) for name in names}


def _method(text: str) -> tuple[str, Any]:
    name, _, options = text.partition("=")
    try:
        return name, yaml.safe_load(options)
    except yaml.YAMLError as error:
        raise RunError(f"--method must be NAME={{option: value, ...}}, got {text!r}: {error}") from error


def main() -> None:
    """Parse, run, print."""
    try:
        settings, folder, device = parse()
        result = run(settings, folder, device)
    except (RunError, TaskError, InputError, MetricError) as error:
        raise SystemExit(f"error: {error}") from error
    if result:
        print_table(result)
        print(f"\npredictions and scores are in {folder}")


if __name__ == "__main__":
    main()
