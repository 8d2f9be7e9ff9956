"""The coded pool under SGLang's batches, model runner and prefix cache, without a server: logits to the last digits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


@pytest.fixture(scope="module")
def basis(tiny, tmp_path_factory):
    """A basis of drawn text."""
    import transformers

    from rotatek_cache.calibration.gather import calibrate
    from rotatek_cache.calibration.moments import Calibration
    from rotatek_cache.codecs.fingerprint import fingerprint
    from rotatek_cache.hf.attention import NAME

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("qwen2"), dtype=torch.float32).eval()
    model.set_attn_implementation(NAME)
    state = Calibration(fingerprint(model), "qwen2")
    generator = torch.Generator().manual_seed(5)
    texts = ({"input_ids": torch.randint(0, 390, (1, 300), generator=generator)} for _ in range(4))
    calibrate(model, texts, state, text=True)
    path = tmp_path_factory.mktemp("basis") / "text.safetensors"
    state.write_basis(path)
    return str(path)


@pytest.fixture(scope="module")
def answers(tiny, basis):
    environment = {**os.environ, "ROTATEK_BASIS": basis, "ROTATEK_TEXT": "coded", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, Path(__file__).with_name("runner.py"), tiny("qwen2"), basis, "16", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip((16, 4, "tiny"), map(json.loads, lines), strict=True))


@pytest.fixture(params=[16, 4])
def said(request, answers):
    found = answers[request.param]
    assert "error" not in found, found
    return {"bits": request.param, **found}


def test_answers(said):
    """Those of the coded cache, cut at the same places by chunks and cached prefixes; at full bits of a dense one."""
    assert said["cached"] == [[0, 0, 0], [100], [100], [2, 60]]
    assert max(said["coded"]) < 2e-5
    if said["bits"] == 16:
        assert max(said["dense"]) < 2e-5
    else:
        assert max(said["dense"][:3]) > 0.1  # what four bits change in this model, and the coded cache changes alike


def test_a_pool_that_no_request_fits_into_is_an_error_at_the_start(answers):
    assert "the KV pool holds 100 tokens, which no request fits into" in answers["tiny"]["error"]


def test_everything_comes_back(said):
    slots, sinks, rings = said["start"]
    assert (slots, sinks, rings) == (600, 128, 0)
    # Four prompts without first tokens in common, but for two that begin with the same two tokens.
    assert said["held"][1:] == [128 - 3 * 4 - 2, 0]
    assert said["held"][0] < 400
    assert said["end"] == said["start"]


def test_all_forms_of_attention_run_at_the_start(said):
    """So that no request waits for a kernel to be compiled."""
    count, new = said["forms"]
    assert count > 3
    assert new == 0
