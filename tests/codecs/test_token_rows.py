"""Rows of tokens: each follows from its own token alone, attention reads what decoding gives; files without text."""

import pytest
import torch
from safetensors import safe_open

from rotatek_cache import FitOptions
from rotatek_cache.calibration.moments import Calibration, TokenMoments
from rotatek_cache.codecs.basis_file import load_basis
from rotatek_cache.codecs.token_rows import TokenRows, token_rows
from rotatek_cache.core.attention import attend, reference_attention
from rotatek_cache.core.quantization import HeadCodes, Numbers
from rotatek_cache.core.segments import SegmentView

HEADS, WIDTH, LAYERS = 2, 32, 2


def drawn(tokens: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Draw states ``[H, N, D]`` of falling variance around a mean of their own, turned by one matrix."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(HEADS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(99))).Q
    spectrum = torch.logspace(0.5, -1, WIDTH)
    return (torch.randn(HEADS, tokens, WIDTH, generator=generator) * spectrum) @ turn.mT + shift


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    state = Calibration(torch.ones(3), "drawn")
    for prompt in range(3):
        for layer in range(LAYERS):
            for which in ("key", "value"):
                seed = 10 * prompt + 2 * layer + (which == "value")
                state.add_tokens(layer, which, "text", drawn(300, seed, 2.0) * (1 + layer))
                state.add_tokens(layer, which, "image", drawn(600, seed + 100, 1.0) * (1 + layer))
        state.texts += 1
    path = tmp_path_factory.mktemp("rows") / "basis.safetensors"
    state.write_basis(path, source="drawn")
    return path


def rows_of(file, kind="key", layer=0, heads=None, **options) -> TokenRows:
    return token_rows(FitOptions(basis=str(file), text="coded", **options), layer, kind, heads)


SETTINGS = [{"bits": 4}, {"bits": 2.28}, {"bits": (8, 2)}, {"bits": 16}, {"bits": 3, "allocation": "heads"}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_row_coded_alone_is_the_row_coded_among_others(file, options, dtype):
    rows = rows_of(file, "value", **options)
    states = drawn(50, 7, 1.5).to(dtype)
    together = rows.encode(states)
    widths, stored = rows.storage(dtype)
    assert together.dtype == stored and together.numel() == 50 * sum(widths)
    pool = torch.zeros_like(together)
    for token in torch.randperm(50).tolist():
        rows.write(pool, torch.tensor([token]), states[:, token : token + 1])
    if isinstance(rows.code, Numbers):  # a product of one row may be summed in another order
        torch.testing.assert_close(pool, together)
    else:
        assert (pool != together).float().mean() < 1e-3


def test_bits_are_what_they_say(file):
    """Bytes of storage, of a row of codes: the whole budget as far as blocks of channels let it be spent."""
    for bits in (8, 4, 3, 2.28):
        widths, dtype = rows_of(file, bits=bits).storage(torch.bfloat16)
        assert dtype == torch.uint8
        assert bits * WIDTH / 8 - 2 < widths[0] <= bits * WIDTH / 8
    one = rows_of(file, "key", bits=(8, 2)), rows_of(file, "value", bits=(8, 2))
    assert [rows.storage(torch.bfloat16)[0][0] for rows in one] == [WIDTH, WIDTH // 4]
    heads = rows_of(file, bits=3, allocation="heads")
    assert isinstance(heads.code, HeadCodes)
    assert rows_of(file, bits=16).storage(torch.bfloat16) == ((WIDTH,) * HEADS, torch.bfloat16)


def test_more_bits_are_nearer_and_whole_coefficients_are_exact(file):
    states = drawn(400, 8, 1.5)
    error = []
    for bits in (2.28, 3, 4, 8, 16):
        rows = rows_of(file, bits=bits)
        read = rows.decode(rows.encode(states), torch.float32)
        error.append(float((read - states).square().sum() / (states - states.mean(1, keepdim=True)).square().sum()))
    assert error == sorted(error, reverse=True)
    assert error[0] < 0.2 and error[2] < 0.02 and error[4] < 1e-10


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("attention", [attend, reference_attention])
def test_attention_over_a_pool_reads_what_decoding_gives(file, options, attention):
    """Two requests scattered over one pool, one basis for both."""
    keys, values = rows_of(file, "key", 1, **options), rows_of(file, "value", 1, **options)
    slots = torch.randperm(64)[: 2 * 20].view(2, 20)
    pools, read = [], []
    for rows, seed in ((keys, 1), (values, 2)):
        states = drawn(40, seed, 2.0) * 2
        empty = rows.encode(torch.zeros(HEADS, 64, WIDTH))
        rows.write(empty, slots.flatten(), states)
        pools.append(empty)
        read.append(rows.decode(rows.encode(states), torch.float32).unflatten(1, (2, 20)).transpose(0, 1))
    lengths = torch.tensor([20, 13], dtype=torch.int32)
    view = SegmentView(
        *pools,
        starts=torch.zeros(2, dtype=torch.int64),
        lengths=lengths,
        max_length=20,
        basis=keys.basis(torch.float32, torch.device("cpu")),
        basis_rows=torch.zeros(2, dtype=torch.int64),
        key_code=keys.view_code,
        value_basis=values.basis(torch.float32, torch.device("cpu")),
        value_code=values.view_code,
        slots=slots.int(),
    )
    query = torch.randn(2, 4, 1, WIDTH, generator=torch.Generator().manual_seed(5))
    out, _ = attention(query, [view], 0.2)
    mask = (torch.arange(20) < lengths[:, None])[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *read, mask, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=2e-5, rtol=1e-4)


def test_codes_that_were_read_and_coded_again_are_the_same(file):
    """A cache that is cropped takes tokens back from their codes, and codes them again later."""
    for bits in (2.28, 4):
        for dtype in (torch.float32, torch.bfloat16):
            rows = rows_of(file, bits=bits)
            codes = rows.encode(drawn(200, 3, 1.5).to(dtype))
            again = rows.encode(rows.decode(codes, dtype))
            assert (codes != again).float().mean() < 0.02


def test_some_heads_are_coded_as_all_are(file):
    states = drawn(30, 4, 1.5)
    for options in SETTINGS:
        whole = rows_of(file, **options)
        full = whole.decode(whole.encode(states), torch.float32)
        for head in range(HEADS):
            part = slice(head, head + 1)
            own = rows_of(file, heads=part, **options)
            torch.testing.assert_close(own.decode(own.encode(states[part]), torch.float32), full[part])


def test_the_basis_is_around_the_mean_of_both_kinds_whatever_their_share():
    text, image = torch.zeros(1, 2, 8), torch.zeros(1, 6, 8)
    text[0, :, 0] = torch.tensor([1.0, 3.0])
    image[0, :, 1] = 4.0
    made = TokenMoments.basis([TokenMoments.of(text, 0), TokenMoments.of(image, 0)])
    assert made["mean"][0, :3].tolist() == [1, 2, 0]
    # Second moments around it, half of each kind: of channel 0 ((0 + 4) / 2 + 1) / 2, of channel 1 4, together -2.
    covariance = torch.tensor([[1.5, -2.0], [-2.0, 4.0]])
    spectrum = torch.linalg.eigvalsh(covariance).flip(0)
    torch.testing.assert_close(made["spectrum"][0, :2], spectrum)
    assert made["spectrum"][0, 2:].abs().max() < 1e-6


def test_moments_of_prompts_add_up():
    states = drawn(60, 1, 3.0)
    parts = TokenMoments.of(states[:, :20], 0) + TokenMoments.of(states[:, 20:], 1)
    whole = TokenMoments.of(states, 0)
    assert parts.tokens == whole.tokens == 60
    torch.testing.assert_close(parts.total, whole.total, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(parts.square, whole.square, rtol=1e-5, atol=1e-4)


def test_a_file_says_what_text_it_was_calibrated_with_and_survives_a_stop(file, tmp_path):
    with safe_open(str(file), framework="pt") as opened:
        assert '"texts": 3, "text_tokens": 900' in opened.metadata()["provenance"]
    state = Calibration(torch.ones(3), "drawn")
    state.add_tokens(0, "key", "text", drawn(30, 1), torch.eye(WIDTH).expand(HEADS, -1, -1))
    state.texts = 1
    state.save(tmp_path / "state")
    again = Calibration.load(tmp_path / "state", torch.ones(3))
    assert again.texts == 1
    first, second = state.token_moments[0, "key", "text"], again.token_moments[0, "key", "text"]
    for name in ("tokens", "total", "square", "sample", "cost"):
        assert torch.equal(torch.as_tensor(getattr(first, name)), torch.as_tensor(getattr(second, name)))


def test_files_without_text_and_without_images_are_refused_by_what_needs_them(file, tmp_path):
    state = Calibration(torch.ones(3), "drawn")
    for which in ("key", "value"):
        state.add(0, which, drawn(40, 1))
        state.add_tokens(0, which, "image", drawn(40, 1))
    state.images = 1
    images = tmp_path / "images.safetensors"
    state.write_basis(images)
    with pytest.raises(ValueError, match=r"was calibrated without text.*`rotatek calibrate --text`"):
        rows_of(images)
    with pytest.raises(ValueError, match=r"was calibrated without images.*or use text='coded'"):
        load_basis(file).state(0, "key")
    with pytest.raises(ValueError, match="has no layer 7"):
        rows_of(file, layer=7)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"bits": 0.25}, ValueError, "leaves 8 bits for a token of head width 32: give at least 0.5"),
        ({"bits": 9}, ValueError, "above 0 and at most 8, or 16"),
        ({"bits": (4, 0)}, ValueError, "above 0 and at most 8, or 16"),
        ({"bits": (4, 4, 4)}, ValueError, "a number or"),
        ({"bits": "4"}, TypeError, "a number or two"),
        ({"sparsity": 0.5}, ValueError, "takes no sparsity"),
        ({"key_bits": 4, "streaming": True}, ValueError, "takes no key_bits or streaming"),
        ({"text": "loud"}, ValueError, "text must be 'dense' or 'coded'"),
    ],
)
def test_bad_options_are_named(file, options, error, words):
    with pytest.raises(error, match=words):
        FitOptions(**{"basis": str(file), "text": "coded", **options}) and rows_of(file, **options)


def test_coded_text_needs_a_file_and_bits_need_coded_text(file):
    with pytest.raises(ValueError, match="needs a basis file"):
        FitOptions(text="coded")
    with pytest.raises(ValueError, match="bits needs text='coded'"):
        FitOptions(sparsity=0.5, basis=str(file), bits=4)
