"""`RotateKCache`, a transformers `Cache`, and its layers: thin shells over `LayerKV`."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from rotatek_cache.cache.budget import DEFAULT_SPARSITY, Budget, Planner
from rotatek_cache.cache.coordinator import Coordinator
from rotatek_cache.cache.decode_step import LayerStep
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.codecs.basis_file import load_basis
from rotatek_cache.codecs.registry import codecs_for
from rotatek_cache.codecs.shared_basis import CalibratedBasis
from rotatek_cache.core.precision import attention_dtype
from rotatek_cache.core.row_layout import row_index
from rotatek_cache.core.segments import SegmentView, Stored
from rotatek_cache.options import Allocation, Bits, FitOptions, with_option_docs
from rotatek_cache.report import CacheReport, LayerReport, SegmentReport
from rotatek_cache.token_pruning.interface import FeatureMethod, TokenMethod
from rotatek_cache.token_pruning.registry import token_method

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

    def __init__(self, kv: LayerKV, coordinator: Coordinator) -> None:
        self.kv, self.coordinator = kv, coordinator

    def hidden(self) -> Tensor | None:
        """Return bool ``[B, T]``: tokens that a token method has dropped, not to be attended to in this forward."""
        return self.coordinator.hidden(self.kv)

    def observe(self, query: Tensor, mask: Tensor | None, scale: float | None = None) -> None:
        """Note that the layer has attended with these queries ``[B, H_q, Q, D]``, after which it may seal."""
        self.coordinator.observe(self.kv, query, mask, scale)

    def to(self, device: torch.device, **kwargs: Any) -> Self:
        """Stay where it is: layers that share Keys move them to their own device, which has to be the same."""
        held = self.kv.text.keys if self.kv.pending is None else self.kv.pending.keys
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

    __slots__ = ("views",)

    def __init__(self, views: list[SegmentView]) -> None:
        self.views = views


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

    def __init__(self, kv: LayerKV, coordinator: Coordinator) -> None:
        super().__init__()
        self.kv, self.coordinator = kv, coordinator

    @property
    def keys(self) -> Tensor:
        """Not available: the layer stores coefficients."""
        raise AttributeError(
            "a RotateKCache has no dense Keys or Values of a layer to read (models with cross-attention layers do "
            "that, and cannot use it)"
        )

    @keys.setter
    def keys(self, value: None) -> None:
        """Base classes set it to None."""

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
    whole visual KV to 5/8. Use it with a model prepared by `attach`::

        model = attach(model)
        model.generate(**inputs, past_key_values=RotateKCache(sparsity=0.5))

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
        value_basis: Literal["auto", "none"] = "auto",
        basis_bits: Literal[8] | None = None,
        allocation: Allocation | str = "uniform",
        streaming: bool = False,
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
        rank_open = budget is not None and all(chosen.get(name) is None for name in ("sparsity", "rank", "energy"))
        self.options = FitOptions(**{**chosen, "sparsity": DEFAULT_SPARSITY} if rank_open else chosen)
        if tokens is not None and self.options.streaming:
            raise ValueError("tokens cannot be chosen with streaming=True, which seals an image before its end is seen")
        codecs_for(self.options)  # raises where options do not go together
        self.calibrated: CalibratedBasis | None = None
        if self.options.is_calibrated:
            self.calibrated = load_basis(self.options.basis)
        self.tokens = None if tokens is None else token_method(tokens)
        if self.tokens is not None and self.tokens.keep is None:
            name = type(self.tokens).__name__
            if budget is None:
                raise ValueError(f"tokens={name}: keep must be given where no budget is, as in {name}(keep=0.4)")
        planner = None if budget is None else Planner(Budget(budget), self.options, self.tokens, rank_open=rank_open)
        self.positions = VisualPositions(visual_mask)
        self.coordinator = Coordinator(self.positions, self.tokens, planner)
        self.rope_deltas: Tensor | None = None  # the model's M-RoPE state that belongs to this conversation
        self.chosen = False  # whether image features of this generate went through `tokens`
        self._record_past = False
        self.graphs = True
        self.stepping: list[LayerStep] | None = None  # while a decode step is captured
        self.decoding = ""  # how the last decode step was run
        super().__init__(layers=[])
        if config is not None:
            self.learn_config(config)

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
        self.coordinator.learn_layers([layer.kv if isinstance(layer, RotateKLayer) else None for layer in layers])
        self.layers: list[Any] = layers
        if self._record_past:
            super().activate_past_recording()

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
        return RotateKLayer(LayerKV(self.options, self.positions, index, readers), self.coordinator)

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
        text = config.get_text_config(decoder=True)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
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
            handle = StepHandle(step.views)
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
            if not self.positions.informed:
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
            self.positions.announce(begin, end, torch.cat([given.to(visual.device), visual[:, reach - begin :]], 1))

    def reset(self) -> None:
        """Forget all tokens, for a new prompt; the layers and the options stay."""
        super().reset()
        self.positions.reset()
        self.rope_deltas = None
        self.coordinator.reset()

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
        self._crop_offsets(max(0, held + count), held)
        super().crop(count)
        self.positions.truncate(self.get_seq_length())
        if not self.get_seq_length():
            self.rope_deltas = None

    def _crop_offsets(self, length: int, held: int) -> None:
        """Take images from position `length` on out of the M-RoPE offsets: without any image they are zero."""
        if self.rope_deltas is None:
            return
        gone, kept = self.positions.rows_with_visual(length, held), self.positions.rows_with_visual(0, length)
        if gone is None or not bool(gone.any()):
            return
        if kept is not None and bool((gone & kept).any()):
            raise ValueError(
                f"crop to {length} of {held} tokens removes some of a row's images and keeps others, and at which "
                "position (M-RoPE) the text behind those goes on is not known: crop to before the first image of each "
                "row, or keep a copy.deepcopy of the cache from before the later images"
            )
        deltas = self.rope_deltas.repeat_interleave(len(gone) // self.rope_deltas.shape[0], 0)
        self.rope_deltas = deltas.masked_fill(gone.to(deltas.device)[:, None], 0)

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

    def tensors(self) -> list[Tensor]:
        """List every tensor held; layers share some."""
        held: list[Tensor] = []
        for layer in self.layers:
            held += layer.kv.tensors() if isinstance(layer, RotateKLayer) else _stock_tensors(layer)
        held += self.positions.tensors()
        return held if self.rope_deltas is None else [*held, self.rope_deltas]

    def nbytes(self) -> int:
        """Count the bytes of the storage held, everything once.

        Coefficients, Values, text and its free columns, bases, deltas, row tables, positions and flags.
        """
        return storage_bytes(self.tensors())

    def shared_nbytes(self) -> int:
        """Count the bytes of the calibrated basis, which requests share and `nbytes` leaves out; 0 without one."""
        return 0 if self.calibrated is None else self.calibrated.nbytes()

    def report(self) -> CacheReport:
        """Account for tokens, ranks and bytes against a dense cache, per layer and in all; `print` shows a table."""
        layers = [_layer_report(index, layer) for index, layer in enumerate(self.layers)]
        chosen = str(self.options) if self.tokens is None else f"{self.options}, tokens={self.tokens}"
        planner = self.coordinator.planner
        plan = "" if planner is None or planner.made is None else str(planner.made)
        return CacheReport(chosen, layers, self.nbytes(), self.shared_nbytes(), plan, self.decoding)

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


def _rank(stored: Stored, width: int) -> int:
    fitted = None if stored.basis is None else stored.basis.fitted_rank
    return width if fitted is None else fitted


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of the distinct storages behind `tensors`."""
    storages = {(t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _stock_tensors(layer: Any) -> list[Tensor]:
    held = [part for value in vars(layer).values() for part in (value.values() if isinstance(value, dict) else [value])]
    return [tensor for tensor in held if isinstance(tensor, Tensor)]


def _layer_report(index: int, layer: Any) -> LayerReport:
    if not isinstance(layer, RotateKLayer):
        stored = storage_bytes(_stock_tensors(layer))
        counts = isinstance(layer, CacheLayerMixin) and layer.is_initialized  # linear attention holds no tokens
        tokens = layer.get_seq_length() if counts else 0
        return LayerReport(index, type(layer).__name__, tokens, [], 0, stored, stored, [])
    kv = layer.kv
    stored = storage_bytes(kv.tensors())
    if kv.shape is None or kv.dtype is None:
        return LayerReport(index, "RotateKLayer", 0, [], 0, stored, 0, [])
    batch, heads, width, value_width = kv.shape
    dense = batch * heads * kv.length * (width + value_width) * kv.dtype.itemsize
    segments = [
        SegmentReport(
            tokens=int(segment.lengths.sum()),
            rank=_rank(segment.keys, width),
            stored_rank=segment.keys.channels,
            head_width=width,
            key_bytes=storage_bytes([segment.keys.data]),
            value_bytes=storage_bytes([segment.values.data]),
            basis_bytes=storage_bytes(
                [t for stored in (segment.keys, segment.values) for t in stored.tensors() if t is not stored.data]
            ),
        )
        for segment in kv.segments
    ]
    return LayerReport(
        index,
        "RotateKLayer",
        kv.length,
        segments,
        kv.dense_tokens(),
        stored,
        dense,
        list(kv.kept_dense),
        sum(int(counts.sum()) for _, counts in kv.dropped),
    )
