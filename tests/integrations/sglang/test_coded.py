"""All tokens coded, asked through servers: as dense SGLang at full bits, as `RotateKCache` at few."""

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from load import REFUSED, hit_rate, waits
from oracle import calibrate_basis, greedy_logprobs
from prompts import REQUESTS, TOKENS, WORDS, check_mixed_batches
from serving import VIDEOS, Server, message, picture
from soak import HUGE, SMALL_POOL, drop, hang_up, soak

from rotatek_sglang import launch

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

COMMON = ["--dtype", "float32", "--device", "cpu", "--mem-fraction-static", "0.3", "--random-seed", "0"]
LIMITS = ["--max-total-tokens", "8192", "--max-running-requests", "16", "--enable-cache-report", *VIDEOS]


class TestFullBits:
    """Whole coefficients in all directions: nothing is lost, whatever is shared, cut or batched."""

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tiny, logs, basis):
        arguments = ["--model-path", tiny("qwen2_5_vl"), *COMMON, *LIMITS, "--chunked-prefill-size", "32"]
        arguments += ["--basis", basis, "--bits", "16", "--enable-mixed-chunk"]
        with Server("rotatek_sglang.launch", *arguments, log=logs / "coded16.log") as running:
            yield running

    @pytest.mark.parametrize("name", REQUESTS)
    def test_alone(self, server, dense, name):
        answer = server.ask(REQUESTS[name], TOKENS)
        assert answer.status == dense.answers[name].status == 200
        assert answer.prompt_tokens == dense.answers[name].prompt_tokens
        assert answer.logprobs == pytest.approx(dense.answers[name].logprobs, abs=5e-5)

    def test_prompts_came_in_chunks(self, server):
        server.flush()
        before = server.log_text().count("#new-token: 32,")
        tokens = server.ask(REQUESTS["two images"], 1).prompt_tokens
        assert server.log_text().count("#new-token: 32,") - before == tokens // 32

    def test_a_cached_prefix_is_used_again(self, server, dense):
        server.flush()
        for name in ("image", "long text"):
            first, again = server.ask(REQUESTS[name], TOKENS), server.ask(REQUESTS[name], TOKENS)
            assert again.cached_tokens > first.cached_tokens
            assert again.cached_tokens >= again.prompt_tokens - 2
            assert again.logprobs == pytest.approx(dense.answers[name].logprobs, abs=5e-5)
        assert server.ask(REQUESTS["another question"], TOKENS).cached_tokens >= 64

    @pytest.mark.parametrize("flushed", [True, False], ids=["nothing cached", "cached"])
    def test_in_mixed_batches(self, server, dense, flushed):
        check_mixed_batches(server, dense, flushed)


class TestFourBits:
    """Prompts read at once: the answers of the cache in transformers."""

    # Another library or batch size moves a state a little, and now and then a code with it.
    CODES = 2e-3

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tiny, logs, basis):
        arguments = ["--model-path", tiny("qwen2_5_vl"), *COMMON, *LIMITS, "--chunked-prefill-size", "-1"]
        arguments += ["--basis", basis, "--bits", "4"]
        with Server("rotatek_sglang.launch", *arguments, log=logs / "coded4.log") as running:
            yield running

    @pytest.mark.parametrize("name", ["a word", "long text", "image", "image and long text", "two images"])
    def test_answers_are_those_of_the_cache_in_transformers(self, server, tiny, basis, dense, name):
        options = {"basis": basis, "text": "coded", "bits": 4}
        expected = greedy_logprobs(tiny("qwen2_5_vl"), REQUESTS[name], tokens=TOKENS, **options)
        server.flush()
        answer = server.ask(REQUESTS[name], TOKENS)
        assert answer.logprobs == pytest.approx(expected, abs=self.CODES)
        if answer.prompt_tokens > 100:  # what 4 bits change is larger than what is forgiven above
            assert (
                max(abs(a - b) for a, b in zip(answer.logprobs, dense.answers[name].logprobs, strict=True)) > self.CODES
            )

    def test_many_at_once_are_each_alone(self, server):
        requests = [message(WORDS * count, picture(60 + count)) for count in range(1, 9)]
        server.flush()
        alone = [server.ask(request, 80) for request in requests]
        server.flush()
        together = server.ask_all([((request, 80), {}) for request in requests])
        for one, other in zip(alone, together, strict=True):
            assert other.logprobs == pytest.approx(one.logprobs, abs=self.CODES)

    def test_other_weights_are_refused(self, server, tiny):
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.post("/update_weights_from_disk", {"model_path": tiny("qwen2_5_vl")})
        assert "calibrated on those that are served" in caught.value.read().decode()


