"""QuaRot's cache (arXiv 2404.00456): Hadamard rotation, and a range for each token and head.

The authors rotate weights and activations as well, and code the whole model in 4 bits; here the cache alone is, so that
Keys are rotated after RoPE, as theirs, and Values where they are coded, not in the weights. Signs are drawn.
"""

from typing import Any

from evals.peers.cache import PeerCache
from evals.peers.codes import PerToken
from rotatek_cache.core.hadamard import hadamard


def quarot(config: Any, bits: int = 4) -> PeerCache:
    """Make a cache whose Keys and Values are rotated and coded with `bits` a channel."""
    return PeerCache(config, lambda _, width: (PerToken(bits, width, hadamard(width, 0)),) * 2)
