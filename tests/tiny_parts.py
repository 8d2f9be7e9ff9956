"""What tiny models are made of: sizes, images and how rows of them are joined, configs, and `Tiny`, a family."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel

TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])
VOCAB = 200
PAD, BOS = 0, 1
IMAGE, VIDEO, OPEN, CLOSE, BREAK, END = 190, 191, 192, 193, 194, 195  # never drawn as text
SPECIAL = (PAD, IMAGE, VIDEO, OPEN, CLOSE, BREAK, END)
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
}


@dataclass
class Prompt:
    """Ids of one sequence and the visual content behind its placeholders, in order."""

    ids: list[int]
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Tiny:
    """A family: how to build its model, and how to write prompts for it.

    Args:
        config: the config, from nothing.
        image: one image of a size class (0, 1, ...): its ids (placeholders and what surrounds them), and its content.
        collate: model arguments from the images of all rows: list of rows, each a list of contents.
        sizes: how many size classes differ in their number of visual tokens.
        token_types: name of the argument with the modality of each token, if the family has one.
        grids: name of the argument with the grids of images, which its positions follow from.
        linear: whether it has layers of linear attention.
        like: a family that shares its cache's layers and is tested in all ways of calling; this one is in some.
    """

    name: str
    config: Callable[[], Any]
    image: Callable[[int, torch.Generator], tuple[list[int], Any]]
    collate: Callable[[list[list[Any]]], dict[str, Tensor]]
    sizes: int = 1
    token_types: str | None = None
    image_first: bool = False
    grids: str = "image_grid_thw"
    linear: bool = False
    like: str = ""
    video: Callable[[int, torch.Generator], tuple[list[int], Any]] | None = None
    collate_video: Callable[[list[list[Any]]], dict[str, Tensor]] | None = None

    @property
    def needs_config(self) -> bool:
        """Whether a cache has to know its layers: some keep no Keys of their own."""
        return self.linear or bool(getattr(self.config().get_text_config(decoder=True), "num_kv_shared_layers", 0))

    @property
    def model_type(self) -> str:
        """The family's name in the library's table."""
        return str(self.config().model_type)

    def build(self) -> PreTrainedModel:
        """The model with seeded weights, in eval mode, on the stock attention of transformers."""
        config = self.config()
        for part in (config, config.get_text_config(decoder=True)):
            part.eos_token_id = None
        with torch.random.fork_rng():
            torch.manual_seed(0)  # for what `draw_weights` leaves as it is
            model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
        draw_weights(model)
        generation = model.generation_config
        generation.eos_token_id, generation.pad_token_id, generation.bos_token_id = None, PAD, BOS
        generation.suppress_tokens = list(SPECIAL)
        return model.eval()

    def prompt(
        self, seed: int = 0, images: Sequence[int] = (0,), text: int = 9, tail: int = 7, videos: int = 0
    ) -> Prompt:
        """A sequence: BOS, text, one image per entry of `images` (its size class) with text between, a question."""
        generator = torch.Generator().manual_seed(seed)
        prompt = Prompt([] if self.image_first else [BOS, *draw_words(text, generator)])
        for number, size in enumerate(images):
            if number and not self.image_first:
                prompt.ids += draw_words(2, generator)
            ids, content = self.image(size % self.sizes, generator)
            prompt.ids += ids
            prompt.images.append(content)
        for number in range(videos):
            assert self.video is not None
            ids, content = self.video(number, generator)
            prompt.ids += ids
            prompt.videos.append(content)
        if self.image_first:
            prompt.ids += [BOS]
        prompt.ids += draw_words(tail, generator)
        return prompt

    def inputs(self, *prompts: Prompt) -> dict[str, Tensor]:
        """Arguments of `generate` for a batch of prompts, padded on the left."""
        length = max(len(prompt.ids) for prompt in prompts)
        ids = torch.tensor([[PAD] * (length - len(prompt.ids)) + prompt.ids for prompt in prompts])
        mask = torch.tensor([[0] * (length - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts])
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.token_types == "mm_token_type_ids":
            inputs[self.token_types] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        elif self.token_types == "token_type_ids":
            inputs[self.token_types] = torch.zeros_like(ids) if self.image_first else (ids == IMAGE).long()
        if any(prompt.images for prompt in prompts):
            inputs |= self.collate([prompt.images for prompt in prompts])
        if any(prompt.videos for prompt in prompts):
            assert self.collate_video is not None
            inputs |= self.collate_video([prompt.videos for prompt in prompts])
        return inputs


def visual_positions(input_ids: Tensor) -> Tensor:
    """bool ``[B, n]``: which ids are placeholders."""
    return (input_ids == IMAGE) | (input_ids == VIDEO)


def words(count: int, seed: int) -> list[int]:
    """`count` ids of ordinary text."""
    return draw_words(count, torch.Generator().manual_seed(seed))


def draw_words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(10, IMAGE, (count,), generator=generator).tolist()


def draw_weights(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel() if "embed_tokens" not in name else 1
                gain = 1.6 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 1.0
                parameter.normal_(0, gain / math.sqrt(fan_in), generator=generator)
            elif "q_norm" in name or "k_norm" in name:
                parameter.add_(1.0)
            elif "norm" not in name and "bias" in name:
                parameter.normal_(0, 0.1, generator=generator)


# --- images -----------------------------------------------------------------------------------------------------------


def draw_pixels(*shape: int, generator: torch.Generator) -> Tensor:
    # A smooth image and noise: patches differ, and the mean is not zero.
    return torch.rand(*shape, generator=generator) * 2 - 0.3


def square_image(tokens: int, side: int) -> Callable[[int, torch.Generator], tuple[list[int], Tensor]]:
    """One image ``[3, side, side]`` per size class n, as n + 1 tiles of `tokens` placeholders each."""

    def image(size: int, generator: torch.Generator) -> tuple[list[int], Tensor]:
        return [IMAGE] * tokens * (size + 1), draw_pixels(size + 1, 3, side, side, generator=generator)

    return image


def stack(rows: list[list[Tensor]]) -> dict[str, Tensor]:
    return {"pixel_values": torch.cat([image for row in rows for image in row])}


def stack_tiles(rows: list[list[Tensor]]) -> dict[str, Tensor]:
    """PerceptionLM: ``[images, tiles, 3, H, W]``."""
    return {"pixel_values": torch.stack([image for row in rows for image in row])}


def by_row(rows: list[list[Tensor]]) -> dict[str, Tensor]:
    """Idefics: ``[B, images, 3, H, W]``, absent images zero."""
    side = next(image for row in rows for image in row).shape[-1]
    stacked = [torch.cat([torch.zeros(0, 3, side, side), *row]) for row in rows]
    most = max(len(images) for images in stacked)
    pixels = torch.stack([torch.cat([x, torch.zeros(most - len(x), 3, side, side)]) for x in stacked])
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(pixels.shape[0], most, side, side, dtype=torch.bool),
    }


def with_marks(
    image: Callable[[int, torch.Generator], tuple[list[int], Any]],
) -> Callable[..., tuple[list[int], Any]]:
    def wrapped(size: int, generator: torch.Generator) -> tuple[list[int], Any]:
        ids, content = image(size, generator)
        return [OPEN, *ids, CLOSE], content

    return wrapped


GRIDS = ((1, 16, 16), (1, 20, 16), (1, 8, 24))  # patches of the size classes: 64, 80 and 48 tokens after merging 2 x 2


def patch_grid(
    width: int, token: int = IMAGE, frames: int = 1
) -> Callable[[int, torch.Generator], tuple[list[int], Any]]:
    """The Qwen line: flattened patches ``[t h w, width]`` and their grid."""

    def image(size: int, generator: torch.Generator) -> tuple[list[int], Any]:
        grid = (frames, *GRIDS[size][1:])
        tokens = math.prod(grid) // 4
        return [OPEN, *[token] * tokens, CLOSE], (draw_pixels(math.prod(grid), width, generator=generator), grid)

    return image


def collate_grids(pixels: str, grid: str) -> Callable[[list[list[Any]]], dict[str, Tensor]]:
    def collate(rows: list[list[Any]]) -> dict[str, Tensor]:
        images = [image for row in rows for image in row]
        return {pixels: torch.cat([p for p, _ in images]), grid: torch.tensor([g for _, g in images])}

    return collate


QWEN = {
    "token_types": "mm_token_type_ids",
    "sizes": 3,
    "collate": collate_grids("pixel_values", "image_grid_thw"),
    "collate_video": collate_grids("pixel_values_videos", "video_grid_thw"),
}
PATCH = 3 * 2 * 4 * 4  # channels, frames, height, width


def pixtral_patches(size: int, generator: torch.Generator) -> tuple[list[int], Tensor]:
    """Rows of placeholders closed by a break token, as the Pixtral processor writes them (patches already merged)."""
    height, width = ((8, 8), (10, 6), (6, 9))[size]
    ids: list[int] = []
    for row in range(height):
        ids += [*[IMAGE] * width, BREAK if row < height - 1 else END]
    return ids, (height, width, generator)


def pixtral_image(scale: int) -> Callable[[int, torch.Generator], tuple[list[int], Tensor]]:
    def image(size: int, generator: torch.Generator) -> tuple[list[int], Tensor]:
        ids, (height, width, _) = pixtral_patches(size, generator)
        return ids, draw_pixels(3, height * scale, width * scale, generator=generator)

    return image


def padded_sizes(rows: list[list[Tensor]]) -> dict[str, Tensor]:
    """``[images, 3, max H, max W]`` and the true sizes."""
    images = [image for row in rows for image in row]
    height, width = max(i.shape[1] for i in images), max(i.shape[2] for i in images)
    pixels = torch.stack([torch.nn.functional.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images])
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[i.shape[1], i.shape[2]] for i in images])}


def anyres(newline: bool, side: int = 32, patches: int = 8) -> Callable[[int, torch.Generator], tuple[list[int], Any]]:
    """LLaVA-NeXT and OneVision: a base view and tiles; the visual tokens of a 32 x 64 or 64 x 32 original."""

    def image(size: int, generator: torch.Generator) -> tuple[list[int], Any]:
        height, width = ((32, 64), (64, 32), (64, 64))[size]
        tiles = 1 + (height // side) * (width // side)
        rows, columns = height // side * patches, width // side * patches
        tokens = patches * patches + rows * (columns + 1) + int(newline)
        return [IMAGE] * tokens, (draw_pixels(tiles, 3, side, side, generator=generator), (height, width))

    return image


def anyres_collate(rows: list[list[Any]]) -> dict[str, Tensor]:
    images = [image for row in rows for image in row]
    most = max(len(tiles) for tiles, _ in images)
    pixels = torch.stack([torch.cat([t, torch.zeros(most - len(t), *t.shape[1:])]) for t, _ in images])
    return {"pixel_values": pixels, "image_sizes": torch.tensor([size for _, size in images])}


def draw_frames(number: int, generator: torch.Generator) -> tuple[list[int], Tensor]:
    """PerceptionLM: a video ``[2, 3, 32, 32]`` of 64 placeholders a frame."""
    return [VIDEO] * 128, draw_pixels(2, 3, 32, 32, generator=generator)


def stack_frames(rows: list[list[Tensor]]) -> dict[str, Tensor]:
    return {"pixel_values_videos": torch.stack([video for row in rows for video in row])}


# --- configs ----------------------------------------------------------------------------------------------------------


def build_config(model_type: str, text_type: str | None = None, vision_type: str | None = None, **kwargs: Any) -> Any:
    text = {**TEXT, **kwargs.pop("text", {})}
    vision = {**VISION, **kwargs.pop("vision", {})}
    if text_type:
        text["model_type"] = text_type
    if vision_type:
        vision["model_type"] = vision_type
    arguments = {"tie_word_embeddings": False, **kwargs}
    return AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **arguments)


CLIP = {"image_size": 32, "patch_size": 4, "projection_dim": 32}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
ROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [4, 6, 6]}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": OPEN,
    "vision_end_token_id": CLOSE,
}


def llava_config(model_type: str, **kwargs: Any) -> Callable[[], Any]:
    kwargs = {
        "text_type": "llama",
        "vision_type": "clip_vision_model",
        "vision": CLIP,
        "image_token_index": IMAGE,
    } | kwargs
    return lambda: build_config(model_type, **kwargs)


def qwen_config(model_type: str, **vision: Any) -> Callable[[], Any]:
    base = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2, "num_heads": 2}
    return lambda: build_config(model_type, text={"rope_parameters": ROPE}, vision={**base, **vision}, **QWEN_IDS)


def qwen3_config(model_type: str, **text: Any) -> Callable[[], Any]:
    vision = {
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2, "num_heads": 2,
        "out_hidden_size": 128, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64,
    }  # fmt: skip
    rope = {**ROPE, "mrope_interleaved": True}
    return lambda: build_config(model_type, text={"rope_parameters": rope, **text}, vision=vision, **QWEN_IDS)


# A layer of gated delta net, whose state does not grow, and two of gated attention that rotate half the channels.
HYBRID: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {**ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.5},
}


def qwen3_5_config(model_type: str, **text: Any) -> Callable[[], Any]:
    vision = {
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2, "num_heads": 2,
        "out_hidden_size": 128, "num_position_embeddings": 64,
    }  # fmt: skip
    return lambda: build_config(model_type, text={**HYBRID, **text}, vision=vision, **QWEN_IDS)


def minicpm_config(model_type: str, **marks: int) -> Callable[[], Any]:
    vision = {"image_size": 64, "patch_size": 2, "insert_layer_id": 0}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "insert_layer_id": 0, **marks}
    return lambda: build_config(model_type, "qwen3_5_text", text=HYBRID, vision=vision, **ids)


def packed_patches(size: int, generator: torch.Generator) -> tuple[list[int], Any]:
    """MiniCPM-V: patches side by side ``[3, 2, 2 h w]``, of which 4 x 4 become a token, and their grid."""
    height, width = ((32, 32), (40, 32), (16, 48))[size]
    patches = draw_pixels(3, 2, 2 * height * width, generator=generator)
    return [OPEN, *[IMAGE] * (height * width // 16), CLOSE], (patches, (height, width))


def pack_patches(rows: list[list[Any]]) -> dict[str, Tensor]:
    images = [image for row in rows for image in row]
    return {
        "pixel_values": torch.cat([patches for patches, _ in images], -1)[None],
        "target_sizes": torch.tensor([grid for _, grid in images], dtype=torch.int32),
    }


# Full layers have heads of their own width and number, whose Values are made of the Keys.
GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 32,
    "global_head_dim": 32,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "use_bidirectional_attention": "vision",
    "hidden_size_per_layer_input": 0,
}
# The last two layers have no Keys of their own, and each layer adds an embedding of the ids.
GEMMA4_SHARED = {
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "sliding_window": 32,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
}


def gemma4_config(**text: Any) -> Callable[[], Any]:
    vision = {"patch_size": 2, "pooling_kernel_size": 2, "num_key_value_heads": 2, "head_dim": 16}
    vision["position_embedding_size"] = 64
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "boi_token_id": OPEN, "eoi_token_id": CLOSE}
    ids["audio_token_id"] = BREAK
    return lambda: build_config("gemma4", text=text, vision=vision, audio_config=None, **ids)


def gemma3n_config() -> Any:
    """Its vision tower, of the library timm, is not installed for the tests."""
    text = {name: value for name, value in GEMMA4_SHARED.items() if name != "global_head_dim"}
    audio = {"hidden_size": 32, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "vocab_offset": VOCAB}
    vision = {"image_size": 32, "patch_size": 4, "vision_use_head": False, "vocab_offset": VOCAB, "vocab_size": 1}
    vision = AutoConfig.for_model("siglip_vision_model", **VISION, **vision, rms_norm_eps=1e-6)
    more = {"intermediate_size": [96] * 5, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 5}
    config = AutoConfig.for_model(
        "gemma3n",
        text_config={**TEXT, **text, **more},
        audio_config={**audio, "vocab_size": 1},
        vision_soft_tokens_per_image=64,
        image_token_id=IMAGE,
        audio_token_id=BREAK,
    )
    object.__setattr__(config, "vision_config", vision)  # which is checked to be its own
    return config


def llama4_config() -> Any:
    text = {
        "layer_types": ["chunked_attention", "full_attention", "full_attention"],
        "no_rope_layers": [1, 0, 0],
        "attention_chunk_size": 64,
        "floor_scale": 32,
        "intermediate_size_mlp": 96,
        "num_local_experts": 2,
        "moe_layers": [1],
    }
    vision = {"image_size": 32, "patch_size": 2, "vision_output_dim": 32, "projector_input_dim": 32}
    return build_config(
        "llama4",
        text=text,
        vision={**vision, "projector_output_dim": 32, "intermediate_size": 128},
        image_token_index=IMAGE,
        boi_token_index=OPEN,
        eoi_token_index=CLOSE,
    )


def flat_patches(size: int, generator: torch.Generator) -> tuple[list[int], Tensor]:
    """Gemma 4: the 16 x 16 patches of an image ``[256, 12]``, of which 2 x 2 become a token."""
    return [OPEN, *[IMAGE] * 64, CLOSE], draw_pixels(256, 12, generator=generator)


def stack_patches(rows: list[list[Tensor]]) -> dict[str, Tensor]:
    pixels = torch.stack([image for row in rows for image in row])
    place = torch.stack(torch.meshgrid(torch.arange(16), torch.arange(16), indexing="xy"), -1).flatten(0, 1)
    return {"pixel_values": pixels, "image_position_ids": place.expand(len(pixels), -1, -1)}


def glm_config(model_type: str, **text: Any) -> Callable[[], Any]:
    vision = {
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": 128,
        "image_size": 64,
    }
    spans = {"image_start_token_id": OPEN, "image_end_token_id": CLOSE}
    spans |= {"video_start_token_id": BREAK, "video_end_token_id": END}
    text = {"rope_parameters": ROPE, "partial_rotary_factor": 1.0, **text}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    vision_type = None if model_type == "glm4v_moe" else "glm4v_vision"
    text_type = None if model_type == "glm4v_moe" else "glm4v_text"
    return lambda: build_config(model_type, text_type, vision_type, text=text, vision=vision, **ids, **spans)


MIXED = ["sliding_attention", "full_attention", "full_attention"]
