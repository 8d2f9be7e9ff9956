"""All tokens coded, ours against others' ways, at counted bytes: on answers, on English text, and in an 8B layout.

    python -m evals.reader.calibrate --conversations 120 --pages 0
    python -m evals.coded_peers --out evals/results/coded_peers.json
    python -m evals.coded_peers --parts answers --reader smol --out runs/coded_peers_smol.json

A prompt is prefilled once, densely; each row of the settings codes the same Keys and Values, text and images alike, and
answers from its codes. Three parts, each kept in the file until it is run again (`--parts`):

answers: a reader's drawn pages, first question by address, second of the same kind and of another (`--other`), asked
    after compression. Exact match and KL against the dense cache, paired by page.
text: SmolLM2-135M reads passages of a book (`evals.text_fidelity` says where both are from): a prompt that is coded,
    then the next tokens. Bases and rotations are calibrated on the book's other half, or on text of another kind.
bytes: what a prompt takes in the layout of Qwen3-VL-8B (`evals.coded_bytes`).

Bits are those of a number that is coded, with ranges and lengths beside it; bytes are of all that a request holds, with
dense tokens and free columns. Every peer is compared with the row of ours that has the most bits without having more
than it: a difference above zero says that ours is closer to the dense cache.
"""

import argparse
import json
import math
import pydoc_data.topics
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, LlamaConfig

from evals import coded_bytes, fidelity, text_fidelity
from evals.accuracy import environment
from evals.fidelity import RecordingCache, bootstrap, fill, natural, new_cache, positive, read_methods, replay
from evals.peers import oscar
from evals.peers.cache import PeerCache
from evals.peers.recording import prefill, recorded
from evals.reader.pages import ADDRESS_KINDS, CONTENT_KINDS, LEVELS
from evals.reader.readers import READERS
from evals.store import rounded, write_json
from rotatek_cache import RotateKCache
from rotatek_cache.calibration.gather import calibrate
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.fingerprint import fingerprint
from rotatek_cache.core.quantization import PLAIN_BITS
from rotatek_cache.hf.cache import RotateKLayer
from rotatek_cache.hf.calls import cache_argument

SETTINGS = Path(__file__).parent / "settings" / "coded_peers.yaml"
PARTS = ("answers", "text", "bytes")
SOURCES = ("same book", "other text")
OURS = {"rows": ("pca", "pca"), "weighted": ("oblique", "output"), "fisher": ("fisher", "fisher")}
FILES = (*OURS, "oscar")
BEST = "ours, weighted by answers, bits over heads: "  # what peers are held against
BITS_AGREE = 0.01  # of two rows that have the same bits but for padding
FILE_OPTIONS = {"basis", "rotations"}  # whose values are of them
Rows = dict[str, dict[str, Any]]


