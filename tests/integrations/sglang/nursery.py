"""A process that has SGLang imported, which takes a server longer than all else, and forks servers.

What a server starts in turn it starts anew, as ever: the processes in which the model runs inherit the environment and
import what they need.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time


class Child:
    """A server that was forked: as much of `subprocess.Popen` as starting and ending one takes."""

    def __init__(self, pid):
        self.pid = pid

    def poll(self):
        """None while it runs; the nursery leaves no zombies."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return 0
        return None

    def wait(self):
        while self.poll() is None:
            time.sleep(0.02)


class Nursery:
    """Starts the process when it is first asked."""

    def __init__(self):
        self.process = None
        self.lock = threading.Lock()

    def start(self, command, log, environment):
        """Run ``python -m command...`` in an environment, writing to a file."""
        with self.lock:
            if self.process is None:
                # SGLang takes its platform from the environment when it is first imported.
                platform = {"SGLANG_PLATFORM": "rotatek", "ROTATEK_RANK": "8"}
                self.process = subprocess.Popen(
                    [sys.executable, __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "HF_HUB_OFFLINE": "1", **platform},
                    text=True,
                )
                atexit.register(self.process.kill)
            print(json.dumps([command, str(log), environment]), file=self.process.stdin, flush=True)
            return Child(int(self.process.stdout.readline()))


def serve(command, log, environment):
    """Become the server."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = list(command)
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def main():
    import sglang.launch_server
    import sglang.srt.entrypoints.http_server  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with os.fdopen(os.dup(1), "w") as answers, os.fdopen(0, closefd=False) as jobs:
        for job in jobs:
            child = os.fork()
            if not child:
                try:
                    serve(*json.loads(job))
                except BaseException:  # noqa: BLE001 (it is said, and a fork never goes on with the loop)
                    sys.excepthook(*sys.exc_info())
                finally:
                    sys.stderr.flush()
                    os._exit(1)
            print(child, file=answers, flush=True)


if __name__ == "__main__":
    main()
