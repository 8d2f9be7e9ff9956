"""Which patches of a vision encoder each visual token shows: the layouts that `families` names."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotatek_cache.hf.encoder_tap import EncoderTap


@dataclass(frozen=True)
class Encoding:
    """One call of `get_image_features`.

    Attributes:
        inner: the model below the language-modelling head.
        tower: its vision encoder.
        given: arguments of the call, by name.
        lengths: visual tokens of each entry of the features.
    """

    inner: Any
    tower: Any
    given: dict[str, Any]
    lengths: Sequence[int]

    @property
    def tokens(self) -> int:
        """Visual tokens in all."""
        return sum(self.lengths)


# From what a tap heard to the signal of each visual token [total, c]: the mean over its patches.
Layout = Callable[[EncoderTap, Encoding], Tensor]


def in_order(tap: EncoderTap, encoding: Encoding) -> Tensor:
    """Average the same number of consecutive patches for each token."""
    signal = torch.cat([part.flatten(0, 1) for part in tap.heard])
    group, rest = divmod(len(signal), encoding.tokens)
    if rest or not group:
        raise ValueError(
            f"{encoding.inner.config.model_type}: {len(signal)} patches of the vision encoder do not divide evenly "
            f"into {encoding.tokens} visual tokens"
        )
    return signal.unflatten(0, (-1, group)).mean(1)


def in_windows(tap: EncoderTap, encoding: Encoding) -> Tensor:
    """Average as `in_order`, where the encoder sorts groups of patches by the windows that its layers attend in."""
    from transformers.vision_utils import get_vision_window_index  # noqa: PLC0415 (not there before 5.2x)

    encoder = encoding.tower
    index, _ = get_vision_window_index(
        encoding.given["image_grid_thw"],
        spatial_merge_size=encoder.spatial_merge_size,
        window_size=encoder.window_size,
        patch_size=encoder.patch_size,
    )
    return in_order(tap, encoding)[index.argsort()]


def on_squares(tap: EncoderTap, encoding: Encoding) -> Tensor:
    """Average a block of patches for each token: tiles are squares of patches, their tokens squares of fewer."""
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
    """Average a square of patches for each token; all images stand in one sequence, line by line."""
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
    """Take the signal as the model itself has packed the tiles of an image (`note_packing`)."""
    assert tap.packed is not None
    return torch.cat(tap.packed)


def _pooled(signal: Tensor, grid: tuple[int, int], tokens: tuple[int, int]) -> Tensor:
    """Average over blocks of the grid of patches ``[N, patches, c]`` to ``[N, tokens, c]``; edges may be cut."""
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
    """The place of a family's vision encoder, and how its patches become visual tokens.

    Args:
        name: the attribute of the model.
        layout: which patches a token shows.
        class_token: whether each sequence begins with a class token, whose feature is thrown away; None: if the
            config's `vision_feature_select_strategy` is "default".
    """

    name: str
    layout: Layout = on_squares
    class_token: bool | None = None
