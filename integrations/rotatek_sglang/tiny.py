"""Tiny random models with processor and chat template, as folders that SGLang serves: for a try-out, tests and benches.

    python -m rotatek_sglang.tiny qwen2_5_vl FOLDER

They answer nonsense, fast. Head width is 64, so that a basis is more than a formality.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CORPUS = ["user assistant system describe the picture, please. what is in this image? a red circle on a blue square."]
VOCABULARY = 512
CHAT = """{%- macro vision(kind) %}<|vision_start|><|{{ kind }}_pad|><|vision_end|>{% endmacro -%}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type.startswith('image') %}{{ vision('image') }}{% elif part.type.startswith('video') %}{{ vision('video') }}
{%- else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def _tokenizer() -> Any:
    """Build a tokenizer of bytes, a few merges, and the special tokens of the Qwen family."""
    bytes_and_merges = Tokenizer(models.BPE())
    bytes_and_merges.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_and_merges.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bytes_and_merges.train_from_iterator(CORPUS, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_and_merges, eos_token=END, pad_token=PAD, model_max_length=32768
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END, PAD, *VISION]})
    tokenizer.chat_template = CHAT
    return tokenizer


def _text_config(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "bos_token_id": tokenizer.convert_tokens_to_ids(START),
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
        "tie_word_embeddings": False,
        **more,
    }


def _vision_ids(tokenizer: Any) -> dict[str, int]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, tokenizer.convert_tokens_to_ids(list(VISION)), strict=True))


def _qwen2(tokenizer: Any) -> tuple[Any, Any]:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_text_config(tokenizer))), None


def _qwen2_images(tokenizer: Any, processor: Any) -> Any:
    """Build the processor of Qwen2-VL, whose image processor Qwen2.5-VL has as well."""
    return processor(
        image_processor=transformers.Qwen2VLImageProcessor(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 1024),
        video_processor=transformers.Qwen2VLVideoProcessor(),
        tokenizer=tokenizer,
        chat_template=CHAT,
    )


def _qwen2_vl(tokenizer: Any) -> tuple[Any, Any]:
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0}
    config = transformers.Qwen2VLConfig(
        text_config=_text_config(tokenizer, rope_parameters=rope),
        vision_config={
            "depth": 2,
            "embed_dim": 128,
            "hidden_size": 256,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "in_chans": 3,  # SGLang reads it by this name, as the published configurations have it
        },
        tie_word_embeddings=False,
        **_vision_ids(tokenizer),
    )
    processor = _qwen2_images(tokenizer, transformers.Qwen2VLProcessor)
    return transformers.Qwen2VLForConditionalGeneration(config), processor


def _qwen2_5_vl(tokenizer: Any) -> tuple[Any, Any]:
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        text_config=_text_config(tokenizer, rope_parameters=rope),
        vision_config={
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 256,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
        **_vision_ids(tokenizer),
    )
    processor = _qwen2_images(tokenizer, transformers.Qwen2_5_VLProcessor)
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3_vl(tokenizer: Any) -> tuple[Any, Any]:
    rope = {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True, "rope_theta": 10000.0}
    config = transformers.Qwen3VLConfig(
        text_config=_text_config(tokenizer, rope_parameters=rope, num_hidden_layers=3),
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 256,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 2304,
        },
        tie_word_embeddings=False,
        **_vision_ids(tokenizer),
    )
    images = transformers.Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32 * 4, max_pixels=32 * 32 * 1024)
    processor = transformers.Qwen3VLProcessor(
        image_processor=images,
        video_processor=transformers.Qwen3VLVideoProcessor(),
        tokenizer=tokenizer,
        chat_template=CHAT,
    )
    return transformers.Qwen3VLForConditionalGeneration(config), processor


MODELS = {"qwen2": _qwen2, "qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl}


def save_model(name: str, folder: Path) -> None:
    """Write the model `name` of `MODELS` to `folder`: the same weights every time, in bfloat16."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    model, processor = MODELS[name](tokenizer)
    # Larger than the usual start: attention that hardly looks at anything would forgive every error in the cache.
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            parameter.data *= 6
    model.to(torch.bfloat16).save_pretrained(folder)
    (processor or tokenizer).save_pretrained(folder)


def main() -> None:
    """Write one model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    save_model(given.model, given.folder)


if __name__ == "__main__":
    main()
