"""Ways of calling a model that people use, each a function of the family, a model and a maker of caches.

A way returns the tensors that must not depend on the cache: tokens and logits. `make(visual_mask=None)` makes a new
cache; the mask matters where nothing else says which positions are visual.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from tiny_parts import IMAGE, PAD, VOCAB, Prompt, Tiny, visual_positions, words
from torch import Tensor
from transformers import Cache, LogitsProcessorList, PreTrainedModel

from rotatek_cache.hf.attachment import inner_model
from rotatek_cache.hf.calls import cache_argument

Make = Callable[..., Cache]
WAYS: dict[str, Callable[[Tiny, PreTrainedModel, Make], list[Tensor]]] = {}
NEW = 5


def way(function: Callable[[Tiny, PreTrainedModel, Make], list[Tensor]]) -> Any:
    """Register a way under its name."""
    WAYS[function.__name__] = function
    return function


def generate(model: PreTrainedModel, inputs: dict[str, Any], cache: Cache, **options: Any) -> Any:
    """Greedy generation with logits, unless `options` say otherwise."""
    arguments = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **cache_argument(model, cache), **arguments | options)


def _result(output: Any) -> list[Tensor]:
    return [output.sequences, torch.stack(output.logits)]


def one(tiny: Tiny) -> dict[str, Tensor]:
    """One row with two images."""
    return tiny.inputs(tiny.prompt(0, images=(0, 1)))


def padded(tiny: Tiny) -> dict[str, Tensor]:
    """Three rows of different lengths: one image, an image of another size, no image where the family allows it."""
    return tiny.inputs(tiny.prompt(1, images=(0,)), tiny.prompt(2, images=(1,), text=2, tail=3))


def forget_positions(model: PreTrainedModel) -> None:
    """Take the offset of positions (M-RoPE) of the conversation that it last read off a model."""
    if hasattr(inner_model(model), "rope_deltas"):
        inner_model(model).rope_deltas = None


def follow_up(tiny: Tiny, inputs: dict[str, Tensor], sequences: Tensor, more: list[int]) -> dict[str, Tensor]:
    """Arguments for a second turn: the whole conversation as ids, nothing visual."""
    new = torch.tensor([more], dtype=torch.long).expand(sequences.shape[0], -1)
    ids = torch.cat([sequences, new], 1)
    added = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, added), value=1)
    second = {"input_ids": ids, "attention_mask": mask}
    if tiny.token_types is not None:
        second[tiny.token_types] = torch.nn.functional.pad(inputs[tiny.token_types], (0, added))
    return second


@way
def greedy(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    return _result(generate(model, one(tiny), make()))


@way
def padded_batch(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    return _result(generate(model, padded(tiny), make()))


@way
def batch_with_a_text_row(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    inputs = tiny.inputs(tiny.prompt(1, images=(0,)), tiny.prompt(2, images=(), text=12))
    return _result(generate(model, inputs, make()))


@way
def beams(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    output = generate(
        model, padded(tiny), make(), num_beams=3, num_return_sequences=2, output_logits=False, output_scores=True
    )
    return [output.sequences, output.sequences_scores]


@way
def sampled_sequences(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    torch.manual_seed(5)
    return _result(generate(model, padded(tiny), make(), do_sample=True, num_return_sequences=3))


@way
def chunked_prefill(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    return _result(generate(model, one(tiny), make(), prefill_chunk_size=33))


@way
def chunked_prefill_padded(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    return _result(generate(model, padded(tiny), make(), prefill_chunk_size=20))


@way
def prompt_lookup(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    prompt = tiny.prompt(3)
    prompt.ids += prompt.ids[-5:] * 3
    output = generate(model, tiny.inputs(prompt), make(), prompt_lookup_num_tokens=4, max_new_tokens=10)
    return _result(output)


@way
def assistant_model(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    assistant = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(9)
    for parameter in assistant.parameters():  # near enough that some candidates are taken, and some are not
        parameter.data += 0.02 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)
    output = generate(model, one(tiny), make(), assistant_model=assistant, max_new_tokens=12)
    return _result(output)


@way
def second_turn(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    inputs, cache = one(tiny), make()
    first = generate(model, inputs, cache)
    second = generate(model, follow_up(tiny, inputs, first.sequences, words(6, 1)), cache)
    return _result(first) + _result(second)


@way
def second_turn_padded(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    inputs, cache = padded(tiny), make()
    first = generate(model, inputs, cache)
    second = generate(model, follow_up(tiny, inputs, first.sequences, words(6, 1)), cache)
    return _result(first) + _result(second)


@way
def second_turn_with_an_image(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    prompt, cache = tiny.prompt(0, images=(0, 1)), make()
    inputs = tiny.inputs(prompt)
    first = generate(model, inputs, cache)
    ids, content = tiny.image(1 % tiny.sizes, torch.Generator().manual_seed(77))
    second = follow_up(tiny, inputs, first.sequences, [*words(3, 1), *ids, *words(4, 2)])
    new = tiny.collate([[content]])
    if tiny.token_types == "mm_token_type_ids":
        second[tiny.token_types] = (second["input_ids"] == IMAGE).int()
    if tiny.token_types == "mm_token_type_ids" and tiny.grids in new:
        # Positions need the grids of all images; of the features, those of the new one are wanted.
        second[tiny.grids] = tiny.collate([[*prompt.images, content]])[tiny.grids]
        new = {"mm_encoder_outputs": {"image": model.model.get_image_features(**new, return_dict=True)}}
    answer = generate(model, second | new, cache)
    third = follow_up(tiny, second, answer.sequences, words(6, 4))  # where its positions begin follows from both images
    return _result(first) + _result(answer) + _result(generate(model, third, cache))


@way
def forward_with_a_new_image(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    """A second turn by a forward of one's own, with the new part only."""
    prompt, cache = tiny.prompt(0, images=(0, 1)), make()
    inputs = tiny.inputs(prompt)
    logits = [model(**inputs, past_key_values=cache).logits[:, -1]]
    ids, content = tiny.image(1 % tiny.sizes, torch.Generator().manual_seed(77))
    new = tiny.inputs(Prompt([*words(3, 1), *ids, *words(4, 2)], [content]))
    if tiny.token_types == "mm_token_type_ids" and tiny.grids and not hasattr(cache, "positions"):
        # Without attach, the model would number the new image as text.
        whole = tiny.inputs(Prompt([*prompt.ids, *new["input_ids"][0].tolist()], [*prompt.images, content]))
        wanted = {name: whole[name] for name in ("input_ids", "mm_token_type_ids", tiny.grids)}
        positions, model.model.rope_deltas = model.model.get_rope_index(**wanted)
        new["position_ids"] = positions[..., len(prompt.ids) :]
    del new["attention_mask"]
    logits.append(model(**new, past_key_values=cache).logits[:, -1])
    text = tiny.inputs(Prompt(words(5, 3)))  # with its token types
    del text["attention_mask"]
    logits.append(model(**text, past_key_values=cache).logits[:, -1])
    logits += _decode(model, cache, torch.tensor([[20]]), 3)
    return [torch.stack(logits)]


