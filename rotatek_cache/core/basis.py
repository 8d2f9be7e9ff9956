"""Key bases: how the visual Keys of a head are turned into a few coefficients, and read.

The maths of RotateK (arXiv 2605.19218) on torch alone. Shapes use ``H`` KV heads, ``R`` sequences that own a basis,
``S`` visual tokens, ``D`` head width and ``r`` rank; leading dimensions ``*`` are arbitrary.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rotatek_cache.core.compiled import steps_for

RANK_MULTIPLE = 8  # 8 half-precision numbers are one 16-byte load
INT8_MOST = 127


@dataclass(frozen=True)
class KeyBasis:
    """A pair (A, B): Keys are stored as ``C = (K - offset) A`` and read as ``q . K ~= (q B) . C + q . delta``.

    Values take the same form: ``V ~= C B^T + delta``, so that a head's output is ``(sum p C) B^T + (sum p) delta``.

    Attributes:
        A: encoder ``[H, R, D, r]``; None is the identity.
        B: decoder ``[H, R, D, r]``, the same tensor as `A` for an orthogonal projection; None is the identity. A
            diagonal one (scales of channels that are not rotated) is ``[H, R, D]``.
        scale: ``[H, R, r]``, factors on the columns of a `B` that is stored as int8; None where `B` is what it says.
        offset: ``[H, R, D]`` subtracted from Keys before they are encoded; None is zero.
        delta: ``[H, R, D]`` added back through the query; None is zero.
        fitted_rank: columns that carry something; the rest of ``r`` is zero padding.
        shared: A and B belong to the model (a calibrated basis), not to the request; `tensors` leaves them out.
        delta_shared: delta does, too.
    """

    A: Tensor | None = None
    B: Tensor | None = None
    offset: Tensor | None = None
    delta: Tensor | None = None
    fitted_rank: int | None = field(default=None, compare=False)
    shared: bool = False
    scale: Tensor | None = None
    delta_shared: bool = False

    @property
    def is_identity(self) -> bool:
        """Whether coefficients are the Keys themselves."""
        return self.B is None

    @property
    def is_diagonal(self) -> bool:
        """Whether `B` scales channels and does nothing else."""
        return self.B is not None and self.B.dim() == 3

    def tensors(self) -> list[Tensor]:
        """List the distinct tensors that this basis holds for its request."""
        matrices = () if self.shared else (self.A, self.B)
        delta = () if self.delta_shared else (self.delta,)
        held = [t for t in (*matrices, self.scale, self.offset, *delta) if t is not None]
        return list({id(t): t for t in held}.values())

    def encode(self, keys: Tensor) -> Tensor:
        """Encode Keys ``[H, R, S, D]`` as coefficients ``[H, R, S, r]``, in float32 for half precisions."""
        if self.is_identity:
            return keys
        if self.A is None:
            raise ValueError("this basis has no encoder left: it belongs to a segment that is sealed")
        wide = compute_dtype(keys.dtype)
        steps = steps_for(keys)
        if steps is not None and self.offset is not None and self.A.shape[:-2] == keys.shape[:-2]:
            return steps.encode(keys, self.A.to(wide), self.offset.to(wide))
        if self.A.dtype == keys.dtype != wide:
            # Products of half precisions are exact in float32, so that there is no need for a wide copy of the Keys.
            coefficients = wide_product(keys, self.A)
            return (
                coefficients if self.offset is None else coefficients - wide_product(self.offset[..., None, :], self.A)
            )
        centred = keys.to(wide) if self.offset is None else keys.to(wide) - self.offset.to(wide)[..., None, :]
        return centred @ self.A.to(wide)

    def sealed(self) -> "KeyBasis":
        """Keep only what decoding needs: a separate encoder and its offset are dropped."""
        encoder = self.A if self.A is self.B else None
        return dataclasses.replace(self, A=encoder, offset=None)

    def in_int8(self) -> "KeyBasis":
        """Round `B` to int8 with a scale per column; half the bytes of half precision.

        The encoder becomes ``A (B^T A)^-1`` with the rounded B, so that ``B^T A = I`` holds again: Keys in the span of
        the rounded columns are reproduced, and all that rounding does is to tilt that span a little.
        """
        assert self.A is not None
        assert self.B is not None
        wide = compute_dtype(self.B.dtype)
        rank, width = self.fitted_rank or self.B.shape[-1], self.B.shape[-1]
        encoder, decoder = self.A[..., :rank].to(wide), self.B[..., :rank].to(wide)
        peak = decoder.abs().amax(-2)
        scale = torch.where(peak > 0, peak, torch.ones_like(peak)) / INT8_MOST
        codes = (decoder / scale[..., None, :]).round_()
        overlap = encoder.mT @ (codes * scale[..., None, :])
        encoder = torch.linalg.solve_ex(overlap, encoder.mT).result.mT

        def pad(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, width - rank)).contiguous()

        return dataclasses.replace(self, A=pad(encoder), B=pad(codes.to(torch.int8)), scale=pad(scale))

    def for_codes(self, low: Tensor, step: Tensor, middle: Tensor) -> "KeyBasis":
        """Make the sealed basis that reads integer codes in place of coefficients ``low + step * code``.

        Codes are large numbers beside their spread, so what rounding does to the scaled decoder would shift all tokens
        alike: delta takes back what it does to the middle of the codes.

        Args:
            low, step: ``[H, R, r]``.
            middle: code in the middle of each range, ``[r]``.
        """
        dtype = self._storage_dtype(step.dtype)
        wide = compute_dtype(dtype)
        low, step = low.to(wide), step.to(wide)
        middle = middle.to(wide)
        if self.scale is not None:
            shift = self.rotate_back(low[..., None, :])[..., 0, :]
            delta = shift if self.delta is None else self.delta.to(wide) + shift
            scaled = dataclasses.replace(self, scale=self.scale * step, delta=delta.to(coded_delta_dtype(dtype)))
            return scaled.sealed()
        if self.B is None:
            exact, shift = step, low
            rounded = exact.to(dtype)
            shift = shift + (exact - rounded.to(wide)) * middle
        else:
            exact = self.B.to(wide) * step[..., None, :]
            rounded = exact.to(dtype)
            shift = (self.B.to(wide) @ low[..., None])[..., 0] + (exact - rounded.to(wide)) @ middle
        delta = shift if self.delta is None else self.delta.to(wide) + shift
        return KeyBasis(B=rounded, delta=delta.to(coded_delta_dtype(dtype)), fitted_rank=self.fitted_rank)

    def _storage_dtype(self, default: torch.dtype) -> torch.dtype:
        """Find the dtype of the states that this basis belongs to, as far as its tensors tell."""
        if self.B is not None and self.scale is None:
            return self.B.dtype
        return default if self.delta is None else self.delta.dtype

    def select(self, pick: Callable[[Tensor], Tensor]) -> "KeyBasis":
        """Apply `pick` to each of its distinct tensors, whose first dimensions are ``[H, R]``."""
        picked: dict[int, Tensor] = {}

        def one(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            if id(tensor) not in picked:
                picked[id(tensor)] = pick(tensor)
            return picked[id(tensor)]

        return dataclasses.replace(
            self, A=one(self.A), B=one(self.B), offset=one(self.offset), delta=one(self.delta), scale=one(self.scale)
        )

    def head(self, index: int) -> "KeyBasis":
        """Take the basis of one KV head, with a head dimension of 1."""
        return self.select(lambda tensor: tensor[index : index + 1])

    def columns(self, index: Tensor) -> "KeyBasis":
        """Pick columns by int64 ``index [H, R, r']``."""

        def pick(matrix: Tensor | None) -> Tensor | None:
            if matrix is None:
                return None
            return matrix.gather(-1, index[..., None, :].expand(*index.shape[:-1], matrix.shape[-2], -1))

        encoder = pick(self.A)
        return KeyBasis(
            encoder, encoder if self.A is self.B else pick(self.B), self.offset, self.delta, index.shape[-1]
        )

    def reconstruct(self, coefficients: Tensor) -> Tensor:
        """Rebuild Keys ``[H, R, S, D]`` from coefficients ``[H, R, S, r]`` (an oracle: decoding never does it)."""
        if self.B is not None:
            coefficients = coefficients.to(compute_dtype(self.B.dtype if self.scale is None else self.scale.dtype))
        keys = self.rotate_back(coefficients)
        return keys if self.delta is None else keys + self.delta.to(keys.dtype)[..., None, :]

    def rotate_back(self, coefficients: Tensor) -> Tensor:
        """Turn coefficients ``[H, R, M, r]``, or sums of them, back by ``B^T``: ``[H, R, M, D]``, without delta."""
        if self.B is None:
            return coefficients
        decoder = self.B.to(coefficients.dtype)
        if self.scale is not None:
            coefficients = coefficients * self.scale.to(coefficients.dtype)[..., None, :]
        return coefficients * decoder[..., None, :] if self.is_diagonal else coefficients @ decoder.mT

    def project_query(self, query: Tensor) -> Tensor:
        """Project queries ``[H, R, M, D]`` to the coefficients ``[H, R, M, r]`` that meet the stored ones."""
        if self.B is None:
            return query
        decoder = self.B.to(query.dtype)
        projected = query * decoder[..., None, :] if self.is_diagonal else query @ decoder
        return projected if self.scale is None else projected * self.scale.to(query.dtype)[..., None, :]

    def logit_shift(self, query: Tensor) -> Tensor | None:
        """Give ``q . delta`` of queries ``[H, R, M, D]``, as ``[H, R, M, 1]``; None where delta is zero."""
        return None if self.delta is None else query @ self.delta.to(query.dtype)[..., None]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Choose float32 for half precisions, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def coded_delta_dtype(dtype: torch.dtype) -> torch.dtype:
    """Choose how delta is stored beside codes: it holds the low ends of ranges, for which bfloat16 is too coarse."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def padded_rank(rank: int) -> int:
    """Round `rank` up to the multiple that storage and kernels use."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply ``[*, n, k]`` by ``[*, k, m]``; half precisions are summed and returned in float32."""
    wide = compute_dtype(left.dtype)
    if not left.is_cuda or left.dtype == wide:
        return left.to(wide) @ right.to(wide)
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    left, right = (factor.expand(*batch, *factor.shape[-2:]).flatten(0, -3) for factor in (left, right))
    return torch.bmm(left, right, out_dtype=wide).unflatten(0, batch)
