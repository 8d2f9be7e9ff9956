"""Methods that choose before the language model: which patches a token shows, and what the model then sees of it."""

import copy
import sys
import threading
from dataclasses import replace

import pytest
import torch
import ways
from checks import kept_positions, make
from hosts import build_host
from tiny_models import FAMILIES
from tiny_more import EVERY
from tiny_parts import visual_positions
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rotatek_cache import DivPrune, RotateKCache, VisionZip
from rotatek_cache.hf import families
from rotatek_cache.hf.encoders import encoder_tap, token_signal
from rotatek_cache.hf.feature_choice import choose

# Families whose vision encoder a method can read.
READABLE = [name for name, tiny in EVERY.items() if families.FAMILIES[tiny.model_type].encoder]
PIXELS = ("pixel_values", "high_res_pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask")


def encode(model, inputs, **options):
    """The features of the images, and the arguments of the call."""
    given = {name: inputs[name] for name in PIXELS if name in inputs} | options
    return model.model.get_image_features(**given, return_dict=True), given


def listen(model, inputs, method):
    """A tap after the images were encoded, the features, and the arguments."""
    with encoder_tap(model.model, method, {name: inputs[name] for name in PIXELS if name in inputs}) as tap:
        model.model._rotatek.taps[threading.get_ident()] = tap
        output, given = encode(model, inputs)
        model.model._rotatek.taps.clear()
    features = output.pooler_output
    return tap, torch.cat(list(features)), [len(image) for image in features], given


def test_visionzip_keeps_what_the_class_token_attends_to():
    """CLIP: the class token's row of the layer that the features come from, by transformers itself."""
    host = build_host("llava")
    inputs = ways.padded(host.tiny)
    tower = copy.deepcopy(host.plain.model.vision_tower)
    tower.set_attn_implementation("eager")
    seen = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    features = torch.stack(host.plain.model.get_image_features(inputs["pixel_values"]).pooler_output)
    layer = tower.encoder.layers[-2] if hasattr(tower, "encoder") else tower.vision_model.encoder.layers[-2]
    keys = layer.self_attn.k_proj(layer.layer_norm1(seen.hidden_states[-3]))[:, 1:].double()
    keys = keys.unflatten(-1, (layer.self_attn.num_heads, -1)).mean(2)
    cache = make(VisionZip(0.4, contextual=0.1))()
    captured = ways_embeddings(host.attached, inputs, cache)
    visual = visual_positions(inputs["input_ids"])
    for row in range(2):
        scores = seen.attentions[-2][row, :, 0, 1:].double().mean(0)
        count = len(scores)
        dominant = scores.topk(round(0.4 * count) - round(0.1 * count)).indices.tolist()
        others = [i for i in range(count) if i not in dominant]
        step = len(others) // round(0.1 * count)
        targets = others[::step][: round(0.1 * count)]
        tokens = visual[row].nonzero().flatten()
        for layer_index in range(3):
            expected = sorted(tokens[i].item() for i in dominant + targets)
            assert kept_positions(cache, layer_index, row, visual) == expected
        groups = {target: [] for target in targets}
        for token in (i for i in others if i not in targets):
            cosines = torch.nn.functional.cosine_similarity(keys[row, token][None], keys[row, targets])
            groups[targets[int(cosines.argmax())]].append(token)
        for target, members in groups.items():
            expected = features[row, target] + (features[row, members].mean(0) if members else 0)
            torch.testing.assert_close(captured[row, tokens[target]], expected, atol=1e-5, rtol=1e-5)
        for token in dominant:
            torch.testing.assert_close(captured[row, tokens[token]], features[row, token])


