"""Integer codes: packing, allocation, quantisation, and attention over coded segments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotatek_cache.attention import attend
from rotatek_cache.basis import FitOptions, KeyBasis
from rotatek_cache.coding import CodeLayout, allocate_bits, quantise
from rotatek_cache.layer import LayerKV
from rotatek_cache.ledger import VisualLedger

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
    assert packed.shape[-1] == layout.row_bytes and packed.dtype == torch.uint8
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
    assert allocate_bits(variance, 8 * 8) == [8] * 8 + [0] * 16
    assert allocate_bits(variance, 8 * 12) == [8] * 8 + [4] * 8 + [0] * 8
    assert allocate_bits(variance, 0) == [0] * 24
    assert allocate_bits(variance, 10**6) == [8] * 24


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), budget=st.integers(0, 64 * 8))
def test_allocation_falls_and_keeps_to_the_budget(seed, budget):
    variance = torch.rand(64, generator=torch.Generator().manual_seed(seed)).pow(4).sort(descending=True).values
    bits = allocate_bits(variance, budget)
    assert sum(bits) <= budget and bits == sorted(bits, reverse=True)
    assert all(len(set(bits[i : i + 8])) == 1 for i in range(0, 64, 8))


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
    ledger = VisualLedger()
    ledger.announce(0, tokens, torch.stack([torch.arange(tokens) < count for count in counts]))
    kv = LayerKV(options, ledger, 0)
    kv.append(keys, values)
    queries = torch.randn(2, 8, tokens, 64, generator=generator).to(dtype)
    kv.observe(queries, None)
    assert len(kv.segments) == 1
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
    ],
    ids=str,
)
@pytest.mark.parametrize("counts", [(200, 150), (180, 180)], ids=["ragged", "even"])
def test_attention_over_codes_equals_attention_over_what_they_decode_to(options, counts):
    kv, query = filled(FitOptions(**options), counts)
    out, lse = attend(query, kv.views(None), 0.2)
    segment = kv.segments[0]
    for row, count in enumerate(counts):
        start = int(segment.starts[row])
        stored = {}
        for name, part in (("keys", segment.keys), ("values", segment.values)):
            numbers = part.data[:, start : start + count]
            numbers = numbers if part.code is None else part.code.unpack(numbers).float()
            basis = part.basis if part.basis is not None else KeyBasis()
            if not basis.is_identity:
                rebuilt = numbers @ basis.B[:, row].mT
                numbers = rebuilt if basis.delta is None else rebuilt + basis.delta[:, row, None]
            stored[name] = numbers
        text_keys, text_values = (t[row] for t in kv.text.logical())
        own = max(counts) + 6 - count
        keys = torch.cat([stored["keys"], text_keys[:, -own:]], 1)
        values = torch.cat([stored["values"], text_values[:, -own:]], 1)
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
    assert layout.row_bytes <= 64 * 2 / 8 and layout.row_bytes >= 64 * 2 / 8 - 2
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
    ledger = VisualLedger()
    ledger.announce(0, 201, (torch.arange(201) < 200)[None])
    kv = LayerKV(FitOptions(sparsity=0.5, value_bits=4), ledger, 0)
    values = torch.randn(1, 1, 201, 64)
    values[0, 0, 3, 3] = torch.inf
    kv.append(torch.randn(1, 1, 201, 64), values)
    with pytest.raises(ValueError, match="visual Values of layer 0 hold NaN or infinity"):
        kv.observe(torch.randn(1, 1, 201, 64), None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.5, "key_bits": 3}, "key_bits must be None, 8, 4, 2 or 'auto', got 3"),
        ({"rank": 8, "key_bits": "auto"}, "key_bits='auto' needs sparsity"),
        ({"sparsity": 0.5, "value_bits": "auto"}, "value_bits='auto' needs value_sparsity"),
        ({"sparsity": 0.5, "value_sparsity": 1.0}, r"value_sparsity must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_code_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        FitOptions(**options)
