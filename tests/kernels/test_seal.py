"""The kernels of a seal against the codecs in torch: on a GPU where there is one, else in Triton's interpreter."""

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.cuda.is_available()
if not CUDA and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read while triton is imported
triton = pytest.importorskip("triton", reason="Triton is not installed")
if not CUDA:
    import triton.language  # its own helpers tell whether it was imported for the interpreter

# transformers' models import Triton; where their tests were collected first, these run in a process of their own.
TOO_LATE = not CUDA and isinstance(triton.language.sum, triton.runtime.JITFunction)

from rotatek_cache.cache.coordinator import Coordinator  # noqa: E402
from rotatek_cache.cache.layer import LayerKV  # noqa: E402
from rotatek_cache.cache.visual_positions import VisualPositions  # noqa: E402
from rotatek_cache.calibration.moments import Calibration  # noqa: E402
from rotatek_cache.codecs.coefficients import encode_row, store_codes  # noqa: E402
from rotatek_cache.codecs.finite import FiniteCheck  # noqa: E402
from rotatek_cache.codecs.sealing import Sealer  # noqa: E402
from rotatek_cache.core import attention  # noqa: E402
from rotatek_cache.core.attention import UnsupportedError  # noqa: E402
from rotatek_cache.core.basis import KeyBasis, padded_rank  # noqa: E402
from rotatek_cache.core.fitting import (  # noqa: E402
    KeyStatistics,
    key_moments,
    principal_directions,
    query_channel_norm,
    ridged,
    weighted_scatter,
)
from rotatek_cache.core.quantization import CodeLayout, encode_codes  # noqa: E402
from rotatek_cache.core.seal import Fit, Places, SealJob, Shared, seal_states  # noqa: E402
from rotatek_cache.options import FitOptions  # noqa: E402
from rotatek_kernels import seal  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter's tl.dot is wrong on bfloat16.
HALF = torch.bfloat16 if CUDA else torch.float16
ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu] if CUDA else []


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What the kernels are to write holds NaN, or bytes of ones, before they run."""

    def poisoned(shape, dtype, device):
        return torch.full(shape, 255 if dtype == torch.uint8 else torch.nan, dtype=dtype, device=device)

    monkeypatch.setattr(seal, "_empty", poisoned)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(heads: int, tokens: int, width: int, decades: float = 3, seed: int = 0, mean: float = 1.0):
    """Keys ``[H, N, D]`` whose spectrum falls over `decades` in a random basis, around a mean."""
    scale = torch.logspace(0, -decades, width, dtype=torch.float64)
    rotation = torch.linalg.qr(normal(heads, width, width, seed=seed)).Q
    return normal(heads, tokens, width, seed=seed + 1) * scale @ rotation.mT + mean * normal(heads, 1, width, seed=seed)


def fit(keys, rank, code=None, ranges=None, queries=None, valid=None, exponent=1.0):
    """Seal packed Keys; returns what was stored, the encoder and the offset ``[H, R, ...]``."""
    ranges = ((0, keys.shape[1]),) if ranges is None else ranges
    places = Places(ranges)
    channels = padded_rank(rank)
    code = None if code is None else CodeLayout(((code, channels),))
    keys = keys.to(DEVICE)
    queries = None if queries is None else queries.to(DEVICE, keys.dtype)
    job = SealJob("keys", keys[None], channels, Fit(rank, exponent, queries, valid), code)
    assert seal.unsupported_reason([job], places) is None
    launches, (sealed,) = seal.plan([job], places)
    for launch in launches:
        launch.run()
    arguments = launches[0].leading[0][0]
    assert sealed.finite.dtype == torch.bool
    return sealed, arguments.encoder.cpu(), arguments.mean.cpu()


def left_out(scatter, basis):
    """Energy of a scatter ``[..., D, D]`` outside of the columns of an orthonormal basis."""
    inside = (basis * (scatter @ basis)).sum((-2, -1))
    return scatter.diagonal(dim1=-2, dim2=-1).sum(-1) - inside


@pytest.mark.parametrize(
    ("width", "rank", "tokens", "weighted"),
    [
        (64, 8, 300, False),
        (64, 8, 300, True),
        (64, 40, 200, True),
        (80, 24, 300, False),
        (96, 48, 150, True),
        (128, 32, 700, False),
        (128, 128, 140, True),
        (256, 40, 300, False),
    ],
)
def test_the_basis_spans_what_five_rounds_in_float64_span(width, rank, tokens, weighted):
    heads = 2 if width < 128 else 1
    keys = decaying(heads, tokens, width).float()
    queries = normal(1, 3 * heads, 20, width, seed=7).float() if weighted else None
    sealed, encoder, offset = fit(keys, rank, queries=queries)
    mean, scatter = key_moments(keys[:, None].double())
    torch.testing.assert_close(offset.double(), mean, rtol=0, atol=1e-6)
    matrix = ridged(weighted_scatter(scatter, None if queries is None else query_channel_norm(queries.double(), heads)))
    columns = encoder[..., :rank].double()
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(columns.mT @ columns, eye.expand(heads, 1, -1, -1), rtol=0, atol=5e-6)
    assert (encoder[..., rank:] == 0).all()
    ours, iterated, exact = (
        left_out(matrix, basis)
        for basis in (columns, principal_directions(matrix, rank), principal_directions(matrix, rank, "eigh"))
    )
    total = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert (ours <= iterated * (1 + 1e-3) + 1e-6 * total).all()
    assert (ours <= exact * 1.25 + 1e-6 * total).all()  # what five rounds reach
    coefficients = (keys[:, None].double() - mean.float().double()[..., None, :]) @ encoder.double()
    torch.testing.assert_close(sealed.data.cpu().double(), coefficients[:, 0], rtol=0, atol=1e-5)
    assert sealed.decoder.shape == (heads, 1, width, padded_rank(rank)) and sealed.finite.all()


@pytest.mark.parametrize(
    ("width", "tokens", "weighted"), [(16, 5, True), (32, 5, False), (48, 130, True), (64, 90, False)]
)
def test_full_rank_gives_the_keys_back(width, tokens, weighted):
    keys = decaying(2, tokens, width).float()
    queries = normal(1, 2, 3, width, seed=7).float() if weighted else None
    sealed, _, _ = fit(keys, width, queries=queries)
    basis = KeyBasis(B=sealed.decoder.cpu(), delta=sealed.delta.cpu())
    torch.testing.assert_close(basis.reconstruct(sealed.data.cpu()[:, None])[:, 0], keys, rtol=0, atol=2e-5)


@pytest.mark.parametrize("rank", [5, 8, 24])
def test_keys_of_low_rank_are_exact_at_their_rank(rank):
    keys = (normal(1, 200, 5) @ normal(1, 5, 48, seed=1) + normal(1, 1, 48, seed=2)).float()
    sealed, _, _ = fit(keys, rank)
    basis = KeyBasis(B=sealed.decoder.cpu(), delta=sealed.delta.cpu())
    torch.testing.assert_close(basis.reconstruct(sealed.data.cpu()[:, None])[:, 0], keys, rtol=0, atol=2e-4)


@pytest.mark.parametrize("keys", [torch.full((1, 7, 16), 3.0), normal(1, 1, 16).float()], ids=["alike", "one token"])
def test_keys_that_do_not_differ_are_their_mean(keys):
    sealed, _, _ = fit(keys, 8)
    basis = KeyBasis(B=sealed.decoder.cpu(), delta=sealed.delta.cpu())
    torch.testing.assert_close(basis.reconstruct(sealed.data.cpu()[:, None])[:, 0], keys, rtol=1e-6, atol=1e-6)


def test_a_large_mean_costs_half_precision_nothing():
    keys = (decaying(1, 500, 64, decades=1) + 30 * normal(1, 1, 64, seed=5)).to(HALF)
    _, encoder, offset = fit(keys, 16)
    mean, scatter = key_moments(keys[:, None].double())
    assert torch.equal(offset, mean.to(HALF))
    least = left_out(ridged(scatter), principal_directions(ridged(scatter), 16))
    assert (left_out(ridged(scatter), encoder.double()) <= least * 1.02).all()


def test_a_hundred_thousand_tokens(monkeypatch):
    if not CUDA:  # the interpreter's time goes with the number of blocks
        form = seal._form
        monkeypatch.setattr(seal, "_form", lambda job: form(job)._replace(block_n=4096))
    keys = (decaying(1, 100_000, 16, decades=2)).to(HALF)
    sealed, encoder, offset = fit(keys, 8)
    mean, scatter = key_moments(keys[:, None].double())
    torch.testing.assert_close(offset.double(), mean, rtol=2e-3, atol=2e-3)
    least = left_out(ridged(scatter), principal_directions(ridged(scatter), 8))
    assert (left_out(ridged(scatter), encoder.double()) <= least * 1.05).all()
    expected = KeyBasis(encoder, encoder, offset, offset).encode(keys[:, None])[:, 0]
    torch.testing.assert_close(sealed.data.cpu(), expected.to(HALF), rtol=2e-3, atol=1e-3)


def test_the_paper_weighs_channels_by_valid_queries_alone():
    keys, queries = decaying(2, 100, 32).float(), normal(2, 6, 9, 32, seed=3).float()
    valid = torch.arange(9) >= torch.tensor([[4], [0]])
    ranges = ((0, 40), (40, 60))
    spoilt = torch.where(valid[:, None, :, None], queries, 1e4)
    _, encoder, _ = fit(keys, 8, ranges=ranges, queries=spoilt, valid=valid.to(DEVICE))
    weight = query_channel_norm(queries.double(), 2, valid)
    for row, (start, length) in enumerate(ranges):
        _, scatter = key_moments(keys[:, start : start + length].double())
        basis = principal_directions(ridged(weighted_scatter(scatter, weight[:, row])), 8)
        ours = encoder[:, row].double()
        torch.testing.assert_close(ours @ ours.mT, basis @ basis.mT, rtol=0, atol=2e-3)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_weights_have_an_exponent_and_none_are_all_alike(exponent):
    keys, queries = decaying(1, 100, 32).float(), normal(1, 2, 9, 32, seed=3).float()
    _, encoder, _ = fit(keys, 8, queries=queries, exponent=exponent)
    _, nothing, _ = fit(keys, 8, queries=torch.zeros_like(queries), exponent=exponent)
    _, scatter = key_moments(keys.double())
    weight = query_channel_norm(queries.double(), 1)[:, 0] ** exponent
    for basis, weights in ((encoder, weight), (nothing, None)):
        expected = principal_directions(ridged(weighted_scatter(scatter, weights)), 8)
        ours = basis[:, 0].double()
        torch.testing.assert_close(ours @ ours.mT, expected @ expected.mT, rtol=0, atol=2e-3)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_codes_are_those_of_the_codecs(bits, dtype):
    """With the basis that the kernel found, torch stores the same, but for what a sum in another order rounds."""
    keys = decaying(1, 330, 32, decades=2).to(dtype)
    ranges = ((0, 200), (200, 130))
    sealed, encoder, offset = fit(keys, 13, bits, ranges)
    basis = KeyBasis(encoder, encoder, offset, offset, 13)
    layout = CodeLayout(((bits, 16),))
    expected = store_codes([encode_row(keys, basis, row, span, bits) for row, span in enumerate(ranges)], basis, layout)
    assert sealed.data.dtype == torch.uint8 and sealed.data.shape == expected.data.shape
    ours, theirs = (layout.unpack(data).int() for data in (sealed.data.cpu(), expected.data))
    assert (ours - theirs).abs().max() <= 1
    assert (ours != theirs).double().mean() < 5e-4
    for name, found in (("B", sealed.decoder), ("delta", sealed.delta)):
        wanted = getattr(expected.basis, name)
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        torch.testing.assert_close(found.cpu(), wanted, rtol=2e-3 if dtype == HALF else 1e-5, atol=1e-5)


def test_padding_columns_are_stored_as_nothing():
    keys = decaying(1, 40, 16).float()
    sealed, _, _ = fit(keys, 5)
    assert (sealed.data[..., 5:] == 0).all() and (sealed.decoder[..., 5:] == 0).all()
    coded, _, _ = fit(keys, 5, 4)
    assert (coded.decoder[..., 5:] == 0).all()


@pytest.mark.parametrize("blocks", [((8, 16),), ((4, 24),), ((2, 40),), ((8, 8), (4, 16), (2, 16))], ids=str)
def test_codes_in_a_given_basis_are_bit_for_bit_those_of_the_codecs(blocks):
    """Selected channels of whole numbers around zero: all sums are exact."""
    layout = CodeLayout(blocks)
    states = torch.randint(-60, 60, (2, 40, 48), generator=torch.Generator().manual_seed(0)).float()
    states = torch.cat([states, -states], 1)
    chosen = torch.stack([torch.randperm(48)[: layout.channels] for _ in range(2)])
    encoder = torch.zeros(2, 48, layout.channels).scatter_(1, chosen[:, None], 1.0)
    low, step = -50 + torch.rand(2, layout.channels), 0.3 + torch.rand(2, layout.channels)
    shared = Shared(*(tensor.to(DEVICE) for tensor in (encoder, low, step, torch.ones(2, 48))))
    job = SealJob("values", states[None].to(DEVICE), layout.channels, shared, layout)
    (sealed,) = seal.seal_states([job], Places(((0, 80),)))
    expected = layout.pack(encode_codes(states @ encoder, low, step, layout))
    assert torch.equal(sealed.data.cpu(), expected)
    assert sealed.decoder is None and (sealed.delta == 1).all() and sealed.finite.all()


def pending(dtype=torch.float32, batch=2, heads=2, tokens=60, width=32, seed=0):
    """Keys and Values ``[B, H, P, D]`` as a model leaves them: heads beside each other in a token."""
    states = decaying(batch * heads, tokens, width, decades=2, seed=seed)
    return states.view(batch, heads, tokens, width).transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE, dtype)


def ragged_places() -> Places:
    """Row 0 has 41 tokens in two runs, row 1 has 20 behind padding."""
    rows = torch.tensor([0] * 41 + [1] * 20)
    columns = torch.cat([torch.arange(3, 30), torch.arange(40, 54), torch.arange(35, 55)])
    return Places(((0, 41), (41, 20)), rows.to(DEVICE), columns.to(DEVICE))


@pytest.fixture
def basis_file(tmp_path):
    state = Calibration(torch.zeros(4), "llava")
    state.images = 1
    for which, seed in (("key", 10), ("value", 20)):
        state.add(0, which, decaying(2, 200, 32, decades=2, seed=seed).float())
    state.write_basis(tmp_path / "basis.safetensors")
    return str(tmp_path / "basis.safetensors")


OPTIONS = {
    "keys": {"rank": 8},
    "tempered": {"rank": 12, "basis": "tempered"},
    "both": {"rank": 8, "basis": "pca", "value_sparsity": 0.5},
    "coded": {"sparsity": 0.5, "key_bits": 4, "value_sparsity": 0.75, "value_bits": 8},
    "coded values": {"rank": 8, "value_sparsity": 0.5, "value_bits": 2},
    "calibrated": {"rank": 8, "value_sparsity": 0.5, "basis": "file"},
    "calibrated codes": {"sparsity": 0.5, "key_bits": 4, "value_sparsity": 0.5, "value_bits": 2, "basis": "file"},
    "calibrated auto": {
        "sparsity": 0.8,
        "key_bits": "auto",
        "value_sparsity": 0.8,
        "value_bits": "auto",
        "basis": "file",
    },
}
# Triton launches of a layer's seal.
LAUNCHES = {
    "keys": 3,
    "tempered": 3,
    "both": 3,
    "coded": 5,
    "coded values": 5,
    "calibrated": 2,
    "calibrated codes": 2,
    "calibrated auto": 2,
}


def options_of(name, basis_file) -> FitOptions:
    options = OPTIONS[name]
    return FitOptions(**options | ({"basis": basis_file} if options.get("basis") == "file" else {}))


def read(stored, row, length, start) -> torch.Tensor:
    """States of one row as attention reads them, ``[H, S, D]``."""
    tokens = stored.data[:, start : start + length].cpu()
    numbers = (tokens if stored.code is None else stored.code.unpack(tokens)).float()
    if stored.basis is None:
        return numbers
    basis = stored.basis.select(lambda tensor: tensor[:, row : row + 1].cpu().float())
    return basis.reconstruct(numbers[:, None])[:, 0]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_layer_stores_what_torch_stores(name, basis_file):
    options, places = options_of(name, basis_file), ragged_places()
    heads = 1 if name in ("tempered", "both", "coded", "coded values") else 2  # a program of the solver each
    # Values may be of another width.
    keys, values = pending(heads=heads), pending(heads=heads, seed=50, width=48 if name == "both" else 32)
    queries = normal(2, 2 * heads, 6, 32, seed=9).float().to(DEVICE)
    valid = (torch.arange(6) >= torch.tensor([[0], [3]])).to(DEVICE)
    ours = Sealer(options, 0).store(keys, values, places, queries, valid, impl="triton")
    theirs = Sealer(options, 0).store(keys, values, places, queries, valid, impl="torch")
    for states, one, other in zip((keys, values), ours, theirs, strict=True):
        assert one.code == other.code
        assert one.data.dtype == other.data.dtype and one.data.shape == other.data.shape
        assert (one.basis is None) == (other.basis is None)
        if one.basis is None:
            assert torch.equal(one.data, other.data)
            continue
        for field in dataclasses.fields(KeyBasis):
            mine, its = getattr(one.basis, field.name), getattr(other.basis, field.name)
            if isinstance(its, torch.Tensor):
                assert (mine.dtype, mine.shape) == (its.dtype, its.shape), field.name
            else:
                assert mine == its, field.name
        assert (one.basis.A is one.basis.B) == (other.basis.A is other.basis.B)
        dense = places.gather(states).cpu()
        for row, (start, length) in enumerate(places.ranges):
            exact = dense[:, start : start + length]
            error, expected = ((read(stored, row, length, start) - exact).norm() for stored in (one, other))
            # Five rounds of the iteration have not converged: rounding moves what is not yet decided.
            assert error <= expected * 1.02 + 1e-5 * exact.norm()
    if options.is_calibrated:
        for one, other in zip(ours, theirs, strict=True):
            assert one.basis.B.data_ptr() == other.basis.B.data_ptr()  # of the model, made once
            torch.testing.assert_close(one.basis.delta, other.basis.delta, rtol=0, atol=1e-6)


class Operators(TorchDispatchMode):
    """Counts operators that run something on a device."""

    FREE = ("empty", "view", "expand", "slice", "select", "transpose", "unsqueeze", "alias", "detach", "as_strided")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(word in func.__name__ for word in self.FREE):
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIONS)
def test_launches_of_a_seal(name, basis_file, monkeypatch):
    monkeypatch.setattr(FiniteCheck, "passed", lambda check: False)  # a GPU answers later
    monkeypatch.setattr(seal, "_empty", lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device))
    options, places = options_of(name, basis_file), ragged_places()
    keys, values, queries = pending(), pending(seed=50), normal(2, 4, 6, 32, seed=9).float().to(DEVICE)
    launched = []
    monkeypatch.setattr(seal.Launch, "run", lambda launch: launched.append(launch.kernel))
    Sealer(options, 0).store(keys, values, places, queries, impl="triton")  # makes what layers share
    launched.clear()
    sealer = Sealer(options, 0)
    with Operators() as operators:
        sealer.store(keys, values, places, queries, impl="triton")
    assert len(launched) == LAUNCHES[name] <= 10
    dense_values = options.value_sparsity is None
    assert operators.found == ({"index.Tensor": 1} if dense_values else {})


@pytest.mark.parametrize("name", ["keys", "coded", "calibrated codes"])
def test_a_batch_with_padding_seals_through_the_kernel(name, basis_file, monkeypatch):
    options = dataclasses.replace(options_of(name, basis_file), always_compress=True)
    heads = 1 if name == "coded" else 2
    lengths, tokens = torch.tensor([[20], [33]]), 60
    layers = []
    for kernel in ("triton", None):
        monkeypatch.setattr(attention, "_kernel_for", lambda device, kernel=kernel: kernel)
        positions = VisualPositions()
        columns = torch.arange(tokens)
        positions.announce(0, tokens, (columns >= 20) & (columns < 20 + lengths))
        kv = LayerKV(options, positions, 0)
        kv.append(pending(heads=heads), pending(heads=heads, seed=50))
        query = normal(2, 2 * heads, tokens, 32, seed=9).float().to(DEVICE)
        mask = torch.ones(2, 1, tokens, tokens, dtype=torch.bool).tril()
        mask[0, :, :, :7] = False
        Coordinator(positions).observe(kv, query, mask.to(DEVICE))
        layers.append(kv)
    for ours, theirs in zip(layers[0].segments, layers[1].segments, strict=True):
        assert sum(tensor.nbytes for tensor in ours.tensors()) == sum(tensor.nbytes for tensor in theirs.tensors())
        for one, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            for row, length in enumerate(lengths[:, 0].tolist()):
                start = int(ours.starts[row])
                difference = read(one, row, length, start) - read(other, row, length, start)
                assert difference.norm() <= 0.02 * read(other, row, length, start).norm()


@pytest.mark.parametrize(
    ("name", "state", "what", "value"),
    [
        ("both", 0, "Keys", torch.nan),
        ("both", 1, "Values", torch.inf),
        ("calibrated codes", 0, "Keys", torch.inf),
        ("calibrated codes", 1, "Values", torch.nan),
    ],
)
def test_what_is_not_finite_is_reported(name, state, what, value, basis_file):
    sealer, states = Sealer(options_of(name, basis_file), 0), [pending(), pending(seed=50)]
    states[state][1, 1, 40, 3] = value
    with pytest.raises(ValueError, match=f"visual {what} of layer 0 hold NaN or infinity"):  # noqa: PT012
        sealer.store(*states, ragged_places(), impl="triton")
        torch.accelerator.synchronize()
        sealer.check()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rank": 8, "basis": "oblique"}, "a basis of Oblique is fitted by torch"),
        ({"rank": 8, "basis": "pca_uncentred"}, "a basis of UncentredPCA"),
        ({"rank": 8, "basis": "think"}, "a basis of ThinK"),
        ({"rank": 8, "basis": "spark"}, "SparKCodec is stored by torch"),
        ({"rank": 8, "solver": "eigh"}, "solver='eigh' runs in torch"),
        ({"energy": 0.9}, "shape of storage follows from the states"),
        ({"sparsity": 0.5, "key_bits": "auto"}, "shape of storage follows"),
        ({"rank": 8, "key_bits": "fp8"}, "float8"),
        ({"rank": 8, "basis_bits": 8}, "bases of 8 bits"),
        ({"sparsity": 0.0, "basis": "none", "key_bits": 4}, "ChannelCodes is stored"),
    ],
    ids=str,
)
def test_what_no_kernel_stores_has_a_reason_and_goes_to_torch(options, reason, monkeypatch):
    keys, values, places = pending(), pending(seed=50), ragged_places()
    sealer = Sealer(FitOptions(**options), 0)
    with pytest.raises(UnsupportedError, match=reason):
        sealer.store(keys, values, places, impl="triton")
    monkeypatch.setattr(attention, "_kernel_for", lambda device: "triton")
    stored = sealer.store(keys, values, places)
    expected = Sealer(FitOptions(**options), 0).store(keys, values, places, impl="torch")
    for one, other in zip(stored, expected, strict=True):
        assert torch.equal(one.data, other.data)


JOB = SealJob("keys", torch.zeros(2, 2, 60, 32), 8, Fit(8))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"states": torch.zeros(2, 2, 60, 32).double()},
            "keys must be float16, bfloat16 or float32, got torch.float64",
        ),
        ({"states": torch.zeros(2, 2, 60, 512)}, "keys must have at most 256 channels, got 512"),
        ({"states": torch.zeros(2, 2, 32, 60).mT}, "keys must be contiguous in its last dimension"),
        (
            {"states": torch.zeros(2, 2, 60, 256), "channels": 136, "basis": Fit(136)},
            "keys must keep at most 128 coefficients in a fitted basis, got 136",
        ),
        (
            {"channels": 16, "code": CodeLayout(((8, 8), (4, 8)))},
            "keys must have one width of codes in a fitted basis",
        ),
        ({"basis": Shared(torch.zeros(2, 32, 8).half())}, "the encoder must have the dtype of keys"),
        ({"basis": Fit(8, 1.0, torch.zeros(2, 4, 3, 32, device=DEVICE).double())}, "queries must be float16"),
    ],
    ids=str,
)
def test_jobs_that_no_kernel_does_are_named(change, reason):
    fields = {field.name: getattr(JOB, field.name) for field in dataclasses.fields(JOB)} | change
    moved = {"states": fields["states"].to(DEVICE)}
    job = SealJob(**fields | moved)
    with pytest.raises(UnsupportedError, match=reason):
        seal.seal_states([job], ragged_places())
    with pytest.raises(UnsupportedError, match=reason):
        seal_states([job], ragged_places(), "triton")


@pytest.mark.parametrize(
    ("change", "places", "message"),
    [
        ({"states": torch.zeros(2, 60, 32)}, {}, r"keys must be \[B, H, P, D\]"),
        ({"basis": Fit(9)}, {}, "rank of keys must be from 1 to the width 32 and the 8 channels, got 9"),
        (
            {"basis": Fit(8, 1.0, torch.zeros(1, 4, 3, 32))},
            {},
            r"queries of keys must be \[2, a multiple of 2, W, 32\]",
        ),
        (
            {"basis": Fit(8, 1.0, torch.zeros(2, 4, 3, 32, device=DEVICE), torch.ones(2, 4, dtype=torch.bool))},
            {},
            r"valid of keys must be bool \(2, 3\), got torch.bool \(2, 4\)",
        ),
        ({"basis": Shared(torch.zeros(2, 8, 32))}, {}, r"encoder of keys must be \(2, 32, 8\)"),
        ({"basis": Shared(torch.zeros(2, 32, 8), torch.zeros(2, 8))}, {}, "must have low exactly where codes"),
        ({"code": CodeLayout(((4, 16),))}, {}, "keys must have a code of 8 channels"),
        ({}, {"ranges": ((0, 40), (41, 20))}, "places.ranges must follow one another"),
        ({}, {"ranges": ()}, "places.ranges must hold a row"),
        ({}, {"token_rows": None}, "token_rows and token_columns, or neither"),
        ({}, {"token_rows": None, "token_columns": None}, "places without tables need states of one row"),
        ({}, {"token_rows": torch.zeros(61)}, "places.token_rows must be int32 or int64"),
    ],
    ids=str,
)
def test_malformed_arguments_are_named(change, places, message):
    job = dataclasses.replace(JOB, **change)
    ragged = ragged_places()
    tables = {"ranges": ragged.ranges, "token_rows": ragged.token_rows, "token_columns": ragged.token_columns}
    with pytest.raises(ValueError, match=message):
        seal.seal_states([dataclasses.replace(job, states=job.states.to(DEVICE))], Places(**tables | places))


def test_states_that_require_a_gradient_go_to_torch():
    job = dataclasses.replace(JOB, states=torch.zeros(2, 2, 60, 32, device=DEVICE, requires_grad=True))
    with torch.enable_grad(), pytest.raises(UnsupportedError, match="must not require a gradient"):
        seal.seal_states([job], ragged_places())


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="impl must be 'auto', 'torch' or 'triton', got 'cuda'"):
        seal_states([JOB], ragged_places(), "cuda")


def test_splits_and_blocks_change_nothing_but_rounding(monkeypatch):
    keys = decaying(1, 400, 32).float()
    whole, encoder, _ = fit(keys, 8)
    monkeypatch.setattr(seal, "TOKENS_PER_SPLIT", 16)
    split, other, _ = fit(keys, 8)
    torch.testing.assert_close(encoder @ encoder.mT, other @ other.mT, rtol=0, atol=1e-4)
    torch.testing.assert_close(whole.delta, split.delta)


def test_statistics_are_those_of_the_codec():
    """The order of operations of the specification, so that a change there is seen here."""
    keys = decaying(1, 200, 32).float()
    stats = KeyStatistics(*key_moments(keys[:, None]), torch.tensor([200]))
    from rotatek_cache.codecs.registry import BASES

    expected = BASES["pca"].fit(stats, 8, "subspace", torch.float32)
    sealed, encoder, _ = fit(keys, 8, exponent=0.0)
    torch.testing.assert_close(encoder @ encoder.mT, expected.A @ expected.A.mT, rtol=0, atol=1e-4)
    torch.testing.assert_close(sealed.delta.cpu(), expected.delta, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["coded", "calibrated codes"])
def test_a_gpu_is_not_waited_for_and_the_seal_can_be_repeated(name, basis_file, monkeypatch):
    monkeypatch.setattr(seal, "_empty", lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device))
    options, places = options_of(name, basis_file), ragged_places()
    keys, values = pending(torch.bfloat16), pending(torch.bfloat16, seed=50)
    queries = normal(2, 4, 6, 32, seed=9).to(DEVICE, torch.bfloat16)
    expected = Sealer(options, 0).store(keys, values, places, queries, impl="triton")  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = Sealer(options, 0).store(keys, values, places, queries)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.data, other.data)
        assert torch.equal(one.basis.delta, other.basis.delta)


if TOO_LATE:
    for name in [name for name in globals() if name.startswith("test_")]:
        del globals()[name]

    def test_in_a_process_of_its_own():
        arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment["TRITON_INTERPRET"] = "1"
        run = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
