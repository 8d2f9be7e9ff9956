"""HybridKV: heads that store and read tokens of their own, against a dense cache behind a mask for each head."""

import copy
import dataclasses

import pytest
import torch
import ways
from checks import reached_storages
from hosts import build_host
from recorded_graph import RecordedGraph, attend_on_device
from tiny_parts import words
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from rotatek_cache import HybridKV, RotateKCache
from rotatek_cache.calibration.gather import calibrate
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.fingerprint import fingerprint
from rotatek_cache.core.retrieval import Chunks
from rotatek_cache.hf.attachment import inner_model
from rotatek_cache.token_pruning.interface import AttentionRows

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


def test_shares_by_hand():
    method = HybridKV(keep=0.5, static=0.6, uniform=0.0, chunk=2)
    # One row, 10 visual tokens, 2 layers of 2 heads; the best tenth is one token.
    scores = torch.tensor(
        [
            [[[0.8, 0.2, *[0.0] * 8], [0.1] * 10]],
            [[[0.4, 0.3, 0.3, *[0.0] * 7], [0.5, 0.5, *[0.0] * 8]]],
        ]
    )
    visual = torch.ones(1, 10, dtype=torch.bool)
    concentrated = method.concentration(scores, visual)
    torch.testing.assert_close(concentrated, torch.tensor([[[0.8, 0.1]], [[0.4, 0.5]]], dtype=torch.float64))
    # 20 reads of 40. Layers by 0.55 : 0.55; heads of the first by 0.2 : 0.9 (1.8 : 8.2), of the second by 0.6 : 0.5.
    assert method.head_budgets(concentrated, torch.tensor([10])).tolist() == [[[2, 8]], [[5, 5]]]
    choices = method.select({3: (scores[0],), 5: (scores[1],)}, visual, (3, 5))
    assert choices[3].retrieves.tolist() == [[False, True]]
    assert choices[3].stored.long().tolist() == [[[1, 1, *[0] * 8], [1] * 10]]
    assert choices[5].retrieves.tolist() == [[True, True]]
    assert bool(choices[5].stored.all())
    # Query heads of a KV head are added up.
    rows = AttentionRows(
        torch.arange(8.0).reshape(1, 4, 1, 2), torch.ones(1, 1, 2), torch.ones(1, 1), torch.ones(1, 2), heads=2
    )
    assert method.summarise(rows)[0].tolist() == [[[2.0, 4.0], [10.0, 12.0]]]


def test_chunks_by_hand():
    # Row 0 has 5 tokens in chunks of 2, row 1 none, row 2 has 3.
    keys = torch.tensor([[1.0, 0], [3.0, 0], [0, 1.0], [0, 1.0], [-9.0, 0], [0, 5.0], [0, 5.0], [7.0, 0]])
    lengths = torch.tensor([5, 0, 3], dtype=torch.int32)
    chunks = Chunks.of(keys, torch.tensor([0, 5, 5]), lengths, torch.tensor([3, 0, 2]), 2)
    assert chunks.means.tolist() == [[2, 0], [0, 1], [-9, 0], [0, 5], [7, 0]]
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[:, None].expand(3, 2, 1, 2)  # the larger of two heads counts
    tokens, found = chunks.best(query, lengths)
    assert found.tolist() == [4, 0, 1]
    assert tokens[0, :4].tolist() == [0, 1, 2, 3]
    assert tokens[2, :1].tolist() == [2]  # the last chunk has one token


