"""Bytes of a saved cache on disk beside those in memory, compressed or not, and how near codes are to their entropy.

    python -m evals.disk_bytes --out evals/results/disk_bytes.json

The reader in bfloat16 reads pages in one prompt. Each row is saved twice, `cache.save(path)` and ``compress=True``
(zlib). Where codes are stored, their entropy is what a coder of single codes could reach at best with the true shares
of each coefficient's codes in this prompt: mean bits a coefficient, beside the bits that it has. A coder that does much
better would have to predict a token's codes from others'. What zlib makes of the codes alone is stated too.
"""

import argparse
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evals.accuracy import environment
from evals.bench.saved_prompt import Bench
from evals.store import rounded, write_json
from rotatek_cache import RotateKCache
from rotatek_cache.cache.saving import ZLIB_LEVEL
from rotatek_cache.core.quantization import BITS, CodeLayout
from rotatek_cache.hf.cache import RotateKLayer

ROWS: dict[str, dict[str, Any]] = {
    "dense": {"sparsity": 0},
    "visual, PCA of the prompt, K r = 24, V r = 32, 4 bit": {
        "rank": 24, "basis": "pca", "key_bits": 4, "value_sparsity": 0.75, "value_bits": 4, "basis_bits": 8,
    },
    "visual, no rotation, 2 bit": {
        "sparsity": 0, "basis": "none", "key_bits": 2, "value_basis": "none", "value_bits": 2,
    },
    "all tokens coded, 4 bit": {"text": "coded", "bits": 4},
    "all tokens coded, 2.25 bit": {"text": "coded", "bits": 2.25},
    "all tokens coded, 2 bit": {"text": "coded", "bits": 2},
}  # fmt: skip


def entropies(codes: Tensor, bits: Tensor) -> dict[int, list[float]]:
    """Find the entropy of each coefficient's codes ``[H, n, channels]``, by the `bits` ``[channels]`` that it has."""
    found: dict[int, list[float]] = {}
    for head in codes:
        for channel, width in zip(head.mT, bits.tolist(), strict=True):
            counts = channel.long().bincount().double()
            share = counts[counts > 0] / counts.sum()
            found.setdefault(int(width), []).append(-float((share * share.log2()).sum()))
    return found


def code_entropy(cache: RotateKCache) -> dict[str, Any] | None:
    """Sum up the entropies of all layers' codes, and what zlib leaves of them; None where there are none."""
    found: dict[int, list[float]] = {}
    plain = packed = 0
    for layer in cache.layers:
        if not isinstance(layer, RotateKLayer):
            continue
        for code, data in stored_codes(layer):
            bits = (code.levels(data.device) + 1).log2()
            plain += data.nbytes
            packed += len(zlib.compress(data.contiguous().numpy().data, ZLIB_LEVEL))
            for width, values in entropies(code.unpack(data), bits).items():
                found.setdefault(width, []).extend(values)
    if not found:
        return None
    total = sum(width * len(values) for width, values in found.items())
    return {
        "of_stored_bits": sum(map(sum, found.values())) / total,
        "zlib_of_stored_bytes": packed / plain,
        "by_width": {str(width): sum(found[width]) / len(found[width]) for width in BITS if width in found},
    }


def stored_codes(layer: RotateKLayer) -> list[tuple[CodeLayout, Tensor]]:
    """List the codes of a layer that hold tokens, ``[H, n, bytes]``, with their layout."""
    kv = layer.kv
    if hasattr(kv, "codes"):  # all tokens coded
        tokens = kv.counts.coded[0]
        return [(c.codec.code, c.data[:, :tokens]) for c in kv.codes if isinstance(c.codec.code, CodeLayout)]
    states = [states for segment in kv.segments for states in (segment.keys, segment.values)]
    return [(part.code, part.data) for part in states if isinstance(part.code, CodeLayout)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=2)
    parser.add_argument("--basis", type=Path, default=Path("runs/reader_rows.safetensors"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bench = Bench(args.pages, torch.bfloat16, 1)
    rows = []
    for name, options in ROWS.items():
        given = {**options, "basis": args.basis} if options.get("text") else options
        cache = bench.read(given)
        with tempfile.TemporaryDirectory() as folder:
            plain, packed = (
                cache.save(Path(folder) / f"{compress}.cache", compress=compress) for compress in (False, True)
            )
        row = {
            "stored": name,
            "bytes in memory": plain.in_memory,
            "bytes on disk": plain.on_disk,
            "bytes on disk, compressed": packed.on_disk,
            "entropy": code_entropy(cache),
        }
        rows.append(row)
        line = (
            f"{name:55} {plain.in_memory:>10,} in memory {plain.on_disk:>10,} on disk {packed.on_disk:>10,} compressed"
        )
        entropy = row["entropy"]
        if entropy is not None:
            widths = ", ".join(f"{bits:.2f} of {width}" for width, bits in entropy["by_width"].items())
            line += f"; of the codes' bits entropy is {100 * entropy['of_stored_bits']:.0f} % ({widths}), "
            line += f"and zlib leaves {100 * entropy['zlib_of_stored_bytes']:.0f} %"
        print(line, flush=True)
    if args.out is not None:
        result = {
            "pages": args.pages,
            "tokens": bench.length,
            "dtype": "bfloat16",
            "rows": rows,
            "command": f"python -m evals.disk_bytes --pages {args.pages} --out {args.out}",
            "environment": environment("cpu", 1),
        }
        write_json(args.out, rounded(result))


if __name__ == "__main__":
    main()
