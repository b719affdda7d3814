"""A step in parts, with activations computed twice, is that of a whole batch; activations are what autograd holds."""

from types import SimpleNamespace

import pytest
import torch

from common.t5 import model as models
from common.t5.cost import Shape
from common.t5.header import read_header
from common.t5.loss import TranslationLoss
from common.t5.shrink import shrunk, used
from common.training import loop
from common.training.loop import FitOptions, _Run, fit
from common.training.parts import Parts


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
    parts = Parts(objective, room)
    step = SimpleNamespace(parts=parts, device="cpu", objective=objective, state=SimpleNamespace(step=0), trained=dict(
        objective.named_parameters()), _tell_once=lambda text: None)
    made = _Run._forward_and_backward(step, batch)
    found = {name: p.grad for name, p in step.trained.items()}
    objective.zero_grad(set_to_none=True)
    return found, made, parts.of(batch)


@pytest.mark.parametrize("share, parts, twice", [(1.0, 1, False), (0.4, 3, False), (0.2, 2, True), (1e-9, None, True)])
def test_a_step_in_parts_is_a_whole_one(objective, text, share, parts, twice):
    batch = text[0].collate(max(text[0].epoch(0), key=len))
    rows, source = batch["input_ids"].shape
    whole = Shape.of(objective.network).activations(rows, source, batch["labels"].shape[1])
    expected, stepped, _ = gradients(objective, batch, float("inf"))
    found, in_parts, number = gradients(objective, batch, share * whole)
    assert number == (parts or rows)
    assert objective.network.encoder.recompute == objective.network.decoder.recompute == twice
    assert in_parts == pytest.approx(stepped, rel=1e-6)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), name


@pytest.mark.parametrize("twice", [False, True])
def test_activations_are_what_the_backward_pass_holds(objective, text, twice):
    """Against the tensors that autograd saves, each storage once; parameters and the gradient of the logits apart."""
    network = objective.network
    batch = text[0].collate(max(text[0].epoch(0), key=len))
    rows, source, target = *batch["input_ids"].shape, batch["labels"].shape[1]
    network.encoder.recompute = network.decoder.recompute = twice
    weights, storages = {p.untyped_storage().data_ptr() for p in network.parameters()}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = objective(batch)
    held = sum(storage.nbytes() for storage in storages.values())
    expected = Shape.of(network).activations(rows, source, target, twice)
    if not twice:
        expected -= 3 * 4 * rows * target * network.config.vocab_size
        assert 0.8 < held / expected < 1.25, held / expected
    else:
        assert held < 0.6 * Shape.of(network).activations(rows, source, target)


def test_short_memory_is_told_once(made, text, tmp_path, monkeypatch):
    said, network = [], models.load(made / "origin.pth").network.requires_grad_(True)
    monkeypatch.setattr(loop, "check_memory", lambda *arguments: 1000)
    fit(TranslationLoss(network), *text, FitOptions(1, 1e-3, tmp_path / "s.csv", tmp_path / "cp"), device="cpu",
        fingerprint={}, log=said.append)
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
