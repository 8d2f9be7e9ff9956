"""The compiled steps of a seal on CPUs against float64 and against torch's, also for narrower processors."""

import platform

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotatek_cache.core import basis, compiled, fitting, quantization
from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.quantization import CodeLayout
from rotatek_kernels import cpu_library, seal_cpu

pytestmark = pytest.mark.skipif(cpu_library.find_compiler() is None, reason="needs a C++ compiler, on Linux")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EIGHTS = st.integers(1, 17).map(lambda n: 8 * n)


@pytest.fixture
def torch_only(monkeypatch):
    """Let torch do the work."""
    return lambda: monkeypatch.setattr(compiled, "_steps", lambda: None)


def draw(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    """States with a spectrum of three decades in power, rotated, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    width = shape[-1]
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    spread = torch.randn(*shape, generator=generator) * torch.logspace(0, -1.5, width)
    return (spread @ rotation + torch.randn(width, generator=generator)).to(dtype)


def exact_moments(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    states = states.double()
    mean = states.mean(-2)
    centred = states - mean[..., None, :]
    return mean, centred.mT @ centred


def check_steps() -> None:
    """All steps on a few shapes, within what float32 allows."""
    for shape in [(2, 300, 128), (3, 2, 77, 80), (1, 5, 33), (2, 1, 64), (1, 700, 256)]:
        for dtype in DTYPES:
            states = draw(*shape, dtype=dtype)
            mean, scatter = seal_cpu.moments(states)
            exact_mean, exact = exact_moments(states)
            torch.testing.assert_close(mean.double(), exact_mean, rtol=2e-6, atol=2e-6)
            assert (scatter - exact).abs().max() <= 2e-6 * exact.diagonal(dim1=-2, dim2=-1).amax() + 1e-9
            assert torch.equal(scatter, scatter.mT)
            encoder = torch.randn(*shape[:-2], shape[-1], 24, generator=torch.Generator().manual_seed(1))
            found = seal_cpu.encode(states, encoder, mean)
            expected = (states.double() - mean.double()[..., None, :]) @ encoder.double()
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    for width, rank in [(64, 8), (80, 20), (128, 32), (128, 128), (33, 33), (256, 64)]:
        scatter = exact_moments(draw(3, 400, width))[1].float()
        found = seal_cpu.directions(scatter, rank, 5).double()
        assert (found.mT @ found - torch.eye(rank)).abs().max() < 5e-6
        # Five rounds in float64: those of torch.
        wide = fitting.principal_directions(scatter.double(), rank)
        kept, expected = (
            (columns.mT @ scatter.double() @ columns).diagonal(dim1=-2, dim2=-1).sum(-1) for columns in (found, wide)
        )
        torch.testing.assert_close(kept, expected, rtol=1e-4, atol=0)
    for blocks in [((4, 32),), ((8, 8), (4, 24), (2, 8)), ((2, 40),)]:
        layout, rows = CodeLayout(blocks), draw(3, 90, sum(own for _, own in blocks))
        codes, low, step = quantization.quantise(rows, layout)
        packed = torch.empty(3, 90, layout.token_bytes, dtype=torch.uint8)
        found = seal_cpu.codes(rows, layout.blocks, quantization.CLIP_GRID, packed)
        assert torch.equal(found[0], low) and torch.equal(found[1], step) and torch.equal(packed, layout.pack(codes))


def test_steps_are_those_of_torch():
    check_steps()


@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64-v2"])
def test_processors_with_shorter_vectors_do_the_same(processor, monkeypatch):
    if platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs an x86-64 processor with AVX2")
    flags = tuple(flag.replace("=native", f"={processor}") for flag in cpu_library.FLAGS)
    library = cpu_library.opened(cpu_library.build(cpu_library.find_compiler(), flags))
    monkeypatch.setattr(cpu_library, "load", lambda: library)
    check_steps()


@settings(deadline=None)
@given(
    tokens=st.integers(1, 200),
    width=st.integers(1, 140),
    rank=st.integers(1, 140),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_any_shape(tokens, width, rank, threads, seed):
    """Also ranks above what the tokens span: orthonormal directions that keep all there is."""
    rank = min(rank, width)
    states = draw(2, tokens, width, seed=seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mean, scatter = seal_cpu.moments(states)
        found = seal_cpu.directions(scatter, rank, 5)
        encoded = seal_cpu.encode(states, found, mean)
    finally:
        torch.set_num_threads(before)
    exact = exact_moments(states)[1]
    assert (scatter - exact).abs().max() <= 1e-5 * exact.abs().max() + 1e-7
    assert (found.double().mT @ found.double() - torch.eye(rank)).abs().max() < 1e-5
    if rank == width:
        torch.testing.assert_close(encoded @ found.mT + mean[:, None], states, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(bits=st.sampled_from([8, 4, 2]), channels=EIGHTS, tokens=st.integers(1, 1200), seed=st.integers(0, 99))
def test_codes_are_torchs(bits, channels, tokens, seed):
    layout, rows = CodeLayout(((bits, channels),)), draw(2, tokens, channels, seed=seed)
    rows[:, :, 0] = 3.25  # a constant channel
    codes, low, step = quantization.quantise(rows, layout)
    packed = torch.full((2, tokens, layout.token_bytes), 0xAB, dtype=torch.uint8)
    found = seal_cpu.codes(rows, layout.blocks, quantization.CLIP_GRID, packed)
    # Where two clip ranges lose alike, sums in another order may choose the other one.
    same = (found[0] == low) & (found[1] == step)
    assert same.float().mean() > 0.9
    assert torch.equal(
        layout.unpack(packed)[same[:, None].expand(-1, tokens, -1)], codes[same[:, None].expand(-1, tokens, -1)]
    )

    def lost(codes: torch.Tensor, low: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return (codes * step.double()[:, None] + low.double()[:, None] - rows.double()).square().sum(1)

    assert (lost(layout.unpack(packed), *found) <= lost(codes, low, step) * (1 + 1e-4) + 1e-9).all()


@settings(deadline=None)
@given(bits=st.sampled_from([8, 4, 2]), channels=EIGHTS, tokens=st.integers(1, 200), seed=st.integers(0, 99))
def test_codes_of_given_ranges_are_torchs(bits, channels, tokens, seed):
    layout, rows = CodeLayout(((bits, channels),)), draw(2, tokens, channels, seed=seed)
    low, step = rows.amin(1) + 0.1, (rows.amax(1) - rows.amin(1)) / 2**bits * 0.8
    step[:, 1] = 0
    packed = torch.full((2, tokens, layout.token_bytes), 0xAB, dtype=torch.uint8)
    seal_cpu.codes_within(rows, low, step, layout.blocks, packed)
    assert torch.equal(packed, layout.pack(quantization.encode_codes(rows, low, step, layout)))
    assert torch.equal(packed, quantization.pack_coefficients(rows, low, step, layout))


def test_states_are_read_where_they_lie():
    whole = draw(2, 3, 90, 64)  # [B, H, P, D]
    for states in (whole[1, :, 20:70], whole.transpose(0, 1)[:, :, 5:6], whole.mT, whole[:, :, ::3, 8:40]):
        mean, scatter = seal_cpu.moments(states)
        other = seal_cpu.moments(states.contiguous())
        assert torch.equal(mean, other[0]) and torch.equal(scatter, other[1])
        encoder = torch.randn(*states.shape[:-2], states.shape[-1], 8)
        assert torch.equal(seal_cpu.encode(states, encoder, mean), seal_cpu.encode(states.contiguous(), encoder, mean))


def test_what_has_no_finite_moments_shows_on_the_diagonal():
    for spoilt in (torch.nan, torch.inf, -torch.inf):
        states = draw(2, 50, 16)
        states[1, 7, 3] = spoilt
        diagonal = seal_cpu.moments(states)[1].diagonal(dim1=-2, dim2=-1)
        assert diagonal[0].isfinite().all() and not diagonal[1, 3].isfinite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_library_takes_the_compiled_steps_and_gives_what_torch_does(dtype, torch_only):
    states = draw(2, 2, 400, 64, dtype=dtype)

    def seal() -> tuple[torch.Tensor, ...]:
        mean, scatter = fitting.key_moments(states)
        found = fitting.orthogonal_basis(mean, fitting.ridged(scatter), 16, "subspace", dtype)
        rows = found.encode(states)
        packed = quantization.quantise_packed(
            [rows[:, 0].contiguous(), rows[:, 1].contiguous()], CodeLayout(((8, 16),))
        )
        return mean, scatter, found.reconstruct(rows), packed[0], *packed[1:]

    assert compiled.steps_for(states) is seal_cpu
    ours = seal()
    torch_only()
    assert compiled.steps_for(states) is None
    theirs = seal()
    half = dtype != torch.float32
    for one, other, tolerance in zip(
        ours[:3], theirs[:3], (1e-5, 2e-3 if half else 1e-5, 2e-2 if half else 1e-4), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
    assert ours[3].shape == theirs[3].shape and ours[3].dtype == theirs[3].dtype


def test_what_torch_has_to_do_is_left_to_it():
    assert compiled.steps_for(torch.ones(2, 2, dtype=torch.float64)) is None
    with torch.enable_grad():
        assert compiled.steps_for(torch.ones(2, 2, requires_grad=True)) is None
    assert compiled.steps_for(torch.ones(2, 2, device="meta")) is None
    assert compiled.steps_for(torch.ones(0, 2)) is None
    shared = KeyBasis(torch.eye(4)[None, None], torch.eye(4)[None, None], torch.zeros(1, 1, 4), fitted_rank=4)
    assert torch.equal(basis.KeyBasis.encode(shared, torch.ones(2, 3, 5, 4)), torch.ones(2, 3, 5, 4))


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(TypeError, match=r"states must be float32, bfloat16 or float16 on the CPU, got torch.float64"):
        seal_cpu.moments(torch.ones(2, 3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"at least one number, got \[2, 0, 4\]"):
        seal_cpu.moments(torch.ones(2, 0, 4))
    with pytest.raises(ValueError, match=r"encoder must be \[2, 4, 'r'\] and offset \[2, 4\].*got \[1, 4, 3\]"):
        seal_cpu.encode(torch.ones(2, 3, 4), torch.ones(1, 4, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"rank in \[1, D\], got \[3, 3\] and 4"):
        seal_cpu.directions(torch.eye(3), 4, 5)
    with pytest.raises(TypeError, match="matrix must be float32 on the CPU"):
        seal_cpu.directions(torch.eye(3, dtype=torch.float64), 2, 5)
    rows = torch.ones(2, 5, 8)
    with pytest.raises(ValueError, match="channels of blocks"):
        seal_cpu.codes(rows, ((4, 16),), (1.0,), torch.empty(2, 5, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"packed must be uint8 \[2, 5, 4\]"):
        seal_cpu.codes(rows, ((4, 8),), (1.0,), torch.empty(2, 5, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"low and step must be \[2, 8\], got \[8\] and \[2, 8\]"):
        seal_cpu.codes_within(rows, rows[0, 0], rows[:, 0], ((4, 8),), torch.empty(2, 5, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at most 8"):
        seal_cpu.codes(rows, ((4, 8),), (1.0,) * 9, torch.empty(2, 5, 4, dtype=torch.uint8))
