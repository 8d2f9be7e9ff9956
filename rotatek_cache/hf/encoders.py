"""The vision encoders of the model families: where they are, and which of its patches each visual token shows.

Beside `wiring`, the only file that knows model families.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotatek_cache.hf.encoder_tap import EncoderTap, tapped
from rotatek_cache.token_pruning.interface import FeatureMethod


@dataclass(frozen=True)
class Encoding:
    """One call of `get_image_features`.

    Attributes:
        inner: the model below the language-modelling head.
        given: arguments of the call, by name.
        lengths: visual tokens of each entry of the features.
    """

    inner: Any
    given: dict[str, Any]
    lengths: Sequence[int]

    @property
    def tokens(self) -> int:
        """Visual tokens in all."""
        return sum(self.lengths)


# From what a tap heard to the signal of each visual token [total, c]: the mean over the patches that it shows.
Layout = Callable[[EncoderTap, Encoding], Tensor]


def in_order(tap: EncoderTap, encoding: Encoding) -> Tensor:
    """Each token shows the same number of consecutive patches."""
    signal = torch.cat([part.flatten(0, 1) for part in tap.heard])
    group, rest = divmod(len(signal), encoding.tokens)
    if rest or not group:
        raise ValueError(
            f"{encoding.inner.config.model_type}: {len(signal)} patches of the vision encoder do not divide evenly "
            f"into {encoding.tokens} visual tokens"
        )
    return signal.unflatten(0, (-1, group)).mean(1)


def in_windows(tap: EncoderTap, encoding: Encoding) -> Tensor:
    """As `in_order`, but the encoder sorts groups of patches by the windows that most of its layers attend in."""
    from transformers.vision_utils import get_vision_window_index  # noqa: PLC0415 (not there before 5.2x)

    encoder = encoding.inner.visual
    index, _ = get_vision_window_index(
        encoding.given["image_grid_thw"],
        spatial_merge_size=encoder.spatial_merge_size,
        window_size=encoder.window_size,
        patch_size=encoder.patch_size,
    )
    return in_order(tap, encoding)[index.argsort()]


def on_squares(tap: EncoderTap, encoding: Encoding) -> Tensor:
    """Tiles are squares of patches, their tokens squares of fewer, each of which shows a block of patches."""
    signal = tap.patches
    tiles, patches, _ = signal.shape
    side, token_side = math.isqrt(patches), math.isqrt(encoding.tokens // max(1, tiles))
    pixels = encoding.given.get("pixel_values")
    whole = pixels is None or pixels.ndim != 4 or len(pixels) == tiles
    if side * side != patches or token_side**2 * tiles != encoding.tokens or not token_side or not whole:
        raise ValueError(
            f"{encoding.inner.config.model_type}: {tiles} tiles of {patches} patches in the vision encoder are no "
            f"squares that could show as {encoding.tokens} visual tokens"
        )
    return _pooled(signal, (side, side), (token_side, token_side)).flatten(0, 1)


def by_image_size(tap: EncoderTap, encoding: Encoding) -> Tensor:
    """All images in one sequence, row by row; a token shows a square of patches."""
    config = encoding.inner.config
    merged, patch = config.spatial_merge_size, config.vision_config.patch_size
    grids = [(int(height) // patch, int(width) // patch) for height, width in encoding.given["image_sizes"]]
    images = tap.patches.flatten(0, 1).split([height * width for height, width in grids])
    return torch.cat(
        [
            _pooled(image[None], grid, (grid[0] // merged, grid[1] // merged))[0]
            for image, grid in zip(images, grids, strict=True)
        ]
    )


def packed(tap: EncoderTap, encoding: Encoding) -> Tensor:
    """As the model itself packs the tiles of an image (`note_packing`)."""
    assert tap.packed is not None
    return torch.cat(tap.packed)


def _pooled(signal: Tensor, grid: tuple[int, int], tokens: tuple[int, int]) -> Tensor:
    """``[N, tokens, c]``: means over blocks of the grid of patches ``[N, patches, c]``; edges may be cut."""
    if grid == tokens:
        return signal
    block = (-(-grid[0] // tokens[0]), -(-grid[1] // tokens[1]))
    image = signal.unflatten(1, grid).permute(0, 3, 1, 2)
    pooled = torch.nn.functional.avg_pool2d(image, block, ceil_mode=True, count_include_pad=False)
    return pooled[..., : tokens[0], : tokens[1]].flatten(2).mT


def note_packing(tap: EncoderTap, pack: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Pack what was heard as the model packs its features: `pack` is its function, called with `arguments`."""
    signal = tap.patches
    tiles = signal.split([len(image) for image in arguments["image_features"]])
    newline = arguments.get("image_newline")
    newline = None if newline is None else signal.new_zeros(signal.shape[-1])
    tap.packed = list(pack(**arguments | {"image_features": tiles, "image_newline": newline})[0])


