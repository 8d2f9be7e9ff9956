"""OSCAR, "Offline Spectral Covariance-Aware Rotation" (arXiv 2605.17757): calibrated rotations, 2 bits a channel.

Keys are rotated by the eigenvectors of the queries' second moment, Values by those of their own, each token weighted
by the squared logits that its Key gets (``k^T Q^T Q k``), both followed by a Hadamard matrix. A token is clipped to
the magnitude of a rank of its channels (0.96 for Keys, 0.92 for Values) and coded with a range of its own. The first
and the last tokens are dense.

The authors' bit-reversal of channels deals directions out to the groups of a head that have a range each; here a head
is one group, so that the order of its channels changes nothing. Rotations are fitted for each KV head, which they do
where one for a layer does not hold, and to Keys after RoPE. They keep 64 first and 256 last tokens dense, here 4 and 64
as in all caches that are compared, and store ranges in float32, here in float16.
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evals.peers.cache import PeerCache
from evals.peers.codes import PerToken
from rotatek_cache.codecs.token_rows import SINK_TOKENS
from rotatek_cache.core.hadamard import hadamard

KEY_CLIP, VALUE_CLIP = 0.96, 0.92


def oscar(config: Any, rotations: str, bits: int = 2) -> PeerCache:
    """Make a cache with the rotations of a file that `fit` has written."""
    held = _read(str(rotations))

    def codes(layer: int, width: int) -> tuple[PerToken, PerToken]:
        if f"{layer}.key" not in held or held[f"{layer}.key"].shape[-1] != width:
            raise ValueError(f"rotations {rotations} are of another model: they lack layer {layer} of width {width}")
        return (
            PerToken(bits, width, held[f"{layer}.key"], KEY_CLIP),
            PerToken(bits, width, held[f"{layer}.value"], VALUE_CLIP),
        )

    return PeerCache(config, codes)


@functools.lru_cache(maxsize=4)
def _read(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise ValueError(f"rotations {path} does not exist; python -m evals.reader.calibrate makes the reader's")
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def fit(prompts: Iterable[dict[int, tuple[Tensor, Tensor, Tensor]]], path: Path) -> None:
    """Fit rotations and write them.

    Args:
        prompts: for each prompt, by layer: Keys and Values ``[1, H, S, D]`` and queries ``[1, H_q, S, D]`` after RoPE.
        path: of the file.
    """
    sums: dict[str, Tensor] = {}
    for prompt in prompts:
        for layer, states in prompt.items():
            keys, values, queries = (part[0, :, SINK_TOKENS:].double() for part in states)
            grouped = queries.unflatten(0, (len(keys), -1)).flatten(1, 2)
            seen = grouped.mT @ grouped
            weight = (keys * (keys @ seen)).sum(-1, keepdim=True)
            for name, moment in (("key", seen), ("value", values.mT @ (weight * values))):
                place = f"{layer}.{name}"
                sums[place] = sums[place] + moment if place in sums else moment
    if not sums:
        raise ValueError("no prompt was given to fit rotations to")
    rotations = {
        place: (torch.linalg.eigh(moment).eigenvectors.flip(-1).float() @ hadamard(moment.shape[-1])).contiguous()
        for place, moment in sums.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(rotations, path)
