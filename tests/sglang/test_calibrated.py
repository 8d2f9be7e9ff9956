"""A calibrated basis with coded Keys and Values, on another family, asked through plain SGLang's server.

Two processes share the model (tensor parallelism), each with one of the two KV heads, and prompts come in chunks.
"""

import os
import re

import pytest
from oracle import calibrate_basis, greedy_logprobs
from serving import Server, message, picture

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

OPTIONS = {"sparsity": 0.8, "key_bits": "auto", "value_sparsity": 0.8, "value_bits": "auto"}
POOL = ["--dtype", "float32", "--max-total-tokens", "2048", "--mem-fraction-static", "0.3", "--random-seed", "0"]


@pytest.fixture(scope="module")
def basis(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("basis") / "qwen3_vl.safetensors"
    calibrate_basis(tiny("qwen3_vl"), [message("what is this?", picture(50 + seed)) for seed in range(3)], path)
    return str(path)


@pytest.fixture(scope="module")
def server(tiny, logs, basis):
    arguments = ["--model-path", tiny("qwen3_vl"), "--device", "cpu", *POOL, "--max-running-requests", "8"]
    arguments += ["--chunked-prefill-size", "48", "--tp-size", "2"]
    # On a CPU SGLang wants to be told which cores each process runs on.
    environment = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(rank % os.cpu_count()) for rank in range(2))}
    environment |= {f"ROTATEK_{name.upper()}": str(value) for name, value in {**OPTIONS, "basis": basis}.items()}
    log = logs / "calibrated.log"
    with Server("sglang.launch_server", *arguments, log=log, environment=environment) as running:
        yield running


@pytest.mark.parametrize("images", [0, 1, 2], ids=["text", "image", "two images"])
def test_answers_are_those_of_the_cache_in_transformers(server, tiny, basis, images):
    request = message("what is in this image?", *(picture(60 + each, 256, 320) for each in range(images)))
    expected = greedy_logprobs(tiny("qwen3_vl"), request, basis=basis, **OPTIONS)
    server.flush()
    assert server.ask(request).logprobs == pytest.approx(expected, abs=5e-5)


def test_in_one_batch(server, tiny, basis):
    requests = [message("what is in this image?", picture(70 + index, 256, 256 + 32 * index)) for index in range(3)]
    requests.append(message("hello"))
    answers = server.ask_all([((request,), {}) for request in requests])
    for request, answer in zip(requests, answers, strict=True):
        expected = greedy_logprobs(tiny("qwen3_vl"), request, basis=basis, **OPTIONS)
        # Keys that differ in their last bit between batch sizes may get another code of 2 bits: a wider tolerance.
        assert answer.logprobs == pytest.approx(expected, abs=1e-3)


def test_each_process_has_heads_of_its_own(server):
    assert server.log_text().count("RotateK (process ") == 2


def test_codes_take_few_bytes_and_a_basis_only_its_means(server):
    said = re.search(r"a text token takes ([\d,]+) bytes, a visual one ([\d,]+), a basis ([\d,]+);", server.log_text())
    text, visual, basis = (int(number.replace(",", "")) for number in said.groups())
    # One KV head in each process, 3 layers; dense, 4 bytes for each of 64 + 64 channels; coded, at most 204 bits for
    # Keys and 204 for Values, spent on whole blocks of channels.
    assert text == 3 * 128 * 4
    assert 3 * 2 * 20 < visual <= 3 * 2 * 204 // 8
    assert basis == 3 * 128 * 4  # the means
