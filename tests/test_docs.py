"""What README, docs, examples and evals tell a reader to run, open or follow is there."""

import ast
import re
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path
    for folder in ("evals", "examples", "integrations", "kernels", "rotatek_cache")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yaml")
]
TEXTS = [*PAGES, ROOT / "Makefile", *SOURCES]
PACKAGES = (ROOT, ROOT / "kernels", ROOT / "integrations")


def texts():
    return [(path, path.read_text(encoding="utf-8")) for path in TEXTS]


def is_module(name):
    path = Path(*name.split("."))
    return any(
        (root / path).with_suffix(".py").is_file() or (root / path / "__main__.py").is_file() for root in PACKAGES
    )


def anchors(page):
    titles = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_modules_that_are_run_exist():
    found = {(name, path) for path, text in texts() for name in re.findall(r"(?:python3?|launch) -m ([\w.]*\w)", text)}
    ours = {(name, path) for name, path in found if name.split(".")[0] in ("evals", "rotatek_cache", "rotatek_sglang")}
    assert {"evals.fidelity", "evals.accuracy", "evals.report", "rotatek_sglang.launch"} <= {name for name, _ in ours}
    assert not [(name, path) for name, path in ours if not is_module(name)]


def test_scripts_that_are_run_by_path_exist_and_need_no_neighbours():
    """`python evals/x.py` does not see the package `evals`; `python -m evals.x` does."""
    found = {
        (name, path)
        for path, text in texts()
        for name in re.findall(r"python ((?:evals|tests|examples)/[\w/]+\.py)", text)
    }
    assert found
    for name, path in found:
        source = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"^from evals|^import evals", source, re.MULTILINE), (
            f"{name}, named in {path}, needs python -m"
        )


def test_targets_of_make_exist():
    rules = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    found = {
        (name, path)
        for path in PAGES
        for name in re.findall(r"(?m)(?:^    |`)make ([a-z-]+)", path.read_text(encoding="utf-8"))
    }
    assert {"demo", "test"} <= {name for name, _ in found}
    assert not [(name, path) for name, path in found if name not in rules]


def test_files_that_are_named_exist():
    """Braces and stars stand for several."""
    missing = []
    named = re.compile(
        r"(?<![\w/.])((?:docs|evals|examples|integrations|kernels|rotatek_cache|tests)/[\w/.{},*-]*[\w}*])"
    )
    for path in PAGES:
        for name in named.findall(path.read_text(encoding="utf-8")):
            choice = re.search(r"\{(.*)\}", name)
            names = [name.replace(choice[0], part) for part in choice[1].split(",")] if choice else [name]
            missing += [(path.name, one) for one in names if not list(ROOT.glob(one))]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        goal = page.parent / name if name else page
        assert goal.exists(), target
        if anchor:
            assert anchor in anchors(goal), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_python_and_its_imports_work(page):
    for block in re.findall(r"(?ms)^```python\n(.*?)^```", page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "rotatek_cache":
                import rotatek_cache

                assert {alias.name for alias in node.names} <= set(rotatek_cache.__all__)


def test_every_family_is_listed():
    from rotatek_cache import families

    listed = set(
        re.findall(r"^\| `(\S+)` \| i", (ROOT / "docs" / "families.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert set(families()) <= listed


@pytest.mark.skipif(version("transformers").split(".")[:2] != ["5", "24"], reason="the list is of transformers 5.24")
def test_the_list_of_model_types_is_what_attach_does():
    from rotatek_cache.hf.family_list import model_types, tables

    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert tables() in page, "run python -m rotatek_cache.hf.family_list, and paste"
    assert all(f"`{name}`" in page for name in model_types())


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
