"""Decode steps replayed from a captured graph, in place of the Python of an attached model's layers.

What an attached model runs below its head for one token over a sealed cache is the same every time: the same kernels
on the same addresses. From a cache's second step on it is captured as a CUDA graph and replayed. All that changes from
step to step, lengths, positions, row tables, lives on the device (`rotatek_cache.cache.decode_step`). Whatever a graph
cannot do is decoded step by step, with the reason in `report()`.
"""

import contextlib
import copy
import functools
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rotatek_cache.cache.coded_step import CodedLayerStep, CodedStep
from rotatek_cache.cache.decode_step import DecodeStep, LayerStep
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.hf.cache import RotateKCache, RotateKLayer
from rotatek_cache.hf.calls import CACHE_NAMES, arguments_of, cache_argument, cache_in

logger = logging.getLogger(__name__)

GRAPHS = 4  # captured graphs that a model keeps, by default
QUIET_HOOKS = ("transformers.utils.output_capturing", "rotatek_cache.hf.attach")
HIDING_MASK = "the attention mask hides more than padding"
IDLE = 1  # graphs, with all that they store, that wait for another prompt once their cache is gone
MOST_FAILURES = 3  # so many failed captures, and a model is decoded step by step
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
        """Run `warm_up` on a stream of its own, which libraries ask for, and capture `step` on it."""
        current, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        with _CAPTURING:  # the beginning of a capture waits for the device, which must not be capturing then
            side.wait_stream(current)
            with torch.cuda.stream(side):
                warm_up()
            current.wait_stream(side)
            # Other threads go on while this one captures.
            with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
                return step()

    def replay(self) -> None:
        """Launch the graph."""
        self.graph.replay()


