"""A server in processes of its own, for the demo, benches and tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
READY = "ready to roll"
FAILED = "Scheduler hit an exception"
START_SECONDS = 900


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start ``python -m command...`` in a session of its own, in an environment, with all it prints in a file."""
    with log.open("w", encoding="utf-8") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *command], stdout=output, stderr=output, env=environment, start_new_session=True
        )


@contextlib.contextmanager
def running(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    starting: Callable[[Sequence[str], Path, Mapping[str, str]], Any] = start,
) -> Iterator[int]:
    """Run ``python -m command...`` as a server on 127.0.0.1 and give its port once it is ready.

    Args:
        command: module and arguments, less host and port.
        log: file for all it prints.
        environment: what is added to ours.
        starting: starts it.

    Raises:
        RuntimeError: with the end of the log, if it does not become ready.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    log.write_text("", encoding="utf-8")  # what an earlier server said is not its own
    process = starting([*command, "--host", HOST, "--port", str(port)], log, {**os.environ, **(environment or {})})
    try:
        until = time.monotonic() + START_SECONDS
        while READY not in (text := log.read_text(encoding="utf-8")):
            if process.poll() is not None or FAILED in text or time.monotonic() > until:
                raise RuntimeError(f"the server did not start:\n{text[-6000:]}")
            time.sleep(0.2)
        yield port
    finally:
        # All that it started: they share a session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
