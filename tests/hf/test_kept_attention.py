"""Prefill attention with dropped tokens: among the kept ones alone, as if the others were not there."""

import types

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rotatek_cache.core.attention import causal_mask
from rotatek_cache.hf.attention import attend_kept, hide

HEADS, GROUP, WIDTH, VALUE_WIDTH = 2, 3, 16, 24
MODULE = types.SimpleNamespace(num_key_value_groups=GROUP, is_causal=True)


def draw(batch: int, queries: int, tokens: int):
    query = torch.randn(batch, HEADS * GROUP, queries, WIDTH)
    return query, torch.randn(batch, HEADS, tokens, WIDTH), torch.randn(batch, HEADS, tokens, VALUE_WIDTH)


def hidden_of(*rows: list[int], tokens: int) -> torch.Tensor:
    hidden = torch.zeros(len(rows), tokens, dtype=torch.bool)
    for row, columns in enumerate(rows):
        hidden[row, columns] = True
    return hidden


def padded(mask: torch.Tensor, batch: int, padding: list[int], *, additive: bool) -> torch.Tensor:
    """A causal mask of rows with so many tokens of left padding, which see themselves, as transformers has it."""
    tokens, queries = mask.shape[-1], mask.shape[-2]
    real = torch.arange(tokens) >= torch.tensor(padding)[:, None]
    own = torch.arange(tokens) == torch.arange(tokens - queries, tokens)[:, None]
    mask = mask.expand(batch, -1, -1, -1) & (real[:, None, None] | own)
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask


CASES = {
    "one-row": (hidden_of([2, 3, 7], tokens=12), 12, None),
    "rows-alike": (hidden_of([2, 3, 7], [1, 5, 6], tokens=12), 12, None),
    "rows-that-keep-more-and-less": (hidden_of([2, 3, 7], [5], tokens=12), 12, None),
    "one-row-keeps-all": (hidden_of([2, 3, 7], [], tokens=12), 12, None),
    "a-chunk-behind-a-past": (hidden_of([2, 3, 7], [1, 9], tokens=12), 5, None),
    "a-chunk-of-dropped-tokens-alone": (hidden_of([1, 9, 10, 11], tokens=12), 3, None),
    "nothing-kept-in-a-row": (hidden_of(list(range(12)), [3], tokens=12), 12, None),
    "bool-mask": (hidden_of([4, 5, 7], [5], tokens=12), 12, ([3, 0], False)),
    "additive-mask": (hidden_of([4, 5, 7], [5, 6], tokens=12), 12, ([0, 2], True)),
    "one-query": (hidden_of([4, 5, 7], [5], tokens=12), 1, ([3, 0], False)),
}


@pytest.mark.parametrize(("hidden", "queries", "padding"), CASES.values(), ids=CASES)
def test_kept_tokens_see_what_a_mask_leaves_them(hidden, queries, padding):
    batch, tokens = hidden.shape
    query, keys, values = draw(batch, queries, tokens)
    causal = causal_mask(queries, tokens, keys.device)
    mask = None if padding is None else padded(causal, batch, padding[0], additive=padding[1])
    full = hide(causal.expand(batch, -1, -1, -1) if mask is None else mask, hidden)
    expected, _ = sdpa_attention_forward(MODULE, query, keys, values, full, scaling=0.3)
    gone = hidden[:, tokens - queries :]
    # What is dropped may hold anything.
    keys = keys.masked_fill(hidden[:, None, :, None], torch.nan)
    values = values.masked_fill(hidden[:, None, :, None], torch.nan)
    output = attend_kept(MODULE, query, keys, values, mask, hidden, scaling=0.3)
    torch.testing.assert_close(output[~gone], expected[~gone])
    assert torch.equal(output[gone], torch.zeros_like(output[gone]))


def test_where_rows_keep_as_many_no_mask_is_made(monkeypatch):
    masks = []

    def attention(module, query, keys, values, mask, **kwargs):
        masks.append(mask)
        return sdpa_attention_forward(module, query, keys, values, mask, **kwargs)

    monkeypatch.setattr("rotatek_cache.hf.attention.sdpa_attention_forward", attention)
    attend_kept(MODULE, *draw(2, 12, 12), None, hidden_of([2, 3], [4, 9], tokens=12))
    assert masks == [None]
