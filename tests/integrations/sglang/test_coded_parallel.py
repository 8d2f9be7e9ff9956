"""All tokens coded in several processes: some heads in each, or a whole model in each."""

import os
import re

import pytest
from oracle import greedy_logprobs
from prompts import REQUESTS
from serving import Server
from soak import SMALL_POOL, soak

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

CODES = 2e-3  # another library or batch size moves a state a little, and now and then a code with it
AT_ONCE = ["--device", "cpu", *SMALL_POOL, "--chunked-prefill-size", "-1"]
CORES = {"SGLANG_CPU_OMP_THREADS_BIND": f"0|{1 % os.cpu_count()}"}  # on a CPU SGLang wants to be told of each process's
USED = r"^rotatek_{}_used\{{[^}}]*\}} (\S+)$"


def used(server, what):
    """Rows, sinks or rings in use, in each process that tells."""
    return [float(number) for number in re.findall(USED.format(what), server.get("/metrics"), re.MULTILINE)]


class TestHeadsInEach:
    """Two processes with a KV head each, whose rows differ in width: the answers of one that has both."""

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tiny, logs, basis):
        arguments = ["--model-path", tiny("qwen2_5_vl"), *AT_ONCE, "--tp-size", "2"]
        arguments += ["--basis", basis, "--bits", "3.5", "--allocation", "heads"]
        with Server("rotatek_sglang.launch", *arguments, log=logs / "heads.log", environment=CORES) as running:
            yield running

    def test_each_process_has_rows_of_its_own_and_all_have_as_many(self, server):
        said = re.findall(r"a token takes (\d+) bytes.*; ([\d,]+) tokens fit", server.log_text())
        widths, tokens = ([int(number.replace(",", "")) for number in found] for found in zip(*said, strict=True))
        assert tokens == [1200, 1200]
        assert widths[0] != widths[1]
        # 2 KV heads, 2 layers, 64 + 64 channels of 3.5 bits on average, in whole blocks of channels.
        assert 0.9 * 224 <= sum(widths) <= 224

    @pytest.mark.parametrize("name", ["a word", "long text", "two images"])
    def test_answers_are_those_of_one_process(self, server, tiny, basis, name):
        options = {"basis": basis, "text": "coded", "bits": 3.5, "allocation": "heads"}
        expected = greedy_logprobs(tiny("qwen2_5_vl"), REQUESTS[name], tokens=16, **options)
        server.flush()
        assert server.ask(REQUESTS[name], 16).logprobs == pytest.approx(expected, abs=CODES)

    def test_everything_comes_back_in_both(self, server):
        """Where the two did not agree on what is free, one would wait for the other for ever."""
        outcomes = soak(server, 40, longest=100, pause=0.5)
        assert {status for kind, status in outcomes if kind in ("text", "long", "image")} == {200}
        server.flush()
        assert [used(server, what) for what in ("rows", "sinks", "rings")] == [[0.0]] * 3


class TestAModelInEach:
    """Two pools in one server, full bits."""

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tiny, logs, basis):
        arguments = ["--model-path", tiny("qwen2_5_vl"), *AT_ONCE, "--dp-size", "2", "--basis", basis, "--bits", "16"]
        with Server("rotatek_sglang.launch", *arguments, log=logs / "models.log", environment=CORES) as running:
            yield running

    def test_answers(self, server, tiny):
        """At once, and again when prefixes are found in the cache of either."""
        expected = greedy_logprobs(tiny("qwen2_5_vl"), REQUESTS["image"], 16, sparsity=0)
        for answer in server.ask_all([((REQUESTS["image"], 16), {}) for _ in range(6)], workers=3):
            assert answer.logprobs == pytest.approx(expected, abs=5e-5)

    def test_each_tells_of_its_own_pool_and_all_comes_back(self, server):
        assert set(re.findall(r'^rotatek_rows\{dp_rank="(\d)"', server.get("/metrics"), re.MULTILINE)) == {"0", "1"}
        assert all(rows > 60 for rows in used(server, "rows"))
        server.flush()
        assert [used(server, what) for what in ("rows", "sinks", "rings")] == [[0.0, 0.0]] * 3
