"""R-KV: a bound on the tokens that an answer adds, against a dense cache that evicts by the book behind a mask."""

import copy
import dataclasses
import itertools
import os

import pytest
import torch
import ways
from hosts import Host, build_host
from recorded_graph import RecordedGraph, attend_on_device
from tiny_parts import words
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from rotatek_cache import RotateKCache, attach
from rotatek_cache.hf.attachment import inner_model
from rotatek_cache.token_pruning.methods.rkv import RKV
from rotatek_cache.token_pruning.registry import decoded_method

SPEC = "rkv:24,every=8,window=4,importance=0.4"
ANSWER = int(os.environ.get("ROTATEK_ANSWER_TOKENS", "300"))
CAP = 256 if ANSWER > 512 else 64


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
        if kwargs.get("sliding_window") is None:
            if getattr(module, "is_kv_shared_layer", False):
                layer = self.last  # whose Keys it reads
            self.last = layer
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
        weights = [w.tolist() for w in weights]
        importance = [
            sum(float(max(w[max(0, i - reach) : min(len(candidates), i + reach + 1)])) for w in weights) / len(weights)
            for i in candidates
        ]
        # Redundancy.
        unit = keys / keys.norm(dim=1, keepdim=True)
        similarity = (unit @ unit.mT).tolist()
        for i, row_of in enumerate(similarity):
            row_of[i] = 0.0
            repeats = [j for j, value in enumerate(row_of) if value > method.similar]
            for j in repeats[-method.spared :]:
                row_of[j] = 0.0
        redundancy = torch.tensor(similarity).mean(0).softmax(0)
        scores = [
            method.importance * importance[i] - (1 - method.importance) * float(redundancy[i]) for i in candidates
        ]
        best = sorted(candidates, key=lambda i: -scores[i])[: method.kept - method.window]
        for i in candidates:
            gone[held[i]] = i not in best


def by_the_book(host, inputs, spec, tokens, **options):
    Book(decoded_method(spec), inputs["input_ids"].shape[1])
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
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-3, atol=1e-3)
    whole = by_the_book(host, inputs, "rkv:999", 50)
    assert float((torch.stack(whole.logits) - torch.stack(expected.logits)).abs().max()) > 0.1, "the bound must matter"


def test_scores_by_hand():
    method = RKV(5, every=1, window=2, importance=0.5, similar=0.9, spared=1, pool=1)
    # Tokens 0 and 2 are the same, 1 and 3 are alone, 4 is the window's with 5... of one head, width 2.
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [-1.0, 0.0], [0.0, -1.0]])[None, None]
    # Cosines without the diagonal: (0, 2) 1, (0, 3) -1, (2, 3) -1, (1, 4) -1, others 0. Of what token 0 is like (2) the
    # last is spared, so that 2 is not held to repeat it; of what token 2 is like (0) likewise.
    means = torch.tensor([-1.0, -1.0, -1.0, -2.0, -1.0]) / 5
    torch.testing.assert_close(method.redundancy(keys)[0, 0], means.softmax(0))
    # With a third like them, the first of them is held to repeat the others, the last is not.
    alike = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])[None, None]
    found = method.redundancy(alike)[0, 0]
    torch.testing.assert_close(found, torch.tensor([2 / 4, 1 / 4, 0.0, 0.0]).softmax(0))
    # Importance: the larger of a group's two heads, then the mean over queries.
    queries = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]])[None, None]  # [1, 1, G, q, D]
    visible = torch.ones(2, 5, dtype=torch.bool)
    uniform = torch.full((5,), 0.2)
    first, second = torch.tensor([3.0, 0, 6, -3, 0]).softmax(0), torch.tensor([0.0, 3, 0, 0, -3]).softmax(0)
    expected = (torch.maximum(first, uniform) + torch.maximum(second, uniform)) / 2
    torch.testing.assert_close(method.attention(keys, queries, visible)[0, 0], expected[:3])
    pooled = RKV(5, every=1, window=2, pool=3).attention(keys, queries, visible)[0, 0]
    both = torch.stack([torch.maximum(first, uniform), torch.maximum(second, uniform)])[:, :3]
    torch.testing.assert_close(pooled, torch.stack([both[:, :2].amax(1), both.amax(1), both[:, 1:].amax(1)]).mean(1))


