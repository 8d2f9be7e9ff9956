"""Count what a calibrated cache of the reader stores, in float16 and bfloat16, for one request and for many.

    python -m evals.reader.calibrate
    python -m evals.stored_bytes --out evals/results/stored_bytes.json

Ratios are dense over stored bytes of the visual Keys and Values, read off the storage of one prompt. With so many
requests the shared basis is counted once and everything else for each of them.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from evals.accuracy import READER, environment
from evals.fidelity import visual_bytes
from evals.store import rounded, write_json
from rotatek_cache import RotateKCache, attach

SPARSITIES = (0.9414, 0.956, 0.97, 0.971, 0.9805)
REQUESTS = (1, 32, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--basis", type=Path, default=Path("runs/reader_basis.safetensors"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    processor = AutoProcessor.from_pretrained(READER)
    image = Image.open(READER / "pages" / "page1_easy.png").convert("RGB")
    inputs = processor(images=[image], text="<image>\nrow 1?", return_tensors="pt")
    rows = []
    for dtype in (torch.float16, torch.bfloat16):
        model = attach(AutoModelForImageTextToText.from_pretrained(READER, dtype=dtype).eval())
        visual = inputs["input_ids"] == model.config.image_token_id
        text = model.config.text_config
        dense = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * int(visual.sum())
        for sparsity in SPARSITIES:
            cache = RotateKCache(
                basis=args.basis,
                sparsity=sparsity,
                key_bits="auto",
                value_sparsity=sparsity,
                value_bits="auto",
                allocation="heads",
            )
            model.generate(**inputs, past_key_values=cache, max_new_tokens=2, do_sample=False)
            stored = sum(visual_bytes(cache, visual))
            shared = cache.shared_nbytes()
            over = {str(count): count * dense / (count * stored + shared) for count in REQUESTS}
            name = str(dtype).removeprefix("torch.")
            rows.append(
                {
                    "dtype": name,
                    "sparsity": sparsity,
                    "dense_bytes": dense,
                    "stored_bytes": stored,
                    "shared_bytes": shared,
                    "ratio": dense / stored,
                    "ratio_with_basis_by_requests": over,
                }
            )
            print(f"{name:9} {sparsity:6} {dense / stored:6.1f}x", *(f"{n}: {r:.1f}x" for n, r in over.items()))
    if args.out is not None:
        command = f"python -m evals.stored_bytes --out {args.out}"
        write_json(args.out, rounded({"rows": rows, "command": command, "environment": environment("cpu", 1)}))


if __name__ == "__main__":
    main()
