"""Does rotating Keys help where they have outlier channels? A controlled experiment.

    python -m evals.outliers --out evals/results/outliers.json

In each head of the reader a few pairs of channels that RoPE turns together are multiplied by a factor in the Keys'
projection, and divided by it in the queries'. All logits stay what they were, and so does every answer of the dense
cache; only the Keys now have outlier channels. Rotated and unrotated ways to store them are then compared at equal
bytes, for a few factors: bases are fitted to the changed Keys, and calibrated on the changed reader.

`python -m evals.outliers --spread` prints how far the largest channels of a model's own Keys stand out, of the reader
and of SmolLM2-135M.
"""

import argparse
import json
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

from evals import fidelity, text_fidelity
from evals.accuracy import environment
from evals.coded_peers import FILE_OPTIONS, filled, stored_bits, text_batch, with_files
from evals.fidelity import Scores, bootstrap, make_batch, natural, positive, read_methods, replay
from evals.peers.recording import prefill
from evals.reader.calibrate import conversations
from evals.reader.pages import ADDRESS_KINDS, LEVELS
from evals.store import rounded, write_json
from rotatek_cache.calibration.gather import calibrate
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.fingerprint import fingerprint
from rotatek_cache.hf.chat import Chat

SETTINGS = Path(__file__).parent / "settings" / "outliers.yaml"
METHODS = {"rows": ("pca", "pca"), "weighted": ("oblique", "pca")}
MORE_BITS = 0.05  # what a rotated row may have beyond the unrotated one, for rounding to whole blocks


@torch.no_grad()
def add_outliers(model: torch.nn.Module, factor: float, pairs: int, seed: int = 0) -> int:
    """Multiply `pairs` drawn pairs of channels of each KV head's Keys by `factor`, and divide its queries' by it.

    RoPE turns channel i with channel ``i + D / 2``. A ValueError where Keys are normalised after their projection, or
    where there is none: logits would change.

    Returns:
        Layers changed.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = 0
    for name, module in model.named_modules():
        if "vis" in name or not hasattr(module, "q_proj") or not isinstance(getattr(module, "layer_idx", None), int):
            continue
        if hasattr(module, "k_norm"):
            raise ValueError(f"{name} normalises Keys after their projection: outliers need a model that does not")
        width = module.head_dim
        heads = module.k_proj.out_features // width
        scale = torch.ones(heads, width)
        for head in range(heads):
            drawn = torch.randperm(width // 2, generator=generator)[:pairs]
            scale[head, drawn] = scale[head, drawn + width // 2] = factor
        group = module.q_proj.out_features // module.k_proj.out_features
        for projection, by in ((module.k_proj, scale), (module.q_proj, 1 / scale.repeat_interleave(group, 0))):
            projection.weight *= by.flatten()[:, None].to(projection.weight)
            if projection.bias is not None:
                projection.bias *= by.flatten().to(projection.bias)
        layers += 1
    if not layers:
        raise ValueError("no attention with q_proj and k_proj was found: outliers need a model that has them")
    return layers


def spread(keys: Tensor) -> Tensor:
    """Find, for each head, the largest root mean square of a channel of Keys ``[B, H, S, D]`` over the median one."""
    power = keys.double().square().mean((0, 2)).sqrt()
    return power.amax(-1) / power.median(-1).values


def calibrated(chat: Chat, folder: Path, pages: int) -> dict[str, Path]:
    """Calibrate codes of all tokens on conversations of the reader as it is now."""
    state = Calibration(fingerprint(chat.model), chat.model.config.model_type)
    calibrate(chat.model, conversations(chat.processor, pages, sorted(LEVELS)), state, text=True)
    files = {name: folder / f"{name}.safetensors" for name in METHODS}
    for name, (method, value_method) in METHODS.items():
        state.write_basis(files[name], method=method, value_method=value_method)
    return files


def check_families(methods: dict[str, dict[str, Any]]) -> None:
    """Raise a ValueError where a family has no unrotated row."""
    for family in dict.fromkeys(name.partition(": ")[0] for name in methods):
        if f"{family}: unrotated" not in methods:
            raise ValueError(f"family '{family}' needs a row 'unrotated' to compare with: name it in --only too")


def run_factor(args: argparse.Namespace, methods: dict[str, dict[str, Any]], factor: float) -> dict[str, Any]:
    """Score all rows on the reader with outliers of one factor."""
    chat = Chat.load(None, template_needed=False)
    if factor != 1:
        add_outliers(chat.model, factor, args.pairs)
    files: dict[str, Path] = {}
    if any(FILE_OPTIONS & options.keys() and options.get("text") for options in methods.values()):
        files = calibrated(chat, Path(tempfile.mkdtemp()), args.calibrate)
    rows: dict[str, dict[str, Any]] = {"dense": {"sparsity": 0}}
    rows |= {name: with_files(o, files) if o.get("basis") in METHODS else o for name, o in methods.items()}
    scores = {name: Scores() for name in rows}
    bits: dict[str, float] = {}
    seeds = fidelity.SEEDS["report"][args.skip : args.skip + args.pages]
    with torch.inference_mode():
        for start in tqdm(range(0, len(seeds), args.batch), desc=f"pages, outliers of {factor:g}", mininterval=5):
            part = seeds[start : start + args.batch]
            batch = make_batch(chat.processor, part, args.level, ADDRESS_KINDS, second=(args.second,))
            recorder, first = prefill(chat.model, batch)
            dense: Tensor | None = None
            for name, options in rows.items():
                cache = filled(options, chat.model.config, batch, recorder)
                bits[name] = stored_bits(cache, recorder)[0] if name != "dense" else 16.0
                found = replay(chat.model, cache, batch, first)
                dense = found if dense is None else dense
                fidelity.score(scores[name], batch, found, dense)
        stands_out = torch.stack([spread(keys) for keys, *_ in recorder.seen.values()])
    return {
        "largest_channel_over_median": float(stands_out.mean()),
        "dense_exact_match": [float(np.mean(part)) for part in scores["dense"].exact if part],
        "rows": {name: compared(name, scores, bits, methods[name]) for name in methods},
    }


def compared(name: str, scores: dict[str, Scores], bits: dict[str, float], options: dict[str, Any]) -> dict[str, Any]:
    """Compare a row with the dense cache and with its family's unrotated row."""
    unrotated = f"{name.partition(': ')[0]}: unrotated"
    row: dict[str, Any] = {"options": options, "key_bits": bits[name]}
    for index, which in enumerate(("first", "second")):
        right, kl = np.array(scores[name].exact[index]), np.array(scores[name].divergence[index])
        lost = np.array(scores["dense"].exact[index]) - right
        row[which] = {"loss": float(lost.mean()), "loss_95": bootstrap(lost), "kl": float(kl.mean())}
        if name != unrotated:
            more = right - np.array(scores[unrotated].exact[index])
            less = np.array(scores[unrotated].divergence[index]) - kl
            row[which] |= {
                "more_right": float(more.mean()), "more_right_95": bootstrap(more),
                "less_kl": float(less.mean()), "less_kl_95": bootstrap(less),
            }  # fmt: skip
    if bits[name] > bits[unrotated] + MORE_BITS:
        row["more_bits_than_unrotated"] = bits[name] - bits[unrotated]
    return row


