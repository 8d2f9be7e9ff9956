"""The report: everything on one page, and verdicts that follow the numbers."""

import json
import re
from pathlib import Path

import pytest

from evals.report import build as report
from evals.report.build import build
from evals.report.verdicts import verdicts
from evals.scores import score
from evals.store import Results, StoreError, read, write_json

RESULTS = Path(report.__file__).parents[1] / "results"
QUARTER = {"sparsity": 0.75}
OPTIONS = {
    "rotatek": QUARTER,
    "think": QUARTER | {"basis": "think"},
    "spark": QUARTER | {"basis": "spark"},
    "pca": QUARTER | {"basis": "pca"},
    "tokens": {"sparsity": 0, "tokens": "fastv:0.6"},
}


OPTIONS_OF_TWO = {name: OPTIONS[name] for name in ("rotatek", "think")}


def accuracy(right, count=40, task="task"):
    """Stored scores in which method m has its first right[m] of `count` samples right, for invented bytes."""
    held = {"dense": 100.0, "rotatek": 62.0, "think": 62.0, "spark": 70.0, "pca": 62.0, "tokens": 65.0}
    table = {}
    for method, hits in right.items():
        table[method] = [
            {
                "turns": [
                    {
                        "prediction": "x" if index < hits else "y",
                        "reference": {"answers": ["x"]},
                        "kind": "",
                        "scored": True,
                    }
                ],
                "cache_bytes": held[method],
            }
            for index in range(count)
        ]
    found = {"metric": "exact_match"} | score("exact_match", table, {m: OPTIONS[m] for m in right if m != "dense"})
    return {
        "settings": {},
        "model": {"name": "a/model", "dtype": "bfloat16"},
        "command": "python -m evals.accuracy",
        "environment": {"device": "CPU, 1 core", "versions": {"torch": "2"}, "date": "2026-01-01"},
        "tasks": {task: found},
    }


def latency(device="NVIDIA X", step=2.0, share=0.01):
    def row(method, token, fit, attention=None):
        times, alone = ({"median": t, "least": t, "most": t} for t in (token, attention or token))
        return {
            "method": method, "context": 16384, "batch": 1, "fit_share": fit, "prefill_ms": times, "token_ms": times,
            "cache_bytes": 1 << 20, "prefill_peak_bytes": 3 << 30, "decode_peak_bytes": 2 << 30,
            "end_to_end_ms": times, "attention_ms": alone,
        }  # fmt: skip

    rows = [row("dense, sdpa", 4.0, None), row("RotateK r=32", step, share)]
    rows.append(row("VL-Cache, .1 of the bytes", step * 0.8, share, step / 4))
    rows.append(row("HybridKV, .1 read, all heads dynamic", step, share))
    rows.append({"method": "other", "context": 16384, "batch": 1, "skipped": "it needs a thing"})
    return {
        "model": "m", "dtype": "bfloat16", "command": "c", "rows": rows, "largest": [],
        "setting": {"rounds": 3, "tokens": 100, "prompt": "drawn embeddings"},
        "environment": {"device": device, "versions": {}, "date": ""},
    }  # fmt: skip


def diagnostics(kept=0.995, shared=0.8):
    curve = [[min(1.0, kept if rank >= 31 else kept * rank / 31) for rank in range(128)]]
    angles = {
        pair: {"8": {"shared": [shared], "degrees": [1.0] * 8}}
        for pair in ("images", "visual and text", "window and answer queries")
    }
    layer = {
        "explained_variance": curve, "logit_energy": curve, "angles": angles,
        "rank_for": {"0.99": {"variance": [30.0], "logit_energy": [12.0]}},
        "errors": {"pca": {"8": {"keys": 0.5, "logits": 0.4}}},
    }  # fmt: skip

    def row(loss, kl):
        turn = {"images": 9, "exact_match": 1 - loss, "loss": loss, "loss_95": [loss, loss], "kl": kl}
        return {"second": turn, "kv_ratio": 1.5}

    ablations = {"dense": row(0, 0), "r=8, the paper": row(0.1, 0.2), "r=8, no query weight": row(0.1, 0.5)}
    return {
        "geometry": {"samples": 2, "answer_queries": 40, "layers": [layer]}, "ablations": ablations, "head_width": 128,
        "visual_tokens": 324, "setting": {"task": "t"}, "command": "c", "environment": {"device": "d", "versions": {}},
    }  # fmt: skip


