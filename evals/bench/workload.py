"""What `evals/bench/latency.py` times: models by shape, prompts, caches, and the steps that a request is made of."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Cache,
    CLIPVisionConfig,
    DynamicCache,
    LlavaConfig,
    QuantizedCache,
    StaticCache,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evals.fidelity import stored_tensors
from rotatek_cache import RotateKCache, attach, detach
from rotatek_cache.cache.coordinator import Coordinator
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.hf.cache import LayerHandle
from rotatek_cache.hf.storage import storage_bytes


class NotHereError(Exception):
    """A method cannot run on this machine; the message says what is missing."""


class PromptError(Exception):
    """A prompt cannot be made; the message says what was wanted."""


def build(shape: Mapping[str, Any], device: str, dtype: torch.dtype, longest: int) -> Any:
    """Build a LLaVA with a text model of that shape, random weights and a vision tower that is never run."""
    fields = {name: value for name, value in shape.items() if name != "model_type"}
    text = AutoConfig.for_model(shape["model_type"], **fields, max_position_embeddings=longest)
    tower = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_id=text.vocab_size - 1)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


@dataclass(frozen=True)
class Prompt:
    """The inputs of a prefill, the same for every row.

    Attributes:
        inputs: arguments of the model's forward.
        visual: bool ``[B, T]``, True on visual tokens; None where `attach` sees them in the inputs.
        batch, context: B and T.
    """

    inputs: dict[str, Tensor]
    visual: Tensor | None
    batch: int
    context: int


def draw_prompt(model: Any, batch: int, context: int, text: int, seed: int = 0) -> Prompt:
    """Draw embeddings ``[B, T, hidden]`` whose variance falls as 1 / rank, all visual but `text` around them."""
    weight = model.get_input_embeddings().weight
    generator = torch.Generator(weight.device).manual_seed(seed)

    def normal(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=generator, device=weight.device)

    rank = min(256, weight.shape[1])
    scales = torch.arange(1, rank + 1, device=weight.device).rsqrt()
    mixing = scales[:, None] * normal(rank, weight.shape[1]) / rank**0.5
    embeddings = torch.stack([(normal(context, rank) @ mixing).to(weight.dtype) for _ in range(batch)])
    return Prompt({"inputs_embeds": embeddings}, visual_span(batch, context, text, weight.device), batch, context)


def visual_span(batch: int, context: int, text: int, device: torch.device) -> Tensor:
    """Mark as visual, bool ``[B, T]``, all but `text` tokens, half of which stand before the image."""
    visual = torch.zeros(batch, context, dtype=torch.bool, device=device)
    visual[:, text // 2 : context - (text - text // 2)] = True
    return visual


def read_prompt(
    model: Any, processor: Any, images: Sequence[Image.Image], question: str, batch: int, context: int
) -> Prompt:
    """Have the model's own tower read as many of `images`, in turn, as `context` tokens hold, and a question.

    Raises:
        PromptError: not even one image fits, or no text follows it, so that a prefill would compress nothing.
    """

    def encode(count: int) -> Any:
        shown = [{"type": "image", "image": images[number % len(images)]} for number in range(count)]
        turn = {"role": "user", "content": [*shown, {"type": "text", "text": question}]}
        return processor.apply_chat_template(
            [[turn]], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def length(count: int) -> int:
        return int(encode(count)["input_ids"].shape[1])

    count = 1
    if length(1) > context:
        raise PromptError(f"an image and a question take {length(1)} tokens, --contexts asks for {context}")
    while length(count + 1) <= context:  # images differ in size
        count += 1
    inputs = encode(count).to(model.device, model.dtype)
    if int(inputs["input_ids"][0, -1]) == model.config.image_token_id:
        raise PromptError(f"--question {question!r} gives no token of this model behind the image: ask another")
    rows = {name: torch.cat([value] * batch) for name, value in inputs.items()}
    return Prompt(rows, None, batch, int(inputs["input_ids"].shape[1]))


DENSE: dict[str, Callable[[Any, int], Cache]] = {
    "dynamic": lambda text, _: DynamicCache(config=text),
    "static": lambda text, longest: StaticCache(config=text, max_cache_len=longest),
}


def make_cache(options: Mapping[str, Any], config: Any, visual: Tensor | None, longest: int) -> Cache:
    """Make the empty cache that a method's options describe."""
    text = config.get_text_config(decoder=True)
    if "dense" in options:
        return DENSE[options["dense"]](text, longest)
    if "quantized" in options:
        try:
            return QuantizedCache(config=text, **options["quantized"])
        except ImportError as error:
            raise NotHereError(str(error)) from error
    return RotateKCache.for_study(**options, visual_mask=visual)


def held_bytes(cache: Cache) -> int:
    """Count the bytes of all storage that a cache's layers hold."""
    if isinstance(cache, RotateKCache):
        return cache.nbytes()
    return storage_bytes(stored_tensors([list(vars(layer).values()) for layer in cache.layers]))


