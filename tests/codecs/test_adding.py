"""A codec and a token method are added as CONTRIBUTING.md says, one file each, and used through `generate`."""

import pytest
import torch
import ways
from checks import kept_positions
from tiny_parts import visual_positions
from toy_codec import HalfPrecision
from toy_tokens import BestAttended
from transformers import DynamicCache

from rotatek_cache import FitOptions, RotateKCache
from rotatek_cache.codecs.registry import CODECS, codecs_for
from rotatek_cache.core.segments import Stored
from rotatek_cache.token_pruning.registry import TOKENS


@pytest.fixture
def half(monkeypatch):
    monkeypatch.setitem(CODECS, "half", HalfPrecision)


def test_an_added_codec_stores_and_answers_as_dense_keys_do(llava, half):
    inputs = ways.padded(llava.tiny)  # two rows, one of them padded on the left
    assert not inputs["attention_mask"].all()
    cache = RotateKCache(sparsity=0.5, basis="half")
    got = ways.generate(llava.attached, inputs, cache)
    expected = ways.generate(llava.plain, inputs, DynamicCache())
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=1e-2, atol=1e-2)
    for layer in cache.report().layers:
        (segment,) = layer.segments
        assert segment.key_bytes * 2 == segment.value_bytes and segment.basis_bytes == 0


def test_the_bytes_that_an_added_codec_states_are_what_it_stores(half):
    codec, _ = codecs_for(FitOptions(sparsity=0.5, basis="half"))
    stored = codec.store(torch.randn(2, 30, 16), [(0, 20), (20, 10)])
    assert isinstance(stored, Stored) and stored.data.nbytes == 2 * codec.stored_bytes(30, 16, torch.float32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.5, "key_bits": 4}, "basis='half' takes sparsity or rank and no key_bits"),
        ({"energy": 0.9}, "basis='half' takes sparsity or rank and no key_bits"),
        ({"sparsity": 0.5, "basis_bits": 8}, "here it owns none"),
    ],
)
def test_what_an_added_codec_cannot_do_is_refused(half, options, words):
    with pytest.raises(ValueError, match=words):
        RotateKCache(basis="half", **options)


def test_an_added_codec_that_gets_infinity_raises(half):
    codec, _ = codecs_for(FitOptions(sparsity=0.5, basis="half"), layer=3)
    with pytest.raises(ValueError, match="the visual Keys of layer 3 hold NaN or infinity"):
        codec.store(torch.full((1, 2, 8), torch.inf), [(0, 2)])


def test_an_added_token_method_keeps_its_share(llava, monkeypatch):
    monkeypatch.setitem(TOKENS, "best_attended", BestAttended)
    inputs = ways.padded(llava.tiny)
    visual = visual_positions(inputs["input_ids"])
    cache = RotateKCache(sparsity=0, tokens="best_attended:0.5")
    ways.generate(llava.attached, inputs, cache)
    visual = torch.nn.functional.pad(visual, (0, ways.NEW))  # the answer is text
    chosen = [[kept_positions(cache, layer, row, visual) for row in range(2)] for layer in range(3)]
    for rows in chosen:
        assert [len(positions) for positions in rows] == [round(0.5 * int(count)) for count in visual.sum(1)]
    assert len({str(rows) for rows in chosen}) > 1  # each layer by its own attention


def test_both_go_together(llava, half, monkeypatch):
    monkeypatch.setitem(TOKENS, "best_attended", BestAttended)
    inputs = ways.padded(llava.tiny)
    dense = ways.generate(llava.attached, inputs, RotateKCache(sparsity=0, tokens="best_attended:0.5"))
    coded = ways.generate(llava.attached, inputs, RotateKCache(rank=8, basis="half", tokens=BestAttended(0.5)))
    assert torch.equal(coded.sequences, dense.sequences)
