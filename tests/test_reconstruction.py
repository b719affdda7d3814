import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import bank, models, reconstruction
from common.files import UserError
from common.solver import solve


def brute_force(gram, target, mask, damping):
    """Solve each row's normal equations on its kept columns with a dense Cholesky factorisation, in float64."""
    ridge = damping * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=torch.float64)
    a, b = gram + ridge, target @ (gram + ridge)
    result = torch.zeros_like(target)
    for i, kept in enumerate(mask):
        if kept.any():
            factor = torch.linalg.cholesky(a[kept][:, kept])
            result[i, kept] = torch.cholesky_solve(b[i, kept, None], factor)[:, 0]
    return result


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 6), inputs=st.integers(1, 12), rank=st.integers(1, 20), keep=st.floats(0, 1),
       damping=st.sampled_from([1e-6, 1e-4, 1e-2, 1.0]), seed=st.integers(0, 1000))
def test_solver_equals_brute_force_least_squares_per_row(rows, inputs, rank, keep, damping, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rank, inputs, generator=g, dtype=torch.float64)
    gram, target = x.T @ x / rank, torch.randn(rows, inputs, generator=g, dtype=torch.float64)
    mask = torch.rand(rows, inputs, generator=g) < keep
    solution = solve(gram, target @ gram, target, mask, damping, tolerance=1e-10)
    expected = brute_force(gram, target, mask, damping)
    assert not solution.weight[~mask].any()
    # A relative residual of 1e-10 leaves weights uncertain by that much over the smallest eigenvalue, the damping.
    assert torch.allclose(solution.weight, expected, atol=1e-9 / damping + 1e-6)
    mine, best = (reconstruction.error(gram, target, w) for w in (solution.weight, expected))
    assert mine <= best + 1e-6 * reconstruction.power(gram, target)


def test_dead_and_constant_inputs_keep_the_original_weights():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1], x[:, 2] = 0.0, 1.0
    gram, target = x.T @ x / 50, torch.ones(1, 4, dtype=torch.float64)
    solution = solve(gram, target @ gram, target, torch.tensor([[True, True, True, False]]))
    assert torch.isfinite(solution.weight).all() and solution.weight[0, 1] == 1.0


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
    expected = brute_force(gram, target, mask, 1e-9)
    mine, best = (reconstruction.error(gram, target, w) for w in (solution.weight, expected))
    assert solution.residual <= 1e-3 and mine <= 1.01 * best


def test_a_solver_stopped_too_early_is_loud():
    x = torch.randn(200, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.logspace(0, 3, 30, dtype=torch.float64) + x[:, :1] * 50
    gram = x.T @ x
    mask = torch.rand(5, 30, generator=torch.Generator().manual_seed(1)) < 0.5
    target = torch.ones(5, 30, dtype=torch.float64)
    with pytest.raises(ArithmeticError, match="after 1 iterations"):
        solve(gram, target @ gram, target, mask, damping=1e-12, tolerance=1e-8, max_iterations=1)


def plain_inputs(network, batches, name):
    """Collect a module's valid inputs one sentence at a time, without padding."""
    rows = []
    hook = network.get_submodule(name).register_forward_pre_hook(lambda m, i: rows.append(i[0][0]))
    with torch.no_grad():
        for example in batches.dataset.examples:
            network(input_ids=torch.tensor([example.source]),
                    decoder_input_ids=torch.tensor([[0, *example.target[:-1]]]))
    hook.remove()
    return torch.cat(rows).double()


@pytest.mark.parametrize("name", [
    "encoder.block.1.layer.0.SelfAttention.o", "decoder.block.1.layer.0.SelfAttention.o",
    "decoder.block.0.layer.1.EncDecAttention.o", "encoder.block.0.layer.1.DenseReluDense.wo",
    "decoder.block.1.layer.2.DenseReluDense.wi"])
def test_statistics_equal_those_of_unpadded_sentences(origin, text, name):
    gram = reconstruction.gather(origin.network, text[1], [name], "cpu")[name]
    x = plain_inputs(origin.network, text[1], name)
    assert gram.tokens == len(x)
    assert torch.allclose(gram.matrix, x.T @ x / len(x), atol=1e-5 * float(gram.matrix.abs().max()))


def test_the_error_is_the_mean_squared_difference_of_outputs(origin, text):
    name = "encoder.block.0.layer.1.DenseReluDense.wo"
    gram = reconstruction.gather(origin.network, text[1], [name], "cpu")[name].matrix
    w = origin.network.get_submodule(name).weight.detach().double()
    other = w * (w.abs() > 0.1)
    x = plain_inputs(origin.network, text[1], name)
    expected = ((x @ (w - other).T) ** 2).sum(dim=1).mean()
    assert reconstruction.error(gram, w, other) == pytest.approx(float(expected), rel=1e-4)


def tune(made, text, budget=1 << 30):
    model = models.load(made / "origin.pth")
    logged = []
    reports = list(reconstruction.tune_exactly(
        model.network, bank.load(made / "pruned.npy"), *text, "cpu", budget=budget, damping=1e-4,
        curve=reconstruction.Curve(), log=logged.append))
    return reports, logged


def test_less_memory_means_more_passes_and_the_same_bank(made, text):
    one, few = tune(made, text)
    many, passes = tune(made, text, budget=5 * 8 * 48 ** 2)
    assert len([line for line in few if "statistics" in line]) == 1
    assert len([line for line in passes if "statistics" in line]) > 5
    for a, b in zip(one, many, strict=True):
        assert a.variant.key == b.variant.key
        assert all(torch.equal(a.variant.weights[n], b.variant.weights[n]) for n in a.variant.weights)


def test_too_little_memory_is_told_before_the_work(made, text):
    with pytest.raises(UserError, match="give --memory-budget at least that"):
        tune(made, text, budget=1000)


def test_tuning_lowers_every_variants_error_and_keeps_the_masks(made, text):
    pruned = bank.load(made / "pruned.npy")
    for report in tune(made, text)[0]:
        assert report.after < report.before, report.variant.key
        before = pruned.read(report.variant.key)
        for name, weight in report.variant.weights.items():
            assert torch.equal(before.masks[name], report.variant.masks[name])
            assert not weight[~report.variant.masks[name]].any()


def test_an_activation_that_is_not_finite_is_named(made, text):
    network = models.load(made / "origin.pth").network
    with torch.no_grad():
        network.encoder.block[1].layer[1].layer_norm.weight[3] = float("inf")
    with pytest.raises(UserError, match="encoder.block.1.layer.1.DenseReluDense.wi: its input is not finite"):
        reconstruction.gather(network, text[1], ["encoder.block.1.layer.1.DenseReluDense.wi"], "cpu")


def test_gated_feed_forwards_share_their_input():
    assert reconstruction.input_site("encoder.block.0.layer.1.DenseReluDense.wi_1").endswith("wi_0")


def test_lm_head_is_not_computed(made, text):
    model = models.load(made / "origin.pth")
    model.network.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("lm_head was computed"))
    assert len(list(reconstruction.tune_exactly(
        model.network, bank.load(made / "pruned.npy"), *text, "cpu", budget=1 << 30, damping=1e-4,
        curve=reconstruction.Curve(), log=lambda t: None))) == 28
