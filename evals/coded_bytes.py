"""Count what a cache that codes all tokens stores of an 8B model's prompt, at several shares of text.

    python -m evals.coded_bytes --out evals/results/coded_bytes.json

The layout is that of Qwen3-VL-8B, 8 KV heads of width 128 in bfloat16; 4 of its 36 layers are filled. Everything that
a request holds is counted from storage: codes with their free columns, sinks, the last 64 tokens, counts and flags; the
basis file, which all requests share, is not. What states are does not change their bytes: these are zeros.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from evals.accuracy import environment
from evals.store import rounded, write_json
from rotatek_cache import RotateKCache
from rotatek_cache.calibration.moments import Calibration

LAYERS, HEADS, WIDTH = 4, 8, 128
TOKENS = (1024, 4096)
BITS = (4, 3, 2.28, 2)
TEXT = (0.1, 1.0)


def basis(path: Path) -> None:
    """Write a basis file of drawn states, whose spectrum falls; layers are alike."""
    state = Calibration(torch.ones(1), "drawn")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(HEADS, 300, WIDTH, generator=generator) * torch.logspace(1, -1, WIDTH)
    for layer in range(LAYERS):
        for which in ("key", "value"):
            state.add_tokens(layer, which, "text", drawn)
    state.write_basis(path)


@torch.no_grad()
def ratio(path: Path, tokens: int, bits: float, text: float) -> tuple[int, int]:
    """Read a prompt and eight tokens more; return the bytes of a dense cache and of this one."""
    visual = torch.arange(tokens) >= text * tokens
    cache = RotateKCache(basis=path, text="coded", bits=bits, visual_mask=visual[None])
    prompt = torch.zeros(1, HEADS, tokens, WIDTH, dtype=torch.bfloat16)
    for layer in range(LAYERS):
        handle, _ = cache.update(prompt, prompt, layer)
        handle.observe(prompt[:, :, :1], None)
    for _ in range(8):
        for layer in range(LAYERS):
            cache.update(prompt[:, :, :1], prompt[:, :, :1], layer)
    return 2 * LAYERS * prompt[:, :, :1].nbytes * (tokens + 8), cache.nbytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "basis.safetensors"
        basis(path)
        for bits in BITS:
            for tokens in TOKENS:
                for text in TEXT:
                    dense, stored = ratio(path, tokens, bits, text)
                    row = {"bits": bits, "tokens": tokens, "text": text, "dense_bytes": dense, "stored_bytes": stored}
                    rows.append(row | {"ratio": dense / stored})
                    print(f"{bits:5} bit {tokens:6} tokens, text {text:.1f}: {dense / stored:5.2f}x", flush=True)
    if args.out is not None:
        command = f"python -m evals.coded_bytes --out {args.out}"
        write_json(args.out, rounded({"rows": rows, "command": command, "environment": environment("cpu", 1)}))


if __name__ == "__main__":
    main()
