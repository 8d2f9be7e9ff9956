"""Key bases: how the visual Keys of a head are turned into a few coefficients, and how such a basis is fitted.

The maths of RotateK (arXiv 2605.19218) on torch alone. Shapes use ``H`` KV heads, ``R`` sequences that own a basis,
``S`` visual tokens, ``D`` head width and ``r`` rank; leading dimensions ``*`` are arbitrary.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

RANK_MULTIPLE = 8  # a coefficient row of 8 half-precision numbers is one 16-byte load
INT8_MOST = 127
Solver = Literal["subspace", "eigh"]


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
    """

    A: Tensor | None = None
    B: Tensor | None = None
    offset: Tensor | None = None
    delta: Tensor | None = None
    fitted_rank: int | None = field(default=None, compare=False)
    shared: bool = False
    scale: Tensor | None = None

    @property
    def is_identity(self) -> bool:
        """Whether coefficients are the Keys themselves."""
        return self.B is None

    @property
    def is_diagonal(self) -> bool:
        """Whether `B` scales channels and does nothing else."""
        return self.B is not None and self.B.dim() == 3

    def tensors(self) -> list[Tensor]:
        """Distinct tensors that this basis holds for its request."""
        matrices = () if self.shared else (self.A, self.B)
        held = [t for t in (*matrices, self.scale, self.offset, self.delta) if t is not None]
        return list({id(t): t for t in held}.values())

    def encode(self, keys: Tensor) -> Tensor:
        """Coefficients ``[H, R, S, r]`` of Keys ``[H, R, S, D]``, in float32 for half precisions."""
        if self.is_identity:
            return keys
        if self.A is None:
            raise ValueError("this basis has no encoder left: it belongs to a segment that is sealed")
        wide = compute_dtype(keys.dtype)
        if self.A.dtype == keys.dtype != wide:
            # Products of half precisions are exact in float32, so that there is no need for a wide copy of the Keys.
            coefficients = wide_product(keys, self.A)
            return (
                coefficients if self.offset is None else coefficients - wide_product(self.offset[..., None, :], self.A)
            )
        centred = keys.to(wide) if self.offset is None else keys.to(wide) - self.offset.to(wide)[..., None, :]
        return centred @ self.A.to(wide)

    def sealed(self) -> "KeyBasis":
        """What decoding needs: a separate encoder and its offset are dropped."""
        encoder = self.A if self.A is self.B else None
        return dataclasses.replace(self, A=encoder, offset=None)

    def in_int8(self) -> "KeyBasis":
        """The basis with `B` as int8 and a scale per column; half the bytes of half precision.

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
        """The sealed basis that reads integer codes in place of coefficients ``low + step * code``.

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
        """The dtype of the states that this basis belongs to, as far as its tensors tell."""
        if self.B is not None and self.scale is None:
            return self.B.dtype
        return default if self.delta is None else self.delta.dtype

    def select(self, pick: Callable[[Tensor], Tensor]) -> "KeyBasis":
        """The basis with `pick` applied to each of its distinct tensors, whose first dimensions are ``[H, R]``."""
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
        """The basis of one KV head, with a head dimension of 1."""
        return self.select(lambda tensor: tensor[index : index + 1])

    def columns(self, index: Tensor) -> "KeyBasis":
        """The basis with columns picked by int64 ``index [H, R, r']``."""

        def pick(matrix: Tensor | None) -> Tensor | None:
            if matrix is None:
                return None
            return matrix.gather(-1, index[..., None, :].expand(*index.shape[:-1], matrix.shape[-2], -1))

        encoder = pick(self.A)
        return KeyBasis(
            encoder, encoder if self.A is self.B else pick(self.B), self.offset, self.delta, index.shape[-1]
        )

    def reconstruct(self, coefficients: Tensor) -> Tensor:
        """Keys ``[H, R, S, D]`` that coefficients ``[H, R, S, r]`` stand for (an oracle: decoding never does it)."""
        if self.B is not None:
            coefficients = coefficients.to(compute_dtype(self.B.dtype if self.scale is None else self.scale.dtype))
        keys = self.rotate_back(coefficients)
        return keys if self.delta is None else keys + self.delta.to(keys.dtype)[..., None, :]

    def rotate_back(self, coefficients: Tensor) -> Tensor:
        """``C B^T`` of coefficients ``[H, R, M, r]``, or of weighted sums of them, without delta: ``[H, R, M, D]``."""
        if self.B is None:
            return coefficients
        decoder = self.B.to(coefficients.dtype)
        if self.scale is not None:
            coefficients = coefficients * self.scale.to(coefficients.dtype)[..., None, :]
        return coefficients * decoder[..., None, :] if self.is_diagonal else coefficients @ decoder.mT

    def project_query(self, query: Tensor) -> Tensor:
        """Queries ``[H, R, M, D]`` as the coefficients ``[H, R, M, r]`` that meet the stored ones."""
        if self.B is None:
            return query
        decoder = self.B.to(query.dtype)
        projected = query * decoder[..., None, :] if self.is_diagonal else query @ decoder
        return projected if self.scale is None else projected * self.scale.to(query.dtype)[..., None, :]

    def logit_shift(self, query: Tensor) -> Tensor | None:
        """``q . delta`` of queries ``[H, R, M, D]``, as ``[H, R, M, 1]``; None where delta is zero."""
        return None if self.delta is None else query @ self.delta.to(query.dtype)[..., None]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precisions, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def coded_delta_dtype(dtype: torch.dtype) -> torch.dtype:
    """How delta is stored beside codes: it holds the low ends of their ranges, for which bfloat16 is too coarse."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def padded_rank(rank: int) -> int:
    """`rank` rounded up to the multiple that storage and kernels use."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of ``[*, n, k]`` and ``[*, k, m]``; half precisions are summed and returned in float32."""
    wide = compute_dtype(left.dtype)
    if not left.is_cuda or left.dtype == wide:
        return left.to(wide) @ right.to(wide)
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    left, right = (factor.expand(*batch, *factor.shape[-2:]).flatten(0, -3) for factor in (left, right))
    return torch.bmm(left, right, out_dtype=wide).unflatten(0, batch)


