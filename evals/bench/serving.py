"""SGLang under load: dense at its defaults, dense with our features off, and compressed, one after the other.

    python evals/bench/serving.py --model Qwen/Qwen2.5-VL-7B-Instruct        # on a CUDA machine
    python evals/bench/serving.py --model qwen2_5_vl --max-total-tokens 16384 --image 448x448   # a tiny random model

Throughput and latencies come from SGLang's own bench client with images of noise. Then a burst of image requests finds
how many are served at once and how often SGLang has to take one back. All servers get the same memory: the same
fraction of the device, or, with --max-total-tokens (those of the compressed server), as many dense tokens as the
compressed server says would take its bytes. On a CPU the figures say that everything runs, and nothing of speed.

Run it in an environment with SGLang and this package, such as the one of `make test-sglang`.
"""

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch

from rotatek_sglang.process import HOST, running
from rotatek_sglang.tiny import MODELS, save_model

FEATURES_OFF = [
    *("--disable-radix-cache", "--chunked-prefill-size", "-1"),
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
]
FIGURES = {
    "request_throughput": "requests/s",
    "output_throughput": "output tokens/s",
    "median_ttft_ms": "first token, ms",
    "median_tpot_ms": "per output token, ms",
    "peak_running": "served at once",
    "retractions": "taken back",
    "tokens_that_fit": "tokens that fit",
}


