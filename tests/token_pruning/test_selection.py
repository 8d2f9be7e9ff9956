"""Token methods in a cache: exact where nothing is dropped, the formula's tokens elsewhere, in every way of calling."""

import copy

import pytest
import torch
import ways
from checks import AKVQ, decode, kept_positions, make, possible, reached_storages, same
from hosts import Host, build_host
from tiny_models import FAMILIES
from tiny_parts import visual_positions
from transformers import DynamicCache

from rotatek_cache import AirCache, DivPrune, FastV, LookM, PyramidDrop, RotateKCache, VisionZip, VLCache
from rotatek_cache.hf.families import FAMILIES as FAMILY_TABLE
from rotatek_cache.token_pruning.interface import FeatureMethod
from rotatek_cache.token_pruning.registry import TOKENS

EAGER: dict[str, torch.nn.Module] = {}


def eager(host: Host):
    if host.tiny.name not in EAGER:
        model = copy.deepcopy(host.plain)
        model.set_attn_implementation({"text_config": "eager"})
        EAGER[host.tiny.name] = model
    return EAGER[host.tiny.name]


def attention(host: Host, inputs):
    """Attention matrices ``[B, H_q, T, T]`` of all layers, by transformers itself, in float64."""
    return [layer.double() for layer in eager(host)(**inputs, output_attentions=True).attentions]


def last_visual(visual, row):
    return int(visual[row].nonzero().max())


@pytest.mark.parametrize("sparsity", [0, 0.5])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "paligemma"])
def test_fastv_keeps_what_the_last_token_attends_to(family, sparsity):
    host = build_host(family)
    inputs = ways.padded(host.tiny)
    visual = visual_positions(inputs["input_ids"])
    matrices = attention(host, inputs)
    cache = make(FastV(0.4, layer=1), sparsity=sparsity, always_compress=True)()
    host.attached(**inputs, past_key_values=cache)
    for row in range(2):
        scores = matrices[0][row, :, -1].mean(0)
        tokens = visual[row].nonzero().flatten().tolist()
        best = sorted(tokens, key=lambda p, scores=scores: -scores[p])[: round(0.4 * len(tokens))]
        assert kept_positions(cache, 0, row, visual) == tokens
        for layer in (1, 2):
            assert kept_positions(cache, layer, row, visual) == sorted(best)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "llava_next"])
def test_vl_cache_keeps_what_the_formula_says(family):
    host = build_host(family)
    inputs = ways.padded(host.tiny)
    visual, real = visual_positions(inputs["input_ids"]), inputs["attention_mask"].bool()
    matrices = attention(host, inputs)
    cache = make(VLCache(0.3))()
    host.attached(**inputs, past_key_values=cache)
    for row in range(2):
        behind = last_visual(visual, row) + 1
        tokens = visual[row].nonzero().flatten().tolist()
        gammas, scores = [], []
        for matrix in matrices:
            sparse = entries = 0
            for query in range(behind, matrix.shape[-1]):
                weights = matrix[row, :, query, : query + 1][:, real[row, : query + 1]]
                sparse += int((weights < 0.01 * weights.amax(-1, keepdim=True)).sum())
                entries += weights.numel()
            gammas.append(sparse / entries)
            scores.append(matrix[row, :, behind:].sum((0, 1)))
        whole = round(0.3 * 3 * len(tokens))
        shares = [whole * (1 - gamma) / sum(1 - other for other in gammas) for gamma in gammas]
        found = [kept_positions(cache, layer, row, visual) for layer in range(3)]
        assert sum(map(len, found)) == whole
        for layer in range(3):
            budget = len(found[layer])
            assert abs(budget - min(shares[layer], len(tokens))) < 1 or max(shares) > len(tokens)
            recent = int(0.1 * budget)
            early, late = (tokens[:-recent], tokens[-recent:]) if recent else (tokens, [])
            best = sorted(early, key=lambda p, layer=layer: -scores[layer][p])[: budget - recent]
            assert found[layer] == sorted(best + late)


