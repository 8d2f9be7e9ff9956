"""The table of model families, the only place that knows them: what stands for an image, and what is special."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from rotatek_cache.hf.encoder_layouts import Encoder, by_image_size, in_order, in_windows, packed


@dataclass(frozen=True)
class Family:
    """The facts of a model family that `attach` needs.

    Args:
        encoder: the vision encoder, for token methods that read it; None if its layout is not known.
        placeholders: config fields with the ids that stand for visual tokens in `input_ids`.
        mrope: whether the model keeps an offset of positions (`rope_deltas`) of the conversation that it last read.
    """

    encoder: Encoder | None
    placeholders: tuple[str, ...] = ("image_token_id",)
    mrope: bool = False


IMAGE_AND_VIDEO = ("image_token_id", "video_token_id")
_TOWER = Family(Encoder("vision_tower"))
_ANYRES = Encoder("vision_tower", packed)
_BY_SIZE = Family(Encoder("vision_tower", by_image_size))
_IDEFICS = Family(Encoder("vision_model"))
_QWEN = Family(Encoder("visual", in_order), IMAGE_AND_VIDEO, mrope=True)

# model_type -> facts; the tests run each family here through generate.
FAMILIES: dict[str, Family] = {
    "aya_vision": _TOWER,
    "cohere2_vision": _TOWER,
    "gemma3": _TOWER,
    "glm46v": _QWEN,
    "glm4v": _QWEN,
    "glm4v_moe": _QWEN,
    "got_ocr2": _TOWER,
    "idefics3": _IDEFICS,
    "internvl": _TOWER,
    "lighton_ocr": Family(Encoder("vision_encoder", by_image_size)),
    "llava": Family(Encoder("vision_tower", in_order)),
    "llava_next": Family(_ANYRES),
    "llava_next_video": Family(_ANYRES, IMAGE_AND_VIDEO),
    "llava_onevision": Family(_ANYRES, IMAGE_AND_VIDEO),
    "mistral3": _BY_SIZE,
    "ovis2": _TOWER,
    "paligemma": _TOWER,
    "perception_lm": Family(None, IMAGE_AND_VIDEO),  # a timm encoder, whose attention weights cannot be read
    "qwen2_5_vl": Family(Encoder("visual", in_windows), IMAGE_AND_VIDEO, mrope=True),
    "qwen2_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "smolvlm": _IDEFICS,
    "vipllava": Family(Encoder("vision_tower", in_order, class_token=True)),
    "aria": Family(None),
    "cohere_compass": _QWEN,
    "cosmos3_edge": Family(Encoder("visual", in_order), IMAGE_AND_VIDEO, mrope=True),
    "cosmos3_omni": _QWEN,
    "deepseek_ocr2": Family(None),
    "exaone4_5": Family(Encoder("visual", in_windows), IMAGE_AND_VIDEO),
    "fast_vlm": Family(None),
    "granite_docling": Family(None),
    "hyperclovax_vision_v2": Family(Encoder("vision_model", in_windows), IMAGE_AND_VIDEO),
    "janus": Family(Encoder("vision_model")),
    "muse_glimmer": Family(None, IMAGE_AND_VIDEO),
    "muse_spark": Family(None, IMAGE_AND_VIDEO),
    "pp_chart2table": _TOWER,
    "qianfan_ocr": _TOWER,
    "step3p7": Family(None),
    "video_llama_3": Family(None, IMAGE_AND_VIDEO),
    "deepseek_vl": Family(Encoder("vision_model")),
    "deepseek_vl_hybrid": Family(Encoder("vision_model")),
    "ernie4_5_vl_moe": Family(Encoder("vision_tower", in_order), IMAGE_AND_VIDEO, mrope=True),
    "granite4_vision": Family(None),
    "hunyuan_vl": Family(None, mrope=True),
    "lfm2_vl": Family(None),
    "molmo2": Family(None),
    "paddleocr_vl": Family(None, mrope=True),
    "qwen2_5_omni_thinker": Family(Encoder("visual", in_windows), IMAGE_AND_VIDEO, mrope=True),
    "qwen3_omni_moe_thinker": _QWEN,
    "glm_ocr": _QWEN,
    "glmga": _QWEN,
    "idefics2": Family(None),  # a perceiver: each token sees all patches
    "video_llava": Family(Encoder("image_tower", in_order), IMAGE_AND_VIDEO),
}

# model_type -> why its images cannot be compressed.
REFUSED: Mapping[str, str] = {
    "mllama": "its images reach the text through cross-attention layers, whose Keys never stand in the prompt",
}


def families() -> list[str]:
    """List the model types that `attach` knows."""
    return sorted(FAMILIES)


def family_of(config: PreTrainedConfig) -> Family:
    """Look up the family of a config.

    Raises:
        ValueError: its images cannot be compressed, or the family is not in the table.
    """
    name = config.model_type
    if name in REFUSED:
        raise ValueError(f"model family '{name}' cannot use RotateKCache: {REFUSED[name]}")
    if name not in FAMILIES:
        raise ValueError(
            f"model family '{name}' is not in the table of rotatek_cache/hf/families.py: missing is which token ids "
            f"stand for visual tokens in its input_ids. Known: {', '.join(families())}. Without attach, load it with "
            'attn_implementation={"text_config": "rotatek"} and pass RotateKCache(..., visual_mask=mask)'
        )
    return FAMILIES[name]


def placeholder_ids(config: PreTrainedConfig) -> list[int]:
    """List the ids that stand for visual tokens in `input_ids`."""
    named = (getattr(config, name, None) for name in family_of(config).placeholders)
    return [token for token in named if token is not None]