def load(port: int, model: str, given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Run SGLang's bench client."""
    out = folder / "client.jsonl"
    out.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang-oai-chat", "--host", HOST),
        *("--port", str(port), "--model", model, "--dataset-name", "image", "--image-count", "1"),
        *("--image-resolution", given.image, "--image-format", "png", "--random-input-len", str(given.input)),
        *("--random-output-len", str(given.output), "--random-range-ratio", "1", "--num-prompts", str(given.requests)),
        *("--max-concurrency", str(given.concurrency), "--seed", "0", "--output-file", str(out)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (our own command)
    if done.returncode or not out.exists():
        raise RuntimeError(f"the bench client failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    found = json.loads(out.read_text(encoding="utf-8").splitlines()[-1])
    if found["completed"] != given.requests:
        raise RuntimeError(f"{found['completed']} of {given.requests} requests were answered")
    return {name: found[name] for name in FIGURES if name in found}


def fetch(port: int, path: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{HOST}:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=1800) as reply:  # noqa: S310 (a server of ours)
        return reply.read().decode()


def noise(size: str, seed: int) -> str:
    """Make the data URL of an image in a few colours, small to send."""
    import base64  # noqa: PLC0415
    import io  # noqa: PLC0415

    import numpy as np  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    height, width = map(int, size.split("x"))
    blocks = np.random.default_rng(seed).integers(0, 255, (height // 14, width // 14, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def burst(port: int, given: argparse.Namespace, log: Path) -> dict[str, float]:
    """Send many image requests at once; count how many are served at the same time and how many are taken back."""
    before, peak, done = log.read_text(encoding="utf-8").count("Retract requests"), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            running_now = re.findall(r"^sglang:num_running_reqs\{[^}]*\} (\S+)$", fetch(port, "/metrics"), re.MULTILINE)
            peak = max([peak, *map(float, running_now)])
            time.sleep(0.1)

    def ask(seed: int) -> None:
        image = {"type": "image_url", "image_url": {"url": noise(given.image, seed)}}
        content = [image, {"type": "text", "text": "what is in this image?"}]
        body = {"model": "x", "messages": [{"role": "user", "content": content}], "temperature": 0}
        # Not `ignore_eos`, for which SGLang reserves the whole answer's memory at once.
        fetch(port, "/v1/chat/completions", {**body, "max_tokens": given.output, "min_tokens": given.output})

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(given.burst) as threads:
            list(threads.map(ask, range(given.burst)))
    finally:
        done.set()
        watching.join()
    retractions = log.read_text(encoding="utf-8").count("Retract requests") - before
    return {"peak_running": peak, "retractions": retractions}


def draw(rows: dict[str, dict[str, float]], path: Path, title: str) -> None:
    """Draw one panel per figure, one bar per server."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (not in the test environment of the plug-in)

    figure = Figure(figsize=(14, 5), layout="constrained")
    panels = figure.subplots(2, 4).flatten()
    for panel, (name, label) in zip(panels, FIGURES.items(), strict=False):
        panel.barh(list(rows), [row[name] for row in rows.values()])
        panel.set_title(label, fontsize="medium")
        panel.invert_yaxis()
    panels[-1].axis("off")
    figure.suptitle(title)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help=f"name, path, or a tiny random one: {', '.join(MODELS)}")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--text-share", type=float, default=0.25)
    parser.add_argument("--basis", help="a basis file that was calibrated with text: all tokens are coded in it")
    parser.add_argument("--bits", default="4", help="with --basis")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--mem-fraction-static", default="0.8")
    parser.add_argument("--max-total-tokens", type=int, help="of the compressed server; needed on a CPU")
    parser.add_argument("--max-running-requests", type=int, default=64)
    parser.add_argument("--max-prefill-tokens", type=int, help="of a batch, for all servers; bounds the vision tower")
    parser.add_argument("--image", default="1120x1120", help="height x width")
    parser.add_argument("--input", type=int, default=64, help="text tokens of a prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--burst", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("evals/results/bench_serving.json"))
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and given.max_total_tokens is None:
        parser.error("--max-total-tokens is needed on a CPU, whose free memory says nothing")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = given.model
        if model in MODELS:
            save_model(model, folder / "model")
            model = str(folder / "model")
        common = ["--model-path", model, "--dtype", given.dtype, "--mem-fraction-static", given.mem_fraction_static]
        common += ["--max-running-requests", str(given.max_running_requests), "--enable-metrics"]
        common += ["--decode-log-interval", "8"]  # the metrics are as old as the log's last line
        if given.max_prefill_tokens is not None:
            common += ["--max-prefill-tokens", str(given.max_prefill_tokens)]
        dense = [] if on_gpu else ["--device", "cpu", "--attention-backend", "torch_native"]
        platform_name = {} if on_gpu else {"SGLANG_PLATFORM": "rotatek"}
        options = ["--sparsity", str(given.sparsity), "--text-share", str(given.text_share)]
        if given.basis is not None:
            options = ["--basis", given.basis, "--bits", given.bits]
        limit = [] if given.max_total_tokens is None else ["--max-total-tokens", str(given.max_total_tokens)]
        servers: dict[str, tuple[list[str], dict[str, str]]] = {
            "compressed": (["rotatek_sglang.launch", *common, *options, *limit], {}),
            "dense, defaults": (["sglang.launch_server", *common, *dense], platform_name),
            "dense, features off": (["sglang.launch_server", *common, *dense, *FEATURES_OFF], platform_name),
        }
        if on_gpu and given.basis is None:  # off by default where text is dense
            servers["compressed, CUDA graphs"] = (
                ["rotatek_sglang.launch", *common, *options, *limit, "--cuda-graphs"],
                {},
            )
        rows: dict[str, dict[str, float]] = {}
        for label, (command, environment) in servers.items():
            log = folder / "server.log"
            with running(command, log, environment) as port:
                info = json.loads(fetch(port, "/server_info"))
                figures = load(port, model, given, folder)
                figures |= burst(port, given, log)
            rows[label] = {**figures, "tokens_that_fit": info["max_total_num_tokens"]}
            if label == "compressed" and given.max_total_tokens is not None:
                fits = re.findall(r"where a dense cache would hold ([\d,]+)", log.read_text(encoding="utf-8"))[0]
                for kind, (other, _) in servers.items():
                    if kind.startswith("dense"):
                        other += ["--max-total-tokens", fits.replace(",", "")]
            print(label, {name: round(value, 2) for name, value in rows[label].items()}, flush=True)

    width = max(map(len, rows))
    print(" " * width, *(f"{label:>22}" for label in FIGURES.values()))
    for label, row in rows.items():
        print(f"{label:{width}}", *(f"{row[name]:22,.2f}" for name in FIGURES))
    machine = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    found = {
        "settings": {name: value for name, value in vars(given).items() if name != "out"},
        "machine": machine,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "sglang", "transformers")},
        "command": shlex.join(["python", "evals/bench/serving.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(rows, given.out.with_suffix(".png"), f"{given.model} on {machine}")


if __name__ == "__main__":
    main()
