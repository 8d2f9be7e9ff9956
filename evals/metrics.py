"""Scores of answers, each defined as its benchmark defines it.

A metric takes all predictions of a run with their references (what a task's turn knows of the truth, "answers" above
all) and returns one score per prediction, so that methods can be compared sample by sample.
"""

import re
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Reference = Mapping[str, Any]
Metric = Callable[[Sequence[str], Sequence[Reference]], list[float]]

METRICS: dict[str, Metric] = {}


class MetricError(Exception):
    """A metric cannot be computed on this machine; the message says what is missing."""


def require(metric: str) -> None:
    """Raise MetricError if `metric` needs a program that is not here."""
    if metric == "cider" and shutil.which("java") is None:
        raise MetricError("the metric 'cider' runs the Stanford tokenizer: install a Java runtime (command `java`)")


def _each(score: Callable[[str, Reference], float]) -> Callable[[str, Reference], float]:
    """Register a metric that scores one prediction at a time, under its function's name."""
    METRICS[score.__name__] = lambda predictions, references: [
        float(score(prediction, reference)) for prediction, reference in zip(predictions, references, strict=True)
    ]
    return score


@_each
def exact_match(prediction: str, reference: Reference) -> float:
    """Compare the words with those of each answer."""
    return any(prediction.split() == answer.split() for answer in reference["answers"])


# The answer processing of the VQA challenge as its evaluation server applies it to TextVQA and VizWiz.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = dict(zip(NUMBERS, ["0", *map(str, range(11))], strict=True))
# Words that are written again with an apostrophe where one is missing.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
RESTORED = {
    word[:at] + word[at + 1 :]: word for word in CONTRACTIONS.split() for at, letter in enumerate(word) if letter == "'"
}


def vqa_words(text: str) -> str:
    """Normalise an answer as the VQA challenge does: lower case, no articles, numbers as digits, bare punctuation."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    given = text.replace("\n", " ").replace("\t", " ").strip()
    text = given
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if beside_space else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (DIGITS.get(word, word) for word in text.split())
    return " ".join(RESTORED.get(word, word) for word in words if word not in ("a", "an", "the"))


@_each
def vqa_accuracy(prediction: str, reference: Reference) -> float:
    """Score min(1, matches / 3), averaged over leaving out each of the (ten) people's answers in turn."""
    given = vqa_words(prediction)
    matches = [vqa_words(answer) == given for answer in reference["answers"]]
    return statistics.mean(min(1.0, (sum(matches) - match) / 3) for match in matches)


@_each
def anls(prediction: str, reference: Reference) -> float:
    """Score Levenshtein similarity to the nearest answer, normalised, 0 where below a half (DocVQA, InfoVQA).

    As in the challenge's own script the distance is that of lower-case words with single spaces, its norm the longer
    of the two strings as they stand.
    """
    from rapidfuzz.distance import Levenshtein  # noqa: PLC0415 - for those who score

    def similarity(answer: str) -> float:
        distance = Levenshtein.distance(_words(answer), _words(prediction))
        return 1 - distance / max(len(answer), len(prediction), 1)

    best = max(map(similarity, reference["answers"]))
    return best if best >= 0.5 else 0.0


def _words(text: str) -> str:
    return " ".join(text.lower().split())


@_each
def relaxed_accuracy(prediction: str, reference: Reference) -> float:
    """Accept numbers within 5 % of an answer, other answers word by word without case (ChartQA).

    A percentage is its hundredth; an answer of zero has no 5 % and must be met as text.
    """
    return any(_relaxed(prediction.strip(), answer.strip()) for answer in reference["answers"])


def _relaxed(prediction: str, answer: str) -> bool:
    given, truth = _number(prediction), _number(answer)
    if given is not None and truth:
        return abs(given - truth) / abs(truth) <= 0.05
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: ord(" ")}


@_each
def ocrbench_match(prediction: str, reference: Reference) -> float:
    """Look for an answer in the prediction: without spaces for formulae (HME100k), else without case."""

    def bare(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if reference["dataset"] == "HME100k" else text.translate(FULL_WIDTH).lower()

    return any(bare(answer) in bare(prediction) for answer in reference["answers"])


NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def mathvista_value(prediction: str, reference: Reference) -> str | None:
    """Read a prediction's value by rules: the chosen option, or its last number in the asked precision.

    The benchmark has a large language model extract this; rules find less in free prose, so compare scores only with
    those of the same rules.
    """
    text = prediction.strip()
    stated = re.split(r"(?i)\banswer\s*(?:is|:)\s*", text)[-1].strip()
    choices = reference.get("choices")
    if choices:
        letters = "ABCDEFGHIJKLMNOP"[: len(choices)]
        found = re.match(rf"\(?([{letters}])(?:[).:,\s]|$)", stated) or re.search(rf"\(([{letters}])\)", stated)
        if found:
            return str(choices[letters.index(found[1])])
        from rapidfuzz.distance import Levenshtein  # noqa: PLC0415

        # As the benchmark does, the option that is nearest in writing.
        return str(min(choices, key=lambda choice: Levenshtein.distance(str(choice), stated)))
    if reference["answer_type"] == "list":
        lists = re.findall(r"\[[^\[\]]*\]", stated)
        return lists[-1] if lists else None
    numbers = NUMBER.findall(stated) or NUMBER.findall(text)
    if not numbers:
        return None
    value = float(numbers[-1].replace(",", ""))
    if reference["answer_type"] == "integer":
        return str(int(value))
    return str(round(value, int(reference.get("precision") or 0)))


@_each
def mathvista_match(prediction: str, reference: Reference) -> float:
    """Compare the value read off the prediction with the answer."""
    return mathvista_value(prediction, reference) in reference["answers"]


def cider(predictions: Sequence[str], references: Sequence[Reference]) -> list[float]:
    """Score captions by CIDEr-D; the weights of words come from the references of the whole run.

    Captions are cut into words by the Penn Treebank tokenizer that the benchmark uses, a Java program.
    """
    require("cider")
    from pycocoevalcap.cider.cider_scorer import CiderScorer  # noqa: PLC0415
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # noqa: PLC0415

    captions = {index: [{"caption": text}] for index, text in enumerate(predictions)}
    truths = {index: [{"caption": text} for text in ref["answers"]] for index, ref in enumerate(references)}
    # One call, since each starts a Java machine; keys of the two halves stay apart.
    both = PTBTokenizer().tokenize(
        {("given", key): value for key, value in captions.items()}
        | {("true", key): value for key, value in truths.items()}
    )
    scorer = CiderScorer()
    for index in range(len(captions)):
        scorer += (both["given", index][0], both["true", index])
    return [float(score) for score in scorer.compute_score()[1]]


METRICS["cider"] = cider
