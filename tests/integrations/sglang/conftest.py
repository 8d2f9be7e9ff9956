"""What the server tests share. They need SGLang: `make test-sglang` runs them in an environment that has it."""

import dataclasses
import importlib.metadata
import json
import os
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
def basis(tiny, tmp_path_factory):
    """A basis of text and images for "qwen2_5_vl"."""
    from oracle import calibrate_basis
    from prompts import WORDS
    from serving import message, picture

    path = tmp_path_factory.mktemp("basis") / "tokens.safetensors"
    prompts = [message(WORDS * (1 + seed), picture(50 + seed)) for seed in range(3)]
    calibrate_basis(tiny("qwen2_5_vl"), [*prompts, message(WORDS * 20)], path, text=True)
    return str(path)


@dataclasses.dataclass(frozen=True)
class Dense:
    """What dense SGLang does: its answers to `REQUESTS`, one after the other, and what `load` finds.

    Attributes:
        answers: by name.
        hits: share of the prompt tokens that were cached.
        waits: seconds that requests took while others were refused, by what those were.
    """

    answers: dict
    hits: float
    waits: dict


@pytest.fixture(scope="session")
def dense(tiny, logs, tmp_path_factory):
    """What dense SGLang does, in a server that all processes of a test run ask once."""
    from filelock import FileLock
    from load import REFUSED, dense_server, hit_rate, waits
    from prompts import REQUESTS, TOKENS
    from serving import VIDEOS, Answer

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / "dense.json"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            with dense_server(tiny("qwen2_5_vl"), logs / "dense.log", *VIDEOS) as server:
                answers = {name: dataclasses.asdict(server.ask(asked, TOKENS)) for name, asked in REQUESTS.items()}
                found = {
                    "answers": answers,
                    "hits": hit_rate(server),
                    "waits": {kind: waits(server, kind) for kind in REFUSED},
                }
            path.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    answers = {name: Answer(**{**told, "logprobs": tuple(told["logprobs"])}) for name, told in found["answers"].items()}
    return Dense(answers, found["hits"], found["waits"])


@pytest.fixture(scope="session")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")