def key_moments(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[*, D]`` and centred scatter ``(K - mean)^T (K - mean)`` ``[*, D, D]`` of Keys ``[*, S, D]``.

    Centred before the product, since the difference of large moments loses digits, which is in float32 (float64 stays).
    Half precisions are centred by the rounded mean and rounded, for tensor cores to multiply; what the mean lost to
    rounding is made good.
    """
    wide = compute_dtype(keys.dtype)
    mean = keys.mean(-2, dtype=wide)
    rounded = mean.to(keys.dtype)
    centred = keys - rounded[..., None, :]
    if not keys.is_cuda:
        centred = centred.to(wide)  # once, and not for each factor
    scatter = wide_product(centred.mT, centred)
    if keys.dtype == wide:
        return mean, scatter
    rest = mean - rounded.to(wide)
    return mean, scatter - keys.shape[-2] * rest[..., :, None] * rest[..., None, :]


def query_channel_norm(queries: Tensor, kv_heads: int, valid: Tensor | None = None) -> Tensor:
    """The paper's channel weights: L2 norm over the window of the group's signed mean query, floored.

    Args:
        queries: ``[B, H_q, W, D]`` after RoPE.
        kv_heads: number of KV heads ``H``; query heads of a group stand side by side.
        valid: bool ``[B, W]``, False for padding.

    Returns:
        ``[H, B, D]``, floored at 1e-3 of the median over the channels.
    """
    batch, q_heads, window, width = queries.shape
    queries = queries.to(compute_dtype(queries.dtype))
    if valid is not None:
        queries = torch.where(
            valid[:, None, :, None], queries, torch.zeros((), dtype=queries.dtype, device=queries.device)
        )
    grouped = queries.view(batch, kv_heads, q_heads // kv_heads, window, width).mean(2)
    norm = grouped.norm(dim=2).transpose(0, 1)
    # A row without a valid query has norm zero everywhere; uniform weights are plain PCA then.
    floor = norm.median(-1, keepdim=True).values * 1e-3
    norm = norm.maximum(floor)
    return torch.where(
        norm.amax(-1, keepdim=True) > 0, norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.ones_like(norm)
    )


def weighted_scatter(scatter: Tensor, weight: Tensor | None) -> Tensor:
    """``scatter * (w w^T)`` for channel weights ``[*, D]``, ``[*, D, D]``."""
    if weight is None:
        return scatter
    # Only ratios of the weights matter to eigenvectors; scaling keeps the product within range.
    weight = weight / weight.amax(-1, keepdim=True)
    return scatter * (weight[..., :, None] * weight[..., None, :])


def ridged(matrix: Tensor) -> Tensor:
    """Symmetric `matrix` ``[*, D, D]`` with the paper's ridge of 1e-4 of its mean diagonal."""
    ridge = 1e-4 * matrix.diagonal(dim1=-2, dim2=-1).abs().mean(-1)
    return matrix + ridge[..., None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def principal_directions(matrix: Tensor, rank: int, solver: Solver = "subspace", *, iterations: int = 5) -> Tensor:
    """Orthonormal ``[*, D, rank]`` spanning the top eigenvectors of symmetric positive `matrix` ``[*, D, D]``.

    The subspace iteration is the paper's (five rounds, Cholesky with a ridge of 1e-4 of the mean diagonal); that
    ridge leaves the columns far from orthonormal at high rank, so a plain QR ends it.
    """
    if solver == "eigh":
        return torch.linalg.eigh(matrix).eigenvectors[..., -rank:].flip(-1).contiguous()
    width = matrix.shape[-1]
    # Start from the channels of largest variance: deterministic, and the identity at full rank.
    channels = matrix.diagonal(dim1=-2, dim2=-1).topk(rank, dim=-1).indices
    basis = one_hot_columns(channels, width, matrix.dtype)
    eye = torch.eye(rank, dtype=matrix.dtype, device=matrix.device)
    # A unit trace keeps five powers of the matrix within the range of float32.
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    matrix = matrix / torch.where(trace > 0, trace, torch.ones_like(trace))
    for _ in range(iterations):
        basis = matrix @ basis
        gram = basis.mT @ basis
        mean_diagonal = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        factor = torch.linalg.cholesky_ex(gram + (1e-4 * mean_diagonal + torch.finfo(gram.dtype).tiny) * eye).L
        basis = torch.linalg.solve_triangular(factor, basis.mT, upper=False).mT
    return torch.linalg.qr(basis).Q


def one_hot_columns(channels: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """``[*, width, r]`` whose columns pick `channels` ``[*, r]`` (torch's `one_hot` would ask the device for them)."""
    columns = torch.zeros(*channels.shape[:-1], width, channels.shape[-1], dtype=dtype, device=channels.device)
    return columns.scatter_(-2, channels[..., None, :], 1.0)


def matrix_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root of symmetric positive `matrix` ``[*, D, D]``."""
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp_min(1e-6).sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def rank_for_energy(matrix: Tensor, energy: float) -> int:
    """Smallest rank at which every head of `matrix` ``[*, D, D]`` keeps `energy` of its trace."""
    spectrum = torch.linalg.eigvalsh(matrix).flip(-1).clamp_min(0)
    kept = spectrum.cumsum(-1) / spectrum.sum(-1, keepdim=True).clamp_min(torch.finfo(spectrum.dtype).tiny)
    # The tolerance lets energy=1 stop at the rank of the data in place of its last rounding error.
    needed = (kept < energy - 1e-6).sum(-1) + 1
    return int(needed.clamp(max=matrix.shape[-1]).max())


@dataclass(frozen=True)
class KeyStatistics:
    """What bases are fitted from.

    Attributes:
        mean: ``[H, R, D]`` of the visual Keys.
        scatter: centred ``(K - mean)^T (K - mean)``, ``[H, R, D, D]``.
        tokens: number of visual tokens, ``[R]``.
        queries: the window's queries ``[R, H_q, W, D]`` after RoPE, None if there are none.
        valid: bool ``[R, W]``, False for padding; None if nothing is.
    """

    mean: Tensor
    scatter: Tensor
    tokens: Tensor
    queries: Tensor | None = None
    valid: Tensor | None = None

    def channel_norm(self) -> Tensor | None:
        """The paper's channel weights ``[H, R, D]``, None without queries."""
        if self.queries is None:
            return None
        return query_channel_norm(self.queries, self.mean.shape[0], self.valid)

    def query_moment(self) -> Tensor | None:
        """Second moment ``[H, R, D, D]`` of the window's queries over all heads of a group, None without queries."""
        if self.queries is None:
            return None
        heads = self.mean.shape[0]
        queries = self.queries.to(self.mean.dtype)
        if self.valid is not None:
            queries = torch.where(self.valid[:, None, :, None], queries, torch.zeros_like(queries))
        grouped = queries.unflatten(1, (heads, -1)).flatten(2, 3).transpose(0, 1)  # [H, R, G * W, D]
        return grouped.mT @ grouped / grouped.shape[2]


def stored_basis(
    encoder: Tensor, decoder: Tensor, mean: Tensor | None, delta: Tensor | None, dtype: torch.dtype
) -> KeyBasis:
    """A basis with columns padded to `RANK_MULTIPLE` and everything rounded to the storage `dtype`.

    Rounded before anything is encoded with it, so that what is stored and what decodes it agree.
    """
    rank = encoder.shape[-1]

    def store(matrix: Tensor) -> Tensor:
        return torch.nn.functional.pad(matrix, (0, padded_rank(rank) - rank)).to(dtype).contiguous()

    stored = store(encoder)
    offset = None if mean is None else mean.to(dtype).contiguous()
    shift = offset if delta is mean else None if delta is None else delta.to(dtype).contiguous()
    return KeyBasis(stored, stored if decoder is encoder else store(decoder), offset, shift, rank)


def orthogonal_basis(mean: Tensor, matrix: Tensor, rank: int, solver: Solver, dtype: torch.dtype) -> KeyBasis:
    """Orthogonal basis from the mean ``[H, R, D]`` and the (weighted) scatter ``[H, R, D, D]`` of Keys.

    Coefficients are those of centred Keys: ``delta`` is then the mean itself, which says the same as the paper's
    uncentred coefficients with ``delta = mu (I - R R^T)`` and wastes neither range nor precision.
    """
    directions = principal_directions(matrix, rank, solver)
    return stored_basis(directions, directions, mean, mean, dtype)
