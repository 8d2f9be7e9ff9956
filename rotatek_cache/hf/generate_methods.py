"""The methods of a model that attach replaces, each with the versions of transformers that have it.

A replacement is set on the instance, and calls in the end what stood there before: a method that the user had set on
the instance, or that of the class. With any other cache it does nothing else.
"""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationMixin

from rotatek_cache.cache.expected_prompt import ExpectedPrompt
from rotatek_cache.hf import mrope
from rotatek_cache.hf.attachment import attachment_of, check_adapter, inner_model
from rotatek_cache.hf.cache import RotateKCache
from rotatek_cache.hf.calls import arguments_of, cache_in
from rotatek_cache.hf.encoder_layouts import note_packing, packed
from rotatek_cache.hf.families import Family
from rotatek_cache.hf.feature_choice import choose_features
from rotatek_cache.hf.prompt import brings_content, check_content_is_new, placeholder_positions
from rotatek_cache.hf.versions import NEWEST, OLDEST, Version, installed, tested, warn_if_untested
from rotatek_cache.token_pruning.interface import FeatureMethod


@dataclass(frozen=True, eq=False)
class Original:
    """A method as it was before attach replaced it.

    Args:
        module: the model that it belongs to.
        name: of the method.
        own: what the user had set on the instance; None: nothing, so that the class's method is called.
    """

    module: Any = field(repr=False)
    name: str
    own: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    def arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Name the arguments of a call, by the signature of the class's method."""
        return arguments_of(getattr(type(self.module), self.name), self.module, *args, **kwargs)


