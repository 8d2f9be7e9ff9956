"""`RotateKCache`, a transformers `Cache`, and its layers: thin shells over `LayerKV`."""

import copy
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn, Self

import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from rotatek_cache.cache.budget import DEFAULT_SPARSITY, Budget, Planner
from rotatek_cache.cache.coded_layer import CodedKV
from rotatek_cache.cache.coded_step import CodedLayerStep
from rotatek_cache.cache.coordinator import Coordinator
from rotatek_cache.cache.decode_step import LayerStep
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.cache.rope_offsets import RopeOffsets
from rotatek_cache.cache.saving import SavedFile, expect_fields, parts_given, register, restore, write
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.codecs.basis_file import load_basis
from rotatek_cache.codecs.fingerprint import ModelMark
from rotatek_cache.codecs.registry import codecs_for
from rotatek_cache.codecs.shared_basis import CalibratedBasis
from rotatek_cache.core.precision import attention_dtype
from rotatek_cache.core.row_layout import row_index
from rotatek_cache.core.segments import TextSegment
from rotatek_cache.hf.calls import cache_name
from rotatek_cache.hf.config_shapes import kv_shape
from rotatek_cache.hf.estimate import CacheEstimate, estimate_bytes, tokens_of
from rotatek_cache.hf.layer_report import layer_report, stock_report
from rotatek_cache.hf.questions import check_questions_are_new, checked_questions, rows_asked
from rotatek_cache.hf.storage import stock_tensors, storage_bytes
from rotatek_cache.options import Allocation, Bits, FitOptions, RowBits, with_option_docs
from rotatek_cache.report import CacheReport, SavedBytes
from rotatek_cache.token_pruning.interface import AttentionMethod, FeatureMethod, TokenMethod
from rotatek_cache.token_pruning.registry import decoded_method, token_method

# Layers that are not ours are saved as they are; a dummy stands for one that has nothing to cache.
for _found in vars(cache_utils).values():
    if isinstance(_found, type) and (
        issubclass(_found, (CacheLayerMixin, LinearAttentionCacheLayerMixin)) or _found.__name__ == "DummyLayer"
    ):
        register(_found)

# The parts of a saved cache; `rest` are the attributes that are not in the other parts and that `load` does not make.
SAVED = (
    *("options", "tokens", "budget", "basis", "model", "transformers", "method", "planned", "knows_layers"),
    *("rest", "positions", "layers"),
)
MADE_BY_LOAD = {"options", "tokens", "calibrated", "coordinator", "filled_by", "positions", "layers", "decoding"}

HOW_TO_SWITCH = (
    "either call `rotatek_cache.attach(model)` once after loading the model, or load it with "
    '`attn_implementation={"text_config": "rotatek"}` and pass `RotateKCache(..., visual_mask=mask)`, a bool tensor '
    "[rows, prompt length] that is True on visual tokens"
)


