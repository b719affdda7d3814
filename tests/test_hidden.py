import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import bank, composition, data, hidden, models, reconstruction
from common.configs import read_configurations
from common.recalibration import recalibrate
from common.solver import solve_rows
from tests.conftest import save_folder
from tests.test_recalibration import quiet
from tests.test_reconstruction import brute_force


def tune(made, text, budget=1 << 30):
    network, logged = models.load(made / "origin.pth").network, []
    curve = reconstruction.Curve()
    reports = list(hidden.tune(network, bank.load(made / "pruned.npy"), *text, "cpu", budget=budget, damping=1e-4,
                               curve=curve, log=logged.append))
    return network, reports, curve, logged


@torch.no_grad()
def plain_error(network, batches, block, weight) -> float:
    """Return the relative error of a ReLU's units, one sentence at a time, without padding."""
    sums = torch.zeros(2, dtype=torch.float64)

    def hook(module, inputs):
        h, mine = torch.relu(inputs[0] @ module.weight.T), torch.relu(inputs[0] @ weight.T)
        sums.add_(torch.stack([(mine - h).double().square().sum(), h.double().square().sum()]))

    handle = network.get_submodule(block).register_forward_pre_hook(hook)
    for example in batches.dataset.examples:
        network(input_ids=torch.tensor([example.source]), use_cache=False,
                decoder_input_ids=torch.tensor([[0, *example.target[:-1]]]))
    handle.remove()
    return float(sums[0] / sums[1])


