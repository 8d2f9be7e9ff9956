"""Tiny models of more families, run by the cheaper ways of calling; written like those of `tiny_models`."""

from collections.abc import Callable
from typing import Any

import torch
from tiny_models import FAMILIES
from tiny_parts import (
    BREAK,
    CLIP,
    CLOSE,
    END,
    GEMMA4,
    GRIDS,
    IMAGE,
    MIXED,
    OPEN,
    PATCH,
    PINPOINTS,
    QWEN,
    QWEN_IDS,
    ROPE,
    TEXT,
    TRANSFORMERS,
    VIDEO,
    VISION,
    Tiny,
    anyres,
    anyres_collate,
    build_config,
    by_row,
    collate_grids,
    draw_pixels,
    glm_config,
    llava_config,
    minicpm_config,
    pack_patches,
    packed_patches,
    patch_grid,
    qwen3_config,
    square_image,
    stack,
    with_marks,
)
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

_SIGLIP = {"image_size": 32, "patch_size": 4, "vision_use_head": False}
_VIDEO_GRID = collate_grids("pixel_values_videos", "video_grid_thw")
_GRID_VISION = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2, "num_heads": 2}
_FLAT = {"sizes": 3, "collate": QWEN["collate"], "collate_video": QWEN["collate_video"]}  # without token types
_AUDIO = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 1, "encoder_ffn_dim": 8, "d_model": 8}


def _two_resolutions(size: int, generator: torch.Generator) -> tuple[list[int], tuple[Tensor, Tensor]]:
    """DeepSeek-VL's hybrid: the image small and large."""
    ids, low = square_image(64, 32)(size, generator)
    return ids, (low, draw_pixels(len(low), 3, 64, 64, generator=generator))


def _stack_both(rows: list[list[Any]]) -> dict[str, Tensor]:
    images = [image for row in rows for image in row]
    return {
        "pixel_values": torch.cat([low for low, _ in images]),
        "high_res_pixel_values": torch.cat([high for _, high in images]),
    }


def _newlines_grid(size: int, generator: torch.Generator) -> tuple[list[int], Any]:
    """HunYuan-VL: placeholders of the image's begin, end and line breaks as well."""
    _, height, width = GRIDS[size]
    tokens = height // 2 * (width // 2 + 1) + 2
    return [OPEN, *[IMAGE] * tokens, CLOSE], (draw_pixels(height * width, 48, generator=generator), (1, height, width))


