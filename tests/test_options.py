"""Options are documented once: what shows them elsewhere is made of, or equal to, what their fields hold."""

import dataclasses
import inspect
from pathlib import Path

import pytest

from rotatek_cache import FitOptions, RotateKCache
from rotatek_cache.options import STUDY_OPTIONS, options_table

DOCS = Path(__file__).parents[1] / "docs" / "options.md"
FIELDS = {field.name: field for field in dataclasses.fields(FitOptions)}


def test_the_documented_table_is_current():
    text = DOCS.read_text(encoding="utf-8")
    # Without the empty line, what follows would be a line of the table.
    assert f"\n\n{options_table()}\n\n" in text, "run python -m rotatek_cache.options, and paste"


def test_the_cache_takes_and_documents_every_option_that_is_no_study_s():
    parameters = inspect.signature(RotateKCache).parameters
    shown = [name for name in FIELDS if name not in STUDY_OPTIONS]
    assert list(parameters)[: len(shown)] == shown
    for name in shown:
        default = FIELDS[name].default
        assert parameters[name].default == ("uniform" if name == "allocation" else default)
        assert f"        {name}: {FIELDS[name].metadata['help'][:30]}" in RotateKCache.__doc__
    assert not set(STUDY_OPTIONS) & set(parameters)


def test_studies_have_all_options_and_the_rest_of_the_constructor():
    cache = RotateKCache.for_study(rank=8, solver="eigh", always_compress=True, tokens="fastv:0.5")
    assert cache.options == FitOptions(rank=8, solver="eigh", always_compress=True)
    assert cache.tokens.keep == 0.5
    with pytest.raises(TypeError, match="ranks"):
        RotateKCache.for_study(ranks=8)


def test_a_basis_file_is_kept_by_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert FitOptions(rank=8, basis=Path("b.safetensors")).basis == str(tmp_path / "b.safetensors")
