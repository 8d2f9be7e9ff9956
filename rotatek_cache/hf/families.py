"""The table of model families, the only place that knows them: what stands for an image, and what is special."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
_MINICPM = Family(None, IMAGE_AND_VIDEO)  # halfway through, its encoder merges windows of patches into fewer
_QWEN = Family(Encoder("visual", in_order), IMAGE_AND_VIDEO, mrope=True)
_QWEN_HYBRID = replace(_QWEN, encoder=None)  # no token can be left out before layers of linear attention

# model_type -> facts; the tests run each family here through generate.
FAMILIES: dict[str, Family] = {
    "aya_vision": _TOWER,
    "cohere2_vision": _TOWER,
    "gemma3": _TOWER,
    "gemma3n": Family(None),  # a timm encoder, whose attention weights cannot be read
    "gemma4": Family(None, IMAGE_AND_VIDEO),
    "glm46v": _QWEN,
    "glm4v": _QWEN,
    "glm4v_moe": _QWEN,
    "got_ocr2": _TOWER,
    "idefics3": _IDEFICS,
    "internvl": _TOWER,
    "lighton_ocr": Family(Encoder("vision_encoder", by_image_size)),
    "llama4": Family(None),  # its encoder shuffles pixels before and behind its class token
    "llava": Family(Encoder("vision_tower", in_order)),
    "llava_next": Family(_ANYRES),
    "llava_next_video": Family(_ANYRES, IMAGE_AND_VIDEO),
    "llava_onevision": Family(_ANYRES, IMAGE_AND_VIDEO),
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": replace(_MINICPM, mrope=True),
    "mistral3": _BY_SIZE,
    "ovis2": _TOWER,
    "paligemma": _TOWER,
    "perception_lm": Family(None, IMAGE_AND_VIDEO),  # a timm encoder, whose attention weights cannot be read
    "qwen2_5_vl": Family(Encoder("visual", in_windows), IMAGE_AND_VIDEO, mrope=True),
    "qwen2_vl": _QWEN,
    "qwen3_5": _QWEN_HYBRID,
    "qwen3_5_moe": _QWEN_HYBRID,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "smolvlm": _IDEFICS,
    "vipllava": Family(Encoder("vision_tower", in_order, class_token=True)),
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
