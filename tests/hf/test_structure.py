"""Models that cannot be compressed are refused by what they are, and are left as they were."""

import pytest
import torch
import ways
from tiny_models import FAMILIES
from tiny_parts import IMAGE, TEXT, VISION, llava_config, square_image, stack
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from rotatek_cache import attach
from rotatek_cache.hf.families import FAMILIES as FAMILY_TABLE
from rotatek_cache.hf.families import refusal

FULL = {"rank": 32, "always_compress": True}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "head_dim": 16,
    "num_key_value_heads": 4,
}
DENSE_MLP = {"first_k_dense_replace": 3, "mlp_layer_types": ["dense"] * 3}


def _tiny(text_type, **text):
    """LLaVA with another text model."""
    config = llava_config("llava", text_type=text_type, text=text)
    return type(FAMILIES["llava"])("llava", config, square_image(64, 32), stack)


TEXTS = {
    "MLA": (_tiny("deepseek_v3", **MLA, **DENSE_MLP), r"kv_lora_rank=16.*multi-head latent attention.*one latent"),
    "softcap": (
        _tiny("gemma2", query_pre_attn_scalar=32, attn_logit_softcapping=50.0, sliding_window=64),
        r"attn_logit_softcapping=50.0",
    ),
    "sinks": (
        _tiny("gpt_oss", num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 3),
        r"attention sinks \(layers\.0\.self_attn\.sinks\)",
    ),
    "windows alone": (
        _tiny("mistral", sliding_window=32),
        r"none of its layers sees the whole prompt \(sliding_window=32\).*text_config.sliding_window = None",
    ),
}


def _answer(model, tiny):
    output = ways.generate(model, ways.padded(tiny), DynamicCache(config=model.config.get_text_config(decoder=True)))
    return output.sequences, torch.stack(output.logits)


def _traces(model):
    """What attach could leave on a model: attributes and hooks of its modules, and its attention functions."""
    modules = [
        (sorted(vars(module)), list(module._forward_pre_hooks), list(module._forward_hooks))
        for module in model.modules()
    ]
    return modules, [config._attn_implementation for config in (model.config, model.config.get_text_config())]


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_model_that_is_refused_goes_on_with_the_dense_cache(name):
    tiny, message = TEXTS[name]
    model = tiny.build()
    expected = _answer(model, tiny)
    before = _traces(model)
    for ids in (None, [IMAGE]):
        with pytest.raises(ValueError, match=rf"LlavaFor.*cannot use RotateKCache: .*{message}.*DynamicCache"):
            attach(model, visual_token_ids=ids)
    assert _traces(model) == before
    for got, wanted in zip(_answer(model, tiny), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.skipif("deepseek_v32" not in CONFIG_MAPPING_NAMES, reason="not in this transformers")
def test_sparse_indexed_attention():
    text = {**TEXT, **MLA, **DENSE_MLP, "q_lora_rank": 16, "model_type": "deepseek_v32"}
    text |= {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 16}
    config = AutoConfig.for_model(
        "llava", text_config=text, vision_config={**VISION, "model_type": "clip_vision_model"}
    )
    assert "sparse-indexed attention" in refusal(config)


def test_an_encoder_decoder():
    text = {
        "vocab_size": 200,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }
    vision = {"depths": [1], "patch_size": [4], "patch_stride": [4], "patch_padding": [0], "patch_prenorm": [False]}
    vision |= {"embed_dim": [32], "num_heads": [2], "num_groups": [2], "window_size": 4, "projection_dim": 32}
    config = AutoConfig.for_model("florence2", text_config=text, vision_config=vision, image_token_id=IMAGE)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    inputs = {"input_ids": torch.tensor([[0, *[IMAGE] * 65, 20, 21, 2]]), "pixel_values": torch.rand(1, 3, 32, 32)}
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=1)
    for ids in (None, [IMAGE]):
        with pytest.raises(ValueError, match=r"Florence2.*it is an encoder-decoder.*DynamicCache"):
            attach(model, visual_token_ids=ids)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=1), expected)


def test_attention_that_calls_no_function_that_can_be_selected():
    """As models with code of their own do, and BLIP's text model."""
    model = FAMILIES["llava"].build()
    layer = type("HandAttention", (torch.nn.Module,), {"__module__": __name__, "layer_idx": 1})
    model.get_decoder().layers[1].extra = layer()
    with pytest.raises(ValueError, match="HandAttention of its text model computes attention itself"):
        attach(model)


# --- every family of transformers -------------------------------------------------------------------------------------

REASONS = {
    "florence2": "encoder-decoder",
    "pix2struct": "encoder-decoder",
    "t5gemma2": "encoder-decoder",
    "udop": "encoder-decoder",
    "kimi_k25": "MLA",
    "mistral4": "MLA",
    "deepseek_v4": "index_topk",
    "dots3_note": "sparse-indexed",
    "glm5_next": "sparse-indexed",
    "hy_v4_vl": "sparse-indexed",
    "mistral_large4": "sparse-indexed",
    "qwen4_exp": "sparse-indexed",
    "minimax_m3_vl": "sparse-indexed",
    "mllama": "cross-attention",
    "idefics": "cross-attention",
    "blip": "cross-attention",
    "evolla": "cross-attention",
    "git": "in front of the ids",
    "pi0": "no text",
    "diffusion_gemma": "block of tokens",
    "inkling_mm_model": "LinearAttentionAndFullAttentionLayer",
    "inkling2": "LinearAttentionAndFullAttentionLayer",
    "kyutai_speech_to_text": "sliding_window=375",
}


@pytest.mark.parametrize("name", [name for name in REASONS if name in CONFIG_MAPPING_NAMES])
def test_a_family_is_refused_for_its_reason(name):
    assert REASONS[name] in refusal(CONFIG_MAPPING[name]())


@pytest.mark.parametrize("name", [name for name in FAMILY_TABLE if name in CONFIG_MAPPING_NAMES])
def test_no_family_of_the_table_is_refused(name):
    """But where the config of a checkpoint says so: Idefics 2's default has sliding windows alone."""
    reason = refusal(CONFIG_MAPPING[name]())
    assert not reason or (name == "idefics2" and "sliding_window=4096" in reason)
