"""Models that mix linear attention, whose state transformers' own cache layers keep, with full attention."""

import copy

import pytest
import torch
import ways
from hosts import Host
from tiny_parts import visual_positions
from transformers.cache_utils import LinearAttentionLayer

from rotatek_cache import RotateKCache
from rotatek_cache.hf.cache import RotateKLayer

HYBRID = pytest.mark.parametrize("host", ["qwen3_5", "minicpmv4_6"], indirect=True)


def _bytes(layer: LinearAttentionLayer) -> int:
    states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return sum(state.untyped_storage().nbytes() for state in states)


@HYBRID
def test_full_attention_is_compressed_and_the_rest_is_stock(host: Host):
    cache = RotateKCache(sparsity=0.75)
    ways.generate(host.attached, ways.padded(host.tiny), cache)
    assert [type(layer) for layer in cache.layers] == [LinearAttentionLayer, RotateKLayer, RotateKLayer]
    assert all(layer.kv.segments for layer in cache.layers[1:])
    first, second, _ = cache.report().layers
    assert (first.kind, first.tokens, first.stored_bytes) == ("LinearAttentionLayer", 0, _bytes(cache.layers[0]))
    assert second.stored_bytes < second.dense_bytes
    assert cache.nbytes() >= first.stored_bytes + second.stored_bytes


@HYBRID
def test_rows_are_repeated_and_selected(host: Host):
    """DynamicCache cannot: its linear layers have no such method. Here they do what a batch of such rows gives."""
    tiny = host.tiny
    one = tiny.inputs(tiny.prompt(1))
    cache = RotateKCache.for_study(rank=32, always_compress=True)
    host.attached(**one, past_key_values=cache)
    single = copy.deepcopy(cache)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([2, 0]))
    tokens = torch.tensor([[20], [31]])
    got = host.attached(input_ids=tokens, past_key_values=cache).logits
    for row in range(2):
        alone = host.attached(input_ids=tokens[row : row + 1], past_key_values=copy.deepcopy(single)).logits
        torch.testing.assert_close(got[row], alone[0], atol=5e-5, rtol=1e-5)
    cache.batch_select_indices(torch.tensor([False, True]))
    assert cache.batch_size == cache.layers[0].recurrent_states[0].shape[0] == 1


@HYBRID
def test_a_crop_is_refused_before_anything_changes(host: Host):
    cache = RotateKCache(sparsity=0.5)
    inputs = ways.one(host.tiny)
    host.attached(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match=r"linear attention in layers \[0\].*copy.deepcopy"):
        cache.crop(-2)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    cache.reset()
    expected = host.attached(**inputs, past_key_values=RotateKCache(sparsity=0.5)).logits
    torch.testing.assert_close(host.attached(**inputs, past_key_values=cache).logits, expected)


@HYBRID
def test_tokens_cannot_be_left_out_before_the_language_model(host: Host):
    with pytest.raises(ValueError, match=r"layers \[0\] of this model take every token into a state.*VLCache"):
        ways.generate(host.attached, ways.one(host.tiny), RotateKCache(sparsity=0.5, tokens="divprune:0.5"))
    assert ways.generate(host.attached, ways.one(host.tiny), RotateKCache(sparsity=0.5, tokens="vl_cache:0.5"))


@HYBRID
def test_without_attach_the_config_has_to_be_known(host: Host):
    model = copy.deepcopy(host.plain)
    model.set_attn_implementation({"text_config": "rotatek"})
    inputs = ways.one(host.tiny)
    with pytest.raises(RuntimeError, match=r"layer 0 .* state of linear attention.*config=model.config"):
        model(**inputs, past_key_values=RotateKCache(sparsity=0.5, visual_mask=visual_positions(inputs["input_ids"])))
