"""The tests' part of `evals.bench.gpu`: each test has a time limit and is named as it ends."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
ELSEWHERE = "integrations"  # tests of these bring environments of their own
FAILURES = ("failure", "error")


def files_with_gpu_tests(folder: Path = ROOT / "tests") -> list[Path]:
    """Find the test files that hold tests marked `gpu`."""
    return [
        path
        for path in sorted(folder.rglob("test_*.py"))
        if ELSEWHERE not in path.parts and "mark.gpu" in path.read_text(encoding="utf-8")
    ]


def run_tests(
    targets: Sequence[Path], folder: Path, *, budget: float, limit: float, processes: int, marked: str | None = "gpu"
) -> dict[str, Any]:
    """Run tests in parallel processes and list what became of them.

    Args:
        targets: files or folders of tests.
        folder: where pytest's own results go.
        budget: seconds for all; what runs then is stopped and named.
        limit: seconds for a test; its process is stopped then, with a traceback, and another takes over.
        processes: of pytest-xdist.
        marked: an expression of marks, such as "gpu".
    """
    junit = folder.resolve() / "tests.xml"
    command = [sys.executable, "-m", "pytest", *map(str, targets), "-v", "-n", str(processes), f"--junitxml={junit}"]
    command += ["-p", "no:cacheprovider", "-o", f"faulthandler_timeout={limit}"]
    command += ["-o", "faulthandler_exit_on_timeout=true", *(["-m", marked] if marked else [])]
    # A group of its own, so that its workers end with it.
    process = subprocess.Popen(  # noqa: S603
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=ROOT
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(budget, stop)
    timer.start()
    begun: set[str] = set()
    ended: set[str] = set()
    assert process.stdout is not None
    try:
        for text in process.stdout:
            print(text, end="", flush=True)
            words = text.split()
            if words and "::" in words[0]:
                begun.add(words[0])
            if "::" in text and any(word in words for word in ("PASSED", "FAILED", "SKIPPED", "ERROR", "XFAIL")):
                ended.update(word for word in words if "::" in word)
        code = process.wait()
    finally:
        timer.cancel()
    found: dict[str, Any] = {"exit status": code, "begun": len(begun), "ended": len(ended)}
    if stopped.is_set():
        return found | {"stopped while running": sorted(begun - ended)}
    return found | read_junit(junit)


def read_junit(path: Path) -> dict[str, Any]:
    """Count passed and skipped tests, name the failed and the slowest."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))  # noqa: S314 - written by pytest just now
    names = {case: f"{case.get('classname', '')}::{case.get('name', '')}" for case in cases}
    failed = {}
    for case in cases:
        for part in case:
            if part.tag in FAILURES:
                failed[names[case]] = part.get("message", "").partition("\n")[0][:300]
    skipped = [case for case in cases if case.find("skipped") is not None]
    slowest = sorted(cases, key=lambda case: -float(case.get("time", 0)))[:5]
    return {
        "passed": len(cases) - len(skipped) - len(failed),
        "skipped": len(skipped),
        "failed": failed,
        "slowest, s": {names[case]: float(case.get("time", 0)) for case in slowest},
    }