@pytest.mark.parametrize("method", [FastV(0.4), PyramidDrop(0.6)], ids=str)
def test_what_the_prefill_drops_is_lost_to_the_model(method):
    """Decoder layers run by hand: before a layer that drops tokens they are cut out of the hidden states."""
    host = build_host("llava")
    inputs = host.tiny.inputs(host.tiny.prompt(3))
    prompt = inputs["input_ids"].shape[1]
    visual = torch.nn.functional.pad(visual_positions(inputs["input_ids"])[0], (0, 3))
    embeds = ways._merged_embeddings(host.plain, inputs)
    more = torch.tensor([[20, 31, 42]])
    embeds = torch.cat([embeds, host.plain.get_input_embeddings()(more)], 1)
    cuts = {stage.pruned[0]: stage.watched[0] for stage in method.stages(range(3))}
    text = host.plain.model.language_model
    reader = eager(host).model.language_model
    hidden, positions, scores, counts = embeds, torch.arange(embeds.shape[1]), {}, []
    for index, layer in enumerate(text.layers):
        if index in cuts:
            held = (positions < prompt) & visual[positions]
            counts.append(max(1, round(method.keep * int(held.sum()))))
            lost = held.clone()
            lost[scores[cuts[index]].masked_fill(~held, -1).topk(counts[-1]).indices] = False
            hidden, positions = hidden[:, ~lost], positions[~lost]
        rotary = text.rotary_emb(hidden, position_ids=positions[None])
        ends = int((positions < prompt).sum())
        mask = torch.full((ends, ends), -torch.inf).triu(1)[None, None]
        normed = reader.layers[index].input_layernorm(hidden[:, :ends])
        part = tuple(one[:, :ends] for one in rotary)
        weights = reader.layers[index].self_attn(normed, attention_mask=mask, position_embeddings=part)[1]
        scores[index] = torch.nn.functional.pad(weights[0, :, -1].mean(0), (0, len(positions) - ends))
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    assert counts == sorted(counts, reverse=True)
    expected = host.plain.lm_head(text.norm(hidden))[:, -4:]
    cache = make(method)()
    got = [host.attached(**inputs, past_key_values=cache).logits[:, -1:]]
    got += [host.attached(input_ids=token[None, None], past_key_values=cache).logits for token in more[0]]
    torch.testing.assert_close(torch.cat(got, 1), expected, atol=2e-4, rtol=1e-4)
    assert prompt == cache.get_seq_length() - 3
    held = [set(kept_positions(cache, layer, 0, visual[None])) for layer in range(3)]
    assert held[2] <= held[1] <= held[0]
    assert [len(held[layer]) for layer in cuts] == counts


@pytest.mark.parametrize("method", [VLCache(0.3), VLCache(0.2, scope="prompt"), LookM(0.3, merge="none")], ids=str)
def test_what_is_dropped_behind_the_prefill_is_cut_out_of_a_dense_cache(method):
    host = build_host("llava")
    inputs = host.tiny.inputs(host.tiny.prompt(3))
    prompt = inputs["input_ids"].shape[1]
    dense, cache, every = DynamicCache(), make(method)(), torch.ones(1, prompt, dtype=torch.bool)
    logits = host.attached(**inputs, past_key_values=cache).logits
    torch.testing.assert_close(logits, host.plain(**inputs, past_key_values=dense).logits, atol=5e-5, rtol=1e-5)
    for layer, cached in enumerate(dense.layers):
        kept = kept_positions(cache, layer, 0, every)
        assert len(kept) < prompt
        cached.keys, cached.values = cached.keys[:, :, kept], cached.values[:, :, kept]
    for place, token in enumerate([20, 31, 42]):
        step = {"input_ids": torch.tensor([[token]]), "position_ids": torch.tensor([[prompt + place]])}
        expected = host.plain(**step, past_key_values=dense).logits
        got = host.attached(input_ids=step["input_ids"], past_key_values=cache).logits
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        every = torch.nn.functional.pad(every, (0, 1), value=True)


def test_vl_cache_of_the_whole_prompt_in_a_batch():
    """Text counts: the budget is that of the row's own tokens, padding left out, and a row of text keeps all."""
    host = build_host("llava")
    inputs = host.tiny.inputs(host.tiny.prompt(1), host.tiny.prompt(2, images=(), text=12))
    cache = make(VLCache(0.25, scope="prompt"), sparsity=0.5, always_compress=True)()
    host.attached(**inputs, past_key_values=cache)
    own = inputs["attention_mask"].sum(1).tolist()
    seen = inputs["attention_mask"].bool()
    held = [sum(len(kept_positions(cache, layer, row, seen)) for layer in range(3)) for row in range(2)]
    assert held == [round(0.25 * 3 * own[0]), 3 * own[1]]
    assert sum(layer.dropped for layer in cache.report().layers) == 3 * own[0] - held[0]


