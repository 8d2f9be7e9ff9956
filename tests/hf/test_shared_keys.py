"""Models whose last layers attend to the Keys of an earlier one, and whose full layers are wider than the others."""

import copy

import pytest
import torch
import ways
from hosts import Host
from tiny_models import FAMILIES
from tiny_parts import visual_positions
from transformers import AutoModelForImageTextToText, DynamicCache

from rotatek_cache import RotateKCache, attach
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.hf.cache import RotateKLayer

SHARED = pytest.mark.parametrize("host", ["gemma3n", "gemma4_shared"], indirect=True)


@SHARED
def test_shared_keys_are_stored_once(host: Host):
    cache = RotateKCache(sparsity=0.75)
    ways.generate(host.attached, ways.padded(host.tiny), cache)
    compressed = {index: layer.kv for index, layer in enumerate(cache.layers) if isinstance(layer, RotateKLayer)}
    assert {index: kv.readers for index, kv in compressed.items()} == {1: 1, 2: 2}  # layer 4 reads those of layer 2
    assert all(kv.segments for kv in compressed.values())
    kinds = [layer.kind for layer in cache.report().layers]
    assert kinds[:3] == ["DynamicSlidingWindowLayer", "RotateKLayer", "RotateKLayer"]
    assert set(kinds[3:]) <= {"DummyLayer"}  # older versions of transformers have no entry for them


@SHARED
def test_a_prompt_is_read_densely_by_all_layers(host: Host):
    """Layers that share Keys read those of the prompt as the model gave them, however few channels are stored."""
    inputs = ways.padded(host.tiny)
    expected = host.attached(**inputs, past_key_values=RotateKCache(sparsity=0)).logits
    cache = RotateKCache.for_study(rank=8, always_compress=True)
    torch.testing.assert_close(host.attached(**inputs, past_key_values=cache).logits, expected, atol=5e-5, rtol=1e-5)
    assert cache.layers[2].kv.segments


@SHARED
def test_the_queries_of_all_layers_that_read_the_keys_weigh_them(host: Host, monkeypatch):
    sealed = {}
    seal = LayerKV.seal

    def noting(self, *arguments):
        sealed[self.index] = self.pending.window
        seal(self, *arguments)

    monkeypatch.setattr(LayerKV, "seal", noting)
    model = host.attached
    model(**ways.one(host.tiny), past_key_values=RotateKCache(sparsity=0.5))
    assert sealed[1].shape[1] == 4  # query heads
    assert sealed[2].shape[1] == 8  # those of layer 4, too
    sealed.clear()
    # In a generate, layers without Keys of their own may read a prompt with its last token alone.
    ways.generate(model, ways.one(host.tiny), RotateKCache(sparsity=0.5))
    assert sealed[2].shape[1] in (4, 8)
    assert sealed[2].shape[2] == 32


@SHARED
def test_without_attach_the_config_has_to_be_known(host: Host):
    model = copy.deepcopy(host.plain)
    model.set_attn_implementation({"text_config": "rotatek"})
    inputs = ways.one(host.tiny)
    mask = visual_positions(inputs["input_ids"])
    with pytest.raises(ValueError, match=r"attends to the Keys of layer 0.*config=model.config"):
        model(**inputs, past_key_values=RotateKCache(sparsity=0.5, visual_mask=mask))
    cache = RotateKCache(sparsity=0.5, visual_mask=mask, config=model.config)
    assert model(**inputs, past_key_values=cache).logits.isfinite().all()


@SHARED
def test_a_token_method_chooses_by_the_queries_of_the_layer_that_has_the_keys(host: Host):
    cache = RotateKCache(sparsity=0.5, tokens="vl_cache:0.5")
    output = ways.generate(host.attached, ways.padded(host.tiny), cache)
    assert torch.stack(output.logits).isfinite().all()
    dropped = [layer.dropped for layer in cache.report().layers if layer.kind == "RotateKLayer"]
    assert sum(dropped) == pytest.approx(0.5 * 128 * len(dropped), abs=2 * len(dropped))


@pytest.mark.parametrize("width", [256, 512])
def test_full_layers_wider_than_sliding_ones(width):
    """Gemma 4: sliding layers of 256 channels, full ones of 512; any width of the full ones is compressed by itself."""
    tiny = FAMILIES["gemma4"]
    config = tiny.config()
    text = config.text_config.to_dict() | {"head_dim": 64}
    text.pop("per_layer_config", None)
    config = type(config)(**config.to_dict() | {"text_config": text | {"global_head_dim": width}})
    plain = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    assert plain.get_decoder().layers[1].self_attn.head_dim == width
    inputs = ways.one(tiny)
    options = {"max_new_tokens": 4, "min_new_tokens": 4}
    expected = ways.generate(plain, inputs, DynamicCache(config=config.text_config), **options)
    cache = RotateKCache.for_study(rank=width, always_compress=True)
    got = ways.generate(attach(plain), inputs, cache, **options)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    assert cache.layers[1].kv.shape[2] == width
