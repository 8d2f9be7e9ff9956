"""At full rank nothing is lost: log-probabilities of dense SGLang, alone and in mixed batches, in float32."""

import pytest
from prompts import REQUESTS, TOKENS, check_mixed_batches
from serving import VIDEOS, Server

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

COMMON = ["--dtype", "float32", "--device", "cpu", "--max-total-tokens", "8192", "--mem-fraction-static", "0.3"]
LIMITS = ["--max-running-requests", "16", "--random-seed", "0", "--enable-cache-report", "--enable-metrics", *VIDEOS]


@pytest.fixture(scope="module")
def server(tiny, logs):
    """All ranks, by the environment alone, as plain `sglang.launch_server` takes it.

    It decodes from the fixed buffers that CUDA graphs would read, filled for another batch in every step.
    """
    arguments = ["--model-path", tiny("qwen2_5_vl"), *COMMON, *LIMITS, "--chunked-prefill-size", "32"]
    environment = {"ROTATEK_RANK": "64", "ROTATEK_ALWAYS_COMPRESS": "1", "ROTATEK_CUDA_GRAPHS": "1"}
    environment["ROTATEK_TEXT_SHARE"] = "0.925"  # leaves 614 visual rows, for all images but one and all videos
    with Server(
        "sglang.launch_server", *arguments, log=logs / "full.log", environment=environment, alone=True
    ) as running:
        yield running


@pytest.mark.parametrize("name", REQUESTS)
def test_alone(server, dense, name):
    answer = server.ask(REQUESTS[name], TOKENS)
    assert answer.status == dense.answers[name].status == 200
    assert answer.prompt_tokens == dense.answers[name].prompt_tokens
    assert answer.logprobs == pytest.approx(dense.answers[name].logprobs, abs=5e-5)
    assert answer.text == dense.answers[name].text


def test_prompts_came_in_chunks(server, dense):
    server.flush()
    before = server.log_text().count("#new-token: 32,")
    tokens = server.ask(REQUESTS["two images"], 1).prompt_tokens
    assert server.log_text().count("#new-token: 32,") - before == tokens // 32


def test_an_image_for_which_there_are_too_few_visual_rows_is_stored_as_text(server, dense):
    server.flush()
    assert server.ask(REQUESTS["large image"], 1).prompt_tokens > 784
    held = server.metrics()
    assert held["rotatek_visual_rows"] == 614
    assert held["rotatek_visual_rows_used"] == 0
    assert held["rotatek_text_rows_used"] > 784


def test_a_cached_image_is_used_again(server, dense):
    server.flush()
    assert server.ask(REQUESTS["image"], TOKENS).cached_tokens == 0
    again = server.ask(REQUESTS["another question"], TOKENS)
    assert again.cached_tokens >= 64  # the tokens of the image
    assert again.logprobs == pytest.approx(dense.answers["another question"].logprobs, abs=5e-5)


@pytest.mark.parametrize("flushed", [True, False], ids=["nothing cached", "cached"])
def test_in_mixed_batches(server, dense, flushed):
    check_mixed_batches(server, dense, flushed)
