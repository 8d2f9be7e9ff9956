"""Which part of a compressed cache costs the answers? One part at a time is coded, all else stays dense.

    python -m evals.lost_by_part --second count --out evals/results/lost_by_part.json
    python -m evals.lost_by_part --reader smol --basis runs/smol_basis.safetensors --bits 60 --only Values first others

Parts are the Keys or the Values of one layer, with the codes of `key_bits="auto"` and the same bits for all heads.
Beside the KL of a part stands its price by the basis file, from the answers that it was calibrated on; it takes errors
of tokens as independent and tokens as drawn at a temperature, so that prices compare with each other only. For
the Keys of the first layer also: what all bits give as codes of 2 bits, what rounding does to those without clipping,
and clipping without rounding. Pages are drawn from the seeds for choosing; the first question asks by address.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evals.accuracy import environment
from evals.fidelity import Batch, RecordingCache, Scores, bootstrap, fill, load, make_batch, natural, positive, replay
from evals.fidelity import score as add_scores
from evals.reader.pages import ADDRESS_KINDS, CHOOSE_SEEDS, KINDS, LEVELS
from evals.reader.readers import READERS
from evals.store import rounded, write_json
from rotatek_cache import RotateKCache
from rotatek_cache.codecs.basis_file import load_basis
from rotatek_cache.codecs.shared_basis import CalibratedBasis, HeadBudget, StateBasis
from rotatek_cache.core.quantization import BITS, CHANNEL_BLOCK, CodeLayout
from rotatek_cache.options import UNIFORM

Part = tuple[int, str]  # layer, "key" or "value"
Change = Callable[[Tensor], Tensor]  # of states [H, S, D]


def coded(state: StateBasis, code: CodeLayout, *, rounding: bool = True, clipping: bool = True) -> Change:
    """Make what reads states as codes of the file would have them, around their own mean."""
    cpu = torch.device("cpu")
    low, step = (given[:, None] for given in state.ranges(code, cpu))
    encoder, decoder = state.encoder[..., : code.channels], state.decoder[..., : code.channels]

    def change(states: Tensor) -> Tensor:
        mean = states.mean(1, keepdim=True)
        found = ((states - mean) @ encoder - low) / torch.where(step > 0, step, torch.ones_like(step))
        found = found.round() if rounding else found
        found = found.clamp_min(0).minimum(code.levels(cpu)) if clipping else found
        return (found * step + low) @ decoder.mT + mean

    return change


def price(state: StateBasis, code: CodeLayout) -> float:
    """Sum what the file says that codes cost: half the gain times the distortion, over heads and coefficients."""
    prices = state.distortion("gain", BITS).double()
    cost, start = float(prices[:, 0, code.channels :].sum()), 0
    for bits, channels in code.blocks:
        cost += float(prices[:, 1 + sorted(BITS).index(bits), start : start + channels].sum())
        start += channels
    return cost / 2


def prices_of_parts(file: CalibratedBasis, bits: int) -> dict[str, float]:
    """Name the parts that `rows` codes alone, with the price of each."""
    found = {}
    for layer in file.layers:
        for which in ("key", "value"):
            code = file.code(layer, which, "auto", HeadBudget(bits=bits), UNIFORM)
            assert isinstance(code, CodeLayout)
            found[f"{which}s of layer {layer}"] = price(file.state(layer, which), code)
    return found


def rows(file: CalibratedBasis, bits: int) -> Iterator[tuple[str, dict[Part, Change]]]:
    """Yield what is coded in each row."""
    parts = [(layer, which) for layer in file.layers for which in ("key", "value")]
    changes = {}
    for layer, which in parts:
        code = file.code(layer, which, "auto", HeadBudget(bits=bits), UNIFORM)
        assert isinstance(code, CodeLayout)
        changes[layer, which] = coded(file.state(layer, which), code)
    yield "dense", {}
    yield "Keys and Values", changes
    for wanted in ("key", "value"):
        yield f"all {wanted}s", {part: change for part, change in changes.items() if part[1] == wanted}
    first = min(file.layers)
    yield "keys of the first layer", {(first, "key"): changes[first, "key"]}
    yield (
        "keys of the others",
        {(layer, which): changes[layer, which] for layer, which in parts if which == "key" and layer > first},
    )
    for layer, which in parts:
        yield f"{which}s of layer {layer}", {(layer, which): changes[layer, which]}
    state, code = file.state(first, "key"), CodeLayout(((2, bits // 2 // CHANNEL_BLOCK * CHANNEL_BLOCK),))
    name = f"keys of layer {first}, {code.channels} of 2 bits"
    yield name, {(first, "key"): coded(state, code)}
    yield f"{name}, rounded and not clipped", {(first, "key"): coded(state, code, clipping=False)}
    yield f"{name}, clipped and not rounded", {(first, "key"): coded(state, code, rounding=False)}


def changed(recorder: RecordingCache, changes: dict[Part, Change]) -> RecordingCache:
    """Copy a record with some parts of the visual states changed."""
    found = RecordingCache()
    found.visual = recorder.visual
    found.layers = recorder.layers
    assert recorder.visual is not None
    for layer, (keys, values, *rest) in recorder.seen.items():
        states = {"key": keys.float(), "value": values.float()}
        for which, tensor in states.items():
            change = changes.get((layer, which))
            if change is not None:
                for row, visual in enumerate(recorder.visual):
                    tensor[row][:, visual] = change(tensor[row][:, visual])
        found.seen[layer] = states["key"], states["value"], *rest  # type: ignore[assignment]
    return found


@torch.inference_mode()
def score_batch(
    model: Any, batch: Batch, scores: dict[str, Scores], made: Iterable[tuple[str, dict[Part, Change]]]
) -> None:
    """Add the answers of a batch to the scores of each row; the first codes nothing."""
    recorder = RecordingCache()
    prefill = model(**batch.prompt, position_ids=batch.positions()[0], past_key_values=recorder, use_cache=True)
    dense: Tensor | None = None
    for name, changes in made:
        cache = RotateKCache(sparsity=0)
        fill(cache, model.config, batch, changed(recorder, changes))
        found = replay(model, cache, batch, prefill.logits[:, -1])
        dense = found if dense is None else dense
        add_scores(scores.setdefault(name, Scores()), batch, found, dense)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", choices=READERS, default="reader")
    parser.add_argument("--basis", type=Path, default=Path("runs/reader_basis.safetensors"))
    parser.add_argument("--bits", type=positive, default=120, help="of a token and head, for Keys and Values each")
    parser.add_argument("--second", choices=KINDS, default="count", help="kind of the second question")
    parser.add_argument("--level", choices=sorted(LEVELS), default="easy")
    parser.add_argument("--skip", type=natural, default=0)
    parser.add_argument("--pages", type=positive, default=64)
    parser.add_argument(
        "--only", nargs="+", help="words of which a row's name has one; the dense row always comes first"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    reader, file = READERS[args.reader], load_basis(args.basis)
    chat = load(reader.path())
    scores: dict[str, Scores] = {}
    seeds = CHOOSE_SEEDS[args.skip : args.skip + args.pages]
    for start in range(0, len(seeds), 32):
        part = seeds[start : start + 32]
        batch = make_batch(chat.processor, part, args.level, ADDRESS_KINDS, [args.second], reader)
        wanted = ["dense", *args.only] if args.only else [""]
        made = ((name, part) for name, part in rows(file, args.bits) if any(word in name for word in wanted))
        score_batch(chat.model, batch, scores, made)
    dense = torch.tensor(scores["dense"].exact[1])
    found: list[dict[str, Any]] = []
    prices = prices_of_parts(file, args.bits)
    for name, row in scores.items():
        losses = dense - torch.tensor(row.exact[1])
        divergence = sum(row.divergence[1]) / len(losses)
        low, high = bootstrap(losses.numpy())
        found.append({"coded": name, "loss": losses.mean().item(), "loss_95": [low, high], "kl": divergence})
        told = ""
        if name in prices:
            found[-1]["price"] = prices[name]
            told = f"  price {prices[name]:.2e}"
        print(f"{name:52} {100 * losses.mean():6.2f} [{100 * low:.1f}, {100 * high:.1f}]  KL {divergence:.6f}{told}")
    both = torch.tensor([[row["kl"], row["price"]] for row in found if "price" in row])
    if len(both) > 1:
        ranks = both.argsort(0).argsort(0).double().unbind(1)
        print(f"rank correlation of KL and price: {torch.corrcoef(torch.stack(ranks))[0, 1]:.2f}")
    if args.out is not None:
        setting = {
            "reader": args.reader,
            "second": args.second,
            "level": args.level,
            "bits": args.bits,
            "pages": len(dense),
        }
        command = " ".join(["python -m evals.lost_by_part", *sys.argv[1:]])
        result = {"rows": found, "exact_match_dense": dense.mean().item(), "setting": setting, "command": command}
        write_json(args.out, rounded(result | {"environment": environment("cpu", 1)}))


if __name__ == "__main__":
    main()
