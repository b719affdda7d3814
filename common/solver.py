"""Masked least squares by conjugate gradient, many rows at once.

The method is preconditioned conjugate gradient on the normal equations with the diagonal as preconditioner (Saad
2003, "Iterative Methods for Sparse Linear Systems", algorithm 9.1), in float32 where that is precise enough; what
counts is the float64 residual. Batched `torch.linalg.solve` is not used: on some CPUs it fails inside MKL, at times
silently; and one Cholesky factorisation per row took 17 times as long (512 inputs, half of the weights kept).
"""

from dataclasses import dataclass

import torch

DAMPING = 1e-4
TOLERANCE = 1e-3  # of the residual's norm, row by row; below it the error does not change in four digits
MAX_ITERATIONS = 500
CHECKED = 4  # residuals are looked at after so many iterations
# Iterations shown to who watches: dense where the error falls, sparse where it settles.
LOGGED = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, MAX_ITERATIONS)
SINGLE_PRECISION = 1e-5  # from this tolerance on, float32 is tried first


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
        max_iterations: in each precision.
        watch: called as ``watch(iteration, weight)`` before the first and after each of the `LOGGED` iterations.

    Raises:
        ArithmeticError: the result is not finite or the residual stays large.
    """
    unit = max(float(gram.diagonal().mean()), 1e-300)  # the problem has no scale; float32 has
    gram, cross, prior = gram.double() / unit, cross.double() / unit, prior.double()
    a = gram + damping * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    b = torch.where(mask, cross + damping * prior, 0.0)
    x, used = torch.where(mask, prior, 0.0), 0

    def rest(x):
        return b - torch.where(mask, x @ a, 0.0)

    if tolerance >= SINGLE_PRECISION:
        # Twice as fast, and guarded: float64 goes on from here if the true residual is not small enough yet.
        x, used = _descend(a.float(), b.float(), x.float(), mask, tolerance / 2, max_iterations, watch)
        x = x.double() if torch.isfinite(x).all() else torch.where(mask, prior, 0.0)
    r = rest(x)
    if not float((torch.linalg.vector_norm(r, dim=1) / _scale(torch.linalg.vector_norm(b, dim=1), b)).max()) \
            <= tolerance:
        x, more = _descend(a, b, x, mask, tolerance, max_iterations, watch and (lambda i, y: watch(used + i, y)))
        used, r = used + more, rest(x)
    return _checked(x, used, r, b, tolerance, dim=1)


def solve_weighted(gram: torch.Tensor, cross: torch.Tensor, prior: torch.Tensor, mask: torch.Tensor,
                   metric: torch.Tensor, damping: float = DAMPING, tolerance: float = TOLERANCE) -> Solution:
    """As `solve`, but errors of the outputs weigh as in ``metric`` S: minimise E[dᵀ S d] + λ tr(ΔᵀSΔ), d = Ŵx − y.

    Rows are no longer independent: an output that cannot be had exactly is made up for by others. Normal equations:
    S (Ŵ (G + λI) − C − λW₀) = 0 within the mask.

    Args:
        metric: S, (rows, rows), symmetric positive definite.
    """
    start = solve(gram, cross, prior, mask, damping, tolerance)
    unit, weight = max(float(gram.diagonal().mean()), 1e-300), (metric / metric.diagonal().mean()).double()
    a = gram.double() / unit + damping * torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    b = torch.where(mask, weight @ (cross.double() / unit + damping * prior.double()), 0.0)
    x, used = start.weight, start.iterations
    for dtype in (torch.float32, torch.float64):  # the latter goes on where the former is not precise enough
        s, g = weight.to(dtype), a.to(dtype)

        def apply(p, s=s, g=g):
            return torch.where(mask, s @ (p @ g), 0.0)

        x, more = _conjugate_gradient(apply, b.to(dtype), x.to(dtype), 1 / (s.diagonal()[:, None] * g.diagonal()),
                                      torch.sum, tolerance / 2, MAX_ITERATIONS)
        x, used = x.double(), used + more
        rest = b - torch.where(mask, weight @ (x @ a), 0.0)
        if float(rest.norm()) <= tolerance * float(b.norm()):
            break
    return _checked(x, used, rest, b, tolerance)


def solve_rows(grams: torch.Tensor, cross: torch.Tensor, prior: torch.Tensor, masks: torch.Tensor,
               damping: float = DAMPING, tolerance: float = TOLERANCE) -> Solution:
    """As `solve`, but every row has a Gram matrix of its own, and several masks share them.

    Args:
        grams: G of each row, (rows, in, in), float32; made float64 for the final residual.
        cross: C, (rows, in).
        prior: W₀, (rows, in).
        masks: bool, (masks, rows, in).

    Returns:
        Weights (masks, rows, in).
    """
    unit = grams.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30)
    a, masks = grams / unit[:, None, None], masks.transpose(0, 1)
    a.diagonal(dim1=1, dim2=2).add_(damping)
    b = torch.where(masks, (cross / unit[:, None] + damping * prior)[:, None], 0.0).double()
    x, used = torch.where(masks, prior[:, None], 0.0), 0
    for dtype in (torch.float32, torch.float64):  # the latter goes on where the former is not precise enough
        g = a.to(dtype)
        x, more = _conjugate_gradient(lambda p, g=g: torch.bmm(p, g).mul_(masks), b.to(dtype), x.to(dtype),
                                      1 / g.diagonal(dim1=1, dim2=2)[:, None],
                                      lambda product: product.sum(dim=2, keepdim=True), tolerance / 2, MAX_ITERATIONS)
        x, used = x.double(), used + more
        rest = b - torch.where(masks, torch.bmm(x, a.double()), 0.0)
        if not float((rest.norm(dim=2) / _scale(b.norm(dim=2), b)).max()) > tolerance:
            break
    solution = _checked(x, used, rest, b, tolerance, dim=2)
    solution.weight = solution.weight.transpose(0, 1)
    return solution


def _descend(a, b, x, mask, tolerance: float, max_iterations: int, watch=None) -> tuple[torch.Tensor, int]:
    """Solve x a = b row by row within the mask, from ``x``. Return x, iterations.

    A few rows need twice the iterations of most, so rows that have converged leave the products.
    """
    keep, inverse, result = mask.to(a.dtype), 1 / a.diagonal(), x.clone()
    active = torch.arange(len(x), device=x.device)
    scale = _scale(torch.linalg.vector_norm(b, dim=1), b)
    r = b - x @ a * keep
    p = r * inverse
    rz, iteration = (r * p).sum(dim=1, keepdim=True), 0
    if watch:
        watch(0, result)
    while True:
        if iteration % CHECKED == 0 or iteration == max_iterations:
            open_ = ~(torch.linalg.vector_norm(r, dim=1) <= tolerance * scale)
            if iteration == max_iterations or not open_.all():
                result[active] = x
                if iteration == max_iterations or not open_.any():
                    return result, iteration
                active, x, r, p, rz, keep, scale = (t[open_] for t in (active, x, r, p, rz, keep, scale))
        q = (p @ a).mul_(keep)
        pq = (p * q).sum(dim=1, keepdim=True)
        alpha = torch.where(pq > 0, rz / pq, 0.0)
        x = torch.addcmul(x, alpha, p)
        r = torch.addcmul(r, alpha, q, value=-1)
        z = r * inverse
        rz, before = (r * z).sum(dim=1, keepdim=True), rz
        p = z.addcmul_(torch.where(before > 0, rz / before, 0.0), p)
        iteration += 1
        if watch and iteration in LOGGED:
            result[active] = x
            watch(iteration, result)


def _checked(x, iterations: int, rest, b, tolerance: float, dim=None) -> Solution:
    """Return a solution whose true residual ``rest`` is small; the iteration's own drifts from it."""
    norms = torch.linalg.vector_norm(rest, dim=dim), _scale(torch.linalg.vector_norm(b, dim=dim), b)
    residual = float((norms[0] / norms[1]).max())
    if not torch.isfinite(x).all() or not residual < 10 * tolerance:
        raise ArithmeticError(f"the solver ended after {iterations} iterations with a relative residual of "
                              f"{residual:g}")
    return Solution(x, iterations, residual)


def _scale(norm: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return what residuals are relative to: a system whose right-hand side is all zero must not divide by 0."""
    return norm.clamp_min(float(b.norm()) * 1e-6 + 1e-30)


def _conjugate_gradient(apply, b, x, inverse, total, tolerance: float,
                        max_iterations: int) -> tuple[torch.Tensor, int]:
    """Solve ``apply(x) = b`` from ``x``; ``total`` sums a product over each system. Return x, iterations.

    A system that has converged rests, so that its solution does not depend on the others.
    """
    r = b - apply(x)
    scale = _scale(total(b * b).sqrt(), b)
    p = z = r * inverse
    rz = total(r * z)
    iteration = 0
    while iteration < max_iterations and (open_ := total(r * r).sqrt() > tolerance * scale).any():
        q = apply(p)
        pq = total(p * q)
        alpha = torch.where(open_ & (pq > 0), rz / pq, 0.0)
        x = x + alpha * p
        r = r - alpha * q
        z = r * inverse
        rz, before = total(r * z), rz
        p = z + torch.where(before > 0, rz / before, 0.0) * p
        iteration += 1
    return x, iteration
