"""What every kernel of the decode attention must do; each has a module of tests that brings a `kernel` fixture."""

import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import torch

from rotatek_cache.core.attention import UnsupportedError, attend_by_heads, reference_attention
from rotatek_cache.core.basis import KeyBasis
from rotatek_cache.core.quantization import CodeLayout, HeadCodes, Numbers
from rotatek_cache.core.retrieval import Chunks
from rotatek_cache.core.segments import SegmentView


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A decode attention and where it runs."""

    decode_attention: Callable
    device: torch.device


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one decode step; `visual` holds the rows' lengths for each compressed segment."""

    visual: tuple[tuple[int, ...], ...]
    text: tuple[int, ...] | None
    heads: int = 2
    group: int = 2
    width: int = 64
    value_width: int = 64
    rank: int = 16
    queries: int = 1
    mask: str | None = None
    delta: bool = True
    key_code: tuple[tuple[int, int], ...] | None = None  # blocks of a CodeLayout, in place of numbers of `rank`
    value_code: tuple[tuple[int, int], ...] | None = None
    key_heads: tuple | None = None  # of each head: blocks as above, or how many numbers
    value_heads: tuple | None = None
    value_rank: int | None = None  # Values as coefficients, in numbers
    slots: bool = False
    int8: bool = False  # the bases
    sharpness: float = 1.0  # factor on the scale: how far the logits lie apart

    @property
    def batch(self) -> int:
        return len(self.visual[0]) if self.visual else len(self.text)

    @property
    def scale(self) -> float:
        return self.sharpness * self.width**-0.5


