"""Key bases: how the visual Keys of a head are turned into a few coefficients, and how such a basis is fitted.

The maths of RotateK (arXiv 2605.19218) on torch alone. Shapes use ``H`` KV heads, ``R`` sequences that own a basis,
``S`` visual tokens, ``D`` head width and ``r`` rank; leading dimensions ``*`` are arbitrary.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

RANK_MULTIPLE = 8  # a coefficient row of 8 half-precision numbers is one 16-byte load
Solver = Literal["subspace", "eigh"]


@dataclass(frozen=True)
class FitOptions:
    """How a basis is fitted; exactly one of `sparsity`, `rank` and `energy` sets its rank.

    Args:
        sparsity: share of Key channels removed, in [0, 1): ``r = D - int(D * sparsity)``. 0 is the identity basis.
        rank: coefficients kept per Key, from 1 to the head width.
        energy: share in (0, 1] of the (query-weighted) variance that a layer must keep; its rank follows.
        query_window: number of last prompt queries that weigh the channels (the paper: 32).
        query_weight: weigh Key channels by the norm of the window's queries (the paper: on).
        solver: "subspace" (the paper's five subspace iterations) or "eigh" (exact).
        always_compress: compress segments in which the basis costs more bytes than it saves too (for studies).
    """

    sparsity: float | None = None
    rank: int | None = None
    energy: float | None = None
    query_window: int = 32
    query_weight: bool = True
    solver: Solver = "subspace"
    always_compress: bool = False

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("sparsity", "rank", "energy") if getattr(self, name) is not None}
        if len(given) != 1:
            got = ", ".join(f"{name}={value}" for name, value in given.items()) or "none of them"
            raise ValueError(f"exactly one of sparsity, rank and energy sets the rank; got {got}")
        for name in ("sparsity", "energy"):
            value = given.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {self.energy}")
        for name in ("rank", "query_window"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.solver not in ("subspace", "eigh"):
            raise ValueError(f"solver must be 'subspace' or 'eigh', got {self.solver!r}")

    @property
    def is_identity(self) -> bool:
        """Whether the basis is the identity, so that nothing is fitted and nothing is lost."""
        return self.sparsity == 0

    def rank_for(self, head_width: int) -> int | None:
        """Rank for a head of `head_width` channels before padding; None if it follows from the Keys (`energy`)."""
        if self.energy is not None:
            return None
        if self.sparsity is not None:
            return head_width - int(head_width * self.sparsity)
        assert self.rank is not None
        if self.rank > head_width:
            raise ValueError(f"rank must be at most the head width {head_width}, got {self.rank}")
        return self.rank


@dataclass(frozen=True)
class KeyBasis:
    """A pair (A, B): Keys are stored as ``C = (K - offset) A`` and read as ``q . K ~= (q B) . C + q . delta``.

    Attributes:
        A: encoder ``[H, R, D, r]``; None is the identity.
        B: decoder ``[H, R, D, r]``, the same tensor as `A` for an orthogonal projection; None is the identity.
        offset: ``[H, R, D]`` subtracted from Keys before they are encoded; None is zero.
        delta: ``[H, R, D]`` added back through the query; None is zero.
        fitted_rank: columns that carry something; the rest of ``r`` is zero padding.
    """

    A: Tensor | None = None
    B: Tensor | None = None
    offset: Tensor | None = None
    delta: Tensor | None = None
    fitted_rank: int | None = field(default=None, compare=False)

    @property
    def is_identity(self) -> bool:
        """Whether coefficients are the Keys themselves."""
        return self.A is None

    def tensors(self) -> list[Tensor]:
        """Distinct tensors that this basis holds."""
        held = [t for t in (self.A, self.B, self.offset, self.delta) if t is not None]
        return list({id(t): t for t in held}.values())

    def encode(self, keys: Tensor) -> Tensor:
        """Coefficients ``[H, R, S, r]`` of Keys ``[H, R, S, D]``, in the Keys' dtype."""
        if self.A is None:
            return keys
        wide = compute_dtype(keys.dtype)
        centred = keys.to(wide) if self.offset is None else keys.to(wide) - self.offset.to(wide)[..., None, :]
        return (centred @ self.A.to(wide)).to(keys.dtype)

    def reconstruct(self, coefficients: Tensor) -> Tensor:
        """Keys ``[H, R, S, D]`` that the coefficients ``[H, R, S, r]`` stand for (an oracle: decoding never does it)."""
        if self.B is None:
            return coefficients
        keys = coefficients @ self.B.to(coefficients.dtype).mT
        return keys if self.delta is None else keys + self.delta.to(coefficients.dtype)[..., None, :]

    def project_query(self, query: Tensor) -> Tensor:
        """Queries ``[H, R, M, D]`` as the coefficients ``[H, R, M, r]`` that meet the stored ones."""
        return query if self.B is None else query @ self.B.to(query.dtype)

    def logit_shift(self, query: Tensor) -> Tensor | None:
        """``q . delta`` of queries ``[H, R, M, D]``, as ``[H, R, M, 1]``; None where delta is zero."""
        return None if self.delta is None else query @ self.delta.to(query.dtype)[..., None]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precisions, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def padded_rank(rank: int) -> int:
    """`rank` rounded up to the multiple that storage and kernels use."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def compressed_saves_bytes(tokens: int, head_width: int, rank: int) -> bool:
    """Whether `tokens` Keys of one head take fewer numbers as coefficients, basis (A = B) and delta than as they are."""
    stored_rank = padded_rank(rank)
    return tokens * stored_rank + head_width * stored_rank + head_width < tokens * head_width


def key_moments(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[*, D]`` and centred scatter ``(K - mean)^T (K - mean)`` ``[*, D, D]`` of Keys ``[*, S, D]``.

    Centred before the product, in float32 (float64 stays), since the difference of large moments loses digits.
    """
    keys = keys.to(compute_dtype(keys.dtype))
    mean = keys.mean(-2)
    centred = keys - mean[..., None, :]
    return mean, centred.mT @ centred


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
        queries = torch.where(valid[:, None, :, None], queries, torch.zeros((), dtype=queries.dtype, device=queries.device))
    grouped = queries.view(batch, kv_heads, q_heads // kv_heads, window, width).mean(2)
    norm = grouped.norm(dim=2).transpose(0, 1)
    # A row without a valid query has norm zero everywhere; uniform weights are plain PCA then.
    floor = norm.median(-1, keepdim=True).values * 1e-3
    norm = norm.maximum(floor)
    return torch.where(norm.amax(-1, keepdim=True) > 0, norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.ones_like(norm))


def weighted_scatter(scatter: Tensor, weight: Tensor | None) -> Tensor:
    """``scatter * (w w^T)`` with the paper's ridge of 1e-4 of the mean diagonal, ``[*, D, D]``."""
    if weight is not None:
        # Only ratios of the weights matter to eigenvectors; scaling keeps the product within range.
        weight = weight / weight.amax(-1, keepdim=True)
        scatter = scatter * (weight[..., :, None] * weight[..., None, :])
    ridge = 1e-4 * scatter.diagonal(dim1=-2, dim2=-1).abs().mean(-1)
    return scatter + ridge[..., None, None] * torch.eye(scatter.shape[-1], dtype=scatter.dtype, device=scatter.device)


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
    basis = torch.nn.functional.one_hot(channels, width).to(matrix.dtype).mT
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


def rank_for_energy(matrix: Tensor, energy: float) -> int:
    """Smallest rank at which every head of `matrix` ``[*, D, D]`` keeps `energy` of its trace."""
    spectrum = torch.linalg.eigvalsh(matrix).flip(-1).clamp_min(0)
    kept = spectrum.cumsum(-1) / spectrum.sum(-1, keepdim=True).clamp_min(torch.finfo(spectrum.dtype).tiny)
    # The tolerance lets energy=1 stop at the rank of the data in place of its last rounding error.
    needed = (kept < energy - 1e-6).sum(-1) + 1
    return int(needed.clamp(max=matrix.shape[-1]).max())


def fit_basis(mean: Tensor, matrix: Tensor, rank: int, solver: Solver, dtype: torch.dtype) -> KeyBasis:
    """Orthogonal basis from the mean ``[H, R, D]`` and the (weighted) scatter ``[H, R, D, D]`` of Keys.

    The columns are rounded to the storage `dtype` before anything is encoded with them, so that what is stored and
    what decodes it agree. Coefficients are those of centred Keys: ``delta`` is then the mean itself, which says the
    same as the paper's uncentred coefficients with ``delta = mu (I - R R^T)`` and wastes neither range nor precision.
    """
    directions = principal_directions(matrix, rank, solver).to(dtype)
    padding = padded_rank(rank) - rank
    if padding:
        directions = torch.nn.functional.pad(directions, (0, padding))
    directions = directions.contiguous()
    mean = mean.to(dtype).contiguous()
    return KeyBasis(A=directions, B=directions, offset=mean, delta=mean, fitted_rank=rank)
