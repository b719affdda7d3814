import pytest

from common.t5 import model as models
from common.t5.loss import TranslationLoss, evaluate
from tests.small import arguments, refused


def test_out_of_a_pruned_bank_comes_the_pruned_model(work, stage, monkeypatch):
    monkeypatch.chdir(work)
    result = stage(*arguments("compose_model", bank="pruned.npy"))
    assert result.code == 0 and "out of pruned.npy: merely pruned; " in result.out
    composed, pruned = models.load(work / "out.pth"), models.load(work / "pruned.pth")
    assert composed.identity == pruned.identity  # the test model of prune.py, which has the first configuration
    assert "calibration text" not in composed.provenance["inputs"]


def test_out_of_a_tuned_bank_comes_a_recalibrated_model_of_lower_loss(work, stage, monkeypatch, text):
    monkeypatch.chdir(work)
    losses = []
    for name, flags, how in (("plain.pth", ["--no-recalibration"], "tuned (exact), not recalibrated"),
                             ("swept.pth", [], "tuned (exact), recalibrated")):
        result = stage(*arguments("compose_model", "-n", "1", *flags, output=name))
        assert result.code == 0 and how in result.out
        model = models.load(work / name)
        losses.append(evaluate(TranslationLoss(model.network), text[0], "cpu"))
        assert ("calibration text" in model.provenance["inputs"]) == (not flags)
        assert all(not model.network.get_parameter(n)[~m].any() for n, m in model.masks.items())
    dense = models.load(work / "origin.pth")
    dense = evaluate(TranslationLoss(dense.network), text[0], "cpu")
    assert abs(losses[1] - dense) < abs(losses[0] - dense)


@pytest.mark.parametrize("name", ["compose_model", "model-level_finetuning"])
def test_files_that_do_not_belong_together_are_refused(work, stage, monkeypatch, name):
    monkeypatch.chdir(work)
    hashes = [models.load(work / f"{n}.pth").identity[:12] for n in ("origin", "pruned")]
    refused(stage(*arguments(name, model="pruned.pth")), "tuned.npy: was made from another model than pruned.pth "
            "(bank: {}…, model: {}…)".format(*hashes))
    refused(stage(*arguments(name, "-n", "7")), "there is no configuration 7; it holds 2, numbered from 0 to 1")
    (work / "conf.json").write_text('[{"encoder.block.0.layer.1.DenseReluDense.wi": 0.33}]')
    refused(stage(*arguments(name)), "tuned.npy: lacks what the configuration needs",
            "encoder.block.0.layer.1.DenseReluDense.wi at 0.33 (the bank has 0.5; 0.8)")
    assert not (work / "out.pth").exists()
