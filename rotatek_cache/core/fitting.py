"""Fit bases: moments of states, query weights, the paper's subspace iteration and its exact form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_cache.core.basis import KeyBasis, compute_dtype, padded_rank, wide_product
from rotatek_cache.core.compiled import steps_for
from rotatek_cache.options import Solver


def key_moments(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Find mean ``[*, D]`` and centred scatter ``(K - mean)^T (K - mean)`` ``[*, D, D]`` of Keys ``[*, S, D]``.

    Centred before the product, since the difference of large moments loses digits, which is in float32 (float64 stays).
    Half precisions are centred by the rounded mean and rounded, for tensor cores to multiply; what the mean lost to
    rounding is made good.
    """
    steps = steps_for(keys)
    if steps is not None:
        return steps.moments(keys)
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
    """Find the paper's channel weights: L2 norm over the window of the group's signed mean query, floored.

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
    """Give ``scatter * (w w^T)`` for channel weights ``[*, D]``, ``[*, D, D]``."""
    if weight is None:
        return scatter
    # Only ratios of the weights matter to eigenvectors; scaling keeps the product within range.
    weight = weight / weight.amax(-1, keepdim=True)
    return scatter * (weight[..., :, None] * weight[..., None, :])


def ridged(matrix: Tensor) -> Tensor:
    """Add to symmetric `matrix` ``[*, D, D]`` the paper's ridge of 1e-4 of its mean diagonal."""
    ridge = 1e-4 * matrix.diagonal(dim1=-2, dim2=-1).abs().mean(-1)
    return matrix + ridge[..., None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def principal_directions(matrix: Tensor, rank: int, solver: Solver = "subspace", *, iterations: int = 5) -> Tensor:
    """Find orthonormal ``[*, D, rank]`` that span the top eigenvectors of symmetric positive `matrix` ``[*, D, D]``.

    The subspace iteration is the paper's (five rounds, Cholesky with a ridge of 1e-4 of the mean diagonal); that
    ridge leaves the columns far from orthonormal at high rank, so a plain QR ends it.
    """
    if solver == "eigh":
        return torch.linalg.eigh(matrix).eigenvectors[..., -rank:].flip(-1).contiguous()
    steps = steps_for(matrix)
    if steps is not None:
        return steps.directions(matrix, rank, iterations)
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
    """Make ``[*, width, r]`` whose columns pick `channels` ``[*, r]`` (torch's `one_hot` would wait for the device)."""
    columns = torch.zeros(*channels.shape[:-1], width, channels.shape[-1], dtype=dtype, device=channels.device)
    return columns.scatter_(-2, channels[..., None, :], 1.0)


def matrix_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Take the square root and inverse square root of symmetric positive `matrix` ``[*, D, D]``."""
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp_min(1e-6).sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def rank_for_energy(matrix: Tensor, energy: float) -> int:
    """Find the smallest rank at which every head of `matrix` ``[*, D, D]`` keeps `energy` of its trace."""
    spectrum = torch.linalg.eigvalsh(matrix).flip(-1).clamp_min(0)
    kept = spectrum.cumsum(-1) / spectrum.sum(-1, keepdim=True).clamp_min(torch.finfo(spectrum.dtype).tiny)
    # The tolerance lets energy=1 stop at the rank of the data in place of its last rounding error.
    needed = (kept < energy - 1e-6).sum(-1) + 1
    return int(needed.clamp(max=matrix.shape[-1]).max())


@dataclass(frozen=True)
class KeyStatistics:
    """The moments and queries that bases are fitted from.

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
        """Find the paper's channel weights ``[H, R, D]``; None without queries."""
        if self.queries is None:
            return None
        return query_channel_norm(self.queries, self.mean.shape[0], self.valid)

    def query_moment(self) -> Tensor | None:
        """Find the queries' second moment ``[H, R, D, D]`` over all heads of a group; None without queries."""
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
    """Make a basis with columns padded to `RANK_MULTIPLE` and everything rounded to the storage `dtype`.

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
    """Fit an orthogonal basis to the mean ``[H, R, D]`` and the (weighted) scatter ``[H, R, D, D]`` of Keys.

    Coefficients are those of centred Keys: ``delta`` is then the mean itself, which says the same as the paper's
    uncentred coefficients with ``delta = mu (I - R R^T)`` and wastes neither range nor precision.
    """
    directions = principal_directions(matrix, rank, solver)
    return stored_basis(directions, directions, mean, mean, dtype)