@pytest.fixture
def recorded(monkeypatch, llava):
    """An attached model whose steps are recorded and repeated."""
    monkeypatch.setattr("rotatek_cache.hf.attention.attend", attend_on_device)
    RecordedGraph.made.clear()
    model = copy.deepcopy(llava.attached)
    inner_model(model)._rotatek.graphs.new_graph = RecordedGraph
    return model


@pytest.mark.parametrize("way", ["padded", "beams", "second_turn"])
def test_a_captured_step_evicts_between_replays(way, llava, recorded):
    """Without another capture: as many graphs as without a bound."""
    inputs = ways.padded(llava.tiny)

    def answer(model, cache):
        options = {"num_beams": 3} if way == "beams" else {}
        found = ways.generate(model, inputs, cache, max_new_tokens=60, **options).sequences
        if way == "second_turn":
            found = ways.generate(
                model, ways.follow_up(llava.tiny, inputs, found, words(5, 3)), cache, max_new_tokens=40
            ).sequences
        return found

    cache = RotateKCache(rank=8, decoded=SPEC)
    found = answer(recorded, cache)
    graphs, replays = len(RecordedGraph.made), sum(graph.replays for graph in RecordedGraph.made)
    assert graphs == (2 if way == "second_turn" else 1)
    assert replays > 55
    assert torch.equal(found, answer(llava.attached, RotateKCache(rank=8, decoded=SPEC)))
    assert "tokens of answers that went" in str(cache.report())
    assert {layer.evicted for layer in cache.report().layers} == {56 if way == "second_turn" else 40}


def test_a_long_answer_stays_within_its_cap_and_is_that_of_the_book(llava):
    """Of a model with one layer, for speed; ROTATEK_ANSWER_TOKENS=2000 is a minute."""

    def config():
        made = llava.tiny.config()
        made.get_text_config(decoder=True).num_hidden_layers = 1
        return made

    plain = dataclasses.replace(llava.tiny, config=config).build()
    host = Host(llava.tiny, plain, attach(copy.deepcopy(plain)))
    inputs, spec = ways.one(llava.tiny), f"rkv:{CAP}"
    cache = RotateKCache(sparsity=0, decoded=spec)
    ways.generate(host.attached, inputs, cache, max_new_tokens=1)
    prompt, columns = cache.nbytes(), cache.layers[0].kv.text.length
    cache = RotateKCache(sparsity=0, decoded=spec)
    found = ways.generate(host.attached, inputs, cache, max_new_tokens=ANSWER + 1).sequences
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + ANSWER
    _, heads, width, value_width = cache.layers[0].kv.shape
    queries, positions = 2 * heads * width * 8 * 4, CAP * 4
    assert cache.layers[0].kv.text.capacity <= columns + CAP
    assert cache.nbytes() <= prompt + CAP * heads * (width + value_width) * 4 + queries + positions
    assert torch.equal(found, by_the_book(host, inputs, spec, ANSWER + 1).sequences)


def test_the_second_turn_of_a_batch_is_that_of_the_book(llava):
    inputs = ways.padded(llava.tiny)
    cache = RotateKCache(sparsity=0, decoded=SPEC)
    first = ways.generate(llava.attached, inputs, cache, max_new_tokens=40)
    second = ways.follow_up(llava.tiny, inputs, first.sequences, words(5, 3))
    found = ways.generate(llava.attached, second, cache, max_new_tokens=4)
    # By the book: the first answer as it was left, and what follows it read whole.
    book = Book(decoded_method(SPEC), inputs["input_ids"].shape[1])
    plain = copy.deepcopy(llava.plain)
    plain.set_attn_implementation({"text_config": "book"})
    dense = DynamicCache(config=plain.config)
    ways.generate(plain, inputs, dense, max_new_tokens=40)
    book.evict = lambda *_: None  # the next answer is too short
    expected = ways.generate(plain, second, dense, max_new_tokens=4)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


