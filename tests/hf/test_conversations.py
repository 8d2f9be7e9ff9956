"""Conversations whose turns bring images of their own: image, text, new images, in every family."""

import pytest
import torch
import ways
from checks import same
from hosts import Host, build_host
from tiny_models import FAMILIES
from tiny_parts import IMAGE, PAD, TRANSFORMERS, VIDEO, Prompt, words
from transformers import DynamicCache

from rotatek_cache import RotateKCache

M_ROPE = [name for name, tiny in FAMILIES.items() if tiny.token_types == "mm_token_type_ids"]


def _turns(tiny, rows, videos=0):
    """What `rows` conversations say and show in three turns: images, text, new images; rows differ in all of it."""
    generator = torch.Generator().manual_seed(5)
    turns = [[], [], []]
    for row in range(rows):
        turns[0].append(tiny.prompt(row, images=(row,), text=5 - 3 * row))
        turns[1].append(Prompt(words(4 + 3 * row, 11 + row)))
        last = Prompt(words(3 - row, 21 + row))
        for size in range(2 - row):
            ids, content = tiny.image((size + 1) % tiny.sizes, generator)
            last.ids += [*ids, *words(2, 31 + row)]
            last.images.append(content)
        for _ in range(videos):
            ids, content = tiny.video(0, generator)
            last.ids += [*ids, *words(2, 41 + row)]
            last.videos.append(content)
        turns[2].append(last)
    return turns


