"""What an error of a cached Key or Value does to what the model says next: gradients of its own predictions.

Fisher information weighs the factors of weights in FWSVD (arXiv 2207.00112) and the levels of KV codes in KVQuant
(arXiv 2401.18079), entry by entry; here it is a matrix for each head, which chooses directions and deals out bits.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rotatek_cache.hf.calls import cache_argument, stock_cache

ANSWER_TOKENS = 32  # of the model's own answer to a question about an image, at most
SAMPLES = 4  # tokens drawn at each place: one backward pass each, over the text behind alone
CANDIDATES = 16  # tokens that are drawn from, the likeliest
TEMPERATURE = 5.0
TOKEN_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "use_cache": True,
    "cache_implementation": None,
    "prompt_lookup_num_tokens": None,
    "guidance_scale": None,
    "penalty_alpha": None,
    "stop_strings": None,
}  # one answer of the model itself, whatever its generation config says

Sensitivities = dict[tuple[int, str], Tensor]
"""By layer and state ("key" or "value"), ``[H, D, D]`` float64.

To second order an error e of a token's state adds ``e^T matrix e / 2`` to the divergence of what is said next (mean of
its tokens): the matrix is the Fisher information, the second moment of gradients, summed over the tokens in the cache.
"""


def answer_sensitivity(
    model: Any, prompt: dict[str, Any], visual: Tensor, layers: Sequence[int], seed: int
) -> Sensitivities:
    """Find what errors of the visual Keys and Values of one prompt cost its answer.

    The image is read first. Then the model answers, and what reads the image is differentiated: the question and the
    answer, as they read a compressed cache (so also where image and question attend to each other, as in PaliGemma: its
    question is read behind the image here). That is short, so memory beyond inference is a copy of the cache and the
    activations of this text. The answer is the model's own, of up to `ANSWER_TOKENS` tokens.

    Args:
        model: attached or not, in evaluation.
        prompt: what a processor returns for one image and the text behind it, without padding.
        visual: bool ``[T]``, the visual positions, on the host.
        layers: those to differentiate by.
        seed: of the tokens that are drawn.

    Raises:
        ValueError: no text follows the image, or what the model says is not finite.
    """
    ids = prompt["input_ids"]
    last = int(visual.nonzero().max())
    if last + 1 == ids.shape[1]:
        raise ValueError("the image is the last of the prompt: a question has to follow it, whose answer is looked at")
    # A mark behind the image belongs to it in some families.
    end = min(last + 2, ids.shape[1] - 1)
    cache = stock_cache(model)
    tokens = {name: prompt[name] for name in TOKEN_INPUTS if prompt.get(name) is not None}
    image = {name: value for name, value in prompt.items() if name not in TOKEN_INPUTS}
    begin = {name: value[:, :end] for name, value in tokens.items()}
    model(**begin, **image, **cache_argument(model, cache), use_cache=True)
    # No name for the copy: it goes when the model has answered.
    answered = model.generate(
        **tokens, **cache_argument(model, copy.deepcopy(cache)), **GREEDY, max_new_tokens=ANSWER_TOKENS
    )
    places = visual[:end].nonzero()[:, 0]
    return _second_moments(model, cache, places, answered[:, end:-1], ids.shape[1] - end - 1, layers, seed)


def text_sensitivity(model: Any, ids: Tensor, first: int, layers: Sequence[int], seed: int) -> Sensitivities:
    """Find what errors of the Keys and Values of a passage ``[1, T]`` cost the prediction of its last quarter.

    Args:
        model, layers, seed: as in `answer_sensitivity`.
        ids: of the passage.
        first: the first token that may be coded.

    Raises:
        ValueError: the passage is too short, or what the model says is not finite.
    """
    end = ids.shape[1] - ids.shape[1] // 4
    if end <= first or end == ids.shape[1]:
        raise ValueError(
            f"a passage of text must have more than {first} tokens before its last quarter, got {ids.shape[1]} tokens "
            "in all: give passages as long as the prompts to come"
        )
    cache = stock_cache(model)
    model(input_ids=ids[:, :end], **cache_argument(model, cache), use_cache=True)
    return _second_moments(model, cache, torch.arange(first, end, device=ids.device), ids[:, end:], 0, layers, seed)


def _second_moments(
    model: Any, cache: Any, places: Tensor, behind: Tensor, skip: int, layers: Sequence[int], seed: int
) -> Sensitivities:
    """Sum ``g g^T`` over the tokens at `places` of a cache, g gradients of what is predicted while reading `behind`.

    Where a model is certain its own distribution has no gradient, though a larger error would change what it says; so
    tokens are drawn from the likeliest few, at a temperature that leaves something of each.

    Args:
        cache: of transformers, which holds what is before `behind`.
        places: positions ``[n]`` in the cache.
        behind: ids ``[1, m]`` that follow the cache.
        skip: predictions at the beginning of `behind` that do not count.
    """
    leaves = []
    for layer in layers:
        stored = cache.layers[layer]
        stored.keys, stored.values = (
            states.detach().clone().requires_grad_() for states in (stored.keys, stored.values)
        )
        leaves += [stored.keys, stored.values]
    generator = torch.Generator().manual_seed(seed)
    found: Sensitivities = {}
    with torch.enable_grad(), _frozen(model):
        # Nothing is padded, and without a mask positions go on where the cache ends, in all families.
        logits = model(input_ids=behind, **cache_argument(model, cache), use_cache=True).logits[0, skip:]
        likeliest = logits.float().topk(min(CANDIDATES, logits.shape[-1]), -1).values
        if not likeliest.isfinite().all():
            raise ValueError(
                f"the model's logits ({logits.dtype}) are not finite, so that its answer says nothing: load it in "
                "another dtype, such as torch.bfloat16 or torch.float32"
            )
        chances = (likeliest / TEMPERATURE).log_softmax(-1)
        drawn = torch.multinomial(chances.detach().exp().cpu(), SAMPLES, replacement=True, generator=generator)
        for column in drawn.to(chances.device).split(1, 1):
            gradients = torch.autograd.grad(chances.gather(1, column).sum(), leaves, retain_graph=True)
            for number, gradient in enumerate(gradients):
                at = gradient[0, :, places.to(gradient.device)].float()
                matrix = (at.mT @ at).double().cpu() / (SAMPLES * len(drawn))
                key = layers[number // 2], ("key", "value")[number % 2]
                found[key] = matrix + found[key] if key in found else matrix
    return found


@contextlib.contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Ask for no gradients of weights within the context."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
