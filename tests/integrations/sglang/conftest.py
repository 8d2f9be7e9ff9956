"""What the server tests share. They need SGLang: `make test-sglang` runs them in an environment that has it."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def sglang_version():
    # This folder would pass for the package in an import.
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_collection_modifyitems(items):
    if sglang_version() is None:
        skip = pytest.mark.skip(reason="sglang is not installed; `make test-sglang` makes an environment that has it")
        for item in items:
            if "server" in getattr(item, "fixturenames", ()) or item.get_closest_marker("sglang"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny model, by name."""
    from rotatek_sglang.tiny import save_model

    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_model(name, made[name])
        return str(made[name])

    return folder


@pytest.fixture(scope="session")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")