def _decode(model: PreTrainedModel, cache: Cache, token: Tensor, steps: int, **kwargs: Tensor) -> list[Tensor]:
    logits = []
    for _ in range(steps):
        output = model(token, past_key_values=cache, **kwargs)
        if "attention_mask" in kwargs:
            kwargs["attention_mask"] = torch.nn.functional.pad(kwargs["attention_mask"], (0, 1), value=1)
        logits.append(output.logits[:, -1])
        token = output.logits[:, -1, :IMAGE].argmax(-1, keepdim=True)
    return logits


def _merged_embeddings(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """What the text model is handed for `inputs`."""
    captured = {}

    def capture(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        captured["embeds"] = kwargs["inputs_embeds"]

    text = model.get_decoder()
    handle = text.register_forward_pre_hook(capture, with_kwargs=True)
    model(**inputs)
    handle.remove()
    return captured["embeds"]


@way
def merged_embeddings(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    inputs = padded(tiny)
    given = {"inputs_embeds": _merged_embeddings(model, inputs), "attention_mask": inputs["attention_mask"]}
    return _result(generate(model, given, make(visual_mask=visual_positions(inputs["input_ids"]))))


@way
def embeddings_and_pixels(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    inputs = one(tiny)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    return _result(generate(model, inputs, make()))


@way
def text_only(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    return _result(generate(model, tiny.inputs(tiny.prompt(4, images=(), text=12), tiny.prompt(5, images=())), make()))


@way
def all_image(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    ids, content = tiny.image(0, torch.Generator().manual_seed(3))
    return _result(generate(model, tiny.inputs(Prompt(ids, [content])), make()))


@way
def long_answer(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    inputs = tiny.inputs(tiny.prompt(6, text=1, tail=2))
    return _result(generate(model, inputs, make(), max_new_tokens=inputs["input_ids"].shape[1] + 5))


@way
def returned_cache(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    inputs, cache = one(tiny), make()
    output = generate(model, inputs, cache)
    assert output.past_key_values is cache
    assert cache.get_seq_length() == output.sequences.shape[1] - 1
    more = generate(model, follow_up(tiny, inputs, output.sequences, []), output.past_key_values)
    return _result(output) + _result(more)


@way
def inference_mode(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    with torch.inference_mode():
        output = generate(model, padded(tiny), make())
    return [tensor.clone() for tensor in _result(output)]


@way
def prompt_cache_reused(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    """A prompt is read once; two questions go on from copies of its cache."""
    inputs, cache = one(tiny), make()
    logits = model(**inputs, past_key_values=cache).logits[:, -1]
    length = cache.get_seq_length()
    results = [logits]
    for question in (words(4, 1), words(9, 2)):
        second = follow_up(tiny, inputs, inputs["input_ids"], question)
        results += _result(generate(model, second, copy.deepcopy(cache)))
    assert cache.get_seq_length() == length
    return results


@way
def forward_loop(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    inputs, cache = padded(tiny), make()
    first = model(**inputs, past_key_values=cache).logits[:, -1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    token = first[:, :IMAGE].argmax(-1, keepdim=True)
    return [torch.stack([first, *_decode(model, cache, token, 4, attention_mask=mask)])]


@way
def forward_loop_of_one(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    """Without an attention mask, and with ids by position."""
    inputs, cache = one(tiny), make()
    del inputs["attention_mask"]
    forget_positions(model)  # Qwen Omni keeps those of another conversation where it is given no mask
    first = model(inputs.pop("input_ids"), **inputs, past_key_values=cache).logits[:, -1]
    return [torch.stack([first, *_decode(model, cache, first[:, :IMAGE].argmax(-1, keepdim=True), 4)])]


@way
def forward_with_embeddings(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    inputs = one(tiny)
    embeds = _merged_embeddings(model, inputs)
    cache = make(visual_mask=visual_positions(inputs["input_ids"]))
    forget_positions(model)
    first = model(inputs_embeds=embeds, past_key_values=cache).logits[:, -1]
    return [torch.stack([first, *_decode(model, cache, first[:, :IMAGE].argmax(-1, keepdim=True), 4)])]


@way
def forward_in_pieces(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    """Two rows read one after another, put in one batch, and the batch taken apart again."""
    inputs, cache = one(tiny), make()
    model(**inputs, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    tokens = torch.tensor([[20], [31]])
    logits = _decode(model, cache, tokens, 3)
    cache.batch_select_indices(torch.tensor([1]))
    logits += [torch.cat([step, step]) for step in _decode(model, cache, torch.tensor([[25]]), 2)]
    return [torch.stack(logits)]


@way
def interleaved_conversations(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    """Each conversation as if it were alone, which is what the reference does."""
    results: list[list[Tensor]] = [[], []]
    alone = not hasattr(make(), "positions")
    prompts = [tiny.inputs(tiny.prompt(7, images=(0, 1))), tiny.inputs(tiny.prompt(8, images=(2,), text=4))]
    caches = [make(), make()]
    order = [(0, 1), (0, 2), (1, 1), (1, 2)] if alone else [(0, 1), (1, 1), (0, 2), (1, 2)]
    sequences: dict[int, Tensor] = {}
    for number, turn in order:
        inputs = prompts[number]
        if turn == 2:
            inputs = follow_up(tiny, inputs, sequences[number], words(5, number))
        output = generate(model, inputs, caches[number])
        sequences[number] = output.sequences
        results[number] += _result(output)
    return results[0] + results[1]


@way
def interleaved_forwards(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    """As before, one of them without an image: what another conversation left on the model must not reach it."""
    alone = not hasattr(make(), "positions")
    if alone:
        forget_positions(model)
    prompts = [tiny.inputs(tiny.prompt(7, images=(0, 1))), tiny.inputs(tiny.prompt(8, images=(), text=4))]
    caches = [make(), make()]
    token = torch.tensor([[20]])
    logits: list[list[Tensor]] = [[], []]
    steps = [lambda n: model(**prompts[n], past_key_values=caches[n])] + [
        lambda n: model(token, past_key_values=caches[n])
    ] * 3
    order = [(n, s) for n in (1, 0) for s in steps] if alone else [(n, s) for s in steps for n in (0, 1)]
    for number, step in order:
        logits[number].append(step(number).logits[:, -1])
    return [torch.stack(part) for part in logits]


class _Force:
    """A logits processor that makes the third answer token a placeholder."""

    def __init__(self, prompt_length: int) -> None:
        self.position = prompt_length + 2

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] != self.position:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, IMAGE] = 0
        return forced


@way
def placeholder_in_the_answer(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    inputs, cache = one(tiny), make()
    processors = LogitsProcessorList([_Force(inputs["input_ids"].shape[1])])
    first = generate(model, inputs, cache, logits_processor=processors, suppress_tokens=None, max_new_tokens=8)
    second = generate(model, follow_up(tiny, inputs, first.sequences, words(6, 1)), cache)
    return _result(first) + _result(second)


@way
def video(tiny: Tiny, model: PreTrainedModel, make: Make) -> list[Tensor]:
    inputs = tiny.inputs(tiny.prompt(9, images=(0,), videos=1), tiny.prompt(10, images=(), videos=2))
    return _result(generate(model, inputs, make()))


assert PAD < VOCAB