# Ways that give features which were computed elsewhere, or embeddings alone.
NO_FEATURES = ("merged_embeddings", "forward_with_embeddings")
# Not those that are part of another, nor those in which no method has a part that it has not in the others.
ELSEWHERE = ("greedy", "returned_cache", "inference_mode", "long_answer", "video", "interleaved_conversations")
SOME_WAYS = [name for name in ways.WAYS if name not in (*ELSEWHERE, "interleaved_forwards")]


# One method of each kind goes through all ways; the others share its path.
EVERY_WAY = ("pyramid_drop", "vl_cache", "visionzip")
A_FEW_WAYS = ("padded_batch", "beams", "second_turn_padded", "chunked_prefill_padded")


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name in TOKENS for way in (SOME_WAYS if name in EVERY_WAY else A_FEW_WAYS)],
)
def test_everything_kept_is_dynamic_cache(name, way):
    host = build_host("llava")
    # Where nothing is dropped, all tokens stay as they are that keep 16 bits.
    better = {} if TOKENS[name].drops else {"bits": 16, "text_layers": 0}
    maker = make(TOKENS[name](keep=1.0, **better), **(AKVQ if better else {}))
    if way in NO_FEATURES and issubclass(TOKENS[name], FeatureMethod):
        with pytest.raises(RuntimeError, match=r"chosen from image features.*were not seen"):
            ways.WAYS[way](host.tiny, host.attached, maker)
        return
    same(ways.WAYS[way](host.tiny, host.attached, maker), possible("llava", way))


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_kept_is_dynamic_cache_in_every_family(family):
    host = build_host(family)
    same(ways.padded_batch(host.tiny, host.attached, make(VLCache(1.0))), possible(family, "padded_batch"))


