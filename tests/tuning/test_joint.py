import pytest
import torch

from common.errors import UserError
from common.pruning import bank as banks
from common.pruning import composition
from common.pruning.configurations import uniform
from common.pruning.variants import prune_scheme
from common.t5 import model as models
from common.t5.loss import Teacher, TranslationLoss, evaluate
from common.t5.model import Model
from common.t5.modules import prunable
from common.tuning.joint import JointTranslation
from tests.small import Text, scheme_of, small_network, write_bank

WI = "encoder.block.0.layer.1.DenseReluDense.wi"
RATES = (0.25, 0.5), (0.5, 0.8)


@pytest.fixture
def network():
    return small_network(dropout_rate=0.0)


@pytest.fixture
def bank(network, tmp_path):
    return write_bank(tmp_path / "b.npy", prune_scheme(Model(network, ""), scheme_of(network, *RATES, (0.0, 0.5))))


def configurations(network):
    return [uniform(prunable(network), *pair) for pair in RATES]


def composed(bank, configuration) -> Model:
    model = Model(small_network(dropout_rate=0.0), "")
    composition.compose(model, bank, configuration)
    return model


def test_the_loss_of_a_configuration_is_that_of_the_composed_model(network, bank):
    configuration, text = configurations(network)[1], Text()
    joint = JointTranslation(network, bank, "cpu", [configuration]).eval()
    expected = evaluate(TranslationLoss(composed(bank, configuration).network), text, "cpu")
    assert evaluate(joint, text, "cpu") == pytest.approx(expected, rel=1e-6)


def test_an_original_that_has_read_the_text_teaches_the_same(made, text):
    origin = models.load(made / "origin.pth")
    joint = JointTranslation(origin.network, banks.load(made / "tuned.npy"), "cpu", seed=1).train()
    batch = text[0].collate(text[0].epoch(0)[0])
    chosen = joint.draw()
    asked = float(joint.composed(chosen, batch)[0].detach())
    joint.teacher.read(text[0], "cpu")
    assert float(joint.composed(chosen, batch)[0].detach()) == pytest.approx(asked, rel=1e-5)


def test_corrections_get_the_gradient_that_the_composed_model_has_inside_its_masks(network, bank):
    """Distilled from the original, as in training."""
    joint = JointTranslation(network, bank, "cpu", seed=1).train()
    torch.manual_seed(0)
    chosen, batch = joint.draw(), next(Text().fixed())
    joint.composed(chosen, batch)[0].backward()
    model = Model(small_network(dropout_rate=0.0), "")
    for i in chosen:
        composition.install(model, joint.variants[i])
    TranslationLoss(model.network.train(), Teacher(network))(batch)[0].backward()
    for name, i in joint.corrected.items():
        gradient = joint.corrections[i].grad
        if name in model.masks:
            assert not gradient[~model.masks[name]].any()
            expected = torch.where(model.masks[name], model.network.get_parameter(name).grad, 0.0)
            assert torch.allclose(gradient, expected, atol=1e-4 * float(expected.abs().max()))
        else:  # q, k and v of an attention of which a variant without removed heads was drawn
            assert gradient is None
    trained = {id(p) for p in joint.corrections}
    assert all(p.grad is None for p in joint.parameters() if id(p) not in trained)
    assert all(p.grad is None for p in network.parameters())


def test_all_variants_that_keep_a_weight_get_the_same_correction(network, bank):
    joint = JointTranslation(network, bank, "cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for correction in joint.corrections:
            correction.normal_()
    for before, after in zip(joint.variants, joint.tuned(), strict=True):
        for name, mask in before.masks.items():
            expected = (before.weights[name] + joint.corrections[joint.corrected[name]].detach()) * mask
            assert torch.equal(after.weights[name], expected) and torch.equal(after.masks[name], mask)


def test_every_variant_is_drawn(network, bank):
    joint = JointTranslation(network, bank, "cpu")
    torch.manual_seed(0)
    assert {i for _ in range(60) for i in joint.draw()} == set(range(len(bank.entries)))


def test_a_configuration_that_prunes_nothing_is_not_drawn(network, bank):
    chosen = configurations(network)[1]
    dense = dict.fromkeys(chosen, 0.0)
    joint = JointTranslation(network, bank, "cpu", [dense, chosen, {}])
    assert joint.choices == [joint.draw()] and joint.fixed == joint.choices
    with pytest.raises(UserError, match="none of the configurations prunes anything"):
        JointTranslation(network, bank, "cpu", [dense, {}])


def test_what_a_seed_draws_does_not_depend_on_the_order_of_the_bank(network, bank):
    drawn = []
    for _ in range(2):
        joint = JointTranslation(network, bank, "cpu", seed=3)
        torch.manual_seed(0)
        drawn.append([{joint.variants[i].key for i in chosen} for chosen in (*joint.fixed, joint.draw())])
        bank.entries = dict(reversed(bank.entries.items()))
    assert drawn[0] == drawn[1]


def test_validation_is_spread_over_the_configurations_given(network, bank):
    joint = JointTranslation(network, bank, "cpu", [{WI: 0.5}] * 4 + [{WI: 0.8}] * 4)
    assert [joint.variants[chosen[0]].rates for chosen in joint.fixed] == [(0.5,), (0.5,), (0.8,), (0.8,)]


@pytest.mark.parametrize("given", [False, True])
def test_descent_lowers_the_loss_of_every_configuration_and_keeps_masks(network, bank, tmp_path, given):
    text, wanted = Text(pairs=16), configurations(network)
    joint = JointTranslation(network, bank, "cpu", wanted if given else None)
    optimizer = torch.optim.AdamW(joint.corrections, lr=1e-2)
    torch.manual_seed(0)
    for _ in range(6):
        for batch in text.fixed():
            loss, tokens = joint.train()(batch)
            (loss / tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    tuned = write_bank(tmp_path / "j.npy", joint.tuned(), "joint")
    for configuration in wanted:
        before, after = composed(bank, configuration), composed(tuned, configuration)
        assert before.masks.keys() == after.masks.keys()
        assert all(torch.equal(before.masks[name], mask) for name, mask in after.masks.items())
        losses = [evaluate(TranslationLoss(model.network), text, "cpu") for model in (before, after)]
        assert losses[1] < losses[0] - 0.05
