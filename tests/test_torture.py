"""Interruption: the short form of benchmarks/torture.py, and every way of training stopped by a signal."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from benchmarks import torture
from common import checkpoints, training
from tests.conftest import ROOT
from tests.test_training import run


def test_killed_runs_end_as_undisturbed_ones(tmp_path, capsys):
    code = torture.main(["--stages", "block level, joint", "scheme", "--kills", "2", "--other-kills", "2", "--length",
                         "0.4", "--jobs", "1", "--json", str(tmp_path / "t.json")])
    assert code == 0, capsys.readouterr().out
    for row in json.loads((tmp_path / "t.json").read_text())["rows"]:
        assert sum(row["kills"].values()) >= 2 and row["finished"] >= 1


TUNING = ["--epochs", "2", "--eval-every", "2", "--batch-tokens", "400", "--max-train-sentences", "60", "--schedule",
          "linear", "--warmup", "2", "--early-stop", "9", "--threads", "1"]
TRAINED = {
    "baseline": ("baseline_finetuning", ["-m", "pruned.pth"], ("out.pth", "out.csv")),
    "adamw": ("block-level_finetuning", ["-m", "origin.pth", "-p", "pruned.npy", "--solver", "adamw"],
              ("out.npy", "out.csv", "out.variants.csv")),
    "joint": ("block-level_finetuning", ["-m", "origin.pth", "-p", "tuned.npy", "--solver", "joint"],
              ("out.npy", "out.csv", "out.variants.csv")),
    "model level": ("model-level_finetuning", ["-m", "origin.pth", "-p", "tuned.npy", "-c", "conf.json",
                                               "--recalibrate"], ("out.pth", "out.csv"))}


@pytest.mark.parametrize(("way", "signum"), zip(TRAINED, [signal.SIGINT, signal.SIGTERM] * 2, strict=True))
def test_an_interrupted_and_resumed_stage_ends_as_an_undisturbed_one(made, tmp_path, stage, monkeypatch, way, signum):
    """Weights bit for bit, statistics, best epoch; and it says how to go on, with the signal's exit code."""
    name, arguments, outputs = TRAINED[way]
    arguments = [made / a if (made / a).is_file() else a for a in arguments] + TUNING
    step, ends = training._Run._step, []
    for folder in (tmp_path / "whole", tmp_path / "stopped"):
        folder.mkdir()
        last = ["-o", folder / outputs[0], "--stats", folder / "out.csv", "--data-dir", made / "text"]
        if folder.name == "stopped":
            def kill(self, *arguments):
                step(self, *arguments)
                if self.state.step == 3:
                    os.kill(os.getpid(), signum)

            monkeypatch.setattr(training._Run, "_step", kill)
            result = stage(name, *arguments, *last)
            assert result.code == 128 + signum and not (folder / outputs[0]).exists()
            assert "interrupted after step 3; to go on, run the same command with --resume" in result.err
            monkeypatch.setattr(training._Run, "_step", step)
            last += ["--resume"]
        result = stage(name, *arguments, *last)
        assert result.code == 0, result.err
        ends.append(torture.results(torture.Job(name, name, [], None, outputs), folder))
        assert sorted(p.name for p in folder.iterdir()) == sorted(outputs)  # no checkpoint, lock or temporary file
    assert ends[0] == ends[1]


def test_early_stop_counts_on_after_a_resume(made, text, tmp_path, monkeypatch):
    """Two epochs without a better loss, of which the interruption is in the first: the same end at the same row."""
    changes = {"lr": 30.0, "epochs": 50, "early_stop": 2.0}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    whole = run(made, text, tmp_path / "one", **changes)
    step = training._Run._step

    def kill(self, *arguments):
        step(self, *arguments)
        if self.state.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training._Run, "_step", kill)
    with pytest.raises(training.Interrupted):
        run(made, text, tmp_path / "two", **changes)
    monkeypatch.setattr(training._Run, "_step", step)
    resumed = run(made, text, tmp_path / "two", resume=True, **changes)
    assert resumed[1].reason == whole[1].reason == "no better validation loss for 2 epochs"
    assert resumed[2] == whole[2] and float(resumed[2][-1][0]) == 2.0


