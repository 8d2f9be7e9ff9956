"""The accuracy script: tasks in the hub's own fields, answers, paired scores, resuming, processes, bad input."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import DynamicCache

from evals import accuracy
from evals.accuracy import RunError, Settings, expand, parse, run, sample_order
from evals.metrics import MetricError
from evals.reader.pages import SAMPLE_SEEDS, ask, make_page
from evals.scores import score
from evals.tasks import SampleError, TaskError, load_task, task_names
from rotatek_cache import RotateKCache
from rotatek_cache.hf.chat import Chat, InputError

ROOT = Path(__file__).parents[2]
LOSSY = {"lossy": {"rank": 8, "always_compress": True}}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def chat():
    return Chat.load(str(accuracy.READER), dtype=torch.float32)


def picture(colour="red", fmt="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (16, 12), colour).save(file, fmt)
    return {"bytes": file.getvalue(), "path": None}


# One row of each benchmark with the fields and types that it has on the hub.
ROWS = {
    "textvqa": {"image_id": "a", "question_id": 7, "question": "what brand is it?", "answers": ["nokia"] * 10},
    "infovqa": {"questionId": "3", "question": "How many?", "answers": ["4", "four"], "docId": "1"},
    "docvqa": {"questionId": "4", "question": "Date?", "question_types": ["form"], "answers": ["1/8/93"]},
    "chartqa": {"type": "human_test", "question": "Highest?", "answer": "14"},
    "vizwiz": {"question_id": "v1", "question": "what is this?", "answers": ["can"] * 10, "category": "other"},
    "ocrbench": {"dataset": "IIIT5K", "question": "text?", "question_type": "Regular Text", "answer": ["CENTRE"]},
    "coco-caption": {"question_id": "c.jpg", "question": "Caption!", "answer": ["a cat"] * 5, "id": 9},
    "mathvista": {
        "pid": "1", "query": "Hint: ... Question: how much?", "choices": ["1", "2"], "answer": "2", "unit": None,
        "precision": 1.0, "question_type": "multi_choice", "answer_type": "text", "metadata": {"split": "testmini"},
        "image": "images/1.jpg",
    },
}  # fmt: skip
ASKED = {
    "textvqa": "What brand is it?\nAnswer the question using a single word or phrase.",
    "infovqa": "How many?\nAnswer the question using a single word or phrase.",
    "docvqa": "Date?\nAnswer the question using a single word or phrase.",
    "chartqa": "Highest?\nAnswer the question with a single word.",
    "vizwiz": "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase.",
    "ocrbench": "text?",
    "coco-caption": "Provide a one-sentence caption for the provided image.",
    "mathvista": "Hint: ... Question: how much?",
}


def save(folder, rows, split, image="image", way="parquet", config="default"):
    table = datasets.Dataset.from_list(rows).cast_column(image, datasets.Image())
    if way == "parquet":
        folder.mkdir(exist_ok=True)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        files = [{"split": split, "path": f"{split}-*"}]
        card = {"configs": [{"config_name": name, "data_files": files} for name in (config, "another")]}
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")  # as a repository of the hub has it
    elif way == "dict":
        datasets.DatasetDict({split: table}).save_to_disk(folder)
    else:
        table.save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize("way", ["parquet", "dict", "plain"])
@pytest.mark.parametrize("name", ROWS)
def test_benchmarks_are_read_with_the_hubs_own_fields(tmp_path, name, way):
    from evals.tasks.hub import HUB

    fields = HUB[name]
    row = ROWS[name] | {fields.image: picture("blue")}
    path = save(tmp_path / "data", [row, row], fields.split, fields.image, way, fields.config or "default")
    task = load_task(name, {"path": path})
    assert len(task) == 2
    sample = task.sample(1)
    assert sample.images[0].size == (16, 12) and sample.images[0].getpixel((3, 3)) == (0, 0, 255)
    (turn,) = sample.turns
    assert turn.text == ASKED[name]
    answers = ROWS[name][fields.answers]
    assert turn.reference["answers"] == (answers if isinstance(answers, list) else [answers])
    assert all(turn.reference[extra] == ROWS[name][extra] for extra in fields.extra)
    assert sample.id == (str(ROWS[name][fields.id]) if fields.id else "1")


def test_tables_may_name_image_files(tmp_path):
    """As image folders with metadata do, and tables of paths in the dataset's folder."""
    row = ROWS["chartqa"]
    for name, key, table in (("folder", "file_name", "metadata.jsonl"), ("paths", "image", "test.jsonl")):
        home = tmp_path / name if key == "image" else tmp_path / name / "test"
        home.mkdir(parents=True)
        Image.new("RGB", (16, 12), "blue").save(home / "1.png")
        (home / table).write_text(json.dumps(row | {key: "1.png"}) + "\n")
        sample = load_task("chartqa", {"path": str(tmp_path / name)}).sample(0)
        assert sample.images[0].getpixel((3, 3)) == (0, 0, 255) and sample.turns[0].reference["answers"] == ["14"]