_CAPTURING = threading.Lock()


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Return the stream of a device that all captures use: cuBLAS keeps a workspace for each stream it has met."""
    return torch.cuda.Stream(device)


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
    step: DecodeStep | CodedStep
    graph: Graph
    output: Any = None
    replays: int = 0


@dataclass(eq=False)
class Conversation:
    """The facts known of a cache that decodes.

    Attributes:
        steps: decode steps so far.
        failure: why a capture failed.
        short: graphs in a row that were hardly used.
        graphs: whether the running generate allows graphs.
        mask: of the coming forward, as generate gives it.
        mask_is_known: whether that of the running generate was seen to hide padding alone.
        mask_hides: whether it was seen to hide more.
    """

    steps: int = 0
    short: int = 0
    failure: str = ""
    graphs: bool = True
    mask: "weakref.ref[Tensor] | None" = None
    mask_is_known: bool = False
    mask_hides: bool = False


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
        self.failures: list[str] = []  # why captures failed; a server would pay for one with each prompt
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
        known.mask_hides = known.mask_hides and not first

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
        cache = cache_in(given)
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
        if len(self.failures) >= MOST_FAILURES:
            raise Eager(self.failures[-1])
        known = self.conversations.setdefault(cache, Conversation())
        if self.model is None or not self.model.is_current():
            self.model = _ModelParts.of(inner)
            self.forget()
        self._check(self.model, inner.config, known, cache, given)
        known.steps += 1
        if known.steps == 1:
            raise Eager("the first step after a prompt")
        for layer in cache.layers:
            if isinstance(layer.kv, LayerKV):
                layer.kv.make_room()
                if layer.kv.answer is not None and layer.kv.answer.queries is None:
                    raise Eager("the first step of an answer")
        signature, inputs = _signature(given)
        signature["model"] = self.model.state(inner)
        layers = [layer.kv for layer in cache.layers]
        captured = next((held for held in self.captured if held.cache() is cache), None)
        if captured is not None and not captured.step.belongs_to(layers):
            captured.cache = _gone  # the cache was reset; its old storage may serve the new prompt
            captured = None
        if captured is None or not captured.step.fits() or captured.signature != signature:
            captured = self._capture(inner, original, cache, signature, inputs, captured, given.get("attention_mask"))
        else:
            captured.step.refresh()
            self._check_mask(known, captured.step, given.get("attention_mask"))
            self.captured.remove(captured)
            self.captured.append(captured)
        for name, tensor in captured.inputs.items():
            tensor.copy_(inputs[name])
        captured.step.run(captured.graph.replay)
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
        if torch.is_grad_enabled():
            raise Eager("gradients are enabled: use torch.no_grad()")
        if any(torch.is_autocast_enabled(device) for device in model.device_types):
            raise Eager("autocast is on")  # weights that it has cast are gone when it ends
        configs = (config, config.get_text_config(decoder=True))
        asked = given.get("output_hidden_states") or given.get("output_attentions")
        if asked or any(held.output_hidden_states for held in configs):
            raise Eager("hidden states are asked for")
        if given.get("return_dict") is False or given.get("use_cache") is False:
            raise Eager("the call asks for a tuple, or for no cache")
        stock = [index for index, layer in enumerate(cache.layers) if not isinstance(layer, RotateKLayer)]
        if stock:
            raise Eager(f"layers {stock} have transformers' own cache layer (sliding window or linear attention)")
        layers = [layer.kv for layer in cache.layers]
        coded = cache.options.codes_text
        if not coded and any(layer.pending is not None or layer.text.keys is None for layer in layers):
            raise Eager("an image waits for its end")
        begin = layers[0].length
        cache.positions.complete(begin + 1, cache.batch_size)
        if cache.positions.has_visual(begin, begin + 1):
            raise Eager("the token is visual")
        if not coded and not any(layer.segments for layer in layers):
            raise Eager("nothing is compressed")
        if given.get("position_ids") is None:
            raise Eager("the call gives no position_ids")
        if model.refusal:
            raise Eager(model.refusal)
        if model.has_hooks():
            raise Eager("modules have forward hooks")
        if known.mask_hides and given.get("attention_mask") is not None:
            raise Eager(HIDING_MASK)  # known since the first step of this generate
        if known.failure:
            raise Eager(known.failure)
        if known.short >= MOST_SHORT:
            raise Eager("its shapes change too often")

    @staticmethod
    def _check_mask(known: Conversation, step: DecodeStep | CodedStep, mask: Any) -> None:
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
        known.mask_hides = of_generate
        raise Eager(HIDING_MASK)

    def _capture(
        self,
        inner: Any,
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
        try:
            step = CodedStep(layers) if cache.options.codes_text else DecodeStep(layers)
        except torch.OutOfMemoryError as error:
            raise self._failed(known, error) from error
        self._check_mask(known, step, mask)
        idle = self._idle(step, signature)
        if idle is not None:
            idle.step.take_over(layers)
            idle.cache, idle.replays = weakref.ref(cache), 0
            self.captured.remove(idle)
            self.captured.append(idle)
            return idle
        arguments = {
            name: value for name, value in signature.items() if not isinstance(value, _Spec) and name != "model"
        }

        def run() -> Any:
            return original(**arguments)

        def run_and_advance() -> Any:
            output = run()
            step.advance_on_device()
            return output

        try:
            static = {name: tensor.clone() for name, tensor in inputs.items()}
            arguments |= static | cache_argument(inner, cache) | {"attention_mask": None}
            graph = CudaGraph() if self.new_graph is None else self.new_graph()
            with _stepping(cache, step.layers), torch.cuda.device_of(step.layers[0].keys):
                output = _without_cache(graph.capture(run, run_and_advance))
        except Exception as error:  # whatever a model does that a graph cannot: it runs without one
            raise self._failed(known, error) from error
        captured = Captured(weakref.ref(cache), signature, static, step, graph, output)
        step.refresh()
        self.captured.append(captured)
        del self.captured[: -self.limit]
        for held in [held for held in self.captured if held.cache() is None][:-IDLE]:
            self.captured.remove(held)
        return captured

    def _failed(self, known: Conversation, error: Exception) -> Eager:
        """Note that a step could not be captured, and why."""
        message = str(error).partition("\n")[0]
        known.failure = f"capturing a step failed ({type(error).__name__}: {message})"
        self.failures.append(known.failure)
        logger.warning("RotateKCache: decoding without a CUDA graph: %s", known.failure)
        return Eager(known.failure)

    def _idle(self, step: DecodeStep | CodedStep, signature: dict[str, Any]) -> Captured | None:
        """Find a graph of the same form whose cache is gone."""
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
    """The parts of a model that decide whether its steps can be captured, and whether a captured one is still its own.

    A user may replace any of it between two steps, so all is read from the dictionaries of its modules.

    Attributes:
        hooks: the dictionaries that hold forward hooks, of single modules and of all.
        children: the dictionaries that hold its modules.
        modules: the modules that were found in them.
        methods: the forward of each, where it is not that of its class.
        tensors: the dictionaries that hold its parameters and buffers.
        adapters: modules that an adapter library switches.
        device_types: of its parameters.
        refusal: why no step can be captured; "" if it can.
    """

    hooks: list[Any]
    children: list[dict[str, Any]]
    modules: list[Any]
    methods: list[Any]
    tensors: list[dict[str, Tensor | None]]
    adapters: list[Any]
    device_types: set[str]
    refusal: str

    @classmethod
    def of(cls, inner: Any) -> "_ModelParts":
        """Look through the model below the head."""
        every = list(inner.modules())
        parts = [part for part in every if part is not inner]
        children = [part._modules for part in every if part._modules]
        modules = [module for held in children for module in held.values()]
        devices = {parameter.device for parameter in inner.parameters()}
        refusal = ""
        if len(devices) > 1:
            refusal = "the model lies on several devices"
        elif any(getattr(getattr(part, "_hf_hook", None), "offload", False) for part in parts):
            refusal = "weights are offloaded"
        of_all = [torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks]
        return cls(
            hooks=[*of_all, *(held for part in parts for held in (part._forward_hooks, part._forward_pre_hooks))],
            children=children,
            modules=modules,
            methods=[_own_forward(module) for module in modules],
            tensors=[held for part in every for held in (part._parameters, part._buffers)],
            adapters=[part for part in parts if hasattr(part, "active_adapters") and hasattr(part, "merged")],
            device_types={device.type for device in devices},
            refusal=refusal,
        )

    def is_current(self) -> bool:
        """Tell whether the model still has these modules, with these methods."""
        modules = [module for held in self.children for module in held.values()]
        return modules == self.modules and list(map(_own_forward, modules)) == self.methods

    def has_hooks(self) -> bool:
        """Tell whether somebody listens to the modules.

        Those of `QUIET_HOOKS` do nothing in a step: transformers' own unless outputs are asked for, and attach's.
        """
        # A step asks this: the emptiness of many dictionaries is found faster than their values are walked.
        hooks = (hook for held in filter(None, self.hooks) for hook in held.values())
        return any(getattr(hook, "__module__", "") not in QUIET_HOOKS for hook in hooks)

    def state(self, inner: Any) -> tuple[Any, ...]:
        """Say what must not have changed since a capture: where weights lie, adapters, the modes of torch."""
        adapters = tuple(
            (
                tuple(part.active_adapters),
                part.disable_adapters,
                part.merged,
                dict(getattr(part, "scaling", ())),
            )
            for part in self.adapters
        )
        tensors = itertools.chain.from_iterable(held.values() for held in self.tensors)
        addresses = tuple([tensor.data_ptr() for tensor in tensors if tensor is not None])
        return addresses, adapters, inner.training, torch.is_inference_mode_enabled()


def _own_forward(module: Any) -> Any:
    return module.__dict__.get("forward")


@contextlib.contextmanager
def _stepping(cache: RotateKCache, layers: list[LayerStep] | list[CodedLayerStep]) -> Iterator[None]:
    """Let the cache take and give what a step of fixed addresses does."""
    cache.stepping = layers
    try:
        yield
    finally:
        cache.stepping = None


@dataclass(frozen=True)
class _Spec:
    """Shape, dtype and device of a tensor argument, which have to stay."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _signature(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split a call into what must be the same in each replay, and tensors, whose numbers may differ."""
    signature: dict[str, Any] = {}
    inputs: dict[str, Tensor] = {}
    for name, value in given.items():
        if name in (*CACHE_NAMES, "attention_mask", "self"):
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
    """Tell whether a value can be compared, and holds no tensor."""
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
