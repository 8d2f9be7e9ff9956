"""`PeerCache`, a transformers cache in which all tokens are coded but the first and the last of each row."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

from evals.peers.codes import StateCode
from rotatek_cache.codecs.token_rows import RECENT_TOKENS, SINK_TOKENS

Codes = tuple[StateCode, StateCode]  # of the Keys and Values of a layer


class PeerLayer(DynamicLayer):  # type: ignore[misc] (transformers has no types)
    """Keys and Values of one layer.

    A forward sees the last tokens before it and its own dense, and codes of those before, as with ``text="coded"``.

    Args:
        codes: of Keys and Values.
        sink: tokens at a row's beginning that stay dense.
        recent: last tokens that stay dense, at least: a group of tokens is coded when it is whole.
    """

    is_croppable = False

    def __init__(self, codes: Codes, sink: int, recent: int) -> None:
        super().__init__()
        self.codes, self.sink, self.recent = codes, sink, recent
        self.block = math.lcm(*(code.block for code in codes))
        self.padding: Tensor | None = None  # int64 [B], columns of each row before its first token
        self.length = self.coded = 0  # columns in all, and those that are codes
        self.first = 0  # the first column that is coded
        self.sinks: list[Tensor] = []  # Keys and Values [B, H, sink, D]
        self.parts: list[tuple[Tensor, ...]] = []
        self.dtype: torch.dtype | None = None  # of what is returned

    def get_seq_length(self) -> int:
        """Count the columns."""
        return self.length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take ``[B, H, n, D]`` of the next n columns; return Keys and Values of all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.dtype = self.dtype or key_states.dtype
            if self.padding is None:
                self.padding = torch.zeros(len(key_states), dtype=torch.int64, device=self.device)
            self.first = int(self.padding.min()) + self.sink
        new = key_states, value_states
        self.length += key_states.shape[2]
        tails = [torch.cat([old, fresh], 2) for old, fresh in zip((self.keys, self.values), new, strict=True)]
        whole = [self._whole(which, tail).to(self.dtype) for which, tail in enumerate(tails)]
        self.keys, self.values = self._settle(
            [tail.to(old.dtype) for tail, old in zip(tails, (self.keys, self.values), strict=True)]
        )
        return whole[0], whole[1]

    def _whole(self, which: int, tail: Tensor) -> Tensor:
        """Put sinks, decoded tokens and `tail` side by side."""
        if not self.parts:
            return tail
        assert self.padding is not None
        sinks, decoded = self.sinks[which], self.codes[which].decode(self.parts[which])
        front = sinks.new_zeros(*sinks.shape[:2], self.first, sinks.shape[3])
        whole = torch.cat([front.to(decoded.dtype), decoded, tail.to(decoded.dtype)], 2)
        return whole.scatter_(2, self._columns(self.sink, sinks).expand_as(sinks), sinks.to(decoded.dtype))

    def _columns(self, count: int, states: Tensor, start: int = 0) -> Tensor:
        """Give the columns ``[B, 1, count, 1]`` of tokens from each row's `start`th on."""
        assert self.padding is not None
        return (self.padding[:, None] + torch.arange(start, start + count, device=states.device))[:, None, :, None]

    def _settle(self, tails: list[Tensor]) -> list[Tensor]:
        """Code what is old enough, and return what is not."""
        assert self.padding is not None
        at = self.length - tails[0].shape[2]  # the column where they begin
        start = 0 if self.parts else self.first
        tokens = (tails[0].shape[2] - start - self.recent) // self.block * self.block
        if tokens <= 0 or int(self.padding.max()) + self.sink > self.length - self.recent:
            return tails
        if not self.parts:
            self.sinks = [
                tail.gather(2, self._columns(self.sink, tail).expand(*tail.shape[:2], -1, tail.shape[3]))
                for tail in tails
            ]
        # Padding and sinks among them are coded as the first token after them: a range may be of several tokens.
        columns = torch.arange(start, start + tokens, device=tails[0].device)
        columns = columns.maximum(self.padding[:, None] + self.sink - at)[:, None, :, None]
        taken = [tail.gather(2, columns.expand(*tail.shape[:2], -1, tail.shape[3])) for tail in tails]
        parts = [code.encode(states) for code, states in zip(self.codes, taken, strict=True)]
        old = self.parts or [()] * len(parts)
        self.parts = [
            tuple(torch.cat(pair, 2) for pair in zip(before, now, strict=True)) if before else now
            for before, now in zip(old, parts, strict=True)
        ]
        self.coded += tokens
        return [tail[:, :, start + tokens :].contiguous() for tail in tails]

    def held(self) -> tuple[list[Tensor], list[Tensor]]:
        """List what is stored of Keys and of Values."""
        sinks, parts = self.sinks or [], self.parts or [(), ()]
        keys, values = ([*sinks[i : i + 1], *parts[i], tail] for i, tail in enumerate((self.keys, self.values)))
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse beams."""
        raise NotImplementedError("a peer's cache is for scoring and has no beams: decode greedily")


class PeerCache(Cache):  # type: ignore[misc]
    """A cache of `PeerLayer`.

    Args:
        config: of the model; all its layers have full attention, else a ValueError.
        codes_of: gives the codes of a layer, by its index and the width of its heads.
        sink, recent: as of `PeerLayer`.
    """

    def __init__(
        self,
        config: Any,
        codes_of: Callable[[int, int], Codes],
        sink: int = SINK_TOKENS,
        recent: int = RECENT_TOKENS,
    ) -> None:
        text = config.get_text_config(decoder=True)
        others = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
        if others:
            raise ValueError(f"a peer's cache takes layers of full attention only, got {', '.join(sorted(others))}")
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        super().__init__(layers=[PeerLayer(codes_of(i, width), sink, recent) for i in range(text.num_hidden_layers)])

    def pad(self, mask: Tensor) -> None:
        """Say which columns of the prompt to come are tokens, bool ``[B, T]``, padded on the left."""
        padding = mask.long().argmax(1)
        for layer in self.layers:
            layer.padding = padding

    def held(self) -> tuple[list[Tensor], list[Tensor]]:
        """List what all layers store of Keys and of Values."""
        keys, values = zip(*(layer.held() for layer in self.layers), strict=True)
        return [t for part in keys for t in part], [t for part in values for t in part]

    def coded_bits(self) -> tuple[float, float]:
        """Count the bits of a coded number of Keys and of Values, with what lies beside it."""
        found = []
        for which in (0, 1):
            layers = [layer for layer in self.layers if layer.parts]
            stored = sum(part.nbytes for layer in layers for part in layer.parts[which])
            found.append(8 * stored / sum(layer.coded * layer.sinks[which][:, :, 0].numel() for layer in layers))
        return found[0], found[1]
