"""QuaRot's cache (arXiv 2404.00456): Hadamard rotation, and a range for each token and head.

The authors rotate weights and activations as well, and code the whole model in 4 bits; here the cache alone is, so that
Keys are rotated after RoPE, as theirs, and Values where they are coded, not in the weights. Signs are drawn.
"""

from typing import Any

from evals.peers.cache import PeerCache
from evals.peers.codes import PerToken
from rotatek_cache.core.hadamard import hadamard


def quarot(config: Any, bits: int = 4, value_bits: int | None = None) -> PeerCache:
    """Make a cache whose rotated Keys have `bits` a channel, and Values as many or `value_bits`."""

    def codes(_: int, width: int) -> tuple[PerToken, PerToken]:
        rotation = hadamard(width, 0)
        return PerToken(bits, width, rotation), PerToken(value_bits or bits, width, rotation)

    return PeerCache(config, codes)
