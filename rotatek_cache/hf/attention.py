"""The attention function that reads a `RotateKCache`, registered with transformers as "rotatek"."""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rotatek_cache.core.attention import attend, causal_mask
from rotatek_cache.hf.cache import LayerHandle, MaskedStates, StepHandle

NAME = "rotatek"

# What other attention functions may be asked for, and neither this one nor sdpa does, with the reason.
REFUSED = {
    "softcap": "a softcap bends the logits, which the compressed decode does not do",
    "s_aux": "attention sinks take part in the softmax, which the compressed decode does not do",
    "position_bias": "a position bias is added to the logits of dense Keys",
}


@torch.compiler.disable  # the layer seals itself, which is no graph
def rotatek_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention over a layer of a `RotateKCache`; plain tensors (another cache, a vision tower) go to sdpa.

    Exact, by sdpa, while the layer holds nothing compressed; from the coefficients afterwards.

    Args:
        module: the attention module.
        query: ``[B, H_q, Q, D]``.
        key, value: handle of the layer, tensors ``[B, H_kv, T, D]``, or a stock layer's with what is hidden of them.
        attention_mask: bool or additive ``[B, 1, Q, T]``; None for a causal forward without padding.
        dropout: must be 0 with a `RotateKCache`.
        scaling: factor on the logits, ``D ** -0.5`` by default.

    Returns:
        Output ``[B, Q, H_q, D_v]`` and None.
    """
    for name, reason in REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"RotateKCache does not support `{name}` ({type(module).__name__}): {reason}")
    if isinstance(key, MaskedStates):
        if attention_mask is None:
            attention_mask = causal_mask(query.shape[2], key.keys.shape[2], query.device)
        attention_mask = hide(attention_mask, key.hidden)
        key, value = key.keys, key.values
    if isinstance(key, StepHandle):
        # Captured: a mask hides nothing but padding, which is not stored.
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = attend(query, key.views, scale, return_lse=False)[0]
        key.observe(query)
        return output, None
    if not isinstance(key, LayerHandle):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("output_attentions"):
        raise ValueError("RotateKCache does not support `output_attentions`: no attention matrix is formed")
    if dropout:
        raise ValueError("RotateKCache is for inference: call model.eval() (attention dropout is on)")
    kv = key.kv
    if getattr(module, "is_kv_shared_layer", False) and kv.readers == 1:
        raise ValueError(
            f"{type(module).__name__} attends to the Keys of layer {kv.index}, and this RotateKCache does not know the "
            "model's layers: call `rotatek_cache.attach(model)`, or pass RotateKCache(..., config=model.config)"
        )
    if attention_mask is not None and (attention_mask.ndim != 4 or attention_mask.shape[1] != 1):
        raise ValueError(
            f"attention_mask must be [rows, 1, queries, tokens] here, got {list(attention_mask.shape)}: the mask of "
            f'"{NAME}" is that of sdpa'
        )
    given = query
    with torch.no_grad():
        query = given.to(kv.dtype)  # they differ where the states were stored under autocast
        dense = kv.dense()
        mask = attention_mask
        hidden = key.hidden()
        if dense is not None and hidden is not None:
            output = attend_kept(module, query, *dense, mask, hidden, scaling=scaling, **kwargs)
        else:
            if mask is None and (
                hidden is not None or (query.shape[2] > 1 and (dense is None or kv.length > query.shape[2]))
            ):
                # sdpa's own causal mask is that of a prompt without a past.
                mask = causal_mask(query.shape[2], kv.length, query.device)
            if dense is not None:
                output, _ = sdpa_attention_forward(module, query, *dense, mask, scaling=scaling, **kwargs)
            else:
                if hidden is not None:
                    assert mask is not None
                    mask = hide(mask, hidden)
                scale = query.shape[-1] ** -0.5 if scaling is None else scaling
                output, _ = attend(query, kv.views(mask), scale, return_lse=False)
        key.observe(query, attention_mask, scaling)
        output = output.to(given.dtype)
    if torch.is_grad_enabled() and given.requires_grad:
        output = _NoBackward.apply(output, given)
    return output, None


class _NoBackward(torch.autograd.Function):
    """Stands between the cache and a backward, which would be given a wrong gradient in silence."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, query: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        raise RuntimeError("RotateKCache is for inference: no gradient flows through it; use another cache for that")


