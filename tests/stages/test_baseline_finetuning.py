import pytest

from common.t5 import model as models
from tests.small import arguments, refused

TRAIN = arguments("baseline_finetuning", "--stats", "s.csv")


@pytest.fixture(autouse=True)
def here(work, monkeypatch):
    monkeypatch.chdir(work)
    return work


def test_it_trains_with_the_dropout_asked_for(here, stage):
    ends = []
    for flags in ([], ["--dropout", "0.1"], ["--dropout", "0"]):
        assert stage(*TRAIN, "--overwrite", *flags).code == 0
        ends.append(models.load(here / "out.pth").identity)
    assert ends[0] == ends[1] != ends[2]


def test_a_teacher_is_named_and_changes_the_result(here, stage):
    assert stage(*TRAIN).code == 0
    plain = models.load(here / "out.pth")
    assert stage(*TRAIN, "--overwrite", "--teacher", "origin.pth").code == 0
    taught = models.load(here / "out.pth")
    assert taught.identity != plain.identity and "teacher" not in plain.provenance["inputs"]
    assert taught.provenance["inputs"]["teacher"]["sha256"] == models.load(here / "origin.pth").identity


def test_the_checkpoint_of_an_interrupted_run_is_not_thrown_away(here, stage):
    (here / "out.pth.checkpoint").mkdir()
    (here / "out.pth.checkpoint" / "checkpoint.pth").write_text("hours of work")
    refused(stage(*TRAIN), "out.pth.checkpoint: holds the checkpoint of an interrupted run; add --resume")
    assert (here / "out.pth.checkpoint" / "checkpoint.pth").read_text() == "hours of work"
    assert stage(*TRAIN, "--overwrite").code == 0


def test_statistics_of_another_run_are_not_replaced_by_resuming(here, stage):
    """They have no checkpoint, so there is nothing that --resume could go on with."""
    (here / "s.csv").write_text("of another run")
    refused(stage(*TRAIN, "--resume"), "s.csv: exists already")
    assert (here / "s.csv").read_text() == "of another run"
