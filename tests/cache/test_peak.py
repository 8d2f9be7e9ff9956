"""The most that a prefill takes: one layer is dense at a time, whatever the number of layers.

On the CPU storages are counted as they come and go; on CUDA what the allocator has given.
"""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rotatek_cache.cache.coordinator import Coordinator
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.core.attention import causal_mask
from rotatek_cache.options import FitOptions

TOKENS, PADDING, TEXT, HEADS, WIDTH, BATCH, LAYERS = 1600, 40, 20, 2, 64, 2, 4
CODED = {"key_bits": 4, "value_bits": 4}
OPTIONS = {
    "the default": {"sparsity": 0.75},
    "codes": {"sparsity": 0.75, "value_sparsity": 0.75, **CODED},
    "energy": {"energy": 0.6},
    "automatic bits": {"sparsity": 0.9, "key_bits": "auto", "value_sparsity": 0.9, "value_bits": "auto"},
    "codes without a basis": {"sparsity": 0, "basis": "none", "value_basis": "none", **CODED},
    "as they are": {"sparsity": 0},
}

# Beside the states themselves, as shares of a dense layer: what a seal works with. Rows of one run are read where they
# lie; others are brought together first, Keys and Values.
WORKING = {
    "the default": (0.2, 1.0),
    "codes": (0.7, 1.7),
    "energy": (0.2, 0.8),
    "automatic bits": (1.2, 1.6),
    "codes without a basis": (1.5, 2.1),
    "as they are": (0.2, 0.2),
}


class Live(TorchDispatchMode):
    """The bytes of the storages that operations have made and that are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.most = 0

    @property
    def bytes(self) -> int:
        self.sizes = {storage: size for storage, size in self.sizes.items() if not storage.expired()}
        return sum(self.sizes.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        self.most = max(self.most, self.bytes)
        return made


def prefill(device: str, dtype: torch.dtype, options: dict, layers: int, batch: int) -> list[LayerKV]:
    """Let layers attend to a prompt, one after the other, as a model does: each makes its states and lets them go."""
    torch.manual_seed(0)
    columns = torch.arange(TOKENS)
    shown = columns >= torch.tensor([[0], [PADDING]])[:batch]
    positions = VisualPositions()
    positions.announce(0, TOKENS, shown & (columns < TOKENS - TEXT) & (columns >= PADDING + TEXT))
    mask = None if batch == 1 else (causal_mask(TOKENS, TOKENS, columns.device)[:, :, -40:] & shown[:, None, None])
    mask = None if mask is None else mask.to(device)
    coordinator, held = Coordinator(positions), []
    for index in range(layers):
        held.append(LayerKV(FitOptions(**options, always_compress=True), positions, index))
        scale = torch.logspace(0, -2, WIDTH, device=device, dtype=dtype)
        states = (torch.randn(batch, HEADS, TOKENS, WIDTH, device=device, dtype=dtype).mul_(scale) for _ in range(2))
        held[-1].append(*states)
        coordinator.observe(held[-1], torch.randn(batch, 2 * HEADS, 40, WIDTH, device=device, dtype=dtype), mask)
    positions.end_forward()
    return held


def kept_bytes(layers: list[LayerKV]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(layers)}.values())


def _tensors(layers: list[LayerKV]) -> list[torch.Tensor]:
    return [tensor for layer in layers for tensor in layer.tensors()] + layers[0].positions.tensors()


@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_prefill_holds_one_dense_layer_above_what_it_keeps(name, batch):
    with Live() as live:
        held = prefill("cpu", torch.float32, OPTIONS[name], LAYERS, batch)
        left = live.bytes
    kept, dense = kept_bytes(held), 2 * batch * HEADS * TOKENS * WIDTH * 4
    assert left - kept < 0.01 * dense  # nothing stays behind but what is counted
    assert (live.most - kept) / dense < 1 + WORKING[name][batch - 1]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_room_that_a_prefill_needs_does_not_grow_with_layers(name):
    most = []
    for layers in (2, 8):
        with Live() as live:
            held = prefill("cpu", torch.float32, OPTIONS[name], layers, BATCH)
        most.append(live.most - kept_bytes(held))
    assert most[1] < 1.05 * most[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_on_a_gpu(name, batch):
    prefill("cuda", torch.bfloat16, OPTIONS[name], 1, batch)  # loads what torch loads late
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    held = prefill("cuda", torch.bfloat16, OPTIONS[name], LAYERS, batch)
    most, kept = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    dense = 2 * batch * HEADS * TOKENS * WIDTH * 2
    assert kept - kept_bytes(held) < 0.05 * dense
    # Sums and coefficients to be coded are in float32, twice as wide as the states.
    assert (most - kept) / dense < 1 + 2 * WORKING[name][batch - 1]
