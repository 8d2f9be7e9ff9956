"""A server in a process of its own, and requests to it."""

import base64
import concurrent.futures
import io
import json
import random
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from nursery import Nursery
from PIL import Image, ImageDraw

from rotatek_sglang.process import running, start

VIDEOS = ["--mm-process-config", json.dumps({"video": {"fps": 2, "min_pixels": 56 * 56, "max_pixels": 84 * 112}})]


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


def video(seed=0, width=112, height=84, frames=8, seconds=4):
    """An animated GIF, which video decoders read, as a data URL."""
    images = []
    for step in range(frames):
        image = Image.new("RGB", (width, height), (seed * 37 % 256, 90, 140))
        at = step * width // frames
        ImageDraw.Draw(image).ellipse([at, 20, at + 30, 50], fill=(255, seed * 53 % 256, step * 20 % 256))
        images.append(image)
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=1000 * seconds // frames)
    return "data:video/mp4;base64," + base64.b64encode(file.getvalue()).decode()


def message(text="what is in this image?", *urls):
    kinds = ["video_url" if url.startswith("data:video") else "image_url" for url in urls]
    parts = [{"type": kind, kind: {"url": url}} for kind, url in zip(kinds, urls, strict=True)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@dataclass(frozen=True)
class Answer:
    """What a request came back with; `logprobs` are those of the greedy tokens."""

    status: int
    text: str
    logprobs: tuple[float, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Server:
    """An SGLang server on 127.0.0.1, ended with the `with` block: a fork of `nursery`, or `alone`: as users do it."""

    nursery = Nursery()

    def __init__(self, module, *arguments, log, environment=None, alone=False):
        self.log = Path(log)
        environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(environment or {})}
        self.starting = running(
            [module, *arguments], self.log, environment, starting=start if alone else self.nursery.start
        )

    def __enter__(self):
        self.port = self.starting.__enter__()
        return self

    def __exit__(self, *stopped):
        return self.starting.__exit__(*stopped)

    def log_text(self):
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
        usage = answer["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return Answer(200, choice["message"]["content"], logprobs, usage["prompt_tokens"], cached)

    def ask_all(self, requests, workers=16):
        """Answers to many requests (positional and keyword arguments of `ask`), sent at once."""
        with concurrent.futures.ThreadPoolExecutor(workers) as threads:
            return [job.result() for job in [threads.submit(self.ask, *args, **kwargs) for args, kwargs in requests]]

    def ask_all_and_take_back(self, requests):
        """Answers to many requests, which are taken back and go on again and again."""
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            asking = thread.submit(self.ask_all, requests)
            while not asking.done():
                self.post("/pause_generation", {"mode": "retract"})
                self.post("/continue_generation", {})
                time.sleep(0.3)
            return asking.result()

    def post(self, path, body):
        with urllib.request.urlopen(self.request(body, path), timeout=60) as reply:
            return reply.read().decode()

    def get(self, path):
        with urllib.request.urlopen(self.request(None, path), timeout=30) as reply:
            return reply.read().decode()

    def flush(self, seconds=20):
        """Forget cached prefixes; waits for requests that are still running."""
        until = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(self.request(b"", "/flush_cache"), timeout=30):
                    return
            except urllib.error.HTTPError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def metrics(self):
        """Our metrics, by name."""
        found = re.findall(r"^(rotatek_\w+)\{[^}]*\} (\S+)$", self.get("/metrics"), re.MULTILINE)
        return {name: float(value) for name, value in found}

    def settled(self):
        """Our metrics once no request runs and no prefix is cached."""
        self.flush()
        return self.metrics()

    def memory(self):
        """Resident MiB of the server's processes, by name."""
        import psutil

        held = {}
        for process in psutil.Process().children(recursive=True):
            name = " ".join(process.cmdline()).partition(" ")[0].rpartition("/")[2]
            held[name] = round(held.get(name, 0) + process.memory_info().rss / 2**20, 1)
        return held
