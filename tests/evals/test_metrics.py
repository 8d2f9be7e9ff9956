"""Scores worked out by hand, and equal to lmms-eval's own where that is installed."""

import importlib.util
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.metrics import METRICS, RESTORED, mathvista_value, vqa_words


def one(metric, prediction, *answers, **extra):
    return METRICS[metric]([prediction], [{"answers": list(answers), **extra}])[0]


TEN = ["blue"] * 4 + ["light blue"] * 3 + ["azure"] * 2 + ["sky"]


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("blue", 1.0),  # left out or not, three others agree: min(1, 3/3) four times, min(1, 4/3) six times
        ("light blue", (3 * 2 / 3 + 7 * 1) / 10),  # 2 others for the three who said so, 3 for the seven others
        ("azure", (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("sky", (1 * 0 + 9 * 1 / 3) / 10),
        ("green", 0.0),
    ],
)
def test_vqa_accuracy_leaves_each_person_out_in_turn(prediction, expected):
    assert one("vqa_accuracy", prediction, *TEN) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given_text", "words"),
    [
        ("The Blue  Bus", "blue bus"),
        ("two", "2"),
        ("None", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("end.", "end"),
        ("A-B", "b"),  # the hyphen makes two words, and the first is an article then
        ("yes - no", "yes no"),
        ("stop!", "stop"),
        ("what?", "what"),
        ("Bob's", "bob 's"),
        ("a\nb", "b"),
        ("", ""),
    ],
)
def test_answers_are_processed_as_the_challenge_does(given_text, words):
    assert vqa_words(given_text) == words


def test_every_contraction_lacks_one_apostrophe():
    assert all(right.count("'") == wrong.count("'") + 1 for wrong, right in RESTORED.items())


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Coca Cola", ["coca cola"], 1.0),
        ("coca-cola", ["coca cola"], 1 - 1 / 9),
        ("cola", ["coca cola", "pepsi"], 0.0),  # 5 of 9 letters differ from the nearest: below a half
        ("abcd", ["abxy"], 0.5),  # just at the threshold
        ("12  000", ["12 000"], 1.0),  # spaces count once
        ("", ["x"], 0.0),
    ],
)
def test_anls(prediction, answers, expected):
    assert one("anls", prediction, *answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("-9.6", "-10", 1),
        ("12%", "0.12", 1),
        ("12", "12%", 0),
        ("0.001", "0", 0),  # no 5 % of nothing
        ("0", "0", 1),
        ("Blue", "blue", 1),
        ("blue one", "blue", 0),
        ("2015", "2015", 1),
    ],
)
def test_relaxed_accuracy(prediction, answer, expected):
    assert one("relaxed_accuracy", prediction, answer) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "dataset", "expected"),
    [
        ("It says STOP here", "stop", "IIIT5K", 1),
        ("st op", "stop", "IIIT5K", 0),
        ("a\nb", "a b", "docVQA", 1),
        ("\\frac { a } { b }", "\\frac{a}{b}", "HME100k", 1),
        ("X", "x", "HME100k", 0),  # formulae keep their case
        ("\uff21\uff22", "ab", "ReCTS", 1),  # full-width letters
    ],
)
def test_ocrbench(prediction, answer, dataset, expected):
    assert one("ocrbench_match", prediction, answer, dataset=dataset) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "value"),
    [
        ("(B)", {"choices": ["10", "20"], "answer_type": "text"}, "20"),
        ("B", {"choices": ["10", "20"], "answer_type": "text"}, "20"),
        ("The answer is (A) 10", {"choices": ["10", "20"], "answer_type": "text"}, "10"),
        ("Yes.", {"choices": ["Yes", "No"], "answer_type": "text"}, "Yes"),
        ("Because bigger, so it is larger", {"choices": ["smaller", "larger"], "answer_type": "text"}, "larger"),
        ("3 + 4 = 7", {"answer_type": "integer"}, "7"),
        ("The answer is 7, not 9.", {"answer_type": "integer"}, "9"),
        ("about 1,234.6 m", {"answer_type": "float", "precision": 1.0}, "1234.6"),
        ("0.5", {"answer_type": "float", "precision": 2}, "0.5"),
        ("none", {"answer_type": "integer"}, None),
        ("[1, 2] then [3, 4]", {"answer_type": "list"}, "[3, 4]"),
    ],
)
def test_mathvista_reads_the_answer_by_rules(prediction, reference, value):
    assert mathvista_value(prediction, reference) == value
    assert one("mathvista_match", prediction, "never", **reference) == 0.0
    if value is not None:
        assert one("mathvista_match", prediction, value, **reference) == 1.0


