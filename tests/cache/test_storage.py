"""What a cache holds, in bytes of storage: all of it counted, compressed at the seal, shared where it can be."""

import copy
import gc

import pytest
import torch
import ways
from checks import reached_storages
from hosts import Host, build_host
from tiny_models import FAMILIES
from tiny_parts import IMAGE, visual_positions
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import DynamicCache

from rotatek_cache import RotateKCache
from rotatek_cache.hf.cache import RotateKLayer

WIDTH, HEADS, LAYERS, FLOAT = 32, 2, 3, 4


@pytest.mark.parametrize("host", ["llava", "gemma3", "qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("options", [{"sparsity": 0}, {"sparsity": 0.5}, {"rank": 5}, {"energy": 0.9}])
def test_nbytes_is_what_is_held(host: Host, options):
    cache = RotateKCache.for_study(**options, always_compress=True)
    assert cache.nbytes() == 0
    ways.generate(host.attached, ways.padded(host.tiny), cache)
    assert cache.nbytes() == sum(reached_storages(cache, {}, set()).values())
    assert cache.report().stored_bytes == cache.nbytes()


@pytest.mark.parametrize(("sparsity", "stored_rank"), [(0.25, 24), (0.5, 16), (0.75, 8), (0.4, 24)])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "internvl"])
def test_visual_bytes_follow_the_sparsity(family, sparsity, stored_rank):
    """(1 - sparsity) of the dense Keys, padded to a multiple of 8 channels, and the basis with its mean."""
    host = build_host(family)
    inputs = host.tiny.inputs(host.tiny.prompt(1, images=(0, 1)), host.tiny.prompt(2, images=(1, 2)))
    cache = RotateKCache(sparsity=sparsity)
    ways.generate(host.attached, inputs, cache)
    visual = visual_positions(inputs["input_ids"])
    tokens, rows = int(visual.sum()), visual.shape[0]
    for layer in cache.report().layers:
        (segment,) = layer.segments
        assert segment.tokens == tokens
        assert segment.key_bytes == HEADS * tokens * stored_rank * FLOAT
        assert stored_rank - 8 < WIDTH * (1 - sparsity) <= stored_rank
        assert segment.value_bytes == HEADS * tokens * WIDTH * FLOAT
        assert segment.basis_bytes == HEADS * rows * (WIDTH * stored_rank + WIDTH) * FLOAT


def test_short_images_stay_dense_and_say_so():
    host = build_host("llava_pixtral")
    inputs = host.tiny.inputs(host.tiny.prompt(1, images=(0,)))  # 64 tokens: at rank 24 the basis costs more
    cache = RotateKCache(sparsity=0.25)
    ways.generate(host.attached, inputs, cache)
    assert all(not layer.segments and layer.kept_dense == [(0, 64)] for layer in cache.report().layers)
    assert "64 visual tokens stayed dense" in str(cache.report())
    dense = RotateKCache(sparsity=0)
    ways.generate(host.attached, inputs, dense)
    assert cache.nbytes() <= dense.nbytes() * 1.2


@pytest.mark.parametrize("family", list(FAMILIES))
def test_nothing_dense_survives_the_seal(family, monkeypatch):
    """The storages that the model hands to `update` in a prefill are gone when it ends."""
    host = build_host(family)
    handed: list[StorageWeakRef] = []
    update = RotateKLayer.update

    def noting(self, keys, values, *args, **kwargs):
        handed.extend(StorageWeakRef(states.untyped_storage()) for states in (keys, values))
        return update(self, keys, values, *args, **kwargs)

    monkeypatch.setattr(RotateKLayer, "update", noting)
    cache = RotateKCache(sparsity=0.5)
    host.attached(**ways.one(host.tiny), past_key_values=cache)
    gc.collect()
    assert handed
    assert all(reference.expired() for reference in handed)


def test_prefill_peak_is_one_dense_layer(llava: Host, monkeypatch):
    """In an unchunked prefill one layer of the cache is dense at any time, the one that attends."""
    inputs = llava.tiny.inputs(llava.tiny.prompt(1, images=(0,) * 6))
    cache = RotateKCache(rank=8)
    held = []
    update = RotateKLayer.update

    def noting(self, *args, **kwargs):
        held.append(cache.nbytes())  # the layers before are sealed
        result = update(self, *args, **kwargs)
        held.append(cache.nbytes())
        return result

    monkeypatch.setattr(RotateKLayer, "update", noting)
    llava.attached(**inputs, past_key_values=cache)
    held.append(cache.nbytes())
    tokens = inputs["input_ids"].shape[1]
    one_layer = tokens * HEADS * 2 * WIDTH * FLOAT
    before, after = held[:-1:2], held[1::2]
    assert len(before) == LAYERS
    assert all(b - a == one_layer for a, b in zip(before, after, strict=True))
    sealed = [b - a for a, b in zip(before, [*before[1:], held[-1]], strict=True)]
    assert all(layer < 0.8 * one_layer for layer in sealed)


