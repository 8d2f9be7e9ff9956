"""Tokens that fit into the same memory under SGLang, dense and compressed, by text share.

    python -m evals.bench.serving_capacity

Makes the pools that the plug-in makes for a model of these shapes, fills them, and reads their bytes off the storage
and off the process. Bases, row tables and all else that the pool needs are counted.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch

from rotatek_cache import FitOptions
from rotatek_cache.codecs.sealing import Sealer
from rotatek_sglang.layout import HeadShape, Plan, find_layout
from rotatek_sglang.rows import SlotTable
from rotatek_sglang.storage import build_storage


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
    parser.add_argument("--mib", type=int, default=2048, help="memory of the pool")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--q-heads", type=int, default=28)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--requests", type=int, default=32, help="requests at once; twice as many bases fit")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--text-shares", type=float, nargs="+", default=[0.1, 0.25, 0.5])
    parser.add_argument("--out", type=Path, default=Path("evals/results/serving_capacity.json"))
    given = parser.parse_args()
    heads = HeadShape(given.q_heads, given.kv_heads, given.width, given.width)
    budget = given.mib << 20
    rows = []
    # A process for each measurement, so that none inherits another's freed memory.
    with get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        base = processes.apply(dense, (budget, heads, given.layers))
        for share in given.text_shares:
            ours = processes.apply(
                compressed, (budget, heads, given.layers, given.rank, share, given.requests, given.context)
            )
            limit = 2 * given.width / (given.rank + given.width + share * (given.width - given.rank))
            rows.append({"text_share": share, "limit": limit, "ratio": ours["tokens"] / base["tokens"], **ours})
    print(f"dense: {base['tokens']:,} tokens in {base['storage_bytes'] / 2**20:,.0f} MiB of storage")
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
        "dense": base,
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
