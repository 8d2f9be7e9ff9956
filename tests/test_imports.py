"""What each room imports, seen in a new interpreter in which what it must not need cannot be imported."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
            "core.seal",
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


# What each folder may import of the library; tests of single modules say more.
BELOW = {
    "core": {"options"},
    "options": set(),
    "report": set(),
    "codecs": {"core", "options"},
    "token_pruning": {"core", "options"},
    "cache": {"core", "codecs", "token_pruning", "options", "report"},
    "hf": {"core", "codecs", "token_pruning", "cache", "options", "report"},
    "calibration": {"core", "codecs", "cache", "options", "hf"},
    "cli": {"core", "codecs", "options", "report", "hf", "calibration"},
    "__main__": {"cli"},
}


def imports(path: Path) -> set[str]:
    """All modules that a file imports, wherever it does, for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def library() -> dict[str, Path]:
    files = (ROOT / "rotatek_cache").rglob("*.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


@pytest.mark.parametrize("folder", sorted(BELOW))
def test_arrows_go_one_way(folder):
    for name, path in library().items():
        parts = name.split(".")
        if len(parts) == 1 or parts[1] != folder:
            continue
        used = {tuple(module.split(".")) for module in imports(path)}
        below = {module[1] for module in used if module[0] == "rotatek_cache" and len(module) > 1} & BELOW.keys()
        assert below <= BELOW[folder] | {folder}, name
        tops = {module[0] for module in used}
        assert not tops & {"rotatek_kernels", "rotatek_sglang", "rotatek_lmms_eval", "evals", "triton"}, name
        if folder not in ("hf", "cli"):
            assert "transformers" not in tops, name


def test_kernels_are_imported_by_name_where_core_dispatches_to_them():
    by_name = {
        path.relative_to(ROOT / "rotatek_cache").parts[0]
        for path in library().values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("rotatek_kernels")
    }
    assert by_name == {"core"}


def test_the_library_has_no_import_cycle():
    modules = library()
    arrows = {name: imports(path) & modules.keys() - {name, "rotatek_cache"} for name, path in modules.items()}
    arrows.pop("rotatek_cache")  # imports its public names when they are used
    while arrows:
        free = {name for name, used in arrows.items() if not used & arrows.keys()}
        assert free, f"these import each other: {sorted(arrows)}"
        arrows = {name: used for name, used in arrows.items() if name not in free}


def test_of_the_evals_only_benches_import_an_integration():
    for path in (ROOT / "evals").rglob("*.py"):
        tops = {module.split(".")[0] for module in imports(path)}
        if path.parent.name != "bench":
            assert not tops & {"rotatek_sglang", "rotatek_lmms_eval"}, path
    for path in (ROOT / "integrations").rglob("*.py"):
        assert "evals" not in {module.split(".")[0] for module in imports(path)}, path


def test_a_decode_step_passes_few_files(llava):
    """A newcomer who follows one Key from `cache.update` to the kernel opens those files of CONTRIBUTING's table."""
    import ways

    from rotatek_cache import RotateKCache
    from rotatek_cache.hf.attention import rotatek_attention_forward

    cache = RotateKCache(rank=8)
    ways.generate(llava.attached, ways.one(llava.tiny), cache)
    heads, width = cache.layers[0].kv.shape[1:3]
    states, query = torch.randn(1, heads, 1, width), torch.randn(1, 2 * heads, 1, width)
    passed = []

    def note(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if (
            event == "call"
            and path.is_relative_to(ROOT)
            and path.relative_to(ROOT).parts[0] in ("rotatek_cache", "kernels")
        ):
            name = path.relative_to(ROOT).as_posix()
            if name not in passed:
                passed.append(name)

    sys.setprofile(note)
    try:
        handle, _ = cache.update(states, states, 0)
        rotatek_attention_forward(torch.nn.Identity(), query, handle, handle, None)
    finally:
        sys.setprofile(None)
    kernels = [name for name in passed if name.startswith("kernels/")]
    way = passed[: passed.index(kernels[0]) + 1] if kernels else passed
    assert len(way) <= 10, way
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in table for name in way), way
