"""`attach(model)`: one call that wires a vision-language model. The only file that knows model families."""

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rotatek_cache.cache.seal_plan import Coming
from rotatek_cache.calibration.moments import fingerprint
from rotatek_cache.codecs.basis_file import load_basis
from rotatek_cache.hf import attention as hf_attention
from rotatek_cache.hf.cache import RotateKCache
from rotatek_cache.hf.encoder_tap import EncoderTap
from rotatek_cache.hf.feature_choice import arguments_of, get_image_features, kept_features, pack_image_features
from rotatek_cache.token_pruning.interface import FeatureMethod

M = TypeVar("M", bound=torch.nn.Module)


@dataclass(frozen=True)
class Family:
    """What has to be known of a model family.

    Args:
        placeholders: config fields with the ids that stand for visual tokens in `input_ids`.
    """

    placeholders: tuple[str, ...] = ("image_token_id",)


_IMAGE = Family()
_IMAGE_AND_VIDEO = Family(("image_token_id", "video_token_id"))

# model_type -> facts; each family here is run through generate by the tests.
FAMILIES: dict[str, Family] = {
    "aya_vision": _IMAGE,
    "cohere2_vision": _IMAGE,
    "gemma3": _IMAGE,
    "glm46v": _IMAGE_AND_VIDEO,
    "glm4v": _IMAGE_AND_VIDEO,
    "glm4v_moe": _IMAGE_AND_VIDEO,
    "got_ocr2": _IMAGE,
    "idefics3": _IMAGE,
    "internvl": _IMAGE,
    "lighton_ocr": _IMAGE,
    "llava": _IMAGE,
    "llava_next": _IMAGE,
    "llava_next_video": _IMAGE_AND_VIDEO,
    "llava_onevision": _IMAGE_AND_VIDEO,
    "mistral3": _IMAGE,
    "ovis2": _IMAGE,
    "paligemma": _IMAGE,
    "qwen2_5_vl": _IMAGE_AND_VIDEO,
    "qwen2_vl": _IMAGE_AND_VIDEO,
    "qwen3_vl": _IMAGE_AND_VIDEO,
    "qwen3_vl_moe": _IMAGE_AND_VIDEO,
    "smolvlm": _IMAGE,
    "vipllava": _IMAGE,
}

REFUSED_FAMILIES = {
    "mllama": "its images reach the text through cross-attention layers, whose Keys never stand in the prompt",
}

# Arguments of a forward that carry visual content: later in a conversation, placeholder ids without any of them are
# ordinary text.
CONTENT = (
    "pixel_values",
    "pixel_values_videos",
    "mm_encoder_outputs",
    "image_hidden_states",
    "image_embeds",
    "video_embeds",
)


def families() -> list[str]:
    """The model types that `attach` knows."""
    return sorted(FAMILIES)


_SELECTING = threading.Lock()
_POSITIONS = threading.Lock()  # while a model's M-RoPE offset is that of one conversation


@dataclass
class Attachment:
    """What an attached model needs during a forward, and what `detach` undoes.

    The attention function is selected for the duration of each forward that has a `RotateKCache`, so that any other
    cache meets the implementation that the model had (and may still change).

    Args:
        configs: the text configs that the attention layers read their implementation from.
        placeholders: ids that stand for visual tokens in `input_ids`.
    """

    configs: list[PreTrainedConfig]
    placeholders: list[int]
    handles: list[Any] = field(default_factory=list)
    previous: list[str | None] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)  # that are in a forward with a RotateKCache
    fingerprint: Tensor | None = None  # of the model, once a calibrated basis asks
    choosing: dict[int, RotateKCache] = field(default_factory=dict)  # by thread: chooses from what is encoded now
    taps: dict[int, EncoderTap] = field(default_factory=dict)  # by thread: listens to what is encoded now

    def fingerprint_of(self, module: torch.nn.Module) -> Tensor:
        """The fingerprint of the attached model, taken once."""
        if self.fingerprint is None:
            self.fingerprint = fingerprint(module)
        return self.fingerprint

    def select(self) -> None:
        """Begin a forward with a `RotateKCache`."""
        with _SELECTING:
            if not self.threads:
                self.previous = [config._attn_implementation for config in self.configs]
                self._set([hf_attention.NAME] * len(self.configs))
            self.threads.add(threading.get_ident())

    def restore(self) -> None:
        """End the forward that `select` began in this thread, if one is open."""
        with _SELECTING:
            if threading.get_ident() in self.threads:
                self.threads.remove(threading.get_ident())
                if not self.threads:
                    self._set(self.previous)

    def meet_another_cache(self) -> None:
        """Begin a forward without a `RotateKCache`: it must find the implementation that the model had."""
        self.restore()  # of a forward that was interrupted (torch calls no hook after a KeyboardInterrupt)
        if self.threads and any(name != "sdpa" for name in self.previous):
            raise RuntimeError(
                "another thread is in a forward with a RotateKCache, and the model's own attention "
                f"({', '.join(sorted({str(name) for name in self.previous}))}) is not sdpa: let one wait for the "
                'other, or call model.set_attn_implementation("sdpa")'
            )

    def end(self) -> None:
        """Restore whatever is open, for good."""
        with _SELECTING:
            if self.threads:
                self.threads.clear()
                self._set(self.previous)

    def _set(self, implementations: Sequence[str | None]) -> None:
        for config, implementation in zip(self.configs, implementations, strict=True):
            config._attn_implementation = implementation


