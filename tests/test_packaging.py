"""What a built wheel holds."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of what git would hand out, so that the checkout stays as it is."""
    import shutil

    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for folder in ("rotatek_cache", "kernels", "integrations", "tests"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    out = copy / "dist"
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        yield archive


def test_the_reader_and_its_pages_are_inside(wheel):
    names = set(wheel.namelist())
    expected = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "rotatek_cache" / "reader").rglob("*") if path.is_file()
    }
    assert any(name.endswith(".safetensors") for name in expected)
    assert expected <= names
    assert "rotatek_cache/py.typed" in names


def test_packages_have_their_own_names(wheel):
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {"rotatek_cache", "rotatek_kernels"} <= top
    assert not top & {"kernels", "integrations", "tests", "evals"}
    assert "rotatek_kernels/attend_triton.py" in wheel.namelist()


def test_licence_and_command_are_declared(wheel):
    info = next(name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "rotatek = rotatek_cache.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_torch_is_the_only_core_dependency_and_pins_fit_the_ranges():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [Requirement(line).name for line in project["dependencies"]] == ["torch"]
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    pins = {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name == project["name"]:
            continue
        assert name in pins, f"{name} is not pinned in constraints.txt"
        (pin,) = pins[name]
        assert Version(pin.version) in requirement.specifier


def test_the_versions_of_transformers_are_said_once():
    """The oldest is what pip asks for and the newest is pinned; `make test-hosts` runs both."""
    from packaging.requirements import Requirement

    from rotatek_cache.hf.versions import NEWEST, OLDEST

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (asked,) = Requirement(extras["hf"][0]).specifier
    assert (asked.operator, asked.version) == (">=", "{}.{}".format(*OLDEST))
    pins, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("constraints.txt", "Makefile"))
    (pinned,) = re.findall(r"^transformers==(.*)$", pins, re.MULTILINE)
    assert pinned.startswith("{}.{}.".format(*NEWEST))
    (hosts,) = re.findall(r"^HOSTS \?= (.*)$", makefile, re.MULTILINE)
    assert hosts.split()[0].startswith("{}.{}.".format(*OLDEST))
    assert hosts.split()[-1] == "$(TRANSFORMERS_VERSION)"