CASES = {
    "1-token-rank8-group1": Case(((1,),), None, group=1, rank=8),
    "1-image-token-1-text-token": Case(((1,),), (1,)),
    "63-tokens-rank24": Case(((63,),), (2,), rank=24),
    "130-tokens-group7-width80": Case(((130,),), (63,), heads=1, group=7, width=80, value_width=80, rank=24),
    "width96-narrow-values-rank96": Case(((65,),), (5,), width=96, value_width=48, rank=96, group=1),
    "width128-rank32-ragged": Case(((130, 63),), (1, 9), width=128, value_width=128, rank=32),
    "width48-wide-values-group16": Case(((40,),), (7,), heads=1, group=16, width=48, value_width=96, rank=8),
    "no-text": Case(((64, 130),), None),
    "no-image": Case((), (130, 1, 63), width=80, value_width=80),
    "row-without-image": Case(((70, 0),), (3, 66)),
    "row-without-text": Case(((7, 9),), (0, 4)),
    "row-with-nothing": Case(((0, 63),), (0, 5)),
    "no-delta": Case(((63,),), (5,), delta=False),
    "two-images": Case(((40, 66), (130, 0)), (9, 20), rank=24),
    "two-images-no-text": Case(((40, 66), (1, 63)), None),
    "bool-mask": Case(((130, 63),), (9, 20), mask="bool"),
    "additive-mask": Case(((70, 63),), (9, 20), mask="additive"),
    "logits-far-apart": Case(((130, 63),), (9, 70), sharpness=30.0),
    "codes-4-bit": Case(((130, 63),), (9, 20), width=128, value_width=128, key_code=((4, 32),), value_code=((4, 32),)),
    "codes-8-bit-group7-width80": Case(
        ((70, 0),), (5, 3), heads=1, group=7, width=80, value_width=80, key_code=((8, 24),), value_code=((8, 16),)
    ),
    "codes-2-bit-no-text": Case(((40, 17),), None, group=1, key_code=((2, 64),), value_code=((2, 8),)),
    "mixed-widths": Case(((65, 40),), (3, 9), key_code=((8, 8), (4, 24), (2, 32)), value_code=((8, 8), (2, 40))),
    "coded-keys-plain-values": Case(((40, 66),), (4, 0), key_code=((4, 8),), delta=False),
    "plain-keys-coded-values": Case(((40, 66),), (4, 2), value_code=((4, 40),), delta=False),
    "value-coefficients": Case(((40, 66), (9, 0)), (4, 0), value_rank=24, width=96, value_width=96),
    "coded-keys-value-coefficients": Case(((40, 66),), (4, 2), key_code=((8, 16),), value_rank=8, value_width=256),
    "codes-behind-masks": Case(
        ((40, 66), (3, 9)), (4, 2), key_code=((8, 8), (4, 8)), value_code=((4, 16),), mask="additive"
    ),
    "width256-group16-one-query": Case(((70,),), (5,), heads=1, group=16, width=256, value_width=256, rank=64),
    "batch-40": Case(((1, 2) * 20,), None, heads=1, group=1, width=16, value_width=16, rank=8),
    "image-of-8k": Case(
        ((8192,),), (5,), heads=1, group=1, width=16, value_width=16, rank=8, value_code=((4, 16),), sharpness=3.0
    ),
    "text-of-16k": Case(((9,),), (16384,), heads=1, group=1, width=16, value_width=16, rank=8),
    "heads-mixed-bits": Case(
        ((65, 40),),
        (3, 9),
        group=4,
        width=128,
        value_width=128,
        key_heads=(((8, 8), (4, 24), (2, 16)), ((2, 8),)),
        value_heads=(((4, 16),), ((8, 16), (2, 64))),
    ),
    "heads-4-bit": Case(
        ((40, 66), (9, 0)), (4, 2), key_heads=(((4, 8),), ((4, 40),)), value_heads=(((4, 64),), ((4, 16),)), mask="bool"
    ),
    "heads-8-bit-keys-group7": Case(((40, 17),), None, group=7, key_heads=(((8, 40),), ((8, 8),))),
    "heads-wide-rows": Case(
        ((40, 17),),
        (3, 0),
        heads=3,
        group=1,
        width=96,
        value_width=80,
        key_heads=(((8, 32), (4, 24), (2, 40)), ((2, 8),), ((4, 96),)),
        value_heads=(((8, 72),), ((4, 8),), ((2, 16),)),
    ),
    "heads-numbers": Case(((40, 66),), (4, 2), key_heads=(8, 40), value_heads=(24, 64)),
    "heads-only-one": Case(
        ((40, 66),), (4, 2), heads=1, delta=False, key_heads=(((8, 8), (2, 16)),), value_heads=(((4, 40),),)
    ),
    "heads-many-queries": Case(
        ((40, 66),), (4, 2), queries=5, mask="additive", key_heads=(((4, 16), (2, 8)), ((2, 24),)), value_heads=(16, 8)
    ),
    "heads-pool": Case(((40, 66),), (4, 2), slots=True, key_heads=(((4, 16), (2, 8)), ((8, 24),)), value_heads=(16, 8)),
    "int8-basis": Case(((130, 63),), (9, 20), width=128, value_width=128, rank=24, value_rank=16, int8=True),
    "int8-basis-codes": Case(
        ((40, 66), (9, 0)), (4, 2), width=80, key_code=((8, 8), (4, 24)), value_code=((4, 16),), delta=False, int8=True
    ),
    "int8-basis-heads-pool": Case(
        ((40, 66),), (4, 2), slots=True, key_heads=(((4, 16), (2, 8)), ((8, 24),)), value_heads=(16, 8), int8=True
    ),
    "int8-basis-many-queries": Case(((40, 66),), (4, 2), queries=5, mask="bool", key_code=((4, 16),), int8=True),
    "pool": Case(((65, 0), (3, 17)), (3, 33), slots=True, mask="bool"),
    "pool-codes": Case(((40, 66),), (4, 2), slots=True, key_code=((4, 32),), value_code=((4, 16),)),
    "pool-many-queries": Case(((40, 9),), (4, 12), slots=True, queries=5, mask="bool", key_code=((4, 16),)),
    "queries-3": Case(((63, 40),), (20, 9), queries=3, group=7, heads=1),
    "queries-masked": Case(((63, 40),), (20, 9), queries=9, group=2, mask="bool"),
    "queries-additive-codes": Case(
        ((63, 40),), (20, 9), queries=7, mask="additive", key_code=((4, 32),), value_code=((4, 8), (2, 24))
    ),
    "width512-group8": Case(((40, 66),), (5, 2), heads=1, group=8, width=512, value_width=512, rank=128),
    "width512-codes-masked": Case(
        ((40, 17),),
        (4, 0),
        heads=1,
        width=512,
        value_width=512,
        key_code=((4, 128),),
        value_code=((4, 64),),
        mask="bool",
    ),
    "width512-queries-value-coefficients": Case(
        ((17, 30),),
        (9, 2),
        queries=3,
        heads=1,
        group=4,
        width=512,
        value_width=512,
        rank=64,
        value_rank=40,
        mask="bool",
    ),
    "queries-group16-width256": Case(
        ((17, 30),), (9, 2), queries=2, heads=1, group=16, width=256, value_width=256, value_rank=40
    ),
}


