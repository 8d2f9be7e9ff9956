"""`attach(model)`: one call that wires a vision-language model."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rotatek_cache.cache.expected_prompt import ExpectedPrompt
from rotatek_cache.codecs.basis_file import load_basis
from rotatek_cache.hf import mrope
from rotatek_cache.hf.attachment import Attachment, attachment_of, check_adapter, inner_model
from rotatek_cache.hf.cache import RotateKCache
from rotatek_cache.hf.calls import CACHE_NAMES, arguments_of, cache_in, cache_name
from rotatek_cache.hf.decode_graphs import GRAPHS, DecodeGraphs
from rotatek_cache.hf.families import FAMILIES, PARTS, Family, family_of, placeholder_ids, refusal
from rotatek_cache.hf.feature_choice import kept_features
from rotatek_cache.hf.generate_methods import replace_methods, restore_methods
from rotatek_cache.hf.prompt import brings_content, check_content_is_new, visual_positions
from rotatek_cache.hf.structure import obstacle_inside
from rotatek_cache.token_pruning.interface import FeatureMethod

M = TypeVar("M", bound=torch.nn.Module)


def attach(model: M, *, visual_token_ids: Sequence[int] | None = None, graphs: int = GRAPHS) -> M:
    """Make ``model.generate(..., cache=RotateKCache(...))`` work for the rest of the model's life.

    From transformers 5.24 on the argument is also called `cache`.

    Forwards with a `RotateKCache` use the attention function "rotatek" in the text model (the vision tower keeps its
    own) and tell the cache which positions are visual. Any other cache behaves as before. Calling it twice changes
    nothing.

    Args:
        model: a vision-language model of transformers, or a PEFT wrapper around one. Of a model that speaks (Qwen Omni)
            the part that reads and thinks is attached.
        visual_token_ids: ids that stand for visual tokens in `input_ids`; None: those of the model's family, by the
            table. With ids any decoder whose layers are of the usual kind can be tried, of a known family or not: see
            `rotatek_cache.hf.identity`.
        graphs: how many CUDA graphs of decode steps the model keeps, 0 for none (`rotatek_cache.hf.decode_graphs`).

    Returns:
        The same object.

    Raises:
        TypeError: `model` is no transformers model, or `visual_token_ids` are no ids.
        ValueError: its family is not known, or has what a `RotateKCache` cannot do.
        RuntimeError: this version of transformers lacks a method that attach replaces.
    """
    top = _host_model(model)
    check_adapter(model)
    inner = inner_model(top)
    attachment = attachment_of(inner)
    if attachment is not None:
        if visual_token_ids is not None and attachment.placeholders != _checked_ids(visual_token_ids):
            raise ValueError(
                f"model is attached with the visual token ids {attachment.placeholders} already, got "
                f"{list(visual_token_ids)}: call detach(model) first"
            )
        return model
    family, placeholders = _check(top, inner, visual_token_ids)
    replace_methods(top, inner, family)
    attachment = Attachment(family, *_text_configs(top), placeholders, graphs=DecodeGraphs(graphs))
    attachment.processes = getattr(top, "tp_size", None) or 1
    attachment.handles = [
        inner.register_forward_pre_hook(_before_forward, with_kwargs=True),
        inner.register_forward_hook(_after_forward, with_kwargs=True, always_call=True),
    ]
    text_model = top.get_decoder()
    if text_model not in (top, inner):
        attachment.handles.append(text_model.register_forward_pre_hook(TextModelGuard(attachment), with_kwargs=True))
    inner._rotatek = attachment
    return model


def detach(model: M) -> M:
    """Undo `attach`; do nothing to a model that is not attached. Return the same object."""
    top = _host_model(model)
    inner = inner_model(top)
    attachment = attachment_of(inner)
    if attachment is None:
        return model
    attachment.end()
    attachment.graphs.forget()
    for handle in attachment.handles:
        handle.remove()
    del inner._rotatek
    restore_methods(top, inner)
    return model


def _host_model(model: Any) -> PreTrainedModel:
    # PEFT wraps the model, and its own `forward` calls the wrapped one's without hooks; those below the head still run.
    host = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    part = PARTS.get(getattr(getattr(host, "config", None), "model_type", ""))
    host = getattr(host, part) if part else host
    if not isinstance(host, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel (or a PEFT wrapper of one), got {type(model).__name__}"
        )
    return host


def _text_configs(top: PreTrainedModel) -> tuple[list[PreTrainedConfig], list[PreTrainedConfig]]:
    """List the config of the text model and copies of it that modules hold, and the configs of parts below those."""
    text_config = top.config.get_text_config(decoder=True)
    held = (getattr(module, "config", None) for module in top.modules())
    same = {id(text_config): text_config} | {id(c): c for c in held if type(c) is type(text_config)}
    below = [getattr(config, name, None) for config in same.values() for name in config.sub_configs]
    return list(same.values()), [config for config in below if config is not None]


def _check(top: PreTrainedModel, inner: Any, ids: Sequence[int] | None) -> tuple[Family, list[int]]:
    """Find what attach needs to know of a model, and the ids of its visual tokens; raise if it cannot be attached."""
    config = top.config
    reason = refusal(config) or obstacle_inside(top.get_decoder())
    if reason:
        raise ValueError(
            f"{type(top).__name__} ('{config.model_type}') cannot use RotateKCache: {reason}. It is left as it was, "
            "and other caches (DynamicCache) go on working with it"
        )
    if ids is not None:
        mrope = hasattr(inner, "rope_deltas")
        return FAMILIES.get(
            config.model_type, Family(None, (), mrope, hasattr(inner, "get_image_features"))
        ), _checked_ids(ids)
    if config.model_type not in FAMILIES and len(config.sub_configs) < 2:
        raise ValueError(
            f"model must be a vision-language model, got {type(top).__name__} ('{config.model_type}'), which has no "
            "vision config: RotateKCache compresses visual Keys only. If some of its ids stand for visual tokens, name "
            "them: attach(model, visual_token_ids=[...])"
        )
    return family_of(config), placeholder_ids(config)


def _checked_ids(ids: Sequence[int]) -> list[int]:
    given: Any = ids  # what a caller may have passed
    listed: list[Any] = list(given) if isinstance(given, Iterable) else [given, None]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
        raise TypeError(f"visual_token_ids must be a list of ints, got {ids!r}")
    return sorted(set(listed))


def _cache_of(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RotateKCache | None:
    """Find the `RotateKCache` that a forward of `module` is called with."""
    cache = cache_in(kwargs)
    if cache is None and args:
        cache = cache_in(arguments_of(type(module).forward, module, *args))
    return cache if isinstance(cache, RotateKCache) else None


def _before_forward(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Select the attention function and tell the cache which of the coming positions are visual: a forward pre-hook.

    Returns the arguments where they change: position ids are given to a turn whose images the model would not number.
    """
    cache = _cache_of(module, args, kwargs)
    if cache is not None:
        changed = _begin(module, cache, args, kwargs)
        return None if changed is None else ((), changed)
    if module._rotatek.threads:
        module._rotatek.meet_another_cache()
    return None


