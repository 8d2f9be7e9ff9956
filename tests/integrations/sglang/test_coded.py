"""All tokens coded, asked through servers: as dense SGLang at full bits, as `RotateKCache` at few."""

import pytest
from oracle import calibrate_basis
from serving import VIDEOS, Server, message, picture, video

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

WORDS = "the quick brown fox jumps over the lazy dog "
COMMON = ["--dtype", "float32", "--device", "cpu", "--mem-fraction-static", "0.3", "--random-seed", "0"]
LIMITS = ["--max-total-tokens", "8192", "--max-running-requests", "16", "--enable-cache-report", *VIDEOS]
REQUESTS = {
    "a word": message("hello"),
    "long text": message(WORDS * 12),
    "image": message("what is in this image?", picture(1)),
    "image and long text": message(WORDS * 6, picture(2, 448, 140)),
    "small image": message("and this one?", picture(3, 56, 56)),
    "two images": message("what changed?", picture(4), picture(5, 168, 252)),
    "another question": message("is there a red circle on a blue square?", picture(1)),  # on the image of "image"
    "video": message("what happens?", video(1)),
    "second turn": [
        *message("what is in this image?", picture(6)),
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]},
        *message("and in this image?", picture(7, 140, 140)),
    ],
}


@pytest.fixture(scope="module")
def basis(tiny, tmp_path_factory):
    """A basis of text and images."""
    path = tmp_path_factory.mktemp("basis") / "tokens.safetensors"
    prompts = [message(WORDS * (1 + seed), picture(50 + seed)) for seed in range(3)]
    calibrate_basis(tiny("qwen2_5_vl"), [*prompts, message(WORDS * 20)], path, text=True)
    return str(path)


@pytest.fixture(scope="module")
def dense(tiny, logs):
    """Answers of dense SGLang, one after the other."""
    arguments = ["--model-path", tiny("qwen2_5_vl"), *COMMON, *LIMITS, "--attention-backend", "torch_native"]
    environment = {"SGLANG_PLATFORM": "rotatek"}
    with Server("sglang.launch_server", *arguments, log=logs / "dense.log", environment=environment) as running:
        return {name: running.ask(request, 16) for name, request in REQUESTS.items()}


class TestFullBits:
    """Whole coefficients in all directions: nothing is lost, whatever is shared, cut or batched."""

    @pytest.fixture(scope="class")
    def server(self, tiny, logs, basis):
        arguments = ["--model-path", tiny("qwen2_5_vl"), *COMMON, *LIMITS, "--chunked-prefill-size", "32"]
        arguments += ["--basis", basis, "--bits", "16"]
        with Server("rotatek_sglang.launch", *arguments, log=logs / "coded16.log") as running:
            yield running

    @pytest.mark.parametrize("name", REQUESTS)
    def test_alone(self, server, dense, name):
        answer = server.ask(REQUESTS[name], 16)
        assert answer.status == dense[name].status == 200
        assert answer.prompt_tokens == dense[name].prompt_tokens
        assert answer.logprobs == pytest.approx(dense[name].logprobs, abs=5e-5)

    def test_prompts_came_in_chunks(self, server):
        server.flush()
        before = server.log_text().count("#new-token: 32,")
        tokens = server.ask(REQUESTS["two images"], 1).prompt_tokens
        assert server.log_text().count("#new-token: 32,") - before == tokens // 32

    def test_a_cached_prefix_is_used_again(self, server, dense):
        server.flush()
        for name in ("image", "long text"):
            first, again = server.ask(REQUESTS[name], 16), server.ask(REQUESTS[name], 16)
            assert again.cached_tokens > first.cached_tokens
            assert again.cached_tokens >= again.prompt_tokens - 2
            assert again.logprobs == pytest.approx(dense[name].logprobs, abs=5e-5)
        assert server.ask(REQUESTS["another question"], 16).cached_tokens >= 64

    @pytest.mark.parametrize("flushed", [True, False], ids=["nothing cached", "cached"])
    def test_in_mixed_batches(self, server, dense, flushed):
        if flushed:
            server.flush()
        names = [*REQUESTS, *reversed(REQUESTS)]
        answers = server.ask_all([((REQUESTS[name], 16), {}) for name in names])
        for name, answer in zip(names, answers, strict=True):
            assert answer.logprobs == pytest.approx(dense[name].logprobs, abs=5e-5), name
