"""Peers by name, as rows of settings name them."""

from collections.abc import Callable

from evals.peers.cache import PeerCache
from evals.peers.omni_scaled import omni_scaled
from evals.peers.oscar import oscar
from evals.peers.plain import kivi, per_token
from evals.peers.quarot import quarot
from evals.peers.turboquant import turboquant

PEERS: dict[str, Callable[..., PeerCache]] = {
    "per_token": per_token,
    "kivi": kivi,
    "quarot": quarot,
    "turboquant": turboquant,
    "oscar": oscar,
    "omni_scaled": omni_scaled,
}