def test_a_prompt_without_images_is_decoded_within_the_cap(llava):
    inputs = llava.tiny.inputs(llava.tiny.prompt(3, images=()), llava.tiny.prompt(4, images=(), text=3))
    found = ways.generate(llava.attached, inputs, RotateKCache(rank=8, decoded=SPEC), max_new_tokens=40)
    assert torch.equal(found.sequences, by_the_book(llava, inputs, SPEC, 40).sequences)


def test_a_saved_cache_goes_on_evicting(llava, tmp_path):
    inputs = ways.padded(llava.tiny)
    cache = RotateKCache(rank=8, decoded=SPEC)
    begun = ways.generate(llava.attached, inputs, cache, max_new_tokens=30).sequences
    cache.save(tmp_path / "cache.safetensors")
    loaded = RotateKCache.load(tmp_path / "cache.safetensors")
    more = ways.follow_up(llava.tiny, inputs, begun, [])
    found = [ways.generate(llava.attached, more, held, max_new_tokens=30).sequences for held in (cache, loaded)]
    assert torch.equal(*found)
    whole = ways.generate(llava.attached, inputs, RotateKCache(rank=8, decoded=SPEC), max_new_tokens=60).sequences
    assert torch.equal(found[0], whole)


def test_what_cannot_be_done_is_refused(llava):
    inputs = ways.padded(llava.tiny)
    cache = RotateKCache(rank=8, decoded=SPEC)
    length = inputs["input_ids"].shape[1]
    sequences = ways.generate(llava.attached, inputs, cache, max_new_tokens=40).sequences
    with pytest.raises(ValueError, match=f"crop to {length + 5} tokens.*crop to {length}, before the answer"):
        cache.crop(length + 5)
    second = ways.follow_up(llava.tiny, inputs, sequences, words(5, 3))
    second["attention_mask"][0, length + 3] = 0
    with pytest.raises(ValueError, match="show or hide them together"):
        ways.generate(llava.attached, second, copy.deepcopy(cache))
    cache.crop(length)
    assert cache.report().layers[0].evicted == 0
    again = ways.generate(llava.attached, inputs, RotateKCache(rank=8), max_new_tokens=9).sequences
    found = ways.generate(
        llava.attached,
        {k: v for k, v in inputs.items() if k != "pixel_values"}
        | {
            "input_ids": again[:, : length + 1],
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
        },
        cache,
        max_new_tokens=8,
    ).sequences
    assert torch.equal(found, again)
    one = ways.one(llava.tiny)
    with pytest.raises(ValueError, match="assisted decoding takes several"):
        ways.generate(llava.attached, one, RotateKCache(rank=8, decoded=SPEC), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("rkv", "expected how many tokens"),
        ("h2o:64", "must name one of rkv"),
        ("rkv:9", "leaves 7, which must be more than window=8"),
        ("rkv:64,every=60", "raise cap, or lower every or window"),
        ("rkv:64,importance=2", "importance must be in"),
        ("rkv:64,pool=4", "pool must be odd"),
        ("rkv:0", "cap must be at least 1"),
        ("rkv:64,spared=x", "spared must be a number"),
    ],
)
def test_bad_bounds_are_named(spec, error):
    with pytest.raises(ValueError, match=error):
        RotateKCache(rank=8, decoded=spec)


def test_codes_of_all_tokens_go_without_a_bound(tmp_path):
    with pytest.raises(ValueError, match="takes no decoded"):
        RotateKCache(basis=tmp_path / "b.safetensors", text="coded", decoded="rkv:64")


def test_the_estimate_counts_the_bound(llava):
    inputs = llava.tiny.inputs(llava.tiny.prompt(0, images=(0,)))
    visual = int((inputs["input_ids"] == 190).sum())
    cache = RotateKCache(rank=8, decoded=SPEC)
    ways.generate(llava.attached, inputs, cache, max_new_tokens=61)
    estimated = RotateKCache.estimate(
        llava.plain.config,
        visual,
        inputs["input_ids"].shape[1] - visual,
        answer_tokens=60,
        dtype=torch.float32,
        rank=8,
        decoded=SPEC,
    )
    assert estimated.nbytes == cache.nbytes()
