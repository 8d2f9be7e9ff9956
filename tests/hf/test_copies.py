"""Copies of a cache, in memory or by pickle, go on as the cache does."""

import copy
import pickle

import pytest
import torch
import ways
from checks import PromptInParts
from hosts import Host, build_host
from tiny_parts import words

from rotatek_cache import RotateKCache

OPTIONS = [
    {"sparsity": 0.5},
    {"energy": 0.9},
    {"rank": 16, "key_bits": 4, "value_bits": 4, "value_sparsity": 0.5, "basis_bits": 8},
    {"sparsity": 0.5, "tokens": "vl_cache:0.5"},
    {"sparsity": 0.5, "tokens": "divprune:0.5"},
    {"budget": "0.95x"},
    {"budget": "0.6x", "tokens": "vl_cache"},
    {"budget": "0.6x", "tokens": "divprune"},
]
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda cache: pickle.loads(pickle.dumps(cache))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_copy_goes_on_as_the_cache_does(llava: Host, options, how):
    inputs, cache = ways.padded(llava.tiny), RotateKCache(**options)
    first = ways.generate(llava.attached, inputs, cache)
    copied = COPIES[how](cache)
    assert copied.nbytes() == cache.nbytes() and repr(copied) == repr(cache)
    second = ways.follow_up(llava.tiny, inputs, first.sequences, words(5, 3))
    got, expected = (ways.generate(llava.attached, second, held) for held in (copied, cache))
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))
    copied.reset()
    again = ways.generate(llava.attached, inputs, copied)
    assert torch.equal(torch.stack(again.logits), torch.stack(first.logits))


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "qwen3_vl"])
def test_a_copy_of_other_families(family, how):
    host = build_host(family)
    inputs, cache = ways.padded(host.tiny), RotateKCache(sparsity=0.5)
    first = ways.generate(host.attached, inputs, cache)
    copied = COPIES[how](cache)
    second = ways.follow_up(host.tiny, inputs, first.sequences, words(5, 3))
    ways.generate(host.attached, ways.one(host.tiny), RotateKCache(sparsity=0.5))  # another conversation between
    got, expected = (ways.generate(host.attached, second, held) for held in (copied, cache))
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_between_parts_of_a_prompt(llava: Host, how):
    prompt = PromptInParts(llava)
    prompt.check(COPIES[how](prompt.cache))
