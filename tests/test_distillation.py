import pytest
import torch

from common import bank, composition, models, training
from common.configs import read_configurations
from common.distillation import BlockReconstruction, JointTranslation
from common.files import UserError


def origin_network(made):
    return models.load(made / "origin.pth").network


def test_the_joint_loss_of_a_configuration_is_that_of_the_composed_model(made, text):
    configuration = read_configurations(made / "conf.json")[1]
    opened = bank.load(made / "tuned.npy")
    joint = JointTranslation(origin_network(made), opened, "cpu", [configuration]).eval()
    model = models.load(made / "origin.pth")
    composition.compose(model, opened, configuration)
    expected = training.evaluate(training.TranslationLoss(model.network), text[1], "cpu")
    assert training.evaluate(joint, text[1], "cpu") == pytest.approx(expected, rel=1e-6)


def test_corrections_get_the_gradient_that_the_composed_model_has_inside_its_masks(made, text):
    joint = JointTranslation(origin_network(made), bank.load(made / "tuned.npy"), "cpu", share=0)
    chosen, batch = joint.draw(), text[0].collate(text[0].dataset.examples[:8])
    joint.composed(chosen, batch)[0].backward()
    model = models.load(made / "origin.pth")
    for i in chosen:
        composition.install(model, joint.variants[i])
    training.TranslationLoss(model.network.eval())(batch)[0].backward()
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
    assert all(p.grad is None for p in joint._network[0].parameters())


