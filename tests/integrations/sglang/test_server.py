"""A compressed server: right answers, and alive whatever is sent to it."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from load import REFUSED, waits
from oracle import greedy_logprobs, second_question_logprobs
from PIL import Image
from serving import Server, as_url, message, picture
from soak import HUGE, SMALL_POOL, drop, hang_up, soak

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

IN_USE = ("rotatek_text_rows_used", "rotatek_visual_rows_used", "rotatek_bases_used", "rotatek_requests_with_basis")
FREE = dict.fromkeys(IN_USE, 0.0)
TEXT = message("the quick brown fox")
IMAGE = message("what is in this image?", picture(1))


@pytest.fixture(scope="module")
def server(tiny, logs):
    arguments = ["--model-path", tiny("qwen2_5_vl"), *SMALL_POOL, "--sparsity", "0.75", "--bases", "8"]
    arguments += ["--served-model-name", "tiny"]
    with Server("rotatek_sglang.launch", *arguments, log=logs / "compressed.log", alone=True) as running:
        yield running


@pytest.fixture
def untouched(server):
    """Whatever a test does: afterwards all is free and a fixed request is answered as before."""
    server.flush()
    before = [server.ask(probe) for probe in (TEXT, IMAGE)]
    yield
    left = server.settled()
    assert {name: left[name] for name in IN_USE} == FREE
    assert [server.ask(probe) for probe in (TEXT, IMAGE)] == before


@pytest.mark.parametrize("images", [0, 1, 2], ids=["text", "image", "two images"])
def test_answers_are_those_of_the_cache_in_transformers(server, tiny, images):
    request = message("what is in this image?", *(picture(10 + each, 224, 252) for each in range(images)))
    expected = greedy_logprobs(tiny("qwen2_5_vl"), request, sparsity=0.75)
    server.flush()
    before = server.log_text().count("#new-token: 48,")
    answer = server.ask(request)
    assert answer.logprobs == pytest.approx(expected, abs=5e-5)
    # One that takes more than half of the 300 text rows is read at once.
    chunks = 0 if answer.prompt_tokens > 150 else answer.prompt_tokens // 48
    assert server.log_text().count("#new-token: 48,") - before == chunks


def test_a_second_question_finds_the_compressed_image(server, tiny):
    """As in transformers, when the cache of the first question is cut back to what both prompts share."""
    first = message("what is in this image?", picture(15))
    second = message("describe the picture, please.", picture(15))
    server.flush()
    server.ask(first)
    answer = server.ask(second)
    assert answer.cached_tokens >= 64
    expected = second_question_logprobs(tiny("qwen2_5_vl"), first, second, answer.cached_tokens, sparsity=0.75)
    assert answer.logprobs == pytest.approx(expected, abs=5e-5)
    # One copy of the image, however many ask about it.
    server.flush()
    server.ask(first)
    server.ask_all([((message(f"question {number}", picture(15)),), {}) for number in range(6)])
    assert server.metrics()["rotatek_visual_rows_used"] == 64


def test_cached_images_make_way(server, untouched):
    """More images than there are rows or bases, one after the other."""
    for index in range(30):
        assert server.ask(message("?", picture(200 + index, 112 + 28 * (index % 9), 224)), 2).status == 200
    assert server.metrics()["rotatek_visual_rows_used"] > 300


def test_a_chat_with_more_images_than_there_are_bases(server, untouched):
    """Each turn's image is cached with a basis of its own, until the chat's own prefix is in its way."""
    turns = []
    for index in range(10):
        turns += message("?", picture(300 + index, 140, 140))
        answer = server.ask(turns, 2)
        assert answer.status == 200
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer.text}]})
        assert server.metrics()["rotatek_bases_used"] <= 8
    assert server.metrics()["rotatek_visual_rows_used"] == 10 * 25


def test_an_image_that_does_not_pay_for_a_basis_stays_dense(server, tiny):
    small = message("what is in this image?", picture(3, 56, 56))  # 4 tokens
    assert server.ask(small).logprobs == pytest.approx(greedy_logprobs(tiny("qwen2_5_vl"), small, sparsity=0), abs=5e-5)


def test_the_log_and_the_metrics_say_what_is_stored(server):
    log = server.log_text()
    assert "ranks Keys 16 of 64, Values 64 of 64" in log
    # 2 KV heads, 2 layers, 4 bytes: 64 + 64 numbers, or 16 + 64; a basis has 64 x 16 numbers and a mean.
    assert "a text token takes 2,048 bytes, a visual one 1,280, a basis 17,408" in log
    assert "300 text rows, 900 visual rows, 8 bases" in log
    assert "prompts with images are read in chunks up to 150 tokens" in log
    idle = server.settled()
    assert (idle["rotatek_text_rows"], idle["rotatek_visual_rows"]) == (300, 900)
    assert idle["rotatek_compression_ratio"] == 1
    assert 'rotatek_text_rows{model_name="tiny"}' in server.get("/metrics")


def test_metrics_follow_a_request(server, untouched):
    import threading

    seen = []
    asking = threading.Thread(target=lambda: seen.append(server.ask(IMAGE, 250)))
    asking.start()
    busy = server.metrics()
    while asking.is_alive() and not busy["rotatek_requests_with_basis"]:
        busy = server.metrics()
    asking.join()
    assert seen[0].status == 200
    assert busy["rotatek_visual_rows_used"] == 64  # 224 x 224 pixels in blocks of 28 x 28
    assert busy["rotatek_bases_used"] == busy["rotatek_requests_with_basis"] == 1
    text = busy["rotatek_text_rows_used"]
    expected = (64 + text) * 2048 / (64 * 1280 + text * 2048 + 17408)
    assert busy["rotatek_compression_ratio"] == pytest.approx(expected)


def test_a_prompt_larger_than_the_pool_is_an_error_for_it_alone(server, untouched):
    answers = server.ask_all([((message("?", HUGE),), {}), ((TEXT,), {}), ((message("fox " * 400),), {})])
    assert [answer.status for answer in answers] == [400, 200, 400]
    assert "The prompt has 1024 visual tokens and 13 others" in answers[0].text
    assert "900 visual rows and 300 text rows" in answers[0].text


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_request_holds_up_nobody(server, untouched, dense, kind):
    """Though it asks for a longer answer than there will ever be text rows for."""
    assert max(waits(server, kind)) < 2 * max(dense.waits[kind]) + 2


def test_several_answers_to_one_prompt(server, untouched):
    body = {"model": "tiny", "messages": IMAGE, "n": 3, "max_tokens": 4, "ignore_eos": True}
    assert len(json.loads(server.post("/v1/chat/completions", body))["choices"]) == 3


@pytest.mark.parametrize(
    "url",
    ["data:image/png;base64,iVBORw0KGgo=", picture(1)[:600], "data:image/png;base64,@@@", "data:text/plain,hello"],
    ids=["no image", "truncated", "no base64", "text"],
)
def test_a_malformed_image_is_an_error_for_it_alone(server, untouched, url):
    answer = server.ask(message("what is in this image?", url))
    assert 400 <= answer.status <= 500


def test_a_20000_by_20000_image_is_refused(server, untouched):
    answer = server.ask(message("?", as_url(Image.new("1", (20000, 20000)))))
    assert answer.status in (400, 413, 500)


def test_beam_search_is_refused(server, untouched):
    body = {"text": "fox", "sampling_params": {"beam_width": 2, "max_new_tokens": 4}}
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(server.request(body, "/generate"), timeout=60)
    assert caught.value.code == 400
    assert "does not support beam search" in json.dumps(caught.value.read().decode())


def test_truncated_json_is_an_error(server, untouched):
    body = b'{"model": "x", "messages": [{"role": "user", "content": [{"type": "image_url", "image_'
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(server.request(body), timeout=30)
    assert caught.value.code in (400, 422)


def test_more_than_fits_waits_its_turn(server, untouched):
    """12 images of 240 tokens each, of which three fit at a time."""
    requests = [((message(f"number {index}", picture(20 + index, 336, 560)), 6), {}) for index in range(12)]
    alone = [server.ask(*args) for args, _ in requests[:3]]
    server.flush()  # a prompt whose image is cached attends to coefficients where a new one attends to Keys
    answers = server.ask_all(requests)
    assert [answer.status for answer in answers] == [200] * 12
    for answer, expected in zip(answers, alone, strict=False):
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=5e-5)


def test_more_images_than_bases_wait_their_turn(server, untouched):
    """12 images of 64 tokens, for which there are rows, but 8 bases."""
    answers = server.ask_all([((message(f"number {n}", picture(80 + n)), 40), {}) for n in range(12)])
    assert [len(answer.logprobs) for answer in answers] == [40] * 12


def test_requests_taken_back_under_pressure_are_answered_all_the_same(server, untouched):
    # Not `ignore_eos`: SGLang lets no more of those in than it is sure to have room for.
    requests = [((message(f"fox {index}"), 100), {"ignore_eos": False, "min_tokens": 100}) for index in range(12)]
    alone = server.ask(*requests[0][0], **requests[0][1])
    before = server.log_text().count("Retract requests")
    answers = server.ask_all(requests)
    assert [len(answer.logprobs) for answer in answers] == [100] * 12
    assert answers[0].logprobs == pytest.approx(alone.logprobs, abs=5e-5)
    assert server.log_text().count("Retract requests") > before


def test_clients_that_hang_up(server, untouched):
    for chunks in (0, 1, 5):
        drop(server, IMAGE, 200, chunks)


def test_clients_that_hang_up_in_mid_prompt(server, untouched):
    prompts = [message("fox " * 120), message("what is in this image?", picture(30, 252, 252))]
    for step in range(20):
        hang_up(server, prompts[step % 2], 0.01 * step)


def test_everything_is_taken_back_and_goes_on(server, untouched):
    """Also prompts of which some chunks have been read, and images that wait for their last one."""
    requests = [((message(f"fox {n}", picture(40 + n, 224, 252)), 8), {}) for n in range(8)]
    requests += [((message("fox " * 60), 8), {}) for _ in range(4)]
    alone = [server.ask(*args) for args, _ in requests]
    server.flush()
    answers = server.ask_all_and_take_back(requests)
    for answer, expected in zip(answers, alone, strict=True):
        assert answer.status == 200
        # What was taken back may have become a cached prefix, which is read as it is stored.
        assert len(answer.logprobs) == len(expected.logprobs)


def test_a_client_that_is_killed_in_mid_stream(server, untouched):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import soak, types\n"
        "server = types.SimpleNamespace(port=int(sys.argv[2]))\n"
        "soak.drop(server, soak.message('what is in this image?', soak.picture(1)), 250, 10**6)\n"
    )
    folder = __file__.rpartition("/")[0]
    client = subprocess.Popen([sys.executable, "-c", script, folder, str(server.port)])
    until = time.monotonic() + 20
    while not server.metrics()["rotatek_bases_used"] and time.monotonic() < until:
        time.sleep(0.02)
    client.kill()
    assert client.wait() == -9


def test_a_soak(server, untouched):
    outcomes = soak(server, 80)
    assert sum(outcomes.values()) == 80
    for kind, status in outcomes:
        allowed = (400, 500) if kind.startswith(("huge", "broken")) else (200,)
        assert status in (*allowed, None), (kind, status)
