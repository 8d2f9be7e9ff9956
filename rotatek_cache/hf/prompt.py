"""Which positions of a forward are visual."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rotatek_cache.hf.cache import RotateKCache

# Arguments of a forward that carry visual content: later in a conversation, placeholder ids without any of them are
# ordinary text.
CONTENT = (
    "pixel_values",
    "pixel_values_videos",
    "image_pixel_values",
    "mm_encoder_outputs",
    "image_hidden_states",
    "image_embeds",
    "video_embeds",
)


def brings_content(given: dict[str, Any]) -> bool:
    """Tell whether the arguments of a call bring images or videos."""
    return any(_is_content(given.get(name)) for name in CONTENT)


def _is_content(value: Any) -> bool:
    # An empty dict is what generate passes for a turn without images; its tokens may still spell placeholder ids.
    if isinstance(value, dict):
        return any(part is not None for part in value.values())
    return value is not None


def check_content_is_new(visual: Tensor | None, encoded: Mapping[str, Any] | None, begin: int) -> None:
    """Raise a ValueError for a turn with more images than the ids behind the cached tokens stand for.

    Args:
        visual: bool ``[B, n]``, which of these ids stand for images or videos.
        encoded: what generate has encoded already, by modality.
        begin: number of cached tokens.
    """
    wanted = 0 if visual is None else int(visual.sum())
    images = getattr((encoded or {}).get("image"), "pooler_output", None)
    given = None if images is None else sum(image.flatten(0, -2).shape[0] for image in images)
    if wanted and (given is None or given <= wanted):
        return
    raise ValueError(
        f"this turn brings {'images or videos' if given is None else f'images of {given} tokens'}, but the ids behind "
        f"the {begin} tokens in the cache have {wanted} placeholders: what earlier turns showed is in the cache. Leave "
        "it out: pass the ids of the whole conversation, but pixel_values (and image sizes or grids) of new images only"
    )


def placeholder_positions(ids: Tensor, placeholders: list[int]) -> Tensor:
    """Find the placeholders among `ids` ``[B, n]``: bool ``[B, n]``."""
    return torch.isin(ids, torch.tensor(placeholders, device=ids.device))


def visual_positions(module: Any, cache: RotateKCache, given: dict[str, Any], begin: int) -> Tensor | None:
    """Find the visual positions of a forward: bool ``[B, n]``; None where it brings no visual content.

    Args:
        module: the attached model below the head.
        cache: holds `begin` positions.
        given: the forward's arguments, by name.
    """
    placeholders = module._rotatek.placeholders
    content = brings_content(given)
    ids: Any = given.get("input_ids")
    embeds: Any = given.get("inputs_embeds")
    if ids is not None:
        if begin and not content:
            mask = cache.positions.given
            if mask is not None and bool(mask[:, begin : begin + ids.shape[1]].any()):
                raise ValueError(
                    f"visual_mask {list(mask.shape)} marks positions from {begin} on as visual, which come as ids "
                    "without an image: the mask must have the length of the prompt"
                )
            return None
        return placeholder_positions(ids, placeholders)
    types_given = given.get("mm_token_type_ids")
    if types_given is not None:
        return types_given[:, -embeds.shape[1] :] > 0
    if content:
        table = module.get_input_embeddings()
        tokens = torch.tensor(placeholders, device=embeds.device)
        return (embeds[:, :, None] == table(tokens).to(embeds.dtype)).all(-1).any(-1)
    covered = cache.positions.given is not None and cache.positions.given.shape[1] >= begin + embeds.shape[1]
    if not covered and begin == 0:
        raise ValueError(
            "the prompt came as inputs_embeds, which do not tell visual from text positions: pass "
            f"RotateKCache(..., visual_mask=mask) with a bool tensor [rows, {embeds.shape[1]}] (all False for text)"
        )
    return None
