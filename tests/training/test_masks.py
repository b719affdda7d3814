"""A pruned model is trained as if its weights were masked anew in every forward pass."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from common.t5 import model as models
from common.t5.loss import TranslationLoss
from common.t5.model import Model
from common.t5.modules import prunable
from common.training.masks import Pruned
from tests.small import small_network


class Masked(nn.Module):
    """The reference: the weight is masked anew in every forward pass."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, weight):
        return torch.where(self.mask, weight, 0.0)


def steps(objective, batches, clip: float, decay: float = 0.1) -> list[float]:
    """Take AdamW steps with weight decay and clipped gradients; return the gradients' norms."""
    torch.manual_seed(1)
    parameters = list(objective.parameters())
    optimizer, norms = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=decay, eps=1e-3), []
    for batch in batches:
        loss, count = objective.train()(batch)
        (loss / count).backward()
        norms.append(float(nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], clip)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def reference(model: Model) -> nn.Module:
    """Return a model's network with masks as parametrisations."""
    for name, mask in model.masks.items():
        module, _, weight = name.rpartition(".")
        parametrize.register_parametrization(model.network.get_submodule(module), weight, Masked(mask))
    return model.network


def single_weights(model: Model) -> None:
    """Leave only those masks that remove single weights."""
    model.masks = {name: mask for name, mask in model.masks.items() if name.split(".")[-2] in ("o", "wi", "wo")}
    for name in model.masks:
        model.masks[name][0], model.masks[name][:, 0::8] = True, True  # no head and no unit is gone altogether


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_single_removed_weights_stay_zero_and_the_others_learn_as_if_masked_anew(made, text, clip):
    batches = [text[0].collate(examples) for examples in text[0].epoch(0)[:6]]
    mine, other = models.load(made / "pruned.pth"), models.load(made / "pruned.pth")
    single_weights(mine)
    single_weights(other)
    expected = steps(TranslationLoss(reference(other)), batches, clip)
    with Pruned(mine) as network:
        assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in mine.network.parameters())
        norms = steps(TranslationLoss(network), batches, clip)
    assert norms == pytest.approx(expected, rel=1e-5) and (max(norms) > clip) == (clip < 1)
    start = models.load(made / "pruned.pth").network
    for name, mask in mine.masks.items():
        weight, module = mine.network.get_parameter(name), other.network.get_submodule(name.rpartition(".")[0])
        torch.testing.assert_close(weight, module.weight, rtol=1e-3, atol=1e-5)
        assert not weight[~mask].any()
        assert not torch.equal(weight, start.get_parameter(name))
    torch.testing.assert_close(mine.network.shared.weight, other.network.shared.weight, rtol=1e-3, atol=1e-5)


def pruned_somehow(**changes) -> Model:
    """Return a model that has lost heads (others in each layer), hidden units, sub-layers, a block, single weights."""
    network, masks = small_network(num_decoder_layers=3, dropout_rate=0.0, **changes), {}
    g = torch.Generator().manual_seed(5)
    there = dict(network.named_parameters())
    for i, (name, kind) in enumerate((n, k) for n, k in prunable(network).items() if k != "linear"):
        count, parts = (4, ("q", "k", "v", "o")) if kind == "attention" else (48, ("wi", "wi_0", "wi_1", "wo"))
        gone = torch.arange(count) if i % 5 == 4 or name.startswith("decoder.block.1.") else \
            torch.randperm(count, generator=g)[:count // 2]
        if kind == "attention":
            gone = (gone[:, None] * 8 + torch.arange(8)).flatten()
        for part in parts:
            if (weight := f"{name}.{part}.weight") in there:
                masks[weight] = torch.rand(there[weight].shape, generator=g) < 0.7
                (masks[weight].T if part in ("o", "wo") else masks[weight])[gone] = False
    return Model(network, "", masks=masks)


def batches_of(count: int) -> list[dict]:
    g = torch.Generator().manual_seed(3)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return [{"input_ids": torch.randint(2, 50, (3, 9), generator=g), "attention_mask": mask,
             "labels": torch.randint(2, 50, (3, 7), generator=g)} for _ in range(count)]


@pytest.mark.parametrize("changes", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}])
def test_a_shrunk_network_learns_what_the_masked_one_does(changes):
    """Up to rounding; without weight decay, which alone moves weights that nothing reads."""
    mine, other, batches = pruned_somehow(**changes), pruned_somehow(**changes), batches_of(8)
    start = {name: p.clone() for name, p in pruned_somehow(**changes).network.named_parameters()}
    expected = steps(TranslationLoss(reference(other)), batches, 0.5, decay=0.0)
    with Pruned(mine) as network:
        assert sum(p.numel() for p in network.parameters()) < 0.8 * sum(p.numel() for p in mine.network.parameters())
        norms = steps(TranslationLoss(network), batches, 0.5, decay=0.0)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected), rtol=1e-4, atol=0)
    still = 0
    for name, weight in mine.network.named_parameters():
        module, _, part = name.rpartition(".")
        aim = getattr(other.network.get_submodule(module), part)
        torch.testing.assert_close(weight, aim, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        if name in mine.masks:
            assert not weight[~mine.masks[name]].any()
        still += torch.equal(weight * (mask if (mask := mine.masks.get(name)) is not None else 1),
                             start[name] * (mask if mask is not None else 1))
    assert 0 < still < 20  # skipped sub-layers and their layer norms


def test_weights_outside_a_mask_become_zero_at_once():
    model = pruned_somehow()
    with Pruned(model):
        for name, mask in model.masks.items():
            assert not model.network.get_parameter(name)[~mask].any()


def test_a_unit_that_is_zero_by_chance_is_trained():
    model = Model(small_network(dropout_rate=0.0), "")
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    with torch.no_grad():
        model.network.get_parameter(name).zero_()
    with Pruned(model) as network:
        steps(TranslationLoss(network), batches_of(2), 1.0)
    assert model.network.get_parameter(name).all()
