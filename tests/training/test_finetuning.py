import os
import signal
import time
from pathlib import Path

import pytest
import torch

from common.errors import Interrupted, UserError
from common.t5 import model as models
from common.t5.loss import Teacher, TranslationLoss
from common.t5.network import T5
from common.training import loop
from common.training.finetuning import finetune, fingerprint, set_dropout
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
    """And what is learned is what is learned from a teacher that is asked anew, as where memory is short."""
    found = []
    for asked in ([None], [0, 1]):
        torch.manual_seed(1)
        teacher = models.load(made / "origin.pth")
        calls = forwards(monkeypatch, teacher.network)
        found.append(dict(train(made, text, tmp_path, teacher=teacher, epochs=2).network.named_parameters()))
        assert len(calls) == sum(len(text[0].epoch(number)) for number in asked)
        monkeypatch.setattr(Teacher, "size", lambda self, text: 1 << 60)
    assert all(torch.allclose(p, found[1][name], atol=2e-3) for name, p in found[0].items())
    assert not all(torch.allclose(p, q, atol=0.02) for p, q in zip(
        found[0].values(), models.load(made / "pruned.pth").network.parameters(), strict=True))


@pytest.mark.parametrize("changes", [{"epochs": 1}, {"epochs": 2, "target_loss": 0.1}])
def test_a_teacher_reads_no_text_of_which_training_may_need_but_a_part(made, text, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(Teacher, "read", None)
    train(made, text, tmp_path, teacher=models.load(made / "origin.pth"), **changes)


def test_reading_can_be_interrupted_and_counts_as_training(made, text, tmp_path, monkeypatch):
    def run(**options):
        train(made, text, tmp_path, teacher=models.load(made / "origin.pth"), epochs=2, **options)

    state = T5.states
    monkeypatch.setattr(T5, "states", lambda self, *args, **inputs: (time.sleep(0.02), state(self, *args, **inputs))[1])
    batches = len(text[0].epoch(None))
    with monkeypatch.context() as m, pytest.raises(Interrupted, match="interrupted after step 0"):
        m.setattr(Teacher, "_run", lambda self, batch: os.kill(os.getpid(), signal.SIGINT) or torch.zeros(1, 32))
        run()
    step = loop._Run._step
    monkeypatch.setattr(loop._Run, "_step", lambda self, *arguments: (
        step(self, *arguments), self.state.step == 1 and seconds.append(self.state.seconds)))
    seconds = []
    run(resume=True)
    assert seconds[0] > 0.02 * (batches + 1)


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