@torch.inference_mode()
def print_spread(args: argparse.Namespace) -> dict[str, list[float]]:
    """Print and return how far the largest channel of Keys stands out, per layer: of the reader and of SmolLM2."""
    chat = Chat.load(None, template_needed=False)
    batch = make_batch(chat.processor, fidelity.SEEDS["report"][:8], args.level, ADDRESS_KINDS)
    found = {"reader, pages": prefill(chat.model, batch)[0]}
    model, tokenizer = text_fidelity.load(None)
    book = text_fidelity.in_package("tvm_ffi", text_fidelity.BOOK).read_text(errors="replace")
    ids = torch.tensor(tokenizer(book[:6000], add_special_tokens=False)["input_ids"])[None, :512]
    found["SmolLM2-135M, English"] = prefill(model, text_batch(ids, ids.shape[1]))[0]
    spreads = {}
    for name, recorder in found.items():
        heads = torch.stack([spread(keys[:, :, 4:]) for keys, *_ in recorder.seen.values()])
        spreads[name] = heads.mean(1).tolist()
        low, high = heads.mean(1).aminmax()
        print(
            f"{name}: largest channel over the median one, mean {heads.mean():.1f}, by layer from {low:.1f} to "
            f"{high:.1f}, of a head at most {heads.max():.1f}"
        )
    return spreads


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=Path, default=SETTINGS, help="YAML: family -> variant -> options")
    parser.add_argument("--only", nargs="*", help='rows whose "family: variant" holds one of these words')
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pairs", type=positive, default=2, help="of channels of each KV head that are multiplied")
    parser.add_argument("--level", choices=sorted(LEVELS), default="easy", help="of the pages")
    parser.add_argument("--second", default="count", help="kind of the second question; the first is by address")
    parser.add_argument("--skip", type=natural, default=0)
    parser.add_argument("--pages", type=positive, default=128)
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--calibrate", type=positive, default=24, help="conversations that calibrate")
    parser.add_argument("--spread", action="store_true", help="print how far channels of models' own Keys stand out")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to write; factors that are not run stay as they are")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    try:
        if args.spread:
            result: dict[str, Any] = {"spread": print_spread(args)}
        else:
            methods = read_methods(args.methods, args.only)
            check_families(methods)
            result = {"factors": {f"{factor:g}": run_factor(args, methods, factor) for factor in args.factors}}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for factor, found in result.get("factors", {}).items():
        print(f"outliers of {factor}: largest channel over the median {found['largest_channel_over_median']:.1f}, "
              f"dense exact match {found['dense_exact_match']}")  # fmt: skip
        for name, row in found["rows"].items():
            second = row["second"]
            line = f"  {name:60} {row['key_bits']:5.2f} bit  loss {100 * second['loss']:6.2f}  KL {second['kl']:.5f}"
            if "less_kl" in second:
                low, high = second["less_kl_95"]
                worse, better = (100 * bound for bound in second["more_right_95"])
                line += f"  KL less by {second['less_kl']:.5f} [{low:.5f}, {high:.5f}], right "
                line += f"{100 * second['more_right']:+.2f} [{worse:.2f}, {better:.2f}]"
            print(line)
    if args.out:
        given = sys.argv[1:] if arguments is None else list(arguments)
        run = {
            "setting": {
                name: getattr(args, name) for name in ("pairs", "level", "second", "skip", "pages", "calibrate")
            },
            "command": shlex.join(["python", "-m", "evals.outliers", *given]),
            "environment": environment("cpu", 1),
        }
        for found in result.get("factors", {}).values():
            found["run"] = run
        before = json.loads(args.out.read_text()).get("factors", {}) if args.out.is_file() else {}
        kept = {"factors": {**before, **result["factors"]}} if "factors" in result else {**result, "run": run}
        write_json(args.out, rounded(kept))


if __name__ == "__main__":
    main()
