"""Options and entry points; needs no SGLang."""

import argparse
import importlib.metadata
import json
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rotatek_sglang import SGLANG_VERSION, launch, options, plugin
from rotatek_sglang.options import ServingOptions

ROOT = Path(__file__).parents[3]


def test_options_survive_the_environment():
    chosen = ServingOptions.of(
        sparsity=0.9, basis="b.safetensors", key_bits="auto", value_sparsity=0.5, value_bits=4, text_share=0.1
    )
    variables = chosen.environment()
    assert variables["ROTATEK_KEY_BITS"] == "auto"
    assert options.from_environment({**variables, "PATH": "/bin"}) == chosen
    coded = ServingOptions.of(basis="b.safetensors", bits=(4, 2.28), beginnings=9)
    assert coded.fit.codes_text
    assert coded.environment()["ROTATEK_BITS"] == "4,2.28"
    assert options.from_environment(coded.environment()) == coded
    assert options.from_environment({"ROTATEK_BASIS": "b.safetensors", "ROTATEK_TEXT": "coded"}).fit.bits == (4, 4)
    assert options.from_environment({"ROTATEK_RANK": "8", "ROTATEK_ALWAYS_COMPRESS": "1"}).fit.always_compress


def test_every_option_is_a_flag():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    options.add_flags(parser)
    given, rest = parser.parse_known_args(["--rank", "8", "--always-compress", "--value-bits", "4", "--tp", "2"])
    assert vars(given) == {"rank": 8, "always_compress": True, "value_bits": 4}
    assert rest == ["--tp", "2"]
    assert "share of the Key channels removed" in parser.format_help()
    assert "which memory is set aside (default: 0.25)" in " ".join(parser.format_help().split())
    assert {"energy", "solver", "basis_bits", "text_share", "cuda_graphs"} < set(options.OPTIONS)
    assert not {"fit", "streaming", "value_basis"} & set(options.OPTIONS)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--rank", "8", "--key-bits", "3"], "argument --key-bits: expected 8, 4, 2 or auto, got '3'"),
        (["--rank", "8", "--basis", "none.safetensors"], "none.safetensors does not exist"),
        (["--rank", "8", "--basis", "pyproject.toml"], "basis must be one of"),
        ([], "exactly one of sparsity, rank and energy"),
    ],
)
def test_wrong_flags_end_the_launcher_before_anything_starts(flags, complaint, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["launch", *flags])
    with pytest.raises(SystemExit) as stopped:
        launch.main()
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_flags_go_before_the_environment(monkeypatch):
    for name, value in {"SPARSITY": "0.5", "BASIS": "pca", "VALUE_BITS": "4"}.items():
        monkeypatch.setenv(f"ROTATEK_{name}", value)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: SGLANG_VERSION)
    monkeypatch.setattr(runpy, "run_module", lambda *args, **kwargs: None)
    monkeypatch.setenv("SGLANG_PLATFORM", "")  # which the launcher sets: to be undone
    monkeypatch.setattr("sys.argv", ["launch", "--sparsity", "0.75", "--basis", "rotatek", "--model-path", "model"])
    launch.main()
    assert options.from_environment() == ServingOptions.of(sparsity=0.75, value_bits=4)
    assert sys.argv[1:3] == ["--model-path", "model"]


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({}, "exactly one of sparsity, rank and energy"),
        ({"ROTATEK_RANK": "8", "ROTATEK_SPARSITY": "0.5"}, "exactly one of sparsity, rank and energy"),
        ({"ROTATEK_BITS": "four"}, "ROTATEK_BITS='four' in the environment: could not convert"),
        ({"ROTATEK_BITS": "4,4,4", "ROTATEK_BASIS": "b.safetensors"}, r"bits must be a number or \(Keys, Values\)"),
        ({"ROTATEK_BITS": "0", "ROTATEK_BASIS": "b.safetensors"}, "bits must be above 0 and at most 8, or 16"),
        ({"ROTATEK_BITS": "4"}, "text='coded' needs a basis file"),
        ({"ROTATEK_BITS": "4", "ROTATEK_BASIS": "b.safetensors", "ROTATEK_RANK": "8"}, "takes no 'rank'|no rank"),
        ({"ROTATEK_BITS": "4", "ROTATEK_BASIS": "b.safetensors", "ROTATEK_BASES": "8"}, "bases is for a server with"),
        ({"ROTATEK_RANK": "8", "ROTATEK_BEGINNINGS": "8"}, "beginnings is for a server with all tokens coded"),
        ({"ROTATEK_RANK": "eight"}, "ROTATEK_RANK='eight'"),
        ({"ROTATEK_RANK": "8", "ROTATEK_RANKS": "8"}, "unknown option ROTATEK_RANKS"),
        ({"ROTATEK_RANK": "8", "ROTATEK_KEY_BITS": "3"}, "ROTATEK_KEY_BITS='3'.*8, 4, 2 or auto"),
        ({"ROTATEK_RANK": "8", "ROTATEK_TEXT_SHARE": "0"}, "text_share must be in"),
        ({"ROTATEK_ENERGY": "0.9"}, "energy needs a calibrated basis"),
        ({"ROTATEK_SPARSITY": "0.9", "ROTATEK_KEY_BITS": "auto"}, "key_bits='auto' needs a calibrated basis"),
        ({"ROTATEK_RANK": "8", "ROTATEK_BASIS": "spark"}, "basis must be one of oblique, .* got 'spark'"),
        (
            {"ROTATEK_RANK": "8", "ROTATEK_BASIS_BITS": "4"},
            "ROTATEK_BASIS_BITS='4' in the environment: expected 8, got '4'",
        ),
        ({"ROTATEK_RANK": "8", "ROTATEK_ALLOCATION": "heads"}, "allocation needs a calibrated basis"),
        ({"ROTATEK_RANK": "8", "ROTATEK_ALLOCATION": "tokens"}, "'uniform', 'layers' or 'heads', got 'tokens'"),
    ],
)
def test_wrong_options_are_named(variables, complaint):
    with pytest.raises(ValueError, match=complaint):
        options.from_environment(variables)


