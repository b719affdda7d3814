"""Masked least squares by conjugate gradient, many rows at once; second moments of inputs.

The method is preconditioned conjugate gradient on the normal equations with the diagonal as preconditioner (Saad
2003, "Iterative Methods for Sparse Linear Systems", algorithm 9.1), in float32 where that is precise enough; what
counts is the float64 residual. Batched `torch.linalg.solve` is not used: on some CPUs it fails inside MKL, at times
silently; and one Cholesky factorisation per row took 17 times as long (512 inputs, half of the weights kept).
"""

from dataclasses import dataclass

import torch

from common import distributed

DAMPING = 1e-4  # of the mean diagonal; up to 1e-2 makes no difference in the third digit of a composed model's loss
TOLERANCE = 3e-3  # of the residual's norm, row by row; 1e-3 takes half as long again for 1e-4 of a composed loss
MAX_ITERATIONS = 500
CHECKED = 4  # residuals are looked at after so many iterations
SINGLE_PRECISION = 1e-5  # from this tolerance on, float32 is tried first
SOLVED_AT_ONCE = 1 << 24  # weights; each takes some 70 bytes while it is solved for
PANEL = 128  # columns of a Gram matrix computed at a time, from the diagonal on: half of 512 x 512 is never computed


class Moments:
    """Second moments of an input, E[x xᵀ], and on request its products with targets, E[t xᵀ], over valid tokens.

    Products are float32 (TF32 is off by default), sums float64.
    """

    def __init__(self):
        self._gram = self._cross = None
        self.tokens = 0

    def add(self, x: torch.Tensor, target: torch.Tensor | None = None) -> None:
        """Add rows of inputs (tokens, in) and of targets (tokens, out)."""
        x = x.float()
        if self._gram is None:
            self._gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        for i in range(0, x.shape[1], PANEL):
            self._gram[i:i + PANEL, i:] += x[:, i:i + PANEL].T @ x[:, i:]
        if target is not None:
            self._cross = (0 if self._cross is None else self._cross) + (target.float().T @ x).double()
        self.tokens += len(x)

    def add_up(self) -> None:
        """Replace the sums by those over all processes, each of which has seen its share of the text."""
        if distributed.size() > 1 and self._gram is not None:
            parts = [self._gram] if self._cross is None else [self._gram, self._cross]
            together = torch.cat([*(part.flatten() for part in parts), self._gram.new_tensor([self.tokens])])
            distributed.add_up(together)
            for part, summed in zip(parts, together[:-1].split([part.numel() for part in parts]), strict=True):
                part.copy_(summed.view_as(part))
            self.tokens = int(together[-1])

    def gram(self) -> torch.Tensor:
        """Return E[x xᵀ], (in, in), float64. Makes the sums means, so nothing can be added after it.

        Raises:
            ArithmeticError: an input was not finite.
        """
        if self.tokens > 0:
            for i in range(PANEL, len(self._gram), PANEL):
                self._gram[i:, i - PANEL:i] = self._gram[i - PANEL:i, i:].T
            self._gram /= self.tokens
            if self._cross is not None:
                self._cross /= self.tokens
            self.tokens = -self.tokens
            if not torch.isfinite(self._gram).all():
                raise ArithmeticError("its input is not finite for some sentence; the model overflows there")
        return self._gram

    def cross(self) -> torch.Tensor:
        """Return E[t xᵀ], (out, in), float64."""
        self.gram()
        return self._cross