def test_all_variants_that_keep_a_weight_get_the_same_correction(made, text):
    joint = JointTranslation(origin_network(made), bank.load(made / "tuned.npy"), "cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for correction in joint.corrections:
            correction.normal_()
    for before, after in zip(joint.variants, joint.tuned(), strict=True):
        for name, mask in before.masks.items():
            expected = (before.weights[name] + joint.corrections[joint.corrected[name]].detach()) * mask
            assert torch.equal(after.weights[name], expected) and torch.equal(after.masks[name], mask)


def test_every_variant_is_drawn(made):
    joint = JointTranslation(origin_network(made), bank.load(made / "tuned.npy"), "cpu")
    torch.manual_seed(0)
    assert {i for _ in range(40) for i in joint.draw()} == set(range(28))


def test_a_configuration_that_prunes_nothing_is_not_drawn(made):
    chosen = read_configurations(made / "conf.json")[1]
    network, opened = origin_network(made), bank.load(made / "tuned.npy")
    dense = dict.fromkeys(chosen, 0.0)
    joint = JointTranslation(network, opened, "cpu", [dense, chosen, {}])
    assert joint.choices == [joint.draw()] and joint.fixed == joint.choices
    with pytest.raises(UserError, match="none of the configurations prunes anything"):
        JointTranslation(network, opened, "cpu", [dense, {}])


def test_what_a_seed_draws_does_not_depend_on_the_order_of_the_bank(made):
    network, opened, drawn = origin_network(made), bank.load(made / "tuned.npy"), []
    for _ in range(2):
        joint = JointTranslation(network, opened, "cpu", seed=3)
        torch.manual_seed(0)
        drawn.append([{joint.variants[i].key for i in chosen} for chosen in (*joint.fixed, joint.draw())])
        opened.entries = dict(reversed(opened.entries.items()))
    assert drawn[0] == drawn[1]


def test_validation_is_spread_over_the_configurations_given(made):
    configurations = [{"encoder.block.0.layer.1.DenseReluDense.wi": 0.5}, {"encoder.block.0.layer.1.DenseReluDense.wi":
                                                                          0.8}]
    joint = JointTranslation(origin_network(made), bank.load(made / "tuned.npy"), "cpu",
                             [configurations[0]] * 4 + [configurations[1]] * 4)
    assert [joint.variants[chosen[0]].rates for chosen in joint.fixed] == [(0.5,), (0.5,), (0.8,), (0.8,)]


@pytest.mark.parametrize("given", [False, True])
def test_joint_tuning_lowers_the_loss_of_every_configuration(made, text, tmp_path, stage, given):
    extra = ["-c", made / "conf.json"] if given else []
    result = stage("block-level_finetuning", "-m", made / "origin.pth", "-p", made / "tuned.npy", "-o",
                   tmp_path / "j.npy", "--stats", tmp_path / "j.csv", "--solver", "joint", "--epochs", 2, "--lr", 3e-3,
                   "--data-dir", made / "text", "--batch-tokens", 400, *extra)
    assert result.code == 0, result.err
    assert bank.load(tmp_path / "j.npy").keeps_hidden  # its wi was not tuned for its own outputs
    for configuration in read_configurations(made / "conf.json"):
        losses = []
        for path in (made / "tuned.npy", tmp_path / "j.npy"):
            model = models.load(made / "origin.pth")
            composition.compose(model, bank.load(path), configuration)
            for name, mask in model.masks.items():
                assert not model.network.get_parameter(name)[~mask].any()
            losses.append(training.evaluate(training.TranslationLoss(model.network), text[1], "cpu"))
        assert losses[1] < losses[0] - 0.05


@pytest.mark.parametrize(("flags", "message"), [
    (["-c", "conf.json"], "-c and --distillation say how --solver joint trains"),
    (["--solver", "adamw", "--distillation", 0.1], "-c and --distillation say how --solver joint trains"),
    (["--resume"], "the exact solver keeps no checkpoint"),
    (["--attention-error", 0.1], "give their number"),
    (["--solver", "adamw", "--attention-steps", 5], "belong to --solver exact, not adamw"),
    (["--solver", "joint", "--hidden-sentences", 5], "belong to --solver exact, not joint"),
])
def test_flags_that_the_solver_would_ignore_are_refused(made, tmp_path, stage, flags, message):
    (tmp_path / "s.csv").write_text("kept")
    flags = [made / f if f == "conf.json" else f for f in flags]
    result = stage("block-level_finetuning", "-m", made / "origin.pth", "-p", made / "tuned.npy", "-o",
                   tmp_path / "j.npy", "--stats", tmp_path / "s.csv", *flags)
    assert result.code == 2 and message in result.err and (tmp_path / "s.csv").read_text() == "kept"


def test_block_errors_are_those_of_single_sentences(made, text):
    """The relative error of one linear variant, measured without batches or padding."""
    network, opened = origin_network(made), bank.load(made / "pruned.npy")
    objective = BlockReconstruction(network, opened, text[1], "cpu")
    errors = dict(zip([v.key for v in objective.variants], objective.errors(text[1], "cpu"), strict=True))
    key = ("encoder.block.1.layer.1.DenseReluDense.wo", (0.8,))
    variant, rows = opened.read(key), []
    hook = network.get_submodule(key[0]).register_forward_hook(lambda m, i, o: rows.append((i[0][0], o[0])))
    with torch.no_grad():
        for example in text[1].dataset.examples:
            network.encoder(input_ids=torch.tensor([example.source]))
    hook.remove()
    x, y = (torch.cat(z) for z in zip(*rows, strict=True))
    expected = (x @ variant.weights[f"{key[0]}.weight"].T - y).square().sum() / y.square().sum()
    assert errors[key] == pytest.approx(float(expected), rel=0.02)


def test_the_exact_solver_refuses_heads_that_were_tuned(made, tmp_path, stage):
    """Its statistics are those of the original's q, k and v; o fitted to them would not fit tuned ones."""
    common = ["-m", made / "origin.pth", "--data-dir", made / "text", "--stats", tmp_path / "s.csv"]
    assert stage("block-level_finetuning", *common, "-p", made / "tuned.npy", "-o", tmp_path / "g.npy", "--solver",
                 "adamw", "--epochs", 1).code == 0
    result = stage("block-level_finetuning", *common, "-p", tmp_path / "g.npy", "-o", tmp_path / "e.npy", "--overwrite")
    assert result.code == 2 and "SelfAttention: its q was tuned already" in result.err
    assert stage("block-level_finetuning", *common, "-p", made / "tuned.npy", "-o", tmp_path / "e.npy",
                 "--overwrite").code == 0