class LayerHandle:
    """The layer in place of its Keys and Values, as `RotateKCache.update` hands it to the attention function.

    It is no tensor. Any other attention function that touches it gets an error that says how to switch.
    """

    __slots__ = ("coordinator", "kv")

    def __init__(self, kv: LayerKV | CodedKV, coordinator: Coordinator) -> None:
        self.kv, self.coordinator = kv, coordinator

    def hidden(self) -> Tensor | None:
        """Return bool ``[B, T]``: tokens that a token method has dropped, not to be attended to in this forward."""
        return None if isinstance(self.kv, CodedKV) else self.coordinator.hidden(self.kv)

    def observe(self, query: Tensor, mask: Tensor | None, scale: float | None = None) -> None:
        """Note that the layer has attended with these queries ``[B, H_q, Q, D]``, after which it may seal."""
        if isinstance(self.kv, CodedKV):
            self.kv.settle(mask)
        else:
            self.kv.keep_decoded_query(query, scale)
            self.coordinator.observe(self.kv, query, mask, scale)

    def to(self, device: torch.device, **kwargs: Any) -> Self:
        """Stay where it is: layers that share Keys move them to their own device, which has to be the same."""
        held = next(iter(self.kv.tensors()), None)
        if held is not None and torch.device(device) != held.device:
            raise ValueError(
                f"layers that share the Keys of layer {self.kv.index} lie on {held.device} and {device}: put the model "
                "on one device, or use DynamicCache"
            )
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # asked by tools such as a compiler, not by an attention function
        raise RuntimeError(
            f"an attention function without RotateK support asked for `{name}` of the Keys of a RotateKCache, which "
            f"are compressed; {HOW_TO_SWITCH}"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(
            f"`{getattr(func, '__name__', func)}` was called on the Keys of a RotateKCache, which are compressed; "
            f"{HOW_TO_SWITCH}"
        )


class StepHandle:
    """The segments that attention reads while a decode step of fixed addresses is captured, as `update` gives them."""

    __slots__ = ("step",)

    def __init__(self, step: LayerStep | CodedLayerStep) -> None:
        self.step = step

    @property
    def views(self) -> list[Any]:
        """What attention reads."""
        return self.step.views

    def observe(self, query: Tensor) -> None:
        """Note that the layer has attended with this query ``[B, H_q, 1, D]``."""
        if isinstance(self.step, LayerStep):
            self.step.keep_query(query)


class MaskedStates:
    """Keys and Values ``[B, H, T, D]`` of a stock layer, for the attention function, some of which are hidden.

    `hidden` is bool ``[B, T]``: placeholders of visual tokens that were dropped before the language model.
    """

    __slots__ = ("hidden", "keys", "values")

    def __init__(self, keys: Tensor, values: Tensor, hidden: Tensor) -> None:
        self.keys, self.values, self.hidden = keys, values, hidden

    def to(self, device: torch.device, **kwargs: Any) -> Self:
        """Move to the device of a layer that shares these Keys, as transformers moves tensors."""
        return type(self)(*(states.to(device, **kwargs) for states in (self.keys, self.values, self.hidden)))


class RotateKLayer(CacheLayerMixin):
    """A full-attention layer of a `RotateKCache`."""

    is_sliding = False
    is_croppable = True

    def __init__(self, kv: LayerKV | CodedKV, coordinator: Coordinator) -> None:
        super().__init__()
        self.kv, self.coordinator = kv, coordinator

    @property
    def keys(self) -> Tensor:
        """Not available: the layer stores coefficients."""
        raise AttributeError(
            "a RotateKCache has no dense Keys or Values of a layer to read, they are compressed: cache.report() and "
            "cache.tensors() say what it holds, and what needs dense ones needs a DynamicCache (models with "
            "cross-attention layers do, and cannot use this one)"
        )

    @keys.setter
    def keys(self, value: None) -> None:
        """Accept None, which base classes set."""

    values = keys

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take Keys and Values ``[B, H, n, D]``; returns the layer's handle in place of both."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # Autocast leaves Keys and Values in two dtypes, and its attention would convert both to its own at each step.
        dtype = self.kv.dtype or attention_dtype(key_states)
        # No gradient flows through the cache (the attention function says so to a backward).
        self.kv.append(key_states.detach().to(dtype), value_states.detach().to(dtype))
        handle = LayerHandle(self.kv, self.coordinator)
        return handle, handle

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return KV length and KV offset of the next forward's mask."""
        return self.kv.length + query_length, 0

    def get_seq_length(self) -> int:
        """Count the logical tokens cached, padding included."""
        return self.kv.length

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.kv.reset()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b be what row ``beam_idx[b]`` was; sealed segments are not copied."""
        self.kv.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (integers or bool); sealed segments are not copied."""
        self.kv.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row; sealed segments are not copied."""
        if self.kv.shape is not None:
            self.kv.select_rows(torch.arange(self.kv.shape[0], device="cpu").repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens."""
        self.kv.truncate(max(0, self.kv.length - abs(tokens_to_remove)))

    def offload(self) -> None:
        """Refuse: the attention function reads the segments where they are."""
        raise NotImplementedError(
            "RotateKCache cannot be offloaded to the CPU layer by layer; use DynamicCache for that"
        )

    prefetch = offload


@with_option_docs
class RotateKCache(Cache):
    """A KV cache that stores visual Keys rotated into a fitted basis and truncated (RotateK, arXiv 2605.19218).

    Text Keys and all Values stay dense: at ``sparsity=0.75`` the visual Keys shrink to a quarter (plus basis), the
    whole visual KV to 5/8. With a basis file and ``text="coded"`` the Keys and Values of all tokens are coded. Use it
    with a model prepared by `attach`::

        model = attach(model)
        model.generate(**inputs, cache=RotateKCache(sparsity=0.5))

    Args:
        <options>
        tokens: which visual tokens are kept beside how many channels: a method such as ``VLCache(keep=0.4)``, or its
            name and share as in ``"vl_cache:0.4"``. None keeps all. Without a share it follows from `budget`.
        budget: what the cache may take right after the prompt: ``"0.25x"`` of a dense cache, ``"512MiB"``, or a number,
            as many bytes as so many dense tokens of each row. It sets whichever is left open: the share of `tokens`,
            or the rank (layer by layer); where both are, Keys give up 75 % of their channels before any token goes.
            What ranks leave over keeps the last visual tokens of each row as they are.
        graphs: whether decode steps may be replayed from a captured CUDA graph (on CUDA, with `attach`).
        visual_mask: bool ``[rows, prompt length]``, True on visual tokens; needed without `attach` and for prompts
            given as merged `inputs_embeds`. It wins over what the model's inputs say.
        config: the model's config, so that sliding-window layers keep their own cache layer; `attach` supplies it.
    """

    def __init__(
        self,
        *,
        sparsity: float | None = None,
        rank: int | None = None,
        energy: float | None = None,
        query_window: int = 32,
        basis: str | os.PathLike[str] = "rotatek",
        key_bits: Bits = None,
        value_sparsity: float | None = None,
        value_bits: Bits = None,
        value_basis: Literal["auto", "none", "hadamard"] = "auto",
        basis_bits: Literal[8] | None = None,
        allocation: Allocation | str = "uniform",
        streaming: bool = False,
        text: Literal["dense", "coded"] = "dense",
        bits: RowBits = None,
        decoded: str | None = None,
        tokens: TokenMethod | str | None = None,
        budget: str | int | None = None,
        graphs: bool = True,
        visual_mask: Tensor | None = None,
        config: PreTrainedConfig | None = None,
    ) -> None:
        chosen = {
            "sparsity": sparsity,
            "rank": rank,
            "energy": energy,
            "query_window": query_window,
            "basis": basis,
            "key_bits": key_bits,
            "value_sparsity": value_sparsity,
            "value_bits": value_bits,
            "value_basis": value_basis,
            "basis_bits": basis_bits,
            "allocation": allocation,
            "streaming": streaming,
            "text": text,
            "bits": bits,
            "decoded": decoded,
        }
        self._begin(chosen, tokens, budget, visual_mask, config)
        if not isinstance(graphs, bool):
            raise TypeError(f"graphs must be True or False, got {graphs!r}")
        self.graphs = graphs

    @classmethod
    def for_study(
        cls,
        *,
        tokens: TokenMethod | str | None = None,
        budget: str | int | None = None,
        graphs: bool = True,
        visual_mask: Tensor | None = None,
        config: PreTrainedConfig | None = None,
        **options: Any,
    ) -> Self:
        """Make a cache from any `options` of `FitOptions`, by name: studies use some that others have no use for."""
        cache = cls.__new__(cls)
        cache._begin(options, tokens, budget, visual_mask, config)
        cache.graphs = graphs
        return cache

    def _begin(
        self,
        chosen: Mapping[str, Any],
        tokens: TokenMethod | str | None,
        budget: str | int | None,
        visual_mask: Tensor | None,
        config: PreTrainedConfig | None,
    ) -> None:
        """Check the options and make an empty cache."""
        if chosen.get("text") == "coded":
            for name, value in (("tokens", tokens), ("budget", budget)):
                if value is not None:
                    raise ValueError(
                        f"text='coded' keeps all tokens, in as many bytes as bits says: leave out {name}={value!r}, "
                        "or use text='dense'"
                    )
        rank_open = budget is not None and all(chosen.get(name) is None for name in ("sparsity", "rank", "energy"))
        self.options = FitOptions(**{**chosen, "sparsity": DEFAULT_SPARSITY} if rank_open else chosen)
        if tokens is not None and self.options.streaming:
            raise ValueError("tokens cannot be chosen with streaming=True, which seals an image before its end is seen")
        if self.options.decoded is not None:
            decoded_method(self.options.decoded)  # raises where it names none
        self.calibrated: CalibratedBasis | None = None
        if self.options.is_calibrated:
            self.calibrated = load_basis(self.options.basis)
        known = [] if self.calibrated is None else sorted(self.calibrated.layers)
        codecs_for(self.options, known[0] if known else 0)  # raises where options do not go together
        self.tokens = None if tokens is None else token_method(tokens)
        if self.tokens is not None and self.tokens.keep is None:
            name = type(self.tokens).__name__
            if budget is None:
                raise ValueError(f"tokens={name}: keep must be given where no budget is, as in {name}(keep=0.4)")
        if isinstance(self.tokens, AttentionMethod) and not self.tokens.drops:
            self.tokens.options_of_kept(self.options)  # raises where they do not go together
        self._check_heads_apart(budget)
        planner = None if budget is None else Planner(Budget(budget), self.options, self.tokens, rank_open=rank_open)
        self.positions = VisualPositions(visual_mask)
        self.coordinator = Coordinator(self.positions, self.tokens, planner)
        self.rope_deltas: Tensor | None = None  # the model's M-RoPE state that belongs to this conversation
        self.coming_deltas: tuple[int, Tensor] | None = None  # the same of a turn that is yet to be read, and its begin
        self.offsets = RopeOffsets()  # the same behind each image
        self.filled_by: ModelMark | None = None  # the model that it holds states of, where that is known
        self.chosen = False  # whether image features of this generate went through `tokens`
        self._record_past = False
        self.graphs = True
        self.stepping: list[LayerStep] | list[CodedLayerStep] | None = None  # while a decode step is captured
        self.decoding = ""  # how the last decode step was run
        super().__init__(layers=[])
        if config is not None:
            self.learn_config(config)

    def _check_heads_apart(self, budget: object) -> None:
        """Raise a ValueError for options that do not go with heads that keep tokens of their own."""
        if not isinstance(self.tokens, AttentionMethod) or not self.tokens.by_head:
            return
        name = type(self.tokens).__name__
        if budget is not None:
            raise ValueError(
                f"budget={budget!r} counts tokens of layers, and {name} gives each head tokens of its own: leave out "
                f"budget, and give the share of reads, as in {name}(keep=0.3), and sparsity or rank"
            )
        apart = [f"{kind}_bits='auto'" for kind in ("key", "value") if getattr(self.options, f"{kind}_bits") == "auto"]
        apart += [f"allocation={self.options.allocation.over!r}"] * (self.options.allocation.over != "uniform")
        apart += [f"energy={self.options.energy}"] * (self.options.energy is not None)
        if apart:
            raise ValueError(
                f"{', '.join(apart)} lets heads of a layer, or rows, be stored in different forms, and tokens={name} "
                "packs the tokens of all heads together: give rank or sparsity, and bits that are a number"
            )

    @classmethod
    def estimate(
        cls,
        config: PreTrainedConfig,
        visual_tokens: int | Sequence[int],
        text_tokens: int | Sequence[int],
        batch: int | None = None,
        *,
        images: int = 1,
        answer_tokens: int = 0,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> CacheEstimate:
        """Estimate the bytes that a cache of these options will hold, before anything runs.

        The cache's own code is run on shapes without numbers, so that the answer is what `nbytes` says later, on a CPU
        or wherever decode steps are not replayed from a graph (whose buffers have more free columns). Where bytes
        follow from the numbers (`energy`, automatic bits without a calibrated basis, tokens that layers share), it is a
        range.

        Args:
            config: the model's config, or that of a checkpoint (`AutoConfig.from_pretrained(name)`).
            visual_tokens: placeholders of the prompt, for all rows or for each.
            text_tokens: all other tokens of the prompt, for all rows or for each; shorter rows are padded.
            batch: rows, where no list says it; 1 by default.
            images: how many images the visual tokens of a row are, where tokens are chosen from features.
            answer_tokens: tokens of the answer that are cached (`generate` does not cache the last one).
            dtype: of Keys and Values; by default that of the checkpoint.
            options: those of `RotateKCache`.

        Returns:
            Bytes, dense bytes and their ratio; it prints as a line.

        Raises:
            TypeError, ValueError: numbers or options that cannot be.
        """
        counts = tokens_of(visual_tokens, text_tokens, batch, images, answer_tokens)
        return estimate_bytes(lambda: cls.for_study(**options), config, counts, dtype)

    def learn_config(self, config: PreTrainedConfig) -> None:
        """Build the layers that `config` asks for, once: RotateK for full attention, the stock ones for the rest."""
        if self.layers:
            return
        text = config.get_text_config(decoder=True)
        stock, readers = DynamicCache(config=text).layers, _readers(text)
        layers = [
            self._new_layer(index, readers.get(index, 1)) if type(layer) is DynamicLayer else layer
            for index, layer in enumerate(stock)
        ]
        # All checks come before the layers are kept: a cache that was refused once must be refused again.
        linear = [index for index, layer in enumerate(layers) if isinstance(layer, LinearAttentionCacheLayerMixin)]
        if linear and isinstance(self.tokens, FeatureMethod):
            raise ValueError(
                f"tokens={self.tokens} leave visual tokens out before the language model, and layers {linear} of this "
                "model take every token into a state (linear attention), the left out ones too: use a method that "
                "chooses by attention (VLCache, FastV)"
            )
        self._introduce_layers(layers)
        self.layers: list[Any] = layers
        if self._record_past:
            super().activate_past_recording()

    def meet_model(self, mark: ModelMark) -> None:
        """Learn which model fills the cache; a ValueError if that is another than before."""
        if self.filled_by is not None and self.filled_by is not mark and not self.filled_by.agrees(mark):
            raise ValueError(
                f"this RotateKCache holds states of another model ('{self.filled_by.model_type}') than the one that it "
                f"is given to ('{mark.model_type}', or other weights): use the model that it was filled by, or call "
                "cache.reset() for a new prompt"
            )
        self.filled_by = mark

    def check_local_heads(self, processes: int) -> None:
        """Raise a ValueError for options that are settled by all heads of a layer, which `processes` processes share.

        Each would decide by its own heads.
        """
        settled = []
        if self.coordinator.selection is not None:
            settled.append(f"tokens={self.tokens}")
        if self.coordinator.planner is not None:
            settled.append(f"budget={self.coordinator.planner.budget.given!r}")
        if self.options.is_calibrated:
            settled.append(f"basis={str(self.options.basis)!r}")
        if self.options.energy is not None:
            settled.append(f"energy={self.options.energy}")
        bits = {"key_bits": self.options.key_bits, "value_bits": self.options.value_bits}
        settled += [f"{name}='auto'" for name, value in bits.items() if value == "auto"]
        if settled:
            raise ValueError(
                f"{', '.join(settled)} cannot be used with tensor parallelism: it is settled by all heads of a layer, "
                f"and each of {processes} processes sees its own only. Expected a fixed sparsity or rank with a basis "
                "of each prompt, bits that are a number, and tokens chosen from image features (divprune, visionzip)"
            )

    def _new_layer(self, index: int, readers: int = 1) -> RotateKLayer:
        if not self.options.codes_text:
            return RotateKLayer(LayerKV(self.options, self.positions, index, readers), self.coordinator)
        if readers > 1:
            raise ValueError(
                f"text='coded': {readers} layers of this model read the Keys of layer {index}, which would be coded "
                "once the first has: leave out text"
            )
        return RotateKLayer(CodedKV(self.options, self.positions, index), self.coordinator)

    def counts_before(
        self, config: PreTrainedConfig, dtype: torch.dtype, lengths: Sequence[int]
    ) -> tuple[FeatureMethod, list[int]]:
        """Count the tokens of each image that a method keeps which chooses from features, by share or budget.

        Args:
            config: the model's config.
            dtype: of the Keys and Values to come.
            lengths: tokens of each image, in the order of their placeholders.

        Returns:
            The method, its share settled, and the tokens that it is to keep of each image.
        """
        assert isinstance(self.tokens, FeatureMethod)
        if self.tokens.keep is not None:
            return self.tokens, [self.tokens.count_of(length) for length in lengths]
        self.learn_config(config)
        planner, expected = self.coordinator.planner, self.positions.expected
        if planner is None or expected is None:
            raise RuntimeError(
                f"tokens={type(self.tokens).__name__} have no share, which follows from a budget and the prompt: this "
                "prompt is not known as ids when its images are encoded, so give a share, as in keep=0.4"
            )
        heads, width = kv_shape(config)
        share, counts = planner.counts_before(expected, (expected.rows, heads, width, width), dtype, lengths)
        return self.tokens.with_keep(share), counts

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append the states ``[B, H, n, D]`` of layer `layer_idx`; returns what its attention is to be handed."""
        if self.stepping is not None:
            step = self.stepping[layer_idx]
            step.append(key_states, value_states)
            handle = StepHandle(step)
            return handle, handle
        if not self.layers and self.coordinator.needs_layers:
            raise RuntimeError(
                "tokens and budgets are settled for all layers together, and this RotateKCache does not know the "
                "model's layers: call `rotatek_cache.attach(model)`, or pass RotateKCache(..., config=model.config)"
            )
        while len(self.layers) <= layer_idx:
            self.layers.append(self._new_layer(len(self.layers)))
        layer = self.layers[layer_idx]
        if isinstance(layer, RotateKLayer):
            if not self.positions.informed and not self.options.codes_text:
                raise RuntimeError(f"this RotateKCache was not told which positions are visual: {HOW_TO_SWITCH}")
            self.positions.complete(layer.kv.length + key_states.shape[2], key_states.shape[0])
            if isinstance(self.tokens, FeatureMethod) and self.positions.undecided:
                raise RuntimeError(
                    f"tokens={self.tokens} are chosen from image features, and those of these visual tokens were not "
                    "seen: attach(model) and give images as pixel_values (no videos, no inputs_embeds alone, no "
                    "features computed beforehand)"
                )
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        if isinstance(layer, RotateKLayer) or not isinstance(self.tokens, FeatureMethod):
            return keys, values
        end = layer.get_seq_length()
        hidden = self.positions.dropped_of(end - keys.shape[2], end)
        if hidden is None:
            return keys, values
        masked = MaskedStates(keys, values, hidden)
        return masked, masked

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """Return a state of the linear-attention layer `layer_idx`, which transformers' own cache layer keeps."""
        self._check_linear(layer_idx)
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """Update a state of the linear-attention layer `layer_idx`, which transformers' own cache layer keeps."""
        self._check_linear(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def _check_linear(self, layer_idx: int) -> None:
        """Raise a RuntimeError where it is not known that layer `layer_idx` has linear attention."""
        if layer_idx >= len(self.layers) or isinstance(self.layers[layer_idx], RotateKLayer):
            raise RuntimeError(
                f"layer {layer_idx} of this model keeps a state of linear attention, and this RotateKCache does not "
                "know the model's layers: call `rotatek_cache.attach(model)`, or pass RotateKCache(..., "
                "config=model.config)"
            )

    def announce_visual(self, visual: Tensor | None, tokens: int) -> None:
        """Say which of the next `tokens` positions are visual: bool ``[rows, tokens]``, None for none of them.

        `attach` calls this before each forward. A `visual_mask` given at construction wins where it reaches.
        """
        begin = self.get_seq_length()
        end, reach = begin + tokens, self.positions.reach
        if begin >= reach:
            self.positions.announce(begin, end, visual)
        elif visual is not None and end > reach:
            given = self.positions.given_flags(begin, reach, visual.shape[0])
            self.positions.announce(begin, end, torch.cat([given, visual[:, reach - begin :].cpu()], 1))

    def reset(self) -> None:
        """Forget all tokens, for a new prompt; the layers and the options stay."""
        super().reset()
        self.positions.reset()
        self.rope_deltas = self.coming_deltas = self.filled_by = None
        self.offsets = RopeOffsets()
        self.coordinator.reset()

    def save(self, path: str | os.PathLike[str], *, compress: bool = False) -> SavedBytes:
        """Write all that the cache holds to one file, which `load` reads in any process.

        The file is safetensors with a checksum; a calibrated basis is not in it but named. To save a prompt, read it by
        `model.generate(**inputs, cache=cache, max_new_tokens=1)`, and `seal` it if it ends in an image.

        Args:
            path: of the file; an existing one is replaced once the new one is whole.
            compress: whether to compress without loss, by zlib: smaller, and slower to save and load.

        Returns:
            The bytes on disk and in memory; `print` shows both.

        Raises:
            TypeError: it holds an object of a class from elsewhere that was not given to
                `rotatek_cache.cache.saving.register`.
            ValueError: it holds states that are not finite.
        """
        planner, selection = self.coordinator.planner, self.coordinator.selection
        self.positions.end_forward()
        stock = any(stock_tensors(layer) for layer in self.layers if not isinstance(layer, RotateKLayer))
        state = {
            "options": self.options,
            "tokens": self.tokens,
            "budget": None if planner is None else (planner.budget.given, planner.rank_open),
            "basis": None if self.calibrated is None else self.calibrated.digest,
            "model": None if self.filled_by is None else (self.filled_by.model_type, self.filled_by.fingerprint()),
            "transformers": transformers.__version__ if stock else None,
            "method": None if selection is None else selection.method,
            "planned": None if planner is None else (planner.made, planner.share),
            "knows_layers": bool(self.coordinator.layers),
            "rest": {name: value for name, value in vars(self).items() if name not in MADE_BY_LOAD},
            "positions": dict(vars(self.positions)),
            "layers": [dict(vars(layer.kv)) if isinstance(layer, RotateKLayer) else layer for layer in self.layers],
        }
        given: dict[str, Any] = {}
        for layer in self._compressed_layers():
            given |= parts_given(str(layer.kv.index), layer.kv)
        assert tuple(state) == SAVED
        references = {} if self.calibrated is None else self.calibrated.derived()
        return write(path, state, references, given, compress=compress)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        basis: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Read a cache that `save` wrote; it goes on, bit for bit, as the one that was saved.

        A model that is attached has to be the one that filled it, in any dtype. To ask about its prompt, see
        `ask_many`.

        Args:
            path: of the file.
            device: where it goes; by default where it was. What only the host looks at stays there.
            basis: where the basis file is now that it was made with, if it has been moved.

        Raises:
            ValueError: the file is truncated, edited, foreign or of another version, its device is not there, or its
                basis file is missing or another one.
        """
        file = SavedFile(path, device)
        parts = file.parts(SAVED)
        options, digest = file.part(parts["options"]), parts["basis"]
        if basis is not None and digest is None:
            raise ValueError(f"saved cache {path} was made without a basis file: leave out basis={str(basis)!r}")
        if basis is not None:
            options = dataclasses.replace(options, basis=os.fspath(basis))
        cache = cls.__new__(cls)
        budget, rank_open = file.part(parts["budget"]) or (None, False)
        chosen = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        try:
            cache._begin(
                {**chosen, "sparsity": None} if rank_open else chosen, file.part(parts["tokens"]), budget, None, None
            )
        except ValueError as error:
            if digest is None:
                raise
            raise ValueError(
                f"saved cache {path} needs the basis file that it was made with: {error}; say where it is now, as in "
                'RotateKCache.load(..., basis="basis.safetensors")'
            ) from error
        if cache.calibrated is not None:
            if cache.calibrated.digest != digest:
                raise ValueError(
                    f"saved cache {path} was made with another basis than {cache.calibrated.path} holds now: give the "
                    "file that it was made with, as basis=..."
                )
            file.resolve = cache.calibrated.derive
        cache._restore(file, parts)
        return cache

    def _restore(self, file: SavedFile, parts: dict[str, Any]) -> None:
        """Take on the state in a file; `parts` describe what of it `save` names."""
        made_by = parts["transformers"]
        if made_by is not None and made_by.split(".")[:2] != transformers.__version__.split(".")[:2]:
            raise ValueError(
                f"saved cache {file.path} holds cache layers of transformers {made_by}, this is "
                f"{transformers.__version__}, whose layers may differ: use that version, or save the prompt anew"
            )
        model = file.part(parts["model"])
        self.filled_by = None if model is None else ModelMark(model[0], tuple(model[1].tolist()))
        rest, own = file.part(parts["rest"]), vars(self).keys() - MADE_BY_LOAD
        expect_fields(type(self), rest.keys() & own, own)
        for name, value in rest.items():  # with what `generate` has noted on it
            setattr(self, name, value)
        restore(self.positions, file.part(parts["positions"], on_host=True))  # it decides on shapes
        for index, described in enumerate(parts["layers"][1:]):
            if described[0] != "dict":
                self.layers.append(file.part(described))
                continue
            layer = self._new_layer(index)
            file.given |= parts_given(str(index), layer.kv)
            part = file.part(described)
            # A calibrated basis may lie elsewhere now; ranks that a budget has settled stay.
            own = dataclasses.replace(part["options"], basis=self.options.basis)
            part["options"] = self.options if own == self.options else own
            restore(layer.kv, part)
            if isinstance(layer.kv, LayerKV):
                layer.kv.use(layer.kv.options)
            held = layer.kv.tensors()
            if layer.kv.dtype is not None and held:
                layer.dtype, layer.device, layer.is_initialized = layer.kv.dtype, held[0].device, True
            self.layers.append(layer)
        if parts["knows_layers"]:
            self._introduce_layers(self.layers)
        if self.coordinator.selection is not None:
            self.coordinator.selection.method = file.part(parts["method"])
        if self.coordinator.planner is not None:
            self.coordinator.planner.made, self.coordinator.planner.share = file.part(parts["planned"])

    def _introduce_layers(self, layers: Sequence[Any]) -> None:
        """Tell the coordinator which of the layers seal."""
        held = [layer.kv if isinstance(layer, RotateKLayer) else None for layer in layers]
        self.coordinator.learn_layers([kv if isinstance(kv, LayerKV) else None for kv in held])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive number is the length to keep (transformers 5.17)."""
        count, held = int(tokens_to_remove), self.get_seq_length()  # transformers 5.17 passes a tensor
        count = count if count <= 0 else min(0, count - held)
        states = [
            index
            for index, layer in enumerate(self.layers)
            if isinstance(layer, LinearAttentionCacheLayerMixin) and any(layer.is_recurrent_states_initialized.values())
        ]
        if count and states:
            raise ValueError(
                f"the state of linear attention in layers {states} cannot be taken back to before a token, so this "
                "cache cannot be cropped: keep a copy.deepcopy of it from before"
            )
        for kv in self._sealed_by_images():
            if count and kv.answer is not None:
                kv.answer.check_crop(max(0, held + count))
        self._crop_offsets(max(0, held + count), held)
        super().crop(count)
        self.positions.truncate(self.get_seq_length())
        if not self.get_seq_length():
            self.rope_deltas = None

    def _crop_offsets(self, length: int, held: int) -> None:
        """Take images from position `length` on out of the M-RoPE offsets: without any image they are zero."""
        if self.rope_deltas is None:
            return
        gone = self.positions.rows_with_visual(length, held)
        if gone is None or not bool(gone.any()):
            return
        if bool(self.positions.rows_cut_at(length).any()):
            raise ValueError(
                f"crop to {length} of {held} tokens ends between two visual tokens of a row, and at which position "
                "(M-RoPE) text goes on there is not known: crop to before or behind the image"
            )
        deltas = self.rope_deltas.repeat_interleave(len(gone) // self.rope_deltas.shape[0], 0).clone()
        for row in gone.nonzero()[:, 0].tolist():
            deltas[row] = self.offsets.at(row, length)
        self.rope_deltas = deltas
        self.offsets.truncate(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b be what row ``beam_idx[b]`` was."""
        self._select_rows(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        index = row_index(indices, torch.device("cpu") if not isinstance(indices, Tensor) else indices.device)
        self._select_rows(index)
        for layer in self.layers:
            if hasattr(layer, "batch_select_indices"):
                layer.batch_select_indices(index)
            else:  # of linear attention
                layer.reorder_cache(index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        if self.batch_size > 0:
            self.batch_select_indices(torch.arange(self.batch_size, device="cpu").repeat_interleave(repeats))

    def _select_rows(self, index: Tensor) -> None:
        """Select in what the layers share, before the layers do."""
        self.positions.select_rows(index)
        if self.rope_deltas is not None:
            # Their rows are those of the prompt, which generate may have repeated.
            deltas = self.rope_deltas.repeat_interleave(self.batch_size // self.rope_deltas.shape[0], 0)
            self.rope_deltas = deltas[index.to(deltas.device)]
            self.offsets.select_rows(index.tolist())

    def seal(self) -> None:
        """Compress an image that a prompt ends in now, instead of when text has followed it.

        What was read so far decides alone: channels are not weighted by queries, which `basis="pca"` and calibrated
        bases never do. It does nothing where no image waits.

        Raises:
            ValueError: tokens are to be chosen by the attention of that text.
        """
        self.coordinator.seal_waiting(list(self._sealed_by_images()))

    def ask_many(
        self,
        questions: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rows: Sequence[int] | Tensor | None = None,
        conversation: Tensor | None = None,
    ) -> dict[str, Any]:
        """Prepare a batch of questions about what the cache holds, which is stored once for all of them.

        The answers go to a cache of their own, whose rows point at what this one stores, images and text alike; this
        one stays as it is, to be asked again. Drop what is returned when the questions are answered::

            cache = RotateKCache(sparsity=0.75, basis="pca")
            model.generate(**prompt, cache=cache, max_new_tokens=1)  # read once, without a question
            cache.seal()  # if nothing follows the image
            ids = processor.tokenizer(questions, return_tensors="pt", padding=True, padding_side="left", ...)
            asked = cache.ask_many(ids["input_ids"], ids["attention_mask"])
            output = model.generate(**asked, max_new_tokens=32)
            answers = output[:, asked["input_ids"].shape[1] :]

        Leave out the images: they are in the cache.

        Args:
            questions: ids ``[N, n]`` that follow the prompt, padded on the left.
            attention_mask: ``[N, n]``, 0 on padding; None where there is none.
            rows: which row of the cache each question is about; by default all are about its only one, or question i
                is about row i.
            conversation: ids ``[B, >= cached tokens]`` of what the cache holds, and maybe of tokens behind it, which
                then begin each question; by default those of the prompt that it read in one forward. `generate`
                returns them: ``conversation=output`` asks on after an answer.

        Returns:
            Arguments of `generate`: `input_ids` (the whole conversation), `attention_mask` and the cache, under
            the name that this transformers has for it.

        Raises:
            ValueError: nothing is cached, or it is not sealed; questions are padded on the right, or at all where the
                model has layers with a sliding window; one begins with the prompt once more; it is not clear which rows
                they are about, or the ids of the conversation are not known.
        """
        length, batch = self.get_seq_length(), self.batch_size
        if not length or batch < 1:
            raise ValueError("this RotateKCache holds no prompt to ask about: read one first, with the model")
        if any(kv.pending is not None for kv in self._sealed_by_images()):
            raise ValueError(
                "the prompt ends in an image, which is compressed when text follows it, for each question anew: call "
                "cache.seal() first, so that it is stored once for all of them"
            )
        ids, seen = checked_questions(questions, attention_mask)
        index = rows_asked(len(ids), rows, batch)
        if conversation is not None and not isinstance(conversation, Tensor):
            raise ValueError(f"conversation: expected a tensor of ids, got {type(conversation).__name__}")
        known = self.positions.prompt if conversation is None else conversation
        if known is None or known.shape[0] != batch or known.shape[1] < length:
            found = "none are known" if known is None else f"those known are {list(known.shape)}"
            raise ValueError(
                f"conversation: expected ids [{batch}, at least {length}] of what the cache holds, {found}: pass them, "
                "such as the output of the last generate"
            )
        known = known.to(ids.device)[index.to(ids.device)]
        check_questions_are_new(known[:, :length], ids, seen, index, self.positions.visible)
        new = torch.cat([known[:, length:], ids], 1)
        seen = torch.cat([torch.ones_like(known[:, length:], dtype=torch.bool), seen], 1)
        order = seen.int().argsort(dim=1, stable=True)  # padding first
        new, seen = new.gather(1, order), seen.gather(1, order)
        padding = (~seen).sum(1)
        stock = [number for number, layer in enumerate(self.layers) if not isinstance(layer, RotateKLayer)]
        if stock and bool(padding.any()):
            raise ValueError(
                f"questions of different lengths: layers {stock} have transformers' own cache layer (sliding window or "
                "linear), in which padding between prompt and question takes the place of tokens: ask questions of one "
                "length together, those of another length by another call"
            )
        many = self._branch(index, padding)
        visible = many.positions.visible
        before = torch.ones_like(known[:, :length], dtype=torch.bool)
        if visible is not None:
            before[:, : visible.shape[1]] = visible[:, :length].to(before.device)
        return {
            "input_ids": torch.cat([known[:, :length], new], 1),
            "attention_mask": torch.cat([before, seen], 1).long(),
            cache_name(): many,
        }

    def _branch(self, index: Tensor, padding: Tensor) -> Self:
        """Make a cache whose row b goes on from row ``index[b]``, with so many columns of padding first."""
        tables: dict[Any, Any] = {}
        memo: dict[int, Any] = {}
        lent = {}
        for kv in self._sealed_by_images():
            lent[kv.index] = kv.text.lend(tables)
            memo[id(kv.text)] = TextSegment()  # not copied
        many = copy.deepcopy(self, memo)
        for kv in many._sealed_by_images():
            text = lent[kv.index]
            if text is not None:
                kv.segments.append(text)
        many.batch_select_indices(index)
        for layer in many._compressed_layers():
            if isinstance(layer.kv, LayerKV):
                layer.kv.follow(padding.to(layer.device))
        return many

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first update."""
        shapes = (layer.kv.shape for layer in self._compressed_layers())
        return next((shape[0] for shape in shapes if shape is not None), -1)

    def activate_past_recording(self) -> None:
        """Let sliding-window layers keep what a crop may ask for, also those not built yet."""
        self._record_past = True
        super().activate_past_recording()

    def _compressed_layers(self) -> Iterable[RotateKLayer]:
        return (layer for layer in self.layers if isinstance(layer, RotateKLayer))

    def _sealed_by_images(self) -> Iterable[LayerKV]:
        return (layer.kv for layer in self._compressed_layers() if isinstance(layer.kv, LayerKV))

    def tensors(self) -> list[Tensor]:
        """List every tensor held; layers share some."""
        held: list[Tensor] = []
        for layer in self.layers:
            held += layer.kv.tensors() if isinstance(layer, RotateKLayer) else stock_tensors(layer)
        held += self.positions.tensors()
        return held if self.rope_deltas is None else [*held, self.rope_deltas]

    def nbytes(self, *, beside: "RotateKCache | None" = None) -> int:
        """Count the bytes of the storage held, everything once.

        Coefficients, Values, text and its free columns, bases, deltas, row tables, positions and flags.

        Args:
            beside: another cache; what it holds too is left out.
        """
        return storage_bytes(self.tensors(), () if beside is None else beside.tensors())

    def shared_nbytes(self) -> int:
        """Count the bytes of the calibrated basis, which requests share and `nbytes` leaves out; 0 without one."""
        return 0 if self.calibrated is None else self.calibrated.nbytes()

    def report(self) -> CacheReport:
        """Account for tokens, ranks and bytes against a dense cache, per layer and in all; `print` shows a table."""
        layers = [
            layer_report(index, layer.kv) if isinstance(layer, RotateKLayer) else stock_report(index, layer)
            for index, layer in enumerate(self.layers)
        ]
        chosen = str(self.options) if self.tokens is None else f"{self.options}, tokens={self.tokens}"
        planner = self.coordinator.planner
        plan = "" if planner is None or planner.made is None else str(planner.made)
        return CacheReport(chosen, layers, self.nbytes(), self.shared_nbytes(), plan, self.decoding)

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "a RotateKCache cannot be iterated over as a DynamicCache can: its Keys are compressed. cache.report() and "
            "cache.tensors() say what it holds"
        )

    def __repr__(self) -> str:
        every = {field: getattr(self.options, field.name) for field in dataclasses.fields(FitOptions)}
        chosen = {field.name: value for field, value in every.items() if value != field.default}
        planner = self.coordinator.planner
        if planner is not None:
            if planner.rank_open:
                del chosen["sparsity"]  # follows from the budget
            chosen["budget"] = planner.budget.given
        if self.tokens is not None:
            chosen["tokens"] = self.tokens
        given = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
        held = f"{len(self.layers)} layers, {self.get_seq_length()} tokens, {self.nbytes():,} bytes"
        return f"<RotateKCache({given}): {held}>"


def _readers(text: PreTrainedConfig) -> dict[int, int]:
    """Count the layers that attend to the Keys of each layer, where the last layers of a model have none of their own.

    These read those of the last layer of their kind before them (Gemma 3n, Gemma 4).
    """
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    kinds = list(text.layer_types) if shared else []
    own = kinds[: len(kinds) - shared]
    last = {kind: index for index, kind in enumerate(own)}
    return {last[kind]: 1 + kinds[len(own) :].count(kind) for kind in last}