def attach(model: M) -> M:
    """Make ``model.generate(..., past_key_values=RotateKCache(...))`` work for the rest of the model's life.

    Forwards with a `RotateKCache` use the attention function "rotatek" in the text model (the vision tower keeps its
    own) and tell the cache which positions are visual. Any other cache behaves as before. Calling it twice changes
    nothing.

    Args:
        model: a vision-language model of transformers, or a PEFT wrapper around one.

    Returns:
        The same object.

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: its family is not known, or has what a `RotateKCache` cannot do.
    """
    top = _host_model(model)
    family = _check(top)
    inner = _inner(top)
    if getattr(inner, "_rotatek", None) is not None:
        return model
    placeholders = [token for name in family.placeholders if (token := getattr(top.config, name, None)) is not None]
    attachment = Attachment(_text_configs(top), placeholders)
    attachment.handles = [
        inner.register_forward_pre_hook(_before_forward, with_kwargs=True),
        inner.register_forward_hook(_after_forward, with_kwargs=True, always_call=True),
    ]
    inner._rotatek = attachment  # type: ignore[assignment]
    for name, stand_in in STAND_INS.items():
        if hasattr(type(top), name):
            _stand_in(top, name, stand_in)
    for name, stand_in in INNER_STAND_INS.items():
        if hasattr(type(inner), name):
            _stand_in(inner, name, stand_in)
    return model


def _stand_in(module: Any, name: str, stand_in: Any) -> None:
    # A partial, and no method, since that can be copied and pickled with the model.
    replacement: Any = functools.partial(stand_in, module)
    replacement.__wrapped__ = getattr(type(module), name)  # generate looks at the signature
    setattr(module, name, replacement)


def detach(model: M) -> M:
    """Undo `attach`; does nothing to a model that is not attached. Returns the same object."""
    top = _host_model(model)
    inner = _inner(top)
    attachment = getattr(inner, "_rotatek", None)
    if attachment is None:
        return model
    attachment.end()
    for handle in attachment.handles:
        handle.remove()
    del inner._rotatek
    for name in STAND_INS:
        top.__dict__.pop(name, None)
    for name in INNER_STAND_INS:
        inner.__dict__.pop(name, None)
    return model


def _host_model(model: Any) -> PreTrainedModel:
    # PEFT wraps the model, and its own `forward` calls the wrapped one's without hooks; those of `_inner` still run.
    host = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    if not isinstance(host, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel (or a PEFT wrapper of one), got {type(model).__name__}"
        )
    return host


def _inner(top: PreTrainedModel) -> Any:
    """The model below the language-modelling head, which every way of calling passes through."""
    inner = getattr(top, top.base_model_prefix, None) if top.base_model_prefix else None
    return inner if isinstance(inner, torch.nn.Module) else top


def _text_configs(top: PreTrainedModel) -> list[PreTrainedConfig]:
    """The config of the text model, and copies of it that modules may hold."""
    text_config = top.config.get_text_config(decoder=True)
    held = (getattr(module, "config", None) for module in top.modules())
    same = [text_config, *(config for config in held if type(config) is type(text_config))]
    return list({id(config): config for config in same}.values())


