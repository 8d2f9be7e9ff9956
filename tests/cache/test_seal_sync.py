"""The seal of a layer leaves a GPU alone: nothing on its way reads a tensor on the host or copies from it.

On the CPU the same operators run, and are watched for those that would make the host wait for a GPU.
"""

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rotatek_cache.cache.coordinator import Coordinator
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.options import FitOptions

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "_unique")


class Reads(TorchFunctionMode):
    """Counts reads that are no operators."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("tolist", "numpy"):
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Counts operators that wait for the device, or that copy from the host."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        by_mask = "index" in name and any(getattr(index, "dtype", None) == torch.bool for index in args[1])
        if by_mask or any(word in name for word in WAITS):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def waits(layers: int = 3, lengths: tuple[int, ...] = (145, 160), dtype=torch.float32, **options) -> Counter[str]:
    """What the seal of the last of some layers waits for; the first does what they share."""
    tokens, positions, batch = 200, VisualPositions(), len(lengths)
    columns = torch.arange(tokens)
    positions.announce(0, tokens, (columns >= 5) & (columns < 5 + torch.tensor(lengths)[:, None]))
    draw = torch.Generator().manual_seed(0)
    for index in range(layers):
        kv = LayerKV(FitOptions(**options), positions, index)
        kv.append(*(torch.randn(batch, 2, tokens, 64, generator=draw).to(dtype) for _ in range(2)))
        query = torch.randn(batch, 4, tokens, 64, generator=draw).to(dtype)
        found: Counter[str] = Counter()
        with Watch(found), Reads(found):
            Coordinator(positions).observe(kv, query, None)
        assert kv.segments
    return found


@pytest.mark.parametrize("lengths", [(145, 160), (150, 150), (150,)], ids=str)
@pytest.mark.parametrize(
    ("options", "states"),
    [
        ({"rank": 16}, 1),
        ({"rank": 16, "basis": "tempered"}, 1),
        ({"rank": 16, "basis": "pca_uncentred"}, 1),
        ({"rank": 16, "basis": "think"}, 1),
        ({"rank": 16, "basis_bits": 8}, 1),
        ({"sparsity": 0.75, "key_bits": 4, "value_sparsity": 0.5, "value_bits": 4}, 2),
        ({"sparsity": 0.75, "key_bits": "fp8"}, 1),
        ({"sparsity": 0.0, "basis": "none", "key_bits": 2, "value_bits": 2, "value_basis": "none"}, 2),
    ],
    ids=str,
)
def test_a_seal_reads_nothing_but_whether_states_are_finite(options, states, lengths):
    # On a GPU the verdict travels to the host by itself and is read later; a CPU has it at once.
    assert waits(lengths=lengths, **options) == {"_local_scalar_dense.default": states}


def test_what_decides_on_the_shape_of_storage_has_to_be_read():
    assert waits(lengths=(150,), sparsity=0.9, key_bits="auto") == {"_local_scalar_dense.default": 1, "tolist": 1}
    assert waits(lengths=(150,), energy=0.9, always_compress=True)["_local_scalar_dense.default"] > 1


def test_half_precision_takes_the_same_way():
    assert waits(dtype=torch.bfloat16, rank=16) == {"_local_scalar_dense.default": 1}


@pytest.mark.parametrize("lengths", [(145, 160), (150, 150)], ids=str)
def test_a_decode_step_waits_for_nothing(lengths):
    tokens, positions, batch = 200, VisualPositions(), len(lengths)
    positions.announce(0, tokens, torch.arange(tokens) < torch.tensor(lengths)[:, None])
    kv = LayerKV(FitOptions(rank=16), positions, 0)
    kv.append(*torch.randn(2, batch, 2, tokens, 64))
    Coordinator(positions).observe(kv, torch.randn(batch, 4, tokens, 64), None)
    for _ in range(30):  # text outgrows its room meanwhile
        found: Counter[str] = Counter()
        positions.complete(kv.length + 1, batch)
        with Watch(found), Reads(found):
            kv.append(*torch.randn(2, batch, 2, 1, 64))
            views = kv.views(None)
        assert not found
    assert [view.max_length for view in views] == [max(lengths), 30 + tokens - min(lengths)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_not_waited_for_and_tells_later_what_was_not_finite():
    positions, device, tokens = VisualPositions(), "cuda", 400
    positions.announce(0, tokens, torch.arange(tokens)[None] < 300)
    states = [torch.randn(1, 2, tokens, 64, device=device, dtype=torch.bfloat16) for _ in range(3)]
    layers = [LayerKV(FitOptions(rank=16), positions, index) for index in range(3)]
    for index, kv in enumerate(layers):
        kv.append(states[0], states[1])
        if index == 1:  # the first did what the layers share, and loaded what torch loads late
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            Coordinator(positions).observe(kv, states[2], None)
        finally:
            if index == 1:
                torch.cuda.set_sync_debug_mode("default")
    spoilt = LayerKV(FitOptions(rank=16), positions, 3)
    spoilt.append(states[0].index_fill(2, torch.tensor([7], device=device), torch.nan), states[1])
    Coordinator(positions).observe(spoilt, states[2], None)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="visual Keys of layer 3 hold NaN"):
        spoilt.append(states[0][:, :, :1], states[1][:, :, :1])
