import os
import signal
from pathlib import Path

import pytest
import torch

from common.errors import Interrupted, UserError
from common.t5 import model as models
from common.t5.loss import TranslationLoss
from common.t5.network import T5
from common.training import finetuning, loop
from common.training.finetuning import finetune, fingerprint, set_dropout, taught
from common.training.loop import FitOptions
from tests.small import small_network


def train(made, text, folder, name="pruned.pth", teacher=None, **options):
    """Train a model of `made` for one epoch; return it as it was written."""
    options = FitOptions(**{"epochs": 1, "lr": 1e-2, "stats": folder / "s.csv", "checkpoint": folder / "cp"} | options)
    model = models.load(made / name)
    inputs = {"model": (made / name, model.identity, model.provenance)}
    finetune("x.py", {"seed": 7}, model, inputs, *text, options, folder / "out.pth", "cpu", teacher)
    return models.load(folder / "out.pth")


def test_masks_stay_and_the_provenance_names_what_it_was_made_from(made, text, tmp_path):
    before, after = models.load(made / "pruned.pth"), train(made, text, tmp_path)
    assert before.masks.keys() == after.masks.keys()
    for name, mask in before.masks.items():
        assert torch.equal(mask, after.masks[name]) and not after.network.get_parameter(name)[~mask].any()
    inputs = after.provenance["inputs"]
    assert after.provenance["stage"] == "x.py" and after.provenance["arguments"] == {"seed": 7}
    assert inputs["model"]["sha256"] == before.identity and inputs["training text"]["sha256"] == text[0].sha256
    assert inputs["validation text"]["sha256"] == text[1].sha256 and not (tmp_path / "cp").exists()


def test_a_teacher_of_another_vocabulary_is_refused(made, text, tmp_path):
    teacher = models.load(made / "origin.pth")
    teacher.tokenizer_json = teacher.tokenizer_json.replace('"▁man"', '"▁mxn"')
    with pytest.raises(UserError, match="the model to distil from has another vocabulary than the model to train"):
        train(made, text, tmp_path, teacher=teacher)


def forwards(monkeypatch, network) -> list:
    """Return a list that grows with each batch that this network, and no other, encodes."""
    calls, encode = [], T5.encode
    monkeypatch.setattr(T5, "encode", lambda self, *inputs: (self is network and calls.append(1), encode(
        self, *inputs))[1])
    return calls


def test_a_teacher_reads_the_text_once_however_many_epochs_ask_it(made, text, tmp_path, monkeypatch):
    """And what is learned is what is learned from a teacher that is asked anew, as if memory is short."""
    found = []
    for room, most in ((None, 1), (10_000, 3)):
        monkeypatch.setattr(finetuning, "available_memory", lambda device, room=room: room)
        torch.manual_seed(1)
        teacher = models.load(made / "origin.pth")
        calls = forwards(monkeypatch, teacher.network)
        found.append(dict(train(made, text, tmp_path, teacher=teacher, epochs=3).network.named_parameters()))
        # Batches by lot are not as many as those in the fixed order.
        assert len(calls) == (len(text[0].epoch(None)) if most == 1 else sum(len(text[0].epoch(i)) for i in range(3)))
    assert all(torch.allclose(p, found[1][name], atol=2e-3) for name, p in found[0].items())
    assert not all(torch.allclose(p, q, atol=0.02) for p, q in zip(
        found[0].values(), models.load(made / "pruned.pth").network.parameters(), strict=True))


@pytest.mark.parametrize("changes", [{"epochs": 1}, {"epochs": 2, "target_loss": 0.1}])
def test_a_teacher_reads_no_text_of_which_training_may_need_but_a_part(made, text, tmp_path, changes):
    options = FitOptions(**{"lr": 1e-2, "stats": tmp_path / "s.csv", "checkpoint": tmp_path / "cp"} | changes)
    assert taught(models.load(made / "origin.pth").network, text[0], options, "cpu")._states is None


def test_a_distilled_training_that_is_resumed_ends_bit_for_bit(made, text, tmp_path, monkeypatch):
    def run(**options):
        torch.manual_seed(1)
        return train(made, text, tmp_path, teacher=models.load(made / "origin.pth"), epochs=2, **options)

    whole, step, steps = run(), loop._Run._step, len(text[0].epoch(0))
    monkeypatch.setattr(loop._Run, "_step", lambda self, *arguments: (
        step(self, *arguments), self.state.step == steps + 1 and os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(Interrupted):
        run()
    monkeypatch.setattr(loop._Run, "_step", step)
    again = run(resume=True)
    assert all(torch.equal(p, q) for p, q in zip(whole.network.parameters(), again.network.parameters(), strict=True))


@torch.no_grad()
def test_without_dropout_training_mode_computes_what_evaluation_mode_does(made, text):
    model = models.load(made / "origin.pth")
    objective, batch = TranslationLoss(model.network), next(iter(text[1].fixed()))
    expected = objective.eval()(batch)[0]
    objective.train()
    assert abs(objective(batch)[0] - expected) > 1e-3  # the model's own dropout
    set_dropout(model.network, 0.0)
    assert objective(batch)[0] == pytest.approx(float(expected), rel=1e-5)
    assert model.network.config.dropout_rate == 0.1


@pytest.mark.parametrize("own", [0, 0.1])
def test_dropout_reaches_the_attention_weights_too(own):
    """A configuration may give it as the integer 0."""
    network = small_network(dropout_rate=own)
    set_dropout(network, 0.3)
    rates = [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)]
    assert set(rates) == {0.3} and len(rates) > 6


def test_a_resume_compares_what_decides_the_result():
    inputs = {"model": (Path("m.pth"), "0" * 64, {})}
    arguments = {"lr": 0.1, "seed": 7, "model": Path("m.pth"), "resume": True, "overwrite": True, "target_loss": 1.0,
                 "device": "cpu"}
    assert fingerprint(arguments, inputs) == {"lr": "0.1", "seed": "7", "model": "0" * 64}