def _check(top: PreTrainedModel) -> Family:
    config = top.config
    model_type = config.model_type
    if model_type in REFUSED_FAMILIES:
        raise ValueError(f"model family '{model_type}' cannot use RotateKCache: {REFUSED_FAMILIES[model_type]}")
    text_config = config.get_text_config(decoder=True)
    text_key = next((key for key in config.sub_configs if getattr(config, key, None) is text_config), None)
    if model_type not in FAMILIES:
        if text_key is None or len(config.sub_configs) < 2:
            raise ValueError(
                f"model must be a vision-language model, got {type(top).__name__} ('{model_type}'), which has no "
                "vision config: RotateKCache compresses visual Keys only"
            )
        raise ValueError(
            f"model family '{model_type}' is not in the table of rotatek_cache/hf/attach.py: missing is which token ids "
            f"stand for visual tokens in its input_ids. Known: {', '.join(families())}. Without attach, load it with "
            'attn_implementation={"text_config": "rotatek"} and pass RotateKCache(..., visual_mask=mask)'
        )
    if text_key is None:
        raise ValueError(f"'{model_type}' has no text sub-config of its own, so its attention cannot be selected")
    for name in ("attn_logit_softcapping", "attention_sinks"):
        if getattr(text_config, name, None):
            raise ValueError(
                f"{type(top).__name__} cannot use RotateKCache: its text model sets {name}="
                f"{getattr(text_config, name)}, which the compressed decode does not do"
            )
    return FAMILIES[model_type]


