"""The seal of a layer leaves a GPU alone: nothing on its way reads a tensor on the host or copies from it.

On the CPU the same operators run, and are watched for those that would make the host wait for a GPU.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checks import AKVQ
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rotatek_cache.cache import seal_plan
from rotatek_cache.cache.coordinator import Coordinator
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.finite import FiniteCheck
from rotatek_cache.core import compiled, row_layout
from rotatek_cache.core.attention import causal_mask
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


class Device:
    """Tells tensors that a GPU would hold, and all that is made of them, from those of the host; finds their reads."""

    def __init__(self) -> None:
        self.held: dict[int, torch.UntypedStorage] = {}  # kept, so that an address stands for one storage
        self.found: Counter[str] = Counter()

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Let a tensor be on the device."""
        storage = tensor.untyped_storage()
        self.held[storage._cdata] = storage
        return tensor

    def holds(self, tensor: object) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata in self.held

    def watch(self) -> contextlib.ExitStack:
        """Count reads inside."""
        stack = contextlib.ExitStack()
        stack.enter_context(DeviceOperators(self))
        stack.enter_context(DeviceReads(self))
        return stack


class DeviceReads(TorchFunctionMode):
    """Counts reads of a device that are no operators."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, device = getattr(func, "__name__", ""), self.device
        read = name in ("tolist", "numpy", "cpu") and device.holds(args[0])
        made = func(*args, **(kwargs or {}))
        if read:
            device.found[name] += 1
        if read and name == "cpu":
            made = made.clone()
            del device.held[made.untyped_storage()._cdata]
        return made


class DeviceOperators(TorchDispatchMode):
    """Counts operators that wait for a device, and follows what is made of its tensors."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        device, name = self.device, func.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if device.holds(leaf)]
        by_mask = "index" in name and any(getattr(index, "dtype", None) == torch.bool for index in args[1])
        if given and (by_mask or any(word in name for word in WAITS)):
            device.found[name] += 1
        made = func(*args, **(kwargs or {}))
        if given:
            for tensor in tree_leaves(made):
                if isinstance(tensor, torch.Tensor):
                    device.put(tensor)
        return made


@pytest.fixture
def device(monkeypatch) -> Device:
    """A device that tables of the host are sent to, and whose verdicts on finite states are not asked for."""
    found, sent = Device(), row_layout.moved
    for module in (row_layout, seal_plan):
        monkeypatch.setattr(module, "moved", lambda tensors, to: [found.put(one.clone()) for one in sent(tensors, to)])
    monkeypatch.setattr(FiniteCheck, "passed", lambda check: False)
    monkeypatch.setattr(compiled, "_steps", lambda: None)  # compiled code would not be seen
    return found


def prefill(
    lengths: tuple[int, ...],
    put: Callable[[torch.Tensor], torch.Tensor],
    watch: Callable[[], contextlib.AbstractContextManager],
    basis_file: Path | None = None,
    **options,
) -> list[LayerKV]:
    """Seal a prompt with left padding of the shorter rows in all of three layers, the first one included.

    `put` brings tensors to the device, `watch` is entered for each seal.
    """
    tokens, batch = 200, len(lengths)
    columns, length = torch.arange(tokens), torch.tensor(lengths)[:, None]
    begin = length.max() - length
    positions = VisualPositions()
    positions.announce(0, tokens, (columns >= begin + 5) & (columns < begin + 5 + length))
    shown = columns >= begin
    mask = None
    if not bool(shown.all()):
        positions.learn_padding(shown)
        mask = put(causal_mask(tokens, tokens, torch.device("cpu")) & shown[:, None, None])
    if basis_file is not None:
        options["basis"] = str(basis_file)
    layers = [LayerKV(FitOptions(**options), positions, index) for index in range(3)]
    coordinator = Coordinator(positions)
    draw = torch.Generator().manual_seed(0)
    for kv in layers:
        kv.append(*(put(torch.randn(batch, 2, tokens, 64, generator=draw)) for _ in range(2)))
        query = put(torch.randn(batch, 4, tokens, 64, generator=draw))
        with watch():
            coordinator.observe(kv, query, mask)
    assert all(kv.segments for kv in layers)
    return layers


