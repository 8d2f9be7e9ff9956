"""Integer codes: packing, allocation, quantisation, and attention over coded segments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotatek_cache.cache.coordinator import Coordinator
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.codecs.registry import codecs_for
from rotatek_cache.core.attention import attend
from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.quantization import (
    CodeLayout,
    HeadCodes,
    Numbers,
    TokenCode,
    allocate_bits,
    encode_codes,
    join_tokens,
    pack_coefficients,
    quantise,
)
from rotatek_cache.options import Allocation, FitOptions

blocks = st.lists(st.sampled_from([8, 4, 2]), min_size=1, max_size=3, unique=True).flatmap(
    lambda widths: st.tuples(
        *(st.tuples(st.just(w), st.integers(1, 4).map(lambda n: 8 * n)) for w in sorted(widths)[::-1])
    )
)


@settings(max_examples=100, deadline=None)
@given(blocks=blocks, rows=st.lists(st.integers(0, 5), max_size=2), seed=st.integers(0, 99))
def test_packing_round_trips(blocks, rows, seed):
    layout = CodeLayout(blocks)
    generator = torch.Generator().manual_seed(seed)
    levels = layout.levels(torch.device("cpu"))
    codes = (torch.rand(*rows, layout.channels, generator=generator) * (levels + 1)).floor().to(torch.uint8)
    packed = layout.pack(codes)
    assert packed.shape[-1] == layout.token_bytes and packed.dtype == torch.uint8
    assert torch.equal(layout.unpack(packed), codes)


def test_four_bit_channels_lie_in_halves():
    layout = CodeLayout(((4, 8),))
    packed = layout.pack(torch.arange(8, dtype=torch.uint8))
    assert packed.tolist() == [0x40, 0x51, 0x62, 0x73]


@pytest.mark.parametrize("blocks", [(), ((3, 8),), ((4, 8), (8, 8)), ((8, 8), (8, 8)), ((4, 12),), ((2, 0),)])
def test_bad_layouts_are_refused(blocks):
    with pytest.raises(ValueError, match="blocks must have"):
        CodeLayout(blocks)


def test_bits_go_where_the_variance_is():
    variance = torch.tensor([1e4] * 8 + [1.0] * 8 + [1e-4] * 8)
    assert allocate_bits(variance[None], 8 * 8)[0] == [8] * 8 + [0] * 16
    assert allocate_bits(variance[None], 8 * 12)[0] == [8] * 8 + [4] * 8 + [0] * 8
    assert allocate_bits(variance[None], 0)[0] == [0] * 24
    assert allocate_bits(variance[None], 10**6)[0] == [8] * 24


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), budget=st.integers(0, 64 * 8))
def test_allocation_falls_and_keeps_to_the_budget(seed, budget):
    variance = torch.rand(64, generator=torch.Generator().manual_seed(seed)).pow(4).sort(descending=True).values
    (bits,) = allocate_bits(variance[None], budget)
    assert sum(bits) <= budget and bits == sorted(bits, reverse=True)
    assert all(len(set(bits[i : i + 8])) == 1 for i in range(0, 64, 8))


def test_a_shared_budget_goes_to_the_spectrum_that_is_worth_more():
    worth = torch.tensor([[100.0] * 8 + [0.5] * 8, [1.0] * 8 + [0.1] * 8])
    assert allocate_bits(worth, 8 * 4) == [[4] * 8 + [0] * 8, [0] * 16]
    assert allocate_bits(worth, 8 * 6) == [[4] * 8 + [0] * 8, [2] * 8 + [0] * 8]
    # What is given in any case counts, and a block goes on from there.
    start = [[0] * 16, [4] * 8 + [2] * 8]
    assert allocate_bits(worth, 8 * 10, start=start) == [[4] * 8 + [0] * 8, [4] * 8 + [2] * 8]
    assert allocate_bits(worth, 8 * 32, (16,)) == [[16] * 8 + [0] * 8, [16] * 8 + [0] * 8]


def test_bits_follow_the_distortion_that_is_left():
    # Two bits leave half of the first block, four next to nothing; the second block is as is assumed of any.
    distortion = torch.tensor([[16.0, 8.0, 0.0, 0.0], [8.0, 0.5, 1 / 32, 0.0]]).T
    distortion = distortion[None].repeat_interleave(8, -1)
    assert allocate_bits(distortion[:, 0], 8 * 2, distortion=distortion)[0] == [2] * 8 + [0] * 8
    assert allocate_bits(distortion[:, 0], 8 * 4, distortion=distortion)[0] == [4] * 8 + [0] * 8
    assert allocate_bits(distortion[:, 0], 8 * 6, distortion=distortion)[0] == [4] * 8 + [2] * 8


def test_weighted_ranges_spare_the_tokens_that_weigh():
    coefficients = torch.randn(1, 2000, 8, generator=torch.Generator().manual_seed(0)) / 4
    coefficients[0, :20] += 4
    weight = coefficients.square().sum(-1)

    def error(weight):
        codes, low, step = quantise(coefficients, CodeLayout(((4, 8),)), weight=weight)
        return (codes * step[:, None] + low[:, None] - coefficients)[0, :20].square().mean()

    assert error(weight) < 0.5 * error(None)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), budget=st.integers(16 * 8, 3 * 64 * 8))
def test_no_move_of_bits_between_spectra_lowers_the_distortion(seed, budget):
    generator = torch.Generator().manual_seed(seed)
    worth = torch.rand(3, 64, generator=generator, dtype=torch.float64).pow(6).sort(-1, descending=True).values
    bits = allocate_bits(worth, budget)
    assert sum(map(sum, bits)) <= budget and all(row == sorted(row, reverse=True) for row in bits)
    blocks = [(float(worth[n, i : i + 8].sum()), bits[n][i]) for n in range(3) for i in range(0, 64, 8)]
    up, down = {0: 2, 2: 4, 4: 8}, {2: 0, 4: 2, 8: 4}
    gains = [(e * (4.0**-b - 4.0 ** -up[b]) / (up[b] - b), up[b] - b) for e, b in blocks if b in up]
    losses = [(e * (4.0 ** -down[b] - 4.0**-b) / (b - down[b]), b - down[b]) for e, b in blocks if b in down]
    for gain, cost in gains:
        assert all(gain <= loss * (1 + 1e-9) for loss, freed in losses if freed == cost)


@settings(max_examples=50, deadline=None)
@given(layouts=st.lists(blocks, min_size=1, max_size=4), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_each_head_may_have_codes_of_its_own_and_pays_for_no_other(layouts, rows, seed):
    code = HeadCodes(tuple(map(CodeLayout, layouts)))
    generator = torch.Generator().manual_seed(seed)
    coefficients = torch.rand(len(layouts), 6, code.channels, generator=generator)
    low, step = torch.zeros(len(layouts), code.channels), torch.full((len(layouts), code.channels), 1 / 255)
    packed = pack_coefficients(coefficients, low, step, code)
    assert packed.shape == (6 * sum(part.token_bytes for part in code.parts),)
    split = [pack_coefficients(coefficients[:, run], low, step, code) for run in (slice(0, 2), slice(2, 6))]
    assert torch.equal(join_tokens(split, code), packed)
    heads = [head.expand(rows, -1, -1) for head in code.split(packed)]
    codes = code.unpack(heads).unflatten(0, (len(layouts), rows))
    for head, part in enumerate(code.parts):
        own = encode_codes(
            coefficients[head : head + 1, :, : part.channels], low[:1, : part.channels], step[:1, : part.channels], part
        )
        assert torch.equal(codes[head, -1, :, : part.channels], own[0])
        assert not codes[head, :, :, part.channels :].any()


def test_numbers_of_a_width_per_head_are_kept_exactly():
    code = HeadCodes((Numbers(8), Numbers(16)))
    coefficients = torch.randn(2, 3, 16).half()
    packed = pack_coefficients(coefficients, torch.zeros(2, 16), torch.ones(2, 16), code)
    assert packed.shape == (3 * 24,) and packed.dtype == torch.half
    numbers = code.unpack(code.split(packed))
    assert torch.equal(numbers[1], coefficients[1])
    assert torch.equal(numbers[0, :, :8], coefficients[0, :, :8])


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_range_per_token_bounds_the_error_of_each(bits, dtype):
    states = (torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 9)[:, None]).to(
        dtype
    )
    states[0, 0] = 3.0  # a constant token
    code = TokenCode(bits, 16, dtype)
    packed = code.pack(states)
    assert packed.shape == (2, 9, 2 * bits + 2 * dtype.itemsize)
    span = states.float().amax(-1) - states.float().amin(-1)
    rounding = states.float().abs().amax(-1) * 4 * torch.finfo(dtype).eps
    error = (code.unpack(packed) - states.float()).abs().amax(-1)
    assert (error <= span / (2**bits - 1) / 2 * 1.01 + rounding).all()
    assert error[0, 0] == 0


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_error_is_at_most_half_a_step_without_outliers(bits):
    coefficients = torch.rand(2, 200, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 6 - 2
    codes, low, step = quantise(coefficients, CodeLayout(((bits, 8),)))
    error = (codes * step[:, None] + low[:, None] - coefficients).abs()
    full = (coefficients.amax(1) - coefficients.amin(1)) / (2**bits - 1)
    assert (error.amax(1) <= full).all()  # a clipped range may trade its ends for the middle
    assert (error.square().mean(1) <= full**2 / 12 * 1.3).all()


def test_constant_and_zero_channels_are_exact():
    coefficients = torch.zeros(1, 5, 8)
    coefficients[..., 1] = 3.25
    codes, low, step = quantise(coefficients, CodeLayout(((2, 8),)))
    assert torch.equal(codes * step[:, None] + low[:, None], coefficients)


def test_an_outlier_does_not_take_the_resolution_of_the_rest():
    coefficients = torch.randn(1, 2000, 8, generator=torch.Generator().manual_seed(0))
    plain = quantise(coefficients, CodeLayout(((2, 8),)))
    coefficients[0, 0] = 8.0
    guarded = quantise(coefficients, CodeLayout(((2, 8),)))

    def rest(coded):
        codes, low, step = coded
        return (codes * step[:, None] + low[:, None] - coefficients)[:, 1:].square().mean()

    unguarded_step = (coefficients.amax(1) - coefficients.amin(1)) / 3
    assert rest(guarded) < 0.6 * unguarded_step.square().mean() / 12
    assert rest(guarded) < 3 * rest(plain)


def filled(options: FitOptions, counts=(200, 150), text=6, dtype=torch.float32) -> tuple[LayerKV, torch.Tensor]:
    """A sealed layer of two rows whose images differ in length, and queries for it."""
    generator = torch.Generator().manual_seed(0)
    tokens = max(counts) + text
    scale = torch.logspace(0, -2, 64)
    keys = (torch.randn(2, 2, tokens, 64, generator=generator) * scale + 0.5).to(dtype)
    values = (torch.randn(2, 2, tokens, 64, generator=generator) * scale.flip(0) + 0.2).to(dtype)
    positions = VisualPositions()
    positions.announce(0, tokens, torch.stack([torch.arange(tokens) < count for count in counts]))
    kv = LayerKV(options, positions, 0)
    kv.append(keys, values)
    queries = torch.randn(2, 8, tokens, 64, generator=generator).to(dtype)
    Coordinator(positions).observe(kv, queries, None)
    assert len(kv.segments) == 1 or options.follows_content
    return kv, queries[:, :, -1:]


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.0, "key_bits": 8},
        {"sparsity": 0.0, "key_bits": 8, "value_bits": 8},
        {"sparsity": 0.5, "key_bits": 4, "value_sparsity": 0.0, "value_bits": 8},
        {"sparsity": 0.75, "key_bits": "auto", "value_sparsity": 0.75, "value_bits": "auto"},
        {"sparsity": 0.0, "value_sparsity": 0.5},
        {"sparsity": 0.5, "key_bits": 2},
        {"sparsity": 0.0, "basis": "none", "key_bits": 4, "value_basis": "none", "value_bits": 2},
        {"sparsity": 0.5, "key_bits": "fp8", "value_sparsity": 0.5, "value_bits": "fp8"},
        {"sparsity": 0.5, "basis": "spark"},
        {"sparsity": 0.5, "basis": "spark_mean", "value_bits": 8},
        {"sparsity": 0.5, "basis_bits": 8},
        {"rank": 13, "basis": "oblique", "key_bits": 4, "value_sparsity": 0.5, "value_bits": "auto", "basis_bits": 8},
        {"sparsity": 0.5, "key_bits": "fp8", "value_sparsity": 0.5, "value_bits": "fp8", "basis_bits": 8},
        {"sparsity": 0.5, "basis": "spark", "value_sparsity": 0.5, "basis_bits": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("counts", [(200, 150), (180, 180)], ids=["ragged", "even"])
def test_attention_over_codes_equals_attention_over_what_they_decode_to(options, counts):
    kv, query = filled(FitOptions(**options), counts)
    out, lse = attend(query, kv.views(None), 0.2)
    for row, count in enumerate(counts):
        segment = next(segment for segment in kv.segments if segment.lengths[row])
        start, own = int(segment.starts[row]), int(segment.basis_rows[row])
        stored = {}
        for name, part in (("keys", segment.keys), ("values", segment.values)):
            numbers = part.data[:, start : start + count]
            numbers = (numbers if part.code is None else part.code.unpack(numbers)).float()
            basis = part.basis if part.basis is not None else KeyBasis()
            if not basis.is_identity:
                decoder = basis.B[:, own].float()
                if basis.scale is not None:
                    decoder = decoder * basis.scale[:, own, None]
                rebuilt = numbers * decoder[:, None] if basis.is_diagonal else numbers @ decoder.mT
                numbers = rebuilt if basis.delta is None else rebuilt + basis.delta[:, own, None]
            stored[name] = numbers
        text_keys, text_values = (t[row] for t in kv.text.logical())
        text = max(counts) + 6 - count
        keys = torch.cat([stored["keys"], text_keys[:, -text:]], 1)
        values = torch.cat([stored["values"], text_values[:, -text:]], 1)
        scores = query[row] @ keys.repeat_interleave(4, 0).mT * 0.2
        expected = (scores.softmax(-1) @ values.repeat_interleave(4, 0)).transpose(0, 1)
        torch.testing.assert_close(out[row], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[row], scores.logsumexp(-1), rtol=1e-4, atol=1e-5)


def test_eight_bits_of_everything_are_close_to_dense_and_four_times_smaller():
    coded, query = filled(FitOptions(sparsity=0.0, key_bits=8, value_bits=8))
    dense, _ = filled(FitOptions(sparsity=0.0))
    expected, _ = attend(query, dense.views(None), 0.2)
    out, _ = attend(query, coded.views(None), 0.2)
    assert (out - expected).norm() < 0.01 * expected.norm()
    for name in ("keys", "values"):
        assert getattr(coded.segments[0], name).data.nbytes * 4 == getattr(dense.segments[0], name).data.nbytes


def test_automatic_bits_keep_to_the_budget_of_the_sparsity():
    kv, _ = filled(FitOptions(sparsity=0.875, key_bits="auto"))
    layout = kv.segments[0].keys.code
    assert layout.token_bytes <= 64 * 2 / 8 and layout.token_bytes >= 64 * 2 / 8 - 2
    assert len(layout.blocks) > 1


def test_more_bits_and_channels_lower_the_error():
    dense, query = filled(FitOptions(sparsity=0.0))
    expected, _ = attend(query, dense.views(None), 0.2)

    def error(**options) -> float:
        kv, _ = filled(FitOptions(**options))
        return float((attend(query, kv.views(None), 0.2)[0] - expected).norm())

    assert error(sparsity=0.0, key_bits=8) < error(sparsity=0.0, key_bits=4) < error(sparsity=0.0, key_bits=2)
    automatic = [
        error(sparsity=s, key_bits="auto", value_sparsity=s, value_bits="auto") for s in (0.5, 0.75, 0.875, 0.95)
    ]
    assert automatic == sorted(automatic)
    # At equal bytes, codes of many channels beat half-precision numbers of few.
    assert error(sparsity=0.875, key_bits="auto") < error(sparsity=0.875)


def test_codes_need_finite_values():
    positions = VisualPositions()
    positions.announce(0, 201, (torch.arange(201) < 200)[None])
    kv = LayerKV(FitOptions(sparsity=0.5, value_bits=4), positions, 0)
    values = torch.randn(1, 1, 201, 64)
    values[0, 0, 3, 3] = torch.inf
    kv.append(torch.randn(1, 1, 201, 64), values)
    with pytest.raises(ValueError, match="visual Values of layer 0 hold NaN or infinity"):
        Coordinator(positions).observe(kv, torch.randn(1, 1, 201, 64), None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.5, "key_bits": 3}, "key_bits must be None, 8, 4, 2, 'fp8' or 'auto', got 3"),
        ({"rank": 8, "key_bits": "auto"}, "key_bits='auto' needs sparsity"),
        ({"sparsity": 0.5, "value_bits": "auto"}, "value_bits='auto' needs value_sparsity"),
        (
            {"sparsity": 0.5, "basis": "none", "key_bits": 4},
            "basis='none' takes sparsity=0 and key_bits of 8, 4 or 2, got sparsity=0.5",
        ),
        ({"sparsity": 0.5, "basis": "spark", "key_bits": 4}, "basis='spark' takes sparsity or rank and no key_bits"),
        ({"energy": 0.9, "basis": "spark_mean"}, "basis='spark_mean' takes sparsity or rank and no key_bits"),
        ({"sparsity": 0.5, "value_basis": "svd"}, "value_basis must be 'auto', 'none' or 'hadamard', got 'svd'"),
        (
            {"sparsity": 0.5, "value_basis": "none"},
            "value_basis='none' takes no value_sparsity and value_bits of 8, 4 or 2",
        ),
        ({"sparsity": 0.5, "allocation": Allocation("heads")}, "allocation needs a calibrated basis"),
        ({"sparsity": 0.5, "basis": "a.safetensors", "solver": "eigh"}, "a calibrated basis is fitted already"),
        ({"sparsity": 0.5, "basis": "a.safetensors", "query_window": 8}, "got sparsity=0.5, query_window=8"),
        ({"sparsity": 0.5, "basis_bits": 4}, "basis_bits must be None or 8, got 4"),
        ({"sparsity": 0.5, "basis_bits": True}, "basis_bits must be None or 8, got True"),
        ({"sparsity": 0.5, "basis": "spark", "basis_bits": 8}, "basis_bits codes the basis that a request owns"),
        ({"sparsity": 0, "value_basis": "none", "value_bits": 4, "basis_bits": 8}, "here it owns none"),
        ({"sparsity": 0.5, "value_sparsity": 1.0}, r"value_sparsity must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_code_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        codecs_for(FitOptions(**options))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("rows", ValueError, "must be 'uniform', 'layers' or 'heads', got 'rows'"),
        (("heads", "logit"), ValueError, "worth must be 'gain', 'variance' or 'relative', got 'logit'"),
        (("heads", "gain", 2), ValueError, r"floor must be in \[0, 1\], got 2"),
        (3, TypeError, "must be a name or"),
    ],
)
def test_bad_allocations_are_named(given, error, words):
    with pytest.raises(error, match=words):
        Allocation.of(given)


def test_float8_keeps_three_bits_of_each_coefficient():
    coded, query = filled(FitOptions(sparsity=0.0, key_bits="fp8", value_bits="fp8"))
    dense, _ = filled(FitOptions(sparsity=0.0))
    expected, _ = attend(query, dense.views(None), 0.2)
    assert (attend(query, coded.views(None), 0.2)[0] - expected).norm() < 0.04 * expected.norm()
    assert coded.segments[0].keys.data.nbytes * 4 == dense.segments[0].keys.data.nbytes


def test_bytes_of_the_peers_are_those_of_their_tokens():
    kv, _ = filled(FitOptions(sparsity=0.75, basis="spark"), counts=(100, 100), dtype=torch.half)
    # 16 of 64 channels and one recovered magnitude, a bit per channel, a sign for each of the 48 others.
    assert kv.segments[0].keys.data.shape == (2, 200, 17 * 2 + 8 + 6)
    assert [t.shape for t in kv.segments[0].keys.basis.tensors()] == [(2, 2, 64)]
    kv, _ = filled(
        FitOptions(sparsity=0, basis="none", key_bits=2, value_basis="none", value_bits=2), (100, 100), dtype=torch.half
    )
    assert kv.segments[0].keys.data.shape == (2, 200, 16)
    assert kv.segments[0].values.data.shape == (2, 200, 16 + 2 * 2)


def test_rounding_of_the_decoder_shifts_no_mean():
    """Codes of 8 bits lie around 127, so a decoder rounded to bfloat16 would shift all tokens alike."""
    generator = torch.Generator().manual_seed(0)
    decoder = torch.linalg.qr(torch.randn(1, 1, 64, 64, generator=generator)).Q.bfloat16()
    step = torch.rand(1, 1, 64, generator=generator) / 127.5
    low = -127.5 * step
    codes = torch.randint(256, (1, 1, 500, 64), generator=generator)
    exact = (low[:, :, None] + step[:, :, None] * codes) @ decoder.float().mT

    def shift(middle: float) -> torch.Tensor:
        basis = KeyBasis(B=decoder).for_codes(low, step, torch.full((64,), middle))
        return (basis.reconstruct(codes.float()) - exact).mean(2).norm()

    assert shift(127.5) < 0.1 * shift(0.0)


def test_head_widths_that_do_not_pack_are_named():
    positions = VisualPositions()
    positions.announce(0, 201, (torch.arange(201) < 200)[None])
    for options, words in (
        ({"key_bits": 4}, "key_bits=4 needs a head width"),
        ({"value_bits": 2}, "value_bits=2 needs"),
    ):
        kv = LayerKV(FitOptions(sparsity=0.5, **options), positions, 0)
        kv.append(torch.randn(1, 1, 201, 20), torch.randn(1, 1, 201, 20))
        with pytest.raises(ValueError, match=words):
            Coordinator(positions).observe(kv, torch.randn(1, 1, 201, 20), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 16, "basis": "pca"},
        {"rank": 13, "key_bits": 4, "value_sparsity": 0.75, "value_bits": 4},
        {"rank": 16, "basis": "oblique", "key_bits": "fp8"},
    ],
    ids=str,
)
def test_an_int8_basis_takes_a_byte_a_number_and_the_plan_knows(options, dtype):
    options = FitOptions(**options, basis_bits=8)
    kv, _ = filled(options, dtype=dtype)
    segment = kv.segments[0]
    stored = sum(tensor.nbytes for part in (segment.keys, segment.values) for tensor in part.tensors())
    assert stored == 2 * sum(kv.sealer.stored_bytes(count, 64, 64, dtype) for count in (200, 150))
    for basis in (segment.keys.basis, segment.values.basis):
        if basis is not None:
            rank = segment.keys.channels
            assert basis.A is None and basis.B.dtype == torch.int8 and basis.scale.shape == (2, 2, rank)
            assert sum(t.nbytes for t in basis.tensors()) <= 2 * 2 * (64 * rank + 4 * rank + 64 * 4)


@pytest.mark.parametrize("options", [{"rank": 16}, {"rank": 16, "key_bits": 4}, {"rank": 16, "key_bits": 8}], ids=str)
def test_an_int8_basis_costs_next_to_no_accuracy(options):
    dense, query = filled(FitOptions(sparsity=0.0))
    expected, _ = attend(query, dense.views(None), 0.2)

    def error(**more) -> float:
        kv, _ = filled(FitOptions(**options, **more, basis="pca"))
        return float((attend(query, kv.views(None), 0.2)[0] - expected).norm())

    assert error(basis_bits=8) < 1.02 * error()
