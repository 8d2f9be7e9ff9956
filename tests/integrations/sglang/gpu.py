"""The plug-in on a GPU, in minutes: a tiny Qwen2.5-VL served with all tokens coded, beside dense SGLang.

    python tests/integrations/sglang/gpu.py --out runs/gpu_serving.json
    python tests/integrations/sglang/gpu.py --device cpu --rounds 1 --at-once 4 --length 200    # a rehearsal

The installation is the smallest that serves: torch with CUDA and triton as they are on the machine, and the packages of
requirements-cpu.txt without these, installed by `pip install --no-deps`. SGLang's own kernels are not needed: every
operator runs in torch, and `no_kernels` stands in for their package where it is not installed.

It prints, and stores:

- **answers** in float32: the largest difference of log-probabilities from the cache in transformers on the CPU;
- **requests** of all kinds at random, one in six given up by its client, others taken back: what is in use afterwards;
- **time** of a decode step of bfloat16, graphs on, both servers running and asked in turn: milliseconds, and the ratio.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from oracle import calibrate_basis, greedy_logprobs  # noqa: E402
from serving import Server, message, picture  # noqa: E402
from soak import SMALL_POOL, soak  # noqa: E402

QUESTIONS = {
    "text": message("the quick brown fox jumps over the lazy dog " * 12),
    "image": message("what is in this image?", picture(1)),
    "two images": message("what changed?", picture(4), picture(5, 168, 252)),
}
BITS, STEPS = 4, (16, 80)  # tokens of the two answers whose difference in time is that of a decode step
TOLERANCE = 5e-3


def environment(device):
    """What lets SGLang run without its kernels."""
    if device == "cpu":
        return {"SGLANG_PLATFORM": "rotatek"}  # dense serving in plain torch, too
    given = {"SGLANG_FORCE_FUSED_OP_BACKEND": "native", "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1"}
    if importlib.util.find_spec("sgl_kernel") is None:
        paths = [str(HERE / "no_kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
        given["PYTHONPATH"] = os.pathsep.join(paths)
    return given


def alone(given, log):
    """What a server is started with: a process that has imported SGLang for a CPU forks none for CUDA."""
    return {"log": log, "environment": environment(given.device), "alone": True}


def flags(device, coded, basis):
    """Flags of a server."""
    common = ["--device", device, "--mem-fraction-static", "0.3"]
    if device != "cpu":
        common += ["--sampling-backend", "pytorch", "--mm-attention-backend", "sdpa"]
    if coded:
        return ["rotatek_sglang.launch", "--basis", basis, "--bits", str(BITS), *common]
    return ["sglang.launch_server", "--attention-backend", "torch_native" if device == "cpu" else "triton", *common]


def answers_and_requests(given, model, basis, folder):
    """Ask a small pool; what it answers, and what is left of many requests."""
    command = [*flags(given.device, True, basis), "--model-path", model, *SMALL_POOL, "--chunked-prefill-size", "-1"]
    with Server(*command, **alone(given, folder / "coded.log")) as server:
        differences = {}
        for name, question in QUESTIONS.items():
            expected = greedy_logprobs(model, question, tokens=40, basis=basis, text="coded", bits=BITS)
            answer = server.ask(question, 40)
            differences[name] = max(abs(a - b) for a, b in zip(answer.logprobs, expected, strict=True))
        server.flush()
        before = server.ask(QUESTIONS["image"], 16)
        outcomes = soak(server, given.requests, longest=100, pause=1)
        left = server.settled()
        graphs = "graph: True" in server.log_text()
        return {
            "difference": differences,
            "graphs": graphs,
            "outcomes": {f"{kind}: {status}": count for (kind, status), count in sorted(outcomes.items(), key=str)},
            "in_use_afterwards": {name: value for name, value in left.items() if name.endswith("used")},
            "same_answer_afterwards": before == server.ask(QUESTIONS["image"], 16),
        }


def seconds(server, prompts, tokens):
    """Time of the answers to prompts that are asked at once."""
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    began = time.perf_counter()
    server.post("/generate", {"input_ids": prompts, "sampling_params": sampling})
    return time.perf_counter() - began


def step_times(given, model, basis, folder):
    """Milliseconds of a decode step, coded and dense, measured in turn."""
    draw = random.Random(0)
    prompts = [[draw.randrange(390) for _ in range(given.length)] for _ in range(given.at_once)]
    pool = given.at_once * (given.length + max(STEPS) + 8) + 1024
    found = {"coded": [], "dense": []}
    with contextlib.ExitStack() as running:
        servers = {}
        for name in found:
            command = [*flags(given.device, name == "coded", basis), "--model-path", model, "--dtype", "bfloat16"]
            command += ["--max-total-tokens", str(pool), "--max-running-requests", str(given.at_once)]
            servers[name] = running.enter_context(Server(*command, **alone(given, folder / f"{name}.log")))
            for tokens in STEPS:  # what is asked for the first time takes longer; the prompts are cached from here on
                seconds(servers[name], prompts, tokens)
        for _ in range(given.rounds):
            for name, server in servers.items():
                short, long = (seconds(server, prompts, tokens) for tokens in STEPS)
                found[name].append(1000 * (long - short) / (STEPS[1] - STEPS[0]))
    ratios = [coded / dense for coded, dense in zip(found["coded"], found["dense"], strict=True)]
    return {"milliseconds": found, "ratio": statistics.median(ratios), "ratios": ratios}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=64, help="requests whose decode steps are timed")
    parser.add_argument("--length", type=int, default=4096, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    from rotatek_sglang.tiny import save_model

    found = {"settings": {name: value for name, value in vars(given).items() if name != "out"}}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model, basis = str(folder / "model"), str(folder / "basis.safetensors")
        save_model("qwen2_5_vl", Path(model))
        calibrate_basis(model, list(QUESTIONS.values()), basis, text=True)
        found |= answers_and_requests(given, model, basis, folder)
        print(json.dumps(found, indent=1), flush=True)
        found["step"] = step_times(given, model, basis, folder)
    step = found["step"]
    for name, times in step["milliseconds"].items():
        print(f"{name}: {statistics.median(times):.3f} ms a decode step of {given.at_once} x {given.length:,} tokens")
    print(f"coded / dense: {step['ratio']:.3f} (rounds {min(step['ratios']):.3f} to {max(step['ratios']):.3f})")
    import torch

    found["machine"] = {
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "CPU",
        **{name: importlib.metadata.version(name) for name in ("sglang", "torch", "triton", "transformers")},
    }
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    in_use = any(found["in_use_afterwards"].values()) or not found["same_answer_afterwards"]
    wrong = [name for name, value in found["difference"].items() if value > TOLERANCE]
    no_graphs = given.device == "cuda" and not found["graphs"]
    busy = min(map(min, step["milliseconds"].values())) <= 0  # more tokens took less time: nothing was timed
    if in_use or wrong or no_graphs or busy:
        said = f"answers {wrong}, left in use {in_use}, no graphs {no_graphs}, machine too busy to be timed {busy}"
        sys.exit(f"not as it should be: {said}")


if __name__ == "__main__":
    main()