def _unfolded(size: int, generator: torch.Generator) -> tuple[list[int], Any]:
    """PaddleOCR-VL: patches ``[n, 3, 4, 4]`` and their grid."""
    _, height, width = GRIDS[size]
    patches = draw_pixels(height * width, 3, 4, 4, generator=generator)
    return [OPEN, *[IMAGE] * (height * width // 4), CLOSE], (patches, (1, height, width))


def _native(size: int, generator: torch.Generator) -> tuple[list[int], Any]:
    """LFM2-VL: SigLIP 2 patches ``[n, 48]`` of an image in its own shape."""
    _, height, width = GRIDS[size]
    return [IMAGE] * (height * width // 4), (draw_pixels(height * width, 48, generator=generator), (height, width))


def _pad_patches(rows: list[list[Any]]) -> dict[str, Tensor]:
    images = [image for row in rows for image in row]
    most = max(len(patches) for patches, _ in images)
    return {
        "pixel_values": torch.stack([torch.nn.functional.pad(p, (0, 0, 0, most - len(p))) for p, _ in images]),
        "pixel_attention_mask": torch.stack([(torch.arange(most) < len(p)).int() for p, _ in images]),
        "spatial_shapes": torch.tensor([shape for _, shape in images]),
    }


def _pooled_crops(size: int, generator: torch.Generator) -> tuple[list[int], Tensor]:
    """Molmo 2: one crop of 16 x 16 patches, each 2 x 2 of them pooled to a token, and a smaller view of 4 x 4."""
    return [OPEN, *[IMAGE] * (64 + 16), CLOSE], draw_pixels(2, 256, 48, generator=generator)


def _pool_indices(rows: list[list[Tensor]]) -> dict[str, Tensor]:
    crops = torch.cat([image for row in rows for image in row])
    patches = torch.arange(256).view(16, 16)
    fine = patches.view(8, 2, 8, 2).transpose(1, 2).reshape(64, 4)
    coarse = fine.view(8, 8, 4)[::2, ::2].reshape(16, 4)
    images = len(crops) // 2
    each = [index + 256 * (2 * n + part) for n in range(images) for part, index in enumerate((coarse, fine))]
    return {
        "pixel_values": crops,
        "image_token_pooling": torch.cat(each),
        "image_grids": torch.tensor([[4, 4, 8, 8]] * images),
        "image_num_crops": torch.tensor([2] * images),
    }


def _global_view(tokens: int, side: int, more: int = 0) -> Callable[[int, torch.Generator], tuple[list[int], Tensor]]:
    """One view of an image, `more` tokens beyond those of its patches."""
    return lambda _, generator: ([IMAGE] * (tokens + more), draw_pixels(1, 3, side, side, generator=generator))


def _tiles_by_row(rows: list[list[Tensor]]) -> dict[str, Tensor]:
    """Granite Docling: ``[B, tiles, 3, H, W]`` and which tiles there are."""
    given = by_row(rows)
    return {
        "pixel_values": given["pixel_values"],
        "pixel_attention_mask": (given["pixel_values"] != 0).flatten(2).any(-1),
    }


def _view_and_crop(_: int, generator: torch.Generator) -> tuple[list[int], Tensor]:
    """Phi-4: one crop and the whole, 4 x 4 tokens each, a token at the end of each line, and one between them."""
    return [IMAGE] * (2 * 4 * 5 + 1), draw_pixels(2, 3, 32, 32, generator=generator)


def _views_and_masks(rows: list[list[Tensor]]) -> dict[str, Tensor]:
    images = torch.stack([image for row in rows for image in row])
    return {
        "image_pixel_values": images,
        "image_sizes": torch.tensor([[32, 32]] * len(images)),
        "image_attention_mask": torch.ones(len(images), 2, 8, 8),
    }


def _with_sizes(rows: list[list[Tensor]]) -> dict[str, Tensor]:
    given = stack(rows)
    return given | {"image_sizes": torch.tensor([given["pixel_values"].shape[-2:]] * len(given["pixel_values"]))}


def _placed_patches(rows: list[list[Tensor]]) -> dict[str, Tensor]:
    """Gemma 4 without an encoder: patches ``[images, 64, 48]`` and their columns and lines."""
    images = torch.stack([image for row in rows for image in row])
    places = torch.cartesian_prod(torch.arange(8), torch.arange(8)).flip(-1)
    return {"pixel_values": images, "image_position_ids": places.expand(len(images), -1, -1)}


def _merge_sizes(rows: list[list[Any]]) -> dict[str, Tensor]:
    given = collate_grids("pixel_values", "image_grid_thw")(rows)
    return given | {"image_merge_sizes": torch.full((len(given["image_grid_thw"]),), 2)}


def _timed_video(rows: list[list[Any]]) -> dict[str, Tensor]:
    given = _VIDEO_GRID(rows)
    return given | {"video_second_per_grid": torch.ones(len(given["video_grid_thw"]))}


def _thinker(model_type: str, vision: dict[str, Any], **text: Any) -> Callable[[], Any]:
    ids = {"audio_token_id": END, "audio_start_token_id": BREAK, "image_token_id": IMAGE, "video_token_id": VIDEO}
    ids |= {"vision_start_token_id": OPEN, "vision_end_token_id": CLOSE}
    if model_type.startswith("qwen2_5"):
        ids |= {"audio_token_index": END, "image_token_index": IMAGE, "video_token_index": VIDEO}
    return lambda: build_config(model_type, text=text, vision=_GRID_VISION | vision, audio_config=_AUDIO, **ids)


MORE: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        Tiny(
            "idefics2",
            lambda: build_config(
                "idefics2",
                "mistral",
                text={"sliding_window": None},
                vision={"image_size": 64, "patch_size": 8},
                perceiver_config={
                    "hidden_size": 128,
                    "resampler_n_latents": 64,
                    "resampler_depth": 1,
                    "resampler_n_heads": 2,
                    "resampler_head_dim": 16,
                    "num_key_value_heads": 1,
                },
                image_token_id=IMAGE,
            ),
            with_marks(square_image(64, 64)),
            by_row,
            sizes=2,
        ),
        Tiny(
            "video_llava",
            llava_config("video_llava", video_token_index=VIDEO),
            square_image(64, 32),
            stack,
            video=lambda number, generator: ([VIDEO] * 130, draw_pixels(2, 3, 32, 32, generator=generator)),
            collate_video=lambda rows: {"pixel_values_videos": torch.stack([video for row in rows for video in row])},
        ),
        Tiny(
            "deepseek_vl",
            lambda: build_config("deepseek_vl", "llama", "siglip_vision_model", vision=_SIGLIP, image_token_id=IMAGE),
            square_image(64, 32),
            stack,
        ),
        Tiny(
            "deepseek_vl_hybrid",
            lambda: build_config(
                "deepseek_vl_hybrid",
                "llama",
                "siglip_vision_model",
                vision=_SIGLIP,
                high_res_vision_config={
                    "hidden_size": 32,
                    "output_channels": 8,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 64,
                    "patch_size": 8,
                    "window_size": 4,
                    "global_attn_indexes": [1],
                    "mlp_dim": 48,
                },
                image_token_id=IMAGE,
            ),
            _two_resolutions,
            _stack_both,
        ),
        Tiny("glm_ocr", glm_config("glm_ocr"), patch_grid(PATCH), **QWEN),
        Tiny(
            "shieldgemma2",
            lambda: build_config(
                "shieldgemma2",
                "gemma3_text",
                "siglip_vision_model",
                text={"layer_types": MIXED, "sliding_window": 32, "query_pre_attn_scalar": 32},
                vision={"image_size": 32, "patch_size": 2},
                mm_tokens_per_image=64,
                image_token_index=IMAGE,
                boi_token_index=OPEN,
                eoi_token_index=CLOSE,
            ),
            with_marks(square_image(64, 32)),
            stack,
            token_types="token_type_ids",
        ),
        Tiny("glmga", glm_config("glmga"), patch_grid(PATCH), **QWEN),
        Tiny(
            "paddleocr_vl",
            lambda: build_config(
                "paddleocr_vl",
                text={"rope_parameters": ROPE},
                vision={"image_size": 64, "patch_size": 4, "spatial_merge_size": 2},
                **QWEN_IDS,
            ),
            _unfolded,
            **QWEN | {"collate_video": None},
        ),
        Tiny(
            "ernie4_5_vl_moe",
            lambda: build_config(
                "ernie4_5_vl_moe",
                text={
                    "rope_parameters": {**ROPE, "mrope_section": [6, 6, 4]},
                    "moe_intermediate_size": [32, 16],
                    "moe_k": 2,
                    "moe_num_experts": 4,
                    "moe_num_shared_experts": 1,
                },
                vision={"patch_size": 4, "depth": 2, "num_heads": 2, "temporal_merge_size": 2},
                **QWEN_IDS,
            ),
            patch_grid(48),
            **QWEN,
        ),
        Tiny(
            "hunyuan_vl",
            lambda: build_config(
                "hunyuan_vl",
                text={"rope_parameters": {**ROPE, "mrope_section": [4, 4, 4, 4]}},
                vision={"patch_size": 4, "max_image_size": 64, "out_hidden_size": 128},
                image_token_id=IMAGE,
            ),
            _newlines_grid,
            **QWEN | {"collate_video": None},
        ),
        Tiny(
            "granite4_vision",
            lambda: build_config(
                "granite4_vision",
                vision_type="clip_vision_model",
                text={"attention_multiplier": 32**-0.5},
                vision=CLIP | {"hidden_size": 64, "patch_size": 2},
                qformer_config={
                    "model_type": "blip_2_qformer",
                    "hidden_size": 64,
                    "encoder_hidden_size": 64,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 1,
                    "intermediate_size": 32,
                },
                image_token_index=IMAGE,
                image_grid_pinpoints=PINPOINTS,
                downsample_rate="2/4",
                deepstack_layer_map=[[-2, 0]],
                spatial_target_layers=[0, 1, 1, 2],
            ),
            anyres(False),
            anyres_collate,
            sizes=3,
        ),
        Tiny(
            "lfm2_vl",
            lambda: build_config(
                "lfm2_vl",
                "lfm2",
                "siglip2_vision_model",
                text={"layer_types": ["full_attention", "conv", "full_attention"], "block_auto_adjust_ff_dim": False},
                vision={"patch_size": 4, "num_patches": 64, "vision_use_head": False},
                projector_hidden_size=64,
                image_token_id=IMAGE,
            ),
            _native,
            _pad_patches,
            sizes=3,
            linear=True,
        ),
        Tiny(
            "qwen2_5_omni_thinker",
            _thinker(
                "qwen2_5_omni_thinker",
                {"out_hidden_size": 128, "window_size": 16, "fullatt_block_indexes": [1]},
                rope_parameters=ROPE,
            ),
            patch_grid(PATCH),
            video=patch_grid(PATCH, VIDEO, 2),
            **_FLAT | {"collate_video": _timed_video},
        ),
        Tiny(
            "qwen3_omni_moe_thinker",
            _thinker(
                "qwen3_omni_moe_thinker",
                {"out_hidden_size": 128, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
                rope_parameters={**ROPE, "mrope_interleaved": True},
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
            ),
            patch_grid(PATCH),
            video=patch_grid(PATCH, VIDEO, 2),
            **_FLAT | {"collate_video": _timed_video},
        ),
        Tiny(
            "molmo2",
            lambda: build_config(
                "molmo2",
                text={"additional_vocab_size": 8},
                vision={"head_dim": 16, "num_key_value_heads": 2, "image_size": [64, 64], "patch_size": 4},
                adapter_config={
                    "vision_feature_layer": [1, 0],
                    "hidden_size": 32,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "head_dim": 16,
                    "intermediate_size": 48,
                    "text_hidden_size": 128,
                },
                image_patch_id=IMAGE,
                image_start_token_id=OPEN,
                image_end_token_id=CLOSE,
                low_res_image_start_token_id=BREAK,
            ),
            _pooled_crops,
            _pool_indices,
            token_types="mm_token_type_ids",
        ),
        Tiny("cosmos3_omni", qwen3_config("cosmos3_omni"), patch_grid(PATCH), **QWEN),
        Tiny(
            "cosmos3_edge",
            lambda: build_config(
                "cosmos3_edge",
                text={"rope_parameters": ROPE},
                vision={"patch_size": 4, "num_patches": 64, "spatial_merge_size": 2},
                projector_hidden_size=64,
                **QWEN_IDS,
            ),
            patch_grid(48),
            **QWEN,
        ),
        Tiny(
            "cohere_compass",
            lambda: build_config(
                "cohere_compass",
                text={"rope_parameters": {"full_attention": {**ROPE, "mrope_interleaved": True}}, "logit_scale": 1.0},
                vision=_GRID_VISION
                | {"out_hidden_size": 128, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
                **QWEN_IDS,
            ),
            patch_grid(PATCH),
            **QWEN,
        ),
        Tiny(
            "exaone4_5",
            lambda: build_config(
                "exaone4_5",
                "exaone4",
                text={"layer_types": MIXED, "sliding_window": 32},
                vision=_GRID_VISION
                | {"out_hidden_size": 128, "window_size": 16, "fullatt_block_indexes": [1], "num_key_value_heads": 1},
                image_token_id=IMAGE,
                video_token_id=VIDEO,
            ),
            patch_grid(PATCH),
            video=patch_grid(PATCH, VIDEO, 2),
            **_FLAT,
        ),
        Tiny(
            "hyperclovax_vision_v2",
            lambda: build_config(
                "hyperclovax_vision_v2",
                "hyperclovax",
                "qwen2_5_vl_vision",
                vision=_GRID_VISION | {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
                image_token_id=IMAGE,
                video_token_id=VIDEO,
            ),
            patch_grid(PATCH),
            video=patch_grid(PATCH, VIDEO, 2),
            **_FLAT,
        ),
        Tiny(
            "video_llama_3",
            lambda: build_config(
                "video_llama_3", "qwen2", vision={"patch_size": 4}, image_token_id=IMAGE, video_token_id=VIDEO
            ),
            patch_grid(48),
            sizes=3,
            collate=_merge_sizes,
        ),
        Tiny(
            "janus",
            lambda: build_config(
                "janus",
                "llama",
                vision={"image_size": 32, "patch_size": 4, "projection_dim": 128, "num_image_tokens": 64},
                vq_config={
                    "base_channels": 32,
                    "channel_multiplier": [1],
                    "num_res_blocks": 1,
                    "latent_channels": 8,
                    "num_embeddings": 8,
                    "projection_dim": 32,
                    "image_token_embed_dim": 128,
                },
                image_token_id=IMAGE,
            ),
            square_image(64, 32),
            stack,
        ),
        Tiny(
            "aria",
            lambda: build_config(
                "aria",
                vision_type="idefics3_vision",
                text={"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
                vision={"image_size": 40, "patch_size": 4},
                projector_patch_to_query_dict={100: 64},
                image_token_index=IMAGE,
            ),
            square_image(64, 40),
            stack,
        ),
        Tiny(
            "qianfan_ocr",
            lambda: build_config(
                "qianfan_ocr",
                "qwen3",
                image_token_id=IMAGE,
                image_seq_length=64,
                vision={"image_size": [32, 32], "patch_size": [2, 2]},
            ),
            with_marks(square_image(64, 32)),
            stack,
            sizes=3,
        ),
        Tiny(
            "pp_chart2table",
            lambda: build_config(
                "pp_chart2table",
                "qwen2",
                vision={
                    "image_size": 64,
                    "patch_size": 2,
                    "window_size": 8,
                    "global_attn_indexes": [1],
                    "output_channels": 32,
                    "mlp_dim": 48,
                    "initializer_range": 0.02,
                },
                image_token_index=IMAGE,
                image_seq_length=64,
            ),
            with_marks(square_image(64, 64)),
            stack,
        ),
        Tiny(
            "deepseek_ocr2",
            lambda: build_config(
                "deepseek_ocr2",
                text={
                    "n_routed_experts": 4,
                    "num_experts_per_tok": 2,
                    "n_shared_experts": 1,
                    "moe_intermediate_size": 32,
                    "mlp_layer_types": ["dense", "sparse", "sparse"],
                },
                vision={
                    "sam_config": {
                        "hidden_size": 32,
                        "output_channels": 8,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 2,
                        "image_size": 64,
                        "patch_size": 4,
                        "window_size": 4,
                        "global_attn_indexes": [1],
                        "downsample_channels": [16, 32],
                    },
                    "encoder_config": {
                        "hidden_size": 32,
                        "intermediate_size": 48,
                        "num_hidden_layers": 1,
                        "num_attention_heads": 2,
                        "num_key_value_heads": 2,
                    },
                },
                image_token_id=IMAGE,
            ),
            _global_view(144, 64, more=1),
            stack,
        ),
        Tiny(
            "granite_docling",
            lambda: build_config(
                "granite_docling",
                text={
                    "attention_multiplier": 32**-0.5,
                    "embedding_multiplier": 1.0,
                    "residual_multiplier": 1.0,
                    "logits_scaling": 1.0,
                },
                vision={
                    "image_size": 32,
                    "patch_size": 2,
                    "scale_factor": 2,
                    "out_hidden_size": 128,
                    "deepstack_visual_indexes": [0, 1],
                },
                image_token_id=IMAGE,
            ),
            square_image(64, 32),
            _tiles_by_row,
            sizes=2,
        ),
        Tiny(
            "fast_vlm",
            lambda: build_config(
                "fast_vlm",
                "qwen2",
                "resnet",  # its own, of the library timm, is not installed for the tests
                vision={
                    "embedding_size": 8,
                    "hidden_sizes": [16, 32],
                    "depths": [1, 1],
                    "layer_type": "basic",
                    "downsample_in_first_stage": False,
                },
                image_token_index=IMAGE,
            ),
            square_image(64, 64),
            stack,
        ),
        Tiny(
            "muse_glimmer",
            lambda: build_config(
                "muse_glimmer",
                text={"layer_types": MIXED, "sliding_window": 32},
                vision={"patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8, "max_position_embeddings": 64},
                out_hidden_size=128,
                projector_hidden_size=64,
                image_token_id=IMAGE,
                video_token_id=VIDEO,
            ),
            patch_grid(PATCH),
            **_FLAT,
        ),
        Tiny(
            "chameleon",
            lambda: AutoConfig.for_model(
                "chameleon",
                **TEXT,
                vq_config={
                    "base_channels": 32,
                    "channel_multiplier": [1, 1],
                    "num_res_blocks": 1,
                    "latent_channels": 8,
                    "embed_dim": 8,
                    "num_embeddings": 8,
                    "resolution": 16,
                },
                vocabulary_map={"<image>": IMAGE}
                | {f"IMGIMG{letter}Z": 180 + n for n, letter in enumerate("ABCDEFGH")},
            ),
            square_image(64, 16),
            stack,
        ),
        Tiny(
            "phi4_multimodal",
            lambda: AutoConfig.for_model(
                "phi4_multimodal",
                **TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
                vision_config={**VISION, "image_size": 32, "patch_size": 4, "crop_size": 32, "image_token_id": IMAGE},
                audio_config={
                    "hidden_size": 8,
                    "intermediate_size": 8,
                    "num_blocks": 1,
                    "num_attention_heads": 1,
                    "ext_pw_out_channel": 8,
                    "depthwise_separable_out_channel": 8,
                    "nemo_conv_channels": 8,
                    "input_size": 8,
                    "audio_token_id": END,
                },
            ),
            _view_and_crop,
            _views_and_masks,
        ),
        Tiny(
            "emu3",
            lambda: AutoConfig.for_model(
                "emu3",
                text_config=TEXT,
                vq_config={
                    "base_channels": 32,
                    "channel_multiplier": [1, 1],
                    "num_res_blocks": 1,
                    "codebook_size": 8,
                    "temporal_downsample_factor": 2,
                    "hidden_size": 32,
                    "attn_resolutions": [],
                },
                vocabulary_map={"<image>": IMAGE, "<|extra_200|>": BREAK}
                | {f"<|visual token {n:06d}|>": 180 + n for n in range(8)},
            ),
            square_image(8 * 9, 16),
            _with_sizes,
        ),
        Tiny(
            "fuyu",
            lambda: AutoConfig.for_model(
                "fuyu",
                text_config={**TEXT, "num_attention_heads": 4},
                patch_size=4,
                image_size=32,
                image_token_id=IMAGE,
            ),
            lambda _, generator: ([IMAGE] * 64, draw_pixels(64, 48, generator=generator)),
            lambda rows: {"pixel_values": torch.stack([image for row in rows for image in row])},
        ),
        Tiny(
            "gemma4_unified",
            lambda: build_config(
                "gemma4_unified",
                text={name: value for name, value in GEMMA4.items() if name != "hidden_size_per_layer_input"},
                vision={
                    "patch_size": 2,
                    "pooling_kernel_size": 2,
                    "mm_embed_dim": 32,
                    "mm_posemb_size": 16,
                    "output_proj_dims": 32,
                },
                audio_config=None,
                image_token_id=IMAGE,
                video_token_id=VIDEO,
                boi_token_id=OPEN,
                eoi_token_id=CLOSE,
                audio_token_id=BREAK,
            ),
            lambda _, generator: ([OPEN, *[IMAGE] * 64, CLOSE], draw_pixels(64, 48, generator=generator)),
            _placed_patches,
            token_types="mm_token_type_ids",
            grids="",
        ),
        Tiny(
            "lfm3_vl",
            lambda: build_config(
                "lfm3_vl",
                "lfm3",
                text={"layer_types": ["conv", "full_attention", "full_attention"], "sliding_window": 32},
                vision={
                    "patch_size": 4,
                    "spatial_merge_size": 2,
                    "temporal_patch_size": 2,
                    "num_key_value_heads": 1,
                    "layer_types": ["conv", "full_attention"],
                },
                projector_hidden_size=64,
                **QWEN_IDS,
            ),
            patch_grid(PATCH),
            video=patch_grid(PATCH, VIDEO, 2),
            **_FLAT,
            linear=True,
        ),
        Tiny(
            "minicpm_ocr",
            minicpm_config("minicpm_ocr", downsample_mode="16x"),
            packed_patches,
            pack_patches,
            sizes=3,
            linear=True,
        ),
        Tiny(
            "muse_spark",
            lambda: build_config(
                "muse_spark",
                text={
                    "layer_types": MIXED,
                    "sliding_window": 32,
                    "moe_intermediate_size": 32,
                    "moe_hidden_size": 64,
                    "num_local_experts": 4,
                    "num_experts_per_tok": 2,
                },
                vision={"patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8, "max_position_embeddings": 64},
                audio_config={
                    "patch_sizes": [4, 2],
                    "hidden_sizes": [8, 16],
                    "depths": [1, 1],
                    "num_hidden_layers": 2,
                    "out_hidden_size": 128,
                },
                out_hidden_size=128,
                projector_hidden_size=64,
                image_token_id=IMAGE,
                video_token_id=VIDEO,
                audio_token_id=END,
            ),
            patch_grid(PATCH),
            **_FLAT,
        ),
        Tiny(
            "step3p7",
            lambda: build_config(
                "step3p7",
                text={
                    "n_routed_experts": 4,
                    "num_local_experts": 4,
                    "num_experts_per_tok": 2,
                    "moe_intermediate_size": 32,
                    "share_expert_dim": 32,
                    "layer_types": MIXED,
                    "sliding_window": 32,
                },
                vision={"image_size": 128, "patch_size": 4},
                image_token_id=IMAGE,
            ),
            _global_view(64, 128),
            stack,
        ),
    )
}

for _name in MORE.keys() - CONFIG_MAPPING_NAMES.keys():  # families that an older transformers does not have
    del MORE[_name]
if TRANSFORMERS < (5, 23):
    del MORE["video_llava"]  # its images have another name there
if TRANSFORMERS < (5, 20):
    del MORE["aria"]  # its text config stays a dict there

EVERY = FAMILIES | MORE