def error(gram: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> float:
    """Return E‖(W − Ŵ)x‖² summed over outputs, for W = ``target`` and Ŵ = ``weight``, both (out, in)."""
    unit = max(float(gram.diagonal().mean()), 1e-300)
    difference = (target.double() - weight.double()).float()  # what is near is subtracted before it is rounded
    return unit * max(float(((difference @ (gram / unit).float()) * difference).sum(dtype=torch.float64)), 0.0)


@dataclass
class Solution:
    """What `solve` returns: weights (rows, in), the iterations used, the largest relative residual of a row."""

    weight: torch.Tensor
    iterations: int
    residual: float


def solve(gram: torch.Tensor, cross: torch.Tensor, prior: torch.Tensor, mask: torch.Tensor, damping: float = DAMPING,
          tolerance: float = TOLERANCE, max_iterations: int = MAX_ITERATIONS) -> Solution:
    """Minimise tr(Ŵ G Ŵᵀ) − 2 tr(Ŵ Cᵀ) + λ‖Ŵ − W₀‖² over Ŵ that are zero outside the mask, all rows at once.

    Preconditioned conjugate gradient on the normal equations (G + λI) Ŵᵀ = Cᵀ + λW₀ᵀ restricted to each row's
    mask, with the diagonal as preconditioner; λ is ``damping`` times the mean of G's diagonal. With C = W G and
    W₀ = W this is the block-level objective; damping keeps weights of inputs that never occur at W₀. Of more than
    `SOLVED_AT_ONCE` weights, that many are solved at a time: rows do not depend on each other.

    Args:
        gram: G, (in, in), float64, symmetric positive semi-definite.
        cross: C = E[y xᵀ], (rows, in).
        prior: W₀, (rows, in), where the iteration starts too.
        mask: bool, (rows, in), True where a weight is kept.
        max_iterations: in each precision.

    Raises:
        ArithmeticError: the result is not finite or the residual stays large.
    """
    unit = max(float(gram.diagonal().mean()), 1e-300)  # the problem has no scale; float32 has
    a = gram.double() / unit
    a.diagonal().add_(damping)
    rows = max(SOLVED_AT_ONCE // a.shape[0], 1)
    parts = [_solve_rows(a, c.double() / unit, p.double(), m, damping, tolerance, max_iterations)
             for c, p, m in zip(cross.split(rows), prior.split(rows), mask.split(rows), strict=True)]
    if len(parts) == 1:
        return parts[0]
    return Solution(torch.cat([p.weight for p in parts]), max(p.iterations for p in parts),
                    max(p.residual for p in parts))


def solve_together(gram: torch.Tensor, cross: torch.Tensor, prior: torch.Tensor, mask: torch.Tensor,
                   tolerance: float = TOLERANCE) -> torch.Tensor:
    """Return the weights that `solve` finds; the rows are divided among the processes, all of which must call it."""
    if distributed.size() == 1:
        return solve(gram, cross, prior, mask, tolerance=tolerance).weight
    found = torch.zeros_like(cross, dtype=torch.float64)
    own = slice(distributed.rank(), None, distributed.size())
    if len(cross[own]):
        found[own] = solve(gram, cross[own], prior[own], mask[own], tolerance=tolerance).weight
    distributed.add_up(found)  # zeros are the others' rows
    return found


def _solve_rows(a, cross, prior, mask, damping, tolerance, max_iterations) -> Solution:
    """As `solve`, ``a`` being G + λI, everything in units of G's mean diagonal, float64."""
    b = torch.where(mask, cross + damping * prior, 0.0)
    x, used = torch.where(mask, prior, 0.0), 0
    if tolerance >= SINGLE_PRECISION:
        # Twice as fast, and guarded: float64 goes on from here if the true residual is not small enough yet.
        found, used = _descend(a.float(), b.float(), x.float(), mask, tolerance / 2, max_iterations)
        x = found.double() if torch.isfinite(found).all() else x
    scale = _scale(torch.linalg.vector_norm(b, dim=1), b)

    def residual(x):
        return float((torch.linalg.vector_norm(b - torch.where(mask, x @ a, 0.0), dim=1) / scale).max())

    left = residual(x)
    if not left <= tolerance:
        x, more = _descend(a, b, x, mask, tolerance, max_iterations)
        used, left = used + more, residual(x)
    if not torch.isfinite(x).all() or not left < 10 * tolerance:
        raise ArithmeticError(f"the solver ended after {used} iterations with a relative residual of {left:g}; the "
                              "inputs are nearly dependent")
    return Solution(x, used, left)


def _descend(a, b, x, mask, tolerance: float, max_iterations: int) -> tuple[torch.Tensor, int]:
    """Solve x a = b row by row within the mask, from ``x``. Return x, iterations.

    A few rows need twice the iterations of most, so rows that have converged leave the products.
    """
    keep, inverse, result = mask.to(a.dtype), 1 / a.diagonal(), x.clone()
    active = torch.arange(len(x), device=x.device)
    scale = _scale(torch.linalg.vector_norm(b, dim=1), b)
    r = b - x @ a * keep
    p = r * inverse
    rz, iteration = (r * p).sum(dim=1, keepdim=True), 0
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


def _scale(norm: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return what residuals are relative to: a system whose right-hand side is all zero must not divide by 0."""
    return norm.clamp_min(float(b.norm()) * 1e-6 + 1e-30)
