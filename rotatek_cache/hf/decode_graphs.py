"""Decode steps replayed from a captured graph, in place of the Python of an attached model's layers.

What an attached model runs below its head for one token over a sealed cache is the same every time: the same kernels
on the same addresses. From a cache's second step on it is captured as a CUDA graph and replayed. All that changes from
step to step, lengths, positions, row tables, lives on the device (`rotatek_cache.cache.decode_step`). Whatever a graph
cannot do is decoded step by step, with the reason in `report()`.
"""

import contextlib
import copy
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rotatek_cache.cache.decode_step import DecodeStep, LayerStep
from rotatek_cache.hf.cache import RotateKCache, RotateKLayer
from rotatek_cache.hf.calls import arguments_of

logger = logging.getLogger(__name__)

GRAPHS = 4  # captured graphs that a model keeps, by default
QUIET_HOOKS = ("transformers.utils.output_capturing", "rotatek_cache.hf.attach")
SHORT = 4  # a graph that was replayed less often was not worth its capture
MOST_SHORT = 4  # so many such graphs in a row, and a cache is decoded step by step


class Graph(Protocol):
    """Something that records the work of a function and repeats it on the same addresses."""

    def capture(self, warm_up: Callable[[], Any], step: Callable[[], Any]) -> Any:
        """Run `warm_up`, record `step` and return what it returned, whose tensors every `replay` writes anew."""

    def replay(self) -> None:
        """Repeat what was recorded."""


class CudaGraph:
    """A `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, warm_up: Callable[[], Any], step: Callable[[], Any]) -> Any:
        """Run `warm_up` on a stream of its own, which libraries ask for, and capture `step`."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            warm_up()
        current.wait_stream(side)
        # Other threads go on while this one captures.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            return step()

    def replay(self) -> None:
        """Launch the graph."""
        self.graph.replay()


@dataclass(eq=False)
class Captured:
    """A captured step of one cache.

    Attributes:
        cache: a weak reference to whose it is.
        signature: of the call, see `_signature`.
        inputs: static tensors that a call's are copied into.
        step: what of the cache is read and written.
        graph: the graph.
        output: what the model returned while it was captured, the cache taken out.
        replays: how often it was replayed.
    """

    cache: Callable[[], RotateKCache | None]
    signature: dict[str, Any]
    inputs: dict[str, Tensor]
    step: DecodeStep
    graph: Graph
    output: Any = None
    replays: int = 0


@dataclass(eq=False)
class Conversation:
    """What is known of a cache that decodes.

    Attributes:
        steps: decode steps so far.
        failure: why a capture failed.
        short: graphs in a row that were hardly used.
        graphs: whether the running generate allows graphs.
        mask: of the coming forward, as generate gives it.
        mask_is_known: whether that of the running generate was seen to hide padding alone.
    """

    steps: int = 0
    short: int = 0
    failure: str = ""
    graphs: bool = True
    mask: "weakref.ref[Tensor] | None" = None
    mask_is_known: bool = False


class Eager(Exception):  # noqa: N818 - no error: it says why a step is decoded without a graph
    """Why a step is not replayed."""


