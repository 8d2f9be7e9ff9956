"""`rotatek check`, run for real on the reader that comes with the package."""

import warnings

import pytest
from typer.testing import CliRunner

from rotatek_cache.cli.app import app
from rotatek_cache.hf import identity
from rotatek_cache.hf.chat import READER


def _check(*arguments):
    result = CliRunner().invoke(app, ["check", str(READER), *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def test_a_model_that_works():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # the cache goes by the name that this transformers has for it
        code, out = _check("--tokens", "3")
    assert code == 0
    assert "1 row, 330 tokens, of which visual: 324; 4 compressed segments" in out
    assert "2 rows, 336 tokens, of which visual: 324, 324; 4 compressed segments" in out
    assert out.count("all coefficients: largest difference") == 2
    assert out.count("the same token in 6 of 6 steps") == 2
    assert out.count("the same as DynamicCache") == 2
    assert "NOT" not in out


def test_a_model_that_gives_something_else(monkeypatch):
    monkeypatch.setattr(identity, "SETTINGS", {"few coefficients": {"sparsity": 0.9}})
    code, out = _check("--tokens", "3", "--question", "row 3?")
    assert code == 1
    assert out.count("NOT the same as DynamicCache") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--visual-token-id", "7"), "must hold visual tokens, got none: those of this model are [7]; the ids that"),
        (("--image", "nowhere.png"), "there is no image file 'nowhere.png'"),
        (("--dtype", "int8"), "dtype must be 'auto' or the name of a floating torch dtype, got 'int8'"),
    ],
)
def test_what_cannot_be_checked(arguments, message):
    code, out = _check(*arguments)
    assert code == 2
    assert message in out
