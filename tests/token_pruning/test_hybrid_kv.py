"""HybridKV: heads that store and read tokens of their own, against a dense cache behind a mask for each head."""

import copy
import dataclasses

import pytest
import torch
import ways
from hosts import build_host
from tiny_models import words
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from rotatek_cache import HybridKV, RotateKCache

# Where the heads of tiny models divide.
STATIC = {"llava": 0.34, "qwen2_5_vl": 0.21, "internvl": 0.4}
METHOD = HybridKV(keep=0.3, static=0.34, chunk=4)


class Masked:
    """Dense attention in which each KV head of each row sees, of visual tokens, what `METHOD` lets it read."""

    def __init__(self, choices, visual, prompt):
        self.choices, self.visual, self.prompt = choices, visual, prompt
        AttentionInterface.register("masked", self.attend)
        AttentionMaskInterface.register("masked", sdpa_mask)

    def attend(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        batch, heads, tokens, _ = key.shape
        queries = query.shape[2]
        if attention_mask is None:
            seen = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)[None, None]
        else:
            seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        seen = seen.expand(batch, heads, -1, -1).clone()
        grouped = query.unflatten(1, (heads, -1))  # [B, H, G, Q, D]
        if tokens > self.prompt:
            choice = self.choices[module.layer_idx]
            for row in range(batch):
                for head in range(heads):
                    read = choice.stored[row, head].nonzero()[:, 0]
                    if choice.retrieves[row, head] and queries == 1:
                        chunks = read.split(choice.chunk)
                        scores = [float((grouped[row, head, :, 0] @ key[row, head, c].mean(0)).max()) for c in chunks]
                        best = sorted(range(len(chunks)), key=lambda c: -scores[c])
                        wanted = -(-int(choice.read[row, head]) // choice.chunk)
                        read = torch.cat([chunks[c] for c in best[:wanted]])
                    gone = self.visual[row].clone()
                    gone[read] = False
                    seen[row, head, :, : self.prompt] &= ~gone
        logits = (grouped @ key.mT[:, :, None] * scaling).masked_fill(~seen[:, :, None], -torch.inf)
        return (logits.softmax(-1).nan_to_num() @ value[:, :, None]).flatten(1, 2).transpose(1, 2).contiguous(), None


def chosen(cache, monkeypatch):
    """Note what the method chooses."""
    choices = {}
    select = HybridKV.select

    def noting(self, seen, visual, pruned):
        choices.update(select(self, seen, visual, pruned))
        return choices

    monkeypatch.setattr(HybridKV, "select", noting)
    return choices


@pytest.mark.parametrize("family", sorted(STATIC))
@pytest.mark.parametrize("turns", [1, 2])
def test_what_heads_do_not_read_is_masked(family, turns, monkeypatch):
    host = build_host(family)
    inputs = ways.padded(host.tiny)
    cache = RotateKCache(sparsity=0, tokens=dataclasses.replace(METHOD, static=STATIC[family]))
    choices = chosen(cache, monkeypatch)
    found = ways.generate(host.attached, inputs, cache, max_new_tokens=12)
    retrieves = torch.stack([choice.retrieves for choice in choices.values()])
    assert bool(retrieves.any()), "no head is dynamic"
    assert not bool(retrieves.all()), "no head is static"
    visual = (inputs["input_ids"] == 190) | (inputs["input_ids"] == 191)
    Masked(choices, visual, inputs["input_ids"].shape[1])
    plain = copy.deepcopy(host.plain)
    plain.set_attn_implementation({"text_config": "masked"})
    dense = DynamicCache(config=plain.config)
    expected = ways.generate(plain, inputs, dense, max_new_tokens=12)
    if turns == 2:
        second = ways.follow_up(host.tiny, inputs, found.sequences, words(5, 3))
        found = ways.generate(host.attached, second, cache, max_new_tokens=8)
        expected = ways.generate(plain, second, dense, max_new_tokens=8)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-3, atol=1e-3)
    report = cache.report()
    for layer in report.layers:
        by_head = [sum(heads) for heads in zip(*(s.by_head for s in layer.segments), strict=True)]
        assert by_head == choices[layer.index].stored.sum((0, 2)).tolist()
    assert "visual tokens by KV head" in str(report)
