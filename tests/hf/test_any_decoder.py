"""A model of no known family: the ids of its visual tokens are named, and the identity test says whether it works."""

import pytest
import torch
import ways
from tiny_models import FAMILIES
from tiny_more import EVERY, MORE
from tiny_parts import BOS, IMAGE, PAD, TEXT, TRANSFORMERS, VIDEO, VISION
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from rotatek_cache import RotateKCache, attach, detach
from rotatek_cache.hf import identity
from rotatek_cache.hf.attachment import attachment_of, inner_model
from rotatek_cache.hf.identity import check_identity

FULL = {"rank": 32, "always_compress": True}


class UnheardLlava(LlavaConfig):
    model_type = "unheard_llava"


class UnheardQwen(Qwen2VLConfig):
    model_type = "unheard_qwen"


def _unheard(family):
    """A tiny model of a family that the table does not have, with the weights and prompts of one that it has."""
    tiny = FAMILIES[family]
    known = tiny.build()
    config_class, model_class = {
        "llava": (UnheardLlava, LlavaForConditionalGeneration),
        "qwen2_vl": (UnheardQwen, Qwen2VLForConditionalGeneration),
    }[family]
    settings = known.config.to_dict()
    del settings["model_type"]
    model = model_class(config_class(**settings)).eval()
    model.load_state_dict(known.state_dict())
    model.generation_config = known.generation_config
    return tiny, model


def _same(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_with_its_ids_it_works_as_a_known_family(family):
    tiny, model = _unheard(family)
    config = model.config.get_text_config(decoder=True)
    with pytest.raises(
        ValueError, match=rf"'unheard_{family[:4]}.*is not in the table.*visual_token_ids=\[...\].*check"
    ):
        attach(model)
    calls = ["padded_batch", "beams", "second_turn_padded"]
    if TRANSFORMERS >= (5, 23):  # an older one cannot do these in every family
        calls += ["chunked_prefill_padded", "second_turn_with_an_image"]
    expected = [ways.WAYS[way](tiny, model, lambda visual_mask=None: DynamicCache(config=config)) for way in calls]
    assert attach(model, visual_token_ids=[IMAGE, VIDEO]) is model
    assert attachment_of(model.model).family.mrope == (family == "qwen2_vl")
    for way, wanted in zip(calls, expected, strict=True):
        made = []

        def make(visual_mask=None, made=made):
            made.append(RotateKCache.for_study(**FULL, visual_mask=visual_mask))
            return made[-1]

        _same(ways.WAYS[way](tiny, model, make), wanted)
        assert made[-1].report().layers[0].segments
    detach(model)
    assert attachment_of(model.model) is None


def test_token_methods_by_features_choose_in_any_model_that_encodes_its_images():
    tiny, model = _unheard("llava")
    attach(model, visual_token_ids=[IMAGE])
    known = attach(tiny.build())
    found = [
        ways.generate(each, ways.padded(tiny), RotateKCache(sparsity=0.5, tokens="divprune:0.5")).sequences
        for each in (model, known)
    ]
    assert torch.equal(*found)
    with pytest.raises(
        ValueError, match="which encoder patches the visual tokens of 'unheard_llava' show is not known"
    ):
        ways.generate(model, ways.padded(tiny), RotateKCache(sparsity=0.5, tokens="visionzip:0.5"))


def _text_model():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TEXT)).eval()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data *= 6  # attention that is not uniform
    ids = torch.randint(10, 150, (2, 90))
    ids[:, 8:72] = torch.randint(150, 180, (2, 64))  # an image as ids of the vocabulary
    ids[1, :5] = PAD
    return model, {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def test_a_text_model_that_reads_images_as_ids_of_its_vocabulary():
    model, inputs = _text_model()
    expected = ways.generate(model, inputs, DynamicCache(config=model.config))
    attach(model, visual_token_ids=range(150, 180))
    cache = RotateKCache.for_study(**FULL)
    got = ways.generate(model, inputs, cache)
    _same([got.sequences, torch.stack(got.logits)], [expected.sequences, torch.stack(expected.logits)])
    assert cache.report().layers[0].segments[0].tokens == 128
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="LlamaModel has none that are handed to the language model as one"):
        ways.generate(model, inputs, RotateKCache(sparsity=0.5, tokens="divprune:0.5"))


@pytest.mark.skipif("phi4_multimodal" not in MORE, reason="not in this transformers")
def test_a_vision_tower_below_the_text_config_keeps_its_attention():
    tiny = MORE["phi4_multimodal"]
    model, seen = attach(tiny.build()), []
    model.config.vision_config._attn_implementation = "eager"
    tower = model.model.embed_tokens_extend.image_embed.img_processor
    tower.register_forward_pre_hook(
        lambda *_: seen.append((model.config._attn_implementation, model.config.vision_config._attn_implementation))
    )
    model(**ways.one(tiny), past_key_values=RotateKCache(sparsity=0.5))
    assert seen == [("rotatek", "eager")]
    assert model.config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "eager"


@pytest.mark.parametrize("ids", ["190", 190, [1.0], [True], [[1]]])
def test_ids_of_the_wrong_kind(ids):
    with pytest.raises(TypeError, match="visual_token_ids must be a list of ints, got"):
        attach(FAMILIES["llava"].build(), visual_token_ids=ids)


