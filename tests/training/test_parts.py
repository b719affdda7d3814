"""A step in parts, with activations computed twice, is that of a whole batch; activations are what autograd holds."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.t5 import model as models
from common.t5.cost import Shape
from common.t5.header import read_header
from common.t5.loss import Teacher, TranslationLoss
from common.t5.shrink import shrunk, used
from common.training import loop, parts
from common.training.loop import FitOptions, _Run, fit
from common.training.parts import Parts
from tests.small import small_network


@pytest.fixture
def objective(made):
    torch.manual_seed(0)
    network = models.load(made / "pruned.pth").network.train().requires_grad_(True)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    return TranslationLoss(network)


def gradients(objective, batch, room: float) -> tuple[dict, tuple, int]:
    """Return (gradients by name, what a step returns, parts) with so much room for activations."""
    torch.manual_seed(1)
    cut = Parts(objective, room)
    step = SimpleNamespace(parts=cut, device="cpu", objective=objective, state=SimpleNamespace(step=0), trained=dict(
        objective.named_parameters()), _tell_once=lambda text: None)
    made = _Run._forward_and_backward(step, batch)
    found = {name: p.grad for name, p in step.trained.items()}
    objective.zero_grad(set_to_none=True)
    return found, made, cut.of(batch)


@pytest.mark.parametrize("share, number, twice", [(1.0, 1, False), (0.4, 3, False), (0.2, 3, True), (1e-9, None, True)])
def test_a_step_in_parts_is_a_whole_one(objective, text, share, number, twice):
    batch = text[0].collate(max(text[0].epoch(0), key=len))
    rows, source = batch["input_ids"].shape
    whole = Shape.of(objective.network).activations(rows, source, batch["labels"].shape[1])
    expected, stepped, _ = gradients(objective, batch, float("inf"))
    found, in_parts, made_in = gradients(objective, batch, share * whole / parts._SHARE)
    assert made_in == (number or rows)
    assert objective.network.encoder.recompute == objective.network.decoder.recompute == twice
    assert in_parts == pytest.approx(stepped, rel=1e-6)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), name


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is on; ``most`` is the most at a time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.free, storage._cdata)
        return made

    def free(self, key):
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(("sentences", "length", "words"), [(24, 20, 300), (24, 20, 8000), (4, 96, 300)])
def test_a_step_takes_no_more_than_was_foreseen(sentences, length, words, twice, taught):
    """Forward and backward pass, beside weights and gradients; not less than half, either."""
    network = small_network(vocab_size=words, num_layers=3, dropout_rate=0.1).train().requires_grad_(True)
    network.encoder.recompute = network.decoder.recompute = twice
    objective = TranslationLoss(network, Teacher(small_network(vocab_size=words)) if taught else None)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    ids = torch.randint(3, 50, (sentences, length))
    with Peak() as peak:
        objective.train()
        loss, _ = objective({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
        loss.backward()
    foreseen = Shape.of(network).activations(sentences, length, length, twice, taught)
    assert 0.5 < peak.most / foreseen < 1.0 / 0.7, peak.most / foreseen


def test_short_memory_is_told_once(made, text, tmp_path, monkeypatch):
    said, network = [], models.load(made / "origin.pth").network.requires_grad_(True)
    monkeypatch.setattr(loop, "check_memory", lambda *arguments: 1000)
    fit(TranslationLoss(network), text[1], text[1], FitOptions(1, 1e-3, tmp_path / "s.csv", tmp_path / "cp"),
        device="cpu", fingerprint={}, log=said.append)
    assert sum("memory is short: batches are added up in parts" in line for line in said) == 1


def test_a_file_has_the_shape_of_the_network_it_holds(made):
    for name in ("origin.pth", "pruned.pth"):
        loaded = models.load(made / name)
        network, _ = shrunk(loaded.network, used(loaded.network, loaded.masks))
        a, b = Shape.of(network), Shape.of_header(read_header(made / name))
        assert sorted(a.layers) == sorted(b.layers) and (a.d_model, a.vocabulary, a.gated) == (
            b.d_model, b.vocabulary, b.gated)


def test_half_precision_changes_a_loss_by_its_rounding_alone(objective, text):
    batch = text[0].collate(text[0].epoch(0)[0])
    objective.eval()
    plain = float(objective(batch)[0].detach())
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective(batch)
    loss.backward()
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(plain, rel=0.02)
    assert all(p.grad is None or p.grad.dtype == torch.float32 and p.grad.isfinite().all()
               for p in objective.network.parameters())