def ways_embeddings(model, inputs, cache):
    """What the text model is handed in a forward with `cache`."""
    captured = {}
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: captured.update(embeds=kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    model(**inputs, past_key_values=cache)
    handle.remove()
    return captured["embeds"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_visionzip_maps_patches_of_an_encoder_without_class_token(family):
    """Attention received in the last block, computed from its input; patches are found again by the merger's output."""
    host = build_host(family)
    inputs = host.tiny.inputs(host.tiny.prompt(1, images=(1,)))
    visual_tower = host.plain.model.visual
    block, captured = visual_tower.blocks[-1], {}
    handles = [
        block.register_forward_pre_hook(
            lambda m, args, kwargs: captured.update(hidden=args[0], rotary=kwargs["position_embeddings"]),
            with_kwargs=True,
        ),
        visual_tower.merger.register_forward_hook(lambda m, args, out: captured.update(merged=out)),
    ]
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    features = host.plain.model.get_image_features(**pixels).pooler_output[0]
    for handle in handles:
        handle.remove()
    normed = block.norm1(captured["hidden"])
    query, key, _ = block.attn.qkv(normed).unflatten(-1, (3, 2, -1)).unbind(1)
    cos, sin = (part[:, None] for part in captured["rotary"])

    def rotate(x):
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    logits = torch.einsum("qhd,khd->hqk", rotate(query), rotate(key)).double() * key.shape[-1] ** -0.5
    received = logits.softmax(-1).sum((0, 1)).unflatten(0, (-1, 4)).mean(1)
    place = torch.cdist(features.double(), captured["merged"].double()).argmin(1)
    assert sorted(place.tolist()) == list(range(len(features)))
    best = received[place].topk(round(0.3 * len(features))).indices
    cache = make(VisionZip(0.3, contextual=0))()
    host.attached(**inputs, past_key_values=cache)
    visual = visual_positions(inputs["input_ids"])
    expected = visual[0].nonzero().flatten()[best].sort().values.tolist()
    assert kept_positions(cache, 0, 0, visual) == expected


@pytest.mark.parametrize("method", [DivPrune(0.4), VisionZip(0.4)], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen2_vl"])
def test_choosing_before_the_language_model_is_a_shorter_prompt(family, method):
    """The text model run on the kept embeddings alone, at their old positions (three of them with M-RoPE)."""
    host = build_host(family)
    inputs = host.tiny.inputs(host.tiny.prompt(3, images=(0, 1)))
    cache = make(method)()
    embeds = ways_embeddings(host.attached, inputs, cache)
    visual = visual_positions(inputs["input_ids"])
    kept = ~visual[0]
    kept[kept_positions(cache, 0, 0, visual)] = True
    assert 0.35 < (kept & visual[0]).sum() / visual.sum() < 0.45
    positions = torch.arange(embeds.shape[1])[None]
    if host.tiny.token_types == "mm_token_type_ids":
        positions, _ = host.plain.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
    more = torch.tensor([[20, 31, 42]])
    following = positions.amax() + 1 + torch.arange(3).expand(*positions.shape[:-1], 3)
    embeds = torch.cat([embeds[:, kept], host.plain.get_input_embeddings()(more)], 1)
    positions = torch.cat([positions[..., kept], following], -1)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)  # or gaps in the positions would be taken for sequences
    arguments = {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": mask, "use_cache": False}
    hidden = host.plain.get_decoder()(**arguments).last_hidden_state
    expected = host.plain.lm_head(hidden)[:, -3:]
    got = [host.attached(input_ids=token[None, None], past_key_values=cache).logits for token in more[0]]
    torch.testing.assert_close(torch.cat(got, 1), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.skipif("perception_lm" not in FAMILIES, reason="not in this transformers without timm")
def test_a_family_without_a_readable_encoder_is_refused():
    host = build_host("perception_lm")
    with pytest.raises(
        ValueError, match=r"which encoder patches the visual tokens of 'perception_lm' show is not known"
    ):
        host.attached(**ways.one(host.tiny), past_key_values=make(VisionZip(0.5))())


@pytest.mark.parametrize("family", READABLE)
def test_the_tap_hears_the_weights_that_the_layer_computes(family):
    """By the eager attention of transformers itself."""
    host = build_host(family)
    inputs = ways.padded(host.tiny)
    tap, _, _, _ = listen(host.attached, inputs, VisionZip(1.0))
    model = copy.deepcopy(host.plain)
    names = dict(host.attached.named_modules())
    name = next(name for name, module in names.items() if module is tap.module)
    module, weights = model.get_submodule(name), []
    if hasattr(module, "config"):
        module.config._attn_implementation = "eager"
        source = sys.modules[type(module).__module__]
        eager = source.eager_attention_forward

        def capture(*args, **kwargs):
            output = eager(*args, **kwargs)
            weights.append((args[0] is module, output[1]))
            return output

        source.eager_attention_forward = capture
        try:
            encode(model, inputs)
        finally:
            source.eager_attention_forward = eager
        weights = [found for ours, found in weights if ours]
    else:
        module.register_forward_hook(lambda m, args, output: weights.append(output[1].unflatten(0, (-1, 2))))
        encode(model, inputs)
    assert len(weights) == len(tap.heard)
    for signal, found in zip(tap.heard, weights, strict=True):
        rows = found[:, :, :1] if tap.has_class_token else found
        expected = rows.double().sum((1, 2))[:, tap.first :]
        torch.testing.assert_close(signal[..., 0].double(), expected, atol=1e-4, rtol=1e-4)


class Spoil:
    """A forward hook that makes one patch NaN, counted over the calls of a layer."""

    def __init__(self, patch: int, first: int) -> None:
        self.patch, self.first = patch, first

    def __call__(self, module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        rows = hidden.shape[0] if hidden.ndim > 2 else 1
        sequences = hidden.view(rows, -1, hidden.shape[-1])[:, self.first :]
        row, column = divmod(self.patch, sequences.shape[1])
        if 0 <= row < rows:
            sequences[row, column] = torch.nan
        self.patch -= rows * sequences.shape[1]


@pytest.mark.parametrize("family", READABLE)
def test_a_token_shows_the_patches_that_its_feature_is_made_of(family):
    """A patch is made NaN behind the attention of the layer that is read; the tokens that turn NaN show it."""
    host = build_host(family)
    size = 2 % host.tiny.sizes
    inputs = host.tiny.inputs(host.tiny.prompt(1, images=(size, 0)))
    tap, features, lengths, given = listen(host.attached, inputs, VisionZip(1.0))
    patches = sum(part.shape[0] * part.shape[1] for part in tap.heard)
    heard, packing = tap.heard, tap.packed is not None
    generator = torch.Generator().manual_seed(3)
    for patch in torch.randperm(patches, generator=generator)[:12].tolist():
        marked = torch.zeros(patches)
        marked[patch] = 1
        sizes = [part.shape[0] * part.shape[1] for part in heard]
        tap.heard = [
            torch.stack([flag.view(part.shape[:2]), torch.ones(part.shape[:2])], -1)
            for flag, part in zip(marked.split(sizes), heard, strict=True)
        ]
        handle = tap.module.register_forward_hook(Spoil(patch, tap.first))
        if packing:
            host.attached.model._rotatek.taps[threading.get_ident()] = tap
        output, _ = encode(host.attached, inputs)
        host.attached.model._rotatek.taps.clear()
        handle.remove()
        spoilt = torch.cat(list(output.pooler_output)).isnan().any(-1)
        shown = token_signal(tap, host.attached.model, given, lengths)[:, 0] > 0
        assert spoilt.any() or packing  # unpadding may cut a patch away
        if family in ("got_ocr2", "pp_chart2table"):  # its convolutions overlap
            assert (shown & ~spoilt).sum() == 0
            assert shown.any()
        else:
            assert shown.tolist() == spoilt.tolist()
        assert torch.isfinite(features).all()


def test_features_of_later_layers_are_merged_as_the_first_are():
    """Qwen3-VL adds features of the encoder's earlier layers in the text model's first layers."""
    host = build_host("qwen3_vl")
    inputs = host.tiny.inputs(host.tiny.prompt(1, images=(0, 1)))
    before, given = encode(host.plain, inputs)
    method = VisionZip(0.3, contextual=0.1)
    tap, features, lengths, given = listen(host.attached, inputs, method)
    counts = [method.count_of(length) for length in lengths]
    choices = choose(method, features.split(lengths), counts, token_signal(tap, host.attached.model, given, lengths))
    seen = {}
    handle = host.attached.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(deep=kwargs["deepstack_visual_embeds"]), with_kwargs=True
    )
    host.attached(**inputs, past_key_values=make(method)())
    handle.remove()
    for layer, got in zip(before.deepstack_features, seen["deep"], strict=True):
        images = layer.split(lengths) if isinstance(layer, torch.Tensor) else layer  # older transformers do not split
        for choice, image, found in zip(choices, images, got.split(lengths), strict=True):
            assert (found[~choice.kept] == 0).all()
            for target in choice.kept.nonzero().flatten().tolist():
                given_to = image[choice.taken_by == target]
                expected = image[target] + (given_to.mean(0) if len(given_to) else 0)
                torch.testing.assert_close(found[target], expected)


def test_line_breaks_of_packed_tiles_show_no_patch():
    host = build_host("llava_next")
    inputs = host.tiny.inputs(host.tiny.prompt(1, images=(0,)))  # 64 patches, then 8 rows of 16 and a break
    tap, features, lengths, given = listen(host.attached, inputs, VisionZip(1.0))
    signal = token_signal(tap, host.attached.model, given, lengths)
    breaks = [64 + 17 * row + 16 for row in range(8)]
    assert (signal[:, 1] == 0).nonzero().flatten().tolist() == breaks
    newline = host.attached.model.image_newline
    assert (features == newline).all(-1).nonzero().flatten().tolist() == breaks


# --- an oracle: a dense cache whose mask hides the dropped tokens -----------------------------------------------------

HIDDEN: dict[str, object] = {}


def _hiding_attention(module, query, key, value, attention_mask, **kwargs):
    if not hasattr(module, "layer_idx"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    queries, tokens, total = query.shape[2], key.shape[2], HIDDEN["total"]
    mask = attention_mask
    if mask is None:
        mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)[None, None]
    dropped = torch.nn.functional.pad(HIDDEN["dropped"], (0, max(0, total - HIDDEN["dropped"].shape[1])))
    mask = mask.expand(query.shape[0], -1, -1, -1).clone()
    for row in range(query.shape[0]):
        for column in range(tokens):
            position = total - tokens + column
            if dropped[row, position]:
                mask[row, :, :, column] = False
                own = position - (total - queries)
                if own >= 0:  # or a query would have nothing to see
                    mask[row, :, own, column] = True
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register("hiding", _hiding_attention)
AttentionMaskInterface.register("hiding", sdpa_mask)


@pytest.mark.parametrize("method", [VisionZip(0.4, contextual=0.1), DivPrune(0.4)], ids=str)
@pytest.mark.parametrize("family", READABLE)
def test_dropped_tokens_are_hidden_in_every_family(family, method):
    """Two rows, left padding, an answer: as a dense cache behind a mask, from the same features."""
    host = build_host(family)
    inputs = ways.padded(host.tiny)
    encoded = {}
    real = host.attached.model.get_image_features

    def noting(*args, **kwargs):
        encoded["image"] = real(*args, **kwargs)
        return copy.deepcopy(encoded["image"])

    noting.__wrapped__ = real.__wrapped__
    host.attached.model.get_image_features = noting
    try:
        cache = make(method)()
        got = ways.generate(host.attached, inputs, cache)
    finally:
        host.attached.model.get_image_features = real
    visual = visual_positions(inputs["input_ids"])
    dropped = torch.zeros_like(visual)
    dropped[visual] = (torch.cat(list(encoded["image"].pooler_output)) == 0).all(-1)
    assert 0.5 < dropped.sum() / visual.sum() < 0.65
    model = copy.deepcopy(host.plain)
    model.set_attn_implementation({"text_config": "hiding"})
    dense = DynamicCache(config=model.config.get_text_config(decoder=True))

    def begin(module, args, kwargs):
        ids = kwargs.get("input_ids")
        ids = args[0] if ids is None else ids
        HIDDEN.update(total=dense.get_seq_length() + ids.shape[1], dropped=dropped)

    model.register_forward_pre_hook(begin, with_kwargs=True)
    given = {name: value for name, value in inputs.items() if name not in ("pixel_values", "pixel_attention_mask")}
    expected = ways.generate(model, given | {"mm_encoder_outputs": encoded}, dense)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=2e-4, rtol=1e-4)
    full = [layer for layer in cache.report().layers if layer.kind == "RotateKLayer"]
    assert [layer.dropped for layer in full] == [int(dropped.sum())] * len(full)


@pytest.mark.parametrize("family", ["llava", "idefics3", "smolvlm"])
@pytest.mark.parametrize("options", [{"tokens": "divprune:0.4"}, {"tokens": "visionzip", "budget": "0.35x"}], ids=str)
def test_rows_without_images_may_stand_anywhere(family, options):
    """Idefics has features of each row, and empty ones for a row without images."""
    host = build_host(family)
    prompts = [host.tiny.prompt(n, images=images, text=12) for n, images in enumerate([(), (0, 0), (), (0,), ()])]

    def generated(rows, **options):
        cache = RotateKCache.for_study(**options)
        output = ways.generate(host.attached, host.tiny.inputs(*rows), cache)
        return output.sequences[:, -ways.NEW :], cache.report().layers[0].dropped

    answers, dropped = generated(prompts, rank=16, **options)
    assert dropped
    assert torch.equal(answers[::2], generated(prompts, sparsity=0)[0][::2])
    if "budget" not in options:  # which is that of all rows together
        alone = [generated([prompt], rank=16, **options) for prompt in prompts]
        assert dropped == sum(count for _, count in alone)
        assert torch.equal(answers, torch.cat([answer for answer, _ in alone]))


@pytest.mark.parametrize("family", ["gemma3", "aya_vision", "cohere2_vision"])
@pytest.mark.parametrize("way", ["greedy", "beams", "second_turn_padded", "chunked_prefill_padded", "prompt_lookup"])
def test_everything_kept_is_dynamic_cache_beside_sliding_layers(family, way):
    host = build_host(family)
    config = host.plain.config.get_text_config(decoder=True)
    expected = ways.WAYS[way](host.tiny, host.plain, lambda visual_mask=None: DynamicCache(config=config))
    got = ways.WAYS[way](host.tiny, host.attached, make(VisionZip(1.0)))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-5)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_encoder_without_attention():
    model = copy.deepcopy(build_host("internvl").attached)
    model.model.vision_tower.encoder.layer = torch.nn.ModuleList()
    inputs = ways.one(build_host("internvl").tiny)
    with pytest.raises(ValueError, match=r"VisionZip reads attention.*has no attention layer that can be read.*DivPru"):
        model(**inputs, past_key_values=make(VisionZip(0.5))())
    cache = make(DivPrune(0.5))()
    model(**inputs, past_key_values=cache)
    tokens = int(visual_positions(inputs["input_ids"]).sum())
    assert {layer.dropped for layer in cache.report().layers} == {tokens // 2}


def test_a_family_whose_patches_are_not_known(monkeypatch):
    host = build_host("internvl")
    unknown = replace(families.FAMILIES["internvl"], encoder=None)
    monkeypatch.setitem(families.FAMILIES, "internvl", unknown)
    with pytest.raises(ValueError, match=r"which encoder patches the visual tokens of 'internvl' show is not known"):
        host.attached(**ways.one(host.tiny), past_key_values=make(VisionZip(0.5))())


def test_features_of_the_embeddings():
    host = build_host("llava")
    model = copy.deepcopy(host.attached)
    model.config.vision_feature_layer = 0
    with pytest.raises(ValueError, match=r"vision_feature_layer=0 is none of its 2 attention layers"):
        model(**ways.one(host.tiny), past_key_values=make(VisionZip(0.5))())


def test_an_encoder_that_attends_in_windows_only():
    model = copy.deepcopy(build_host("got_ocr2").attached)
    layer = model.model.vision_tower.layers[-1]
    layer.window_size = 8
    layer.attn.use_rel_pos = False
    with pytest.raises(ValueError, match=r"got_ocr2: .* tiles of 64 patches .* are no squares"):
        model(**ways.one(build_host("got_ocr2").tiny), past_key_values=make(VisionZip(0.5))())


# --- families with features of other forms ----------------------------------------------------------------------------

FORMS = {
    "hunyuan_vl": "placeholders for line breaks as well",
    "molmo2": "features that are added to the placeholders' embeddings",
    "deepseek_ocr2": "a list, with a separator behind each image",
    "granite_docling": "features of the encoder's earlier layers as well",
    "emu3": "embeddings of ids of the vocabulary",
}


@pytest.mark.parametrize("family", [name for name in FORMS if name in EVERY])
def test_all_features_kept_change_nothing(family):
    host = build_host(family)
    inputs = ways.padded(host.tiny)
    found = [
        torch.stack(ways.generate(host.attached, inputs, make(method)()).logits) for method in (None, DivPrune(1.0))
    ]
    torch.testing.assert_close(*found, atol=5e-5, rtol=1e-5)
    cache = make(DivPrune(0.5))()
    host.attached(**inputs, past_key_values=cache)
    visual = visual_positions(inputs["input_ids"])
    kept = [len(kept_positions(cache, 0, row, visual)) for row in range(2)]
    assert kept == (visual.sum(1) * 0.5).round().tolist()


@pytest.mark.parametrize("family", [name for name in ("granite4_vision", "fuyu", "phi4_multimodal") if name in EVERY])
def test_a_family_without_features_of_images_is_refused(family):
    host = build_host(family)
    with pytest.raises(ValueError, match=r"has none that are handed to the language model as one.*FastV"):
        ways.generate(host.attached, ways.padded(host.tiny), make(DivPrune(0.5))())