def test_other_ids_need_a_detach_first():
    model = attach(FAMILIES["llava"].build())
    assert attach(model, visual_token_ids=[IMAGE]) is model
    with pytest.raises(ValueError, match=rf"attached with the visual token ids \[{IMAGE}\] already, got \[7\].*detach"):
        attach(model, visual_token_ids=[7])
    assert attachment_of(attach(detach(model), visual_token_ids=[7]).model).placeholders == [7]


@pytest.mark.skipif("qwen2_5_omni_thinker" not in MORE, reason="not in this transformers")
def test_of_a_model_that_speaks_the_part_that_thinks_is_attached():
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

    tiny = MORE["qwen2_5_omni_thinker"]
    thinker = tiny.build()
    config = Qwen2_5OmniConfig(thinker_config=thinker.config.to_dict(), enable_audio_output=False)
    model = Qwen2_5OmniForConditionalGeneration(config).eval()
    model.thinker.load_state_dict(thinker.state_dict())
    inputs = ways.padded(tiny)
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = thinker.generate(**inputs, **settings)
    assert attach(model) is model
    assert attachment_of(inner_model(model.thinker)) is not None
    cache = RotateKCache.for_study(**FULL)
    assert torch.equal(model.thinker.generate(**inputs, past_key_values=cache, **settings), expected)
    assert cache.report().layers[0].segments
    detach(model)
    assert attachment_of(inner_model(model.thinker)) is None


def _instruct_blip():
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "instructblip",
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**vision, "image_size": 16, "patch_size": 4},
        qformer_config={**vision, "vocab_size": 200},
        num_query_tokens=64,
        image_token_index=IMAGE,
    )
    ids = torch.tensor([[*[IMAGE] * 64, BOS, 20, 21, 22], [PAD, PAD, *[IMAGE] * 64, BOS, 23]])
    inputs = {"qformer_input_ids": torch.tensor([[5, 6, 7]] * 2), "qformer_attention_mask": torch.ones(2, 3).long()}
    return config, "language_model", ids == IMAGE, {"input_ids": ids, **inputs}


def _kosmos():
    text = {"vocab_size": 200, "embed_dim": 128, "layers": 3, "ffn_dim": 96, "attention_heads": 4, "pad_token_id": PAD}
    text |= {"max_position_embeddings": 256, "bos_token_id": BOS, "eos_token_id": None}
    vision = {**VISION, "image_size": 16, "patch_size": 4}
    config = AutoConfig.for_model("kosmos-2", text_config=text, vision_config=vision, latent_query_num=64)
    ids = torch.tensor([[BOS, *[5] * 64, 20, 21, 22], [PAD, PAD, BOS, *[5] * 64, 23]])
    visual = ids == 5
    return config, "text_model", visual, {"input_ids": ids, "image_embeds_position_mask": visual.long()}


@pytest.mark.parametrize("build", [_instruct_blip, _kosmos])
def test_a_part_that_generates_by_itself_is_attached_by_itself(build):
    config, part, visual, inputs = build()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    inner = getattr(model, part)
    for name, parameter in inner.named_parameters():
        if "proj" in name:
            parameter.data *= 6
    inputs |= {"pixel_values": torch.rand(2, 3, 16, 16), "attention_mask": (inputs["input_ids"] != PAD).long()}
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **settings)
    for ids in (None, [IMAGE]):
        with pytest.raises(ValueError, match=rf"attach\(model\.{part}, visual_token_ids=\[\]\).*visual_mask="):
            attach(model, visual_token_ids=ids)
    attach(inner, visual_token_ids=[])
    cache = RotateKCache.for_study(**FULL, visual_mask=visual)
    got = model.generate(**inputs, past_key_values=cache, **settings)
    _same([got.sequences, torch.stack(got.logits)], [expected.sequences, torch.stack(expected.logits)])
    assert cache.report().layers[0].segments[0].tokens == 128


# --- the identity test ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "qwen3_5"])
def test_the_identity_test_holds(family):
    tiny = EVERY[family]
    found = check_identity(attach(tiny.build()), ways.padded(tiny), tokens=4)
    assert found.holds
    assert found.visual == (ways.padded(tiny)["input_ids"] == IMAGE).sum(1).tolist()
    assert found.same == {"Keys as they are": 8, "all coefficients": 8}
    assert "the same as DynamicCache" in str(found)
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in ways.padded(tiny).items()}
    assert check_identity(attach(tiny.build()).bfloat16(), half, tokens=4).holds


def test_the_identity_test_shows_what_is_not_the_same(monkeypatch):
    tiny = EVERY["llava"]
    model = attach(tiny.build())
    monkeypatch.setattr(identity, "SETTINGS", {"8 of 32 coefficients": {"rank": 8, "always_compress": True}})
    found = check_identity(model, ways.padded(tiny), tokens=4)
    assert not found.holds
    assert "NOT the same as DynamicCache" in str(found)


def test_the_identity_test_needs_an_attached_model_and_visual_tokens():
    tiny = EVERY["llava"]
    inputs = ways.padded(tiny)
    with pytest.raises(ValueError, match="model must be attached"):
        check_identity(tiny.build(), inputs)
    model = attach(tiny.build(), visual_token_ids=[7])
    with pytest.raises(ValueError, match=rf"must hold visual tokens.*\[7\]; .* are \[{IMAGE}, "):
        check_identity(model, inputs)
    with pytest.raises(ValueError, match="inputs must have input_ids, got pixel_values"):
        check_identity(model, {"pixel_values": inputs["pixel_values"]})
