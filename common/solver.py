"""Masked least squares by conjugate gradient: many rows at once, and a head's v through its ``o``.

The method is preconditioned conjugate gradient on the normal equations with the diagonal as preconditioner (Saad
2003, "Iterative Methods for Sparse Linear Systems", algorithm 9.1), in float64. Batched LU is not used: it fails on
some CPUs without a word (docs/block-level.md), and one Cholesky factorisation per row is 17 times slower.
"""

from dataclasses import dataclass

import torch

DAMPING = 1e-4
TOLERANCE = 1e-4  # of the residual's norm, row by row; below it the error does not change in five digits
MAX_ITERATIONS = 500


@dataclass
class Solution:
    """What `solve` returns: weights (rows, in), the iterations used, the largest relative residual of a row."""

    weight: torch.Tensor
    iterations: int
    residual: float


def solve(gram: torch.Tensor, cross: torch.Tensor, prior: torch.Tensor, mask: torch.Tensor, damping: float = DAMPING,
          tolerance: float = TOLERANCE, max_iterations: int = MAX_ITERATIONS, watch=None) -> Solution:
    """Minimise tr(Ŵ G Ŵᵀ) − 2 tr(Ŵ Cᵀ) + λ‖Ŵ − W₀‖² over Ŵ that are zero outside the mask, all rows at once.

    Preconditioned conjugate gradient on the normal equations (G + λI) Ŵᵀ = Cᵀ + λW₀ᵀ restricted to each row's
    mask, with the diagonal as preconditioner; λ is ``damping`` times the mean of G's diagonal. With C = W G and
    W₀ = W this is the block-level objective; damping keeps weights of inputs that never occur at W₀.

    Args:
        gram: G, (in, in), float64, symmetric positive semi-definite.
        cross: C = E[y xᵀ], (rows, in).
        prior: W₀, (rows, in), where the iteration starts too.
        mask: bool, (rows, in), True where a weight is kept.
        watch: called as ``watch(iteration, weight)`` before the first and after each iteration.

    Raises:
        ArithmeticError: the result is not finite or the residual stays large.
    """
    gram, cross, prior = gram.double(), cross.double(), prior.double()
    ridge = max(damping * float(gram.diagonal().mean()), 1e-30)
    a = gram + ridge * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    b = torch.where(mask, cross + ridge * prior, 0.0)
    return _conjugate_gradient(lambda p: torch.where(mask, p @ a, 0.0), b, torch.where(mask, prior, 0.0),
                               1 / a.diagonal(), lambda m: m.sum(dim=1, keepdim=True), tolerance, max_iterations, watch)


def _conjugate_gradient(apply, b, x, inverse, total, tolerance, max_iterations, watch=None) -> Solution:
    """Solve ``apply(x) = b`` from the start ``x``; ``total`` sums a product over each independent system."""
    r = b - apply(x)
    # A system whose right-hand side is all zero is solved by zeros; its scale must not be 0.
    scale = total(b * b).sqrt().clamp_min(float(b.norm()) * 1e-12 + 1e-300)
    p = z = r * inverse
    rz = total(r * z)
    iteration = 0
    if watch:
        watch(0, x)
    while iteration < max_iterations and float((total(r * r).sqrt() / scale).max()) > tolerance:
        q = apply(p)
        pq = total(p * q)
        alpha = torch.where(pq > 0, rz / pq, 0.0)
        x = x + alpha * p
        r = r - alpha * q
        z = r * inverse
        rz, before = total(r * z), rz
        p = z + torch.where(before > 0, rz / before, 0.0) * p
        iteration += 1
        if watch:
            watch(iteration, x)
    # The recursion's residual drifts from the true one: what counts is the true one.
    rest = b - apply(x)
    residual = float((total(rest * rest).sqrt() / scale).max())
    if not torch.isfinite(x).all() or not residual < max(100 * tolerance, 1e-3):
        raise ArithmeticError(f"the solver ended after {iteration} iterations with a relative residual of {residual:g}")
    return Solution(x, iteration, residual)


def spread(v: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the block-diagonal matrix (heads × d_kv, heads × d_model) that applies each head's v to its input."""
    return torch.block_diag(*v.view(heads, -1, v.shape[1]))


def solve_values(gram: torch.Tensor, cross: torch.Tensor, o: torch.Tensor, v: torch.Tensor, heads_kept: torch.Tensor,
                 damping: float, tolerance: float = 1e-3) -> Solution:
    """Fit v of the kept heads to an attention's output, given its attention weights and its ``o``.

    With z the mixed inputs (`mixed_inputs`), the output is Σ_h O_h V_h z_h, linear in V, so that with G = E[z zᵀ]
    and C = E[y zᵀ] the normal equations are O_hᵀ (Σ_h' O_h' V_h' G_h'h + λV_h) = O_hᵀ C_h + λV_h.

    Args:
        gram: G, (heads × d_model, heads × d_model), float64.
        cross: C, (d_model, heads × d_model).
        o: (d_model, heads × d_kv), zero outside its mask.
        v: (heads × d_kv, d_model), where the iteration starts and what damping pulls to.
        heads_kept: bool, (heads,).
    """
    heads = heads_kept.numel()
    out, width = o.shape[0], v.shape[1]
    by_head = o.view(out, heads, -1)
    start = v.view(heads, -1, width)
    kept = heads_kept[:, None, None]
    squares = by_head.square().sum(dim=0)
    ridge = damping * float(gram.diagonal().mean()) * float(squares.sum() / squares.count_nonzero().clamp_min(1))

    def back(y):  # (out, heads × d_model) -> (heads, d_kv, d_model)
        return torch.where(kept, torch.einsum("ohk,ohd->hkd", by_head, y.view(out, heads, width)), 0.0)

    inverse = 1 / (squares[:, :, None] * gram.diagonal().view(heads, 1, width) + ridge)
    solution = _conjugate_gradient(
        lambda p: back(o @ spread(p.reshape(v.shape), heads) @ gram) + ridge * p, back(cross) + ridge * start * kept,
        start * kept, inverse, torch.sum, tolerance, MAX_ITERATIONS)
    solution.weight = solution.weight.reshape(v.shape)
    return solution
