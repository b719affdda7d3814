"""A model that was pruned before as the original of a second round, through all that makes a model of it."""

import json

import pytest
import torch

from common.pruning import composition
from common.pruning.configurations import uniform
from common.pruning.variants import prune_scheme, prune_scheme_by_obs
from common.t5 import model as models
from common.t5.model import Model
from common.t5.modules import prunable
from common.t5.network import sparsity
from common.text.batches import Batches
from common.training.finetuning import finetune
from common.training.loop import FitOptions
from common.tuning import exact
from common.tuning.joint import JointTranslation
from common.tuning.recalibration import recalibrate, recalibrate_composed
from tests.small import demo_pairs, make_tokenizer, scheme_of, small_network, write_bank

HEADS, WEIGHTS = 0.5, 0.6  # of the first round; the second is milder, and of o alone in one variant
RATES = (0.25, 0.3), (0.0, 0.2)


class Rounds:
    """The pruned model, a second round's bank pruned and tuned, and the text; everything made anew on request."""

    def __init__(self, folder, obs: bool):
        self.json = make_tokenizer().to_str()
        plain = self.network()
        self.text = Batches(demo_pairs("train")[:24], Model(plain, self.json), 300)
        bank = write_bank(folder / "1.npy", prune_scheme(Model(plain, ""), scheme_of(plain, (HEADS, WEIGHTS))))
        first = Model(plain, self.json)
        composition.compose(first, bank, uniform(prunable(plain), HEADS, WEIGHTS))
        self.file = folder / "first.pth"
        models.save(self.file, first)
        model = self.model()
        scheme = scheme_of(model.network, *RATES)
        made = prune_scheme_by_obs(model, scheme, self.text, "cpu") if obs else prune_scheme(model, scheme)
        self.bank = write_bank(folder / "2.npy", made, origin=model.identity)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exact, "ATTENTION_ERROR", 0.0)  # steps for every attention
            tuned = exact.tune(model.network, self.bank, self.text, self.text, "cpu", steps=4)
            self.tuned = write_bank(folder / "3.npy", (r.variant for r in tuned), "exact", model.identity)
        self.masks = model.masks

    def network(self):
        return small_network(num_heads=8, d_kv=4, vocab_size=300)

    def model(self) -> Model:
        return models.load(self.file)

    def composed(self, rates=RATES[0]) -> Model:
        model = self.model()
        composition.compose(model, self.tuned, uniform(prunable(model.network), *rates))
        return model


@pytest.fixture(scope="module", params=["l1", "obs"])
def rounds(request, tmp_path_factory):
    return Rounds(tmp_path_factory.mktemp("rounds"), request.param == "obs")


def stays_removed(rounds, weights, masks) -> bool:
    """Tell whether weights, by name, are zero where the first round or their own mask says so."""
    both = [(weights[name], old, masks.get(name, old)) for name, old in rounds.masks.items() if name in weights]
    return all(not (mask & ~old).any() and not weight[~mask].any() for weight, old, mask in both)


def test_every_variant_of_the_bank_lacks_what_the_first_round_removed(rounds):
    for key in rounds.bank.entries:
        variant = rounds.bank.read(key)
        assert stays_removed(rounds, variant.weights, variant.masks), key


def test_exact_tuning_with_attention_steps_keeps_it_so_and_lowers_errors(rounds):
    moved = set()
    for key in rounds.bank.entries:
        before, variant = rounds.bank.read(key), rounds.tuned.read(key)
        assert stays_removed(rounds, variant.weights, variant.masks), key
        assert all(torch.equal(before.masks[name], mask) for name, mask in variant.masks.items())
        moved |= {n.split(".")[-2] for n, w in variant.weights.items() if not torch.equal(w, before.weights[n])}
    assert moved == {"q", "k", "v", "o", "wi", "wo"}


@pytest.mark.parametrize("rates", RATES)
def test_a_composed_model_is_sparser_than_the_one_it_is_of(rounds, rates):
    model = rounds.composed(rates)
    assert stays_removed(rounds, dict(model.network.named_parameters()), model.masks)
    assert model.masks.keys() == rounds.masks.keys()
    assert sparsity(model.network)[1] > sparsity(rounds.model().network)[1]


def test_blocks_that_the_second_configuration_leaves_out_stay_pruned(rounds):
    model, wi = rounds.model(), "encoder.block.0.layer.1.DenseReluDense.wi"
    composition.compose(model, rounds.tuned, {wi: 0.3})
    for name, mask in rounds.masks.items():
        assert torch.equal(model.masks[name], mask) == (name != f"{wi}.weight")
    assert stays_removed(rounds, dict(model.network.named_parameters()), model.masks)


def test_recalibration_keeps_it_removed(rounds):
    model = rounds.composed()
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    recalibrate_composed(rounds.model(), model, rounds.tuned, rounds.text, "cpu")
    after = dict(model.network.named_parameters())
    assert stays_removed(rounds, after, model.masks)
    for name in rounds.masks:  # a stack's first attention receives what it was tuned on, up to rounding
        moved = float((after[name].detach() - before[name]).norm() / before[name].norm())
        assert (moved < 0.01) == (".block.0.layer.0." in name), (name, moved)


def test_recalibration_of_what_is_not_pruned_again_keeps_the_first_rounds_masks(rounds):
    model = rounds.model()
    recalibrate(rounds.network(), model, rounds.text, "cpu")  # towards the first original
    assert stays_removed(rounds, dict(model.network.named_parameters()), model.masks)


def test_joint_tuning_keeps_it_removed(rounds):
    joint = JointTranslation(rounds.model().network, rounds.tuned, "cpu")
    with torch.no_grad():
        for correction in joint.corrections:
            correction.normal_()
    for variant in joint.tuned():
        assert stays_removed(rounds, variant.weights, variant.masks), variant.key


def test_fine_tuning_keeps_it_removed_also_in_the_file(rounds, tmp_path):
    model = rounds.composed()
    before = model.network.shared.weight.detach().clone()
    options = FitOptions(epochs=1, lr=1e-2, stats=tmp_path / "s.csv", checkpoint=tmp_path / "c")
    finetune("a test", {}, model, {}, rounds.text, rounds.text, options, tmp_path / "m.pth", "cpu")
    written = models.load(tmp_path / "m.pth")
    assert stays_removed(rounds, dict(written.network.named_parameters()), written.masks)
    assert written.masks.keys() == rounds.masks.keys() and not torch.equal(written.network.shared.weight, before)


def test_config_generator_refuses_to_remove_all_heads_that_are_left(rounds, tmp_path, stage):
    def generate(rate, name):
        return stage("config_generator", "-m", rounds.file, "-o", tmp_path / name, "--attention", rate, "--linear", 0.5)

    refused = generate(0.9, "a.json")  # 4 of 8 heads are there: 3.6 of them round to 4
    assert refused.code == 2 and "SelfAttention: pruning rate 0.9 removes all 4 heads" in refused.err
    assert "configuration 0" in refused.err and not (tmp_path / "a.json").exists()
    assert generate(0.8, "b.json").code == 0 and len(json.loads((tmp_path / "b.json").read_text())) == 1
