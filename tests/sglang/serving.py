"""A server in a process of its own, and requests to it."""

import base64
import concurrent.futures
import contextlib
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

START_SECONDS = 300


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def picture(seed=0, width=224, height=224):
    """A PNG of blocks and discs, as a data URL."""
    draw = random.Random(seed)
    image = Image.new("RGB", (width, height), tuple(draw.randrange(256) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, size = draw.randrange(width), draw.randrange(height), draw.randrange(10, 60)
        shape = pen.rectangle if draw.random() < 0.5 else pen.ellipse
        shape([x, y, x + size, y + size], fill=tuple(draw.randrange(256) for _ in range(3)))
    return as_url(image)


def as_url(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def message(text="what is in this image?", *urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@dataclass(frozen=True)
class Answer:
    """What a request came back with; `logprobs` are those of the greedy tokens."""

    status: int
    text: str
    logprobs: tuple[float, ...] = ()
    prompt_tokens: int = 0


class Server:
    """An SGLang server on 127.0.0.1, ended with the `with` block."""

    def __init__(self, module, *arguments, log, environment=None):
        self.port, self.log = free_port(), Path(log)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(self.port), *arguments]
        self.started = time.monotonic()
        with self.log.open("w", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )

    def __enter__(self):
        while "ready to roll" not in (text := self.log.read_text(encoding="utf-8")):
            failed = self.process.poll() is not None or "Scheduler hit an exception" in text
            if failed or time.monotonic() > self.started + START_SECONDS:
                self.stop()
                raise RuntimeError(f"the server did not start:\n{text[-6000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """End the server and every process it started (they share a session)."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def failure(self):
        """The message with which a server that must not start ends."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(START_SECONDS)
        self.stop()
        return self.log.read_text(encoding="utf-8")

    def request(self, body, path="/v1/chat/completions", timeout=120):
        return urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            body if body is None or isinstance(body, bytes) else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )

    def ask(self, messages, tokens=10, timeout=120, **more):
        """A greedy answer of exactly `tokens` tokens (unless `more` says otherwise)."""
        body = {
            "model": "x",
            "messages": messages,
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": True,
            "ignore_eos": True,
            **more,
        }
        try:
            with urllib.request.urlopen(self.request(body), timeout=timeout) as reply:
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read().decode())
        choice = answer["choices"][0]
        logprobs = tuple(token["logprob"] for token in choice["logprobs"]["content"])
        return Answer(200, choice["message"]["content"], logprobs, answer["usage"]["prompt_tokens"])

    def ask_all(self, requests, workers=16):
        """Answers to many requests (positional and keyword arguments of `ask`), sent at once."""
        with concurrent.futures.ThreadPoolExecutor(workers) as threads:
            return [job.result() for job in [threads.submit(self.ask, *args, **kwargs) for args, kwargs in requests]]

    def get(self, path):
        with urllib.request.urlopen(self.request(None, path), timeout=30) as reply:
            return reply.read().decode()

    def metrics(self):
        """Our metrics, by name."""
        found = re.findall(r"^(rotatek_\w+)\{[^}]*\} (\S+)$", self.get("/metrics"), re.MULTILINE)
        return {name: float(value) for name, value in found}

    def settled(self, seconds=20):
        """Our metrics once no row is in use, or after so many seconds."""
        until = time.monotonic() + seconds
        while (now := self.metrics())["rotatek_text_rows_used"] and time.monotonic() < until:
            time.sleep(0.1)
        return now

    def resident_bytes(self):
        """Memory of the server's processes."""
        import psutil

        main = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in [main, *main.children(recursive=True)])