def _types(tiny, ids):
    if tiny.token_types is None:
        return {}
    if tiny.token_types == "mm_token_type_ids":
        return {tiny.token_types: (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
    return {tiny.token_types: torch.zeros_like(ids) if tiny.image_first else (ids == IMAGE).long()}


def _converse(tiny, model, cache, turns, whole=None, **options):
    """Answers to three turns on one cache: the ids of the whole conversation, the images of the turn alone.

    `whole` makes a cache anew for each turn, which gets all images: the conversation as one prompt.
    """
    results = []
    ids = mask = torch.zeros(len(turns[0]), 0, dtype=torch.long)
    for number, turn in enumerate(turns):
        given = tiny.inputs(*turn)
        ids = torch.cat([ids, given.pop("input_ids")], 1)
        mask = torch.cat([mask, given.pop("attention_mask")], 1)
        given |= {"input_ids": ids, "attention_mask": mask, **_types(tiny, ids)}
        if whole is not None:
            cache = whole()
            so_far = turns[: number + 1]
            shown = [[image for part in so_far for image in part[row].images] for row in range(len(turn))]
            filmed = [[video for part in so_far for video in part[row].videos] for row in range(len(turn))]
            given |= tiny.collate(shown) if any(shown) else {}
            given |= tiny.collate_video(filmed) if any(filmed) else {}
        output = ways.generate(model, given, cache, **{"max_new_tokens": 3} | options)
        results += [output.sequences, torch.stack(output.logits or output.scores)]
        mask = torch.nn.functional.pad(mask, (0, output.sequences.shape[1] - ids.shape[1]), value=1)
        ids = output.sequences
    assert (mask == 0).any() or len(turns[0]) == 1
    assert int((ids == PAD).sum()) == int((mask == 0).sum())
    return results


def _last_turn(tiny, turns, sequences):
    """Arguments of the third turn behind `sequences`: with its own images, and with those of all turns."""
    given = tiny.inputs(*turns[2])
    ids = torch.cat([sequences, given.pop("input_ids")], 1)
    mask = torch.cat([(sequences != PAD).long(), given.pop("attention_mask")], 1)
    given |= {"input_ids": ids, "attention_mask": mask, **_types(tiny, ids)}
    return given, given | tiny.collate([turns[0][row].images + turns[2][row].images for row in range(len(ids))])


def _dense(model):
    return DynamicCache(config=model.config.get_text_config(decoder=True))


@pytest.mark.parametrize("host", list(FAMILIES), indirect=True)
def test_new_images_in_a_third_turn(host: Host):
    """Two rows, padded on the left in each turn, are what DynamicCache gives; with M-RoPE, what one prompt gives."""
    turns = _turns(host.tiny, 2)
    if host.tiny.name in M_ROPE:  # transformers cannot do the third turn
        expected = _converse(host.tiny, host.plain, None, turns, whole=lambda: _dense(host.plain))
    else:
        expected = _converse(host.tiny, host.plain, _dense(host.plain), turns)
    cache = RotateKCache.for_study(rank=32, always_compress=True)
    same(_converse(host.tiny, host.attached, cache, turns), expected)
    segments = [len(layer.kv.segments) for layer in cache.layers if hasattr(layer, "kv")]
    assert segments and set(segments) == {2}  # one of each turn with images


@pytest.mark.parametrize("host", ["qwen2_vl", "qwen2_5_vl"], indirect=True)
def test_a_video_in_a_third_turn(host: Host):
    turns = _turns(host.tiny, 2, videos=1)
    expected = _converse(host.tiny, host.plain, None, turns, whole=lambda: _dense(host.plain))
    same(_converse(host.tiny, host.attached, RotateKCache(sparsity=0), turns), expected)


@pytest.mark.skipif(TRANSFORMERS < (5, 23), reason="chunks of a later turn begin at the start of the conversation")
@pytest.mark.parametrize("host", ["qwen2_5_vl", "llava"], indirect=True)
def test_a_third_turn_in_chunks(host: Host):
    turns, options = _turns(host.tiny, 2), {"prefill_chunk_size": 33}
    expected = _converse(host.tiny, host.plain, None, turns, whole=lambda: _dense(host.plain))
    same(_converse(host.tiny, host.attached, RotateKCache(sparsity=0), turns, **options), expected)


@pytest.mark.skipif(TRANSFORMERS < (5, 18), reason="images are encoded in the forward, of whose rows they are")
@pytest.mark.parametrize("host", ["qwen2_5_vl", "llava"], indirect=True)
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_a_third_turn_with_rows_repeated(host: Host, options):
    """The cache's rows are repeated by the user, as transformers wants it, the turn's images by generate."""
    turns = _turns(host.tiny, 2)
    first = _converse(host.tiny, host.attached, cache := RotateKCache(sparsity=0), turns[:2])
    same(first, _converse(host.tiny, host.plain, _dense(host.plain), turns[:2]))
    asked, whole = _last_turn(host.tiny, turns, first[-2])
    cache.batch_repeat_interleave(2)
    torch.manual_seed(1)
    got = ways.generate(host.attached, asked, cache, output_logits=False, **options)
    torch.manual_seed(1)
    expected = ways.generate(host.plain, whole, _dense(host.plain), output_logits=False, **options)
    assert torch.equal(got.sequences, expected.sequences)


def test_transformers_cannot_do_that():
    """Why the tests above compare with one prompt: where this fails, they can compare with DynamicCache."""
    host = build_host("qwen2_vl")
    turns = _turns(host.tiny, 2)
    expected = _converse(host.tiny, host.plain, None, turns, whole=lambda: _dense(host.plain))
    with pytest.raises((StopIteration, RuntimeError, AssertionError)):
        same(_converse(host.tiny, host.plain, _dense(host.plain), turns), expected)


@pytest.mark.parametrize("family", M_ROPE[:1])
def test_what_does_not_fit_the_new_images_is_refused(family):
    host = build_host(family)
    tiny, cache = host.tiny, RotateKCache(sparsity=0)
    prompt = tiny.prompt(0)
    inputs = tiny.inputs(prompt)
    first = ways.generate(host.attached, inputs, cache)
    ids, content = tiny.image(1, torch.Generator().manual_seed(1))
    turn = ways.follow_up(tiny, inputs, first.sequences, [*words(3, 1), *ids, *words(4, 2)])
    turn |= _types(tiny, turn["input_ids"])
    both, new = tiny.collate([[*prompt.images, content]]), tiny.collate([[content]])
    held = cache.get_seq_length()
    wrong = {
        "image_grid_thw describes 144 tokens, but this turn has 80 .* of new images only": new
        | {"image_grid_thw": both["image_grid_thw"]},
        "image_grid_thw describes 64 tokens, but this turn has 80": new
        | {"image_grid_thw": both["image_grid_thw"][:1]},
        "(this turn brings images of 144 tokens, .* have 80 placeholders|tokens: 80, features: 144)": both,
    }
    for message, content in wrong.items():
        with pytest.raises(ValueError, match=message):
            ways.generate(host.attached, turn | content, cache)
        assert cache.get_seq_length() == held
    typeless = {name: value for name, value in turn.items() if name != "mm_token_type_ids"}
    with pytest.raises(ValueError, match="needs mm_token_type_ids"):
        ways.generate(host.attached, typeless | new, cache)
    expected = ways.generate(host.plain, turn | both, _dense(host.plain))
    same([ways.generate(host.attached, turn | new, cache).sequences], [expected.sequences])