def test_a_gradient_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(made, text, tmp_path):
    class Exploding(torch.nn.Linear):
        calls = 0

        def forward(self, batch):
            Exploding.calls += self.training
            output = super().forward(torch.ones(1, 2)).square().sum()
            if self.training and Exploding.calls == 3:
                output = output + (self.weight - self.weight.detach()).abs().sum().sqrt()  # 0, of infinite slope
            return output, torch.tensor(1)

    with pytest.raises(training.UserError, match="the gradient is not finite at step 3; .* holds the best weights"):
        run(made, text, tmp_path, Exploding(2, 2))
    state = checkpoints.load_sealed(tmp_path / "cp" / "checkpoint.pth", "a checkpoint")
    assert all(torch.isfinite(w).all() for w in state["weights"].values())


def test_a_validation_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(made, text, tmp_path):
    class Exploding(torch.nn.Linear):
        def forward(self, batch):
            output = super().forward(torch.ones(1, 2)).square().sum()
            return output * (float("inf") if Exploding.trained and not self.training else 1), torch.tensor(1)

    Exploding.trained = False
    step = training._Run._step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(
            training.UserError, match=r"the validation loss is inf after step \d+; .* holds the best weights so far, "):
        def trained(self, *arguments):
            Exploding.trained = True
            step(self, *arguments)

        patch.setattr(training._Run, "_step", trained)
        run(made, text, tmp_path, Exploding(2, 2))
    assert checkpoints.load_sealed(tmp_path / "cp" / "checkpoint.pth", "a checkpoint")["state"]["step"] == 0


def test_a_process_with_another_hash_seed_makes_the_same_bytes(tmp_path):
    """What one process makes of a dictionary's or set's order, the next one may not."""
    code = "import sys, pathlib; from benchmarks import torture; torture.make(pathlib.Path(sys.argv[1]))"
    folder, seen = tmp_path / "same", []  # the same, for the arguments are part of what is written
    folder.mkdir()
    for here in True, False:
        if here:
            torture.make(folder)
        else:
            subprocess.run([sys.executable, "-W", "ignore", "-c", code, folder], cwd=ROOT, check=True,
                           env=os.environ | {"PYTHONHASHSEED": "1"})
        made = [path for path in folder.glob("*.*") if path.is_file()]
        seen.append({p.name: torture.content(p) if p.suffix == ".csv" else p.read_bytes() for p in made})
        for path in made:
            path.unlink()
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) >= 9
    for name in seen[0]:
        assert seen[0][name] == seen[1][name], name


@pytest.fixture
def job(made, tmp_path):
    """A finished stage: its files in a folder, and what they should hold."""
    for name in ("pruned.npy", "block.csv"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    job = torture.Job("x", "prune", [], [], ("pruned.npy", "block.csv"))
    return job, tmp_path, torture.results(job, tmp_path)


def test_torture_finds_nothing_in_whole_files(job):
    job, folder, expected = job
    torture.inspect(job, folder, [expected])
    torture.compare(job, folder, expected)
    assert not job.problems


@pytest.mark.parametrize("name", ["pruned.npy", "block.csv"])
def test_torture_notices_a_cut_file(job, name):
    job, folder, expected = job
    (folder / name).write_bytes((folder / name).read_bytes()[:-30])
    torture.inspect(job, folder, [expected])
    assert len(job.problems) == 1 and job.problems[0].startswith(f"{name} is ")


def test_torture_notices_a_file_left_behind(job):
    job, folder, expected = job
    (folder / "half.tmp").write_text("x")
    torture.inspect(job, folder, [expected])
    assert job.problems == ["half.tmp was left behind"]


def test_torture_notices_another_result(job, made):
    job, folder, expected = job
    (folder / "pruned.npy").write_bytes((made / "tuned.npy").read_bytes())
    torture.compare(job, folder, expected)
    assert job.problems == ["pruned.npy differs"]