@dataclass(frozen=True)
class TextModelGuard:
    """A forward pre-hook of the text model, which refuses a `RotateKCache` where the model above is not called."""

    attachment: Attachment

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise a ValueError in a call that did not come through the model above; note the offsets of positions."""
        cache = None if torch.compiler.is_compiling() else _cache_of(module, args, kwargs)
        if cache is None:
            return
        if threading.get_ident() not in self.attachment.threads:
            raise ValueError(
                f"{type(module).__name__}, the text model of an attached model, was called with a RotateKCache: call "
                "the attached model itself, with inputs_embeds=... and RotateKCache(..., visual_mask=mask) where text "
                "and images are merged already; the mask is a bool tensor [rows, prompt length], True on visual tokens"
            )
        position_ids, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if self.attachment.family.mrope and isinstance(position_ids, Tensor) and position_ids.ndim == 3:
            mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
            mrope.record_offsets(cache, cache.get_seq_length(), position_ids, mask)


@torch.compiler.disable  # which positions are visual is decided on the host, forward by forward
def _begin(module: Any, cache: RotateKCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return all arguments by name where the model needs other position ids."""
    attachment: Attachment = module._rotatek
    attachment.select()  # first of all: `_after_forward` is called whatever happens
    attachment.begin_filling(cache)
    given = arguments_of(type(module).forward, module, *args, **kwargs)
    name = cache_name(type(module).forward)
    if given.get(CACHE_NAMES[0]) is cache and name != CACHE_NAMES[0]:
        raise ValueError(
            f"{type(module).__name__} of transformers {transformers.__version__} does not know `{CACHE_NAMES[0]}` and "
            f"would ignore this RotateKCache: pass it as {name}=..."
        )
    config = module.config
    if given.get("output_attentions") or config.get_text_config(decoder=True).output_attentions:
        raise ValueError("RotateKCache does not support `output_attentions`: no attention matrix is formed")
    if module.training and torch.is_grad_enabled():
        raise ValueError("RotateKCache is for inference: call model.eval() or use torch.no_grad()")
    if isinstance(cache.tokens, FeatureMethod) and not attachment.family.features:
        raise ValueError(
            f"tokens={cache.tokens} are chosen from the features of each image, and {type(module).__name__} has none "
            "that are handed to the language model as one: use a method that chooses by attention (VLCache, FastV)"
        )
    cache.learn_config(config)
    if attachment.processes > 1:
        cache.check_local_heads(attachment.processes)
    else:
        cache.meet_model(attachment.mark_of(module))
    if cache.options.is_calibrated:
        load_basis(cache.options.basis).check_model(attachment.mark_of(module).fingerprint())
    ids = given.get("input_ids")
    content = given.get("inputs_embeds") if ids is None else ids
    if content is None:
        return None  # the forward itself says what is missing
    tokens = content.shape[1]
    begin = cache.get_seq_length()
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] < begin + tokens:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} positions, but this RotateKCache already holds {begin} and "
            f"{tokens} are new: to go on, pass the mask of the whole conversation; for another prompt call "
            "cache.reset()"
        )
    visual = visual_positions(module, cache, given, begin)
    # A model without `get_image_features` is handed its images in every step, and looks at them where ids ask for it.
    if begin and ids is not None and hasattr(module, "get_image_features") and brings_content(given):
        expected = cache.positions.expected
        whole = visual if expected is None else expected.visual.repeat_interleave(expected.repeats, 0)
        check_content_is_new(whole, given.get("mm_encoder_outputs"), begin)
    visual = None if visual is None else visual.cpu()
    cache.announce_visual(visual, tokens)
    expected = cache.positions.expected
    if expected is not None and not expected.agrees(begin, visual, tokens):
        cache.positions.expect(None)  # of a generate that came to nothing
    if cache.positions.expected is None and visual is not None:
        seen = torch.ones_like(visual) if mask is None or mask.ndim != 2 else mask[:, begin : begin + tokens].bool()
        cache.positions.expect(ExpectedPrompt(begin, visual, seen.cpu()))
    _learn_padding(cache, mask, begin + tokens)
    if isinstance(cache.tokens, FeatureMethod):
        encoded = (given.get("mm_encoder_outputs") or {}).get("image")
        if encoded is None:
            attachment.choosing[threading.get_ident()] = cache
        elif cache.chosen:
            cache.positions.drop(kept_features(encoded.pooler_output))
    if begin == 0:
        cache.positions.begin_prompt(ids)
    position_ids = mrope.begin_forward(module, cache, begin, given) if attachment.family.mrope else None
    if position_ids is None:
        return None
    return {name: value for name, value in given.items() if name != "self"} | {"position_ids": position_ids}


