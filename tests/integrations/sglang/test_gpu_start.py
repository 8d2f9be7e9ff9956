"""How far a start on CUDA comes on a CPU, by a torch that says that it has a Hopper card: imports, and what is set.

SGLang's kernels are stood in for, as in the smallest installation (`gpu.py`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

SCRIPT = """
import importlib, json, sys
from types import SimpleNamespace
import torch
card = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="H100")
torch.version.cuda = "13.0"
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda *args: (9, 0)
torch.cuda.get_device_name = lambda *args: "H100"
torch.cuda.get_device_properties = lambda *args: card
torch.cuda.mem_get_info = lambda *args: (80 << 30, 80 << 30)

from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.server_args import prepare_server_args
args = prepare_server_args(["--model-path", sys.argv[1], "--device", "cuda", "--mm-attention-backend", "sdpa"])
args.resolve_once()
graphs = resolution_result(args, "cuda_graph_config")
for name in ("managers.scheduler", "models.qwen2_5_vl", "entrypoints.http_server"):
    importlib.import_module("sglang.srt." + name)
from sgl_kernel import rmsnorm
try:
    rmsnorm(None)
except RuntimeError as error:
    refused = str(error)

from rotatek_sglang import planning
split = {}
for own, heads, size in ((4, 4, 2), (2, 2, 4), (3, 3, 2), (3, 4, 2), (2, 4, 4)):
    model = SimpleNamespace(
        dtype=torch.bfloat16, num_attention_heads=8, get_total_num_kv_heads=lambda: heads, head_dim=64, v_head_dim=64,
        hf_text_config=SimpleNamespace(original_total_num_kv_heads=own))
    planning.get_parallel = lambda: SimpleNamespace(attn_tp_size=size)
    try:
        shapes = planning.heads_of_ranks(SimpleNamespace(model_config=model, kv_cache_dtype=torch.bfloat16))
        split[f"{own} of {heads} in {size}"] = [(each.first_kv_head, each.kv_heads) for each in shapes]
    except ValueError as error:
        split[f"{own} of {heads} in {size}"] = str(error)
print(json.dumps({
    "split": split,
    "attention": resolution_result(args, "attention_backend"),
    "decode": graphs.decode.backend, "sizes": graphs.decode.bs, "prefill": graphs.prefill.backend,
    "overlap": not resolution_result(args, "disable_overlap_schedule"), "refused": refused}))
"""


def test_graphs_of_decoding_are_on_and_no_kernel_of_sglang_is_needed_to_start(tiny, tmp_path):
    from test_coded_storage import write_basis

    here = Path(__file__).parent
    environment = {**os.environ, "SGLANG_PLATFORM": "rotatek", "ROTATEK_BITS": "4", "HF_HUB_OFFLINE": "1"}
    environment["ROTATEK_BASIS"] = write_basis(tmp_path / "basis.safetensors")
    paths = [str(here / "no_kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-c", SCRIPT, tiny("qwen2_5_vl")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["attention"] == "rotatek"
    assert (said["decode"], said["prefill"], said["overlap"]) == ("full", "disabled", True)
    assert said["sizes"][-1] == 64  # all requests at once
    assert "sgl_kernel.rmsnorm is not installed" in said["refused"]
    # Heads of the model, with those that SGLang adds on a CPU, and processes: the first head of each, and how many.
    no = "rotatek_sglang cannot split {} KV heads between {} processes: give a --tp-size that divides them"
    assert said["split"] == {
        "4 of 4 in 2": [[0, 2], [2, 2]],
        "2 of 2 in 4": [[0, 1], [0, 1], [1, 1], [1, 1]],
        "3 of 3 in 2": no.format(3, 2),
        "3 of 4 in 2": no.format(3, 2),
        "2 of 4 in 4": no.format(2, 4),
    }
