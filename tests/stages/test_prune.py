import json

import pytest
import torch

from common.pruning import bank
from common.t5 import model as models
from tests.small import arguments, refused


def test_the_test_model_is_made_of_every_first_variant(made):
    model, opened, first = models.load(made / "pruned.pth"), bank.load(made / "pruned.npy"), {}
    for block, rates in opened.entries:
        first.setdefault(block, rates)
    for key in first.items():
        for name, weight in opened.read(key).weights.items():
            assert torch.equal(model.network.get_parameter(name), weight)


@pytest.mark.parametrize(("change", "message"), [
    ({"encoder.block.9.layer.0.SelfAttention": 0.5}, "encoder.block.9.layer.0.SelfAttention: the model has no such"),
    ({"encoder.block.0.layer.0.SelfAttention": 0.9}, "removes all 4 heads")])
def test_a_scheme_that_does_not_fit_the_model_is_refused(work, stage, monkeypatch, change, message):
    monkeypatch.chdir(work)
    (work / "conf.json").write_text(json.dumps([change]))
    assert stage("prune_scheme_generator", "-i", "conf.json", "-o", "new.json").code == 0
    refused(stage(*arguments("prune", scheme="new.json")), message)
    assert not (work / "out.npy").exists()


def test_obs_removes_as_much_of_linear_modules_and_names_its_text(work, stage, monkeypatch):
    monkeypatch.chdir(work)
    assert stage(*arguments("prune", "--criterion", "obs", "--data", "text")).code == 0
    mine, l1 = bank.load(work / "out.npy"), bank.load(work / "pruned.npy")
    assert set(mine.entries) == set(l1.entries) and mine.provenance["inputs"]["calibration text"]["file"] == "text"
    other = 0
    for key in mine.entries:
        masks, theirs = mine.read(key).masks, l1.read(key).masks
        if "Dense" in key[0]:
            assert [m.sum() for m in masks.values()] == [m.sum() for m in theirs.values()]
        other += any(not torch.equal(masks[name], theirs[name]) for name in masks)
    assert other > 10
