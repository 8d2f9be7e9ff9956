"""OScaR, "Omni-Scaled Canalized Rotation" (arXiv 2605.19660): no calibration, 2 bits.

Keys are rotated (Hadamard), each token is divided by its length ("omni-token scaling"), and what is left is coded per
channel of a group of tokens; Values are rotated and coded per token. By the authors' page a group has 32 tokens and
memory falls by 5.3x, which is 3 bits a number; a group of 128 is offered too. Where their page does not say it: the
length is stored for each token in half precision, a token's Values have one range over all channels of a head, and
first and last tokens are dense as in all caches that are compared (theirs: the last 128).
"""

from typing import Any

from evals.peers.cache import PeerCache
from evals.peers.codes import PerChannel, PerToken
from rotatek_cache.core.hadamard import hadamard


def omni_scaled(config: Any, bits: int = 2, group: int = 32) -> PeerCache:
    """Make a cache of groups of `group` tokens, with `bits` a channel."""

    def codes(_: int, width: int) -> tuple[PerChannel, PerToken]:
        rotation = hadamard(width, 0)
        return PerChannel(bits, width, group, rotation, by_norm=True), PerToken(bits, width, rotation)

    return PeerCache(config, codes)