def test_the_moments_of_units_equal_a_sum_over_tokens():
    x, a = torch.randn(7, 3), torch.tensor([[1.0, 0.0], [0.0, 4.0], [0.0, 0.0], [1.0, 0.5], [0.0, 0.0], [1.0, 0.0],
                                            [0.0, 0.0]])
    grams = hidden.row_grams(x, a)
    for unit in range(2):
        floor = 0.5 * sum(float(w) for w in a[:, unit]) / 7
        expected = sum((float(w) + floor) * torch.outer(t, t) for w, t in zip(a[:, unit], x, strict=True)) / 7
        assert torch.allclose(grams[unit], expected, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(masks=st.integers(1, 3), rows=st.integers(1, 5), inputs=st.integers(1, 10), rank=st.integers(0, 15),
       keep=st.floats(0, 1), damping=st.sampled_from([1e-4, 1e-2, 1.0]), seed=st.integers(0, 1000))
def test_rows_with_moments_of_their_own_equal_brute_force(masks, rows, inputs, rank, keep, damping, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, rank, inputs, generator=g, dtype=torch.float64) * (1 + torch.arange(rows))[:, None, None]
    grams, target = x.transpose(1, 2) @ x, torch.randn(rows, inputs, generator=g, dtype=torch.float64)
    mask = torch.rand(masks, rows, inputs, generator=g) < keep
    solution = solve_rows(grams, (grams @ target[:, :, None])[:, :, 0], target, mask, damping, tolerance=1e-9)
    assert solution.weight.shape == mask.shape and not solution.weight[~mask].any()
    for row in range(rows):
        expected = brute_force(grams[row], target[row].repeat(masks, 1), mask[:, row], damping) if rank else \
            torch.where(mask[:, row], target[row], 0.0)  # without moments the prior stays
        assert torch.allclose(solution.weight[:, row], expected, atol=1e-8 / damping + 1e-6)


def test_moments_that_are_not_finite_are_not_passed_on():
    grams = torch.eye(3).repeat(2, 1, 1)
    grams[1, 0, 0] = torch.nan
    with pytest.raises(ArithmeticError, match="residual"):
        solve_rows(grams, torch.ones(2, 3), torch.ones(2, 3), torch.ones(1, 2, 3, dtype=torch.bool))


def test_the_units_come_nearer_than_by_least_squares_on_what_feeds_them(made, text):
    network, reports, curve, _ = tune(made, text)
    exact, pruned = bank.load(made / "tuned.npy"), bank.load(made / "pruned.npy")
    assert {r.variant.key for r in reports} == {k for k in pruned.entries if k[0].endswith(".wi")}
    for report in reports:
        block, name = report.variant.block, f"{report.variant.block}.weight"
        weight = report.variant.weights[name]
        assert torch.equal(report.variant.masks[name], pruned.read(report.variant.key).masks[name])
        assert not weight[~report.variant.masks[name]].any()
        assert report.after == pytest.approx(plain_error(network, text[0], block, weight), rel=1e-3)
        assert report.valid_after == pytest.approx(plain_error(network, text[1], block, weight), rel=1e-3)
        masked = pruned.read(report.variant.key).weights[name]
        assert report.valid_before == pytest.approx(plain_error(network, text[1], block, masked), rel=1e-3)
        by_outputs = exact.read(report.variant.key).weights[name]
        assert report.after < plain_error(network, text[0], block, by_outputs)
    assert curve.train[0] / len(reports) == pytest.approx(sum(r.before for r in reports) / len(reports))


@pytest.mark.parametrize("part", ["wi_0", "wi_1"])
def test_a_gated_units_weights_are_its_squared_derivative(tmp_path, part):
    network = save_folder(tmp_path / "mt5", "mt5").eval()
    block = f"encoder.block.0.layer.1.DenseReluDense.{part}"
    x, units = torch.randn(5, network.config.d_model), hidden._Units(network, block)
    dense = network.get_submodule(block.rpartition(".")[0])
    with torch.no_grad():
        mine, y, step = units.weights(x, slice(2, 6)), [x @ dense.wi_0.weight.T, x @ dense.wi_1.weight.T], 1e-2
        at = 0 if part == "wi_0" else 1

        def h(shift):
            moved = [v + shift * (i == at) for i, v in enumerate(y)]
            return (dense.act(moved[0]) * moved[1])[:, 2:6]

        slope = (h(step) - h(-step)) / (2 * step)
        errors = units.errors(x, [units.weight, 0 * units.weight], [slice(0, 3), slice(3, None)])
    assert torch.allclose(mine, slope.square(), atol=1e-3)
    assert errors == pytest.approx([0.0, 1.0], abs=1e-6)


def test_a_unit_that_never_passes_anything_on_is_fitted_to_all_tokens(made):
    network = models.load(made / "origin.pth").network
    units = hidden._Units(network, "encoder.block.0.layer.1.DenseReluDense.wi")
    x = torch.rand(6, network.config.d_model)
    units.weight = units.weight.clone()
    units.weight[1] = -1.0
    assert torch.equal(units.weights(x, slice(1, 2)), torch.ones(6, 1))


def test_less_memory_means_more_passes_and_the_same_weights(made, text):
    _, one, _, few = tune(made, text)
    tokens = max(sum(len(getattr(e, side)) for split in text for e in split.dataset.examples)
                 for side in ("source", "target"))
    width = one[0].variant.weights[f"{one[0].variant.block}.weight"].shape[1]
    _, many, _, passes = tune(made, text, budget=2 * max(
        4 * tokens * width, 16 * width ** 2 + 32 * tokens + 64 * width * 2) + 1)
    assert len(few) < len(passes)
    for a, b in zip(one, many, strict=True):
        name = f"{a.variant.block}.weight"
        assert a.variant.key == b.variant.key
        assert torch.allclose(a.variant.weights[name], b.variant.weights[name], atol=1e-3)


def test_too_little_memory_is_told_before_any_work(work, stage):
    flags = ("-m", work / "origin.pth", "-p", work / "pruned.npy", "-o", work / "small.npy", "--data-dir",
             work / "text", "--stats", work / "small.csv", "--hidden-sentences", 100, "--memory-budget")
    result = stage("block-level_finetuning", *flags, "0.2M")
    assert result.code == 2 and "DenseReluDense.wi: its hidden units need " in result.err and "1/28" not in result.err
    enough = re.search(r"need (\d+) MiB; give --memory-budget at least that, or fewer --hidden-sent", result.err)[1]
    assert stage("block-level_finetuning", *flags, f"{enough}M").code == 0


def test_the_stage_writes_a_bank_whose_wi_the_sweep_aims_at(work, stage):
    flags = ("--data-dir", work / "text", "--stats", work / "units.csv")
    done = stage("block-level_finetuning", "-m", work / "origin.pth", "-p", work / "pruned.npy", "-o",
                 work / "units.npy", "--hidden-sentences", 100, *flags)
    assert done.code == 0, done.err
    made, exact = bank.load(work / "units.npy"), bank.load(work / "tuned.npy")
    assert set(made.entries) == set(exact.entries) and made.keeps_hidden and not exact.keeps_hidden
    for key in made.entries:
        name = next(iter(made.read(key).weights))
        same = torch.allclose(made.read(key).weights[name], exact.read(key).weights[name], atol=1e-3)
        assert same != hidden.is_input(key[0]), key
    done = stage("compose_model", "-m", work / "origin.pth", "-p", work / "units.npy", "-c", work / "conf.json", "-n",
                 1, "-o", work / "swept.pth", "--recalibrate", *flags[:2], "--calibration-sentences", 50)
    assert done.code == 0, done.err
    origin = models.load(work / "origin.pth")
    options = data.DataOptions("multi30k", work / "text", "en", "de", "test_2016_flickr")
    few = data.Batches(data.sample(data.read_pairs(options, "train"), 50, 0), origin, 2048)
    model = models.load(work / "origin.pth")
    composition.compose(model, made, read_configurations(work / "conf.json")[1])
    recalibrate(origin.network, model, few, "cpu", 1e-4, keep_hidden=True, log=quiet)
    for name, p in models.load(work / "swept.pth").network.named_parameters():
        assert torch.allclose(p, model.network.get_parameter(name), atol=1e-4), name
