"""What a vision encoder shows to token methods that choose before the language model, and what they make of it."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rotatek_cache.attention import MAX_SCORES
from rotatek_cache.tokens import FeatureMethod

NAME = "rotatek_encoder"
_TAPPING = threading.Lock()


@dataclass(eq=False)
class EncoderTap:
    """Listens to one attention layer of a vision encoder while an image is encoded.

    Args:
        module: the attention module, which reads its implementation from a `config`.
        has_class_token: the first token of each sequence is a class token; its attention is the score then. Otherwise
            the score of a token is the attention that it receives from all.
    """

    module: Any
    has_class_token: bool
    thread: int = field(default_factory=threading.get_ident)
    scores: list[Tensor] = field(default_factory=list)  # [patches], summed over heads and queries
    keys: list[Tensor] = field(default_factory=list)  # [patches, all heads]

    def hear(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
        """Take queries and Keys ``[N, H, S, d]``."""
        first = 1 if self.has_class_token else 0
        queries = query[:, :, :1] if self.has_class_token else query
        keys = key.float().mT
        size = max(1, MAX_SCORES // (key.shape[0] * key.shape[1] * key.shape[2]))
        score = torch.zeros(key.shape[0], key.shape[2], device=key.device)
        for start in range(0, queries.shape[2], size):
            logits = (queries[:, :, start : start + size].float() * scale) @ keys
            if mask is not None:
                part = mask[:, :, start : start + logits.shape[2]]
                logits = logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part
            score += logits.softmax(-1).sum((1, 2))
        self.scores.append(score[:, first:].flatten())
        self.keys.append(key[:, :, first:].transpose(1, 2).flatten(2).flatten(0, 1).float())


@contextlib.contextmanager
def tapped(tap: EncoderTap) -> Iterator[EncoderTap]:
    """Let `tap` listen to its module, which attends by sdpa meanwhile; the rest of the encoder is left as it is.

    One tap at a time; what other threads encode meanwhile is not heard.
    """
    with _TAPPING:
        yield from _listen(tap)


def _listen(tap: EncoderTap) -> Iterator[EncoderTap]:
    config, module = tap.module.config, tap.module
    previous: list[str | None] = []

    def select(*_: Any) -> None:
        previous.append(config._attn_implementation)
        config._attn_implementation = NAME

    def restore(*_: Any) -> None:
        config._attn_implementation = previous.pop()

    handles = [
        module.register_forward_pre_hook(select),
        module.register_forward_hook(restore, always_call=True),
    ]
    module._rotatek_tap = tap
    try:
        yield tap
    finally:
        del module._rotatek_tap
        for handle in handles:
            handle.remove()


def _tapped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    scale = kwargs.get("scaling")
    tap = getattr(module, "_rotatek_tap", None)  # none in other modules, which another thread may be in
    if tap is not None and tap.thread == threading.get_ident():
        tap.hear(query, key, attention_mask, query.shape[-1] ** -0.5 if scale is None else scale)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, _tapped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def choose(
    method: FeatureMethod, features: Sequence[Tensor], tap: EncoderTap | None, order: Tensor | None
) -> list[Tensor]:
    """The features ``[n, d]`` of each image as the language model is to see them; a dropped token's are all zero.

    Args:
        method: chooses for each image by itself.
        features: of each image, one for each placeholder.
        tap: what was heard of the encoder, if the method asked for it.
        order: int64 ``[total]``, which of the encoder's groups of patches each placeholder shows; None: in order.
    """
    lengths = [len(image) for image in features]
    scores: Sequence[Tensor | None] = [None] * len(lengths)
    keys: Sequence[Tensor | None] = scores
    if tap is not None:
        score, key = torch.cat(tap.scores), torch.cat(tap.keys)
        group, rest = divmod(len(score), sum(lengths))
        if rest or not group:
            raise ValueError(
                f"{type(method).__name__} needs encoder patches that map onto the {sum(lengths)} visual tokens in "
                f"equal groups, but this encoder has {len(score)} patches"
            )
        score, key = score.unflatten(0, (-1, group)).mean(1), key.unflatten(0, (-1, group)).mean(1)
        if order is not None:
            score, key = score[order], key[order]
        scores, keys = score.split(lengths), key.split(lengths)
    chosen = []
    for image, score_of, keys_of in zip(features, scores, keys, strict=True):
        kept, merged = method.choose(image, score_of, keys_of)
        chosen.append(merged.to(image.dtype) * kept[:, None])
    return chosen
