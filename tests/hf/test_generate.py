"""Full rank gives what DynamicCache gives, for every family and every way of calling; lower ranks run everywhere."""

import copy

import pytest
import torch
import ways
from checks import NOT_POSSIBLE, dense_result, possible, same
from hosts import Host, build_host
from tiny_models import FAMILIES
from tiny_more import EVERY, MORE
from tiny_parts import visual_positions

from rotatek_cache import RotateKCache

EXACT = ({"sparsity": 0}, {"rank": 32, "always_compress": True})

# For every family. Others are part of them: `second_turn_padded` begins as `padded_batch`, `second_turn` as `greedy`;
# `forward_loop_of_one` is what the last test here does.
SOME_WAYS = (
    "batch_with_a_text_row",
    "chunked_prefill_padded",
    "second_turn_padded",
    "second_turn_with_an_image",
    "video",
)
# One of each kind of what reaches the cache: plain, M-RoPE, features in several layers, sliding windows, layers that
# share Keys, linear attention. They go every way; those like another go the ways above, and all others every third one.
KINDS = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "gemma4_shared", "qwen3_5")


def _cases():
    for number, (family, tiny) in enumerate(EVERY.items()):
        for place, way in enumerate(ways.WAYS):
            if family in NOT_POSSIBLE.get(way, ()) or (way == "video" and tiny.video is None):
                continue
            unlike = not tiny.like and family not in MORE and (number + place) % 3 == 0 and way != "long_answer"
            if family in KINDS or way in SOME_WAYS or unlike:
                yield family, way


def _maker(options):
    return lambda visual_mask=None: RotateKCache.for_study(**options, visual_mask=visual_mask)


@pytest.mark.parametrize(("family", "way"), list(_cases()))
def test_full_rank_is_dynamic_cache(family, way):
    expected = possible(family, way)
    host = build_host(family)
    # How whole Keys are stored is not the family's: two go all ways in both forms; the next test has both for each.
    for options in EXACT if family in KINDS[:2] else EXACT[1:]:
        same(ways.WAYS[way](host.tiny, host.attached, _maker(options)), expected)


@pytest.mark.parametrize("host", list(FAMILIES), indirect=True)
def test_switched_with_a_mask_is_dynamic_cache(host: Host):
    """Without attach: the attention function is selected by name, and the cache is given the visual positions."""
    model = copy.deepcopy(host.plain)
    model.set_attn_implementation({"text_config": "rotatek"})
    inputs = ways.padded(host.tiny)
    expected = possible(host.tiny.name, "padded_batch")
    for options in EXACT:
        for config in (model.config,) if host.tiny.needs_config else (None, model.config):
            cache = RotateKCache.for_study(**options, visual_mask=visual_positions(inputs["input_ids"]), config=config)
            output = ways.generate(model, inputs, cache)
            same([output.sequences, torch.stack(output.logits)], expected)
    if host.tiny.name in NOT_POSSIBLE["beams"]:
        return
    mask = visual_positions(inputs["input_ids"])
    beams = ways.WAYS["beams"](host.tiny, model, lambda: RotateKCache(rank=32, visual_mask=mask, config=model.config))
    same(beams, dense_result(host.tiny.name, "beams"))


LOSSY = ({"sparsity": 0.5}, {"rank": 5, "always_compress": True}, {"energy": 0.8}, {"rank": 8, "solver": "eigh"})
LOSSY_WAYS = ("padded_batch", "beams", "chunked_prefill", "prompt_lookup", "second_turn", "forward_in_pieces")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_lower_ranks_run(family):
    host = build_host(family)
    place = list(FAMILIES).index(family)
    for number, way in enumerate(LOSSY_WAYS):
        if family in NOT_POSSIBLE.get(way, ()) or (number + place) % 2:
            continue
        options = LOSSY[number % len(LOSSY)]
        expected = dense_result(family, way)
        if isinstance(expected, Exception):
            continue
        for ours, theirs in zip(ways.WAYS[way](host.tiny, host.attached, _maker(options)), expected, strict=True):
            assert ours.isfinite().all()
            assert ours.shape == theirs.shape


@pytest.mark.parametrize("family", list(EVERY))
def test_these_models_would_show_a_wrong_key(family):
    """Rank 8 of 32 is visible in the logits, so that equality at full rank says something."""
    (exact,) = possible(family, "forward_loop_of_one")
    host = build_host(family)
    maker = _maker({"rank": 8, "always_compress": True})
    (lossy,) = ways.forward_loop_of_one(host.tiny, host.attached, maker)
    assert torch.equal(lossy[0], exact[0])  # the prompt itself is read densely
    assert (lossy[1:] - exact[1:]).abs().max() > 0.01
