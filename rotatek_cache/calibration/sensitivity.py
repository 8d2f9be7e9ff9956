"""What an error of a visual Key or Value does to the answers: gradients of the model's own answers."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rotatek_cache.hf.calls import cache_argument

ANSWER_TOKENS = 8  # of the model's own answer to a prompt
SAMPLES = 4  # tokens drawn at each place of an answer: one backward pass each, over the text behind the image alone
CANDIDATES = 16  # tokens that are drawn from, the likeliest
TEMPERATURE = 2.0
TOKEN_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def answer_sensitivity(
    model: Any, prompt: dict[str, Any], visual: Tensor, layers: list[int], seed: int
) -> dict[tuple[int, str], Tensor]:
    """Find what errors of the visual Keys and Values of one prompt cost, by layer and state: ``[H, D, D]`` float64.

    An error e of a token's state adds ``e^T matrix e / 2`` to the divergence of an answer's token, to second order:
    the matrix is the Fisher information of the answer, its gradients' second moment, summed over visual tokens. The
    image is read first. Then the model answers, and what reads the image is differentiated: the question and the
    answer, as they read a compressed cache. That is short, so memory beyond inference is a copy of the cache and the
    activations of this text.

    Where a model is certain, its own distribution has no gradient, though a larger error would change its answer; so
    tokens are drawn from the likeliest few at a temperature that leaves something of each.

    Args:
        model: attached or not, in evaluation.
        prompt: what a processor returns for one image and the text behind it, without padding.
        visual: bool ``[T]``, the visual positions, on the host.
        layers: those to differentiate by.
        seed: of the tokens that are drawn.

    Raises:
        ValueError: no text follows the image, or the model cannot be differentiated.
    """
    ids = prompt["input_ids"]
    last = int(visual.nonzero().max())
    if last + 1 == ids.shape[1]:
        raise ValueError("the image is the last of the prompt: a question has to follow it, whose answer is looked at")
    # A mark behind the image belongs to it in some families.
    end = min(last + 2, ids.shape[1] - 1)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    tokens = {name: prompt[name] for name in TOKEN_INPUTS if prompt.get(name) is not None}
    image = {name: value for name, value in prompt.items() if name not in TOKEN_INPUTS}
    model(**{name: value[:, :end] for name, value in tokens.items()}, **image, **cache_argument(model, cache), use_cache=True)
    answered = model.generate(
        **tokens, **cache_argument(model, copy.deepcopy(cache)), max_new_tokens=ANSWER_TOKENS, do_sample=False, num_beams=1
    )
    leaves = []
    for layer in layers:
        stored = cache.layers[layer]
        stored.keys, stored.values = (states.detach().clone().requires_grad_() for states in (stored.keys, stored.values))
        leaves += [stored.keys, stored.values]
    index = visual[:end].nonzero()[:, 0].to(ids.device)
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[int, str], Tensor] = {}
    with torch.enable_grad(), _frozen(model):
        # Nothing is padded, and without a mask positions go on where the image ended, in all families.
        logits = model(input_ids=answered[:, end:-1], **cache_argument(model, cache), use_cache=True).logits
        likeliest = logits[0, ids.shape[1] - end - 1 :].float().topk(min(CANDIDATES, logits.shape[-1]), -1).values
        chances = (likeliest / TEMPERATURE).log_softmax(-1)
        drawn = torch.multinomial(chances.detach().exp().cpu(), SAMPLES, replacement=True, generator=generator)
        for column in drawn.to(chances.device).split(1, 1):
            gradients = torch.autograd.grad(chances.gather(1, column).sum(), leaves, retain_graph=True)
            for number, gradient in enumerate(gradients):
                at = gradient[0, :, index].float()
                key = layers[number // 2], ("key", "value")[number % 2]
                matrix = (at.mT @ at).double().cpu() / (SAMPLES * len(drawn))
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
