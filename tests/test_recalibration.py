import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import bank, composition, models, recalibration, training
from common.configs import read_configurations
from common.recalibration import loss_metrics, recalibrate
from common.reconstruction import run_stacks
from common.solver import solve, solve_weighted


def quiet(text):
    pass


def composed(made, n=1, name="tuned.npy"):
    model = models.load(made / "origin.pth")
    composition.compose(model, bank.load(made / name), read_configurations(made / "conf.json")[n])
    return model


def states_error(made, model, batches):
    """Mean squared difference of the two models' decoder states, the plain way."""
    original, total, count = models.load(made / "origin.pth").network, 0.0, 0
    with torch.no_grad():
        for batch in batches.fixed():
            valid = batch["labels"] >= 0
            difference = (run_stacks(original, batch) - run_stacks(model.network, batch))[valid]
            total, count = total + float(difference.square().sum()), count + int(valid.sum())
    return total / count


def test_a_metric_without_recalibration_is_refused(made, tmp_path, stage):
    result = stage("compose_model", "-m", made / "origin.pth", "-p", made / "tuned.npy", "-c", made / "conf.json", "-o",
                   tmp_path / "m.pth", "--metric", "loss")
    assert result.code == 2 and "--metric loss says how --recalibrate weighs errors" in result.err


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_recalibrating_the_original_changes_nothing(tmp_path, made, text, kind):
    """The sweep carries both models' states through every layer itself: for equal models the fit is the identity."""
    from tests.conftest import make_tokenizer, save_folder

    network = save_folder(tmp_path / kind, kind)
    model = models.Model(network, make_tokenizer().to_str())
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    other = save_folder(tmp_path / f"{kind}2", kind)
    recalibrate(other, model, text[1], "cpu", 1e-4, log=quiet)
    for name, p in model.network.named_parameters():
        assert torch.allclose(p, before[name], atol=1e-4), name


def test_it_brings_the_composed_model_nearer_and_keeps_masks(made, text):
    model = composed(made)
    before = states_error(made, model, text[1])
    recalibrate(models.load(made / "origin.pth").network, model, text[0], "cpu", 1e-4, log=quiet)
    assert states_error(made, model, text[1]) < 0.9 * before
    for name, mask in model.masks.items():
        assert not model.network.get_parameter(name)[~mask].any()


def test_the_first_layers_fit_equals_plain_least_squares(made, text):
    """Encoder layer 0: o on the inputs it receives after q, k, v, whose own inputs have not shifted."""
    model = composed(made)
    original = models.load(made / "origin.pth").network
    recalibrate(original, model, text[1], "cpu", 1e-9, log=quiet)
    name = "encoder.block.0.layer.0.SelfAttention"
    seen = {}
    for key, network in (("original", original), ("composed", model.network)):
        rows = []
        attention = network.get_submodule(name)
        hooks = [attention.o.register_forward_hook(lambda m, i, o, rows=rows: rows.append((i[0], o)))]
        with torch.no_grad():
            for batch in text[1].fixed():
                network.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                valid = batch["attention_mask"].bool()
                rows[-1] = tuple(x[valid].double() for x in rows[-1])
        for hook in hooks:
            hook.remove()
        seen[key] = [torch.cat(x) for x in zip(*rows, strict=True)]
    x, target = seen["composed"][0], seen["original"][1]
    mask = model.masks[f"{name}.o.weight"]
    for row in range(4):
        best = torch.linalg.lstsq(x[:, mask[row]], target[:, row, None]).solution[:, 0]
        mine = model.network.get_parameter(f"{name}.o.weight").detach()[row, mask[row]].double()
        residuals = [float((target[:, row] - x[:, mask[row]] @ w).square().sum()) for w in (mine, best)]
        assert residuals[0] == pytest.approx(residuals[1], rel=1e-3)


def least_squares(rows=3, inputs=5, tokens=40, keep=0.6, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=g, dtype=torch.float64)
    y, prior = torch.randn(tokens, rows, generator=g).double(), torch.randn(rows, inputs, generator=g).double()
    mask = torch.rand(rows, inputs, generator=g) < keep
    root = torch.randn(rows, rows, generator=g, dtype=torch.float64)
    return x.T @ x / tokens, y.T @ x / tokens, prior, mask, root @ root.T + torch.eye(rows)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), inputs=st.integers(1, 8), rank=st.integers(1, 12), keep=st.floats(0, 1),
       damping=st.sampled_from([1e-4, 1e-2, 1.0]), seed=st.integers(0, 1000))
def test_the_weighted_fit_equals_brute_force(rows, inputs, rank, keep, damping, seed):
    gram, cross, prior, mask, metric = least_squares(rows, inputs, rank, keep, seed)
    mine = solve_weighted(gram, cross, prior, mask, metric, damping, tolerance=1e-10).weight
    ridge = damping * gram.diagonal().mean()
    system = torch.kron(metric, gram + ridge * torch.eye(inputs))  # of the weights row by row
    right = (metric @ (cross + ridge * prior)).flatten()
    kept = mask.flatten()
    expected = torch.zeros(rows * inputs, dtype=torch.float64)
    expected[kept] = torch.linalg.solve(system[kept][:, kept], right[kept])
    assert not mine[~mask].any()
    assert torch.allclose(mine.flatten(), expected, atol=1e-7 / damping + 1e-6)


