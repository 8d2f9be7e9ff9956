"""The offsets of M-RoPE positions stay those of the conversation that a cache holds, whatever is done to its rows."""

import pytest
import torch
import ways
from hosts import build_host
from tiny_parts import visual_positions, words
from transformers import DynamicCache

from rotatek_cache import RotateKCache
from rotatek_cache.cache.rope_offsets import RopeOffsets

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"]


def _dense(model):
    return DynamicCache(config=model.config.get_text_config())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}], ids=str)
@pytest.mark.parametrize("how", ["repeat", "select"])
def test_rows_repeated_before_a_second_turn(family, options, how):
    host = build_host(family)
    tiny, inputs = host.tiny, ways.padded(host.tiny)

    def answers(model, cache):
        first = ways.generate(model, inputs, cache)
        if how == "repeat":
            cache.batch_repeat_interleave(3)
        else:
            cache.batch_select_indices(torch.tensor([0, 0, 0, 1, 1, 1]))
        second = ways.follow_up(tiny, inputs, first.sequences, words(5, 3))
        torch.manual_seed(0)
        return ways.generate(model, second, cache, output_logits=False, **options).sequences

    expected = answers(host.plain, _dense(host.plain))
    assert torch.equal(answers(host.attached, RotateKCache(sparsity=0)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_crop_back_over_all_images_forgets_their_offset(family):
    """Text that goes on from there is where it is in a conversation that never had an image."""
    host = build_host(family)
    inputs = ways.padded(host.tiny)
    visual = visual_positions(inputs["input_ids"]).int()
    length = int(visual.argmax(1).min()) - 1  # before the first image of every row
    cache = RotateKCache(sparsity=0)
    ways.generate(host.attached, inputs, cache)
    cache.crop(length - cache.get_seq_length())
    more = torch.tensor([words(6, 1), words(6, 2)])
    mask = torch.nn.functional.pad(inputs["attention_mask"][:, :length], (0, 6), value=1)
    ids = torch.cat([inputs["input_ids"][:, :length], more], 1)
    text = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(ids)}
    copied = RotateKCache(sparsity=0)
    expected = ways.generate(host.attached, text, copied)
    got = ways.generate(host.attached, text, cache)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_crop_between_images_goes_on_behind_the_first(family):
    """To any text between two images, of a row's own places: as in a conversation that never had the second."""
    host = build_host(family)
    prompt = host.tiny.prompt(1, images=(0, 1))
    inputs = host.tiny.inputs(prompt, host.tiny.prompt(2, images=(1,), text=2, tail=3))
    places = visual_positions(inputs["input_ids"])[0].nonzero()[:, 0]
    behind = int(places[(places.diff() > 1).nonzero()[0, 0]]) + 1  # the first image
    for gap in (behind, behind + 1):
        cache = RotateKCache(sparsity=0)
        ways.generate(host.attached, inputs, cache)
        cache.crop(gap - cache.get_seq_length())
        ids, mask = inputs["input_ids"][:, :gap], inputs["attention_mask"][:, :gap]
        text = torch.tensor([words(6, 1), words(6, 2)])
        turn = {
            "input_ids": torch.cat([ids, text], 1),
            "attention_mask": torch.nn.functional.pad(mask, (0, 6), value=1),
        }
        types = torch.nn.functional.pad(inputs["mm_token_type_ids"][:, :gap], (0, 6))
        got = ways.generate(host.attached, turn | {"mm_token_type_ids": types}, cache)
        shown = host.tiny.collate([prompt.images[:1]])
        fresh = {name: value[:1] for name, value in turn.items()} | {"mm_token_type_ids": types[:1]} | shown
        expected = ways.generate(host.plain, fresh, _dense(host.plain))
        torch.testing.assert_close(torch.stack(got.logits)[:, :1], torch.stack(expected.logits), atol=5e-5, rtol=1e-5)
        assert int(cache.rope_deltas[1]) == 0  # its only image is gone


@pytest.mark.parametrize("family", FAMILIES)
def test_a_crop_inside_an_image_is_refused(family):
    host = build_host(family)
    inputs, cache = ways.one(host.tiny), RotateKCache(sparsity=0)
    host.attached(**inputs, past_key_values=cache)
    inside = int(visual_positions(inputs["input_ids"])[0].nonzero()[3, 0])
    held = cache.get_seq_length()
    with pytest.raises(ValueError, match=rf"crop to {inside} of {held} tokens ends between two visual tokens"):
        cache.crop(inside - held)
    assert cache.get_seq_length() == held
    deltas = cache.rope_deltas.clone()
    cache.crop(-3)  # text alone
    assert torch.equal(cache.rope_deltas, deltas)


def test_offsets_of_rows_by_hand():
    """An image of 4 tokens in 2 rows takes two positions: behind it text is 2 positions before its number."""
    offsets = RopeOffsets()
    #                      text image        text     image  text
    first = torch.tensor([[0, 0, -1, -1, -2, -2, -2, -3, -4, -4], [9, 9, 0, 0, 0, 0, 0, -1, -1, -1]])
    text = torch.tensor([[1, 0, 0, 0, 0, 1, 1, 0, 0, 1], [0, 0, 1, 1, 1, 1, 0, 0, 1, 1]]).bool()
    offsets.record(0, first, text)
    assert offsets.rows == [[(5, -2), (9, -4)], [(8, -1)]]
    assert [offsets.at(0, place) for place in (0, 1, 4, 5, 8, 9, 20)] == [0, 0, 0, -2, -2, -4, -4]
    offsets.record(10, torch.tensor([[-4, -4], [-1, -5]]), torch.tensor([[1, 1], [1, 1]]).bool())
    assert offsets.rows == [[(5, -2), (9, -4)], [(8, -1), (11, -5)]]
    offsets.select_rows([1, 1, 0])
    offsets.truncate(9)
    assert offsets.rows == [[(8, -1)], [(8, -1)], [(5, -2)]]