def tokens(gain=0.1):
    def row(channels, **more):
        turn = {"pages": 50, "exact_match": 0.5, "kl": 0.1, "loss": 0.1, "loss_95": [0.0, 0.2]}
        both = {"first": turn, "second": turn | more}
        return {"tokens": "FastV", "channels": channels, "budget": 0.3, "keep": 0.4, "bytes_share": 0.3} | both

    paired = {"loss_to_tokens_only": -gain, "loss_to_tokens_only_95": [-gain - 0.05, -gain + 0.05]}
    tenth = row("tokens only") | {"tokens": "VL-Cache", "budget": 0.1}
    for turn in ("first", "second"):
        tenth[turn] = tenth[turn] | {"loss_95": [-0.1, 0.1] if gain > 0 else [0.1, 0.3]}
    to_rival = {"loss_to_rival": -gain, "loss_to_rival_95": [-gain - 0.05, -gain + 0.05]}
    stages = row("tokens only", **to_rival) | {"tokens": "PyramidDrop"}
    stages["first"] = stages["second"]
    bits = row("Hadamard, 2 bit") | {"tokens": "AKVQ-VL", "budget": None}
    kl = {
        f"kl_over_{name}{bound}": stages["second"][f"loss_to_rival{bound}"]
        for name in ("rival", "channels_only")
        for bound in ("", "_95")
    }
    bits |= {turn: tenth[turn] | to_rival | kl for turn in ("first", "second")}
    heads = stages | {"tokens": "HybridKV, all heads static"}
    chunks = tenth | {"tokens": "HybridKV", "keep": 0.1, "bytes_share": 0.1 if gain > 0 else 0.8}
    rows = [row("tokens only"), row("RotateK 1/4", **paired), tenth, stages, bits, heads, chunks]
    return {"rows": rows, "setting": {}}


def decoded(gain=0.1):
    row = {"passages": 16, "loss": 0.2, "loss_to_last": -gain, "loss_to_last_95": [-gain - 0.05, -gain + 0.05]}
    return {"settings": {"64 tokens, R-KV": row}}


def says(results):
    return {verdict.claim.split(" (")[0]: verdict.words() for verdict in verdicts(results)}


def test_nothing_measured_says_so():
    assert set(says(Results()).values()) == {"not measured"}


def test_verdicts_follow_the_numbers():
    good = Results(
        accuracy={"a": accuracy({"dense": 40, "rotatek": 40, "think": 20, "spark": 40, "pca": 30, "tokens": 10})},
        diagnostics={"d": diagnostics()},
        latency={"l": latency()},
        tokens={"t": tokens()},
        decoded={"d": decoded()},
    )
    assert set(says(good).values()) == {"holds"}, says(good)
    bad = Results(
        accuracy={"a": accuracy({"dense": 40, "rotatek": 20, "think": 20, "spark": 40, "pca": 39, "tokens": 30})},
        diagnostics={"d": diagnostics(kept=0.7, shared=0.1)},
        latency={"l": latency(step=3.9, share=0.2)},
        tokens={"t": tokens(gain=-0.1)},
        decoded={"d": decoded(gain=-0.1)},
    )
    assert set(says(bad).values()) == {"does not hold"}, says(bad)


def test_speed_on_a_cpu_says_nothing_about_gpus():
    found = {verdict.claim: verdict for verdict in verdicts(Results(latency={"l": latency(device="CPU, 2 cores")}))}
    for speed in [verdict for claim, verdict in found.items() if "GPU" in claim or "times as fast" in claim]:
        assert speed.share is None and speed.evidence.startswith("no result of it from a GPU is stored")
    told = found["100 tokens come up to 2.33 times as fast at a tenth of the cache, prefill included (VL-Cache)"]
    assert told.evidence.endswith("; on a CPU 2.50x at 16,384 tokens")


