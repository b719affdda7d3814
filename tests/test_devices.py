"""Nothing that computes assumes the CPU: a tensor made without a device would lie elsewhere.

There is no GPU to test with. But where the default device is ``meta``, whatever is made without saying where lands
there and has no values, so that a computation on the CPU fails or gives something else.
"""

import copy

import pytest
import torch

from common.pruning import composition
from common.pruning.configurations import uniform
from common.pruning.variants import prune_scheme, prune_scheme_by_obs
from common.t5.decoding import decode
from common.t5.loss import Teacher, TranslationLoss
from common.t5.model import Model
from common.t5.modules import prunable
from common.tuning import exact
from common.tuning.gradient import BlockReconstruction
from common.tuning.joint import JointTranslation
from common.tuning.recalibration import recalibrate
from tests.small import Text, scheme_of, small_network, write_bank


class Held:
    """A text whose batches are there already."""

    def __init__(self, text):
        self.batches = list(text.fixed())

    def fixed(self, device="cpu"):
        return iter(self.batches)

    def __len__(self):
        return sum(len(batch["labels"]) for batch in self.batches)


def loss(network, bank, text):
    gradients = []
    for teacher in (None, Teacher(network)):
        objective = TranslationLoss(network.train(), teacher)
        value, _ = objective(text.batches[0])
        gradients.append(torch.autograd.grad(value, network.shared.weight)[0])
    return gradients


def translations(network, bank, text):
    batch = text.batches[0]
    return [decode(network, batch["input_ids"], batch["attention_mask"], 9, beams) for beams in (1, 3)]


def obs(network, bank, text):
    scheme = {block: [rates for of, rates in bank.entries if of == block] for block, _ in bank.entries}
    return [v.masks for v in prune_scheme_by_obs(Model(network, ""), scheme, text, "cpu")]


def block_level(network, bank, text):
    return [report.after for report in exact.tune(network, bank, text, text, "cpu", steps=3)]


def recalibrated(network, bank, text):
    model = Model(copy.deepcopy(network), "")
    composition.compose(model, bank, uniform(prunable(network), 0.5, 0.5))
    recalibrate(network, model, text, "cpu")
    return model.network.state_dict()


def by_gradient(network, bank, text):
    gradients = []
    for objective in (BlockReconstruction(network, bank, text, "cpu"), JointTranslation(network, bank, "cpu")):
        value, _ = objective(text.batches[0])
        trained = [p for p in objective.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(value, trained, allow_unused=True))
    return gradients


@pytest.mark.parametrize("task", [loss, translations, obs, block_level, recalibrated, by_gradient])
def test_what_computes_makes_its_tensors_where_its_inputs_lie(task, tmp_path, monkeypatch):
    monkeypatch.setattr(exact, "ATTENTION_ERROR", 0.0)
    network, text = small_network(), Held(Text())
    bank = write_bank(tmp_path / "b.npy", prune_scheme(Model(network, ""), scheme_of(network, (0.5, 0.5))))
    results = []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        with torch.device(default):
            results.append(task(network, bank, text))
    torch.testing.assert_close(*results, rtol=0, atol=0)