def switch_attention(model: Any, options: Mapping[str, Any]) -> None:
    """Select the attention that a method reads its cache with."""
    name = options.get("attention", "sdpa") if "dense" in options or "quantized" in options else "rotatek"
    if name == "flash_attention_2" and (model.device.type != "cuda" or importlib.util.find_spec("flash_attn") is None):
        raise NotHereError("FlashAttention 2 needs a CUDA device and the package flash_attn")
    if options.get("compiled") and model.device.type != "cuda":
        raise NotHereError("compiled decode steps (CUDA graphs) need a CUDA device")
    detach(model)
    if name == "rotatek":
        attach(model)
    else:
        model.set_attn_implementation({"text_config": name})


class _TimedCoordinator(Coordinator):
    """A coordinator that measures seals."""

    seconds = 0.0

    def observe(self, layer: LayerKV, query: Tensor, mask: Tensor | None, scale: float | None = None) -> None:
        begin = clock(query.device)
        super().observe(layer, query, mask, scale)
        self.seconds += clock(query.device) - begin


def clock(device: torch.device) -> float:
    """Return the time in seconds, when all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def prefill(model: Any, cache: Cache, prompt: Prompt) -> float:
    """Time the prompt's forward, in seconds."""
    begin = clock(model.device)
    model(**prompt.inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return clock(model.device) - begin


def fit_share(model: Any, cache: Cache, prompt: Prompt) -> float | None:
    """Measure the share of a prefill that goes into seals; None for caches without."""
    if not isinstance(cache, RotateKCache):
        return None
    cache.coordinator = timed = _TimedCoordinator(cache.positions, cache.tokens, cache.coordinator.planner)
    whole = prefill(model, cache, prompt)
    return timed.seconds / whole


def decode(model: Any, cache: Cache, batch: int, tokens: int, *, compiled: bool = False) -> list[float]:
    """Time each of `tokens` decode steps, in seconds."""
    step = model.get_compiled_call(None) if compiled else model
    ids = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    times = []
    for _ in range(tokens):
        begin = clock(model.device)
        step(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        times.append(clock(model.device) - begin)
    return times


@dataclass
class _Call:
    """One layer's part of a decode step: what its cache and its attention function were given."""

    states: tuple[Any, ...]
    options: dict[str, Any]
    attend: Callable[..., Any] | None = None
    module: Any = None
    query: Tensor | None = None
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


@contextmanager
def _heard(model: Any, cache: Cache) -> Iterator[list[_Call]]:
    """List the calls of cache and attention function of one forward inside."""
    usual = model.config.get_text_config(decoder=True)._attn_implementation  # noqa: SLF001 - it has no public name
    names = {usual, "rotatek"} if isinstance(cache, RotateKCache) else {usual}  # `attach` switches by the cache
    update = cache.update
    calls: list[_Call] = []

    def updating(*states: Any, **options: Any) -> Any:
        calls.append(_Call(states, options))
        return update(*states, **options)

    def listening(attend: Callable[..., Any]) -> Callable[..., Any]:
        def attending(module: Any, query: Tensor, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
            call = calls[-1]
            call.attend, call.module, call.query, call.arguments = attend, module, query, (rest, options)
            return attend(module, query, key, value, *rest, **options)

        return attending

    for name in names:
        ALL_ATTENTION_FUNCTIONS[name] = listening(ALL_ATTENTION_FUNCTIONS[name])
    cache.update = updating  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        for name in names:
            del ALL_ATTENTION_FUNCTIONS[name]
        del cache.update


def attention_steps(
    model: Any, cache: Cache, batch: int, tokens: int, clock: Callable[[torch.device], float] = clock
) -> list[float]:
    """Time the attention alone of each of `tokens` decode steps: append and attend, through all layers.

    One step of the whole model is heard; after it, its states go through cache and attention function by themselves.
    """
    with _heard(model, cache) as calls:
        decode(model, cache, batch, 1)
    times = []
    for _ in range(tokens):
        begin = clock(model.device)
        for call in calls:
            assert call.attend is not None
            rest, options = call.arguments
            call.attend(call.module, call.query, *cache.update(*call.states, **call.options), *rest, **options)
        times.append(clock(model.device) - begin)
    return times


def fill(model: Any, cache: Cache, batch: int, context: int, text: int) -> None:
    """Fill an empty cache with drawn states of a whole prompt, layer by layer, as a prefill hands them over.

    What is left out is the model around it: activations of a prefill, which a server reads in pieces, do not bound the
    batch that can be decoded.
    """
    config = model.config.get_text_config(decoder=True)
    heads, groups = config.num_key_value_heads, config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // groups
    if isinstance(cache, RotateKCache):
        cache.learn_config(model.config)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, width, device=model.device, dtype=model.dtype)

    for layer in range(config.num_hidden_layers):
        held, _ = cache.update(normal(batch, heads, context), normal(batch, heads, context), layer)
        if isinstance(held, LayerHandle):
            held.observe(normal(batch, groups, min(text, context)), None)
