"""The coordinator decides and layers do as they are told; what layers share is made once."""

import ast
from pathlib import Path

import pytest
import torch
from hosts import Host

from rotatek_cache import FitOptions, LayerKV, RotateKCache, attend
from rotatek_cache.cache.coordinator import Coordinator
from rotatek_cache.cache.expected_prompt import ExpectedPrompt
from rotatek_cache.cache.seal_plan import SealPlan
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.core.attention import causal_mask
from rotatek_cache.core.row_layout import ROW_BYTES, TOKEN_BYTES

PACKAGE = Path(__file__).parents[2] / "rotatek_cache"
TOKENS, PADDING, IMAGES = 120, (0, 15), (80, 70)


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere, for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("rotatek_cache.") for name in found if name.startswith("rotatek_cache")}


def test_a_layer_knows_neither_coordinator_nor_token_methods():
    names = imported(PACKAGE / "cache" / "layer.py")
    assert "cache.seal_plan" in names
    assert not [
        name
        for name in names
        if name.startswith(("cache.coordinator", "cache.selection", "cache.budget", "token_pruning"))
    ]


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").glob("*.py")), ids=lambda path: path.stem)
def test_core_imports_no_storage(path):
    assert not [name for name in imported(path) if name.startswith(("cache", "codecs", "token_pruning", "hf"))]


def prompt() -> tuple[VisualPositions, list[LayerKV], torch.Tensor, torch.Tensor]:
    """Two layers that hold a prompt of two rows, the second one padded on the left: positions, queries, mask."""
    draw = torch.Generator().manual_seed(0)
    columns = torch.arange(TOKENS)
    visual = torch.stack([(columns >= p + 3) & (columns < p + 3 + n) for p, n in zip(PADDING, IMAGES, strict=True)])
    positions = VisualPositions()
    positions.announce(0, TOKENS, visual)
    layers = [LayerKV(FitOptions(rank=8), positions, index) for index in range(2)]
    for layer in layers:
        layer.append(*torch.randn(2, 2, 2, TOKENS, 16, generator=draw))
    seen = columns >= torch.tensor(PADDING)[:, None]
    mask = causal_mask(TOKENS, TOKENS, torch.device("cpu")) & seen[:, None, None]
    return positions, layers, torch.randn(2, 4, TOKENS, 16, generator=draw), mask