def _cache_of(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RotateKCache | None:
    """The `RotateKCache` that a forward of `module` is called with."""
    cache = kwargs.get("past_key_values")
    if cache is None and args:
        cache = arguments_of(type(module).forward, module, *args).get("past_key_values")
    return cache if isinstance(cache, RotateKCache) else None


def _before_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: select the attention function and tell the cache which of the coming positions are visual."""
    cache = _cache_of(module, args, kwargs)
    if cache is not None:
        _begin(module, cache, args, kwargs)
    elif module._rotatek.threads:
        module._rotatek.meet_another_cache()


@torch.compiler.disable  # which positions are visual is decided on the host, forward by forward
def _begin(module: Any, cache: RotateKCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    module._rotatek.select()  # first of all: `_after_forward` is called whatever happens
    given = arguments_of(type(module).forward, module, *args, **kwargs)
    config = module.config
    if given.get("output_attentions") or config.get_text_config(decoder=True).output_attentions:
        raise ValueError("RotateKCache does not support `output_attentions`: no attention matrix is formed")
    if module.training and torch.is_grad_enabled():
        raise ValueError("RotateKCache is for inference: call model.eval() or use torch.no_grad()")
    cache.learn_config(config)
    if cache.options.is_calibrated:
        load_basis(cache.options.basis).check_model(module._rotatek.fingerprint_of(module))
    ids = given.get("input_ids")
    content = given.get("inputs_embeds") if ids is None else ids
    if content is None:
        return  # the forward itself says what is missing
    tokens = content.shape[1]
    begin = cache.get_seq_length()
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] < begin + tokens:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} positions, but this RotateKCache already holds {begin} and "
            f"{tokens} are new: to go on, pass the mask of the whole conversation; for another prompt call "
            "cache.reset()"
        )
    if hasattr(module, "rope_deltas"):
        with _POSITIONS:
            if not begin and given.get("position_ids") is None:
                module.rope_deltas = cache.rope_deltas = None  # of another conversation, or an attempt that failed
            elif begin or cache.rope_deltas is not None:
                module.rope_deltas = cache.rope_deltas
    visual = _visual_positions(module, cache, given, begin)
    cache.announce_visual(visual, tokens)
    coming = cache.ledger.coming
    if coming is not None and not coming.agrees(begin, visual, tokens):
        cache.ledger.coming = None  # of a generate that came to nothing
    if cache.ledger.coming is None and visual is not None:
        seen = torch.ones_like(visual) if mask is None or mask.ndim != 2 else mask[:, begin : begin + tokens].bool()
        cache.ledger.coming = Coming(begin, visual, seen.to(visual.device))
    if isinstance(cache.tokens, FeatureMethod):
        encoded = (given.get("mm_encoder_outputs") or {}).get("image")
        if encoded is None:
            module._rotatek.choosing[threading.get_ident()] = cache
        elif cache.chosen:
            cache.ledger.drop(kept_features(encoded.pooler_output))
    if begin == 0:
        cache.ledger.prompt = ids


def _after_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook, called after errors too."""
    cache = _cache_of(module, args, kwargs)
    if cache is not None:
        _end(module, cache, output)


@torch.compiler.disable
def _end(module: Any, cache: RotateKCache, output: Any) -> None:
    module._rotatek.restore()
    module._rotatek.choosing.pop(threading.get_ident(), None)
    cache.ledger.end_forward()
    if cache.ledger.coming is not None and cache.ledger.end >= cache.ledger.coming.end:
        cache.ledger.coming = None
    if output is not None and cache.rope_deltas is None:
        # M-RoPE families keep the position offset of a conversation on the model, where others may follow.
        cache.rope_deltas = getattr(module, "rope_deltas", None)


def _visual_positions(module: Any, cache: RotateKCache, given: dict[str, Any], begin: int) -> Tensor | None:
    """bool ``[rows, tokens]`` of the coming forward; None where it brings no visual content."""
    # An empty dict is what generate passes for a turn without images; its tokens may still spell placeholder ids.
    content = any(_is_content(given.get(name)) for name in CONTENT)
    ids: Any = given.get("input_ids")
    embeds: Any = given.get("inputs_embeds")
    if ids is not None:
        if begin and not content:
            mask = cache.ledger.given
            if mask is not None and bool(mask[:, begin : begin + ids.shape[1]].any()):
                raise ValueError(
                    f"visual_mask {list(mask.shape)} marks positions from {begin} on as visual, which come as ids "
                    "without an image: the mask must have the length of the prompt"
                )
            return None
        return torch.isin(ids, torch.tensor(module._rotatek.placeholders, device=ids.device))
    types_given = given.get("mm_token_type_ids")
    if types_given is not None:
        return types_given[:, -embeds.shape[1] :] > 0
    if content:
        table = module.get_input_embeddings()
        tokens = torch.tensor(module._rotatek.placeholders, device=embeds.device)
        return (embeds[:, :, None] == table(tokens).to(embeds.dtype)).all(-1).any(-1)
    covered = cache.ledger.given is not None and cache.ledger.given.shape[1] >= begin + embeds.shape[1]
    if not covered and begin == 0:
        raise ValueError(
            "the prompt came as inputs_embeds, which do not tell visual from text positions: pass "
            f"RotateKCache(..., visual_mask=mask) with a bool tensor [rows, {embeds.shape[1]}] (all False for text)"
        )
    return None


def _is_content(value: Any) -> bool:
    if isinstance(value, dict):
        return any(part is not None for part in value.values())
    return value is not None


def _prepare_inputs_for_generation(top: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Stands in for the model's method: notices a cache that holds another prompt."""
    prepare_inputs = type(top).prepare_inputs_for_generation
    given = arguments_of(prepare_inputs, top, input_ids, *args, **kwargs)
    cache, uncached = given.get("past_key_values"), given.get("next_sequence_length")
    if isinstance(cache, RotateKCache) and uncached is not None:
        # Of a cached prompt only the ids behind it are used, so nothing else would notice that it is another one.
        prompt = cache.ledger.prompt if given.get("is_first_iteration") else None
        other = prompt is not None and (
            prompt.shape[0] == input_ids.shape[0] and not torch.equal(prompt, input_ids[:, : prompt.shape[1]])
        )
        if uncached <= 0 or other:
            held = f"{cache.get_seq_length()} tokens{' of another prompt' if other else ''}"
            raise ValueError(
                f"this RotateKCache already holds {held}, the prompt has {input_ids.shape[1]}: to go on with a "
                "conversation pass all of it, for another prompt call cache.reset() or make a new cache"
            )
    return prepare_inputs(top, input_ids, *args, **kwargs)


def _prepare_position_ids_for_generation(top: Any, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
    """Stands in for the model's method: M-RoPE positions go on from this conversation's offset."""
    cache, inner = model_kwargs.get("past_key_values"), _inner(top)
    prepare = type(top)._prepare_position_ids_for_generation
    if not isinstance(cache, RotateKCache) or not hasattr(inner, "rope_deltas"):
        return prepare(top, inputs_tensor, model_kwargs)
    with _POSITIONS:
        if cache.rope_deltas is not None and cache.get_seq_length():
            inner.rope_deltas = cache.rope_deltas
        positions = prepare(top, inputs_tensor, model_kwargs)
        cache.rope_deltas = inner.rope_deltas  # another one where the turn brings images
    return positions


def _generate_batch(top: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the model's method: refuses a cache that it would ignore."""
    if isinstance(kwargs.get("past_key_values"), RotateKCache):
        raise ValueError(  # noqa: TRY004 - the type is right, the call is not
            "continuous batching keeps its own paged cache and would ignore this RotateKCache: use generate"
        )
    return type(top).generate_batch(top, *args, **kwargs)


def _maybe_prepare_encoder_kwargs_for_generation(top: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the model's method, which comes before images are encoded: notes the whole prompt, for budgets."""
    original = type(top)._maybe_prepare_encoder_kwargs_for_generation
    given = arguments_of(original, top, *args, **kwargs)
    model_kwargs, ids, settings = given["model_kwargs"], given["inputs_tensor"], given["generation_config"]
    cache, inner = model_kwargs.get("past_key_values"), _inner(top)
    if isinstance(cache, RotateKCache) and ids.ndim == 2:
        begin = cache.get_seq_length()
        ids = ids[:, begin:]
        mask = model_kwargs.get("attention_mask")
        seen = torch.ones_like(ids) if mask is None or mask.ndim != 2 else mask[:, begin : begin + ids.shape[1]]
        visual = torch.isin(ids, torch.tensor(inner._rotatek.placeholders, device=ids.device))
        if begin and not any(_is_content(model_kwargs.get(name)) for name in CONTENT):
            visual = torch.zeros_like(visual)
        repeats = max(settings.num_beams or 1, settings.num_return_sequences or 1)
        known = seen.shape == visual.shape
        cache.ledger.coming = Coming(begin, visual, seen.bool().to(visual.device), repeats) if known else None
    return original(top, *args, **kwargs)


def _prepare_multimodal_encoder_kwargs_for_generation(top: Any, model_kwargs: dict[str, Any]) -> Any:
    """Stands in for the model's method: images are encoded here, before any forward."""
    prepare = type(top)._prepare_multimodal_encoder_kwargs_for_generation
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, RotateKCache) or not isinstance(cache.tokens, FeatureMethod):
        return prepare(top, model_kwargs)
    choosing = _inner(top)._rotatek.choosing
    cache.chosen = False
    choosing[threading.get_ident()] = cache
    try:
        return prepare(top, model_kwargs)
    finally:
        del choosing[threading.get_ident()]


def _get_candidate_generator(top: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the model's method, which assisted decoding calls once: notes where the prompt ends.

    The first forward brings the first guesses with the prompt, and tokens must not be chosen by the guesses' queries.
    """
    original = type(top)._get_candidate_generator
    given = arguments_of(original, top, *args, **kwargs)
    cache = given["model_kwargs"].get("past_key_values")
    if isinstance(cache, RotateKCache):
        cache.ledger.prompt_end = given["input_ids"].shape[1]
    return original(top, *args, **kwargs)


STAND_INS: dict[str, Any] = {
    "_get_candidate_generator": _get_candidate_generator,
    "_maybe_prepare_encoder_kwargs_for_generation": _maybe_prepare_encoder_kwargs_for_generation,
    "_prepare_multimodal_encoder_kwargs_for_generation": _prepare_multimodal_encoder_kwargs_for_generation,
    "prepare_inputs_for_generation": _prepare_inputs_for_generation,
    "_prepare_position_ids_for_generation": _prepare_position_ids_for_generation,
    "generate_batch": _generate_batch,
}

# The same for the model below the head.
INNER_STAND_INS: dict[str, Any] = {
    "get_image_features": get_image_features,
    "pack_image_features": pack_image_features,
}