def draw(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, list[SegmentView]]:
    """A query and the segments of `case`; numbers that belong to no row are NaN, bytes are noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def stored(tokens, owned, width, code):
        if isinstance(code, HeadCodes):
            if isinstance(code.parts[0], Numbers):
                return normal(tokens * sum(code.widths)).to(device, dtype)
            return torch.randint(256, (tokens * sum(code.widths),), generator=generator).byte().to(device)
        if code is not None:
            return torch.randint(256, (case.heads, tokens, code.token_bytes), generator=generator).byte().to(device)
        data = torch.full((case.heads, tokens, width), torch.nan, dtype=torch.float64)
        for span in owned:
            data[:, span] = normal(case.heads, span.stop - span.start, width)
        return data.to(device, dtype)

    def steps(code):
        if isinstance(code, HeadCodes):
            pads = [torch.nn.functional.pad(steps(part), (0, code.channels - part.channels)) for part in code.parts]
            return torch.stack(pads)[:, None, None]  # zero where a head has no channel
        return torch.ones(code.channels) if isinstance(code, Numbers) else 3 / code.levels(torch.device("cpu"))

    def basis(width, rank, code):
        size = max(width, rank)
        decoder = torch.linalg.qr(normal(case.heads, case.batch, size, size)).Q[..., :width, :rank]
        if code is not None:  # the step of the codes is folded in, so that they weigh as much as coefficients
            decoder = decoder * steps(code)
        decoder = decoder.to(device, dtype).contiguous()
        delta = normal(case.heads, case.batch, width).to(device, dtype) if case.delta else None
        made = KeyBasis(decoder, decoder, delta, delta)
        return made.in_int8() if case.int8 else made

    def mask_of(lengths):
        if not case.mask:
            return None
        mask = torch.rand(case.batch, case.queries, max(lengths), generator=generator) > 0.3
        mask[-1, 0] = False
        if case.mask == "additive":
            lowest = torch.where(torch.rand(mask.shape, generator=generator) > 0.5, -torch.inf, torch.finfo(dtype).min)
            mask = torch.where(mask, normal(*mask.shape), lowest.double()).to(dtype)
        return mask.to(device)

    def code_of(blocks, heads):
        if heads:
            return HeadCodes(tuple(Numbers(one) if isinstance(one, int) else CodeLayout(one) for one in heads))
        return CodeLayout(blocks) if blocks else None

    def segment(lengths, compressed):
        gap = 3
        starts = torch.tensor([gap, *(length + gap for length in lengths)]).cumsum(0)
        owned = [slice(start, start + length) for start, length in zip(starts.tolist(), lengths, strict=False)]
        # Heads lie further apart than their tokens reach, as in a part of a larger buffer.
        tokens = int(starts[-1]) + 5
        key_code = code_of(case.key_code, case.key_heads) if compressed else None
        value_code = code_of(case.value_code, case.value_heads) if compressed else None
        rank = key_code.channels if key_code else case.rank
        value_rank = value_code.channels if value_code else case.value_rank if compressed else None
        keys = stored(tokens, owned, rank if compressed else case.width, key_code)
        values = stored(tokens, owned, value_rank or case.value_width, value_code)
        view = SegmentView(
            keys=keys if case.key_heads and compressed else keys[:, :-5],
            values=values if case.key_heads and compressed else values[:, :-5],
            starts=starts[:-1].to(device),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
            max_length=max(lengths),
            basis=basis(case.width, rank, key_code) if compressed else None,
            key_code=key_code,
            value_basis=basis(case.value_width, value_rank, value_code) if value_rank else None,
            value_code=value_code,
            mask=mask_of(lengths),
        )
        return scatter(view) if case.slots else view

    def tokens_of(packed, code):
        return code.split(packed)[0].shape[1] if isinstance(code, HeadCodes) else packed.shape[1]

    def scattered(packed, code, order):
        if isinstance(code, HeadCodes):
            return torch.cat([head[:, order].flatten() for head in code.split(packed)])
        return packed[:, order].transpose(0, 1).contiguous().transpose(0, 1)

    def scatter(view):
        order = torch.randperm(tokens_of(view.keys, view.key_code), generator=generator).to(device)
        slots = torch.full((case.batch, view.max_length + 2), -1, device=device)
        for row, (start, length) in enumerate(view.row_ranges):
            slots[row, 1 : 1 + length] = order.argsort()[start : start + length]
        pools = [scattered(view.keys, view.key_code, order), scattered(view.values, view.value_code, order)]
        ones = torch.ones(case.batch, dtype=torch.int64, device=device)
        return dataclasses.replace(view, keys=pools[0], values=pools[1], starts=ones, slots=slots.int())

    segments = [segment(lengths, compressed=True) for lengths in case.visual]
    if case.text is not None:
        segments.append(segment(case.text, compressed=False))
    return normal(case.batch, case.heads * case.group, case.queries, case.width).to(device, dtype), segments


def in_float64(segment: SegmentView) -> SegmentView:
    def wide(basis):
        if basis is None or basis.is_identity:
            return basis
        decoder = basis.B.double() if basis.scale is None else basis.B.double() * basis.scale.double()[..., None, :]
        return KeyBasis(None, decoder, None, None if basis.delta is None else basis.delta.double())

    return dataclasses.replace(
        segment,
        keys=segment.keys if segment.keys.dtype == torch.uint8 else segment.keys.double(),
        values=segment.values if segment.values.dtype == torch.uint8 else segment.values.double(),
        basis=wide(segment.basis),
        value_basis=wide(segment.value_basis),
    )


def lost_to_projected_queries(query, segments, scale):
    """How far a logit may be off because a projected query is held in two numbers of the query's dtype.

    The reference projects in float32. On tensor cores a projected query meets the Keys as two terms, of which the
    second holds what the first rounds away and is rounded itself: up to ``u ** 2`` of each coefficient's product is
    lost, u half the dtype's epsilon. In float16 that is less than float32 rounds; in bfloat16 (``2 ** -16``) it is
    more, and where few tokens are seen nothing averages it.
    """
    batch, _, _, width = query.shape
    most = 0.0
    for segment in map(in_float64, segments):
        if segment.basis is None or segment.basis.is_identity:
            continue
        grouped = (query.double() * scale).reshape(batch, segment.heads, -1, width).transpose(0, 1)
        projected = segment.basis_of_rows(segment.basis).project_query(grouped).abs()
        for row, (_, length) in enumerate(segment.row_ranges):
            if length > 0:
                products = projected[:, row] @ segment.row_keys(row, torch.float64).abs().mT
                most = max(most, float(products.max()))
    return (torch.finfo(query.dtype).eps / 2) ** 2 * most


def assert_within_budget(state, query, segments, scale):
    """The kernel's error against float64 is at most twice that of the reference in the same precision.

    The floor, since the reference may hit a float64 result by luck: one rounding of the output's size, and float32
    roundings of the logits, which weigh the Values. Logits may be off by `lost_to_projected_queries` besides.
    """
    exact_out, exact_lse = reference_attention(query.double(), [in_float64(s) for s in segments], scale)
    plain_out, plain_lse = reference_attention(query, segments, scale)
    out, lse = state
    assert out.dtype == query.dtype
    assert lse.dtype == torch.float32
    assert out.shape == exact_out.shape
    assert lse.shape == exact_lse.shape
    nothing = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, nothing)
    assert bool((out.transpose(1, 2)[nothing] == 0).all())

    def error(value, exact):
        return float((value.double() - exact)[exact.isfinite()].abs().max()) if exact.isfinite().any() else 0.0

    eps = torch.finfo(torch.float32).eps
    size = float(exact_lse[~nothing].abs().max()) if not nothing.all() else 0.0
    floor = max(torch.finfo(query.dtype).eps * float(exact_out.abs().max()), 4 * eps * (size + 1))
    assert error(out, exact_out) <= max(2 * error(plain_out, exact_out), floor)
    lost = lost_to_projected_queries(query, segments, scale)
    assert error(lse, exact_lse) <= max(2 * error(plain_lse, exact_lse), 4 * eps * (size + 1)) + lost


def change(segment: SegmentView, **fields) -> SegmentView:
    return dataclasses.replace(segment, **fields)


def change_basis(segment: SegmentView, **fields) -> SegmentView:
    return dataclasses.replace(segment, basis=dataclasses.replace(segment.basis, **fields))


EIGHT_BIT_HEADS = HeadCodes((CodeLayout(((8, 8),)), CodeLayout(((8, 8),))))


def narrow(basis: KeyBasis) -> KeyBasis:
    return KeyBasis(None, basis.B[:, :, :48].contiguous())


# name: how (query, visual, text, scale) is spoilt, the error, what its message says
BAD = {
    "query-no-tensor": (lambda q, v, t, s: ([1.0], [v, t], s), TypeError, "query must be a tensor, got list"),
    "query-3d": (lambda q, v, t, s: (q[0], [v, t], s), ValueError, r"query must be \[B, H_q, Q, D\]"),
    "query-no-rows": (lambda q, v, t, s: (q[:0], [v, t], s), ValueError, "query must be"),
    "query-2-positions": (
        lambda q, v, t, s: (q.repeat(1, 1, 2, 1), [v, t], s),
        ValueError,
        r"\[0\].mask must have shape \(2, 2, 130\), got \(2, 1, 130\)",
    ),
    "query-float64": (
        lambda q, v, t, s: (q.double(), [v, t], s),
        UnsupportedError,
        "query must be float16.*got torch.float64",
    ),
    "query-other-dtype": (
        lambda q, v, t, s: (q.float(), [v, t], s),
        UnsupportedError,
        r"\[0\].keys must have .*float32, got",
    ),
    "query-heads": (lambda q, v, t, s: (q[:, :3], [v, t], s), ValueError, "keys must have KV heads .* 3"),
    "query-gradient": (
        lambda q, v, t, s: (q.clone().requires_grad_(), [v, t], s),
        UnsupportedError,
        "query.* no backward",
    ),
    "scale-tensor": (
        lambda q, v, t, s: (q, [v, t], torch.tensor(1.0)),
        TypeError,
        "scale must be a number, got Tensor",
    ),
    "scale-nan": (lambda q, v, t, s: (q, [v, t], math.nan), ValueError, "scale must be finite, got nan"),
    "scale-inf": (lambda q, v, t, s: (q, [v, t], math.inf), ValueError, "scale must be finite, got inf"),
    "codes-of-no-basis": (
        lambda q, v, t, s: (q, [v, change(t, keys=t.keys[..., :64].byte(), key_code=CodeLayout(((8, 64),)))], s),
        ValueError,
        r"segments\[1\].basis must say what the codes of its keys mean",
    ),
    "value-codes-of-no-basis": (
        lambda q, v, t, s: (q, [v, change(t, values=t.values.byte(), value_code=CodeLayout(((8, 64),)))], s),
        ValueError,
        r"segments\[1\].value_basis must say what the codes of its values mean",
    ),
    "codes-dtype": (
        lambda q, v, t, s: (q, [change(v, key_code=CodeLayout(((8, 16),))), t], s),
        ValueError,
        r"\[0\].keys must hold 16 bytes \(uint8\) a token, packed as \(\(8, 16\),\), got 16 of torch.float16",
    ),
    "codes-width": (
        lambda q, v, t, s: (q, [change(v, keys=v.keys.byte(), key_code=CodeLayout(((4, 16),))), t], s),
        ValueError,
        "keys must hold 8 bytes .* got 16 of torch.uint8",
    ),
    "code-of-another-type": (
        lambda q, v, t, s: (q, [change(v, key_code="4 bit"), t], s),
        UnsupportedError,
        "keys must be packed as a CodeLayout or HeadCodes say, got str",
    ),
    "heads-of-two-kinds": (
        lambda q, v, t, s: (q, [change(v, key_code=HeadCodes((Numbers(8), CodeLayout(((4, 8),))))), t], s),
        ValueError,
        r"\[0\].keys must hold numbers in all heads or codes in all",
    ),
    "heads-side-by-side": (
        lambda q, v, t, s: (q, [change(v, keys=v.keys[:1], key_code=HeadCodes((Numbers(8), Numbers(8)))), t], s),
        ValueError,
        r"\[0\].keys must hold its heads one after the other, 16 elements a token, .* got shape \(1, ",
    ),
    "heads-of-floats": (
        lambda q, v, t, s: (q, [v, change(t, values=t.values.flatten(), value_code=EIGHT_BIT_HEADS)], s),
        TypeError,
        r"\[1\].values must be torch.uint8 where each head has a width of its own, got torch.float16",
    ),
    "heads-too-few-tokens": (
        lambda q, v, t, s: (q, [change(v, keys=v.keys.byte().flatten()[:160], key_code=EIGHT_BIT_HEADS), t], s),
        ValueError,
        r"\[0\].values must have the heads and tokens of its keys \(2, 10\), got \(2, ",
    ),
    "basis-diagonal": (
        lambda q, v, t, s: (q, [v, change(t, basis=KeyBasis(B=torch.ones(2, 2, 64, device=q.device)))], s),
        UnsupportedError,
        r"\[1\].basis scales channels and rotates nothing",
    ),
    "codes-more-than-decoded": (
        lambda q, v, t, s: (q, [change(v, keys=v.keys.byte(), key_code=CodeLayout(((4, 32),))), t], s),
        ValueError,
        r"\[0\].basis.B must be \[H, R, D, r\] with H 2, D 64 and r 32",
    ),
    "value-basis-shape": (
        lambda q, v, t, s: (q, [change(v, value_basis=v.basis), t], s),
        ValueError,
        r"value_basis.B must be \[",
    ),
    "value-basis-width": (
        lambda q, v, t, s: (q, [v, change(t, values=t.values[..., :16], value_basis=narrow(v.basis))], s),
        ValueError,
        r"\[1\].values must be as wide as those of segments\[0\] \(64\), not 0, got 48",
    ),
    "slots-dtype": (
        lambda q, v, t, s: (q, [change(v, slots=torch.zeros(2, 130, device=q.device)), t], s),
        TypeError,
        "slots must be int32 or int64",
    ),
    "slots-rows": (
        lambda q, v, t, s: (q, [change(v, slots=v.starts[:, None].repeat(2, 1)), t], s),
        ValueError,
        r"slots must have shape \(2, n\), got \(4, 1\)",
    ),
    "no-segments": (lambda q, v, t, s: (q, [], s), ValueError, "segments must hold at least one"),
    "one-segment-bare": (lambda q, v, t, s: (q, v, s), TypeError, "segments must be a sequence"),
    "segment-tuple": (
        lambda q, v, t, s: (q, [v, (t,)], s),
        TypeError,
        r"segments\[1\] must be a SegmentView, got tuple",
    ),
    "keys-device": (
        lambda q, v, t, s: (q, [change(v, keys=v.keys.to("meta")), t], s),
        ValueError,
        r"\[0\].keys must be on .* got meta",
    ),
    "keys-4d": (
        lambda q, v, t, s: (q, [v, change(t, keys=t.keys[None])], s),
        ValueError,
        r"\[1\].keys must be \[H, N,",
    ),
    "keys-strided": (
        lambda q, v, t, s: (q, [change(v, keys=v.keys.mT.contiguous().mT), t], s),
        UnsupportedError,
        "keys must be contiguous",
    ),
    "keys-width": (
        lambda q, v, t, s: (q, [v, change(t, keys=t.keys[..., :32])], s),
        ValueError,
        "as wide as .* got 32",
    ),
    "keys-heads": (
        lambda q, v, t, s: (q, [v, change(t, keys=t.keys[:1], values=t.values[:1])], s),
        ValueError,
        r"\[1\].keys .* got 1",
    ),
    "values-dtype": (
        lambda q, v, t, s: (q, [change(v, values=v.values.float()), t], s),
        UnsupportedError,
        "values must have",
    ),
    "values-tokens": (
        lambda q, v, t, s: (q, [change(v, values=v.values[:, 1:]), t], s),
        ValueError,
        "values must have the",
    ),
    "values-width": (
        lambda q, v, t, s: (q, [v, change(t, values=t.values[..., :8])], s),
        ValueError,
        r"\[1\].values .* 8",
    ),
    "starts-dtype": (
        lambda q, v, t, s: (q, [change(v, starts=v.starts.float()), t], s),
        TypeError,
        "starts must be int32",
    ),
    "lengths-shape": (
        lambda q, v, t, s: (q, [change(v, lengths=v.lengths[:1]), t], s),
        ValueError,
        r"lengths .* \(2,\)",
    ),
    "max-length-tensor": (
        lambda q, v, t, s: (q, [change(v, max_length=v.lengths.max()), t], s),
        TypeError,
        "max_length must be an int",
    ),
    "max-length-negative": (
        lambda q, v, t, s: (q, [change(v, max_length=-1), t], s),
        ValueError,
        "max_length .* got -1",
    ),
    "mask-shape": (lambda q, v, t, s: (q, [change(v, mask=v.mask[..., 1:]), t], s), ValueError, "mask must have shape"),
    "mask-dtype": (lambda q, v, t, s: (q, [change(v, mask=v.mask.int()), t], s), TypeError, "mask must be bool or"),
    "mask-float8": (
        lambda q, v, t, s: (q, [change(v, mask=v.mask.to(torch.float8_e4m3fn)), t], s),
        TypeError,
        "mask must be bool or .* got torch.float8",
    ),
    "rank-12": (
        lambda q, v, t, s: (
            q,
            [change_basis(change(v, keys=v.keys[..., :12].clone()), B=v.basis.B[..., :12].clone()), t],
            s,
        ),
        UnsupportedError,
        "rank that is a multiple of 8, got 12",
    ),
    "basis-shape": (
        lambda q, v, t, s: (q, [change_basis(v, B=v.basis.B[..., :8]), t], s),
        ValueError,
        r"basis.B must be \[",
    ),
    "basis-missing": (
        lambda q, v, t, s: (q, [change_basis(v, B=None), t], s),
        ValueError,
        "must be as wide as the query",
    ),
    "basis-dtype": (
        lambda q, v, t, s: (q, [change_basis(v, B=v.basis.B.double()), t], s),
        UnsupportedError,
        "basis.B must be float16",
    ),
    "basis-strided": (
        lambda q, v, t, s: (q, [change_basis(v, B=v.basis.B.mT.contiguous().mT), t], s),
        UnsupportedError,
        "basis.B must be contig",
    ),
    "basis-too-few-rows": (
        lambda q, v, t, s: (q, [change_basis(v, B=v.basis.B[:, :1], delta=None), t], s),
        ValueError,
        "basis_rows must say",
    ),
    "basis-rows-bool": (
        lambda q, v, t, s: (q, [change(v, basis_rows=v.starts > 0), t], s),
        TypeError,
        "basis_rows must be",
    ),
    "delta-shape": (
        lambda q, v, t, s: (q, [change_basis(v, delta=v.basis.delta[:, :1]), t], s),
        ValueError,
        "delta must have shape",
    ),
}


def test_beams_share_storage_and_basis(kernel):
    query, segments = draw(Case(((66, 20, 0),), (5, 6, 7)), torch.float32, kernel.device)
    visual, text = segments
    order = torch.tensor([1, 0, 1], device=kernel.device)
    shared = dataclasses.replace(visual, starts=visual.starts[order], lengths=visual.lengths[order], basis_rows=order)
    assert_within_budget(kernel.decode_attention(query, [shared, text], 0.125), query, [shared, text], 0.125)
    # The rows of one image, asked the same, see the same.
    query[2] = query[0]
    out, lse = kernel.decode_attention(query, [shared], 0.125)
    assert torch.equal(out[0], out[2])
    assert torch.equal(lse[0], lse[2])


def test_order_of_segments_does_not_matter(kernel):
    query, segments = draw(CASES["two-images"], torch.float32, kernel.device)
    out, lse = kernel.decode_attention(query, segments, 0.125)
    other_out, other_lse = kernel.decode_attention(query, segments[::-1], 0.125)
    torch.testing.assert_close(other_out, out)
    torch.testing.assert_close(other_lse, lse)


def test_identity_basis_is_dense(kernel):
    query, segments = draw(CASES["no-image"], torch.float16, kernel.device)
    identity = [dataclasses.replace(segment, basis=KeyBasis()) for segment in segments]
    for state, dense in zip(
        kernel.decode_attention(query, identity, 0.1), kernel.decode_attention(query, segments, 0.1), strict=True
    ):
        assert torch.equal(state, dense)


def test_full_rank_is_dense(kernel):
    case = Case((), (130, 63), width=64)
    query, (dense,) = draw(case, torch.float32, kernel.device)
    rotation = torch.linalg.qr(torch.randn(2, 1, 64, 64, dtype=torch.float64)).Q.contiguous()
    offset = torch.randn(2, 1, 64, dtype=torch.float64)
    coefficients = KeyBasis(rotation, rotation, offset).encode(dense.keys.cpu().double()[:, None])[:, 0]
    rotation, offset = rotation.float().to(kernel.device), offset.float().to(kernel.device)
    rows = torch.zeros(2, dtype=torch.int64, device=kernel.device)
    basis = KeyBasis(rotation, rotation, offset, offset)
    compressed = dataclasses.replace(dense, keys=coefficients.float().to(kernel.device), basis=basis, basis_rows=rows)
    for state, expected in zip(
        kernel.decode_attention(query, [compressed], 0.125), kernel.decode_attention(query, [dense], 0.125), strict=True
    ):
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


def test_basis_may_be_wider_than_the_keys(kernel):
    query, (visual, text) = draw(CASES["63-tokens-rank24"], torch.float16, kernel.device)
    basis = KeyBasis(visual.basis.A, visual.basis.B.float(), None, visual.basis.delta.float())
    segments = [dataclasses.replace(visual, basis=basis), text]
    assert_within_budget(kernel.decode_attention(query, segments, 0.125), query, segments, 0.125)


@pytest.mark.parametrize("odd", ["keys", "values", "query", "mask", "row-table"])
def test_any_strides(odd, kernel):
    query, (visual, text) = draw(CASES["bool-mask"], torch.float16, kernel.device)
    segments = [visual, text]
    if odd in ("keys", "values"):  # tokens 3 numbers further apart than they are wide
        wide = torch.nn.functional.pad(getattr(visual, odd), (0, 3))
        segments[0] = dataclasses.replace(visual, **{odd: wide[..., :-3]})
    elif odd == "query":
        query = query.transpose(1, 3).contiguous().transpose(1, 3)
    elif odd == "mask":
        segments[1] = dataclasses.replace(text, mask=text.mask.repeat_interleave(2, 2)[..., ::2])
    else:
        lengths = visual.lengths.long().repeat_interleave(2)[::2]
        segments[0] = dataclasses.replace(visual, lengths=lengths, starts=visual.starts.int())
    assert_within_budget(kernel.decode_attention(query, segments, 0.125), query, segments, 0.125)


def test_addresses_beyond_32_bits(kernel):
    tokens = 2**28 + 64  # times 8 coefficients: more than 2**31 numbers, of which only the last are ever touched
    query, (visual,) = draw(Case(((40,),), None, heads=1, rank=8), torch.float16, kernel.device)
    far = torch.empty(1, tokens, 8, dtype=torch.float16, device=kernel.device)
    far[:, -40:] = visual.keys[:, 3:43]
    starts = torch.tensor([tokens - 40], device=kernel.device)
    values = visual.values[:, 3:4].expand(1, tokens, 64)
    segments = [dataclasses.replace(visual, keys=far, values=values, starts=starts)]
    near = dataclasses.replace(visual, values=visual.values[:, 3:4].expand(1, visual.keys.shape[1], 64))
    out, lse = kernel.decode_attention(query, segments, 0.125)
    expected_out, expected_lse = kernel.decode_attention(query, [near], 0.125)
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("lengths", [(-3, -(2**31)), (0, 0)], ids=["negative", "zero"])
def test_rows_without_tokens_see_nothing(lengths, kernel):
    query, (visual,) = draw(CASES["no-text"], torch.float16, kernel.device)
    empty = dataclasses.replace(visual, lengths=torch.tensor(lengths, dtype=torch.int32, device=kernel.device))
    out, lse = kernel.decode_attention(query, [empty], 0.125)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


def test_segments_without_room_see_nothing(kernel):
    query, (visual, text) = draw(CASES["bool-mask"], torch.float16, kernel.device)
    empty = dataclasses.replace(text, max_length=0, lengths=torch.zeros_like(text.lengths), mask=None)
    expected = kernel.decode_attention(query, [visual], 0.125)
    for state, alone in zip(kernel.decode_attention(query, [visual, empty], 0.125), expected, strict=True):
        assert torch.equal(state, alone)
    out, lse = kernel.decode_attention(query, [empty], 0.125)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@pytest.mark.parametrize("state", ["keys", "values"])
@pytest.mark.parametrize("spoilt", [slice(0, 1), slice(None)], ids=["one-token", "all"])
def test_what_is_not_a_number_is_not_hidden(state, spoilt, kernel):
    query, segments = draw(CASES["no-text"], torch.float32, kernel.device)
    getattr(segments[0], state)[:, 3:67][:, spoilt] = torch.nan  # of the first row
    out, lse = kernel.decode_attention(query, segments, 0.125)
    expected_out, expected_lse = reference_attention(query, segments, 0.125)
    assert torch.equal(out.isnan(), expected_out.isnan())
    assert torch.equal(lse.isnan(), expected_lse.isnan())
    assert out[0].isnan().all()


def test_heads_of_their_own_are_rows(kernel):
    """Heads with 3 and 20 of 30 tokens, one of them in chunks, beside text: as over what is read alone."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).to(kernel.device)

    heads, batch, width = 2, 2, 32
    query, text = drawn(batch, 4, 1, width), drawn(2, heads, batch * 8, width)
    counts = torch.tensor([3, 20, 5, 9], device=kernel.device)  # head 0 of both rows, then head 1
    packed = drawn(2, 1, int(counts.sum()), width)
    starts = counts.cumsum(0) - counts
    chunks = Chunks.of(packed[0, 0], starts, counts, torch.tensor([3, 8, 8, 8], device=kernel.device), 4)
    view = SegmentView(packed[0], packed[1], starts, counts.int(), 20, head_rows=heads, chunks=chunks, basis_rows=None)
    dense = SegmentView(
        *text,
        torch.arange(2, device=kernel.device) * 8,
        torch.full((2,), 8, dtype=torch.int32, device=kernel.device),
        8,
        8,
        batched=True,
    )
    read_rows = functools.partial(kernel.decode_attention, scale=0.2)
    found, lse = attend_by_heads(query, [view, dense], read_rows)
    tokens, lengths = chunks.best(query.unflatten(1, (2, 2)).transpose(0, 1).flatten(0, 1), counts)
    assert lengths.tolist()[:3] == [3, 8, 5]
    assert int(lengths[3]) in (5, 8)  # the last chunk of nine has one token
    for row in range(batch):
        for head in range(heads):
            place = head * batch + row
            read = starts[place] + tokens[place, : lengths[place]]
            keys, values = (
                torch.cat([part[0, read], dense_part[head, row * 8 : row * 8 + 8]])
                for part, dense_part in zip(packed, text, strict=True)
            )
            group = query[row, 2 * head : 2 * head + 2, 0]
            logits = group @ keys.mT * 0.2
            torch.testing.assert_close(found[row, 0, 2 * head : 2 * head + 2], logits.softmax(-1) @ values)
            torch.testing.assert_close(lse[row, 2 * head : 2 * head + 2, 0], logits.logsumexp(-1))
