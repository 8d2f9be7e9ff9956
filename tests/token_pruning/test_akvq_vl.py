"""AKVQ-VL: which tokens keep more bits, what both kinds take, and that attention reads what was stored."""

import copy

import pytest
import torch
import ways
from checks import AKVQ, make
from hosts import build_host
from tiny_models import FAMILIES
from tiny_parts import visual_positions
from transformers import DynamicCache

from rotatek_cache import AKVQVL, RotateKCache, attend
from rotatek_cache.core.attention import reference_attention
from rotatek_cache.options import FitOptions
from rotatek_cache.token_pruning.interface import Stage

BITS = {2: 4, 8: 1}  # codes of a byte


def held(cache, layer, row):
    """Positions of a row's tokens by the bits that they are stored in."""
    found = {}
    for segment in cache.layers[layer].kv.segments:
        bits = segment.keys.code.blocks[0][0]
        assert segment.values.code.blocks[0][0] == bits
        found[bits] = segment.token_positions()[row, : segment.lengths[row]].tolist()
    return found


def test_by_hand():
    # Three layers, of which the first rests on text. Half of four visual tokens are pivots: the most attended, 1 and 3.
    method = AKVQVL(0.5, text_layers=1)
    assert method.stages((0, 1, 2)) == (Stage((1,), (1,)), Stage((2,), (2,)))
    visual = torch.tensor([[True, True, True, True, False]])
    scores = torch.tensor([[0.1, 0.5, 0.2, 0.3, 9.0]])
    assert method.select({1: (scores,)}, visual, (1,))[1].tolist() == [[False, True, False, True, False]]
    options = FitOptions(sparsity=0, basis="hadamard", key_bits=2, value_basis="hadamard", value_bits=4)
    better = method.options_of_kept(options)
    assert (better.key_bits, better.value_bits, better.basis) == (8, 8, "hadamard")
    assert AKVQVL(0.5, bits=16).options_of_kept(options) is None
    keys_only = AKVQVL(0.5, bits=4).options_of_kept(FitOptions(sparsity=0, key_bits=2))
    assert (keys_only.key_bits, keys_only.value_bits) == (4, None)


def test_pivots_are_what_the_text_attends_to():
    """A batch of two, of which one row is padded on the left."""
    host = build_host("llava")
    inputs = ways.padded(host.tiny)
    visual = visual_positions(inputs["input_ids"])
    eager = copy.deepcopy(host.plain)
    eager.set_attn_implementation({"text_config": "eager"})
    matrices = eager(**inputs, output_attentions=True).attentions
    cache = make(AKVQVL(0.25, text_layers=1), always_compress=True, **AKVQ)()
    host.attached(**inputs, past_key_values=cache)
    for row in range(2):
        tokens = visual[row].nonzero().flatten().tolist()
        assert held(cache, 0, row) == {2: tokens}
        for layer in (1, 2):
            scores = matrices[layer][row, :, tokens[-1] + 1 :].sum((0, 1))
            pivots = sorted(sorted(tokens, key=lambda p, s=scores: -s[p])[: round(0.25 * len(tokens))])
            rest = [token for token in tokens if token not in pivots]
            assert held(cache, layer, row) == {8: pivots, 2: rest}
    heads, width = cache.layers[0].kv.shape[1:3]
    for layer in cache.report().layers:
        assert layer.dropped == 0
        for segment, bits in zip(layer.segments, (8, 2) if layer.index else (2,), strict=True):
            assert segment.key_bits == bits
            assert segment.key_bytes == segment.value_bytes == segment.tokens * heads * width // BITS[bits]
    tokens = int(visual.sum())
    better = sum(round(0.25 * count) for count in visual.sum(1).tolist())
    each = f"{better} at 8, {tokens - better} at 2"
    told = f"visual tokens by the bits of their Keys, by layer: 0: {tokens} at 2; 1: {each}; 2: {each}"
    assert told in str(cache.report())


