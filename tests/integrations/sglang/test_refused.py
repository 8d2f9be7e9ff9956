"""What cannot be served is refused at the start, by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

FLAGS = {
    "speculative decoding": ["--speculative-algorithm", "NGRAM"],
    "disaggregation of prefill and decoding": ["--disaggregation-mode", "prefill"],
    "quantised KV caches": ["--kv-cache-dtype", "fp8_e5m2"],
    "mixed chunks": ["--enable-mixed-chunk"],
    "the hierarchical cache (HiCache)": ["--enable-hierarchical-cache"],
    "data parallelism in one server": ["--dp-size", "2"],
    "pipeline parallelism": ["--pp-size", "2"],
    "LoRA adapters": ["--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "all"],
    "the KV canary": ["--kv-canary", "log"],
    "another attention backend": ["--attention-backend", "triton"],
    "another attention backend for decoding": ["--decode-attention-backend", "triton"],
}
POOL = ["--device", "cpu", "--dtype", "float32", "--mem-fraction-static", "0.3", "--max-total-tokens", "1200"]
POOLS = {
    "pool": [POOL, {}],
    "share": [POOL, {"ROTATEK_TEXT_SHARE": "0.0001"}],
    "dtype": [[*POOL, "--kv-cache-dtype", "bfloat16"], {}],
}
# One process for all: importing SGLang takes longer than everything else here.
SCRIPT = """
import json, sys
from runner import forked, load_sglang, queued, start
load_sglang()
said = {name: forked(start, sys.argv[1], *given) for name, given in json.loads(sys.argv[3]).items()}
said["queued"] = forked(queued, sys.argv[1], json.loads(sys.argv[3])["pool"][0])
from sglang.srt.server_args import prepare_server_args
from sglang.srt.arg_groups.overrides import resolution_result
for name, flags in json.loads(sys.argv[2]).items():
    try:
        args = prepare_server_args(["--model-path", sys.argv[1], "--device", "cpu", *flags])
        args.resolve_once()
        said[name] = {field: str(resolution_result(args, field)) for field in ("attention_backend", "page_size")}
    except Exception as error:
        said[name] = str(error)

import torch
from rotatek_sglang.backend import check_model
from sglang.srt.layers.radix_attention import RadixAttention
layers = {"sliding-window layers": {"sliding_window_size": 128}, "softcapped logits": {"logit_cap": 30.0},
          "cross-attention layers": {"is_cross_attention": True}, "nothing special": {}}
for name, options in layers.items():
    try:
        check_model(torch.nn.ModuleList([RadixAttention(4, 64, 0.1, 2, layer_id=0, **options)]), on_gpu=False)
        said[name] = "served"
    except ValueError as error:
        said[name] = str(error)

import platform
machine, platform.machine = platform.machine, lambda: "aarch64"
args = prepare_server_args(["--model-path", sys.argv[1], "--device", "cpu"])
args.resolve_once()
said["ARM"] = str(resolution_result(args, "attention_backend"))
platform.machine = machine

import os
os.environ["SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"] = "1"
try:
    prepare_server_args(["--model-path", sys.argv[1], "--device", "cpu"]).resolve_once()
except Exception as error:
    said["sizing"] = str(error)
del os.environ["SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"]

from types import SimpleNamespace
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
from rotatek_sglang.requests import visual_tokens
item = MultimodalDataItem(modality=Modality.IMAGE, pad_value=7777)
ids = [1, 2, 7777, 7777, 3]
request = SimpleNamespace(origin_input_ids=ids, multimodal_inputs=SimpleNamespace(mm_items=[item]))
said["LLaVA"] = [visual_tokens(request, begin, 7).tolist() for begin in (0, 3)]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tiny):
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "ROTATEK_RANK": "16", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    cases = json.dumps({**FLAGS, "no flags": []})
    command = [sys.executable, "-c", SCRIPT, tiny("qwen2_5_vl"), cases, json.dumps(POOLS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("feature", FLAGS)
def test_a_feature_is_refused_by_name(said, feature):
    assert f"rotatek_sglang does not support {feature}" in said[feature]


@pytest.mark.parametrize("kind", ["sliding-window layers", "softcapped logits", "cross-attention layers"])
def test_a_model_is_refused_by_what_it_has(said, kind):
    assert f"does not serve models with {kind}" in said[kind]


def test_all_else_is_served(said):
    assert said["nothing special"] == "served"
    assert said["no flags"] == {"attention_backend": "rotatek", "page_size": "2"}


def test_another_way_to_size_the_pool_is_refused(said):
    assert "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING=1" in said["sizing"]


def test_an_arm_processor_is_served(said):
    """There SGLang fills in another attention backend of its own before it asks a platform."""
    assert said["ARM"] == "rotatek"


def test_images_that_sglang_gives_no_offsets_are_found_by_their_ids(said):
    no, yes = False, True
    assert said["LLaVA"] == [[no, no, yes, yes, no, no, no], [yes, no, no, no]]


def test_a_text_share_that_no_prompt_fits_into_is_refused(said):
    assert "the KV pool has 1 text rows at --text-share 0.0001" in said["share"]["error"]
    assert "raise --text-share" in said["share"]["error"]


def test_a_cache_in_another_dtype_than_the_model_is_refused(said):
    """Also where the files of the model ask for it, which is known once it is loaded."""
    assert "in the model's dtype, torch.float32; --kv-cache-dtype" in said["dtype"]["error"]
    assert "ask for torch.bfloat16" in said["dtype"]["error"]


def test_attention_over_images_runs_at_the_start(said):
    """Steps, and chunks of prompts, with up to four visual segments: no request waits for a kernel to be compiled."""
    visual, text, own = [True, False], [False, False], [False, True]
    stored = [[visual] * count + [text] for count in range(5)]
    steps = [[False, each] for each in stored]
    chunks = [[True, [*each, own]] for each in stored]
    later_blocks = [[True, [*each, text, own]] for each in stored]
    assert all(form in said["pool"]["forms"] for form in steps + chunks + later_blocks)


def test_a_pool_that_holds_less_than_a_dense_one_is_warned_of(said):
    """Bases for the images of 32 requests take more than is saved."""
    assert any("tokens fit, where a dense cache would hold" in warning for warning in said["pool"]["warned"])


def test_cached_prompts_make_way_for_what_is_read_now_and_only_if_that_is_enough(said):
    assert said["queued"] == {
        "an answer that would need most of the pool": [True, 200],
        "an image and a text that fit": [True, 200],
        "a text beside one that runs": [False, 200],
        "an image beyond the visual rows": [False, 200],
        "a text for which two must go": [True, 120],
        "a text for which all must go": [True, 0],
    }
