"""Tokens that fit into the same memory under SGLang, dense and compressed, by text share.

    python -m evals.bench.serving_capacity

Makes the pools that the plug-in makes for a model of these shapes (by default those of an 8B model: 36 layers, 8 KV
heads of width 128) and reads their bytes off the storage. Bases, rings, sinks, row tables and all else that a pool
needs are counted.

- **All tokens coded** takes the same at every text share. As many requests run at once as fit, each with a ring for its
  last tokens and its share of the dense rows for first tokens, so that short requests gain less. The tensors are made
  on the device "meta", with shapes and no memory.
- **Text dense** fills its pools, so that the process really has them, and counts its bytes besides.
- **Fewer bits for images** than for text: what rows of one width, images padded, and rows of two widths, in shares that
  are fixed at the start, would hold. Only arithmetic: neither is built.
- fp8 and nvfp4 (4 bits and an fp8 scale for each 16 numbers) are SGLang's own: by their formulas, nothing made.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch

from rotatek_cache import FitOptions
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.sealing import Sealer
from rotatek_cache.codecs.token_rows import token_rows
from rotatek_sglang.coded_layout import BEGINNINGS_PER_REQUEST, CodedPlan
from rotatek_sglang.coded_storage import CodedLayer, DecodeTables, Sinks
from rotatek_sglang.layout import HeadShape, Plan, find_layout
from rotatek_sglang.rows import SlotTable
from rotatek_sglang.storage import build_storage

FORMULAS = {"fp8": 16 / 8, "nvfp4": 16 / (4 + 8 / 16)}


def drawn_basis(heads: HeadShape, path: Path) -> str:
    """Write a basis file of one layer from random states of a falling spectrum; only its widths matter here."""
    state = Calibration(torch.ones(3), "drawn")
    generator = torch.Generator().manual_seed(0)
    for which, width in (("key", heads.key_width), ("value", heads.value_width)):
        spectrum = torch.logspace(0, -2, width)
        state.add_tokens(0, which, "text", torch.randn(heads.kv_heads, 512, width, generator=generator) * spectrum)
    state.texts = 1
    state.write_basis(path, source="drawn")
    return str(path)


def coded(budget: int, heads: HeadShape, layers: int, basis: str, bits: float, length: int) -> dict[str, float]:
    """Make the coded pool for as many requests of `length` tokens as fit; count tokens and bytes of storage."""
    fit = FitOptions(basis=basis, text="coded", bits=bits)
    pair = token_rows(fit, 0, "key"), token_rows(fit, 0, "value")

    def plan_for(requests: int) -> CodedPlan:
        beginnings = BEGINNINGS_PER_REQUEST * requests
        return CodedPlan([pair] * layers, heads, torch.bfloat16, requests, beginnings, length, "meta")

    one, two = plan_for(1), plan_for(2)
    each = two.fixed_bytes - one.fixed_bytes + length * one.slot_bytes
    requests = (budget - 2 * one.fixed_bytes + two.fixed_bytes) // each
    plan = plan_for(requests)
    slots = requests * length
    tensors = [*DecodeTables(requests, length, "meta").tensors()]
    sinks = Sinks(slots, plan.sinks, "meta")
    tensors += [sinks.row_of_slot, sinks.stack]
    for rows in plan.rows:
        keys, values = CodedLayer(*rows, slots, plan.sinks, plan.rings, torch.bfloat16, "meta").tensors()
        tensors += [*keys, *values]
    held = sum(tensor.nbytes for tensor in tensors) + plan.basis_bytes
    return {
        "bits": bits,
        "slot_bytes": one.slot_bytes,
        "request_tokens": length,
        "requests": requests,
        "tokens": slots,
        "storage_bytes": held,
    }


def two_widths(wide: int, narrow: int, planned: float, came: float) -> float:
    """Count the tokens that fit, as times of a pool whose rows all take `wide` bytes.

    Args:
        wide, narrow: bytes of a token of text, and of an image.
        planned: share of the rows that are wide.
        came: share of the tokens that are text. Images find room in wide rows, text finds none in narrow ones.
    """
    rows = wide / (planned * wide + (1 - planned) * narrow)
    return rows if came <= planned else rows * planned / came


def resident() -> int:
    return psutil.Process().memory_info().rss


def filled(tensors: list[torch.Tensor]) -> int:
    """Count the bytes of the tensors after writing to each, so that the process really has them."""
    for tensor in tensors:
        tensor.fill_(1)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def dense(budget: int, heads: HeadShape, layers: int) -> dict[str, int]:
    """Make a dense pool; count its tokens, bytes of storage and bytes of the process."""
    per_token = layers * heads.kv_heads * (heads.key_width + heads.value_width) * 2
    tokens = budget // per_token
    before = resident()
    pools = [
        torch.empty(tokens, heads.kv_heads, width, dtype=torch.bfloat16)
        for _ in range(layers)
        for width in (heads.key_width, heads.value_width)
    ]
    return {"tokens": tokens, "storage_bytes": filled(pools), "process_bytes": resident() - before}


def compressed(
    budget: int, heads: HeadShape, layers: int, rank: int, text_share: float, requests: int, context: int
) -> dict[str, int]:
    """Make our pools, sized as the plug-in sizes them, and count the same."""
    sealers = [Sealer(FitOptions(rank=rank), index) for index in range(layers)]
    layout = find_layout(sealers, heads, torch.bfloat16, "cpu")
    plan = Plan.make(sealers, layout, text_share, 2 * requests, requests, context)
    tokens = (budget - plan.fixed_bytes) // plan.slot_bytes
    before = resident()
    text, visual = plan.rows(tokens)
    table = SlotTable(tokens, text, visual, plan.bases, "cpu")
    rows_of_requests = torch.empty(requests, context, dtype=torch.int32)
    storage = build_storage(layout, text + 1, visual, plan.bases, "cpu")
    tensors = [table.rows, table.basis_of_row, table.text.stack, table.visual.stack, rows_of_requests]
    for layer in storage:
        tensors += [layer.text_keys, layer.text_values]
        for pool in (layer.keys, layer.values):
            tensors += [pool.data, *pool.tables.values()]
    return {"tokens": tokens, "storage_bytes": filled(tensors), "process_bytes": resident() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=2048, help="memory of the pool with dense text")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--requests", type=int, default=32, help="requests at once; twice as many bases fit")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--text-shares", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 2.28])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens of a request")
    parser.add_argument("--coded-gib", type=int, default=40, help="memory of the pool in which all tokens are coded")
    parser.add_argument("--out", type=Path, default=Path("evals/results/serving_capacity.json"))
    given = parser.parse_args()
    heads = HeadShape(given.q_heads, given.kv_heads, given.width, given.width)
    budget = given.mib << 20
    rows = []
    all_coded = []
    large = given.coded_gib << 30
    dense_tokens = large // (2 * given.layers * given.kv_heads * 2 * given.width)
    with tempfile.TemporaryDirectory() as folder:
        basis = drawn_basis(heads, Path(folder) / "basis.safetensors")
        for bits in given.bits:
            for length in given.lengths:
                row = coded(large, heads, given.layers, basis, bits, length)
                all_coded.append({**row, "ratio": row["tokens"] / dense_tokens})
    token = {row["bits"]: row["slot_bytes"] for row in all_coded}
    wide, narrow = (token[max(given.bits)], token[min(given.bits)])
    shares = [(planned, came) for planned in given.text_shares for came in given.text_shares]
    fewer = [{"planned": p, "came": c, "ratio": two_widths(wide, narrow, p, c)} for p, c in shares]
    # A process for each measurement, so that none inherits another's freed memory.
    with get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        base = processes.apply(dense, (budget, heads, given.layers))
        for share in given.text_shares:
            ours = processes.apply(
                compressed, (budget, heads, given.layers, given.rank, share, given.requests, given.context)
            )
            limit = 2 * given.width / (given.rank + given.width + share * (given.width - given.rank))
            rows.append({"text_share": share, "limit": limit, "ratio": ours["tokens"] / base["tokens"], **ours})
    print(f"all tokens coded, at any text share, in {given.coded_gib} GiB; dense: {dense_tokens:,} tokens")
    print("bits   tokens a request   requests   tokens   ratio   storage GiB")
    for row in all_coded:
        print(
            f"{row['bits']:4g} {row['request_tokens']:18,} {row['requests']:10,} {row['tokens']:9,} "
            f"{row['ratio']:7.3f} {row['storage_bytes'] / 2**30:13.3f}"
        )
    print(f"text at {max(given.bits):g} bits, images at {min(given.bits):g}, as times of all at {max(given.bits):g}")
    print(f"rows of one width, images padded: {wide:,} bytes a token, 1.000 at any text share")
    print("rows of two widths; text share planned, and that came:")
    for planned in given.text_shares:
        came = "   ".join(f"{row['came']:g}: {row['ratio']:.3f}" for row in fewer if row["planned"] == planned)
        print(f"{planned:10}   {came}")
    print("by their formulas:", ", ".join(f"{name} {ratio:.3f}" for name, ratio in FORMULAS.items()))
    print(f"text dense. Dense: {base['tokens']:,} tokens in {base['storage_bytes'] / 2**20:,.0f} MiB of storage")
    print("text share   tokens   ratio   limit   storage MiB   process MiB (dense)")
    for row in rows:
        print(
            f"{row['text_share']:10} {row['tokens']:8,} {row['ratio']:7.3f} {row['limit']:7.3f} "
            f"{row['storage_bytes'] / 2**20:13,.0f} {row['process_bytes'] / 2**20:13,.0f} "
            f"({base['process_bytes'] / 2**20:,.0f})"
        )
    found = {
        "settings": {name: value for name, value in vars(given).items() if name != "out"},
        "machine": {"cpu": platform.machine(), "torch": importlib.metadata.version("torch")},
        "command": shlex.join(["python", "-m", "evals.bench.serving_capacity", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "coded": all_coded,
        "two_widths": fewer,
        "dense_in_coded_gib": dense_tokens,
        "formulas": FORMULAS,
        "dense": base,
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
