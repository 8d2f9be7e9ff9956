"""How a server treats those who come again and those who wait: beside dense SGLang, in a pool of as many tokens.

    python tests/integrations/sglang/load.py [--requests 300] [--images 30] [--rounds 3]

starts dense SGLang, the coded pool and the pool with text dense, one after the other, all of a tiny model. It prints
the share of prompt tokens that the prefix cache had, under requests with images of which the pool holds about a third,
and how long requests take while others are refused.
"""

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serving import Server, message, picture
from soak import HUGE, SMALL_POOL

# Prompts of the load are read at once: what waits for its last chunk, where text is dense, takes room from the cache.
AT_ONCE = ["--chunked-prefill-size", "256"]
QUESTIONS = ["what is this?", "is there a red circle?", "describe the picture, please.", "what is on the left?"]
REFUSED = {
    "too long": ("/generate", {"text": "fox " * 4000}),
    "too long, for several answers": ("/generate", {"text": "fox " * 4000, "sampling_params": {"n": 3}}),
    "images beyond the pool": ("/v1/chat/completions", {"messages": message("?", HUGE, picture(98, 896, 896))}),
    "an unknown session": ("/generate", {"text": "x", "session_params": {"id": "nope"}}),
    "a grammar that is none": ("/generate", {"text": "x", "sampling_params": {"regex": "(["}}),
}


def hit_rate(server, requests=120, images=30, seed=0, workers=1):
    """Share of the prompt tokens of random questions on random images that were cached.

    With one worker no question comes while another is answered, so that it follows from the order, not from the clock.
    """
    server.flush()
    draw = random.Random(seed)
    pictures = [picture(400 + number, 252, 224) for number in range(images)]  # 72 tokens each
    asked = [((message(draw.choice(QUESTIONS), draw.choice(pictures)), 8), {}) for _ in range(requests)]
    answers = server.ask_all(asked, workers)
    assert {answer.status for answer in answers} == {200}
    return sum(answer.cached_tokens for answer in answers) / sum(answer.prompt_tokens for answer in answers)


def refused(server, kind):
    """Send a request that is refused, for a longer answer than there will ever be room for; returns the status."""
    path, body = REFUSED[kind]
    body = {"model": "x", **body}
    if path == "/generate":
        body["sampling_params"] = {"max_new_tokens": 3000, **body.get("sampling_params", {})}
    try:
        with urllib.request.urlopen(server.request(body, path), timeout=60) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def waits(server, kind, asked=8):
    """Seconds that each of so many requests took, four at a time, while two clients were refused again and again."""
    done, codes = threading.Event(), set()

    def disturb():
        while not done.is_set():
            codes.add(refused(server, kind))

    def timed(number):
        start = time.monotonic()
        answer = server.ask(message(f"fox {number}", *([picture(1)] if number % 2 else [])), 10, timeout=60)
        assert answer.status == 200, answer.text
        return time.monotonic() - start

    disturbing = [threading.Thread(target=disturb) for _ in range(2)]
    for thread in disturbing:
        thread.start()
    try:
        with ThreadPoolExecutor(4) as threads:
            seconds = list(threads.map(timed, range(asked)))
    finally:
        done.set()
        for thread in disturbing:
            thread.join()
    assert codes == {400}, codes
    return seconds


def dense_server(model, log, *flags):
    """Dense SGLang on a CPU."""
    arguments = ["--model-path", model, "--device", "cpu", "--attention-backend", "torch_native", *SMALL_POOL, *flags]
    environment = {"SGLANG_PLATFORM": "rotatek"}  # without our pool: another platform than the nursery's
    return Server("sglang.launch_server", *arguments, log=log, environment=environment, alone=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1, help="of the load, each with a seed of its own")
    parser.add_argument(
        "--asked", type=int, default=24, help="requests that wait beside each kind of refused ones, or 0"
    )
    given = parser.parse_args()
    from oracle import calibrate_basis

    from rotatek_sglang.tiny import save_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, basis = str(folder / "model"), folder / "basis.safetensors"
        save_model("qwen2_5_vl", folder / "model")
        prompts = [message("what is in this image? " * (4 + seed), picture(seed)) for seed in range(3)]
        calibrate_basis(model, prompts, basis, text=True)

        def ours(*flags):
            return Server(
                "rotatek_sglang.launch", "--model-path", model, *SMALL_POOL, *AT_ONCE, *flags, log=folder / "log"
            )

        servers = {
            "dense": dense_server(model, folder / "log", *AT_ONCE),
            "coded": ours("--basis", str(basis), "--bits", "4"),
            "text dense": ours("--sparsity", "0.75", "--bases", "24", "--text-share", "0.4"),
        }
        found = {}
        for label, starting in servers.items():
            with starting as server:
                server.ask(message("?", picture(1)))
                row = {}
                for seed in range(given.rounds):
                    row[f"hits {seed}"] = hit_rate(server, given.requests, given.images, seed, given.workers)
                row["retractions"] = server.log_text().count("Retract requests")
                for kind in REFUSED if given.asked else ():
                    seconds = waits(server, kind, given.asked)
                    row[kind] = {"median": statistics.median(seconds), "most": max(seconds)}
            found[label] = row
            print(label, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
