"""The examples, run as a user runs them, on the reader that comes with the package."""

import base64
import http.server
import importlib.util
import json
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

import rotatek_cache

EXAMPLES = Path(__file__).parent.parent / "examples"
PAGES = Path(rotatek_cache.__file__).parent / "reader" / "pages"


def truth(page, question):
    entries = {entry["file"]: entry["questions"] for entry in json.loads((PAGES / "pages.json").read_text())}
    return next(known["answer"] for known in entries[page] if known["question"] == question)


@pytest.fixture
def run(capsys):
    def run_example(name, *arguments):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # what a user copies is not to be replaced soon
            module.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "deprecated" not in err, err
        return out.splitlines()

    return run_example


def test_every_example_is_run_here():
    text = Path(__file__).read_text(encoding="utf-8")
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert len(names) >= 6 and all(f'run("{name}"' in text for name in names)


def test_one_image(run):
    dense, compressed, *report = run("one_image")
    answer = truth("page1_easy.png", "row 1?")
    assert dense == f"DynamicCache: {answer}" and compressed == f"RotateKCache: {answer}"
    assert any("32/128" in line for line in report)


def test_a_conversation(run):
    first, second, *report = run("conversation")
    assert first == f"row 1? {truth('page1_easy.png', 'row 1?')}"
    assert second == f"column B? {truth('page1_easy.png', 'column B?')}"
    assert any("32/128" in line for line in report)


def test_new_images_in_a_later_turn(run):
    first, second, third, *report = run("new_images")
    assert first == f"row 1? {truth('page1_easy.png', 'row 1?')}"
    assert second == f"column B? {truth('page1_easy.png', 'column B?')}"
    assert third.startswith("row 1? ") and len(third) > len("row 1? ")  # of two pages, for which it was not trained
    segments = [line for line in report if " 324  " in line and "32/128" in line]
    assert len(segments) == 8  # two of each layer: one of each turn with an image


def test_a_batch(run):
    questions = ("row 1?", "colours row 2?")
    first, second, held = run("batch")
    assert first == f"{questions[0]} {truth('page1_easy.png', questions[0])}"
    assert second.startswith(questions[1])
    alone = run("batch", "--images", PAGES / "page2_medium.png", "--questions", questions[1])
    assert alone[0] == second  # padding changes no answer
    assert "for 2 prompts" in held


def test_a_budget(run):
    answer, *report = run("budget", "--budget", "0.5x")
    assert answer == truth("page1_easy.png", "row 1?")
    assert "budget" in "\n".join(report)
    fewer = run("budget", "--budget", "100")
    assert fewer[1:] != report


def test_many_questions(run):
    *answers, held = run("many_questions")
    questions = ("row 1?", "colours row 2?", "column B?", "glyph A2?")
    assert answers == [f"{question} {truth('page1_easy.png', question)}" for question in questions]
    prompt, more = (int(part.split()[0].replace(",", "")) for part in (held, held.partition("prompt, ")[2]))
    assert more < prompt / 4  # the image is not in it


def test_a_saved_prompt_in_a_new_process(run, tmp_path):
    questions = ("row 1?", "column B?")
    (stored,) = run("saved_prompt", "--file", tmp_path / "one", "--image", PAGES / "page1_easy.png", "--compress")
    assert "on disk (compressed" in stored
    command = [sys.executable, EXAMPLES / "saved_prompt.py", "--file", tmp_path / "one", "--questions", *questions]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = [f"{question} {truth('page1_easy.png', question)}" for question in questions]
    assert done.stdout.splitlines() == expected
    assert run("saved_prompt", "--file", tmp_path / "one", "--questions", *questions) == expected


def test_calibrate_and_reuse(run, tmp_path):
    basis = tmp_path / "basis.safetensors"
    written, answer, *report = run("calibrate", "--out", basis)
    assert basis.stat().st_size > 10_000 and "from 4 images" in written
    assert answer == f"row 1? {truth('page1_easy.png', 'row 1?')}"
    assert any("32/128" in line for line in report)


def test_a_client_of_a_server(run):
    """A stand-in answers; tests/integrations/sglang asks real servers the same way."""
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            reply = {"choices": [{"message": {"content": "7 K"}}], "usage": {"prompt_tokens": 330}}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page = PAGES / "page1_easy.png"
        url = f"http://127.0.0.1:{server.server_port}"
        assert run("serve", "--url", url, "--image", page, "--question", "row 1?") == ["7 K", "330 prompt tokens"]
    finally:
        server.shutdown()
        server.server_close()
    ((path, body),) = asked
    assert path == "/v1/chat/completions"
    picture, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "row 1?"}
    assert base64.b64decode(picture["image_url"]["url"].partition(",")[2]) == page.read_bytes()