class DecodeGraphs:
    """The captured steps of one attached model.

    Args:
        limit: how many graphs are kept, least recently used first to go; each holds the activations of one step and
            keeps the storage of its cache, also of one that is gone, for the next prompt of the same shapes. 0: none.
    """

    def __init__(self, limit: int = GRAPHS) -> None:
        self.limit = limit
        self.new_graph: Callable[[], Graph] | None = None  # of another device than CUDA
        self.captured: list[Captured] = []  # the most recently used last
        self.conversations: weakref.WeakKeyDictionary[RotateKCache, Conversation] = weakref.WeakKeyDictionary()
        self.model: _ModelParts | None = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodeGraphs":
        fresh = DecodeGraphs(self.limit)
        fresh.new_graph = self.new_graph
        return fresh

    def __reduce__(self) -> Any:
        return DecodeGraphs, (self.limit,)

    def begin_generate(self, cache: RotateKCache, *, graphs: bool) -> None:
        """Learn that `generate` begins, and whether it allows graphs."""
        self.conversations.setdefault(cache, Conversation()).graphs = graphs

    def expect_mask(self, cache: RotateKCache, mask: Tensor, *, first: bool) -> None:
        """Learn the mask of a `generate`'s coming forward: that of its first, and ones."""
        known = self.conversations.setdefault(cache, Conversation())
        known.mask = weakref.ref(mask)
        known.mask_is_known = known.mask_is_known and not first

    def forward(self, inner: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for the forward of the model below the head.

        Args:
            inner: that model.
            original: its forward.
            args, kwargs: of the call.
        """
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        given = arguments_of(type(inner).forward, inner, *args, **kwargs)
        cache = given.get("past_key_values")
        if not isinstance(cache, RotateKCache) or not self.limit or not cache.get_seq_length():
            return original(*args, **kwargs)
        content = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if content is None or content.shape[1] != 1 or not (content.is_cuda or self.new_graph is not None):
            return original(*args, **kwargs)
        try:
            with self._lock:
                return self._replayed(inner, original, cache, given)
        except Eager as reason:
            cache.decoding = f"step by step: {reason}"
        return original(*args, **kwargs)

    def _replayed(self, inner: Any, original: Callable[..., Any], cache: RotateKCache, given: dict[str, Any]) -> Any:
        known = self.conversations.setdefault(cache, Conversation())
        if self.model is None:
            self.model = _ModelParts.of(inner)
        self._check(self.model, inner.config, known, cache, given)
        known.steps += 1
        if known.steps == 1:
            raise Eager("the first step after a prompt")
        signature, inputs = _signature(given)
        signature["model"] = self.model.state(inner)
        layers = [layer.kv for layer in cache.layers]
        captured = next((held for held in self.captured if held.cache() is cache), None)
        if captured is not None and not captured.step.belongs_to(layers):
            captured.cache = _gone  # the cache was reset; its old storage may serve the new prompt
            captured = None
        if captured is None or not captured.step.fits() or captured.signature != signature:
            captured = self._capture(original, cache, signature, inputs, captured, given.get("attention_mask"))
        else:
            captured.step.refresh()
            self._check_mask(known, captured.step, given.get("attention_mask"))
            self.captured.remove(captured)
            self.captured.append(captured)
        for name, tensor in captured.inputs.items():
            tensor.copy_(inputs[name])
        captured.graph.replay()
        captured.step.advance()
        captured.replays += 1
        cache.decoding = "from a captured graph"
        return _handed_out(captured.output, cache)

    @staticmethod
    def _check(
        model: "_ModelParts", config: Any, known: Conversation, cache: RotateKCache, given: dict[str, Any]
    ) -> None:
        """Raise `Eager` where a step cannot be captured; asks the host alone."""
        if not cache.graphs or not known.graphs:
            raise Eager("graphs are switched off")
        if torch.is_autocast_enabled("cuda"):
            raise Eager("autocast is on")
        if torch.is_grad_enabled():
            raise Eager("gradients are enabled: use torch.no_grad()")
        if given.get("output_hidden_states") or given.get("output_attentions") or config.output_hidden_states:
            raise Eager("hidden states are asked for")
        if given.get("return_dict") is False or given.get("use_cache") is False:
            raise Eager("the call asks for a tuple, or for no cache")
        stock = [index for index, layer in enumerate(cache.layers) if not isinstance(layer, RotateKLayer)]
        if stock:
            raise Eager(f"layers {stock} have transformers' own cache layer (sliding window)")
        layers = [layer.kv for layer in cache.layers]
        if any(layer.pending is not None or layer.text.keys is None for layer in layers):
            raise Eager("an image waits for its end")
        if not any(layer.segments for layer in layers):
            raise Eager("nothing is compressed")
        if given.get("position_ids") is None:
            raise Eager("the call gives no position_ids")
        if model.refusal:
            raise Eager(model.refusal)
        if model.has_hooks():
            raise Eager("modules have forward hooks")
        if known.failure:
            raise Eager(known.failure)
        if known.short >= MOST_SHORT:
            raise Eager("its shapes change too often")

    @staticmethod
    def _check_mask(known: Conversation, step: DecodeStep, mask: Any) -> None:
        """Raise `Eager` where a mask hides more than padding; within one `generate` that is read once."""
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise Eager("the attention mask is no [rows, tokens]")
        of_generate = known.mask is not None and known.mask() is mask
        if of_generate and known.mask_is_known:
            return  # generate only ever appends ones to it
        if step.shows_all(mask):
            known.mask_is_known = of_generate
            return
        raise Eager("the attention mask hides more than padding")

    def _capture(
        self,
        original: Callable[..., Any],
        cache: RotateKCache,
        signature: dict[str, Any],
        inputs: dict[str, Tensor],
        previous: Captured | None,
        mask: Any,
    ) -> Captured:
        known = self.conversations[cache]
        if previous is not None:
            self.captured.remove(previous)
            known.short = known.short + 1 if previous.replays < SHORT else 0
        layers = [layer.kv for layer in cache.layers]
        step = DecodeStep(layers)
        self._check_mask(known, step, mask)
        idle = self._idle(step, signature)
        if idle is not None:
            idle.step.take_over(layers)
            idle.cache, idle.replays = weakref.ref(cache), 0
            self.captured.remove(idle)
            self.captured.append(idle)
            return idle
        captured = Captured(
            weakref.ref(cache),
            signature,
            {name: tensor.clone() for name, tensor in inputs.items()},
            step,
            CudaGraph() if self.new_graph is None else self.new_graph(),
        )
        arguments = {
            name: value for name, value in signature.items() if not isinstance(value, _Spec) and name != "model"
        }
        arguments |= captured.inputs | {"past_key_values": cache, "attention_mask": None}

        def run() -> Any:
            return original(**arguments)

        def run_and_advance() -> Any:
            output = run()
            step.advance_on_device()
            return output

        try:
            with _stepping(cache, step.layers):
                captured.output = _without_cache(captured.graph.capture(run, run_and_advance))
        except Exception as error:  # whatever a model does that a graph cannot: it runs without one
            message = str(error).partition("\n")[0]
            known.failure = f"capturing a step failed ({type(error).__name__}: {message})"
            logger.warning("RotateKCache: decoding without a CUDA graph: %s", known.failure)
            raise Eager(known.failure) from error
        step.refresh()
        self.captured.append(captured)
        del self.captured[: -self.limit]
        return captured

    def _idle(self, step: DecodeStep, signature: dict[str, Any]) -> Captured | None:
        """A graph of the same form whose cache is gone."""
        form = step.form()
        for held in self.captured:
            alike = held.cache() is None and held.signature == signature and held.step.is_private
            if alike and step.is_private and held.step.form() == form:
                return held
        return None

    def forget(self) -> None:
        """Drop all graphs."""
        self.captured.clear()


def _gone() -> None:
    """Stand in for a weak reference to a cache that is no more."""


@dataclass(eq=False)
class _ModelParts:
    """What of a model decides whether its steps can be captured, and whether a captured one is still its own.

    Attributes:
        hooks: the dictionaries that hold the forward hooks of its modules.
        parameters: its parameters.
        adapters: modules that an adapter library switches.
        refusal: why no step can be captured; "" if it can.
    """

    hooks: list[Any]
    parameters: list[Tensor]
    adapters: list[Any]
    refusal: str

    @classmethod
    def of(cls, inner: Any) -> "_ModelParts":
        """Look through the model below the head, once."""
        modules = [module for module in inner.modules() if module is not inner]
        parameters = list(inner.parameters())
        refusal = ""
        if len({parameter.device for parameter in parameters}) > 1:
            refusal = "the model lies on several devices"
        elif any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in modules):
            refusal = "weights are offloaded"
        return cls(
            [held for part in modules for held in (part._forward_hooks, part._forward_pre_hooks)],
            parameters,
            [part for part in modules if hasattr(part, "active_adapters") and hasattr(part, "merged")],
            refusal,
        )

    def has_hooks(self) -> bool:
        """Whether somebody listens to the modules.

        Those of `QUIET_HOOKS` do nothing in a step: transformers' own unless outputs are asked for, and attach's.
        """
        return any(getattr(hook, "__module__", "") not in QUIET_HOOKS for held in self.hooks for hook in held.values())

    def state(self, inner: Any) -> tuple[Any, ...]:
        """Say what must not have changed since a capture: where weights lie, adapters, the modes of torch."""
        adapters = tuple((tuple(part.active_adapters), part.disable_adapters, part.merged) for part in self.adapters)
        addresses = tuple(parameter.data_ptr() for parameter in self.parameters)
        return addresses, adapters, inner.training, torch.is_inference_mode_enabled(), torch.is_autocast_enabled()


@contextlib.contextmanager
def _stepping(cache: RotateKCache, layers: list[LayerStep]) -> Iterator[None]:
    """Let the cache take and give what a step of fixed addresses does."""
    cache.stepping = layers
    try:
        yield
    finally:
        cache.stepping = None


@dataclass(frozen=True)
class _Spec:
    """What has to stay of a tensor argument."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _signature(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What must stay the same between the call that was captured and one that is replayed, and its tensors."""
    signature: dict[str, Any] = {}
    inputs: dict[str, Tensor] = {}
    for name, value in given.items():
        if name in ("past_key_values", "attention_mask", "self"):
            continue
        if isinstance(value, Tensor):
            inputs[name] = value
            signature[name] = _Spec(tuple(value.shape), value.dtype, value.device)
        elif _is_plain(value):
            signature[name] = copy.copy(value)
        else:
            raise Eager(f"the call gives {name} as {type(value).__name__}")
    return signature, inputs


def _is_plain(value: Any) -> bool:
    """Whether a value can be compared, and holds no tensor."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or value == {} or isinstance(value, bool | int | float | str)


def _without_cache(output: Any) -> Any:
    """Check and strip what a forward returned, so that nothing captured keeps a cache alive."""
    if not hasattr(output, "keys"):
        raise TypeError(f"expected a ModelOutput, got {type(output).__name__}")
    held: dict[str, Any] = {}
    for name in output.keys():  # noqa: SIM118 - of a ModelOutput
        value = output[name]
        if isinstance(value, RotateKCache):
            held[name] = RotateKCache
        elif isinstance(value, Tensor):
            held[name] = value
        else:
            raise TypeError(f"cannot copy the output {name} of a captured step, a {type(value).__name__}")
    return type(output), held


def _handed_out(output: Any, cache: RotateKCache) -> Any:
    """Return a copy of what a replay has written."""
    kind, held = output
    return kind(**{name: cache if value is RotateKCache else value.clone() for name, value in held.items()})
