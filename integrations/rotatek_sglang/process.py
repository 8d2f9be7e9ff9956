"""A server in processes of its own, for the demo, benches and tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

HOST = "127.0.0.1"
READY = "ready to roll"
FAILED = "Scheduler hit an exception"
START_SECONDS = 900


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Iterator[int]:
    """Run ``python -m command...`` as a server on 127.0.0.1 and give its port once it is ready.

    Args:
        command: module and arguments, less host and port.
        log: file for all it prints.
        environment: what is added to ours.

    Raises:
        RuntimeError: with the end of the log, if it does not become ready.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--host", HOST, "--port", str(port)],
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
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
