"""Any sequence of appends, seals, crops, row selections and copies, against a plain dense model of the same thing."""

import copy
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotatek_cache import RotateKCache
from rotatek_cache.hf.attention import rotatek_attention_forward

HEADS, GROUP, WIDTH = 2, 2, 8


class _Attention(torch.nn.Module):
    num_key_value_groups = GROUP
    is_causal = True


@dataclass
class _Dense:
    """Keys and Values ``[B, H, T, D]`` and which positions are no padding."""

    keys: Tensor
    values: Tensor
    visible: Tensor

    def attend(self, query: Tensor, mask: Tensor) -> Tensor:
        keys, values = (t.repeat_interleave(GROUP, 1) for t in (self.keys, self.values))
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask).transpose(1, 2)


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


_OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("forward"), st.integers(1, 12), st.sampled_from(["none", "all", "some", "first"])),
        st.tuples(st.just("forward"), st.just(1), st.just("none")),
        st.tuples(st.just("crop"), st.integers(1, 9)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 3), min_size=1, max_size=4)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("copy")),
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    operations=_OPERATIONS,
    rows=st.integers(1, 3),
    padding=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    additive=st.booleans(),
    options=st.sampled_from([{"sparsity": 0}, {"rank": WIDTH, "always_compress": True}]),
    seed=st.integers(0, 5),
)
def test_any_sequence_of_operations(operations, rows, padding, additive, options, seed):
    generator = torch.Generator().manual_seed(seed)
    cache = RotateKCache.for_study(**options)
    dense = _Dense(
        *(torch.zeros(rows, HEADS, 0, WIDTH, dtype=torch.float64) for _ in range(2)), torch.zeros(rows, 0) > 0
    )
    kept: list[tuple[RotateKCache, _Dense]] = []
    for operation in [("forward", 9, "some"), *operations]:
        if operation[0] == "forward":
            _forward(cache, dense, operation[1], operation[2], padding, additive, generator)
        elif operation[0] == "crop":
            tokens = min(operation[1], dense.keys.shape[2] - 5)  # the padding stays
            if tokens > 0:
                cache.crop(-tokens)
                dense.keys, dense.values = dense.keys[:, :, :-tokens], dense.values[:, :, :-tokens]
                dense.visible = dense.visible[:, :-tokens]
        elif operation[0] in ("select", "repeat"):
            batch = dense.keys.shape[0]
            if operation[0] == "select":
                index = torch.tensor(operation[1]) % batch
                cache.batch_select_indices(index) if len(index) != batch else cache.reorder_cache(index)
            else:
                index = torch.arange(batch).repeat_interleave(operation[1])
                cache.batch_repeat_interleave(operation[1])
            dense.keys, dense.values, dense.visible = dense.keys[index], dense.values[index], dense.visible[index]
        else:
            kept.append((copy.deepcopy(cache), copy.copy(dense)))
        assert cache.get_seq_length() == dense.keys.shape[2]
    for old_cache, old_dense in kept:  # a copy goes on as if the original had not
        _forward(old_cache, old_dense, 3, "some", padding, additive, generator)


def _forward(
    cache: RotateKCache,
    dense: _Dense,
    tokens: int,
    visual: str,
    padding: list[int],
    additive: bool,
    generator: torch.Generator,
) -> None:
    batch, _, begin, _ = dense.keys.shape
    new = torch.ones(batch, tokens, dtype=torch.bool)
    if begin == 0:
        for row in range(batch):
            new[row, : padding[row]] = False
    dense.visible = torch.cat([dense.visible, new], 1)
    flags = {
        "none": torch.zeros(batch, tokens, dtype=torch.bool),
        "all": torch.ones(batch, tokens, dtype=torch.bool),
        "some": torch.rand(batch, tokens, generator=generator) < 0.6,
        "first": torch.arange(tokens).expand(batch, -1) < tokens // 2,
    }[visual]
    cache.announce_visual(flags & new, tokens)
    keys, values = (_random(generator, batch, HEADS, tokens, WIDTH) for _ in range(2))
    dense.keys, dense.values = torch.cat([dense.keys, keys], 2), torch.cat([dense.values, values], 2)
    query = _random(generator, batch, HEADS * GROUP, tokens, WIDTH)
    causal = torch.ones(tokens, begin + tokens, dtype=torch.bool).tril(begin)
    mask = (causal & dense.visible[:, None])[:, None]
    expected = dense.attend(query, mask)
    given_mask: Tensor | None = mask
    if bool(dense.visible.all()):
        given_mask = None
    elif additive:
        given_mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    for layer in (0, 1):  # the second one finds what layers share
        handle, _ = cache.update(keys, values, layer)
        got, _ = rotatek_attention_forward(_Attention(), query, handle, handle, given_mask)
        # A query on padding sees nothing; what it gets is nobody's business.
        torch.testing.assert_close(got[new], expected[new], atol=1e-9, rtol=1e-9)