def _prepare_inputs(original: Original, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Refuse a cache that holds another prompt.

    Of a cached prompt only the ids behind it are used, so nothing else would notice that it is another one.
    """
    given = original.arguments(*args, **kwargs)
    cache, uncached, ids = cache_in(given), given.get("next_sequence_length"), given["input_ids"]
    if isinstance(cache, RotateKCache):
        # A wrapper of PEFT puts a method of its own here for as long as it generates.
        check_adapter(getattr(original.module.__dict__.get(original.name), "__self__", None))
    if isinstance(cache, RotateKCache) and uncached is not None:
        other = bool(given.get("is_first_iteration")) and _holds_another_prompt(cache, ids)
        if uncached <= 0 or other:
            held = f"{cache.get_seq_length()} tokens{' of another prompt' if other else ''}"
            raise ValueError(
                f"this RotateKCache already holds {held}, the prompt has {ids.shape[1]}: to go on with a "
                "conversation pass all of it, for another prompt call cache.reset() or make a new cache"
            )
    prepared = original(*args, **kwargs)
    attachment, mask = attachment_of(inner_model(original.module)), prepared.get("attention_mask")
    if attachment is not None and isinstance(cache, RotateKCache) and isinstance(mask, Tensor):
        attachment.graphs.expect_mask(cache, mask, first=bool(given.get("is_first_iteration")))
    return prepared


def _holds_another_prompt(cache: RotateKCache, ids: Tensor) -> bool:
    prompt = cache.positions.prompt
    if ids.shape[1] == 0:
        return False  # a turn given as embeddings
    return prompt is not None and (
        prompt.shape[0] == ids.shape[0] and not torch.equal(prompt.to(ids.device), ids[:, : prompt.shape[1]])
    )


def _prepare_position_ids(original: Original, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
    """Let M-RoPE positions go on from this conversation's offset."""
    cache, inner = cache_in(model_kwargs), inner_model(original.module)
    attachment = attachment_of(inner)
    if attachment is None or not attachment.family.mrope or not isinstance(cache, RotateKCache):
        return original(inputs_tensor, model_kwargs)
    return mrope.prepare_positions(inner, cache, inputs_tensor, model_kwargs, original)


def _generate_batch(original: Original, *args: Any, **kwargs: Any) -> Any:
    """Refuse a cache that continuous batching would ignore."""
    if isinstance(cache_in(kwargs), RotateKCache):
        raise ValueError(  # noqa: TRY004 - the type is right, the call is not
            "continuous batching keeps its own paged cache and would ignore this RotateKCache: use generate"
        )
    return original(*args, **kwargs)


def _maybe_prepare_encoder_kwargs(original: Original, *args: Any, **kwargs: Any) -> Any:
    """Tell the cache the whole prompt before images are encoded: budgets are dealt out by it."""
    given = original.arguments(*args, **kwargs)
    model_kwargs, ids, settings = given["model_kwargs"], given["inputs_tensor"], given["generation_config"]
    cache, attachment = cache_in(model_kwargs), attachment_of(inner_model(original.module))
    if attachment is not None and isinstance(cache, RotateKCache):
        attachment.graphs.begin_generate(cache, graphs=not settings.disable_compile)
    if attachment is not None and isinstance(cache, RotateKCache) and ids.ndim == 2:
        begin = cache.get_seq_length()
        same_prompt = begin < ids.shape[1] and not _holds_another_prompt(cache, ids)
        ids = ids[:, begin:]
        mask = model_kwargs.get("attention_mask")
        seen = torch.ones_like(ids) if mask is None or mask.ndim != 2 else mask[:, begin : begin + ids.shape[1]]
        visual = placeholder_positions(ids, attachment.placeholders)
        if begin and not brings_content(model_kwargs):
            visual = torch.zeros_like(visual)
        elif begin and same_prompt:
            check_content_is_new(visual, None, begin)
        repeats = max(settings.num_beams or 1, settings.num_return_sequences or 1)
        known = seen.shape == visual.shape
        told = mask is None or mask.ndim == 2
        expected = ExpectedPrompt(begin, visual, seen.bool().cpu(), repeats, padding_known=told) if known else None
        cache.positions.expect(expected)
    return original(*args, **kwargs)


def _prepare_multimodal_encoder_kwargs(original: Original, *args: Any, **kwargs: Any) -> Any:
    """Let a cache's token method choose from images that are encoded before any forward."""
    cache = cache_in(original.arguments(*args, **kwargs)["model_kwargs"])
    attachment = attachment_of(inner_model(original.module))
    if attachment is None or not isinstance(cache, RotateKCache) or not isinstance(cache.tokens, FeatureMethod):
        return original(*args, **kwargs)
    cache.chosen = False
    attachment.choosing[threading.get_ident()] = cache
    try:
        return original(*args, **kwargs)
    finally:
        del attachment.choosing[threading.get_ident()]


def _expand_inputs(original: Original, *args: Any, **kwargs: Any) -> Any:
    """Repeat the images of a later turn as its rows are: transformers counts by the placeholders of all turns."""
    given = original.arguments(*args, **kwargs)
    cache, encoded, ids = cache_in(given), given.get("mm_encoder_outputs"), given.get("input_ids")
    begin = cache.get_seq_length() if isinstance(cache, RotateKCache) else 0
    if not begin or not encoded or ids is None or given.get("expand_size", 1) == 1:
        return original(*args, **kwargs)
    turn = ids[:, begin:] if ids.shape[1] > begin else ids
    repeated = original.module._expand_multimodal_outputs(turn, encoded, expand_size=given["expand_size"])
    rest = {name: value for name, value in given.items() if name not in ("self", "mm_encoder_outputs")}
    expanded, model_kwargs = original(**rest)
    return expanded, model_kwargs | {"mm_encoder_outputs": repeated}


def _get_candidate_generator(original: Original, *args: Any, **kwargs: Any) -> Any:
    """Tell the cache where the prompt ends; assisted decoding calls this once.

    The first forward brings the first guesses with the prompt, and tokens must not be chosen by the guesses' queries.
    """
    given = original.arguments(*args, **kwargs)
    cache = cache_in(given["model_kwargs"])
    if isinstance(cache, RotateKCache):
        if cache.options.decoded is not None:
            raise ValueError(
                f"decoded={cache.options.decoded!r} evicts tokens as they are decoded, one at a time, and assisted "
                "decoding takes several and gives some back: leave out decoded, or the assistant"
            )
        cache.positions.set_prompt_end(given["input_ids"].shape[1])
    return original(*args, **kwargs)


def _get_image_features(original: Original, *args: Any, **kwargs: Any) -> Any:
    """Let a cache's token method choose from the features of images."""
    attachment = attachment_of(original.module)
    choosing = None if attachment is None else attachment.choosing
    cache = choosing.get(threading.get_ident()) if choosing else None  # a compiler need not look further than here
    if cache is None:
        return original(*args, **kwargs)
    given = original.arguments(*args, **kwargs)
    return choose_features(original.module, cache, given, functools.partial(original, *args, **kwargs))


def _pack_image_features(original: Original, *args: Any, **kwargs: Any) -> Any:
    """Pack what was heard of the encoder as the model packs the features."""
    attachment = attachment_of(original.module)
    tap = attachment.taps.get(threading.get_ident()) if attachment is not None and attachment.taps else None
    if tap is not None:
        given: dict[str, Tensor] = original.arguments(*args, **kwargs)
        note_packing(tap, original, {name: value for name, value in given.items() if name != "self"})
    return original(*args, **kwargs)


def _forward(original: Original, *args: Any, **kwargs: Any) -> Any:
    """Replay a decode step from a captured graph, where that can be done."""
    attachment = attachment_of(original.module)
    if attachment is None:
        return original(*args, **kwargs)
    return attachment.graphs.forward(original.module, original, *args, **kwargs)


@dataclass(frozen=True)
class Replacement:
    """A method that attach replaces.

    Args:
        name: of the method.
        function: called in its place, with the `Original` first.
        purpose: what it is replaced for.
        since: the first version of transformers that has it.
        until: the first version that has it no more; None: not known yet.
    """

    name: str
    function: Callable[..., Any]
    purpose: str
    since: Version = OLDEST
    until: Version | None = None

    @property
    def is_expected(self) -> bool:
        """Whether this version of transformers should have it."""
        return self.since <= installed() and (self.until is None or installed() < self.until)

    def install(self, module: Any) -> None:
        """Set it on `module`, or raise a RuntimeError if its class lacks the method."""
        if not self.is_expected:
            return
        method = getattr(type(module), self.name, None)
        if method is None:
            raise RuntimeError(
                f"transformers {transformers.__version__}: {type(module).__name__} has no method {self.name}, which "
                f"attach replaces to {self.purpose}; expected from version {self.since[0]}.{self.since[1]} on. "
                f"Tested are {tested()}: pip install 'transformers=={NEWEST[0]}.{NEWEST[1]}.*'"
            )
        # A partial, and no method, since that can be copied and pickled with the model.
        own = module.__dict__.get(self.name)
        replaced: Any = functools.partial(self.function, Original(module, self.name, own))
        replaced.__wrapped__ = method if own is None else own  # generate looks at the signature
        setattr(module, self.name, replaced)


GENERATE_METHODS = (
    Replacement("prepare_inputs_for_generation", _prepare_inputs, "notice a cache that holds another prompt"),
    Replacement("_prepare_position_ids_for_generation", _prepare_position_ids, "continue a conversation's positions"),
    Replacement("_get_candidate_generator", _get_candidate_generator, "learn where the prompt of guesses ends"),
    Replacement(
        "_expand_inputs_for_generation",
        _expand_inputs,
        "repeat the images of a later turn with its rows",
        since=(5, 18),
    ),
    Replacement("generate_batch", _generate_batch, "refuse a cache that continuous batching would ignore"),
    Replacement(
        "_maybe_prepare_encoder_kwargs_for_generation",
        _maybe_prepare_encoder_kwargs,
        "learn the whole prompt before it is read",
        since=(5, 18),  # before, images were encoded in the forward
    ),
    Replacement(
        "_prepare_multimodal_encoder_kwargs_for_generation",
        _prepare_multimodal_encoder_kwargs,
        "choose visual tokens where images are encoded",
        since=(5, 18),
    ),
)
ENCODING = Replacement("get_image_features", _get_image_features, "choose visual tokens by their features")
FORWARD = Replacement("forward", _forward, "replay decode steps from a captured graph")
PACKING = Replacement("pack_image_features", _pack_image_features, "follow patches into packed tiles")


def replace_methods(top: Any, inner: Any, family: Family) -> None:
    """Replace the methods of an attached model, with and below its head.

    Raises:
        RuntimeError: this version of transformers lacks one that it should have.
    """
    warn_if_untested()
    try:
        if isinstance(top, GenerationMixin):
            for replacement in GENERATE_METHODS:
                replacement.install(top)
        if family.features:
            ENCODING.install(inner)
        FORWARD.install(inner)
        if family.encoder is not None and family.encoder.layout is packed:
            PACKING.install(inner)
    except RuntimeError:
        restore_methods(top, inner)
        raise


def restore_methods(*modules: Any) -> None:
    """Put back what stood on the instances; what a user set there since then stays."""
    for module in modules:
        for name, value in list(module.__dict__.items()):
            if isinstance(value, functools.partial) and value.args and isinstance(value.args[0], Original):
                delattr(module, name)
                if value.args[0].own is not None:
                    setattr(module, name, value.args[0].own)