def with_files(options: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    """Put paths in place of the names of `FILES`."""
    return {name: str(files[value]) if name in FILE_OPTIONS else value for name, value in options.items()}


def installed(methods: Rows) -> Rows:
    """Leave out the rows of QuantizedCache whose backend is not installed, and say so."""
    found = dict(methods)
    for name, options in methods.items():
        if options.get("cache") == "quantized":
            try:
                new_cache(options, LlamaConfig(num_hidden_layers=1))
            except ImportError as error:
                print(f"left out: row '{name}': {error}")
                del found[name]
    if not found:
        raise ValueError("no row is left to run")
    return found


def whole_bytes(cache: Cache) -> int:
    """Count what a request holds of a cache, text included."""
    if isinstance(cache, RotateKCache):
        return cache.nbytes()
    return round(sum(fidelity.visual_bytes(cache, torch.ones(1, 1, dtype=torch.bool))))


def stored_bits(cache: Cache, recorder: RecordingCache) -> tuple[float, float]:
    """Count the bits of a number of Keys and of Values that is compressed, with all that lies beside it.

    Args:
        cache: filled with what `recorder` holds.
    """
    if isinstance(cache, PeerCache):
        return cache.coded_bits()
    if isinstance(cache, RotateKCache) and cache.options.codes_text:
        layers = [layer.kv.codes for layer in cache.layers if isinstance(layer, RotateKLayer)]
        kinds = [[codes[which] for codes in layers] for which in (0, 1)]
        slots = [sum(c.batch * c.capacity * c.codec.heads * c.codec.width for c in kind) for kind in kinds]
        keys, values = (8 * sum(c.data.nbytes for c in kind) / n for kind, n in zip(kinds, slots, strict=True))
        return keys, values
    everything = torch.ones(1, 1, dtype=torch.bool)
    visual = recorder.visual if isinstance(cache, RotateKCache) else everything
    assert visual is not None
    share = visual.double().mean().item()
    stored = fidelity.visual_bytes(cache, visual)
    dense = [share * sum(states[which].nbytes for states in recorder.seen.values()) for which in (0, 1)]
    return PLAIN_BITS * stored[0] / dense[0], PLAIN_BITS * stored[1] / dense[1]


def against(name: str, bits: dict[str, float]) -> str | None:
    """Find the `BEST` row with the most bits that has no more than the row `name`; None for ours, or without one."""
    if name.startswith(("ours", "dense")):
        return None
    ours = [row for row in bits if row.startswith(BEST) and bits[row] <= bits[name] + BITS_AGREE]
    return max(ours, key=lambda row: bits[row]) if ours else None


@torch.inference_mode()
def answers(args: argparse.Namespace, methods: Rows) -> dict[str, Any]:
    """Score all rows on drawn pages."""
    reader = READERS[args.reader]
    chat = fidelity.load(None if args.reader == "reader" else reader.path())
    written = dict.fromkeys(FILES) | {
        "fisher": "fisher_rows"
    }  # by evals.reader.calibrate; "fisher" serves images alone
    files = {name: args.files / f"{reader.name}_{written[name] or name}.safetensors" for name in FILES}
    rows = {"dense": {"cache": "recorded"}, **{name: with_files(options, files) for name, options in methods.items()}}
    exact: dict[str, dict[str, list[float]]] = {name: {} for name in rows}
    divergence: dict[str, dict[str, list[float]]] = {name: {} for name in rows}
    sizes: dict[str, list[float]] = {name: [] for name in rows}
    bits: dict[str, float] = {}
    seeds = fidelity.SEEDS[args.seeds][args.skip : args.skip + args.pages]
    for start in tqdm(range(0, len(seeds), args.batch), desc="pages", mininterval=5):
        part = seeds[start : start + args.batch]
        batches = {
            kind: fidelity.make_batch(
                chat.processor, part, args.level, ADDRESS_KINDS, None if kind == "same" else (kind,), reader
            )
            for kind in ("same", *args.other)
        }
        recorder, first = prefill(chat.model, batches["same"])
        dense: dict[str, Tensor] = {}
        for name, options in rows.items():
            for kind, batch in batches.items():
                cache = filled(options, chat.model.config, batch, recorder)
                if kind == "same":
                    whole = recorder.recorded_bytes
                    sizes[name].append((whole if name == "dense" else whole_bytes(cache)) / len(batch))
                    bits[name] = PLAIN_BITS if name == "dense" else sum(stored_bits(cache, recorder)) / 2
                found = replay(chat.model, cache, batch, first)
                scores = fidelity.Scores()
                fidelity.score(scores, batch, found, dense.setdefault(kind, found))
                for which, asked in enumerate(("first", kind)):
                    if which or kind == "same":
                        exact[name].setdefault(asked, []).extend(scores.exact[which])
                        divergence[name].setdefault(asked, []).extend(scores.divergence[which])
    size = {name: float(np.mean(found)) for name, found in sizes.items()}
    return {
        name: {
            "options": methods.get(name),
            "bits": bits[name],
            "bytes": size[name],
            "ratio": size["dense"] / size[name],
            **{
                asked: compared(exact, divergence, name, asked, against(name, bits))
                for asked in ("first", "same", *args.other)
            },
        }
        for name in rows
    }


def compared(
    exact: dict[str, dict[str, list[float]]],
    divergence: dict[str, dict[str, list[float]]],
    name: str,
    asked: str,
    ours: str | None,
) -> dict[str, Any]:
    """Sum up the answers of a row to one kind of question, against the dense cache and against a row of ours."""
    right, wanted, kl = (np.array(found[asked]) for found in (exact[name], exact["dense"], divergence[name]))
    row = {
        "questions": len(right),
        "exact_match": float(right.mean()),
        "loss": float((wanted - right).mean()),
        "loss_95": bootstrap(wanted - right),
        "kl": float(kl.mean()),
    }
    if ours is not None:
        better, nearer = np.array(exact[ours][asked]) - right, kl - np.array(divergence[ours][asked])
        row["ours"] = {
            "row": ours,
            "more_right": float(better.mean()),
            "more_right_95": bootstrap(better),
            "less_kl": float(nearer.mean()),
            "less_kl_95": bootstrap(nearer),
        }
    return row


def filled(options: dict[str, Any], config: Any, batch: fidelity.Batch, recorder: RecordingCache) -> Cache:
    """Make the cache of a row from recorded states; the dense one keeps the tokens as they were recorded."""
    cache = new_cache({"sparsity": 0} if options.get("cache") == "recorded" else options, config)
    fill(cache, config, batch, recorder)
    return cache


def text(args: argparse.Namespace, methods: Rows) -> dict[str, Any]:
    """Score all rows on passages of a book, those with files once for each text that calibrated them."""
    model, tokenizer = text_fidelity.load(args.text_model)
    book = (args.book or text_fidelity.in_package("tvm_ffi", text_fidelity.BOOK)).read_text(errors="replace")
    other = args.other_text.read_text() if args.other_text else "\n".join(pydoc_data.topics.topics.values())

    def ids(words: str) -> Tensor:
        return torch.tensor(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"])

    folder = Path(tempfile.mkdtemp())
    rows: Rows = {"dense": {"cache": "recorded"}}
    for name, options in methods.items():
        if not FILE_OPTIONS & options.keys():
            rows[name] = options
    texts = {"same book": book[: len(book) // 2], "other text": other}
    for source in args.sources:
        words = texts[source]
        given = text_fidelity.passages(ids(words), args.prompt + args.read, args.calibrate)
        files = calibrated(model, [{"input_ids": row[None]} for row in given], folder / source, source)
        for name, options in methods.items():
            if FILE_OPTIONS & options.keys():
                family, _, variant = name.partition(": ")
                rows[f"{family}: {variant}, {source}"] = with_files(options, files)
    scored = text_fidelity.passages(ids(book[len(book) // 2 :]), args.prompt + args.read, args.passages)
    nll, kl, same = ({name: [] for name in rows} for _ in range(3))
    sizes: dict[str, list[float]] = {name: [] for name in rows}
    bits: dict[str, float] = {}
    with torch.inference_mode():
        for passage in tqdm(scored, desc="passages", mininterval=5):
            batch = text_batch(passage[None], args.prompt)
            recorder, first = prefill(model, batch)
            dense: Tensor | None = None
            for name, options in rows.items():
                cache = filled(options, model.config, batch, recorder)
                whole = recorder.recorded_bytes
                sizes[name].append(whole if name == "dense" else whole_bytes(cache))
                bits[name] = PLAIN_BITS if name == "dense" else sum(stored_bits(cache, recorder)) / 2
                found = replayed(model, cache, batch, first, args.step)
                dense = found if dense is None else dense
                nll[name].append(-float(found.gather(-1, batch.rest[..., None]).mean()))
                kl[name].append(float((dense.exp() * (dense - found)).sum(-1).mean()))
                same[name].append(float((dense.argmax(-1) == found.argmax(-1)).double().mean()))
    size = {name: float(np.mean(found)) for name, found in sizes.items()}
    result: dict[str, Any] = {}
    for name, options in rows.items():
        result[name] = {
            "options": None if name == "dense" else {n: v for n, v in options.items() if n not in FILE_OPTIONS},
            "bits": bits[name],
            "bytes": size[name],
            "ratio": size["dense"] / size[name],
            "perplexity": math.exp(float(np.mean(nll[name]))),
            "kl": float(np.mean(kl[name])),
            "kl_95": bootstrap(np.array(kl[name])),
            "same_prediction": float(np.mean(same[name])),
        }
        # A peer that needs no calibration is held against ours of other text.
        source = "same book" if name.endswith("same book") else args.sources[-1]
        ours = against(name, {n: found for n, found in bits.items() if n == name or n.endswith(source)})
        if ours is not None:
            nearer = np.array(kl[name]) - np.array(kl[ours])
            result[name]["ours"] = {"row": ours, "less_kl": float(nearer.mean()), "less_kl_95": bootstrap(nearer)}
    return result


def text_batch(ids: Tensor, prompt: int) -> fidelity.Batch:
    """Split ids ``[B, n]`` into a prompt and what is read after it."""
    rest = ids[:, prompt:]
    inputs = {"input_ids": ids[:, :prompt], "attention_mask": torch.ones_like(ids[:, :prompt])}
    return fidelity.Batch(inputs, rest, torch.ones_like(rest), torch.ones_like(rest))


def replayed(model: Any, cache: Cache, batch: fidelity.Batch, first: Tensor, step: int) -> Tensor:
    """Predict the rest, `step` tokens at a time; return log-probabilities ``[B, n, V]``."""
    logits = [first[:, None]]
    logits += [
        model(input_ids=part, **cache_argument(model, cache), use_cache=True).logits
        for part in batch.rest.split(step, 1)
    ]
    return torch.cat(logits, 1)[:, :-1].float().log_softmax(-1)


def calibrated(model: Any, prompts: Sequence[dict[str, Tensor]], folder: Path, source: str) -> dict[str, Path]:
    """Calibrate on prompts of text and write all `FILES`."""
    state = Calibration(fingerprint(model), model.config.model_type)
    calibrate(model, tqdm(prompts, desc=f"calibrating on {source}"), state, text=True)
    files = {name: folder / f"{name}.safetensors" for name in FILES}
    for name, (method, value_method) in OURS.items():
        state.write_basis(files[name], source=source, method=method, value_method=value_method)
    oscar.fit(recorded(model, prompts), files["oscar"])
    return files


def layout_bytes(args: argparse.Namespace, methods: Rows) -> dict[str, Any]:
    """Count the bytes of a prompt in the layout of an 8B model; what states are does not change them."""
    heads, width, layers = coded_bytes.HEADS, coded_bytes.WIDTH, coded_bytes.LAYERS
    config = LlamaConfig(
        num_hidden_layers=layers, num_attention_heads=4 * heads, num_key_value_heads=heads, head_dim=width
    )
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.safetensors" for name in FILES}
        for name in OURS:
            coded_bytes.basis(files[name])
        drawn = torch.randn(3, 1, heads, 8, width, generator=torch.Generator().manual_seed(0))
        oscar.fit(
            [{layer: (drawn[0], drawn[1], drawn[2].repeat(1, 4, 1, 1)) for layer in range(layers)}], files["oscar"]
        )
        for name, options in methods.items():
            result[name] = {"options": options}
            for tokens in args.tokens:
                visual = torch.ones(1, tokens, dtype=torch.bool)
                cache = new_cache(with_files(options, files), config)
                if isinstance(cache, RotateKCache):
                    cache.announce_visual(visual, tokens)
                states = torch.zeros(1, heads, tokens, width, dtype=torch.bfloat16)
                for layer in range(layers):
                    handle, _ = cache.update(states, states, layer)
                    if isinstance(cache, RotateKCache):
                        handle.observe(states[:, :, :1], None)
                if isinstance(cache, RotateKCache):  # what a forward brought is settled by the next
                    for layer in range(layers):
                        cache.update(states[:, :, :1], states[:, :, :1], layer)
                result[name][str(tokens)] = 2 * layers * states.nbytes / whole_bytes(cache)
    return result


def print_tables(found: dict[str, Any]) -> None:
    """Print what was found, part by part."""
    for part in PARTS:
        for name, row in found.get(part, {}).items():
            line = f"{part:8} {name:60} "
            if part == "bytes":
                line += "  ".join(f"{tokens}: {ratio:5.2f}x" for tokens, ratio in row.items() if tokens != "options")
            elif part == "text":
                line += f"{row['bits']:5.2f} bit {row['ratio']:5.2f}x  "
                line += f"perplexity {row['perplexity']:7.3f}  KL {row['kl']:.5f}{_difference(row)}"
            else:
                line += f"{row['bits']:5.2f} bit {row['ratio']:5.2f}x"
                for asked, score in row.items():
                    if isinstance(score, dict) and "loss" in score:
                        low, high = (100 * bound for bound in score["loss_95"])
                        line += f"  {asked} {100 * score['loss']:.2f} [{low:.2f}, {high:.2f}] KL {score['kl']:.5f}"
                        line += _difference(score)
            print(line)


def _difference(row: dict[str, Any]) -> str:
    if "ours" not in row:
        return ""
    low, high = row["ours"]["less_kl_95"]
    return f"  less with {row['ours']['row']}: {row['ours']['less_kl']:.5f} [{low:.5f}, {high:.5f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--methods", type=Path, default=SETTINGS, help="YAML: family -> variant -> options")
    parser.add_argument("--only", nargs="*", help='rows whose "family: variant" holds one of these words')
    parser.add_argument("--reader", choices=READERS, default="reader", help="answers: that reads the pages")
    parser.add_argument("--files", type=Path, default=Path("runs"), help="answers: folder of what was calibrated")
    parser.add_argument("--level", choices=sorted(LEVELS), default="easy", help="answers: of the pages")
    parser.add_argument("--seeds", choices=sorted(fidelity.SEEDS), default="report", help="answers: of the pages")
    parser.add_argument("--skip", type=natural, default=0, help="answers: pages")
    parser.add_argument("--pages", type=positive, default=512, help="answers: how many")
    parser.add_argument("--batch", type=positive, default=32, help="answers: pages scored at once")
    parser.add_argument(
        "--other", nargs="+", choices=CONTENT_KINDS, default=["count", "where"], help="answers: other kinds"
    )
    parser.add_argument("--text-model", type=Path, help="text: folder of a causal language model, in place of SmolLM2")
    parser.add_argument("--book", type=Path, help="text: its first half calibrates, its second is read")
    parser.add_argument("--other-text", type=Path, help="text: of another kind, which calibrates once more")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES, help="text: that calibrate")
    parser.add_argument("--passages", type=positive, default=16, help="text: how many are read")
    parser.add_argument("--prompt", type=positive, default=384, help="text: tokens that are coded")
    parser.add_argument("--read", type=positive, default=96, help="text: tokens that are predicted after them")
    parser.add_argument("--step", type=positive, default=48, help="text: tokens that are read at once")
    parser.add_argument("--calibrate", type=positive, default=12, help="text: passages that calibrate")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[1024, 4096], help="bytes: of the prompts")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to write; parts that are not run stay as they are")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = shlex.join(["python", "-m", "evals.coded_peers", *given])
    try:
        methods = read_methods(args.methods, args.only)
        found: dict[str, Any] = {"runs": {}}
        for part, run in (("answers", answers), ("text", text), ("bytes", layout_bytes)):
            if part in args.parts:
                scored = run(args, installed(methods))
                if args.out and args.out.is_file():  # read now: another part may have been run meanwhile
                    found = json.loads(args.out.read_text())
                found[part] = scored
                found["runs"][part] = {"command": command, "environment": environment("cpu", 1)}
                if args.out:
                    write_json(args.out, rounded(found))
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    print_tables({part: found[part] for part in args.parts})


if __name__ == "__main__":
    main()
