"""The state of an attached model: the facts that its hooks and replaced methods need."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from rotatek_cache.codecs.fingerprint import ModelMark
from rotatek_cache.hf import attention as hf_attention
from rotatek_cache.hf.cache import RotateKCache
from rotatek_cache.hf.decode_graphs import DecodeGraphs
from rotatek_cache.hf.encoder_tap import EncoderTap
from rotatek_cache.hf.families import Family

_SELECTING = threading.Lock()


@dataclass
class Attachment:
    """The state that an attached model needs during a forward, and that `detach` undoes.

    The attention function is selected for the duration of each forward that has a `RotateKCache`, so that any other
    cache meets the implementation that the model had (and may still change).

    Args:
        family: the model's.
        configs: the text configs that the attention layers read their implementation from.
        below: configs of other parts that stand below one of these (a family without a text config of its own), which
            transformers changes with it, and which keep what they have.
        placeholders: ids that stand for visual tokens in `input_ids`.
        processes: over how many the heads of a layer are divided.
    """

    family: Family
    configs: list[PreTrainedConfig]
    below: list[PreTrainedConfig]
    placeholders: list[int]
    processes: int = 1
    handles: list[Any] = field(default_factory=list)
    previous: list[str | None] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)  # that are in a forward with a RotateKCache
    mark: ModelMark | None = None  # of the model, once it has met a cache
    choosing: dict[int, RotateKCache] = field(default_factory=dict)  # by thread: chooses from what is encoded now
    filling: dict[int, tuple[RotateKCache, int]] = field(
        default_factory=dict
    )  # by thread: in a forward, its length before
    graphs: DecodeGraphs = field(default_factory=DecodeGraphs)
    taps: dict[int, EncoderTap] = field(default_factory=dict)  # by thread: listens to what is encoded now

    def mark_of(self, module: Any) -> ModelMark:
        """Mark the attached model, once."""
        if self.mark is None:
            self.mark = ModelMark.of(module, module.config.model_type)
        return self.mark

    def select(self) -> None:
        """Begin a forward with a `RotateKCache`."""
        with _SELECTING:
            if not self.threads:
                self.previous = [config._attn_implementation for config in self.configs]
                self._set([hf_attention.NAME] * len(self.configs))
            self.threads.add(threading.get_ident())

    def begin_filling(self, cache: RotateKCache) -> None:
        """Note the cache of a forward; a RuntimeError where another thread is in a forward with it."""
        with _SELECTING:
            own = threading.get_ident()
            if any(other is cache for thread, (other, _) in self.filling.items() if thread != own):
                raise RuntimeError(
                    "another thread is in a forward with this RotateKCache, and both would write to it: give each "
                    "thread a cache of its own (copy.deepcopy(cache) shares a prompt that was read once)"
                )
            self.filling[own] = cache, cache.get_seq_length()

    def end_filling(self) -> int:
        """End what `begin_filling` began, and return the cache's length then.

        Raises:
            RuntimeError: the layers have not given the cache anything.
        """
        with _SELECTING:
            cache, length = self.filling.pop(threading.get_ident(), (None, 0))
        if cache is not None and cache.get_seq_length() == length:
            raise RuntimeError(
                "the model's layers did not pass their Keys to this RotateKCache, so that later steps would not see "
                "them: gradient checkpointing in training mode takes the cache away from them. Call model.eval()"
            )
        return length

    def restore(self) -> None:
        """End the forward that `select` began in this thread, if one is open."""
        with _SELECTING:
            self.filling.pop(threading.get_ident(), None)
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
        kept = [config._attn_implementation for config in self.below]
        for config, implementation in zip([*self.configs, *self.below], [*implementations, *kept], strict=True):
            config._attn_implementation = implementation


def inner_model(top: PreTrainedModel) -> Any:
    """Find the model below the language-modelling head, which every way of calling passes through."""
    inner = getattr(top, top.base_model_prefix, None) if top.base_model_prefix else None
    return inner if isinstance(inner, torch.nn.Module) else top


def attachment_of(inner: Any) -> Attachment | None:
    """Return what `attach` left on the model below the head; None on one that is not attached."""
    return getattr(inner, "_rotatek", None)


def check_adapter(model: Any) -> None:
    """Raise a ValueError for an adapter of PEFT that brings a cache of its own."""
    kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    if kind in ("PREFIX_TUNING", "CARTRIDGE"):
        raise ValueError(
            f"model has the PEFT adapter {kind.value}, which puts a cache with its learnt prefix in place of the one "
            "that is given, so a RotateKCache would stay empty: use an adapter that changes weights or the prompt "
            "(LoRA, IA3, prompt tuning)"
        )
