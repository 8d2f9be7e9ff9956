"""Codes without any rotation: KIVI's form for all tokens (arXiv 2402.02750), and a range for each token.

KIVI codes Keys per channel of a group of tokens and Values per token, and keeps the last tokens dense. Here the first
four tokens are dense as well, as in all caches that are compared, and a token's Values have one range over all channels
of a head where the authors have one for each 32.
"""

from typing import Any

from evals.peers.cache import PeerCache
from evals.peers.codes import PerChannel, PerToken


def kivi(config: Any, bits: int = 4, group: int = 32) -> PeerCache:
    """Make a cache of KIVI's form, with groups of `group` tokens."""
    return PeerCache(config, lambda _, width: (PerChannel(bits, width, group), PerToken(bits, width)))


def per_token(config: Any, bits: int = 4, value_bits: int | None = None) -> PeerCache:
    """Make a cache with a range for each token and head; Values have as many bits as Keys, or `value_bits`."""
    return PeerCache(config, lambda _, width: (PerToken(bits, width), PerToken(value_bits or bits, width)))
