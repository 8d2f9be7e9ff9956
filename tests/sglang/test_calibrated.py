"""A calibrated basis with coded Keys and Values, on another family, asked through plain SGLang's server.

Once two processes share the model (tensor parallelism), each with one of the two KV heads; once one process has both,
each with codes of its own. Prompts come in chunks.
"""

import os
import re

import pytest
from oracle import calibrate_basis, greedy_logprobs
from serving import Server, message, picture

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

OPTIONS = {"sparsity": 0.8, "key_bits": "auto", "value_sparsity": 0.8, "value_bits": "auto"}
PROCESSES = {"layers": 2, "heads": 1}
POOL = ["--dtype", "float32", "--max-total-tokens", "2048", "--mem-fraction-static", "0.3", "--random-seed", "0"]


@pytest.fixture(scope="module")
def basis(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("basis") / "qwen3_vl.safetensors"
    calibrate_basis(tiny("qwen3_vl"), [message("what is this?", picture(50 + seed)) for seed in range(3)], path)
    return str(path)


@pytest.fixture(scope="module", params=["layers", "heads"])
def options(request, basis):
    return {**OPTIONS, "basis": basis, "allocation": request.param}


@pytest.fixture(scope="module")
def server(tiny, logs, options):
    processes = PROCESSES[options["allocation"]]
    arguments = ["--model-path", tiny("qwen3_vl"), "--device", "cpu", *POOL, "--max-running-requests", "8"]
    arguments += ["--chunked-prefill-size", "48", "--tp-size", str(processes)]
    # On a CPU SGLang wants to be told which cores each process runs on.
    environment = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(rank % os.cpu_count()) for rank in range(processes))}
    environment |= {f"ROTATEK_{name.upper()}": str(value) for name, value in options.items()}
    log = logs / f"calibrated_{options['allocation']}.log"
    with Server("sglang.launch_server", *arguments, log=log, environment=environment) as running:
        yield running


@pytest.mark.parametrize("images", [0, 1, 2], ids=["text", "image", "two images"])
def test_answers_are_those_of_the_cache_in_transformers(server, tiny, options, images):
    request = message("what is in this image?", *(picture(60 + each, 256, 320) for each in range(images)))
    expected = greedy_logprobs(tiny("qwen3_vl"), request, **options)
    server.flush()
    assert server.ask(request).logprobs == pytest.approx(expected, abs=5e-5)


def test_in_one_batch(server, tiny, options):
    requests = [message("what is in this image?", picture(70 + index, 256, 256 + 32 * index)) for index in range(3)]
    requests.append(message("hello"))
    answers = server.ask_all([((request,), {}) for request in requests])
    for request, answer in zip(requests, answers, strict=True):
        expected = greedy_logprobs(tiny("qwen3_vl"), request, **options)
        # Keys that differ in their last bit between batch sizes may get another code of 2 bits: a wider tolerance.
        assert answer.logprobs == pytest.approx(expected, abs=1e-3)


def test_each_process_has_heads_of_its_own(server, options):
    assert server.log_text().count("RotateK (process ") == PROCESSES[options["allocation"]]


def test_codes_take_few_bytes_and_a_basis_only_its_means(server, options):
    said = re.search(r"a text token takes ([\d,]+) bytes, a visual one ([\d,]+), a basis ([\d,]+);", server.log_text())
    text, visual, basis = (int(number.replace(",", "")) for number in said.groups())
    heads = 3 * 2 // PROCESSES[options["allocation"]]  # 3 layers of 2 KV heads
    # Dense, 4 bytes for each of 64 + 64 channels; coded, at most 204 bits for Keys and 204 for Values on average, spent
    # on whole blocks of channels.
    assert text == heads * 128 * 4
    assert heads * 2 * 20 < visual <= heads * 2 * 204 // 8
    assert basis == heads * 128 * 4  # the means
