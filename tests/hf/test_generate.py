"""Full rank gives what DynamicCache gives, for every family and every way of calling; lower ranks run everywhere."""

import copy
import functools

import pytest
import torch
import ways
from hosts import Host, build_host
from tiny_models import FAMILIES, TRANSFORMERS, visual_positions
from tiny_more import EVERY, MORE
from transformers import DynamicCache

from rotatek_cache import RotateKCache

EXACT = ({"sparsity": 0}, {"rank": 32, "always_compress": True})
M_ROPE = {name for name, tiny in FAMILIES.items() if tiny.token_types == "mm_token_type_ids" and tiny.grids}
NO_EMBEDDINGS = {"gemma3", "gemma4", "gemma4_shared", "paligemma"}
LLAMA4 = {"llama4"} & set(FAMILIES)

LINEAR = {name for name, tiny in EVERY.items() if tiny.linear}
SOME_WAYS = (
    "padded_batch",
    "batch_with_a_text_row",
    "beams",
    "chunked_prefill_padded",
    "second_turn_padded",
    "second_turn_with_an_image",
    "forward_loop_of_one",
    "video",
)  # for families like another, so that the suite stays short

# What transformers 5.24 cannot do with its own DynamicCache either.
NOT_POSSIBLE = {
    "forward_loop": M_ROPE,  # a 2D mask in a decode step of one's own: positions of the whole length come out
    "merged_embeddings": NO_EMBEDDINGS,
    "embeddings_and_pixels": NO_EMBEDDINGS,
    # Features of more than the placeholders come from the encoder, or they are not where chunks look for them.
    "chunked_prefill": {"ovis2", "granite4_vision"} | LLAMA4,
    "chunked_prefill_padded": {"ovis2", "granite4_vision", "phi4_multimodal", "fuyu"} | LLAMA4,
    "beams": {"fuyu"} | LLAMA4,  # features are not repeated with the rows
    "sampled_sequences": LLAMA4,
    "prompt_lookup": LINEAR,  # the state of linear attention cannot be taken back
    "assistant_model": LINEAR,
    "forward_with_embeddings": {"gemma4_shared"},  # each layer looks up an embedding of the ids
    "forward_in_pieces": LINEAR,  # its layers cannot repeat rows
}
CASES = [
    (family, way)
    for family, tiny in EVERY.items()
    for way in ways.WAYS
    if way != "video" or tiny.video is not None
    if family not in NOT_POSSIBLE.get(way, ())
    if way in SOME_WAYS or not (tiny.like or family in MORE)
]


@functools.cache
def _expected(family, way):
    """What the plain model does with DynamicCache; the error where an older transformers cannot do it."""
    host = build_host(family)
    config = host.plain.config.get_text_config(decoder=True)
    try:
        return ways.WAYS[way](host.tiny, host.plain, lambda visual_mask=None: DynamicCache(config=config))
    except Exception as error:  # whatever it is, it is not ours
        if TRANSFORMERS >= (5, 23):
            raise
        return error


def _possible(family, way):
    """What DynamicCache gives; skips the test where this transformers cannot do it."""
    expected = _expected(family, way)
    if isinstance(expected, Exception):
        pytest.skip(f"not possible with DynamicCache either: {type(expected).__name__}: {expected}")
    return expected


def _same(got, expected):
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        if theirs.is_floating_point():
            torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-5)
        else:
            assert torch.equal(ours, theirs)


def _maker(options):
    return lambda visual_mask=None: RotateKCache.for_study(**options, visual_mask=visual_mask)


@pytest.mark.parametrize(("family", "way"), CASES)
def test_full_rank_is_dynamic_cache(family, way):
    expected = _possible(family, way)
    host = build_host(family)
    for options in EXACT:
        _same(ways.WAYS[way](host.tiny, host.attached, _maker(options)), expected)


@pytest.mark.parametrize("host", list(FAMILIES), indirect=True)
def test_switched_with_a_mask_is_dynamic_cache(host: Host):
    """Without attach: the attention function is selected by name, and the cache is given the visual positions."""
    model = copy.deepcopy(host.plain)
    model.set_attn_implementation({"text_config": "rotatek"})
    inputs = ways.padded(host.tiny)
    expected = _possible(host.tiny.name, "padded_batch")
    for options in EXACT:
        for config in (model.config,) if host.tiny.needs_config else (None, model.config):
            cache = RotateKCache.for_study(**options, visual_mask=visual_positions(inputs["input_ids"]), config=config)
            output = ways.generate(model, inputs, cache)
            _same([output.sequences, torch.stack(output.logits)], expected)
    if host.tiny.name in NOT_POSSIBLE["beams"]:
        return
    mask = visual_positions(inputs["input_ids"])
    beams = ways.WAYS["beams"](host.tiny, model, lambda: RotateKCache(rank=32, visual_mask=mask, config=model.config))
    _same(beams, _expected(host.tiny.name, "beams"))


LOSSY = ({"sparsity": 0.5}, {"rank": 5, "always_compress": True}, {"energy": 0.8}, {"rank": 8, "solver": "eigh"})
LOSSY_WAYS = ("padded_batch", "beams", "chunked_prefill", "prompt_lookup", "second_turn", "forward_in_pieces")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_lower_ranks_run(family):
    host = build_host(family)
    for number, way in enumerate(LOSSY_WAYS):
        if family in NOT_POSSIBLE.get(way, ()):
            continue
        options = LOSSY[number % len(LOSSY)]
        expected = _expected(family, way)
        if isinstance(expected, Exception):
            continue
        for ours, theirs in zip(ways.WAYS[way](host.tiny, host.attached, _maker(options)), expected, strict=True):
            assert ours.isfinite().all()
            assert ours.shape == theirs.shape


@pytest.mark.parametrize("family", list(EVERY))
def test_these_models_would_show_a_wrong_key(family):
    """Rank 8 of 32 is visible in the logits, so that equality at full rank says something."""
    (exact,) = _possible(family, "forward_loop_of_one")
    host = build_host(family)
    maker = _maker({"rank": 8, "always_compress": True})
    (lossy,) = ways.forward_loop_of_one(host.tiny, host.attached, maker)
    assert torch.equal(lossy[0], exact[0])  # the prompt itself is read densely
    assert (lossy[1:] - exact[1:]).abs().max() > 0.01
