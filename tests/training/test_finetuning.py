from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.t5 import model as models
from common.t5.loss import TranslationLoss
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
