"""Random requests of all kinds, some of them dropped in mid-stream; then everything must be free again.

    python tests/integrations/sglang/soak.py --requests 1000 [--coded]

starts a server of a tiny model with a small pool, sends them, and prints what became of them.
"""

import argparse
import http.client
import json
import random
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serving import Answer, Server, message, picture, video

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "red", "circles", "on", "blue", "squares"]
IMAGES = [picture(seed, *size) for seed, size in enumerate([(56, 56), (224, 224), (448, 140), (280, 280), (84, 196)])]
VIDEO = video(3, frames=4, seconds=2)
KINDS = ("text", "long", "image", "images", "video", "chat", "huge", "broken")


def random_messages(draw):
    """(kind, messages) of one request."""
    kind = draw.choices(KINDS, weights=(28, 10, 28, 11, 6, 11, 3, 3))[0]
    text = " ".join(draw.choices(WORDS, k=draw.randrange(1, 12)))
    if kind == "long":
        text = " ".join(draw.choices(WORDS, k=60))
    if kind in ("text", "long"):
        return kind, message(text)
    if kind == "image":
        return kind, message(text, draw.choice(IMAGES))
    if kind == "images":
        return kind, message(text, *draw.choices(IMAGES, k=draw.randrange(2, 4)))
    if kind == "video":
        return kind, message(text, VIDEO)
    if kind == "chat":
        turn = {"role": "assistant", "content": [{"type": "text", "text": "a fox"}]}
        return kind, [*message(text, draw.choice(IMAGES)), turn, *message(text, draw.choice(IMAGES))]
    if kind == "huge":
        return kind, message(text, HUGE)
    return kind, message(text, draw.choice(IMAGES)[:400])


HUGE = picture(99, 896, 896)


def drop(server, messages, tokens, chunks):
    """Ask for a stream, read some of it, and hang up."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        body = {"model": "x", "messages": messages, "max_tokens": tokens, "stream": True, "ignore_eos": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        for _ in range(chunks):
            if not reply.readline():
                break
        return reply.status
    finally:
        connection.close()


def hang_up(server, messages, seconds):
    """Send a request and hang up after a while, without a look at what came back."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"model": "x", "messages": messages, "max_tokens": 50, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    time.sleep(seconds)
    connection.close()


def soak(server, count, seed=0, workers=12, longest=40, pause=None):
    """Send `count` random requests for up to `longest` tokens; returns how many of each kind had which HTTP status.

    Every `pause` seconds all that run are taken back, and go on.
    """
    draws = [random.Random(f"{seed} {index}") for index in range(count)]
    outcomes, lock = Counter(), threading.Lock()

    def one(draw):
        kind, messages = random_messages(draw)
        tokens = draw.randrange(1, 40 if kind == "huge" else longest)  # no more fit behind a huge one
        if draw.random() < 0.1:
            kind, status = kind + ", given up", None
            hang_up(server, messages, draw.random() / 5)
        elif draw.random() < 0.1:
            kind, status = kind + ", dropped", drop(server, messages, tokens + 20, draw.randrange(0, 8))
        else:
            fixed = {"ignore_eos": True} if draw.random() < 0.5 else {"ignore_eos": False, "min_tokens": tokens}
            answer: Answer = server.ask(messages, tokens, **fixed)
            status = answer.status
            if status == 200 and len(answer.logprobs) != tokens:
                status = f"{len(answer.logprobs)} of {tokens} tokens"
        with lock:
            outcomes[kind, status] += 1

    done = threading.Event()

    def take_back():
        while not done.wait(pause):
            server.post("/pause_generation", {"mode": "retract"})
            server.post("/continue_generation", {})
            with lock:
                outcomes["all", "taken back"] += 1

    with ThreadPoolExecutor(workers + 1) as threads:
        taking = threads.submit(take_back) if pause else None
        try:
            list(threads.map(one, draws))
        finally:
            done.set()
        if taking:
            taking.result()
    return outcomes


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1000, help="of a round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument(
        "--longest", type=int, default=200, help="answer, in tokens; long ones have requests taken back"
    )
    parser.add_argument("--pause", type=float, default=1, help="seconds after which all that run are taken back; or 0")
    parser.add_argument("--coded", action="store_true", help="all tokens coded, at 4 bits")
    parser.add_argument("--dense", action="store_true", help="SGLang without compression, to compare its memory")
    given = parser.parse_args()
    from rotatek_sglang.tiny import save_model

    with tempfile.TemporaryDirectory() as folder:
        save_model("qwen2_5_vl", Path(folder) / "model")
        module, ours, environment = "rotatek_sglang.launch", ["--sparsity", "0.75", "--bases", "8"], {}
        if given.coded:
            from oracle import calibrate_basis

            prompts = [message("what is in this image? " * (4 + seed), picture(seed)) for seed in range(3)]
            calibrate_basis(f"{folder}/model", prompts, f"{folder}/basis.safetensors", text=True)
            ours = ["--basis", f"{folder}/basis.safetensors", "--bits", "4"]
        if given.dense:
            module, ours = "sglang.launch_server", ["--device", "cpu", "--attention-backend", "torch_native"]
            environment = {"SGLANG_PLATFORM": "rotatek"}
        arguments = ["--model-path", f"{folder}/model", *SMALL_POOL, *ours]
        with Server(module, *arguments, log=Path(folder) / "log", environment=environment) as server:
            probe = message("what is in this image?", picture(1))
            soak(server, 50, seed="warm")
            server.flush()
            before = server.ask(probe, 16)
            print("memory before:", server.memory(), flush=True)
            outcomes = Counter()
            for number in range(given.rounds):
                started = time.monotonic()
                outcomes += soak(server, given.requests, number, given.workers, given.longest, given.pause)
                seconds = time.monotonic() - started
                free = server.settled()
                print(f"{given.requests} requests in {seconds:.0f} s; memory after:", server.memory(), flush=True)
            after, log = server.ask(probe, 16), server.log_text()
            for (kind, status), number in sorted(outcomes.items(), key=str):
                print(f"{number:6} {kind}: {status}")
            print(f"{log.count('Retract requests')} times requests were taken back")
            print("in use:", {name: value for name, value in free.items() if name.endswith(("used", "with_basis"))})
            print("probe unchanged:", before == after)


SMALL_POOL = [
    *("--dtype", "float32", "--max-total-tokens", "1200", "--mem-fraction-static", "0.3", "--random-seed", "0"),
    *("--max-running-requests", "12", "--enable-metrics", "--enable-cache-report", "--chunked-prefill-size", "48"),
    # Lets requests in on the hope that others end early, so that SGLang has to take some back.
    *("--schedule-conservativeness", "0.05"),
]

if __name__ == "__main__":
    main()