def test_nothing_happens_unless_asked_for(monkeypatch):
    for name in ("SGLANG_PLATFORM", *(f"ROTATEK_{option.upper()}" for option in options.OPTIONS)):
        monkeypatch.delenv(name, raising=False)
    assert plugin.activate_platform() is None
    script = "import json, sys; from rotatek_sglang import plugin; plugin.register(); print(json.dumps([*sys.modules]))"
    paths = [str(ROOT), str(ROOT / "integrations")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}; {script}"], capture_output=True, check=True
    )
    loaded = json.loads(done.stdout)
    assert not {name for name in loaded if name.startswith(("sglang", "transformers"))}


@pytest.mark.parametrize("name", ["ROTATEK_BASIS", "ROTATEK_SPARSTY"])
def test_a_variable_that_asks_for_too_little_is_no_request_for_dense_keys(monkeypatch, name):
    monkeypatch.setenv(name, "0.5")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: SGLANG_VERSION)
    with pytest.raises(SystemExit, match=r"exactly one of sparsity, rank and energy|unknown option ROTATEK_SPARSTY"):
        plugin.register()


def test_another_sglang_ends_the_process(monkeypatch):
    # SGLang survives an exception of a plug-in, and would go on to serve dense Keys.
    monkeypatch.setenv("ROTATEK_RANK", "8")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.99")
    for entry in (plugin.activate_platform, plugin.register):
        with pytest.raises(SystemExit, match=f"needs sglang {SGLANG_VERSION}, found 0.5.99"):
            entry()


def test_wrong_options_end_the_process(monkeypatch):
    monkeypatch.setenv("ROTATEK_RANK", "0")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: SGLANG_VERSION)
    with pytest.raises(SystemExit, match="rank must be at least 1"):
        plugin.register()
    monkeypatch.setenv("ROTATEK_RANK", "8")
    monkeypatch.setenv("ROTATEK_BASIS", "none.safetensors")
    with pytest.raises(SystemExit, match=r"basis file .*none\.safetensors does not exist"):
        plugin.activate_platform()


def test_the_extra_asks_for_the_version_that_is_supported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["sglang"] == [f"sglang=={SGLANG_VERSION}"]
    pins = (ROOT / "tests/integrations/sglang/requirements-cpu.txt").read_text(encoding="utf-8").splitlines()
    assert f"sglang=={SGLANG_VERSION}" in pins
    assert {name for points in project["entry-points"].values() for name in points} == {"rotatek"}