@pytest.mark.parametrize("bits", [8, 16])
def test_answers_are_those_of_a_dense_cache_of_the_same_states(bits):
    host = build_host("qwen2_5_vl")
    inputs = host.tiny.inputs(host.tiny.prompt(3))
    prompt, dense = inputs["input_ids"].shape[1], DynamicCache()
    host.plain(**inputs, past_key_values=dense)
    cache = make(AKVQVL(0.3, bits=bits, text_layers=1), always_compress=True, **AKVQ)()
    host.attached(**inputs, past_key_values=cache)
    for layer, cached in enumerate(dense.layers):
        for segment in cache.layers[layer].kv.segments:
            at = segment.token_positions()[0]
            for stored, states in ((segment.keys, cached.keys), (segment.values, cached.values)):
                numbers = stored.code.unpack(stored.data).float()[:, None]
                states[0, :, at] = stored.basis.reconstruct(numbers)[:, 0].to(states.dtype)
    shift = int(host.attached.model.rope_deltas.max())
    for place, token in enumerate([20, 31, 42]):
        positions = torch.full((3, 1, 1), prompt + place + shift)
        step = {"input_ids": torch.tensor([[token]]), "position_ids": positions}
        expected = host.plain(**step, past_key_values=dense).logits
        got = host.attached(**step, past_key_values=cache).logits
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_the_kernel_reads_both_kinds():
    host = build_host("llava")
    cache = make(AKVQVL(0.3, text_layers=0), always_compress=True, **AKVQ)()
    host.attached(**ways.padded(host.tiny), past_key_values=cache)
    kv = cache.layers[1].kv
    views = kv.views(None)
    query = torch.randn(2, 4, 1, kv.shape[2], generator=torch.Generator().manual_seed(0))
    expected, expected_lse = reference_attention(query, views, 0.3)
    got, lse = attend(query, views, 0.3, impl="cpp")
    assert len(views) == 3
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    host = build_host(family)
    cache = make(AKVQVL(0.4, text_layers=1), always_compress=True, **AKVQ)()
    assert all(result.isfinite().all() for result in ways.padded_batch(host.tiny, host.attached, lambda: cache))
    layers = [layer for layer in cache.report().layers if layer.kind == "RotateKLayer"]
    tokens = int(visual_positions(ways.padded(host.tiny)["input_ids"]).sum())
    assert all(sum(segment.tokens for segment in layer.segments) == tokens for layer in layers)
    assert {len(layer.segments) for layer in layers if layer.index} == {2}


def test_a_second_turn_and_too_few_pivots():
    """The second turn answers from both kinds; ranges of their own for a single pivot would take more than it does."""
    host = build_host("llava")
    results = ways.second_turn_padded(host.tiny, host.attached, make(AKVQVL(0.3, text_layers=1), **AKVQ))
    assert all(result.isfinite().all() for result in results)
    cache = make(AKVQVL(0.01, text_layers=1), **AKVQ)()
    host.attached(**ways.one(host.tiny), past_key_values=cache)
    assert [len(layer.segments) for layer in cache.report().layers] == [1, 1, 1]
    assert [layer.kept_dense for layer in cache.report().layers] == [[], [(0, 1)], [(0, 1)]]
    text = ways.generate(
        host.attached,
        host.tiny.inputs(host.tiny.prompt(2, images=(), text=12)),
        make(AKVQVL(0.3, text_layers=1), **AKVQ)(),
    )
    assert text.sequences.shape[1] > 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.5}, r"tokens=AKVQVL.* must be numbers below 8 then.*got key_bits=None, value_bits=None"),
        ({"sparsity": 0, "key_bits": 8}, "must be numbers below 8 then"),
        ({"sparsity": 0.5, "key_bits": "auto"}, "must be numbers below 8 then"),
        (AKVQ | {"budget": "0.5x"}, r"budget='0.5x' is divided between dropped tokens and channels.* drop none"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(ValueError, match=words):
        RotateKCache(tokens=AKVQVL(0.1), **options)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="AKVQVL: bits must be one of 16, 8, 4, got 2"):
        AKVQVL(0.1, bits=2)
    with pytest.raises(ValueError, match="AKVQVL: text_layers must be at least 0, got -1"):
        AKVQVL(0.1, text_layers=-1)
    host = build_host("llava")
    with pytest.raises(ValueError, match=r"text_layers must leave one of the layers.*which is 2\), got 3"):
        host.attached(**ways.one(host.tiny), past_key_values=make(AKVQVL(0.1, text_layers=3), **AKVQ)())
