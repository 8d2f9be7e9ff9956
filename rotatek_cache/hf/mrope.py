"""M-RoPE: the positions of a conversation go with its cache, also where a later turn brings images.

The model keeps the offset (`rope_deltas`) of the conversation that it last read, and others may follow on it. It
numbers images from the grids of a whole conversation, while a later turn gives those of its new images only.
"""

import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rotatek_cache.hf.cache import RotateKCache
from rotatek_cache.hf.calls import CACHE_NAMES
from rotatek_cache.hf.prompt import brings_content

_POSITIONS = threading.Lock()  # while a model's offset is that of one conversation
# By the number that token types have for it: the argument with the patches of each image or video, and that of pixels.
GRIDS = {1: ("image_grid_thw", "pixel_values"), 2: ("video_grid_thw", "pixel_values_videos")}


def begin_forward(inner: Any, cache: RotateKCache, begin: int, given: Mapping[str, Any]) -> Tensor | None:
    """Put the offset of the cache's conversation on the model, none for a new one; `begin` tokens are cached.

    Args:
        inner: the attached model below the head.
        cache: holds `begin` tokens.
        begin: their number.
        given: the forward's arguments, by name.

    Returns:
        Position ids of a later turn with images, which the model would number as text; None: they need no help.
    """
    position_ids: Any = given.get("position_ids")
    ids: Any = given.get("input_ids")
    with _POSITIONS:
        shown = begin and position_ids is None and ids is not None and brings_content(dict(given))
        if shown and _names_new_images(inner, begin, ids, given):
            position_ids = _positions_of_turn(inner, cache, begin, ids, given, _model_positions(inner))
            cache.coming_deltas = begin, inner.rope_deltas
            return position_ids
        if not begin and position_ids is None:
            inner.rope_deltas = cache.rope_deltas = None  # of another conversation, or an attempt that failed
        elif begin or cache.rope_deltas is not None:
            inner.rope_deltas = cache.rope_deltas
    return None


def end_forward(inner: Any, cache: RotateKCache, begin: int) -> None:
    """Let the cache keep the offset that the forward of its positions from `begin` on has brought."""
    if cache.coming_deltas is not None and cache.coming_deltas[0] == begin:
        cache.rope_deltas = cache.coming_deltas[1]
    elif cache.rope_deltas is None:
        cache.rope_deltas = inner.rope_deltas
    cache.coming_deltas = None


