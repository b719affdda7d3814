import pytest
import torch

from common.errors import UserError
from common.pruning import composition
from common.pruning.configurations import uniform
from common.pruning.variants import prune_scheme
from common.t5.model import Model
from common.t5.modules import prunable
from common.tuning import recalibration
from common.tuning.recalibration import recalibrate, recalibrate_composed
from tests.small import Text, scheme_of, seen_by_hooks, small_network, states_of, write_bank

TEXT = Text()
SELF = "encoder.block.0.layer.0.SelfAttention"
WI, WO = (f"decoder.block.1.layer.2.DenseReluDense.{part}" for part in ("wi", "wo"))


def pruned(folder, network=None, tuned=None):
    """Return a model with half of the heads and of the weights removed, and the bank it is out of."""
    network = network or small_network()
    bank = write_bank(folder / "b.npy", prune_scheme(Model(network, ""), scheme_of(network, (0.5, 0.5))), tuned)
    model = Model(network, "")
    composition.compose(model, bank, uniform(prunable(network), 0.5, 0.5))
    return model, bank


@torch.no_grad()
def states_error(original, network) -> float:
    """Return the mean squared difference of the two networks' decoder states, the plain way."""
    total = count = 0
    for batch in TEXT.fixed():
        a, b = (states_of(n, batch) for n in (original, network))
        valid = batch["labels"] >= 0
        total, count = total + float((a - b)[valid].square().sum()), count + int(valid.sum())
    return total / count


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_recalibrating_the_original_changes_nothing(kind):
    """The sweep carries both models' states through every layer: for equal models the fit is the identity."""
    model = Model(small_network(kind), "")
    recalibrate(small_network(kind), model, TEXT, "cpu")
    for (name, p), before in zip(model.network.named_parameters(), small_network(kind).parameters(), strict=True):
        assert torch.allclose(p, before, atol=1e-3), name


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_it_brings_the_composed_model_nearer_and_keeps_masks(tmp_path, kind):
    model, _ = pruned(tmp_path, small_network(kind))
    original = small_network(kind)
    before = states_error(original, model.network)
    recalibrate(original, model, TEXT, "cpu")
    assert states_error(original, model.network) < 0.8 * before
    for name, mask in model.masks.items():
        assert not model.network.get_parameter(name)[~mask].any()
    for a, b in zip(original.parameters(), small_network(kind).parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_later_wo_is_fitted_to_put_the_stream_right_again(tmp_path):
    """Its target is the original's stream behind it, less the composed model's before it."""
    (model, _), original, name = pruned(tmp_path), small_network(), "encoder.block.1.layer.1.DenseReluDense.wo"
    recalibrate(original, model, TEXT, "cpu")

    @torch.no_grad()
    def streams(network, i):  # behind encoder layer i's attention (input of its feed-forward's norm), and after it
        rows = []
        layer = network.encoder.block[i].layer[1]
        handle = layer.register_forward_hook(lambda m, a, y: rows.append((a[0][0], y[0])))
        for source, _ in TEXT.pairs:
            network.encoder(source[None])
        handle.remove()
        return [torch.cat(part) for part in zip(*rows, strict=True)]

    target = streams(original, 1)[1] - streams(model.network, 1)[0]
    x = seen_by_hooks(model.network, TEXT, [name])[name][0]
    found, mask = model.network.get_parameter(f"{name}.weight").detach(), model.masks[f"{name}.weight"]
    for row in range(0, 32, 5):
        best = torch.linalg.lstsq(x[:, mask[row]], target[:, row, None], driver="gelsd").solution[:, 0]
        left = [float((target[:, row] - x[:, mask[row]] @ w).square().sum()) for w in (found[row, mask[row]], best)]
        assert left[0] == pytest.approx(left[1], rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("keep", [False, True])
def test_wi_aims_at_the_originals_outputs_or_after_joint_tuning_at_its_own(tmp_path, keep):
    """A wi of other signs than the original's: by its own outputs it keeps them."""
    model, name = Model(small_network(), ""), "encoder.block.0.layer.1.DenseReluDense.wi.weight"
    with torch.no_grad():
        model.network.get_parameter(name).neg_()
    recalibrate(small_network(), model, TEXT, "cpu", keep_hidden=keep)
    expected = small_network().get_parameter(name) * (-1 if keep else 1)
    assert torch.allclose(model.network.get_parameter(name), expected, atol=1e-2)


@pytest.mark.parametrize("tuned", ["exact", "joint"])
def test_the_bank_says_what_wi_aims_at(tmp_path, monkeypatch, tuned):
    (model, bank), told = pruned(tmp_path, tuned=tuned), []
    monkeypatch.setattr(recalibration, "recalibrate", lambda *a: told.append(a[-1]))
    recalibrate_composed(Model(small_network(), ""), model, bank, TEXT, "cpu")
    assert told == [tuned == "joint"]


@pytest.mark.parametrize(("target", "swept"), [(1000.0, False), (0.1, True), (None, True)])
def test_a_model_that_meets_the_target_is_not_recalibrated(tmp_path, capsys, target, swept):
    model, bank = pruned(tmp_path)
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    recalibrate_composed(Model(small_network(), ""), model, bank, TEXT, "cpu", TEXT, target)
    assert swept == any(not torch.equal(p, before[name]) for name, p in model.network.named_parameters())
    said = "recalibrated on 40 sentence pairs" if swept else "not recalibrated: the composed model's validation loss"
    assert capsys.readouterr().err.startswith(said)


def test_a_layer_whose_fit_fails_is_named(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ArithmeticError("no")

    model, _ = pruned(tmp_path)
    monkeypatch.setattr(recalibration, "solve_together", fail)
    with pytest.raises(UserError, match=f"^{SELF}.q: no$"):
        recalibrate(small_network(), model, TEXT, "cpu")


def test_blocks_that_receive_nothing_keep_their_weights_and_the_others_are_fitted(tmp_path):
    network = small_network()
    with torch.no_grad():
        network.get_parameter(f"{WI}.weight").zero_()
        network.get_parameter(f"{SELF}.v.weight").zero_()
    original = small_network()
    original.load_state_dict(network.state_dict())
    model, _ = pruned(tmp_path, network)
    kept = {n: model.network.get_parameter(n).detach().clone() for n in (f"{WO}.weight", f"{SELF}.o.weight")}
    before = states_error(original, model.network)
    recalibrate(original, model, TEXT, "cpu")
    for name, weight in kept.items():
        assert torch.allclose(model.network.get_parameter(name), weight, atol=1e-6)
    assert states_error(original, model.network) < 0.8 * before


@pytest.mark.parametrize("changes", [{}, {"num_heads": 2}, {"d_ff": 2}])
def test_one_token_of_text_is_enough(tmp_path, changes):
    model, _ = pruned(tmp_path, small_network(**changes))
    recalibrate(small_network(**changes), model, Text(pairs=1, longest=1), "cpu")
    assert all(torch.isfinite(p).all() for p in model.network.parameters())
