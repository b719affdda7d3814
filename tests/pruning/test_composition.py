import json

import pytest
import torch

from common.errors import UserError
from common.pruning import composition
from common.pruning.configurations import uniform
from common.pruning.variants import prune_block, prune_scheme
from common.t5 import model as models
from common.t5.model import Model
from common.t5.modules import prunable
from tests.small import make_tokenizer, scheme_of, small_network, write_bank

ATTENTION = "encoder.block.0.layer.0.SelfAttention"
WI = "encoder.block.0.layer.1.DenseReluDense.wi"


@pytest.fixture
def opened(tmp_path):
    model = Model(small_network(), "")
    return write_bank(tmp_path / "b.npy", prune_scheme(model, scheme_of(model.network, (0.25, 0.5), (0.5, 0.8))))


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_a_composed_model_equals_weights_set_by_hand(tmp_path, kind):
    """Every pruned weight is computed here with plain loops and compared, and all others are the original's."""
    model, plain = Model(small_network(kind), ""), small_network(kind)
    opened = write_bank(tmp_path / "b.npy", prune_scheme(model, scheme_of(plain, (0.5, 0.8), (0.25, 0.5))))
    composition.compose(model, opened, uniform(prunable(plain), 0.25, 0.5))
    heads, width = 4, 8
    expected = {n: p.detach().clone() for n, p in plain.named_parameters()}
    for name, of in prunable(plain).items():
        if of == "linear":
            w = expected[f"{name}.weight"]
            for i in w.abs().flatten().argsort(stable=True)[:w.numel() // 2].tolist():  # rate 0.5
                w[i // w.shape[1], i % w.shape[1]] = 0
    for name, of in prunable(plain).items():
        if of == "attention":
            norms = [sum(float(expected[f"{name}.{part}.weight"][h * width:(h + 1) * width].abs().double().sum())
                         for part in "qkv") for h in range(heads)]
            h = norms.index(min(norms))  # rate 0.25 of 4 heads
            for part in "qkv":
                expected[f"{name}.{part}.weight"][h * width:(h + 1) * width] = 0
            expected[f"{name}.o.weight"][:, h * width:(h + 1) * width] = 0
    for name, p in model.network.named_parameters():
        assert torch.equal(p.detach(), expected[name]), name
    for name, mask in model.masks.items():
        assert torch.equal(mask, expected[name] != 0), name
    linear = [name for name, of in prunable(plain).items() if of == "linear" and not name.endswith(".o")]
    assert len(model.masks) == 6 * 4 + len(linear)


def test_a_removed_head_contributes_nothing():
    """The composed attention equals one computed from the kept heads alone."""
    model = Model(small_network(), "")
    variant = next(prune_block(model, ATTENTION, [(0.5, 0.0)]))
    attention = model.network.get_submodule(ATTENTION)
    kept = variant.masks[f"{ATTENTION}.q.weight"][::8, 0].nonzero().flatten().tolist()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    bias = model.network.get_submodule(ATTENTION.split(".")[0]).position_bias(5)
    expected = 0
    for h in kept:
        rows = slice(8 * h, 8 * h + 8)
        q, k, v = (getattr(attention, part).weight[rows] for part in "qkv")
        scores = torch.softmax((x @ q.T) @ (x @ k.T).transpose(1, 2) + bias[:, h], dim=-1)
        expected = expected + scores @ (x @ v.T) @ attention.o.weight[:, rows].T
    expected = expected.detach()
    composition.install(model, variant)
    assert torch.allclose(attention(x, x, bias), expected, atol=1e-5)
    assert len(kept) == 2


def test_a_configuration_of_rates_0_is_the_original(opened):
    model = Model(small_network(), "")
    composition.compose(model, opened, {WI: 0.0, ATTENTION: 0.0})
    assert not model.masks
    for a, b in zip(model.network.parameters(), small_network().parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def files(tmp_path):
    """A model file, a bank of it and configurations, by the keyword that `from_files` takes them by."""
    original = Model(small_network(vocab_size=300), make_tokenizer().to_str())
    models.save(tmp_path / "m.pth", original)
    write_bank(tmp_path / "b.npy", prune_block(original, WI, [(0.5,)]), origin=original.identity)
    (tmp_path / "c.json").write_text(json.dumps([{}, {WI: 0.5}, {WI: 0.8}, {WI.replace("0", "7"): 0.5}]))
    return {"model_path": tmp_path / "m.pth", "bank_path": tmp_path / "b.npy", "configurations": tmp_path / "c.json"}


def test_a_model_out_of_files_names_them_with_their_hashes(files):
    model, opened, inputs = composition.from_files(**files, n=1)
    assert list(model.masks) == [f"{WI}.weight"] and not model.network.get_parameter(f"{WI}.weight").all()
    assert [(role, path) for role, (path, _, _) in inputs.items()] == [
        ("model", files["model_path"]), ("bank", files["bank_path"]), ("configurations", files["configurations"])]
    assert inputs["model"][1] == opened.origin and inputs["bank"][1] == opened.sha256


@pytest.mark.parametrize(("n", "message"), [
    (4, "there is no configuration 4"), (2, f"lacks what the configuration needs.*\n  {WI} at 0.8"),
    (3, "the model has no such module")])
def test_files_that_do_not_fit_together_are_refused(files, n, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        composition.from_files(**files, n=n)


def test_a_bank_of_another_model_composes_nothing(files):
    models.save(files["model_path"], Model(small_network(seed=1, vocab_size=300), make_tokenizer().to_str()))
    with pytest.raises(UserError, match="b.npy: was made from another model than .*m.pth"):
        composition.from_files(**files, n=1)
