"""The console command, run for real on the reader that comes with the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from rotatek_cache.cli import demo
from rotatek_cache.cli.app import _answers_table, app
from rotatek_cache.cli.demo import CODED, Question, Setting, comparison, fewest_tokens, open_page, run, steps
from rotatek_cache.cli.demo_figure import draw
from rotatek_cache.hf.chat import READER, Chat

ROOT = Path(__file__).parents[2]
PAGES = READER / "pages"
QUICK = ["--max-new-tokens", "8", "--timed-tokens", "3", "--sparsity", "0.75", "--long-prompt", "0"]
SETTINGS = [Setting.of_sparsity(0.0), Setting.of_sparsity(0.75), CODED]


def call(*arguments):
    """Run the command in this process; what it printed comes as one line, since tables wrap."""
    result = CliRunner().invoke(app, ["demo", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def chat():
    return Chat.load()


@pytest.fixture(scope="module")
def result(chat):
    page = open_page(PAGES / "page2_medium.png")
    questions = page.samples()[:3]
    seen = []
    done = run(
        chat,
        page,
        questions,
        settings=SETTINGS,
        max_new_tokens=8,
        timed_tokens=4,
        long_prompt=1000,
        advance=seen.append,
    )
    assert len(seen) == steps(len(questions), 3, long_prompt=True)
    return done


def test_the_demo_as_a_newcomer_runs_it(tmp_path):
    command = [sys.executable, "-m", "rotatek_cache", "demo", "--timed-tokens", "4", "--long-prompt", "800"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    questions = open_page(demo.READER_PAGE).samples()
    assert len(questions) >= 6
    for question in questions:
        assert question.text in out
    assert re.search(r"\b(right|wrong)\b", out)
    assert "second turn" in out
    assert "dense (DynamicCache)" in out
    for setting in ("0 ", "0.5", "0.75", "0.875", "coded"):
        assert out.count(f"RotateKCache, {setting}") == 2
    assert "the image 3 times, 972 visual tokens" in out
    assert "its answers would say nothing" in " ".join(out.split())
    assert "ms/token" in out
    assert "visual tokens on" in out
    assert "RotateK cache, " in out  # the report
    assert not re.search(r"warning|Loading weights|torchvision|Traceback", done.stderr, re.IGNORECASE), done.stderr
    with Image.open(tmp_path / "demo_output" / "page3_hard.png") as picture:
        assert picture.width > 1000
        assert picture.height > 500
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 100


def test_bytes_are_those_of_the_tensors(result):
    text = Chat.load().model.config.get_text_config()
    dense, exact, small, coded = result.measurements
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    assert result.visual_tokens == 324
    assert dense.tokens == exact.tokens == small.tokens
    assert dense.nbytes == dense.tokens * per_token
    assert dense.nbytes * 0.99 < exact.nbytes < dense.nbytes * 1.2
    assert small.nbytes < 0.8 * dense.nbytes
    assert coded.nbytes < small.nbytes / 2
    assert comparison(dense, small) == f"{dense.nbytes / small.nbytes:.2f}x smaller"
    assert small.report is not None
    assert small.report.stored_bytes == small.nbytes
    assert all(m.ms_per_token > 0 for m in result.measurements)


def test_a_long_prompt_repeats_the_image(result):
    many = result.long_prompt
    assert (many.copies, many.visual_tokens) == (4, 4 * 324)
    dense, exact, small, coded = many.costs
    assert many.dense is dense
    assert [cost.setting for cost in many.costs] == [m.setting for m in result.measurements]
    assert dense.tokens == coded.tokens == result.dense.tokens + 3 * 324
    assert dense.nbytes * 0.99 < exact.nbytes < dense.nbytes * 1.2
    assert coded.nbytes < small.nbytes / 4
    assert coded.nbytes < dense.nbytes / 8


def test_sparsity_zero_answers_as_the_dense_cache_does(result):
    exact = result.measurements[1]
    assert exact.setting == Setting.of_sparsity(0.0)
    assert all(answer.same for answer in exact.answers)
    assert exact.follow_up is not None
    assert exact.follow_up.same


def test_answers_are_judged_by_the_truth(result):
    for measurement in result.measurements:
        for answer in measurement.answers:
            assert answer.right == (answer.text == answer.question.truth)


def test_the_second_turn_sees_what_a_whole_conversation_shows(chat):
    page = open_page(PAGES / "page2_medium.png")
    first, second = page.samples()[:2]
    dense = run(chat, page, [first, second], settings=[], max_new_tokens=8, timed_tokens=3).dense
    assert dense.follow_up is not None
    turns = [
        {"role": "user", "content": [{"type": "image", "image": page.image}, {"type": "text", "text": first.text}]},
        {"role": "assistant", "content": [{"type": "text", "text": dense.answers[0].text}]},
        {"role": "user", "content": [{"type": "text", "text": second.text}]},
    ]
    (text,) = chat.begin_with(chat.inputs([turns]), DynamicCache(), max_new_tokens=8).answers
    stopped = len(dense.answers[0].text.split()) < 8  # an answer cut short lacks the <eos> that the template writes
    assert text == dense.follow_up.text or not stopped


def test_an_image_of_another_size_and_ones_own_question(tmp_path):
    image = tmp_path / "mine.jpg"
    Image.new("RGB", (301, 97), (200, 220, 240)).save(image)
    out = tmp_path / "out"
    done = call("--image", image, "--question", "row 1?", "--question", "glyph [A1]?", "--out", out, *QUICK)
    assert done.exit_code == 0, done.output
    assert "301 x 97" in done.output
    assert "glyph [A1]?" in done.output
    assert "unknown" in done.output  # no truth: nothing is right or wrong
    assert "2 of" not in done.output.partition("ms/token")[0]
    assert (out / "mine.png").stat().st_size > 10_000


def test_the_readers_own_questions_for_an_image_without_any(tmp_path):
    image = tmp_path / "mine.png"
    Image.new("L", (20, 400)).save(image)
    done = call("--image", image, "--out", tmp_path, *QUICK)
    assert done.exit_code == 0, done.output
    assert demo.READER_QUESTIONS[0] in done.output


def test_truths_beside_an_image_are_used(tmp_path):
    shutil.copy(PAGES / "page1_easy.png", tmp_path / "a.png")
    entry = {"file": "a.png", "questions": [{"question": "row 1?", "answer": "no such answer"}]}
    (tmp_path / "pages.json").write_text(json.dumps([entry]))
    done = call("--image", tmp_path / "a.png", "--out", tmp_path / "out", *QUICK)
    assert done.exit_code == 0, done.output
    assert "wrong" in done.output
    assert "no such answer" in done.output
    page = open_page(tmp_path / "a.png")
    assert page.question("row 1") == Question("row 1", "no such answer")
    assert page.question("row 2?").truth is None


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"a": 1}', '[{"file": "a.png"}]'])
def test_a_pages_json_of_another_kind_is_ignored(tmp_path, content):
    shutil.copy(PAGES / "page1_easy.png", tmp_path / "a.png")
    (tmp_path / "pages.json").write_text(content)
    assert open_page(tmp_path / "a.png").questions == ()


@pytest.mark.parametrize("template", [True, False])
def test_ones_own_model_from_a_folder(tmp_path, template):
    model = tmp_path / "model"
    shutil.copytree(READER, model, ignore=None if template else shutil.ignore_patterns("chat_template*"))
    questions = ["--question", "row 1?", "--question", "row 2?"]
    done = call("--model", model, *questions, "--out", tmp_path / "out", "--dtype", "float32", *QUICK)
    assert done.exit_code == 0, done.output
    assert str(model) in done.output
    assert ("second turn" in done.output) == template


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language_model")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    config = Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare_model")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(READER / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def only_a_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("only_a_tokenizer")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(READER / name, folder / name)
    return folder


def refused(*arguments):
    """What the command says when it refuses `arguments`."""
    done = call(*arguments)
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.output).split())
    assert done.exit_code == 2, said
    assert "Traceback" not in said
    return said


def test_bad_images_are_refused(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"this is no image")
    cut = tmp_path / "cut.png"
    cut.write_bytes((PAGES / "page3_hard.png").read_bytes()[:9000])
    assert f"there is no image file '{tmp_path / 'none.png'}'" in refused("--image", tmp_path / "none.png")
    assert "there is no image file" in refused("--image", tmp_path)
    assert "cannot be read as an image" in refused("--image", broken)
    assert "cannot be read as an image" in refused("--image", cut)


@pytest.mark.parametrize("value", ["1", "-0.1", "1.5", "nan"])
def test_bad_sparsities_are_refused(value):
    assert f"sparsity must be in [0, 1), got {float(value)}" in refused(f"--sparsity={value}")


def test_what_is_no_number_is_refused():
    assert "Invalid value for '--sparsity'" in refused("--sparsity", "much")
    assert "Invalid value for '--max-new-tokens'" in refused("--max-new-tokens", "0")


def test_bad_models_are_refused(tmp_path, language_model, bare_model, only_a_tokenizer):
    assert f"there is no folder '{tmp_path / 'none'}'" in refused("--model", tmp_path / "none")
    assert f"there is no model '{tmp_path}'" in refused("--model", tmp_path)
    assert "(qwen2) is no vision-language model" in refused("--model", language_model)
    assert "has no processor" in refused("--model", bare_model)
    assert "has no processor" in refused("--model", only_a_tokenizer)


def test_weights_that_are_missing_or_broken_are_refused(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(READER, model)
    (model / "model.safetensors").unlink()
    assert "cannot be loaded" in refused("--model", model)
    (model / "model.safetensors").write_bytes(b"no weights")
    assert "cannot be loaded" in refused("--model", model)


def test_bad_dtype_and_device_and_folder_are_refused(tmp_path):
    for name in ("float33", "int32", "nn"):
        assert "dtype must be 'auto' or the name of a floating torch dtype" in refused("--dtype", name)
    assert "device 'abacus'" in refused("--device", "abacus")
    if not torch.cuda.is_available():
        assert "device 'cuda'" in refused("--device", "cuda")
    (tmp_path / "file").touch()
    assert "the picture cannot be written" in refused("--out", tmp_path / "file", "--question", "row 1?", *QUICK)


def test_break_even_is_where_bytes_begin_to_be_saved():
    # 64 of 128 channels: n * 64 + 128 * 64 + 128 < n * 128 from n = 131 on.
    assert fewest_tokens(128, 0.5) == 131
    assert fewest_tokens(128, 0.75) == 45
    assert fewest_tokens(128, 0.875) == 20
    assert fewest_tokens(8, 0.5) is None  # padding to eight columns leaves nothing to save


def test_answers_that_differ_are_told_apart_and_drawn(result, tmp_path):
    dense, exact, small, coded = result.measurements
    other = replace(small.answers[0], text="something else " * 40, same=False)
    changed = replace(result, measurements=(dense, exact, replace(small, answers=(other, *small.answers[1:])), coded))
    assert list(_answers_table(changed).columns[3].cells)[:2] == ["dense, 0, coded", "0.75"]
    draw(changed, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    draw(replace(changed, long_prompt=None), tmp_path / "alone.png")
    assert (tmp_path / "alone.png").stat().st_size > 10_000


def test_version_and_help():
    runner = CliRunner()
    assert re.fullmatch(r"rotatek-cache \d+\.\d+\.\d+\n", runner.invoke(app, ["--version"]).output)
    assert "--sparsity" in runner.invoke(app, ["demo", "--help"]).output
