"""Rows of nothing but padding, and images that the mask hides in part, with every option that decides by rows."""

import pytest
import torch
import ways
from hosts import Host, build_host
from tiny_parts import visual_positions
from transformers import DynamicCache

from rotatek_cache import RotateKCache
from rotatek_cache.token_pruning.interface import AttentionMethod
from rotatek_cache.token_pruning.registry import TOKENS

METHODS = [name for name, method in TOKENS.items() if method.drops]
ATTENTIVE = [name for name in METHODS if issubclass(TOKENS[name], AttentionMethod)]
OPTIONS = [{"sparsity": 0.5}, {"energy": 0.9}, *({"sparsity": 0.5, "tokens": f"{name}:0.5"} for name in METHODS)]
BUDGETS = [
    {"budget": "0.95x"},
    *({"budget": "0.8x", "tokens": name} for name in METHODS if name != "hybrid_kv"),
]  # refused
HIDDEN = 20  # visual tokens


def _beside_padding(inputs):
    """The row of `inputs`, and a row that is all padding and brings no image."""
    padding = {
        "input_ids": torch.zeros_like(inputs["input_ids"]),
        "attention_mask": torch.zeros_like(inputs["input_ids"]),
    }
    return inputs | {name: torch.cat([padding[name], inputs[name]]) for name in padding}


def _partly_hidden(inputs):
    mask = inputs["attention_mask"].clone()
    for row, visual in enumerate(visual_positions(inputs["input_ids"])):
        mask[row, visual.nonzero()[:HIDDEN, 0]] = 0
    return inputs | {"attention_mask": mask}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_row_of_only_padding_changes_nothing(llava: Host, options):
    inputs = llava.tiny.inputs(llava.tiny.prompt(1))
    alone = ways.generate(llava.attached, inputs, RotateKCache(**options))
    beside = ways.generate(llava.attached, _beside_padding(inputs), RotateKCache(**options))
    assert torch.stack(beside.logits).isfinite().all()
    torch.testing.assert_close(torch.stack(beside.logits)[:, 1], torch.stack(alone.logits)[:, 0], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("hide", [_beside_padding, _partly_hidden])
@pytest.mark.parametrize("options", BUDGETS, ids=str)
def test_a_budget_holds_beside_what_is_hidden(llava: Host, options, hide):
    cache, inputs = RotateKCache(**options), hide(llava.tiny.inputs(llava.tiny.prompt(1, images=(0, 0))))
    got = llava.attached(**inputs, past_key_values=cache).logits
    assert got.isfinite().all()
    assert cache.nbytes() <= 1.01 * cache.coordinator.planner.made.budget_bytes


@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics3"])
@pytest.mark.parametrize("tokens", [None, *(f"{name}:1.0" for name in METHODS)])
def test_images_that_are_partly_hidden_are_exact_at_full_rank(family, tokens):
    host = build_host(family)
    inputs = _partly_hidden(ways.padded(host.tiny))
    expected = ways.generate(host.plain, inputs, DynamicCache())
    cache = RotateKCache.for_study(rank=32, basis="pca", always_compress=True, tokens=tokens)
    got = ways.generate(host.attached, inputs, cache)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    visible = visual_positions(inputs["input_ids"]) & inputs["attention_mask"].bool()
    segments = cache.report().layers[0].segments
    held = [sum(heads) for heads in zip(*(segment.by_head or (segment.tokens,) for segment in segments), strict=True)]
    assert set(held) == {int(visible.sum())}


@pytest.mark.parametrize("name", ATTENTIVE)
def test_hidden_tokens_are_not_chosen(llava: Host, name):
    inputs = _partly_hidden(ways.padded(llava.tiny))
    cache = RotateKCache.for_study(sparsity=0.5, always_compress=True, tokens=f"{name}:0.5")
    llava.attached(**inputs, past_key_values=cache)
    hidden = ~inputs["attention_mask"].bool()
    for layer in cache.layers:
        for segment in layer.kv.segments:
            for row in range(2):
                start, length = int(segment.starts[row]), int(segment.lengths[row])
                assert not hidden[row, segment.positions[start : start + length].long()].any()
