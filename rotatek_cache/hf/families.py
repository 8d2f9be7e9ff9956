"""The table of model families, the only place that knows them: what stands for an image, and what is special."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from rotatek_cache.hf.encoder_layouts import Encoder, by_image_size, in_order, in_windows, packed
from rotatek_cache.hf.structure import obstacle


@dataclass(frozen=True)
class Family:
    """The facts of a model family that `attach` needs.

    Args:
        encoder: the vision encoder, for token methods that read it; None if its layout is not known.
        placeholders: config fields with the ids that stand for visual tokens in `input_ids`; of a part with a dot.
        two_ways: whether images attend both ways, so that the text model is always given a mask.
        mrope: whether the model keeps an offset of positions (`rope_deltas`) of the conversation that it last read.
        merged: whether an image, with `mrope`, has as many tokens as its patches that are merged, and no others.
        features: whether `get_image_features` gives the features of each image by itself, from which token methods can
            choose.
    """

    encoder: Encoder | None
    placeholders: tuple[str, ...] = ("image_token_id",)
    mrope: bool = False
    features: bool = True
    merged: bool = True
    two_ways: bool = False


IMAGE_AND_VIDEO = ("image_token_id", "video_token_id")
_TOWER = Family(Encoder("vision_tower"))
_ANYRES = Encoder("vision_tower", packed)
_BY_SIZE = Family(Encoder("vision_tower", by_image_size))
_IDEFICS = Family(Encoder("vision_model"))
_MINICPM = Family(None, IMAGE_AND_VIDEO)  # halfway through, its encoder merges windows of patches into fewer
_QWEN = Family(Encoder("visual", in_order), IMAGE_AND_VIDEO, mrope=True)
_QWEN_HYBRID = replace(_QWEN, encoder=None)  # no token can be left out before layers of linear attention

# model_type -> facts; the tests run each family here through generate.
FAMILIES: dict[str, Family] = {
    "aria": Family(None),
    "aya_vision": _TOWER,
    "chameleon": Family(None),  # its encoder gives ids of the vocabulary
    "cohere2_vision": _TOWER,
    "cohere_compass": _QWEN,
    "cosmos3_edge": Family(Encoder("visual", in_order), IMAGE_AND_VIDEO, mrope=True),
    "cosmos3_omni": _QWEN,
    "deepseek_ocr2": Family(None),
    "deepseek_vl": Family(Encoder("vision_model")),
    "deepseek_vl_hybrid": Family(Encoder("vision_model")),
    "emu3": Family(None),  # its encoder gives ids of the vocabulary
    "ernie4_5_vl_moe": Family(Encoder("vision_tower", in_order), IMAGE_AND_VIDEO, mrope=True),
    "exaone4_5": Family(Encoder("visual", in_windows), IMAGE_AND_VIDEO, mrope=True),  # an offset that stays None
    "fast_vlm": Family(None),
    "fuyu": Family(None, features=False),  # it has no encoder
    "gemma3": Family(Encoder("vision_tower"), two_ways=True),
    "gemma3n": Family(None),  # a timm encoder, whose attention weights cannot be read
    "gemma4": Family(None, IMAGE_AND_VIDEO),
    "gemma4_unified": Family(None, IMAGE_AND_VIDEO),  # it has no encoder
    "glm46v": _QWEN,
    "glm4v": _QWEN,
    "glm4v_moe": _QWEN,
    "glm_ocr": _QWEN,
    "glmga": _QWEN,
    "got_ocr2": _TOWER,
    "granite4_vision": Family(None, features=False),  # it has some for each of several layers
    "granite_docling": Family(None),
    "hunyuan_vl": Family(None, mrope=True, merged=False),
    "hyperclovax_vision_v2": Family(Encoder("vision_model", in_windows), IMAGE_AND_VIDEO),
    "idefics2": Family(None),  # a perceiver: each token sees all patches
    "idefics3": _IDEFICS,
    "internvl": _TOWER,
    "janus": Family(Encoder("vision_model")),
    "lfm2_vl": Family(None),
    "lfm3_vl": Family(None, IMAGE_AND_VIDEO),
    "lighton_ocr": Family(Encoder("vision_encoder", by_image_size)),
    "llama4": Family(None, features=False),  # what it returns is not projected yet
    "llava": Family(Encoder("vision_tower", in_order)),
    "llava_next": Family(_ANYRES),
    "llava_next_video": Family(_ANYRES, IMAGE_AND_VIDEO),
    "llava_onevision": Family(_ANYRES, IMAGE_AND_VIDEO),
    "minicpm_ocr": _MINICPM,
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": replace(_MINICPM, mrope=True),
    "mistral3": _BY_SIZE,
    "molmo2": Family(None),
    "muse_glimmer": Family(None, IMAGE_AND_VIDEO),
    "muse_spark": Family(None, IMAGE_AND_VIDEO),
    "ovis2": _TOWER,
    "paddleocr_vl": Family(None, mrope=True),
    "paligemma": Family(Encoder("vision_tower"), two_ways=True),
    "perception_lm": Family(None, IMAGE_AND_VIDEO),  # a timm encoder, whose attention weights cannot be read
    "phi4_multimodal": Family(None, ("vision_config.image_token_id",), features=False),
    "pp_chart2table": _TOWER,
    "qianfan_ocr": _TOWER,
    "qwen2_5_omni_thinker": Family(Encoder("visual", in_windows), IMAGE_AND_VIDEO, mrope=True),
    "qwen2_5_vl": Family(Encoder("visual", in_windows), IMAGE_AND_VIDEO, mrope=True),
    "qwen2_vl": _QWEN,
    "qwen3_5": _QWEN_HYBRID,
    "qwen3_5_moe": _QWEN_HYBRID,
    "qwen3_omni_moe_thinker": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "shieldgemma2": Family(Encoder("vision_tower"), two_ways=True),
    "smolvlm": _IDEFICS,
    "step3p7": Family(None),
    "video_llama_3": Family(None, IMAGE_AND_VIDEO),
    "video_llava": Family(Encoder("image_tower", in_order), IMAGE_AND_VIDEO),
    "vipllava": Family(Encoder("vision_tower", in_order, class_token=True)),
}

# model_type -> the part that reads images and generates text; `attach` attaches that part.
PARTS: Mapping[str, str] = {
    "qwen2_5_omni": "thinker",
    "qwen3_omni_moe": "thinker",
}

_CROSS = "its images reach the text through cross-attention layers, whose Keys never stand in the prompt"


def _alone(part: str, mask: str) -> str:
    return (
        "its generate hands merged embeddings to a part that generates by itself. Attach that part, "
        f"attach(model.{part}, visual_token_ids=[]), and say which positions are visual: RotateKCache(..., "
        f"visual_mask={mask})"
    )


_INSTRUCT_BLIP = _alone("language_model", "input_ids == model.config.image_token_index")
_KOSMOS = _alone("text_model", "image_embeds_position_mask.bool()")

# model_type -> why its images cannot be compressed, beyond what `structure.obstacle` sees in a config.
REFUSED: Mapping[str, str] = {
    "blip": _CROSS,
    "blip-2": "its language model is OPT, which cannot be used (its head calls the decoder past the model that attach "
    "listens to), or T5, an encoder-decoder",
    "diffusion_gemma": "it denoises a block of tokens at a time, each seen by all others, and does not decode from a "
    "cache token by token",
    "evolla": "it reads proteins, which reach the text through cross-attention layers",
    "git": "it puts image features in front of the ids, which have no placeholders for them",
    "idefics": _CROSS,
    "instructblip": _INSTRUCT_BLIP,
    "instructblipvideo": _INSTRUCT_BLIP,
    "kosmos-2": _KOSMOS,
    "minimax_m3_vl": "sparse-indexed attention: an indexer with Keys of its own picks the blocks that each query sees",
    "mllama": _CROSS,
    "opt": "its head calls the decoder past the model below it, which attach listens to",
    "pi0": "it predicts actions of a robot in one forward, and generates no text",
}


def families() -> list[str]:
    """List the model types that `attach` knows."""
    return sorted(FAMILIES)


def refusal(config: PreTrainedConfig) -> str:
    """Say why the visual Keys of a model with this config cannot be compressed; "" if they can."""
    return REFUSED.get(config.model_type) or obstacle(config)


def family_of(config: PreTrainedConfig) -> Family:
    """Look up the family of a config.

    Raises:
        ValueError: the family is not in the table.
    """
    name = config.model_type
    if name not in FAMILIES:
        raise ValueError(
            f"model family '{name}' is not in the table of rotatek_cache/hf/families.py: missing is which token ids "
            f"stand for visual tokens in its input_ids. Known: {', '.join(families())}. Name the ids, as in "
            "attach(model, visual_token_ids=[...]), and try that with `rotatek check`; or load it with "
            'attn_implementation={"text_config": "rotatek"} and pass RotateKCache(..., visual_mask=mask)'
        )
    return FAMILIES[name]


def placeholder_ids(config: PreTrainedConfig) -> list[int]:
    """List the ids that stand for visual tokens in `input_ids`."""
    found = set()
    for path in family_of(config).placeholders:
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name, None)
        found.add(value)
    return sorted(found - {None})
