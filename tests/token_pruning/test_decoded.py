"""R-KV: a bound on the tokens that an answer adds, against a dense cache that evicts by the book behind a mask."""

import copy
import itertools

import pytest
import torch
import ways
from hosts import build_host
from recorded_graph import RecordedGraph, attend_on_device
from tiny_models import words
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from rotatek_cache import RotateKCache
from rotatek_cache.hf.attachment import inner_model
from rotatek_cache.token_pruning.methods.rkv import RKV
from rotatek_cache.token_pruning.registry import decoded_method

SPEC = "rkv:24,every=8,window=4,importance=0.4"


class Book:
    """Dense attention in which each KV head of each row hides what the paper's algorithm evicts, word by word."""

    def __init__(self, method, prompt):
        self.method, self.prompt = method, prompt
        self.gone, self.queries = {}, {}
        AttentionInterface.register("book", self.attend)
        AttentionMaskInterface.register("book", sdpa_mask)

    def attend(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        batch, heads, tokens, _ = key.shape
        layer, queries = module.layer_idx, query.shape[2]
        if getattr(module, "is_kv_shared_layer", False):
            layer = module.kv_shared_layer_index
        before = self.gone.get(layer, torch.zeros(batch, heads, 0, dtype=torch.bool))
        gone = torch.zeros(batch, heads, tokens, dtype=torch.bool)
        grouped = query.unflatten(1, (heads, -1)) * scaling  # [B, H, G, Q, D]
        if kwargs.get("sliding_window") is None:
            gone[:, :, : before.shape[2]] = before
            for row, head in itertools.product(range(batch), range(heads)):
                if queries == 1 and before.shape[2] < tokens:
                    self.evict(layer, row, head, key[row, head], gone[row, head], tokens - 1)
                kept = self.queries.setdefault((layer, row, head), {}).setdefault(tokens - 1, [])
                kept.append(grouped[row, head, :, -1])  # of all layers that read these Keys
            self.gone[layer] = gone
        logits = grouped @ key.mT[:, :, None]
        if attention_mask is None:
            seen = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
        else:
            seen = attention_mask[:, None] if attention_mask.dtype == torch.bool else attention_mask[:, None] == 0
        logits = logits.masked_fill(~(seen & ~gone[:, :, None, None]), -torch.inf)
        return (logits.softmax(-1).nan_to_num() @ value[:, :, None]).flatten(1, 2).transpose(1, 2).contiguous(), None

    def evict(self, layer, row, head, keys, gone, end):
        method = self.method
        held = [position for position in range(self.prompt, end) if not gone[position]]
        if len(held) < method.cap:
            return
        keys = keys[held]
        candidates = range(len(held) - method.window)
        # Importance.
        weights = []
        for position in range(end - method.window, end):
            logits = keys @ torch.cat(self.queries[layer, row, head][position]).mT  # [n, G]
            logits[[place for place, held_position in enumerate(held) if held_position > position]] = -torch.inf
            weights.append(logits.softmax(0).amax(1))
        reach = method.pool // 2
        importance = [
            sum(float(max(w[max(0, i - reach) : min(len(candidates), i + reach + 1)])) for w in weights) / len(weights)
            for i in candidates
        ]
        # Redundancy.
        unit = keys / keys.norm(dim=1, keepdim=True)
        similarity = unit @ unit.mT
        for i in range(len(held)):
            similarity[i, i] = 0
        for i in range(len(held)):
            repeats = [j for j in range(len(held)) if similarity[i, j] > method.similar]
            for j in repeats[-method.spared :]:
                similarity[i, j] = 0
        redundancy = similarity.mean(0).softmax(0)
        scores = [method.importance * importance[i] - (1 - method.importance) * float(redundancy[i]) for i in candidates]
        best = sorted(candidates, key=lambda i: -scores[i])[: method.kept - method.window]
        for i in candidates:
            gone[held[i]] = i not in best


def by_the_book(host, inputs, spec, tokens, **options):
    book = Book(decoded_method(spec), inputs["input_ids"].shape[1])
    plain = copy.deepcopy(host.plain)
    plain.set_attn_implementation({"text_config": "book"})
    return ways.generate(plain, inputs, DynamicCache(config=plain.config), max_new_tokens=tokens, **options)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3n"])
def test_a_batch_s_answer_is_that_of_the_book(family):
    host = build_host(family)
    inputs = ways.padded(host.tiny)
    cache = RotateKCache(sparsity=0, decoded=SPEC)
    found = ways.generate(host.attached, inputs, cache, max_new_tokens=50)
    expected = by_the_book(host, inputs, SPEC, 50)
    assert torch.equal(found.sequences, expected.sequences)
    print(cache.report())