def test_a_layer_seals_when_told_as_its_coordinator_would_have_it():
    positions, (told, watched), query, mask = prompt()
    watched.append(*(states[:, :, :0] for states in told.dense()))
    watched.pending.keys, watched.pending.values = told.dense()
    plan = positions.plan(0, TOKENS, mask)
    assert told.segments == [] and told.pending is not None  # to know the plan seals nothing
    told.keep_queries(query)
    told.seal(plan)
    Coordinator(positions).observe(watched, query, mask)
    assert told.pending is None and watched.pending is None
    assert told.segments[0].lengths.tolist() == list(IMAGES)
    step = torch.randn(2, 4, 1, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(attend(step, told.views(None), 0.25), attend(step, watched.views(None), 0.25))


def test_what_layers_merge_is_done_before_they_store():
    positions, (layer, _), query, mask = prompt()
    keys, _ = layer.dense()
    layer.keep_queries(query)
    layer.seal(positions.plan(0, TOKENS, mask), lambda keys, values: (keys, values * 0))
    assert not bool(layer.segments[0].values.data.any()) and not bool(layer.text.values.any())
    assert torch.equal(layer.text.logical()[0][0, :, -1], keys[0, :, -1])


def test_a_reset_layer_keeps_its_options_and_starts_anew():
    positions, (layer, _), query, mask = prompt()
    Coordinator(positions).observe(layer, query, mask)
    options = layer.options
    layer.reset()
    assert layer.options is options
    assert (layer.length, layer.segments, layer.pending, layer.shape, layer.tensors()) == (0, [], None, None, [])


def test_layers_of_a_forward_share_their_tables_and_the_next_forward_makes_new_ones():
    positions, layers, query, mask = prompt()
    coordinator = Coordinator(positions)
    for layer in layers:
        coordinator.observe(layer, query, mask)
    step = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    step[1, ..., : PADDING[1]] = False
    first, second = (layer.views(step) for layer in layers)
    assert [len(views) for views in (first, second)] == [2, 2]
    assert first[1].starts is second[1].starts and first[1].lengths is second[1].lengths
    assert first[1].mask is second[1].mask
    assert first[1].lengths.tolist() == [TOKENS - IMAGES[0], TOKENS - PADDING[1] - IMAGES[1]]
    assert bool(first[1].mask[0].all()) and first[0].mask.shape == (2, 1, max(IMAGES))
    positions.end_forward()
    assert layers[0].views(step)[1].starts is not first[1].starts
    positions.complete(TOKENS + 1, 2)
    for layer in layers:
        layer.append(*torch.randn(2, 2, 2, 1, 16))
    assert [layer.views(None)[1].lengths.tolist() for layer in layers] == [(first[1].lengths + 1).tolist()] * 2


def test_a_plan_leaves_the_last_visual_tokens_dense_and_what_is_dropped_out():
    visual = torch.zeros(2, 10, dtype=torch.bool)
    visual[0, 1:8], visual[1, 2:4] = True, True
    plan = SealPlan(visual, torch.ones_like(visual), 5, 15)
    assert plan.keep_last_dense(0) is plan and plan.keep_last_dense(3) is plan.keep_last_dense(3)
    assert plan.keep_last_dense(3).counts == [4, 0]
    kept = visual.clone()
    kept[0, 1:4] = False
    pruned = plan.keeping(kept)
    assert pruned is plan.keeping(kept) and pruned.counts == [4, 2]
    last = pruned.keep_last_dense(1)
    assert last.counts == [3, 1] and last.dropped is pruned.dropped
    assert last.visual[0].nonzero()[:, 0].tolist() == [4, 5, 6]
    _, alignment = last.text_alignment(((last, (0, 1)),), None, 0, torch.device("cpu"))
    assert alignment.positions[0, alignment.first[0] :].tolist() == [5, 12, 13, 14]


def test_what_is_expected_is_told_and_forgotten_by_calls(llava: Host):
    positions = VisualPositions()
    visual = torch.tensor([[False, True, True, False]])
    prompt = ExpectedPrompt(3, visual, torch.ones_like(visual), repeats=2)
    positions.expect(prompt)
    assert positions.expected is prompt and (prompt.rows, prompt.end) == (2, 7)
    assert prompt.agrees(3, visual[:, :2].expand(2, -1), 2) and not prompt.agrees(3, visual[:, :2], 2)
    assert prompt.counts(5) == ((1, 1), (1, 1))
    positions.expect(None)
    assert positions.expected is None
    cache = RotateKCache(sparsity=0.5)
    inputs = llava.tiny.inputs(llava.tiny.prompt(1), llava.tiny.prompt(2, text=2))
    llava.attached.generate(**inputs, past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert cache.positions.expected is None
    assert torch.equal(cache.positions.prompt, inputs["input_ids"])


@pytest.mark.parametrize(("tokens", "dropped"), [(None, False), ("divprune:0.5", True)])
def test_bytes_of_positions_and_tables_are_those_of_their_storage(llava: Host, tokens, dropped):
    inputs = llava.tiny.inputs(llava.tiny.prompt(1, images=(0, 0)), llava.tiny.prompt(2, images=(0,) * 3))
    cache = RotateKCache.for_study(sparsity=0.5, always_compress=True, tokens=tokens)
    llava.attached(**inputs, past_key_values=cache)
    held = sum(tensor.nbytes for tensor in cache.positions.tensors())
    assert held == inputs["input_ids"].numel() * VisualPositions.bytes_per_position(tokens_dropped=dropped)
    for layer in cache.layers:
        (segment,), text = layer.kv.segments, layer.kv.text
        tables = [segment.positions, segment.starts, segment.lengths, segment.basis_rows]
        tables += [text.alignment.positions, text.alignment.first]
        tokens = len(segment.positions) + text.alignment.positions.numel()
        assert sum(table.nbytes for table in tables) == TOKEN_BYTES * tokens + 2 * ROW_BYTES


@pytest.mark.parametrize(
    "options", [{"budget": "0.6x", "tokens": "vl_cache"}, {"budget": "0.8x"}, {"sparsity": 0.5, "tokens": "look_m:0.5"}]
)
def test_a_reset_cache_does_as_a_new_one(llava: Host, options):
    first = llava.tiny.inputs(*(llava.tiny.prompt(seed, images=(0,) * count) for seed, count in ((1, 8), (2, 6))))
    second = llava.tiny.inputs(*(llava.tiny.prompt(seed, images=(0,) * count) for seed, count in ((3, 5), (4, 7))))
    used, new = RotateKCache(**options), RotateKCache(**options)
    llava.attached(**first, past_key_values=used)
    coordinator, layers = used.coordinator, [layer.kv for layer in used.layers]
    used.reset()
    assert used.nbytes() == 0
    logits = [llava.attached(**second, past_key_values=cache).logits for cache in (used, new)]
    torch.testing.assert_close(logits[0], logits[1])
    assert used.coordinator is coordinator and list(coordinator.layers.values()) == layers
    assert str(used.report()) == str(new.report())


def test_a_budget_needs_to_know_the_layers():
    cache = RotateKCache(budget="0.5x", visual_mask=torch.ones(1, 4, dtype=torch.bool))
    assert cache.coordinator.needs_layers and not RotateKCache(sparsity=0.5).coordinator.needs_layers
    with pytest.raises(RuntimeError, match="settled for all layers together"):
        cache.update(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), 0)
