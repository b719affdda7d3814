
from common.t5 import model as models
from common.tuning import recalibration
from tests.small import arguments, refused

TRAIN = ["--lr", "1e30", "--stats", "s.csv"]  # AdamW's steps are as long as that: the second loss is not a number


def test_after_a_nan_the_advice_writes_the_recalibrated_model_without_a_second_sweep(work, stage, monkeypatch):
    monkeypatch.chdir(work)
    assert stage(*arguments("compose_model", output="composed.pth")).code == 0
    refused(stage(*arguments("model-level_finetuning", *TRAIN)), "is not finite",
            "--resume --target-loss 1e6 writes them")
    assert not (work / "out.pth").exists()
    monkeypatch.setattr(recalibration, "recalibrate_composed", None)
    result = stage(*arguments("model-level_finetuning", *TRAIN, "--resume", "--target-loss", "1e6"))
    assert result.code == 0 and "target loss 1e+06 reached" in result.out, result.err
    assert models.load(work / "out.pth").identity == models.load(work / "composed.pth").identity


def test_a_target_that_the_composed_model_meets_needs_no_recalibration(work, stage, monkeypatch):
    monkeypatch.chdir(work)
    result = stage(*arguments("model-level_finetuning", "--stats", "s.csv", "--target-loss", "1e6"))
    assert result.code == 0 and "not recalibrated: the composed model's validation loss" in result.err


def test_distillation_takes_the_original_as_the_teacher(work, stage, monkeypatch):
    monkeypatch.chdir(work)
    ends = []
    for name, flags in (("a.pth", []), ("b.pth", ["--distillation"])):
        assert stage(*arguments("model-level_finetuning", "--dropout", "0", "--stats", f"{name}.csv", *flags,
                                output=name)).code == 0
        ends.append(models.load(work / name))
    assert ends[0].identity != ends[1].identity and ends[1].provenance["arguments"]["distillation"] is True
