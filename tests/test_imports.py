"""What each room imports, seen in a new interpreter in which what it must not need cannot be imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"rotatek_cache": ROOT, "rotatek_kernels": ROOT / "kernels"}

# None in sys.modules makes an import fail and importlib.util.find_spec say that there is no such package.
PROBE = """
import json, sys

sys.path[:0] = {paths!r}
sys.modules.update(dict.fromkeys({blocked!r}))
{body}
print(json.dumps(sorted(name for name, module in sys.modules.items() if module is not None)))
"""

ALL_BUT_TORCH = ["transformers", "triton", "PIL", "matplotlib", "rich", "safetensors", "typer", "huggingface_hub"]


def modules_after(body: str, blocked: list[str]) -> set[str]:
    """Modules loaded once `body` has run; an import of a blocked package fails."""
    script = PROBE.format(blocked=blocked, paths=[str(path) for path in ROOMS.values()], body=body)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_itself_imports_nothing_heavy():
    loaded = modules_after(
        "import rotatek_cache; dir(rotatek_cache); rotatek_cache.__version__", [*ALL_BUT_TORCH, "torch"]
    )
    assert not loaded & {"torch", "numpy", *ALL_BUT_TORCH}
    assert {name for name in loaded if name.startswith("rotatek")} == {"rotatek_cache"}


def test_the_maths_needs_torch_alone():
    maths = [
        f"rotatek_cache.{name}"
        for name in (
            "core.attention",
            "core.basis",
            "core.quantization",
            "core.row_layout",
            "options",
            "report",
            "core.segments",
        )
    ]
    body = f"""
import importlib
for name in {maths}:
    importlib.import_module(name)
from rotatek_cache import FitOptions, KeyBasis, SegmentView, attend, merge_state
"""
    loaded = modules_after(body, [*ALL_BUT_TORCH, "rotatek_kernels"])
    assert set(maths) <= loaded


def test_the_storage_of_a_layer_needs_torch_alone():
    modules_after("from rotatek_cache import LayerKV", [*ALL_BUT_TORCH, "rotatek_kernels"])


def test_reference_attention_runs_without_the_kernel_and_its_compiler():
    body = """
import torch
from rotatek_cache import SegmentView, attend
keys = torch.ones(2, 3, 8)
view = SegmentView(keys, keys, torch.tensor([0]), torch.tensor([3], dtype=torch.int32), 3)
output, _ = attend(torch.ones(1, 4, 1, 8), [view], 1.0)
torch.testing.assert_close(output, torch.ones(1, 1, 4, 8))
"""
    loaded = modules_after(body, [*ALL_BUT_TORCH, "rotatek_kernels"])
    assert "torch" in loaded


def test_the_cache_needs_no_triton_and_no_demo_packages_and_registers_itself():
    body = """
from rotatek_cache import RotateKCache
from transformers import AttentionInterface, AttentionMaskInterface
assert "rotatek" in AttentionInterface().valid_keys()
assert "rotatek" in AttentionMaskInterface().valid_keys()
import rotatek_cache
assert set(rotatek_cache.__all__) == set(rotatek_cache._HOMES)
for name in rotatek_cache.__all__:
    assert getattr(rotatek_cache, name).__name__ == name
"""
    loaded = modules_after(body, ["triton", "rotatek_kernels", "PIL", "matplotlib", "rich", "typer"])
    assert "transformers" in loaded


def test_an_unknown_name_is_an_attribute_error():
    import rotatek_cache

    with pytest.raises(AttributeError, match="no attribute 'RotateCache'"):
        _ = rotatek_cache.RotateCache


@pytest.mark.parametrize("folder", ["kernels", "integrations", "tests"])
def test_plain_folders_are_no_packages(folder):
    # transformers probes for a package `kernels` and would run ours in its place.
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_command_says_which_extra_it_lacks():
    body = """
import runpy
try:
    runpy.run_module("rotatek_cache", run_name="__main__")
except SystemExit as stop:
    assert "rotatek-cache[demo]" in str(stop.code) and "typer" in str(stop.code), stop.code
else:
    raise AssertionError("it ran")
"""
    modules_after(body, ["typer"])