def test_a_folder_that_changes_is_read_again(tmp_path):
    for answer in ("1", "2"):
        path = save(tmp_path / "data", [ROWS["chartqa"] | {"image": picture(), "answer": answer}], "test")
        assert load_task("chartqa", {"path": path}).sample(0).turns[0].reference["answers"] == [answer]


def test_a_sample_that_cannot_be_used_says_why(tmp_path):
    good = ROWS["chartqa"] | {"image": picture()}
    rows = [
        good | {"answer": ""},
        good | {"image": {"bytes": b"no image", "path": None}},
        good | {"image": {"bytes": picture()["bytes"][:40], "path": None}},
        good | {"image": None},
        good,
    ]
    task = load_task("chartqa", {"path": save(tmp_path / "data", rows, "test")})
    for index, why in enumerate(["has no answer", "cannot be read", "cannot be read", "is missing"]):
        with pytest.raises(SampleError, match=rf"sample {index} of 'chartqa'.*{why}|{why}"):
            task.sample(index)
    assert task.sample(4).turns[0].reference["answers"] == ["14"]


def test_peoples_answers_are_all_kept_and_enough(tmp_path):
    good = ROWS["textvqa"] | {"image": picture()}
    rows = [good | {"answers": ["nokia"] * 8 + ["", None]}, good | {"answers": ["nokia"] * 3}]
    path = save(tmp_path / "data", rows, "validation")
    task = load_task("textvqa", {"path": path})
    assert task.sample(0).turns[0].reference["answers"] == ["nokia"] * 8 + ["", ""]
    with pytest.raises(SampleError, match="needs the answers of at least 4 people, got 3"):
        task.sample(1)
    other = load_task("textvqa", {"path": path, "metric": "anls"})
    assert other.sample(0).turns[0].reference["answers"] == ["nokia"] * 8 and other.sample(1)
    with pytest.raises(TaskError, match=r"metric must be one of .*anls.*, got 'bleu'"):
        load_task("textvqa", {"path": path, "metric": "bleu"})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nonsense", {}, "unknown task 'nonsense'; known are reader-easy-cell"),
        ("reader-hard-cell", {"path": "x"}, "takes no options"),
        ("chartqa", {"answer": "x"}, "has no option 'answer'; known are answers"),
    ],
)
def test_a_wrong_task_is_named(name, options, message):
    with pytest.raises(TaskError, match=message):
        load_task(name, options)