IN_USE = ("rotatek_rows_used", "rotatek_sinks_used", "rotatek_rings_used")
TEXT = message("the quick brown fox")
IMAGE = message("what is in this image?", picture(1))


class TestSmallPool:
    """1,200 tokens, chunks of 48, few beginnings: everything is short, and everything comes back."""

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tiny, logs, basis):
        arguments = ["--model-path", tiny("qwen2_5_vl"), *SMALL_POOL, "--basis", basis, "--bits", "4"]
        arguments += ["--beginnings", "12", "--served-model-name", "tiny"]
        with Server("rotatek_sglang.launch", *arguments, log=logs / "coded_small.log") as running:
            yield running

    @pytest.fixture
    def untouched(self, server):
        """Whatever a test does: afterwards all is free and a fixed request is answered as before."""
        server.flush()
        before = [server.ask(probe) for probe in (TEXT, IMAGE)]
        yield
        left = server.settled()
        assert {name: left[name] for name in IN_USE} == dict.fromkeys(IN_USE, 0.0)
        assert [server.ask(probe) for probe in (TEXT, IMAGE)] == before

    def test_the_log_says_what_is_stored(self, server):
        log = server.log_text()
        # 2 KV heads, 2 layers, 4 bytes, 64 + 64 channels; at 4 bits an eighth of them.
        assert "all tokens coded, bits Keys 4, Values 4; a token takes 256 bytes, dense 2,048" in log
        assert "for the 64 last tokens of each of 12 requests at once" in log
        assert "for the 4 first of 12 prompts; 1,200 tokens fit" in log
        idle = server.settled()
        assert (idle["rotatek_rows"], idle["rotatek_sinks"], idle["rotatek_rings"]) == (1200, 48, 12)
        assert idle["rotatek_compression_ratio"] == 1

    def test_prompts_larger_than_the_pool_are_errors_for_themselves(self, server, untouched):
        huge = message("?", HUGE, picture(98, 896, 896))
        answers = server.ask_all([((huge,), {}), ((TEXT,), {}), ((message("fox " * 1300),), {})])
        assert [answer.status for answer in answers] == [400, 200, 400]
        assert server.ask(message("?", HUGE), 2).status == 200  # 1,024 tokens, all but the whole pool

    @pytest.mark.parametrize("kind", REFUSED)
    def test_a_refused_request_holds_up_nobody(self, server, untouched, dense, kind):
        assert max(waits(server, kind)) < 2 * max(dense.waits[kind]) + 2

    def test_as_much_is_found_in_the_prefix_cache_as_in_dense_sglangs(self, server, untouched, dense):
        assert hit_rate(server) > 0.95 * dense.hits

    def test_cached_prompts_make_way(self, server, untouched):
        """More tokens than there are rows, and more beginnings than have dense rows, one after the other."""
        for index in range(20):
            assert server.ask(message(f"{index}?", picture(200 + index, 112 + 28 * (index % 9), 224)), 2).status == 200
        assert server.metrics()["rotatek_rows_used"] > 900
        for index in range(20):
            body = {"text": f"{index} {WORDS}", "sampling_params": {"max_new_tokens": 2}}
            server.post("/generate", body)
            assert server.metrics()["rotatek_sinks_used"] <= 48

    def test_the_shortest_prompts(self, server, untouched):
        """Sinks that come while decoding."""
        body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}}
        alone = json.loads(server.post("/generate", body))["output_ids"]
        with ThreadPoolExecutor(12) as threads:
            again = list(threads.map(lambda _: json.loads(server.post("/generate", body))["output_ids"], range(12)))
        assert again == [alone] * 12

    def test_requests_taken_back_under_pressure_are_answered_all_the_same(self, server, untouched):
        # Not `ignore_eos`: SGLang lets no more of those in than it is sure to have room for.
        requests = [((message(f"fox {index}"), 160), {"ignore_eos": False, "min_tokens": 160}) for index in range(12)]
        before = server.log_text().count("Retract requests")
        answers = server.ask_all(requests)
        assert [len(answer.logprobs) for answer in answers] == [160] * 12
        assert server.log_text().count("Retract requests") > before

    def test_everything_is_taken_back_and_goes_on(self, server, untouched):
        requests = [((message(f"fox {n}", picture(40 + n, 224, 252)), 8), {}) for n in range(6)]
        requests += [((message("fox " * 60), 8), {}) for _ in range(3)]
        answers = server.ask_all_and_take_back(requests)
        assert [(answer.status, len(answer.logprobs)) for answer in answers] == [(200, 8)] * 9

    def test_clients_that_hang_up(self, server, untouched):
        for chunks in (0, 1, 5):
            drop(server, IMAGE, 200, chunks)
        for step in range(10):
            hang_up(server, message("fox " * 120), 0.01 * step)

    def test_the_openai_client(self, server, untouched):
        """All at once, and as a stream: the same answer; afterwards the last part of a stream counts the tokens."""
        openai = pytest.importorskip("openai")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
        asked = {
            "model": "tiny",
            "messages": IMAGE,
            "max_tokens": 12,
            "temperature": 0,
            "extra_body": {"ignore_eos": True},
        }
        whole = client.chat.completions.create(**asked)
        assert whole.usage.completion_tokens == 12
        *parts, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        assert last.usage.prompt_tokens == whole.usage.prompt_tokens
        streamed = "".join(choice.delta.content or "" for part in parts for choice in part.choices)
        assert streamed == whole.choices[0].message.content
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="tiny", messages=message("fox " * 1300), max_tokens=4)

    def test_a_soak(self, server, untouched):
        """Requests of all kinds, some given up by their clients; all that run are taken back again and again."""
        outcomes = soak(server, 40, longest=100, pause=0.6)
        assert outcomes.pop(("all", "taken back")) > 3
        assert sum(outcomes.values()) == 40
        for kind, status in outcomes:
            allowed = (200, 400, 500) if kind.startswith(("huge", "broken")) else (200,)
            assert status in (*allowed, None), (kind, status)


@pytest.fixture
def refused(monkeypatch, capsys):
    """What the launcher says of flags that it refuses, before anything starts."""

    def launched(*flags):
        monkeypatch.setattr("sys.argv", ["launch", *flags])
        with pytest.raises(SystemExit) as stopped:
            launch.main()
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return launched


def test_what_cannot_be_coded_is_an_error_at_the_start(tiny, basis, tmp_path, refused):
    path = tmp_path / "images.safetensors"
    calibrate_basis(tiny("qwen2_5_vl"), [message("?", picture(50 + seed)) for seed in range(2)], path)
    assert "was calibrated without text" in refused("--basis", str(path), "--bits", "4")
    assert "text='coded' needs a basis file" in refused("--bits", "4")
    assert "bits must be above 0 and at most 8, or 16" in refused("--basis", basis, "--bits", "9")
    assert "text_share is for a server with text dense" in refused(
        "--basis", basis, "--bits", "4", "--text-share", ".5"
    )