CODED = {"key_bits": 4, "value_sparsity": 0.5, "value_bits": 4}
KINDS = {
    "the default": {"sparsity": 0.75},
    "a rank": {"rank": 16},
    "pca": {"rank": 16, "basis": "pca"},
    "uncentred": {"rank": 16, "basis": "pca_uncentred"},
    "tempered": {"rank": 16, "basis": "tempered"},
    "channels": {"rank": 16, "basis": "think"},
    "unstructured": {"rank": 16, "basis": "spark"},
    "a basis in 8 bits": {"rank": 16, "basis_bits": 8},
    "codes": {"sparsity": 0.75, **CODED},
    "float8": {"sparsity": 0.75, "key_bits": "fp8", "value_bits": "fp8", "value_sparsity": 0.5},
    "Values alone": {"sparsity": 0, "value_sparsity": 0.5},
    "codes without a basis": {"sparsity": 0.0, "basis": "none", "key_bits": 2, "value_bits": 2, "value_basis": "none"},
    "codes under a rotation": AKVQ,
    "as they are": {"sparsity": 0},
}
CALIBRATED = {
    "calibrated": {"sparsity": 0.75},
    "calibrated codes": {"sparsity": 0.75, **CODED},
    "calibrated automatic bits": {"sparsity": 0.75, "key_bits": "auto", "value_sparsity": 0.75, "value_bits": "auto"},
    "calibrated, by heads": {"sparsity": 0.75, "allocation": "heads"},
    "calibrated energy": {"energy": 0.9},
    "calibrated float8": {"sparsity": 0.75, "key_bits": "fp8"},
}


@pytest.mark.parametrize("lengths", [(145, 160), (150, 150), (150,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_of_a_prefill_reads_the_device(device, kind, lengths):
    prefill(lengths, device.put, device.watch, always_compress=True, **KINDS[kind])
    assert not device.found


@pytest.fixture(scope="module")
def basis_file(tmp_path_factory) -> Path:
    """A basis file of random states."""
    state, path = Calibration(torch.zeros(4), "drawn"), tmp_path_factory.mktemp("basis") / "basis.safetensors"
    for layer, which in itertools.product(range(3), ("key", "value")):
        state.add(layer, which, torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(layer)))
    state.images = 1
    state.write_basis(path)
    return path


@pytest.mark.parametrize("lengths", [(145, 160), (150,)], ids=str)
@pytest.mark.parametrize("kind", CALIBRATED)
def test_no_layer_of_a_prefill_with_a_calibrated_basis_reads_the_device(device, basis_file, kind, lengths):
    prefill(lengths, device.put, device.watch, basis_file, always_compress=True, **CALIBRATED[kind])
    assert not device.found


@pytest.mark.parametrize(("lengths", "rows"), [((150,), 1), ((145, 160), 2)], ids=str)
@pytest.mark.parametrize(
    ("options", "read", "times"),
    [
        ({"energy": 0.9}, "_local_scalar_dense.default", 1),
        ({"sparsity": 0.75, "key_bits": "auto"}, "tolist", 1),
        ({"sparsity": 0.75, "key_bits": "auto", "value_sparsity": 0.75, "value_bits": "auto"}, "tolist", 2),
    ],
    ids=str,
)
def test_where_states_set_the_shape_of_storage_that_alone_is_read(device, options, read, times, lengths, rows):
    """Of each row of each layer: to read the spectra of all at once, all of them would have to stay dense."""
    prefill(lengths, device.put, device.watch, always_compress=True, **options)
    assert device.found == {read: 3 * rows * times}


def test_a_mask_that_nothing_was_said_about_is_read_once_a_prompt(device):
    positions, shown = VisualPositions(), torch.arange(200)[None] >= torch.tensor([[0], [9]])
    positions.announce(0, 200, ((torch.arange(200) > 20) & (torch.arange(200) < 180)).expand(2, -1))
    mask = device.put(causal_mask(200, 200, torch.device("cpu")) & shown[:, None, None])
    for index in range(3):
        kv = LayerKV(FitOptions(rank=16), positions, index)
        kv.append(*(device.put(torch.randn(2, 2, 200, 64)) for _ in range(2)))
        with device.watch():
            Coordinator(positions).observe(kv, device.put(torch.randn(2, 4, 200, 64)), mask)
        assert kv.text.alignment.first.tolist() == [0, 9]
    assert device.found == {"cpu": 1}


def test_rows_selected_on_a_device_are_read_when_the_flags_are(device):
    flags = torch.arange(12) < torch.tensor([[3], [5], [7]])
    positions = VisualPositions()
    positions.announce(0, 12, flags)
    with device.watch():
        for step, index in enumerate([torch.tensor([2, 0, 1, 1]), torch.tensor([3, 0])]):
            positions.select_rows(device.put(index))
            positions.complete(13 + step, len(index))
        assert not device.found
        assert torch.equal(positions.flags[0][2], flags[[1, 2]])
    assert device.found == {"cpu": 1}


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


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", [(145, 160), (150,)], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, *CALIBRATED])
def test_no_layer_of_a_prefill_waits_for_a_gpu(kind, lengths, basis_file):
    options = {"always_compress": True, **(KINDS | CALIBRATED)[kind]}
    file = basis_file if kind in CALIBRATED else None

    def put(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cuda", torch.bfloat16 if tensor.is_floating_point() else None)

    prefill(lengths, put, contextlib.nullcontext, file, **options)  # loads what torch loads late
    torch.cuda.synchronize()
    prefill(lengths, put, no_synchronisation, file, **options)