def _learn_padding(cache: RotateKCache, mask: Any, end: int) -> None:
    """Tell a cache that is going to seal which positions up to `end` are padding, where the model's `mask` says so.

    The masks that the layers get are made of it, on the device: to read those would be to wait for it.
    """
    positions, expected = cache.positions, cache.positions.expected
    if not positions.unsealed:
        return
    if mask is None:
        positions.learn_padding(None)
    elif isinstance(mask, Tensor) and mask.ndim == 2:
        positions.learn_padding(mask[:, :end].bool())
    elif expected is not None and expected.padding_known and end <= expected.end:
        positions.learn_padding(expected.shown(end))  # generate has made a larger mask of it


def _after_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Restore what the pre-hook selected: a forward hook, called after errors too."""
    cache = _cache_of(module, args, kwargs)
    if cache is not None:
        _end(module, cache, output)


@torch.compiler.disable
def _end(module: Any, cache: RotateKCache, output: Any) -> None:
    try:
        if output is not None:
            begin = module._rotatek.end_filling()
            if module._rotatek.family.mrope:
                mrope.end_forward(module, cache, begin)
    finally:
        _close(module, cache)


def _close(module: Any, cache: RotateKCache) -> None:
    """Restore what the forward's beginning changed."""
    module._rotatek.restore()
    module._rotatek.choosing.pop(threading.get_ident(), None)
    cache.positions.end_forward()
    expected = cache.positions.expected
    if expected is not None and cache.positions.end >= expected.end:
        cache.positions.expect(None)