def _pointers(cache):
    return [(s.keys.data.data_ptr(), s.values.data.data_ptr()) for layer in cache.layers for s in layer.kv.segments]


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"sparsity": 0}])
def test_row_selection_copies_no_sealed_segment(llava: Host, options):
    inputs = llava.tiny.inputs(llava.tiny.prompt(1, images=(0, 1)), llava.tiny.prompt(2, images=(0, 1), text=3))
    cache = RotateKCache.for_study(**options)
    llava.attached(**inputs, past_key_values=cache)
    before, bytes_before = _pointers(cache), cache.nbytes()
    assert len(before) == LAYERS
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(3)
    assert _pointers(cache) == before
    # Six rows of text, two rows of images.
    assert cache.nbytes() < 2.2 * bytes_before
    cache.batch_select_indices(torch.tensor([4, 0]))
    assert _pointers(cache) == before
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_decoding_copies_no_sealed_segment(llava: Host):
    cache = RotateKCache(sparsity=0.5)
    llava.attached(**ways.one(llava.tiny), past_key_values=cache)
    before = _pointers(cache)
    ways._decode(llava.attached, cache, torch.tensor([[20]]), 40)
    assert _pointers(cache) == before


def test_a_copy_shares_what_is_sealed_and_is_independent(llava: Host):
    inputs = ways.one(llava.tiny)
    cache = RotateKCache(sparsity=0.5)
    llava.attached(**inputs, past_key_values=cache)
    twin = copy.deepcopy(cache)
    assert _pointers(twin) == _pointers(cache)
    assert all(
        a.kv.text.keys.data_ptr() != b.kv.text.keys.data_ptr() for a, b in zip(cache.layers, twin.layers, strict=True)
    )
    ways._decode(llava.attached, twin, torch.tensor([[30]]), 3)
    twin.batch_repeat_interleave(2)
    twin.crop(-60)
    twin.reset()
    fresh = RotateKCache(sparsity=0.5)
    llava.attached(**inputs, past_key_values=fresh)
    expected = ways._decode(llava.attached, fresh, torch.tensor([[20]]), 3)
    got = ways._decode(llava.attached, cache, torch.tensor([[20]]), 3)
    assert torch.equal(torch.stack(got), torch.stack(expected))


def test_reset_frees_everything(llava: Host):
    cache = RotateKCache(sparsity=0.5)
    ways.generate(llava.attached, ways.one(llava.tiny), cache)
    cache.reset()
    assert cache.nbytes() == 0
    assert cache.get_seq_length() == 0


def test_sliding_layers_keep_the_stock_layer():
    host = build_host("gemma3")
    inputs = host.tiny.inputs(host.tiny.prompt(1, images=(0,) * 6))
    cache = RotateKCache(sparsity=0.5)
    dense = DynamicCache(config=host.plain.config.get_text_config(decoder=True))
    ways.generate(host.attached, inputs, cache)
    ways.generate(host.plain, inputs, dense)
    assert [type(layer) is type(stock) for layer, stock in zip(cache.layers, dense.layers, strict=True)] == [
        True,
        False,
        False,
    ]
    assert torch.equal(cache.layers[0].keys.isfinite(), dense.layers[0].keys.isfinite())
    assert cache.nbytes() < sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
    assert "stock layer: DynamicSlidingWindowLayer" in str(cache.report())


def test_report_and_repr(llava: Host):
    cache = RotateKCache(rank=9)
    assert repr(cache) == "<RotateKCache(rank=9): 0 layers, 0 tokens, 0 bytes>"
    assert repr(RotateKCache(budget="0.5x", key_bits=4)).startswith("<RotateKCache(key_bits=4, budget='0.5x'): ")
    str(cache.report())
    ways.generate(llava.attached, ways.padded(llava.tiny), cache)
    assert repr(cache).startswith("<RotateKCache(rank=9): 3 layers, ")
    report = cache.report()
    assert report.dense_bytes == sum(layer.dense_bytes for layer in report.layers)
    tokens = cache.get_seq_length()
    assert report.layers[0].dense_bytes == 2 * tokens * HEADS * 2 * WIDTH * FLOAT
    assert "16/32" in str(report)  # a rank that is no multiple of 8 is filled up with directions


def test_placeholders_that_were_generated_are_text(llava: Host):
    """Ids of an answer may spell a placeholder; only what an image stands behind is visual."""
    inputs, cache = ways.one(llava.tiny), RotateKCache.for_study(rank=32, always_compress=True)
    llava.attached(**inputs, past_key_values=cache)
    llava.attached(torch.tensor([[20, IMAGE, IMAGE, 21]]), past_key_values=cache)
    llava.attached(torch.tensor([[IMAGE]]), past_key_values=cache)
    visual = int(visual_positions(inputs["input_ids"]).sum())
    for layer in cache.report().layers:
        assert [segment.tokens for segment in layer.segments] == [visual]
        assert layer.dense_tokens == inputs["input_ids"].shape[1] + 5 - visual


def test_a_mask_may_cover_padding(llava: Host):
    """Padding is no token, whatever a mask says of it."""
    inputs = ways.padded(llava.tiny)
    visual = visual_positions(inputs["input_ids"])
    tokens = []
    for mask in (visual, visual | (inputs["attention_mask"] == 0)):
        cache = RotateKCache(sparsity=0.5, visual_mask=mask)
        llava.attached(**inputs, past_key_values=cache)
        tokens.append([segment.tokens for segment in cache.report().layers[0].segments])
    assert tokens[0] == tokens[1] == [int(visual.sum())]