@pytest.mark.parametrize("method", [VLCache(0.4), DivPrune(0.4), VisionZip(0.4)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_tokens_in_every_family(family, method):
    host = build_host(family)
    if isinstance(method, VisionZip) and FAMILY_TABLE[host.tiny.model_type].encoder is None:
        pytest.skip("the vision encoder cannot be read")
    if isinstance(method, FeatureMethod) and host.tiny.linear:
        pytest.skip("refused, see tests/hf/test_linear_layers.py")
    cache = make(method)()
    assert all(result.isfinite().all() for result in ways.padded_batch(host.tiny, host.attached, lambda: cache))
    tokens = int(visual_positions(ways.padded(host.tiny)["input_ids"]).sum())
    dropped = [layer.dropped for layer in cache.report().layers if layer.kind == "RotateKLayer"]
    assert sum(dropped) == pytest.approx(0.6 * tokens * len(dropped), abs=2 * len(dropped))


@pytest.mark.parametrize("way", SOME_WAYS)
@pytest.mark.parametrize("method", [PyramidDrop(0.3), VLCache(0.3), VisionZip(0.3), DivPrune(0.3)], ids=str)
def test_fewer_tokens_run_everywhere(method, way):
    host = build_host("qwen2_5_vl")
    if way == "forward_loop":
        pytest.skip("not possible with DynamicCache either")
    precomputed = (*NO_FEATURES, "second_turn_with_an_image")
    if way in precomputed and isinstance(method, FeatureMethod):
        with pytest.raises(RuntimeError, match="chosen from image features"):
            ways.WAYS[way](host.tiny, host.attached, make(method))
        return
    options = {"sparsity": 0.5, "always_compress": True}
    found = ways.WAYS[way](host.tiny, host.attached, make(method, **options))
    for ours, theirs in zip(found, possible("qwen2_5_vl", way), strict=True):
        assert ours.isfinite().all()
        assert ours.shape == theirs.shape


@pytest.mark.parametrize("method", [FastV(0.3), VLCache(0.3)], ids=str)
@pytest.mark.parametrize("way", ["prompt_lookup", "assistant_model"])
def test_assisted_decoding_chooses_the_tokens_that_greedy_decoding_does(llava: Host, way, method):
    """The first forward brings guesses, which may be wrong, behind the prompt."""
    prompt = llava.tiny.prompt(3)
    options = {}
    if way == "prompt_lookup":
        prompt.ids += prompt.ids[-5:] * 3
        options = {"prompt_lookup_num_tokens": 4}
    else:
        options = {"assistant_model": copy.deepcopy(llava.attached)}
        for parameter in options["assistant_model"].model.language_model.parameters():
            parameter.data *= 1.1
    inputs = llava.tiny.inputs(prompt)
    plain = ways.generate(llava.attached, inputs, make(method)(), max_new_tokens=10)
    assisted = ways.generate(llava.attached, inputs, make(method)(), max_new_tokens=10, **options)
    assert torch.equal(plain.sequences, assisted.sequences)
    torch.testing.assert_close(torch.stack(plain.logits), torch.stack(assisted.logits), atol=1e-4, rtol=1e-4)


METHODS = [
    FastV(0.4),
    FastV(0.4, layer=1),
    PyramidDrop(0.4),
    VLCache(0.4),
    VLCache(0.4, scope="prompt"),
    VisionZip(0.4),
    DivPrune(0.4),
    AirCache(0.4),
    LookM(0.4),
]
OPTIONS = [{}, {"sparsity": None, "rank": 8, "always_compress": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_row_does_not_depend_on_its_batch(llava: Host, method, options):
    prompts = [llava.tiny.prompt(1, images=(0,)), llava.tiny.prompt(2, images=(0, 0), text=2, tail=3)]
    tokens = torch.tensor([[20, 30, 40, 50], [21, 31, 41, 51]])
    together = decode(llava, llava.tiny.inputs(*prompts), make(method, **options)(), tokens)
    for row, prompt in enumerate(prompts):
        alone = decode(llava, llava.tiny.inputs(prompt), make(method, **options)(), tokens[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_beams_and_selection_keep_each_row_its_own(llava: Host, method, options):
    inputs = llava.tiny.inputs(llava.tiny.prompt(1), llava.tiny.prompt(2, text=2, tail=3))
    tokens = torch.tensor([[20, 30, 40], [21, 31, 41]])
    cache = make(method, **options)()
    llava.attached(**inputs, past_key_values=cache)
    chosen = copy.deepcopy(cache)
    index = torch.tensor([1, 0, 1])
    chosen.reorder_cache(torch.tensor([1, 0]))
    chosen.batch_select_indices(torch.tensor([0, 1, 0]))
    logits = []
    for held, rows in ((cache, torch.arange(2)), (chosen, index)):
        mask = torch.nn.functional.pad(inputs["attention_mask"][rows], (0, 3), value=1)
        positions = (mask.cumsum(1) - 1)[:, -3:]
        logits.append(
            llava.attached(
                input_ids=tokens[rows], attention_mask=mask, position_ids=positions, past_key_values=held
            ).logits
        )
    torch.testing.assert_close(logits[1], logits[0][index], atol=1e-4, rtol=1e-4)
    dropped = [layer.dropped for layer in cache.report().layers]
    assert [layer.dropped for layer in chosen.report().layers] != dropped
    assert sum(dropped) > 0


@pytest.mark.parametrize(
    ("method", "waiting"),
    [
        (VLCache(0.4), [0, 1, 2]),
        (AirCache(0.4), [0, 1, 2]),
        (LookM(0.4), [0, 0, 0]),
        (FastV(0.4), [0, 0, 0]),
        (PyramidDrop(0.4), [0, 0, 0]),
    ],
    ids=str,
)
def test_layers_wait_for_one_another_only_where_the_method_compares_them(llava: Host, monkeypatch, method, waiting):
    """How many layers are still dense when the next one begins."""
    from rotatek_cache.hf.cache import RotateKLayer

    cache, counts, update = make(method)(), [], RotateKLayer.update

    def noting(self, *args, **kwargs):
        counts.append(sum(layer.kv.pending is not None for layer in cache.layers))
        return update(self, *args, **kwargs)

    monkeypatch.setattr(RotateKLayer, "update", noting)
    llava.attached(**ways.padded(llava.tiny), past_key_values=cache)
    assert counts == waiting
    assert not any(layer.kv.pending for layer in cache.layers)


@pytest.mark.parametrize(
    "name", [name for name in TOKENS if TOKENS[name].drops and not getattr(TOKENS[name], "by_head", False)]
)
def test_bytes_are_those_of_the_kept_tokens(llava: Host, name):
    inputs = ways.padded(llava.tiny)
    tokens = int(visual_positions(inputs["input_ids"]).sum())
    held = {}
    for keep in (1.0, 0.25):
        cache = make(TOKENS[name](keep=keep))()
        llava.attached(**inputs, past_key_values=cache)
        assert cache.nbytes() == sum(reached_storages(cache, {}, set()).values())
        held[keep] = [(sum(s.tokens for s in layer.segments), layer.dropped) for layer in cache.report().layers]
    assert held[1.0] == [(tokens, 0)] * 3
    assert all(stored + dropped == tokens for stored, dropped in held[0.25])
    assert sum(dropped for _, dropped in held[0.25]) > 0


def test_a_second_image_is_pruned_on_its_own(llava: Host):
    inputs = ways.one(llava.tiny)
    cache = make(VLCache(0.5), always_compress=True, sparsity=0.5)()
    llava.attached(**inputs, past_key_values=cache)
    before = [layer.dropped for layer in cache.report().layers]
    ids, content = llava.tiny.image(0, torch.Generator().manual_seed(77))
    new = llava.tiny.inputs(ways.Prompt([*ways.words(3, 1), *ids, *ways.words(4, 2)], [content]))
    del new["attention_mask"]
    llava.attached(**new, past_key_values=cache)
    after = [layer.dropped for layer in cache.report().layers]
    assert sum(after) - sum(before) == round(0.5 * 3 * len([i for i in ids if i == ways.IMAGE]))
    assert all(len(layer.kv.segments) == 2 for layer in cache.layers)
    cache.crop(inputs["input_ids"].shape[1] - cache.get_seq_length())
    assert [layer.dropped for layer in cache.report().layers] == before


def test_additive_masks_choose_the_same_tokens(llava: Host):
    from rotatek_cache.hf.attention import hide

    hidden = torch.tensor([[False, True, False, True]])
    mask = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    shown = hide(mask, hidden)[0, 0].tolist()
    assert shown == [
        [True, False, False, False],
        [True, True, False, False],
        [True, False, True, False],
        [True, False, True, True],
    ]
    additive = torch.zeros(1, 1, 4, 4).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert (hide(additive, hidden) == 0)[0, 0].tolist() == shown


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_layers_that_are_not_known(llava: Host):
    model = copy.deepcopy(llava.plain)
    model.set_attn_implementation({"text_config": "rotatek"})
    inputs = ways.padded(llava.tiny)
    mask = visual_positions(inputs["input_ids"])
    with pytest.raises(RuntimeError, match=r"does not know the model's layers.*config=model\.config"):
        model(**inputs, past_key_values=RotateKCache(sparsity=0, tokens="vl_cache:0.5", visual_mask=mask))
    cache = RotateKCache(sparsity=0, tokens="vl_cache:0.5", visual_mask=mask, config=model.config)
    got = model(**inputs, past_key_values=cache).logits
    expected = llava.attached(**inputs, past_key_values=make(VLCache(0.5))()).logits
    torch.testing.assert_close(got, expected)


def test_fastv_with_sliding_layers():
    host = build_host("gemma3")
    with pytest.raises(ValueError, match=r"FastV reads layer 0 and masks .* from 1 on.*\[0.*stock cache layer"):
        host.attached(**ways.one(host.tiny), past_key_values=make(FastV(0.5, layer=1))())


def test_pyramid_drop_with_sliding_layers():
    host = build_host("gemma3")
    with pytest.raises(ValueError, match=r"PyramidDrop reads layer 0 and masks .*stock cache layer"):
        host.attached(**ways.one(host.tiny), past_key_values=make(PyramidDrop(0.5))())


def test_fastv_behind_the_last_layer(llava: Host):
    with pytest.raises(ValueError, match="FastV: layer must be below the model's 3 layers, got 3"):
        llava.attached(**ways.one(llava.tiny), past_key_values=make(FastV(0.5, layer=3))())


def test_streaming():
    with pytest.raises(ValueError, match="streaming=True"):
        RotateKCache(sparsity=0.5, basis="b.safetensors", streaming=True, tokens="fastv:0.5")


def test_videos_are_not_chosen_from():
    host = build_host("qwen2_vl")
    inputs = host.tiny.inputs(host.tiny.prompt(9, images=(), videos=1))
    with pytest.raises(RuntimeError, match="no videos"):
        ways.generate(host.attached, inputs, make(DivPrune(0.5))())
    cache = make(VLCache(0.5))()
    ways.generate(host.attached, inputs, cache)
    assert all(layer.dropped for layer in cache.report().layers)
