"""At full rank nothing is lost: log-probabilities of dense SGLang, alone and in mixed batches, in float32.

Dense SGLang reads every prompt at once; the compressed server reads all but the shortest in chunks.
"""

import pytest
from serving import VIDEOS, Server, message, picture, video

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

COMMON = ["--dtype", "float32", "--device", "cpu", "--max-total-tokens", "8192", "--mem-fraction-static", "0.3"]
LIMITS = ["--max-running-requests", "16", "--random-seed", "0", "--enable-cache-report", "--enable-metrics", *VIDEOS]
REQUESTS = {
    "text": message("hello"),
    "long text": message("the quick brown fox jumps over the lazy dog " * 12),
    "image": message("what is in this image?", picture(1)),
    "wide image": message("describe the picture, please.", picture(2, 448, 140)),
    "small image": message("and this one?", picture(3, 56, 56)),
    "two images": message("what changed?", picture(4), picture(5, 168, 252)),
    "another question": message("is there a red circle on a blue square?", picture(1)),  # on the image of "image"
    "image beyond the visual rows": message("what is this?", picture(9, 784, 784)),
    "video": message("what happens?", video(1)),
    "video and image": message("is this from it?", video(2, frames=4, seconds=2), picture(8, 112, 112)),
    "second turn": [
        *message("what is in this image?", picture(6)),
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]},
        *message("and in this image?", picture(7, 140, 140)),
    ],
}


@pytest.fixture(scope="module")
def dense(tiny, logs):
    """Answers of dense SGLang, one after the other."""
    arguments = ["--model-path", tiny("qwen2_5_vl"), *COMMON, *LIMITS, "--attention-backend", "torch_native"]
    environment = {"SGLANG_PLATFORM": "rotatek"}
    with Server("sglang.launch_server", *arguments, log=logs / "dense.log", environment=environment) as running:
        return {name: running.ask(request, 16) for name, request in REQUESTS.items()}


@pytest.fixture(scope="module")
def server(tiny, logs, dense):
    """All ranks, by the environment alone, as plain `sglang.launch_server` takes it.

    It decodes from the fixed buffers that CUDA graphs would read, filled for another batch in every step.
    """
    arguments = ["--model-path", tiny("qwen2_5_vl"), *COMMON, *LIMITS, "--chunked-prefill-size", "32"]
    environment = {"ROTATEK_RANK": "64", "ROTATEK_ALWAYS_COMPRESS": "1", "ROTATEK_CUDA_GRAPHS": "1"}
    environment["ROTATEK_TEXT_SHARE"] = "0.925"  # leaves 614 visual rows, for all images but one and all videos
    with Server("sglang.launch_server", *arguments, log=logs / "full.log", environment=environment) as running:
        yield running


@pytest.mark.parametrize("name", REQUESTS)
def test_alone(server, dense, name):
    answer = server.ask(REQUESTS[name], 16)
    assert answer.status == dense[name].status == 200
    assert answer.prompt_tokens == dense[name].prompt_tokens
    assert answer.logprobs == pytest.approx(dense[name].logprobs, abs=5e-5)
    assert answer.text == dense[name].text


def test_prompts_came_in_chunks(server, dense):
    server.flush()
    before = server.log_text().count("#new-token: 32,")
    tokens = server.ask(REQUESTS["two images"], 1).prompt_tokens
    assert server.log_text().count("#new-token: 32,") - before == tokens // 32


def test_an_image_for_which_there_are_too_few_visual_rows_is_stored_as_text(server, dense):
    server.flush()
    assert server.ask(REQUESTS["image beyond the visual rows"], 1).prompt_tokens > 784
    held = server.metrics()
    assert held["rotatek_visual_rows"] == 614
    assert held["rotatek_visual_rows_used"] == 0
    assert held["rotatek_text_rows_used"] > 784


def test_a_cached_image_is_used_again(server, dense):
    server.flush()
    assert server.ask(REQUESTS["image"], 16).cached_tokens == 0
    again = server.ask(REQUESTS["another question"], 16)
    assert again.cached_tokens >= 64  # the tokens of the image
    assert again.logprobs == pytest.approx(dense["another question"].logprobs, abs=5e-5)


@pytest.mark.parametrize("flushed", [True, False], ids=["nothing cached", "cached"])
def test_in_mixed_batches(server, dense, flushed):
    if flushed:
        server.flush()
    names = [*REQUESTS, *reversed(REQUESTS)]
    answers = server.ask_all([((REQUESTS[name], 16), {}) for name in names])
    for name, answer in zip(names, answers, strict=True):
        assert answer.logprobs == pytest.approx(dense[name].logprobs, abs=5e-5), name
