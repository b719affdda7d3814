import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import least_squares
from common.least_squares import TOLERANCE, Moments, error, solve


def brute_force(gram, cross, prior, mask, damping):
    """Solve each row's normal equations on its kept columns with a dense Cholesky factorisation, in float64."""
    ridge = damping * gram.diagonal().mean()
    a, b = gram + ridge * torch.eye(len(gram), dtype=torch.float64), cross + ridge * prior
    result = torch.zeros_like(prior)
    for i, kept in enumerate(mask):
        if kept.any():
            result[i, kept] = torch.cholesky_solve(b[i, kept, None], torch.linalg.cholesky(a[kept][:, kept]))[:, 0]
    return result


def example(rows, inputs, tokens, keep=0.6, seed=0):
    """Return a Gram matrix, cross moments with independent targets, a prior and a mask."""
    g = torch.Generator().manual_seed(seed)
    x, y, prior = (torch.randn(*shape, generator=g, dtype=torch.float64)
                   for shape in ((tokens, inputs), (tokens, rows), (rows, inputs)))
    return x.T @ x / tokens, y.T @ x / tokens, prior, torch.rand(rows, inputs, generator=g) < keep


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 6), inputs=st.integers(1, 12), tokens=st.integers(1, 20), keep=st.floats(0, 1),
       damping=st.sampled_from([1e-6, 1e-4, 1e-2, 1.0]), seed=st.integers(0, 1000), own=st.booleans())
def test_the_solver_equals_brute_force_least_squares_per_row(rows, inputs, tokens, keep, damping, seed, own):
    gram, cross, prior, mask = example(rows, inputs, tokens, keep, seed)
    cross = prior @ gram if own else cross  # the block level's problem, or any other
    solution = solve(gram, cross, prior, mask, damping, tolerance=1e-10)
    expected = brute_force(gram, cross, prior, mask, damping)
    assert not solution.weight[~mask].any()
    # A relative residual of 1e-10 leaves weights uncertain by that much over the smallest eigenvalue, the damping.
    assert torch.allclose(solution.weight, expected, atol=1e-9 / damping + 1e-6)


def test_rows_solved_in_parts_are_the_same(monkeypatch):
    gram, cross, prior, mask = example(7, 12, 60)
    together = solve(gram, cross, prior, mask, tolerance=1e-9)
    sizes = []
    real = least_squares._solve_rows
    monkeypatch.setattr(least_squares, "_solve_rows",
                        lambda a, b, *more: (sizes.append(len(b)), real(a, b, *more))[1])
    monkeypatch.setattr(least_squares, "SOLVED_AT_ONCE", 3 * 12 + 1)
    parts = solve(gram, cross, prior, mask, tolerance=1e-9)
    assert sizes == [3, 3, 1]
    assert torch.allclose(parts.weight, together.weight, atol=1e-7) and parts.residual <= 1e-9
    monkeypatch.setattr(least_squares, "SOLVED_AT_ONCE", 1)  # less than a row: a row at a time
    assert torch.allclose(solve(gram, cross, prior, mask, tolerance=1e-9).weight, together.weight, atol=1e-7)


def test_inputs_that_never_occur_keep_their_weights():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1], x[:, 2] = 0.0, 1.0
    gram, target = x.T @ x / 50, torch.ones(1, 4, dtype=torch.float64)
    solution = solve(gram, target @ gram, target, torch.tensor([[True, True, True, False]]))
    assert torch.isfinite(solution.weight).all() and solution.weight[0, 1] == 1.0


def test_without_any_input_the_masked_prior_is_the_solution():
    _, _, prior, mask = example(3, 5, 10)
    nothing = torch.zeros(5, 5, dtype=torch.float64)
    solution = solve(nothing, prior @ nothing, prior, mask)
    assert torch.allclose(solution.weight, torch.where(mask, prior, 0.0))


def test_a_duplicate_input_takes_over_what_the_removed_one_did():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1] = x[:, 0]
    gram, target = x.T @ x / 50, torch.tensor([[2.0, 3.0, 1.0]], dtype=torch.float64)
    solution = solve(gram, target @ gram, target, torch.tensor([[True, False, True]]))
    assert torch.allclose(solution.weight, torch.tensor([[5.0, 0.0, 1.0]]).double(), atol=2e-3)


def test_a_statistic_that_is_not_finite_is_loud():
    gram = torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]], dtype=torch.float64)
    with pytest.raises(ArithmeticError, match="relative residual of nan"):
        solve(gram, gram, torch.eye(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_single_precision_is_guarded(scale):
    """Inputs of very unequal size, where float32 alone does not reach the tolerance."""
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x * torch.logspace(0, 3, 40, dtype=torch.float64) + x[:, :1] * 300) * scale
    gram = x.T @ x / 300
    target = torch.randn(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.rand(6, 40, generator=torch.Generator().manual_seed(2)) < 0.6
    solution = solve(gram, target @ gram, target, mask, damping=1e-9)
    expected = brute_force(gram, target @ gram, target, mask, 1e-9)
    assert solution.residual <= TOLERANCE
    assert 0 < error(gram, target, solution.weight) <= 1.05 * error(gram, target, expected) < float("inf")


def test_a_solver_stopped_too_early_is_loud():
    x = torch.randn(200, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.logspace(0, 3, 30, dtype=torch.float64) + x[:, :1] * 50
    gram, target = x.T @ x, torch.ones(5, 30, dtype=torch.float64)
    mask = torch.rand(5, 30, generator=torch.Generator().manual_seed(1)) < 0.5
    with pytest.raises(ArithmeticError, match="after 2 iterations"):
        solve(gram, target @ gram, target, mask, damping=1e-12, tolerance=1e-4, max_iterations=1)


def test_moments_are_the_means_over_all_rows_added():
    g = torch.Generator().manual_seed(0)
    xs, ts = ([torch.randn(n, width, generator=g) for n in (20, 1, 33)] for width in (300, 7))  # three panels
    moments = Moments()
    for x, t in zip(xs, ts, strict=True):
        moments.add(x, t)
    x, t = torch.cat(xs).double(), torch.cat(ts).double()
    assert torch.allclose(moments.gram(), x.T @ x / 54, atol=1e-5)
    assert torch.allclose(moments.cross(), t.T @ x / 54, atol=1e-5)
    assert torch.equal(moments.gram(), moments.gram().T) and moments.gram().dtype == torch.float64


def test_the_error_is_the_mean_squared_difference_of_outputs():
    x = torch.randn(60, 9, generator=torch.Generator().manual_seed(0))
    w, other = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(1))
    moments = Moments()
    moments.add(x)
    expected = ((x @ (w - other).T) ** 2).sum(dim=1).mean()
    assert error(moments.gram(), w, other) == pytest.approx(float(expected), rel=1e-5)


def test_a_perfect_fit_has_no_negative_error():
    moments, g = Moments(), torch.Generator().manual_seed(0)
    moments.add(torch.randn(1, 40, generator=g))
    w = torch.randn(300, 40, generator=g, dtype=torch.float64)
    gram = moments.gram()
    null = torch.linalg.eigh(gram).eigenvectors[:, :-1]  # directions that the one row of inputs does not have
    assert min(error(gram, w, w + (w @ null) @ null.T) for w in w.split(1)) >= 0


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])  # the last overflows when it is squared
def test_an_input_that_is_not_finite_is_refused(value):
    moments, x = Moments(), torch.ones(3, 4)
    x[1, 2] = value
    moments.add(x)
    with pytest.raises(ArithmeticError, match="its input is not finite for some sentence"):
        moments.gram()
