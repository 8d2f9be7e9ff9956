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
print(json.dumps({
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