@pytest.mark.parametrize(
    "options", [{"sparsity": 0}, {"rank": 8}, {"rank": 8, "key_bits": 4, "value_bits": 4}], ids=str
)
@pytest.mark.parametrize("way", ["padded_batch", "beams", "second_turn_padded"])
def test_heads_of_their_own_are_read_from_a_graph(options, way, llava, monkeypatch):
    monkeypatch.setattr("rotatek_cache.hf.attention.attend", attend_on_device)
    RecordedGraph.made.clear()
    model = copy.deepcopy(llava.attached)
    graphs = inner_model(model)._rotatek.graphs
    graphs.new_graph = RecordedGraph

    def make(visual_mask=None):
        return RotateKCache(**options, tokens=METHOD, visual_mask=visual_mask)

    graphs.limit = 0
    expected = ways.WAYS[way](llava.tiny, model, make)
    graphs.limit = 4
    found = ways.WAYS[way](llava.tiny, model, make)
    assert any(graph.replays for graph in RecordedGraph.made)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tokens": "hybrid_kv"}, "keep must be given"),
        ({"tokens": "hybrid_kv", "budget": "0.5x"}, "gives each head tokens of its own"),
        ({"tokens": "hybrid_kv:0.3", "sparsity": 0.5, "key_bits": "auto"}, "stored in different forms"),
        ({"tokens": "hybrid_kv:0.3", "energy": 0.9}, "energy=0.9 lets heads"),
        ({"tokens": "hybrid_kv:0.3,static=2", "rank": 8}, "static must be in"),
        ({"tokens": "hybrid_kv:0.3,chunk=0", "rank": 8}, "chunk must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_named(options, error):
    with pytest.raises(ValueError, match=error):
        RotateKCache(**({"rank": 8} if options.keys() <= {"tokens"} else {}) | options)


def test_a_prompt_without_images_is_dense(llava):
    inputs = llava.tiny.inputs(llava.tiny.prompt(3, images=()), llava.tiny.prompt(4, images=(), text=3))
    found = ways.generate(llava.attached, inputs, RotateKCache(rank=8, tokens=METHOD))
    expected = ways.generate(llava.plain, inputs, DynamicCache(config=llava.plain.config))
    assert torch.equal(found.sequences, expected.sequences)


def test_bytes_are_those_of_what_heads_store(llava, tmp_path):
    inputs = ways.padded(llava.tiny)
    cache = RotateKCache(sparsity=0, tokens=METHOD)
    before = ways.generate(llava.attached, inputs, cache, max_new_tokens=4).sequences
    for layer in cache.report().layers:
        _, heads, width, value_width = cache.layers[layer.index].kv.shape
        stored = sum(sum(segment.by_head) for segment in layer.segments)
        assert sum(segment.key_bytes for segment in layer.segments) == stored * width * 4
        assert sum(segment.value_bytes for segment in layer.segments) == stored * value_width * 4
        assert stored < heads * int((inputs["input_ids"] == 190).sum())
    cache.save(tmp_path / "cache.safetensors")
    more = ways.follow_up(llava.tiny, inputs, before, [])
    found = [
        ways.generate(llava.attached, more, held).sequences
        for held in (cache, RotateKCache.load(tmp_path / "cache.safetensors"))
    ]
    assert torch.equal(*found)
    cache.crop(5)
    assert not cache.layers[0].kv.segments


@pytest.mark.parametrize("rows", [1, 2])
def test_what_heads_need_of_a_calibrated_basis_is_the_model_s_or_counted(llava, tmp_path, rows):
    path = tmp_path / "basis.safetensors"
    state = Calibration(fingerprint(llava.attached), "llava")
    calibrate(llava.attached, [llava.tiny.inputs(llava.tiny.prompt())], state)
    state.write_basis(path)
    cache = RotateKCache.for_study(sparsity=0.5, basis=path, tokens=METHOD, always_compress=True)
    ways.generate(llava.attached, llava.tiny.inputs(*map(llava.tiny.prompt, range(rows))), cache)
    model_s = reached_storages(cache.calibrated, {}, set())
    counted = {tensor.untyped_storage().data_ptr() for tensor in cache.tensors()}
    for layer in cache.layers:
        assert layer.kv.segments
        for segment in layer.kv.segments:
            basis = segment.keys.basis
            assert basis.shared == (rows == 1)
            assert basis.B.untyped_storage().data_ptr() in (model_s if rows == 1 else counted)
