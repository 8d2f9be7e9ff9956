"""Count what a calibrated cache of a reader stores, in float16 and bfloat16, for one request and for many.

    python -m evals.reader.calibrate
    python -m evals.reader.calibrate --reader smol
    python -m evals.stored_bytes --readers reader smol --out evals/results/stored_bytes.json

Heads of the shipped reader are 128 wide, those of the second reader 64; an image takes 324 tokens. For images of other
sizes, the bytes that do not grow with tokens (the means) are told from those that do.
Ratios are dense over stored bytes of the visual Keys and Values, read off the storage of one prompt. With so many
requests the shared basis is counted once and everything else for each of them.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from evals.accuracy import environment
from evals.fidelity import visual_bytes
from evals.reader.readers import READERS, Reader
from evals.store import rounded, write_json
from rotatek_cache import RotateKCache, attach
from rotatek_cache.hf.cache import RotateKLayer
from rotatek_cache.hf.chat import READER

SPARSITIES = (0.9414, 0.956, 0.97, 0.971, 0.9805)
REQUESTS = (1, 32, 1000)
IMAGE_TOKENS = (144, 1024)


def codes_bytes(cache: RotateKCache) -> int:
    """Count the bytes that grow with visual tokens: the codes of Keys and Values."""
    layers = [layer.kv for layer in cache.layers if isinstance(layer, RotateKLayer)]
    return sum(s.keys.data.nbytes + s.values.data.nbytes for layer in layers for s in layer.segments)


def rows_of(reader: Reader) -> list[dict[str, Any]]:
    """Count and print one prompt of a reader, in each dtype at each sparsity."""
    processor = AutoProcessor.from_pretrained(reader.path())
    image = Image.open(READER / "pages" / "page1_easy.png").convert("RGB")
    inputs = processor(images=[image], text="<image>\nrow 1?", return_tensors="pt")
    rows = []
    for dtype in (torch.float16, torch.bfloat16):
        model = attach(AutoModelForImageTextToText.from_pretrained(reader.path(), dtype=dtype).eval())
        visual = inputs["input_ids"] == model.config.image_token_id
        text, tokens = model.config.text_config, int(visual.sum())
        dense = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * tokens
        for sparsity in SPARSITIES:
            cache = RotateKCache(
                basis=f"runs/{reader.name}_fisher.safetensors",
                sparsity=sparsity,
                key_bits="auto",
                value_sparsity=sparsity,
                value_bits="auto",
                allocation="heads",
            )
            model.generate(**inputs, cache=cache, max_new_tokens=2, do_sample=False)
            stored = sum(visual_bytes(cache, visual))
            shared = cache.shared_nbytes()
            over = {str(count): count * dense / (count * stored + shared) for count in REQUESTS}
            growing = codes_bytes(cache)
            by_tokens = {
                str(count): dense * count / tokens / (growing * count / tokens + stored - growing)
                for count in (*IMAGE_TOKENS, tokens)
            }
            name = str(dtype).removeprefix("torch.")
            rows.append(
                {
                    "reader": reader.name,
                    "head_width": text.head_dim,
                    "visual_tokens": tokens,
                    "dtype": name,
                    "sparsity": sparsity,
                    "dense_bytes": dense,
                    "stored_bytes": stored,
                    "shared_bytes": shared,
                    "ratio": dense / stored,
                    "ratio_by_visual_tokens": by_tokens,
                    "ratio_with_basis_by_requests": over,
                }
            )
            told = [
                f"{count} {what}: {ratio:.1f}x"
                for what, ratios in (("tokens", by_tokens), ("requests", over))
                for count, ratio in ratios.items()
            ]
            print(f"{reader.name:7} D={text.head_dim:<4} {name:9} {sparsity:6}", *told)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=["reader"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [row for name in args.readers for row in rows_of(READERS[name])]
    if args.out is not None:
        command = f"python -m evals.stored_bytes --readers {' '.join(args.readers)} --out {args.out}"
        write_json(args.out, rounded({"rows": rows, "command": command, "environment": environment("cpu", 1)}))


if __name__ == "__main__":
    main()