@dataclass(frozen=True)
class Encoder:
    """Where a family's encoder is and how its patches become visual tokens.

    Args:
        name: the attribute of the model.
        layout: which patches a token shows.
        class_token: whether each sequence begins with a class token, whose feature is thrown away; None: if the
            config's `vision_feature_select_strategy` is "default".
    """

    name: str
    layout: Layout = on_squares
    class_token: bool | None = None


_TOWER = Encoder("vision_tower")
_ANYRES = Encoder("vision_tower", packed)
_VISUAL = Encoder("visual", in_order)
_IDEFICS = Encoder("vision_model")

# model_type -> facts, for the families of `wiring.FAMILIES`.
ENCODERS: dict[str, Encoder] = {
    "aya_vision": _TOWER,
    "cohere2_vision": _TOWER,
    "gemma3": _TOWER,
    "glm46v": _VISUAL,
    "glm4v": _VISUAL,
    "glm4v_moe": _VISUAL,
    "got_ocr2": _TOWER,
    "idefics3": _IDEFICS,
    "internvl": _TOWER,
    "lighton_ocr": Encoder("vision_encoder", by_image_size),
    "llava": Encoder("vision_tower", in_order),
    "llava_next": _ANYRES,
    "llava_next_video": _ANYRES,
    "llava_onevision": _ANYRES,
    "mistral3": Encoder("vision_tower", by_image_size),
    "ovis2": _TOWER,
    "paligemma": _TOWER,
    "qwen2_5_vl": Encoder("visual", in_windows),
    "qwen2_vl": _VISUAL,
    "qwen3_vl": _VISUAL,
    "qwen3_vl_moe": _VISUAL,
    "smolvlm": _IDEFICS,
    "vipllava": Encoder("vision_tower", in_order, class_token=True),
}


@contextlib.contextmanager
def encoder_tap(inner: Any, method: FeatureMethod, given: dict[str, Any]) -> Iterator[EncoderTap | None]:
    """Listens to the encoder's layer that a method reads while `get_image_features` is called; None if it reads none.

    That is the layer which the features come from, the last of them where several are put side by side.

    Args:
        inner: the model below the language-modelling head.
        method: the method.
        given: arguments of the call, by name.
    """
    if not method.reads_encoder:
        yield None
        return
    config = inner.config
    encoder = ENCODERS.get(config.model_type)

    def setting(key: str) -> Any:
        value = given.get(key)
        return getattr(config, key, None) if value is None else value

    name = type(method).__name__
    other = "use a method that needs features only (DivPrune), or one that reads the language model (FastV, VLCache)"
    module: Any = None if encoder is None else getattr(inner, encoder.name, None)
    if encoder is None or module is None:
        raise ValueError(
            f"{name} reads attention of the vision encoder, token by token, and which encoder patches the visual "
            f"tokens of '{config.model_type}' show is not known (it is for {', '.join(sorted(ENCODERS))}): {other}"
        )
    attention = [
        part
        for part in module.modules()
        if type(part).__name__.endswith("Attention") and (hasattr(part, "config") or hasattr(part, "qkv"))
    ]
    if not attention:
        raise ValueError(
            f"{name} reads attention of the vision encoder, and {type(module).__name__} of this model has no attention "
            f"layer that can be read: {other}"
        )
    layers = setting("vision_feature_layer")
    layers = [-1] if layers is None else [layers] if isinstance(layers, int) else list(layers)
    # Hidden states begin with the embeddings.
    layer = max(index if index >= 0 else len(attention) + 1 + index for index in layers)
    if not 1 <= layer <= len(attention):
        raise ValueError(
            f"{name} reads the encoder layer that the features come from; vision_feature_layer="
            f"{setting('vision_feature_layer')} is none of its {len(attention)} attention layers"
        )
    has_class_token = encoder.class_token
    if has_class_token is None:
        has_class_token = setting("vision_feature_select_strategy") == "default"
    with tapped(EncoderTap(attention[layer - 1], has_class_token)) as tap:
        yield tap


def token_signal(tap: EncoderTap | None, inner: Any, given: dict[str, Any], lengths: Sequence[int]) -> Tensor | None:
    """What a tap heard of each visual token ``[total, 2 + k]``; entry i of the features has ``lengths[i]``."""
    if tap is None:
        return None
    signal = ENCODERS[inner.config.model_type].layout(tap, Encoding(inner, given, lengths))
    if len(signal) != sum(lengths):
        raise ValueError(
            f"{inner.config.model_type}: the vision encoder's patches show {len(signal)} visual tokens, the model has "
            f"{sum(lengths)}"
        )
    return signal