@pytest.fixture
def folder(tmp_path):
    home = tmp_path / "results"
    (home / "accuracy_x").mkdir(parents=True)
    right = {"dense": 40, "rotatek": 39, "think": 20, "spark": 40, "tokens": 10}
    (home / "accuracy_x" / "scores.json").write_text(json.dumps(accuracy(right)))
    (home / "accuracy_x" / "run.json").write_text("{}")
    (home / "diagnostics_x.json").write_text(json.dumps(diagnostics()))
    (home / "token_x.json").write_text(json.dumps(tokens()))
    (home / "latency_x.json").write_text(json.dumps(latency()))
    (home / "bench_x.json").write_text(json.dumps({"milliseconds": {"ours": 1.25}, "command": "run with <fast>"}))
    return home


def test_one_page_holds_everything(folder, tmp_path):
    build([folder, RESULTS], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    for text in ("accuracy_x", "+ ", "fidelity_reader", "FastV .40 + RotateK .25", "bench_x", "run with &lt;fast&gt;"):
        assert text in page, text
    assert "Not run: other. it needs a thing" in page and "n = 40" in page
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| FastV | RotateK 1/4 | 40 % | 0.300 | 50.0 | 50.0 | +10.0 [5.0, 15.0] |" in text
    pictures = re.findall(r"\]\((figures/[^)]*)\)", text)
    assert len(pictures) == page.count("<img") >= 6
    assert all((tmp_path / "out" / picture).stat().st_size > 3000 for picture in pictures)
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    # What a name does not say of its options stands behind it.
    assert "| rotatek sparsity=0.75 | 1.61x | 97.5 ± 2.5 | -2.5 [" in text
    assert "| think sparsity=0.75 basis=think | 1.61x | 50.0 ± 8.0 | -50.0 [" in text
    assert "| VL-Cache, .1 of the bytes | 2\u00a0ms | 1.0 % | 1.6 ms, 1.6 to 1.6 (2.50x) | 0.5 ms" in text


def test_results_are_known_by_what_they_hold(folder):
    found = read([folder])
    assert (list(found.accuracy), list(found.diagnostics)) == (["accuracy_x"], ["diagnostics_x"])
    assert (list(found.latency), list(found.other)) == (["latency_x"], ["bench_x"])
    assert list(found.tokens) == ["token_x"]
    assert "fidelity_reader" in read([RESULTS]).fidelity


def test_what_only_looks_like_a_result_is_listed(tmp_path):
    for name, value in (
        ("a", {"rows": [], "largest": []}),
        ("b", {"methods": {}}),
        ("c", [1]),
        ("d", {"z": [[1], []]}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    assert list(read([tmp_path]).other) == ["a", "b", "d"]
    build([tmp_path], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert all(f"| {name} |" in text for name in ("a", "b", "d"))


def test_what_cannot_be_read_is_named(folder, tmp_path):
    with pytest.raises(StoreError, match=r"there is no folder '.*nowhere'"):
        read([tmp_path / "nowhere"])
    (folder / "broken.json").write_text("{")
    with pytest.raises(StoreError, match=r"broken.json' is no JSON"):
        read([folder])


def test_claims_that_hold_on_some_tasks_hold_in_part():
    two = accuracy({"dense": 40, "rotatek": 40, "think": 20, "spark": 40, "tokens": 10})
    lost = accuracy({"dense": 40, "rotatek": 20, "think": 10, "spark": 40, "tokens": 30})["tasks"]["task"]
    two["tasks"]["reader-counting"] = lost
    found = {verdict.claim.split(" (")[0]: verdict for verdict in verdicts(Results(accuracy={"a": two}))}
    kept = found["A quarter of the Key channels"]
    assert kept.words() == "holds in part" and kept.share == 0.5
    assert "1 of 2 tasks, n = 40; lost on reader-counting -50.0 [" in kept.evidence
    assert found["RotateK answers better than ThinK at the same rank"].words() == "holds"
    assert "worse on 1: reader-counting" in found["RotateK and SparK are level"].evidence


def test_a_token_method_as_good_at_fewer_bytes_speaks_against_channels():
    def row(name, channels, share, right, loss):
        second = {"pages": 50, "exact_match": right, "loss_95": loss}
        return {
            "tokens": name,
            "channels": channels,
            "bytes_share": share,
            "budget": 0.3,
            "first": second,
            "second": second,
        }

    alone = row("none", "RotateK 1/4", 0.68, 0.98, [0.0, 0.01])
    good = [row("Good", "tokens only", share, 0.98, [0.0, 0.02]) for share in (0.45, 0.2)]
    bad = row("Bad", "tokens only", 0.45, 0.5, [0.4, 0.5])
    for rows, share in (([alone, *good, bad], 0.5), ([alone, bad], 1.0)):
        right = {"dense": 40, "rotatek": 40, "tokens": 10}
        judged = verdicts(Results(accuracy={"a": accuracy(right)}, tokens={"t": {"rows": rows}}))
        (found,) = [verdict for verdict in judged if verdict.claim.startswith("Pruning channels")]
        assert found.share == share
        assert ("Good at 0.20 of the bytes" in found.evidence) == (share == 0.5) and "Bad" not in found.evidence


def test_what_tells_nothing_is_a_control():
    right = {"dense": 40, "rotatek": 20, "think": 10, "spark": 40, "tokens": 30}
    control = Results(accuracy={"a": accuracy(right, task="reader-hard-cell")})
    assert set(says(control).values()) == {"not measured"}
    told = [block for block in next(iter(report.accuracy_sections(control))).blocks if isinstance(block, str)]
    assert any("Controls, which no verdict counts: hard cell: a first answer of one token" in text for text in told)


def test_each_task_counts_once_from_the_run_of_most_samples_that_compares():
    few = accuracy({"dense": 40, "rotatek": 40, "think": 10}, task="reader-hard-second")
    many = accuracy({"dense": 90, "rotatek": 80, "spark": 90}, 100, task="reader-hard-second")
    found = {verdict.claim.split(" (")[0]: verdict for verdict in verdicts(Results(accuracy={"a": few, "b": many}))}
    assert "0 of 1 tasks, n = 100; lost on reader-hard-second -10.0" in found["A quarter of the Key channels"].evidence
    assert found["RotateK answers better than ThinK at the same rank"].evidence.endswith(
        "by 75.0 to 75.0 points; n = 40"
    )
    assert "worse on 1: reader-hard-second -10.0 ± 3.0; n = 100" in found["RotateK and SparK are level"].evidence


def test_a_task_without_a_usable_sample_is_shown_and_judges_nothing(tmp_path):
    failed = {"index": 0, "error": "its image is missing"}
    empty = score("exact_match", {m: [failed] for m in ("dense", "rotatek", "think")}, OPTIONS_OF_TWO)
    stored = accuracy({"dense": 40, "rotatek": 40, "think": 10}) | {}
    stored["tasks"]["chartqa"] = {"metric": "exact_match"} | empty
    assert set(says(Results(accuracy={"a": stored})).values()) == {"holds", "not measured"}
    (tmp_path / "results").mkdir()
    write_json(tmp_path / "results" / "a.json", stored)
    build([tmp_path / "results"], tmp_path / "out")
    assert "chartqa: exact_match, n = 0, 1 left out" in (tmp_path / "out" / "report.md").read_text()


def test_every_stored_result_has_a_title_in_words():
    results = read([RESULTS])
    kinds = (results.accuracy, results.diagnostics, results.latency, results.fidelity, results.tokens)
    assert {name for kind in kinds for name in kind} <= set(report.TEXTS["results"])


def test_what_is_written_is_read_back_the_same(tmp_path):
    value = {"a": [1, {"b": [1.5, "x { y\n] z"]}, {"c": {}, "d": "[  two"}], "e": None}
    write_json(tmp_path / "new" / "x.json", value)
    text = (tmp_path / "new" / "x.json").read_text()
    assert json.loads(text) == value and '{ "c": {}' not in text and text.endswith("}\n")