def record_offsets(cache: RotateKCache, begin: int, position_ids: Tensor, mask: Tensor | None) -> None:
    """Let the cache learn the offsets of the tokens that a text model is given, from position `begin` on.

    Args:
        cache: before it holds these tokens.
        begin: the number that it holds.
        position_ids: ``[3 or 4, B, n]``; the first of four counts the visible tokens.
        mask: 2D ``[B, begin + n]``; None: all is visible.
    """
    rows, tokens = position_ids.shape[1:]
    if cache.stepping is not None or (tokens == 1 and not cache.offsets.open):
        return  # a decode step changes no offset, and reading it would make the host wait
    flags = next((v for first, _, v in reversed(cache.positions.flags) if first == begin), None)
    visual = torch.zeros_like(position_ids[0], dtype=torch.bool) if flags is None else flags.to(position_ids.device)
    visual = visual.repeat_interleave(rows // visual.shape[0], 0)
    seen = torch.ones_like(visual) if mask is None else mask[:, begin : begin + tokens].bool().to(visual.device)
    if len(position_ids) == 4:
        counted = position_ids[0]
    elif mask is None:
        counted = torch.arange(begin, begin + tokens, device=visual.device)
    else:
        counted = mask.long().cumsum(1)[:, begin : begin + tokens].to(visual.device) - 1
    cache.offsets.record(begin, position_ids[-1] - counted, seen & ~visual)
    cache.offsets.open = bool(visual[:, -1].any())


def prepare_positions(
    inner: Any,
    cache: RotateKCache,
    inputs: Tensor,
    given: Mapping[str, Any],
    prepare: Callable[[Tensor, dict[str, Any]], Tensor],
) -> Tensor:
    """Compute the position ids of a generate with the offset of the cache's conversation, which new images change.

    Args:
        inner: the attached model below the head.
        cache: its rows may have been repeated already, as generate is going to repeat those of the ids.
        inputs: ids ``[B, T]`` of the conversation or of the turn, or embeddings.
        given: the arguments of generate, by name.
        prepare: computes position ids of inputs with arguments.
    """
    with _POSITIONS:
        begin, ids = cache.get_seq_length(), given.get("input_ids")
        ids = inputs if ids is None or ids.shape[1] == 0 else ids
        if begin and cache.rope_deltas is not None:
            repeats = max(1, cache.rope_deltas.shape[0] // ids.shape[0])
            inner.rope_deltas = cache.rope_deltas[::repeats]
            cache.rope_deltas = inner.rope_deltas
        if begin and ids.ndim == 2 and brings_content(dict(given)) and _names_new_images(inner, begin, ids, given):
            turn = _positions_of_turn(inner, cache, begin, ids, given, prepare)
            positions = torch.nn.functional.pad(turn, (begin, 0))  # of cached tokens nothing is read
        else:
            positions = prepare(inputs, dict(given))
        if begin:
            cache.coming_deltas = begin, inner.rope_deltas  # kept once the turn is in the cache, which may yet fail
        else:
            cache.rope_deltas = inner.rope_deltas
    return positions


def _turn_length(begin: int, ids: Tensor, given: Mapping[str, Any]) -> int:
    """Count the new tokens: `ids` are those of the whole conversation or of the turn, a mask that of the whole."""
    mask = given.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return ids.shape[1] if ids.shape[1] <= begin else ids.shape[1] - begin
    return int(mask.shape[1]) - begin


def _names_new_images(inner: Any, begin: int, ids: Tensor, given: Mapping[str, Any]) -> bool:
    """Tell whether the grids are those of the new images; False: of the whole conversation, or nothing is new.

    Raises:
        ValueError: they are neither, or nothing says which tokens are images.
    """
    new, types = _turn_length(begin, ids, given), given.get("mm_token_type_ids")
    if new <= 0:
        return False
    if types is None:
        numbering = getattr(inner, "get_rope_index", None)
        if numbering is None or "mm_token_type_ids" not in inspect.signature(numbering).parameters:
            return False  # it finds images by their ids, and takes the grids of all
        raise ValueError(
            "a turn that brings images or videos to a cached conversation needs mm_token_type_ids, by which its "
            "positions (M-RoPE) are found: pass those that the processor returns beside input_ids"
        )
    if not bool(types[:, -new:].any()):
        return False
    if all(given.get(grid) is None for grid, _ in GRIDS.values()):
        # Other families have grids under other names, which belong to the pixels where there are any.
        return any(given.get(pixels) is not None for _, pixels in GRIDS.values())
    whole, merged = True, inner._rotatek.family.merged
    for kind, (grid_name, pixels_name) in GRIDS.items():
        grid, pixels = given.get(grid_name), given.get(pixels_name)
        patches = 0 if grid is None else int(grid.prod(-1).sum())
        flags = types == kind
        if merged:
            tokens = patches // inner.config.vision_config.spatial_merge_size**2
        else:  # of what has no known number of tokens, the images are counted: by the first token of each
            tokens = 0 if grid is None else len(grid)
            flags = flags & ~torch.nn.functional.pad(flags[:, :-1], (1, 0))
        of_turn, of_all = int(flags[:, -new:].sum()), int(flags.sum())
        if of_turn and tokens == of_turn:
            whole = False
        elif tokens != of_turn and (tokens != of_all or (pixels is not None and pixels.shape[0] != patches)):
            raise ValueError(
                f"{grid_name} describes {tokens} {'tokens' if merged else 'images'}, but this turn has {of_turn} "
                f"{'placeholders' if merged else 'images'} behind the {begin} "
                f"tokens in the cache: what earlier turns showed is in the cache, so pass {grid_name} and "
                f"{pixels_name} of new images only, with the ids of the whole conversation"
            )
    return not whole


def _positions_of_turn(
    inner: Any,
    cache: RotateKCache,
    begin: int,
    ids: Tensor,
    given: Mapping[str, Any],
    compute: Callable[[Tensor, dict[str, Any]], Tensor],
) -> Tensor:
    """Count the positions of a turn as if it were a prompt of its own, and shift that to where the conversation ends.

    Leaves the offset behind the turn on the model.
    """
    new = _turn_length(begin, ids, given)
    mask, offset = given.get("attention_mask"), cache.rope_deltas
    # How many tokens a row has behind it is not how many it has in the cache, which holds its padding too.
    if mask is None:
        behind = torch.full((len(ids), 1), begin, dtype=torch.int64, device=ids.device)
    else:
        behind = mask[:, :begin].sum(1, keepdim=True).to(ids.device)
    turn = {name: value for name, value in given.items() if name not in (*CACHE_NAMES, "input_ids")}
    if mask is not None:
        turn["attention_mask"] = mask[:, -new:]
    if turn.get("mm_token_type_ids") is not None:
        turn["mm_token_type_ids"] = turn["mm_token_type_ids"][:, -new:]
    inner.rope_deltas = None
    positions = compute(ids[:, -new:], turn)
    before = torch.zeros_like(behind) if offset is None else offset.to(behind)
    before = before.repeat_interleave(len(ids) // len(before), 0)
    inner.rope_deltas = inner.rope_deltas + before
    counted = [behind] * (len(positions) - 3)  # the first of four
    return positions + torch.stack([*counted, *[behind + before] * 3])


def _model_positions(inner: Any) -> Callable[[Tensor, dict[str, Any]], Tensor]:
    """Compute position ids of ids and arguments as the model does in a forward of its own."""
    wanted = inspect.signature(inner.compute_3d_position_ids).parameters

    def compute(ids: Tensor, given: dict[str, Any]) -> Tensor:
        arguments = {name: given.get(name) for name in wanted} | {"input_ids": ids}
        positions: Tensor = inner.compute_3d_position_ids(**arguments)
        return positions

    return compute
