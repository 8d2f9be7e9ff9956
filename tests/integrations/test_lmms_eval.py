"""The lmms-eval plug-in: the command itself over the reader and a local task scores what the accuracy script scores."""

import importlib.metadata
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed", allow_module_level=True)

import datasets
from PIL import Image

from evals.accuracy import READER, Settings, run
from evals.tasks import load_task
from rotatek_lmms_eval import model as plugin

ROOT = Path(__file__).parents[2]
COUNT = 12
OPTIONS = {"rank": 8}
TASK = """task: reader_rows
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
process_results: !function utils.process
generation_kwargs: {{max_new_tokens: 16, temperature: 0, do_sample: false, until: ["ASSISTANT:"]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """def visual(doc):
    return [doc["image"].convert("RGB")]


def process(doc, results):
    return {"exact_match": float(results[0].lower() == doc["answer"].lower())}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Reader pages with questions about rows, as a dataset on disk and as a task in lmms-eval's own format."""
    home = tmp_path_factory.mktemp("lmms")
    source, rows = load_task("reader-hard-row"), []
    for index in range(COUNT):
        sample, file = source.sample(index), io.BytesIO()
        sample.images[0].save(file, "PNG")
        (turn,) = sample.turns
        image = {"bytes": file.getvalue(), "path": None}
        answer = turn.reference["answers"][0]
        rows.append({"type": turn.kind, "question": turn.text, "answer": answer, "image": image})
    (home / "data").mkdir()
    data = home / "data" / "test-0.parquet"
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(data)
    (home / "task").mkdir()
    (home / "task" / "reader_rows.yaml").write_text(TASK.format(data=data))
    (home / "task" / "utils.py").write_text(FUNCTIONS)
    return home


def lmms_eval(folder, out, *before):
    """Scores by document of the command, which must succeed, and how many requests its main process answered."""
    arguments = ",".join(f"{name}={value}" for name, value in OPTIONS.items())
    command = [
        sys.executable, *(before or ["-m"]), "lmms_eval", "--model", "rotatek",
        "--model_args", f"pretrained={READER},dtype=float32,device=cpu,{arguments}",
        "--tasks", "reader_rows", "--include_path", str(folder / "task"), "--batch_size", "4",
        "--log_samples", "--output_path", str(out),
    ]  # fmt: skip
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "integrations"))
    given = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(out / "home")}
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, check=False, cwd=folder)
    (log,) = [*out.rglob("*samples*.jsonl")] or pytest.fail(done.stdout[-3000:] + done.stderr[-3000:])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    answered = re.findall(r"Model Responding: 100%.* (\d+)/(\d+) ", done.stderr)
    assert answered, done.stderr[-3000:]
    return {line["doc_id"]: (line["filtered_resps"], line["exact_match"]) for line in lines}, int(answered[-1][0])


def ours(folder, out):
    path = {"path": str(folder / "data"), "suffix": "", "config": None}
    settings = Settings(tasks={"chartqa": path}, methods={"m": OPTIONS}, batch=4, seed=None, dtype="float32")
    result = run(settings, out, "cpu", quiet=True)["tasks"]["chartqa"]["methods"]["m"]
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    turns = {line["index"]: line["turns"][0] for line in lines if line["method"] == "m"}
    return result["mean"], {index: (turn["prediction"], turn["score"]) for index, turn in turns.items()}


needs_entry_point = pytest.mark.skipif(
    not importlib.metadata.entry_points(group="lmms_eval.models", name="rotatek"),
    reason="this package is not installed, so lmms-eval does not find its entry point",
)


@pytest.mark.slow
@needs_entry_point
def test_the_command_scores_what_the_accuracy_script_scores(folder, tmp_path):
    theirs, answered = lmms_eval(folder, tmp_path / "lmms")
    mean, expected = ours(folder, tmp_path / "ours")
    assert len(theirs) == answered == COUNT and 0 < mean < 1
    assert theirs == expected
    assert sum(score for _, score in theirs.values()) / COUNT == mean


@pytest.mark.slow
@needs_entry_point
def test_two_processes_score_what_one_does(folder, tmp_path):
    # Under --cpu accelerate starts one process, whatever number is asked for; so it starts several without GPUs too.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0", "-m"]
    both, answered = lmms_eval(folder, tmp_path / "two", *launch)
    assert answered == COUNT / 2
    _, expected = ours(folder, tmp_path / "ours")
    assert {index: score for index, (_, score) in both.items()} == {i: score for i, (_, score) in expected.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache": "none"}, "cache must be 'rotatek' or 'dense', got 'none'"),
        ({"cache": "dense", "sparsity": 0.5}, "cache=dense takes no options of RotateKCache, got sparsity"),
        ({"batch_size": "auto"}, "batch_size must be a positive number, got 'auto'"),
        ({"max_new_tokens": "x"}, "max_new_tokens must be a positive number, got 'x'"),
        ({"dtype": "float3"}, "dtype must be 'auto' or the name of a torch dtype, got 'float3'"),
        ({"sparsty": 0.5}, "unknown model arguments 'sparsty'; known are pretrained, .* of RotateKCache: sparsity, "),
        ({"sparsity": 0.5, "tokens": "fast:0.4"}, "tokens must name one of"),
        ({}, "sparsity"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        plugin.RotateK(str(READER), device="cpu", **arguments)


def test_settings_of_tasks_become_arguments_of_generate():
    assert plugin._sampling({"temperature": 0, "do_sample": False, "top_p": 1.0}) == {
        "do_sample": False,
        "num_beams": 1,
    }
    assert plugin._sampling({"temperature": 0, "num_beams": 3}) == {"do_sample": False, "num_beams": 3}
    assert plugin._sampling({"temperature": 0.7, "top_p": None}) == {"do_sample": True, "temperature": 0.7}
    assert plugin._until("7 K ASSISTANT: no", ["ASSISTANT:"]) == "7 K"
    assert plugin._until("a\n\nb", "\n\n") == "a"
    assert plugin._until("a", None) == "a"


def test_answers_come_in_the_order_of_their_requests():
    """Requests of two tasks with settings of their own, and of a conversation without an image."""
    from lmms_eval.api.instance import Instance

    source = load_task("reader-easy-row")
    samples = [source.sample(index) for index in range(5)]
    model = plugin.RotateK(str(READER), device="cpu", batch_size=2, dtype="float32", sparsity=0.5)
    model.task_dict = {name: {"test": samples} for name in ("one", "two")}

    def messages(sample):
        image = {"type": "image", "url": sample.images[0]}
        return [{"role": "user", "content": [image, {"type": "text", "text": sample.turns[0].text}]}]

    requests = [
        Instance(
            "generate_until", ("?", messages, {"max_new_tokens": length}, index, task, "test"), 0,
            {"task": task, "doc_id": index, "repeats": 1},
        )
        for task, length in (("one", 8), ("two", 1))
        for index in (3, 0, 4, 1, 2)
    ]  # fmt: skip
    answers = model.generate_until(requests)
    truth = [samples[index].turns[0].reference["answers"][0] for index in (3, 0, 4, 1, 2)]
    assert answers == truth + [answer.split()[0] for answer in truth]
    with pytest.raises(NotImplementedError, match="log-likelihoods"):
        model.loglikelihood([])
    assert isinstance(samples[0].images[0], Image.Image) and torch.get_default_dtype() == torch.float32