def hide(mask: Tensor, hidden: Tensor) -> Tensor:
    """Return `mask` with the tokens of bool `hidden` ``[B, T]`` taken from every query's sight but their own.

    A dropped token keeps itself, so that no query is left without any; the result is not read.
    """
    tokens, queries = mask.shape[-1], mask.shape[-2]
    own = (
        torch.arange(tokens, device=mask.device) == torch.arange(tokens - queries, tokens, device=mask.device)[:, None]
    )
    gone = hidden.to(mask.device)[:, None, None] & ~own
    return mask & ~gone if mask.dtype == torch.bool else mask.masked_fill(gone, torch.finfo(mask.dtype).min)


def attend_kept(
    module: torch.nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    hidden: Tensor,
    **kwargs: Any,
) -> Tensor:
    """Run sdpa among the tokens that are not `hidden`, which are taken together: the others cost nothing.

    Args:
        module: the attention module.
        query: ``[B, H_q, Q, D]`` of the last Q tokens.
        keys, values: ``[B, H_kv, T, D]``.
        mask: bool or additive ``[B or 1, 1, Q, T]``; None is causal.
        hidden: bool ``[B, T]``.
        kwargs: for sdpa.

    Returns:
        Output ``[B, Q, H_q, D_v]``; 0 for hidden tokens, which is not read.
    """
    batch, tokens, queries = keys.shape[0], keys.shape[2], query.shape[2]
    columns, own_columns = _in_front(~hidden, keys.device)
    rows, own_rows = _in_front(~hidden[:, tokens - queries :], keys.device)
    every = torch.arange(batch, device=keys.device)[:, None]

    def taken(states: Tensor, index: Tensor) -> Tensor:
        return states.transpose(1, 2)[every, index].transpose(1, 2)

    if mask is not None or own_columns is not None or own_rows is not None or rows.shape != columns.shape:
        # Otherwise it is sdpa's own causal mask among as many queries as Keys.
        mask = causal_mask(queries, tokens, keys.device) if mask is None else mask
        mask = mask[:, 0].expand(batch, -1, -1)[every[..., None], rows[..., None], columns[:, None]][:, None]
        if own_columns is not None:
            gone = ~own_columns[:, None, None]
            mask = mask & ~gone if mask.dtype == torch.bool else mask.masked_fill(gone, torch.finfo(mask.dtype).min)
    output = query.new_zeros(batch, queries, query.shape[1], values.shape[-1])
    if rows.shape[1] == 0:  # a chunk of which nothing is kept
        return output
    kept, _ = sdpa_attention_forward(
        module, taken(query, rows), taken(keys, columns), taken(values, columns), mask, **kwargs
    )
    if own_rows is None:
        output[every, rows] = kept
    else:
        output[every.expand_as(rows)[own_rows], rows[own_rows]] = kept[own_rows]
    return output


def _in_front(kept: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Find in which columns bool ``[B, n]`` is True, in order: int64 ``[B, most of a row]``, and which are the row's.

    The second is None if all are: the rows have as many. A row with fewer has its first column again.
    """
    counts = kept.sum(1)
    width = int(counts.max())
    columns = (~kept).int().argsort(dim=1, stable=True)[:, :width]
    if bool((counts == width).all()):
        return columns.to(device), None
    own = torch.arange(width, device=counts.device) < counts[:, None]
    return columns.where(own, columns[:, :1]).to(device), own.to(device)


def register() -> None:
    """Make "rotatek" known to transformers; both registries, or padded batches would get no mask."""
    AttentionInterface.register(NAME, rotatek_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


register()
