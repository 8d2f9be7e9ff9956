"""Attention of prompts: to themselves, and to what is stored before them. No part of SGLang."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.core.attention import attend
from rotatek_cache.core.segments import SegmentView
from rotatek_sglang.layout import HeadShape

QUERY_BLOCK = 1024  # queries of a chunk that attend at a time: of the chunk they see what comes before their block ends
WARM_UP_TOKENS = 16  # in each of two blocks


def attend_prompt(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Compute the causal attention of a prompt ``[n, H, D]`` to itself: ``[n, H_q, D_v]``."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return output[0].transpose(0, 1)


@dataclass(frozen=True)
class OwnTokens:
    """The way new tokens of one request see each other: causally, in blocks of `block`; made once for all layers.

    Attributes:
        block: queries that are attended at a time.
        none: int64 ``[1]``, where a segment begins.
        before, within: int32 ``[blocks]``, the tokens before each block and those in it.
        mask: bool ``[1, block, block]``, what the queries of a block see of it.
    """

    block: int
    none: Tensor
    before: Tensor
    within: Tensor
    mask: Tensor

    @classmethod
    def of(cls, count: int, device: torch.device, block: int = QUERY_BLOCK) -> "OwnTokens":
        """Make it for so many tokens on the device, which nobody waits for."""
        block = min(count, block)
        before = torch.arange(0, count, block, dtype=torch.int32, device=device)
        mask = torch.ones(block, block, dtype=torch.bool, device=device).tril_()[None]
        none = torch.zeros(1, dtype=torch.int64, device=device)
        return cls(block, none, before, (count - before).clamp_(max=block), mask)

    def views(self, k: Tensor, v: Tensor, number: int) -> list[SegmentView]:
        """View the tokens ``[n, H, D]`` that the queries of block `number` see: those before it, and its own."""
        first = number * self.block
        last = min(len(k), first + self.block)
        count, views = last - first, []
        if number:
            views.append(self._view(k[:first], v[:first], self.before[number, None]))
        views.append(self._view(k[first:last], v[first:last], self.within[number, None], self.mask[:, :count, :count]))
        return views

    def _view(self, k: Tensor, v: Tensor, lengths: Tensor, mask: Tensor | None = None) -> SegmentView:
        keys, values = k.transpose(0, 1), v.transpose(0, 1)
        return SegmentView(keys=keys, values=values, starts=self.none, lengths=lengths, max_length=len(k), mask=mask)


def attend_forms(views: list[SegmentView], heads: HeadShape, dtype: torch.dtype) -> None:
    """Attend to what is stored of one request as a step does, and as a chunk of its prompt does."""

    def zeros(count: int, width: int) -> Tensor:
        return torch.zeros(2 * WARM_UP_TOKENS, count, width, dtype=dtype, device=views[0].keys.device)

    queries = zeros(heads.q_heads, heads.key_width)
    keys, values = zeros(heads.kv_heads, heads.key_width), zeros(heads.kv_heads, heads.value_width)
    attend(queries[:1, :, None], views, 1.0, return_lse=False)
    own = OwnTokens.of(len(queries), queries.device, WARM_UP_TOKENS)
    attend_continuation(queries, keys, values, views, own, 1.0)


def attend_continuation(
    q: Tensor, k: Tensor, v: Tensor, stored: list[SegmentView], own: OwnTokens, scale: float
) -> Tensor:
    """Let new tokens ``[n, H, D]`` of one request attend to what is stored of it, and causally to themselves."""
    outputs = []
    for number, queries in enumerate(q.split(own.block)):
        views = [*stored, *own.views(k, v, number)]
        outputs.append(attend(queries.transpose(0, 1)[None], views, scale, return_lse=False)[0][0])
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
