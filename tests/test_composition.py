import torch

from common import bank, composition, models
from common.configs import read_configurations
from common.modules import prunable

ATTENTION = "encoder.block.0.layer.0.SelfAttention"
WI = "encoder.block.0.layer.1.DenseReluDense.wi"


def test_a_composed_model_equals_weights_set_by_hand(made):
    """Every pruned weight is computed here with plain loops and compared, and all others are the original's."""
    configuration = read_configurations(made / "conf.json")[0]
    model, plain = models.load(made / "origin.pth"), models.load(made / "origin.pth").network
    composition.compose(model, bank.load(made / "pruned.npy"), configuration)
    heads, width = 4, 8
    expected = {n: p.detach().clone() for n, p in plain.named_parameters()}
    for name, kind in prunable(plain).items():
        if kind == "linear":
            w = expected[f"{name}.weight"]
            for i in w.abs().flatten().argsort(stable=True)[:w.numel() // 2].tolist():  # rate 0.5
                w[i // w.shape[1], i % w.shape[1]] = 0
    for name, kind in prunable(plain).items():
        if kind == "attention":
            norms = [sum(float(expected[f"{name}.{part}.weight"][h * width:(h + 1) * width].abs().double().sum())
                         for part in "qkv") for h in range(heads)]
            h = norms.index(min(norms))  # rate 0.25 of 4 heads
            for part in "qkv":
                expected[f"{name}.{part}.weight"][h * width:(h + 1) * width] = 0
            expected[f"{name}.o.weight"][:, h * width:(h + 1) * width] = 0
    for name, p in model.network.named_parameters():
        assert torch.equal(p.detach(), expected[name]), name


def test_a_removed_head_contributes_nothing(made):
    """The composed attention equals one computed from the kept heads alone."""
    model = models.load(made / "origin.pth")
    variant = next(composition.prune_block(model.network, ATTENTION, [(0.5, 0.0)]))
    attention = model.network.get_submodule(ATTENTION)
    kept = variant.masks[f"{ATTENTION}.q.weight"][::8, 0].nonzero().flatten().tolist()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    bias = attention.compute_bias(5, 5)
    expected = 0
    for h in kept:
        rows = slice(8 * h, 8 * h + 8)
        q, k, v = (getattr(attention, part).weight[rows] for part in "qkv")
        scores = torch.softmax((x @ q.T) @ (x @ k.T).transpose(1, 2) + bias[:, h], dim=-1)
        expected = expected + scores @ (x @ v.T) @ attention.o.weight[:, rows].T
    composition.install(model, variant)
    assert torch.allclose(attention(x)[0], expected, atol=1e-5)
    assert len(kept) == 2


def test_a_configuration_of_rates_0_is_the_original(made, origin):
    model = models.load(made / "origin.pth")
    composition.compose(model, bank.load(made / "pruned.npy"), {WI: 0.0, ATTENTION: 0.0})
    assert not model.masks
    for (_, a), (_, b) in zip(model.network.named_parameters(), origin.network.named_parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_o_is_replaced_when_no_head_is_removed(origin):
    variant = next(composition.prune_block(origin.network, ATTENTION, [(0.0, 0.5)]))
    assert list(variant.weights) == [f"{ATTENTION}.o.weight"]