def test_exact_match_compares_words():
    assert one("exact_match", " 7  K ", "7 K") == 1.0
    assert one("exact_match", "7 K x", "7 K") == 0.0


@pytest.mark.skipif(shutil.which("java") is None, reason="the captions' tokenizer is a Java program")
def test_cider_prefers_what_people_said():
    people = [
        ["a red bus on a street", "a red bus drives down the street"],
        ["two cats on a sofa", "two cats sleep on the sofa"],
        ["a man with a kite", "a man flies a kite on the beach"],
    ]
    references = [{"answers": answers} for answers in people]
    said = METRICS["cider"](["A red bus on a street.", "two dogs on a sofa", "a plate of food"], references)
    assert said[0] > said[1] > said[2] == 0.0
    itself = METRICS["cider"]([answers[0] for answers in people], [{"answers": answers[:1]} for answers in people])
    assert itself == pytest.approx([10.0] * 3)  # CIDEr-D of a caption with itself


reference = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
pieces = st.sampled_from([*"abdntx'.,-!?/ 019 \n%()", "the", "two", "dont", "'s", " "])
text = st.lists(pieces, max_size=12).map("".join)


@reference
@settings(deadline=None)  # the first call imports lmms-eval
@given(text)
def test_answer_processing_equals_the_reference(given_text):
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    assert vqa_words(given_text) == EvalAIAnswerProcessor()(given_text)


@reference
def test_contractions_equal_the_reference():
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor as Reference

    theirs = {wrong: right for wrong, right in Reference.CONTRACTIONS.items() if right != wrong == wrong.lower()}
    theirs.pop("somebody'd")  # a slip there: it takes the apostrophe away
    assert theirs == {wrong: right for wrong, right in RESTORED.items() if wrong in theirs}
    assert set(RESTORED) == set(theirs)


@reference
@settings(deadline=None)
@given(text, st.lists(text, min_size=1, max_size=10))
def test_vqa_accuracy_equals_the_reference(prediction, answers):
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    theirs = textvqa_process_results({"answers": list(answers), "question_id": 1}, [prediction])["exact_match"]
    assert one("vqa_accuracy", prediction, *answers) == pytest.approx(theirs)


@reference
@settings(deadline=None)
@given(text, st.lists(text.filter(str.strip), min_size=1, max_size=4))
def test_anls_equals_the_reference(prediction, answers):
    from lmms_eval.api.metrics import anls

    assert one("anls", prediction, *answers) == pytest.approx(anls(answers, [prediction])["anls"])


@reference
@settings(deadline=None)
@given(text | st.floats(-100, 100).map(str), st.floats(-100, 100).map(lambda x: f"{x:.1f}") | text)
def test_relaxed_accuracy_equals_the_reference(prediction, answer):
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    prediction, answer = prediction.strip(), answer.strip()  # which ours does itself
    assert one("relaxed_accuracy", prediction, answer) == relaxed_correctness(prediction, answer)


@reference
@settings(deadline=None)
@given(text, text, st.sampled_from(["HME100k", "IIIT5K"]))
def test_ocrbench_equals_the_reference(prediction, answer, dataset):
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results

    doc = {"answer": [answer], "dataset": dataset, "question_type": ""}
    theirs = ocrbench_process_results(doc, [prediction])["ocrbench_accuracy"]["score"]
    assert one("ocrbench_match", prediction, answer, dataset=dataset) == theirs
