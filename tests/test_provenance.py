"""What a file tells of its making, and that parts which do not belong together are refused with both values."""

import argparse
import platform

import pytest
import torch

from common import bank, configs, files, models
from common.provenance import ancestry, provenance
from tests.test_errors import INPUTS, TEXT, check

TRAIN = ["-m", "origin.pth", "-p", "tuned.npy", "-c", "conf.json", "-n", "1", "--epochs", "1", "--seed", "7", *TEXT]


@pytest.fixture
def here(work, monkeypatch):
    monkeypatch.chdir(work)
    return work


def test_one_flag_tells_the_whole_ancestry_of_a_trained_model(here, stage):
    assert stage("model-level_finetuning", *TRAIN, "-o", "final.pth", "--stats", "f.csv").code == 0
    told = stage("evaluate", "-m", "final.pth", "--ancestry").out
    hashes = {"itself": models.load(here / "final.pth").identity, "model": models.load(here / "origin.pth").identity,
              "configurations": files.digest((here / "conf.json").read_bytes()),
              "scheme": configs.scheme_digest(configs.read_scheme(here / "scheme.json")[0]),
              "pruned": bank.load(here / "pruned.npy").sha256, "tuned": bank.load(here / "tuned.npy").sha256}
    for role, sha in hashes.items():
        assert f"(sha256 {sha})" in told, role
    for name in ("download_model", "prune_scheme_generator", "prune", "block-level_finetuning",
                 "model-level_finetuning"):
        assert f"made by {name}.py: " in told
    for argument in ("seed=7", "seed=0", "number=1", "lr=0.001", 'solver="exact"', 'criterion="l1"'):
        assert f" {argument}" in told
    for version in (f"python {platform.python_version()}", f"torch {torch.__version__}"):
        assert version in told
    for text in ("training text: text (sha256 ", "validation text: text (sha256 "):
        assert text in told


@pytest.mark.parametrize("name", ["compose_model", "model-level_finetuning"])
def test_the_ancestry_before_composing_names_the_configurations_too(here, stage, name):
    told = stage(name, "-m", "origin.pth", "-p", "tuned.npy", "-c", "conf.json", "--ancestry").out
    assert f"conf.json (sha256 {files.digest((here / 'conf.json').read_bytes())})\n  2 configurations" in told


@pytest.mark.parametrize("name", ["compose_model", "block-level_finetuning", "model-level_finetuning"])
def test_a_bank_of_another_model_is_refused_with_both_hashes(here, stage, name):
    arguments, roles = INPUTS[name]
    roles = roles | {"model": "pruned.pth"}
    origin, pruned = (models.load(here / f"{n}.pth").identity[:12] for n in ("origin", "pruned"))
    check(stage(name, *[a.format(**roles) for a in arguments]), f"(bank: {origin}…, model: {pruned}…)")


@pytest.mark.parametrize("name", ["compose_model", "model-level_finetuning"])
def test_a_bank_without_a_variant_says_what_is_needed_and_what_is_there(here, stage, name):
    (here / "conf.json").write_text('[{"encoder.block.0.layer.1.DenseReluDense.wi": 0.33}]')
    arguments, roles = INPUTS[name]
    check(stage(name, *[a.format(**roles) for a in arguments]),
          "encoder.block.0.layer.1.DenseReluDense.wi at 0.33 (the bank has 0.5; 0.8)")


@pytest.mark.parametrize(("change", "told"), [
    (["--lr", "0.5"], "lr: checkpoint '0.001', now '0.5'"), (["--seed", "8"], "seed: checkpoint '7', now '8'"),
    (["-n", "0"], "number: checkpoint '1', now '0'"), (["-p", "pruned.npy"], "bank: checkpoint '"),
    (["--max-train-sentences", "50"], "training text: checkpoint '")])
def test_a_checkpoint_of_another_run_is_refused_with_both_values(here, stage, monkeypatch, change, told):
    from common import training

    monkeypatch.setattr(training, "finish", lambda options: None)  # as if killed just before
    out = ["-o", "final.pth", "--stats", "f.csv", "--max-train-sentences", "20"]
    assert stage("model-level_finetuning", *TRAIN, *out).code == 0
    check(stage("model-level_finetuning", *TRAIN, *out, *change, "--resume", "--overwrite"),
          "is of another run; repeat its arguments", told)


def test_a_source_prefix_that_was_trained_with_is_kept(here, stage):
    out = ("-o", "p.pth", "--stats", "p.csv")
    assert stage("model-level_finetuning", *TRAIN, *out, "--source-prefix", "x: ").code == 0
    assert stage("compose_model", "-m", "origin.pth", "-p", "tuned.npy", "-c", "conf.json", "-o", "c.pth",
                 "--source-prefix", "y: ").code == 0
    assert models.load(here / "p.pth").prefix == "x: " and models.load(here / "c.pth").prefix == "y: "


def test_a_hundred_generations_can_be_read(made, tmp_path):
    model = models.load(made / "origin.pth")
    args = argparse.Namespace(generation=0)
    for args.generation in range(100):
        model.provenance = provenance("baseline_finetuning.py", args, {
            "model": (tmp_path / "m.pth", "0" * 64, model.provenance)})
    models.save(tmp_path / "m.pth", model)
    told = ancestry(models.load(tmp_path / "m.pth").provenance)
    assert "generation=99" in told and "generation=75" in told and "generation=3\n" not in told
