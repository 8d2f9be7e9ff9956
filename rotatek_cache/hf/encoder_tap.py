"""The tap by which token methods read a vision encoder while it encodes images."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rotatek_cache.core.attention import MAX_SCORES
from rotatek_cache.core.precision import without_autocast

NAME = "rotatek_encoder"
_TAPPING = threading.Lock()


@dataclass(eq=False)
class EncoderTap:
    """A listener to one attention layer of a vision encoder while images are encoded.

    What is heard of each patch is a signal of 2 + k channels: the attention that it gets, summed over heads and
    queries, 1, and its Key, averaged over heads. Tokens that show no patch (line breaks) are zero in all of them.

    Args:
        module: the attention module. It reads its implementation from a `config`, or else returns its weights.
        has_class_token: the first token of each sequence is a class token; its attention is the score then. Otherwise
            the score of a token is the attention that it receives from all.
    """

    module: Any
    has_class_token: bool
    thread: int = field(default_factory=threading.get_ident)
    heard: list[Tensor] = field(default_factory=list)  # signals [N, patches, 2 + k], one a call of the layer
    packed: list[Tensor] | None = None  # signals of the tokens of each image [n, 2 + k], where the model packs tiles

    @property
    def first(self) -> int:
        """The first patch of a sequence."""
        return 1 if self.has_class_token else 0

    @without_autocast
    def hear(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
        """Take queries and Keys ``[N, H, S, d]``, and a mask that broadcasts to ``[N, H, S, S]`` or is ``[N, S]``."""
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None].bool()
        queries = query[:, :, :1] if self.has_class_token else query
        keys = key.float().mT
        size = max(1, MAX_SCORES // max(1, key.shape[0] * key.shape[1] * key.shape[2]))
        score = torch.zeros(key.shape[0], key.shape[2], dtype=torch.float32, device=key.device)
        for start in range(0, queries.shape[2], size):
            logits = (queries[:, :, start : start + size].float() * scale) @ keys
            if mask is not None:
                part = mask if mask.shape[2] == 1 else mask[:, :, start : start + logits.shape[2]]
                logits = logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part
            score += logits.softmax(-1).sum((1, 2))
        self._note(score, key.float().mean(1))

    def hear_weights(self, weights: Tensor, projected: Tensor) -> None:
        """Take weights ``[N * H, S, S]`` and the projection ``[N, ..., 3 H d]`` to queries, Keys and Values."""
        heads = self.module.num_attention_heads
        weights = weights.unflatten(0, (-1, heads)).float()
        queries = weights[:, :, :1] if self.has_class_token else weights
        keys = projected.flatten(1, -2).unflatten(-1, (3, heads, -1))[:, :, 1]
        self._note(queries.sum((1, 2)), keys.float().mean(2))

    def _note(self, score: Tensor, keys: Tensor) -> None:
        signal = torch.cat([score[..., None], torch.ones_like(score)[..., None], keys], -1)
        self.heard.append(signal[:, self.first :])

    @property
    def patches(self) -> Tensor:
        """The signal of all sequences ``[N, patches, 2 + k]``, which are alike."""
        return torch.cat(self.heard)


@contextlib.contextmanager
def tapped(tap: EncoderTap) -> Iterator[EncoderTap]:
    """Let `tap` listen to its module; the rest of the encoder is left as it is.

    A module that reads its implementation from a config attends by sdpa meanwhile. One tap at a time; what other
    threads encode meanwhile is not heard.
    """
    with _TAPPING:
        handles = _listen(tap) if hasattr(tap.module, "config") else _overhear(tap)
        tap.module._rotatek_tap = tap
        try:
            yield tap
        finally:
            del tap.module._rotatek_tap
            for handle in handles:
                handle.remove()


def _listen(tap: EncoderTap) -> list[Any]:
    config, module = tap.module.config, tap.module
    previous: list[str | None] = []

    def select(*_: Any) -> None:
        previous.append(config._attn_implementation)
        config._attn_implementation = NAME

    def restore(*_: Any) -> None:
        config._attn_implementation = previous.pop()

    return [module.register_forward_pre_hook(select), module.register_forward_hook(restore, always_call=True)]


def _overhear(tap: EncoderTap) -> list[Any]:
    projected: list[Tensor] = []

    def note(module: Any, args: Any, output: Tensor) -> None:
        if tap.thread == threading.get_ident():
            projected.append(output)

    def hear(module: Any, args: Any, output: Any) -> None:
        if tap.thread == threading.get_ident():
            tap.hear_weights(output[1], projected.pop())

    return [tap.module.qkv.register_forward_hook(note), tap.module.register_forward_hook(hear)]


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
