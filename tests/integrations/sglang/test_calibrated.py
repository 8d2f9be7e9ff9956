"""A calibrated basis with coded Keys and Values, on other families, asked through plain SGLang's server.

Once two processes share the model (tensor parallelism), each with one of the two KV heads; once one process has both,
each with codes of its own. Prompts come in chunks.
"""

import dataclasses
import os
import re
import urllib.error

import pytest
from oracle import calibrate_basis, greedy_logprobs
from serving import Server, message, picture

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

OPTIONS = {"sparsity": 0.8, "key_bits": "auto", "value_sparsity": 0.8, "value_bits": "auto"}
# Keys that differ in their last bit, from another library or batch size, may get another code of 2 bits.
CODES = 1e-3
# Pictures of multiples of 224 pixels are not resized, neither to blocks of 28 pixels nor to those of 32.
POOL = ["--dtype", "float32", "--max-total-tokens", "2048", "--mem-fraction-static", "0.3", "--random-seed", "0"]


@dataclasses.dataclass(frozen=True)
class Setting:
    model: str
    layers: int
    processes: int
    options: dict[str, object]


@pytest.fixture(scope="module", params=[("qwen3_vl", 3, 2, "layers"), ("qwen2_vl", 2, 1, "heads")], ids=["tp", "heads"])
def setting(request, tiny, tmp_path_factory):
    name, layers, processes, allocation = request.param
    path = tmp_path_factory.mktemp("basis") / f"{name}.safetensors"
    calibrate_basis(tiny(name), [message("what is this?", picture(50 + seed)) for seed in range(3)], path)
    return Setting(tiny(name), layers, processes, {**OPTIONS, "basis": str(path), "allocation": allocation})


@pytest.fixture(scope="module")
def server(logs, setting):
    arguments = ["--model-path", setting.model, "--device", "cpu", *POOL, "--max-running-requests", "8"]
    arguments += ["--chunked-prefill-size", "48", "--tp-size", str(setting.processes)]
    arguments += ["--allow-auto-truncate"]
    # On a CPU SGLang wants to be told which cores each process runs on.
    cores = "|".join(str(rank % os.cpu_count()) for rank in range(setting.processes))
    environment = {f"ROTATEK_{name.upper()}": str(value) for name, value in setting.options.items()}
    log = logs / f"calibrated_{setting.processes}.log"
    environment["SGLANG_CPU_OMP_THREADS_BIND"] = cores
    with Server("sglang.launch_server", *arguments, log=log, environment=environment) as running:
        yield running


@pytest.mark.parametrize("images", [0, 1, 2], ids=["text", "image", "two images"])
def test_answers_are_those_of_the_cache_in_transformers(server, setting, images):
    request = message("what is in this image?", *(picture(60 + each, 224, 448) for each in range(images)))
    expected = greedy_logprobs(setting.model, request, **setting.options)
    server.flush()
    assert server.ask(request).logprobs == pytest.approx(expected, abs=CODES if images else 5e-5)


def test_in_one_batch(server, setting):
    sizes = [(224, 224), (224, 448), (448, 224)]
    requests = [message("what is in this image?", picture(70 + index, *size)) for index, size in enumerate(sizes)]
    requests.append(message("hello"))
    answers = server.ask_all([((request,), {}) for request in requests])
    for request, answer in zip(requests, answers, strict=True):
        expected = greedy_logprobs(setting.model, request, **setting.options)
        assert answer.logprobs == pytest.approx(expected, abs=CODES)


def test_a_text_for_which_there_are_too_few_rows_is_cut_where_sglang_is_asked_to(server, setting):
    """To the 512 text rows, less the two that the answer takes; without the flag it is an error."""
    answer = server.ask(message("fox " * 150), 4)
    assert (answer.status, answer.prompt_tokens, len(answer.logprobs)) == (200, 510, 1)
    assert "was cut to the 512 text rows" in server.log_text()
    images = server.ask(message("fox " * 150, picture(80)), 4)
    assert images.status == 400  # as in SGLang


def test_each_process_has_heads_of_its_own(server, setting):
    assert server.log_text().count("RotateK (process ") == setting.processes


def test_other_weights_are_refused(server, setting):
    """The basis belongs to those that it was calibrated on."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post("/update_weights_from_disk", {"model_path": setting.model})
    assert "calibrated on those that are served" in caught.value.read().decode()
    assert server.ask(message("hello")).logprobs == pytest.approx(
        greedy_logprobs(setting.model, message("hello"), **setting.options), abs=5e-5
    )


def test_codes_take_few_bytes_and_a_basis_only_its_means(server, setting):
    said = re.search(r"a text token takes ([\d,]+) bytes, a visual one ([\d,]+), a basis ([\d,]+);", server.log_text())
    text, visual, basis = (int(number.replace(",", "")) for number in said.groups())
    heads = setting.layers * 2 // setting.processes
    # Dense, 4 bytes for each of 64 + 64 channels; coded, at most 204 bits for Keys and 204 for Values on average, spent
    # on whole blocks of channels.
    assert text == heads * 128 * 4
    assert heads * 2 * 20 < visual <= heads * 2 * 204 // 8
    assert basis == heads * 128 * 4  # the means