def test_missing_fields_splits_and_folders_are_named(tmp_path):
    rows = [{"query": "?", "answer": "1", "image": picture()}]
    path = save(tmp_path / "data", rows, "test")
    with pytest.raises(TaskError, match="has no field 'question', 'type'; it has query, answer, image"):
        load_task("chartqa", {"path": path})
    with pytest.raises(TaskError, match="split 'val' of"):
        load_task("chartqa", {"path": path, "split": "val"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskError, match=r"'chartqa': split 'test' of '.*empty' cannot be loaded"):
        load_task("chartqa", {"path": str(tmp_path / "empty")})
    datasets.Dataset.from_list([ROWS["chartqa"] | {"image": 3}]).save_to_disk(tmp_path / "numbers")
    with pytest.raises(TaskError, match=r"field 'image' of .*numbers' must hold one image a row, it holds .*int64"):
        load_task("chartqa", {"path": str(tmp_path / "numbers")})
    datasets.Dataset.from_list([ROWS["chartqa"] | {"image": [picture()]}]).save_to_disk(tmp_path / "lists")
    with pytest.raises(TaskError, match="must hold one image a row"):
        load_task("chartqa", {"path": str(tmp_path / "lists")})
    renamed = load_task("chartqa", {"path": path, "question": "query", "kind": "", "suffix": ""})
    assert renamed.sample(0).turns[0].text == "?"


def test_reader_samples_are_the_same_every_time_and_ask_what_they_say():
    for name in [name for name in task_names() if name.startswith("reader-")]:
        task = load_task(name)
        first, again, other = task.sample(3), task.sample(3), task.sample(4)
        assert first.images == again.images and first.turns == again.turns
        assert first.images != other.images
        what = name.split("-", 2)[2]
        samples = [task.sample(index) for index in range(24)]
        kinds = {turn.kind for sample in samples for turn in sample.turns if turn.scored}
        expected = {
            "cell": {"glyph", "colour"}, "count": {"count"}, "compare": {"compare"}, "where": {"where"},
            "row": {"row", "column", "row_colours", "column_colours"}, "conversation": {"row"},
        }  # fmt: skip
        assert kinds == expected.get(what.removeprefix("then-"), kinds)
        scored = [turn.scored for turn in first.turns]
        later = what in ("second", "conversation") or what.startswith("then-")
        assert scored == [not later] + [True] * (len(scored) - 1) and (len(scored) > 1) == later
        if what == "second":
            assert all(sample.turns[0].kind != sample.turns[1].kind for sample in samples)
    with pytest.raises(TaskError, match="sample must lie in"):
        task.sample(100_000)


def test_a_higher_limit_goes_on_with_the_same_samples():
    task = load_task("reader-easy-cell")
    assert sample_order(task, 20, 5)[:10] == sample_order(task, 10, 5)
    assert sample_order(task, 10, 5) != sample_order(task, 10, 6)
    assert sample_order(task, 3, None) == [0, 1, 2]


def test_conversations_in_a_padded_batch_are_those_of_each_alone(chat):
    pages = [make_page(SAMPLE_SEEDS[9 + index], level) for index, level in enumerate(("hard", "easy", "medium"))]
    turns = [[ask(page, np.random.default_rng(turn), kind) for page, kind in zip(pages, kinds, strict=True)]
             for turn, kinds in enumerate([("glyph", "row", "column"), ("row", "colour", "row_colours"),
                                           ("colour", "column", "glyph")])]  # fmt: skip
    for make in (DynamicCache, lambda: RotateKCache.for_study(rank=24, always_compress=True)):
        batch = chat.begin([[p.image] for p in pages], [q.text for q in turns[0]], make(), max_new_tokens=8)
        together = [batch.answers]
        for later in turns[1:]:
            chat.go_on(batch, [q.text for q in later])
            together.append(batch.answers)
        assert (batch.mask == 0).any()  # answers of different lengths, so the rows are padded inside
        for row, page in enumerate(pages):
            one = chat.begin([[page.image]], [turns[0][row].text], make(), max_new_tokens=8)
            alone = [one.answers[0]]
            for later in turns[1:]:
                chat.go_on(one, [later[row].text])
                alone.append(one.answers[0])
            assert alone == [answers[row] for answers in together] == [turn[row].answer for turn in turns]


def test_an_answer_cut_short_is_ended_by_the_template(chat):
    page = make_page(SAMPLE_SEEDS[3], "hard")
    question = ask(page, np.random.default_rng(0), "row")
    batch = chat.begin([[page.image]], [question.text], DynamicCache(), max_new_tokens=2)
    assert batch.answers[0].split() == question.answer.split()[:2] and batch.ends == [None]
    cut = batch.ids.shape[1]
    chat.go_on(batch, ["glyph A1?"])
    assert batch.ids[0, cut].item() == chat.processor.tokenizer.eos_token_id
    assert batch.answers == [page.glyphs[0][0]]


def line(method, index, score_of_turns, bytes_held=10.0):
    turns = [
        {"prediction": "x" if right else "y", "reference": {"answers": ["x"]}, "kind": kind, "scored": kind != "first"}
        for kind, right in score_of_turns
    ]
    return {"task": "t", "method": method, "index": index, "turns": turns, "cache_bytes": bytes_held}


def test_scores_errors_and_paired_differences_by_hand():
    dense = [line("dense", i, [("first", True), ("a" if i % 2 else "b", True)], 40.0) for i in range(4)]
    other = [line("m", i, [("first", False), ("a" if i % 2 else "b", i != 0)], 10.0) for i in range(4)]
    failed = {"task": "t", "index": 9, "error": "unreadable"}
    table = {"dense": [*dense, failed | {"method": "dense"}], "m": [*other, failed | {"method": "m"}]}
    result = score("exact_match", table, {"m": {"rank": 8}})
    assert result["samples"] == 4 and result["failed"] == [{"index": 9, "error": "unreadable"}]
    m = result["methods"]["m"]
    assert m["mean"] == 0.75 and m["n"] == 4 and m["options"] == {"rank": 8}
    assert m["se"] == pytest.approx(0.5 / 2)  # deviations 3/4, 1/4, 1/4, 1/4: variance 3/12, over 4 samples
    assert m["ratio"] == 4.0
    assert m["against_dense"]["mean"] == -0.25 and m["against_dense"]["se"] == pytest.approx(0.25)
    assert m["kinds"]["a"]["mean"] == 1.0 and m["kinds"]["b"]["mean"] == 0.5
    assert [turn["mean"] for turn in m["turns"]] == [0.0, 0.75]
    low, high = m["against_dense"]["interval_95"]
    assert low == -0.75 and high == 0.0


def test_lists_of_options_become_methods():
    methods = expand([("a", {"sparsity": [0.5, 0.75], "basis": "pca"}), ("b", {"rank": 8})])
    assert methods == {
        "a sparsity=0.5": {"sparsity": 0.5, "basis": "pca"},
        "a sparsity=0.75": {"sparsity": 0.75, "basis": "pca"},
        "b": {"rank": 8},
    }
    with pytest.raises(RunError, match="two are called 'a rank=8'"):
        expand([("a", {"rank": [8]}), ("a rank=8", {"rank": 16})])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two tasks in small batches, and where it lies."""
    settings = Settings(
        tasks={"reader-hard-second": {}, "reader-easy-conversation": {}}, methods=LOSSY, limit=4, batch=2
    )
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return settings, folder, run(settings, folder, "cpu", quiet=True)


def predictions(folder):
    return [json.loads(text) for text in (folder / "predictions.jsonl").read_text().splitlines()]


def test_a_run_writes_what_it_says(finished):
    settings, folder, result = finished
    assert sorted(path.name for path in folder.iterdir()) == ["predictions.jsonl", "run.json", "scores.json"]
    assert json.loads((folder / "scores.json").read_text()) == json.loads(json.dumps(result))
    lines = predictions(folder)
    assert len(lines) == 2 * 4 * 2 and all(turn["score"] in (0, 1) for line in lines for turn in line["turns"])
    dense = result["tasks"]["reader-hard-second"]["methods"]["dense"]
    assert dense["mean"] >= 0.75
    lossy = result["tasks"]["reader-hard-second"]["methods"]["lossy"]
    assert 1.5 < lossy["ratio"] < 2 and lossy["cache_bytes"] < dense["cache_bytes"]
    with pytest.raises(RunError, match="finished run, which is not overwritten"):
        run(settings, folder, "cpu", quiet=True)


def test_a_stopped_run_goes_on_where_it_was(finished, tmp_path, monkeypatch):
    settings, folder, whole = finished
    answered = []
    real = accuracy.answer_batch

    def stop_at_the_third(*args):
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append((args[1].name, *args[2]))
        return real(*args)

    monkeypatch.setattr(accuracy, "answer_batch", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "again", "cpu", quiet=True)
    part = tmp_path / "again" / "part-0.jsonl"
    with part.open("a") as file:
        file.write('{"task": "reader-easy-conv')
    with part.open("ab") as file:
        file.write("é".encode()[:1])  # as a kill in the middle of a line leaves it, and of a letter
    with pytest.raises(RunError, match=r"other settings \(limit\)"):
        run(Settings(**vars(settings) | {"limit": 3}), tmp_path / "again", "cpu", quiet=True)
    monkeypatch.setattr(
        accuracy, "answer_batch", lambda *args: answered.append((args[1].name, *args[2])) or real(*args)
    )
    result = run(settings, tmp_path / "again", "cpu", quiet=True)
    assert len(answered) == 4 and len(set(answered)) == 4  # none twice
    assert result["tasks"] == whole["tasks"]
    assert predictions(tmp_path / "again") == predictions(folder)


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(finished, tmp_path):
    settings, folder, whole = finished
    methods = [f"--method={name}={json.dumps(options)}" for name, options in LOSSY.items()]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
        "-m", "evals.accuracy", "--tasks", *settings.tasks, *methods, "--limit", "4", "--batch", "2",
        "--device", "cpu", "--out", str(tmp_path / "two"),
    ]  # fmt: skip
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "integrations"))
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "two" / "scores.json").read_text())
    assert result["environment"]["processes"] == 2
    assert result["tasks"] == json.loads(json.dumps(whole["tasks"]))
    assert predictions(tmp_path / "two") == predictions(folder)


def test_a_benchmark_from_disk_is_scored_and_bad_samples_are_left_out(tmp_path):
    rows = []
    for index in range(5):
        page = make_page(SAMPLE_SEEDS[20 + index], "easy")
        question = ask(page, np.random.default_rng(index), "row")
        file = io.BytesIO()
        page.image.save(file, "PNG")
        image = {"bytes": file.getvalue() if index != 2 else b"broken", "path": None}
        rows.append({"type": "human_test", "question": question.text, "answer": question.answer, "image": image})
    path = save(tmp_path / "data", rows, "test")
    settings = Settings(tasks={"chartqa": {"path": path, "suffix": ""}}, methods=LOSSY, batch=2, seed=None)
    result = run(settings, tmp_path / "run", "cpu", quiet=True)["tasks"]["chartqa"]
    assert result["metric"] == "relaxed_accuracy" and result["samples"] == 4
    (failed,) = result["failed"]
    assert failed["index"] == 2 and "the image of sample 2 of 'chartqa' cannot be read" in failed["error"]
    assert result["methods"]["dense"]["mean"] == 1.0 and result["methods"]["dense"]["n"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 0}, "limit must be a whole number from 1 on, got 0"),
        ({"batch": True}, "batch must be a whole number from 1 on, got True"),
        ({"seed": -1}, "seed must be a whole number from 0 on, got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1 on, got 0"),
        ({"tasks": {}}, "tasks must name at least one"),
        ({"methods": {"dense": {}}}, "methods: 'dense'"),
        ({"methods": {"x": {"sparsity": 2}}}, r"method 'x' .*sparsity"),
        ({"methods": {"x": {"no_such": 1}}}, r"method 'x' .*no_such"),
        ({"dtype": "float3"}, "dtype must be"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(RunError, match=message):
        Settings(**{"tasks": {"reader-easy-cell": {}}} | change)


def test_flags_override_the_file(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "limit: 9\ntasks: {chartqa: {path: here}, docvqa: }\nmethods: {a: {rank: [8, 16]}, b: {rank: 32}}\n"
    )
    settings, out, device = parse(["--config", str(config), "--batch", "2", "--only", "a", "--out", "o"])
    assert (settings.limit, settings.batch, out, device) == (9, 2, Path("o"), "auto")
    assert settings.tasks == {"chartqa": {"path": "here"}, "docvqa": {}}
    assert list(settings.methods) == ["a rank=8", "a rank=16"]
    settings, _, _ = parse(["--config", str(config), "--tasks", "chartqa", "--method", "c={rank: 4}", "--out", "o"])
    assert settings.tasks == {"chartqa": {"path": "here"}} and settings.methods == {"c": {"rank": 4}}
    config.write_text("limits: 9\n")
    with pytest.raises(RunError, match="unknown 'limits'; known are model"):
        parse(["--config", str(config), "--out", "o"])
    with pytest.raises(RunError, match="tasks: unknown 'x'"):
        parse(["--tasks", "x", "--out", "o"])
    with pytest.raises(RunError, match="two are called 'c'"):
        parse(["--tasks", "chartqa", "--method", "c={rank: 4}", "--method", "c={rank: 8}", "--out", "o"])
    with pytest.raises(RunError, match="--only b is in no name of c"):
        parse(["--tasks", "chartqa", "--method", "c={rank: 4}", "--only", "b", "--out", "o"])
    for text, message in (
        ("- a\n", "must hold settings by their names"),
        ("tasks: chartqa\n", "tasks must be a list of names or a mapping"),
        ("tasks: {chartqa: here}\n", "options of 'chartqa' must be a mapping, got 'here'"),
        ("tasks: [chartqa]\nmethods: [a]\n", "methods must be a mapping"),
    ):
        config.write_text(text)
        with pytest.raises(RunError, match=message):
            parse(["--config", str(config), "--out", "o"])


def test_a_run_that_answered_nothing_binds_nobody(tmp_path):
    settings = Settings(model=str(tmp_path / "none"), tasks={"reader-easy-cell": {}}, limit=1)
    with pytest.raises(InputError, match=r"there is no folder '.*none' with a model"):
        run(settings, tmp_path / "run", "cpu", quiet=True)
    with pytest.raises(InputError, match="device 'foo' cannot be used"):
        run(Settings(tasks={"reader-easy-cell": {}}), tmp_path / "run", "foo", quiet=True)
    result = run(Settings(tasks={"reader-easy-cell": {}}, limit=1), tmp_path / "run", "cpu", quiet=True)
    assert result["tasks"]["reader-easy-cell"]["samples"] == 1
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="--out must be a folder"):
        run(settings, tmp_path / "file", "cpu", quiet=True)


def test_what_a_metric_needs_is_missed_before_the_first_answer(tmp_path, monkeypatch):
    row = ROWS["coco-caption"] | {"image": picture()}
    path = save(tmp_path / "data", [row], "val")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MetricError, match="install a Java runtime"):
        run(Settings(tasks={"coco-caption": {"path": path}}), tmp_path / "run", "cpu", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_model_without_images_is_refused(tmp_path):
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    Qwen2ForCausalLM(Qwen2Config(**text, vocab_size=99, num_key_value_heads=2)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(accuracy.READER).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is no vision-language model"):
        Chat.load(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"there is no model '.*empty' that transformers can load"):
        Chat.load(str(tmp_path / "empty"))
