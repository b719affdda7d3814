import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from common.t5 import model as models
from common.t5.loss import TranslationLoss
from common.training.masks import Masks


class Masked(nn.Module):
    """The reference: the weight is masked anew in every forward pass."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, weight):
        return torch.where(self.mask, weight, 0.0)


def steps(objective, batches, clip: float) -> list[float]:
    """Take AdamW steps with weight decay and clipped gradients; return the gradients' norms."""
    torch.manual_seed(1)
    parameters = list(objective.parameters())
    optimizer, norms = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1), []
    for batch in batches:
        loss, count = objective.train()(batch)
        (loss / count).backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters, clip)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_training_is_bit_identical_to_masking_in_the_forward_pass(made, text, clip):
    batches = [text[0].collate(examples) for examples in text[0].epoch(0)[:6]]
    mine, reference = models.load(made / "pruned.pth"), models.load(made / "pruned.pth")
    for name, mask in reference.masks.items():
        module, _, weight = name.rpartition(".")
        parametrize.register_parametrization(reference.network.get_submodule(module), weight, Masked(mask))
    expected = steps(TranslationLoss(reference.network), batches, clip)
    with Masks(mine.network, mine.masks):
        norms = steps(TranslationLoss(mine.network), batches, clip)
    assert norms == expected and (max(norms) > clip) == (clip < 1)
    start = models.load(made / "pruned.pth").network
    for name, mask in mine.masks.items():
        weight, module = mine.network.get_parameter(name), reference.network.get_submodule(name.rpartition(".")[0])
        assert torch.equal(weight, module.weight) and not weight[~mask].any()
        assert not torch.equal(weight, start.get_parameter(name))
    assert torch.equal(mine.network.shared.weight, reference.network.shared.weight)


def test_weights_outside_a_mask_become_zero_at_once():
    linear = nn.Linear(3, 2, bias=False)
    kept = linear.weight[0, 0].item()
    with Masks(linear, {"weight": torch.tensor([[True, False, False], [False, False, False]])}):
        assert linear.weight.tolist() == [[kept, 0, 0], [0, 0, 0]]


def test_a_mask_of_ones_changes_nothing():
    torch.manual_seed(0)
    x, ends = torch.randn(4, 3), []
    for masks in ({}, {"weight": torch.ones(2, 3, dtype=torch.bool)}):
        torch.manual_seed(0)
        linear = nn.Linear(3, 2, bias=False)
        optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1)
        with Masks(linear, masks):
            linear(x).square().sum().backward()
            optimizer.step()
        ends.append(linear.weight.detach())
    assert torch.equal(*ends)


def test_after_the_block_gradients_are_free_again():
    linear = nn.Linear(3, 2, bias=False)
    with Masks(linear, {"weight": torch.zeros(2, 3, dtype=torch.bool)}):
        linear(torch.ones(3)).sum().backward()
        assert not linear.weight.grad.any()
    linear(torch.ones(3)).sum().backward()
    assert linear.weight.grad.all()