def test_with_an_equal_metric_the_weighted_fit_is_the_plain_one():
    gram, cross, prior, mask, _ = least_squares()
    plain = solve(gram, cross, prior, mask, tolerance=1e-9).weight
    weighted = solve_weighted(gram, cross, prior, mask, 3.0 * torch.eye(3), tolerance=1e-9).weight
    assert torch.allclose(weighted, plain, atol=1e-6) and not weighted[~mask].any()


@pytest.mark.parametrize("name", ["encoder.block.1.layer.1.DenseReluDense.wi",
                                  "decoder.block.0.layer.1.EncDecAttention.k",
                                  "decoder.block.1.layer.2.DenseReluDense.wo"])
def test_loss_metrics_are_the_moments_of_the_outputs_gradients(made, text, name):
    network = models.load(made / "origin.pth").network.eval()
    metric = loss_metrics(network, text[1], "cpu")[name]
    rows = []
    for batch in text[1].fixed():
        added = []  # a zero added to the output has the output's gradient
        hook = network.get_submodule(name).register_forward_hook(
            lambda module, inputs, y, added=added: added.append(torch.zeros_like(y, requires_grad=True)) or
            y + added[0])
        training.TranslationLoss(network)(batch)[0].backward()
        hook.remove()
        of_source = name.startswith("encoder") or name.endswith(".k")
        rows.append(added[0].grad[batch["attention_mask"].bool() if of_source else batch["labels"] >= 0])
    g = torch.cat(rows)
    expected = g.T @ g
    assert torch.allclose(metric, expected / expected.diagonal().mean() + torch.eye(len(expected)), atol=1e-4)


def test_loss_metrics_leave_the_network_as_it_was(made, text):
    network = models.load(made / "origin.pth").network.eval()
    loss_metrics(network, text[1], "cpu")
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert not any(m._forward_hooks for m in network.modules())


@pytest.mark.parametrize(("name", "extra"), [
    ("compose_model", []), ("model-level_finetuning", ["--epochs", 1, "--lr", 1e-9])])
def test_the_stages_recalibrate(made, tmp_path, stage, name, extra):
    common = ["-m", made / "origin.pth", "-p", made / "tuned.npy", "-c", made / "conf.json", "-n", 1,
              "--data-dir", made / "text", *extra]
    stats = [] if name == "compose_model" else ["--stats", tmp_path / "s.csv"]
    result = stage(name, *common, *stats, "--recalibrate", "-o", tmp_path / "r.pth")
    assert result.code == 0 and "recalibrated on 200 sentence pairs" in result.err
    made_again, plain = models.load(tmp_path / "r.pth"), composed(made)
    assert made_again.masks.keys() == plain.masks.keys()
    weight = "decoder.block.1.layer.2.DenseReluDense.wo.weight"
    assert not torch.equal(made_again.network.get_parameter(weight), plain.network.get_parameter(weight))


def test_the_metric_changes_the_fit_and_keeps_masks(made, text):
    plain, weighted = composed(made), composed(made)
    for model, gradients in ((plain, None), (weighted, text[1])):
        recalibrate(models.load(made / "origin.pth").network, model, text[1], "cpu", 1e-4, gradients, log=quiet)
    weight = "decoder.block.1.layer.2.DenseReluDense.wo.weight"
    a, b = (m.network.get_parameter(weight) for m in (plain, weighted))
    assert not torch.allclose(a, b, atol=1e-4) and not b[~weighted.masks[weight]].any()


def test_a_layer_whose_fit_fails_is_named(made, text, monkeypatch):
    def fail(*args, **kwargs):
        raise ArithmeticError("no")

    monkeypatch.setattr(recalibration, "solve", fail)
    with pytest.raises(training.UserError, match="encoder.block.0.layer.0.SelfAttention.q: no; a larger --damping"):
        recalibrate(models.load(made / "origin.pth").network, composed(made), text[1], "cpu", 1e-4, log=quiet)


def test_a_model_that_meets_the_target_is_not_recalibrated(made, tmp_path, stage):
    result = stage("model-level_finetuning", "-m", made / "origin.pth", "-p", made / "tuned.npy", "-c",
                   made / "conf.json", "--data-dir", made / "text", "--recalibrate", "--target-loss", 1000, "-o",
                   tmp_path / "r.pth", "--stats", tmp_path / "s.csv")
    assert result.code == 0 and "not recalibrated: the composed model's validation loss" in result.err
    plain = composed(made, 0)
    for name, p in models.load(tmp_path / "r.pth").network.named_parameters():
        assert torch.equal(p, plain.network.get_parameter(name)), name
