import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common import masking, models, training
from common.data import LABEL_PADDING
from common.files import Interrupted, UserError
from common.training import FitOptions, TranslationLoss, fit


def quiet(text):
    pass


def run(made, text, folder: Path, objective=None, fingerprint=None, log=quiet, **changes):
    """Train the small pruned model for two epochs; return (weights, result, statistics rows without times)."""
    torch.manual_seed(0)
    if objective is None:
        model = models.load(made / "pruned.pth")
        objective = TranslationLoss(model.network)
        masking.enforce(model.network, model.masks)
    options = replace(FitOptions(epochs=2, lr=1e-2, checkpoint_dir=folder / "cp"), **changes)
    result = fit(objective, *text, options, device="cpu", stats=folder / "s.csv", fingerprint=fingerprint or {"a": 1},
                 log=log)
    rows = [row.split(",") for row in (folder / "s.csv").read_text().splitlines()]
    return ({n: p.detach().clone() for n, p in objective.named_parameters()}, result,
            [row[:3] + row[5:] for row in rows])


def test_training_lowers_the_loss_and_keeps_removed_weights_zero(made, text, tmp_path):
    model = models.load(made / "pruned.pth")
    objective = TranslationLoss(model.network)
    before = training.evaluate(objective, text[1], "cpu")
    masking.enforce(model.network, model.masks)
    _, result, _ = run(made, text, tmp_path, objective)
    masking.release(model.network)
    assert result.best_loss < before
    for name, mask in model.masks.items():
        assert not model.network.get_parameter(name)[~mask].any()
    assert training.evaluate(objective, text[1], "cpu") == pytest.approx(result.best_loss, abs=1e-6)


@torch.no_grad()
def test_the_loss_does_not_change_with_extra_padding(origin, text):
    objective = TranslationLoss(origin.network)
    batch = text[1].collate(text[1].dataset.examples[:4])
    loss, count = objective(batch)
    padded = {"input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 7)),
              "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 7)),
              "labels": torch.nn.functional.pad(batch["labels"], (0, 5), value=LABEL_PADDING)}
    again, count_again = objective(padded)
    assert count == count_again == sum(len(e.target) for e in text[1].dataset.examples[:4])
    assert float(loss) == pytest.approx(float(again), rel=1e-5)


def test_the_loss_is_averaged_over_tokens_not_batches(origin, text):
    """Against one sentence at a time, by Hugging Face's own loss."""
    total = count = 0
    for example in text[1].dataset.examples:
        with torch.no_grad():
            out = origin.network(input_ids=torch.tensor([example.source]), labels=torch.tensor([example.target]))
        total, count = total + float(out.loss) * len(example.target), count + len(example.target)
    assert training.evaluate(TranslationLoss(origin.network), text[1], "cpu") == pytest.approx(total / count, rel=1e-5)
    assert not origin.network.training


def test_the_best_epoch_is_kept_even_if_it_is_the_start(made, text, tmp_path):
    weights, result, rows = run(made, text, tmp_path, lr=30.0)
    start = dict(models.load(made / "pruned.pth").network.named_parameters())
    assert result.best_epoch == 0 and result.best_loss == float(rows[1][2])
    assert torch.equal(weights["network.shared.weight"], start["shared.weight"])


def test_target_loss_stops_at_once(made, text, tmp_path):
    _, result, rows = run(made, text, tmp_path, target_loss=100.0)
    assert result.steps == 0 and len(rows) == 2 and "target loss 100 reached" in result.reason


def test_early_stop(made, text, tmp_path):
    _, result, rows = run(made, text, tmp_path, lr=30.0, epochs=50, early_stop=2.0)
    assert result.reason == "no better validation loss for 2 epochs" and float(rows[-1][0]) == 2.0


def test_a_checkpoint_every_step_loses_only_the_step_under_way(made, text, tmp_path):
    class Dying(TranslationLoss):
        calls = 0

        def forward(self, batch):
            self.calls += self.training
            if self.calls == 6:
                raise MemoryError  # as good as a kill: nothing is written after it
            return super().forward(batch)

    with pytest.raises(MemoryError):
        run(made, text, tmp_path, Dying(models.load(made / "pruned.pth").network), checkpoint_every=1)
    said = []
    run(made, text, tmp_path, TranslationLoss(models.load(made / "pruned.pth").network), resume=True, log=said.append)
    assert said[0].startswith("resuming after step 5 ")


def test_eval_every_counts_steps(made, text, tmp_path):
    _, _, rows = run(made, text, tmp_path, eval_every=4, epochs=1)
    assert [int(row[3]) for row in rows[1:4]] == [0, 4, 8]


@pytest.mark.parametrize("step", [1, 5, 9])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(made, text, tmp_path, step, signum):
    """Weights bit for bit, statistics, best epoch; data order, dropout, optimizer and schedule included."""
    changes = {"schedule": "linear", "warmup": 3, "eval_every": 3, "early_stop": 5.0}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    whole = run(made, text, tmp_path / "one", **changes)

    class Killer(TranslationLoss):
        calls = 0

        def forward(self, batch):
            Killer.calls += self.training
            if self.training and Killer.calls == step:
                os.kill(os.getpid(), signum)
            return super().forward(batch)

    model = models.load(made / "pruned.pth")
    masking.enforce(model.network, model.masks)
    with pytest.raises(Interrupted, match=f"interrupted after step {step}; .* --resume") as caught:
        run(made, text, tmp_path / "two", Killer(model.network), **changes)
    assert caught.value.signum == signum
    torch.manual_seed(99)
    resumed = run(made, text, tmp_path / "two", resume=True, **changes)
    assert resumed[2] == whole[2] and resumed[1].best_epoch == whole[1].best_epoch
    assert all(torch.equal(whole[0][name], resumed[0][name]) for name in whole[0])


def test_a_checkpoint_of_another_run_is_refused_with_both_values(made, text, tmp_path):
    run(made, text, tmp_path, epochs=1, fingerprint={"lr": 1})
    with pytest.raises(UserError, match="(?s)is of another run.*lr: checkpoint 1, now 2"):
        run(made, text, tmp_path, fingerprint={"lr": 2}, resume=True)


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(made, text, tmp_path):
    class Exploding(TranslationLoss):
        calls = 0

        def forward(self, batch):
            loss, count = super().forward(batch)
            Exploding.calls += self.training
            return loss * (math.nan if self.training and Exploding.calls == 3 else 1), count

    with pytest.raises(UserError, match="the loss is not finite at step 3.*checkpoint.pth holds the best weights"):
        run(made, text, tmp_path, Exploding(models.load(made / "pruned.pth").network))
    assert (tmp_path / "cp" / "checkpoint.pth").exists()
    objective = Exploding(models.load(made / "pruned.pth").network)
    _, result, _ = run(made, text, tmp_path, objective, resume=True, target_loss=1e6)  # what the message advises
    assert result.steps == 0 and result.reason == "target loss 1e+06 reached"


def test_a_shells_background_job_is_not_stopped_by_ctrl_c(made, text, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _, result, _ = run(made, text, tmp_path, log=lambda _: os.kill(os.getpid(), signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.reason == "2 epochs done"


def test_what_a_killed_run_left_half_written_is_removed(made, text, tmp_path):
    (tmp_path / "cp").mkdir()
    (tmp_path / "cp" / ".checkpoint.pth.123.tmp").write_text("half")
    run(made, text, tmp_path, resume=True)
    assert [p.name for p in (tmp_path / "cp").iterdir()] == ["checkpoint.pth"]


def test_resuming_writes_the_statistics_anew(made, text, tmp_path):
    run(made, text, tmp_path)
    before = (tmp_path / "s.csv").read_text()
    (tmp_path / "s.csv").unlink()
    run(made, text, tmp_path, resume=True)
    assert (tmp_path / "s.csv").read_text() == before


@pytest.mark.parametrize(("epochs", "better", "patience"), [((0.0, 1.3, 2.3), 1.3, 1.0), ((0.0, 0.2, 0.3), 0.2, 0.1)])
def test_early_stop_counts_parts_of_an_epoch(made, text, tmp_path, epochs, better, patience):
    options = FitOptions(9, 1e-3, tmp_path, early_stop=patience)
    state = training._Run(torch.nn.Linear(1, 1), *text, options, "cpu", tmp_path / "s.csv", {}, quiet, None)
    state.state.best_epoch = better
    for epoch in epochs:
        state.state.rows.append([epoch, None, 2.0])
        assert (state._stop_reason() is not None) == (epoch == epochs[-1])


def test_a_damaged_checkpoint_is_refused(made, text, tmp_path):
    run(made, text, tmp_path, epochs=1)
    path = tmp_path / "cp" / "checkpoint.pth"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="checkpoint.pth: is not a checkpoint of this toolkit, or is truncated"):
        run(made, text, tmp_path, resume=True)


def test_two_runs_cannot_share_a_checkpoint_folder(made, text, tmp_path):
    from common.files import locked

    (tmp_path / "cp").mkdir()
    with locked(tmp_path / "cp"), pytest.raises(UserError, match="cp: another run is writing it"):
        run(made, text, tmp_path)


def test_learning_rate_warms_up_and_falls(made, text, tmp_path):
    _, _, rows = run(made, text, tmp_path, schedule="linear", warmup=4, eval_every=2, lr=1.0e-3)
    steps = {int(row[3]): float(row[4]) for row in rows[2:]}
    total = max(steps)
    assert steps[2] == pytest.approx(1e-3 * 2 / 4 * (1 - 1 / total), rel=1e-6)
    assert steps[total] == pytest.approx(1e-3 * 1 / total, rel=1e-6)


def test_without_dropout_training_mode_computes_what_evaluation_mode_does(made, text):
    model = models.load(made / "origin.pth")
    objective, batch = training.TranslationLoss(model.network), next(iter(text[1].fixed()))
    with torch.no_grad():
        expected = objective.eval()(batch)[0]
        objective.train()
        assert abs(objective(batch)[0] - expected) > 1e-3  # the model's own dropout
        training.set_dropout(model.network, 0.0)
        assert objective(batch)[0] == pytest.approx(float(expected), rel=1e-5)
    assert model.network.config.dropout_rate == 0.1


def test_label_smoothing_spreads_probability_in_training_alone(made, text):
    network = models.load(made / "origin.pth").network.eval()
    training.set_dropout(network, 0.0)
    batch = text[0].collate(text[0].dataset.examples[:5])
    smoothed, plain = TranslationLoss(network, 0.2), TranslationLoss(network)
    logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                     decoder_input_ids=training.shift_right(batch["labels"], network.config)).logits
    valid = batch["labels"] >= 0
    logs = torch.log_softmax(logits[valid], -1)
    by_hand = -0.8 * logs[torch.arange(len(logs)), batch["labels"][valid]].sum() - 0.2 * logs.mean(dim=1).sum()
    assert torch.equal(smoothed.eval()(batch)[0], plain.eval()(batch)[0])
    assert torch.allclose(smoothed.train()(batch)[0], by_hand, rtol=1e-5)


def test_distillation_is_a_share_of_the_targets_in_training_alone(made, text):
    student, teacher = (models.load(made / name).network.eval() for name in ("pruned.pth", "origin.pth"))
    training.set_dropout(student, 0.0)
    batch = text[0].collate(text[0].dataset.examples[:5])
    inputs, valid = training.network_inputs(batch, student.config), batch["labels"] >= 0
    mine, theirs = (torch.log_softmax(network(**inputs).logits[valid], -1) for network in (student, teacher))
    taught = -(theirs.exp() * mine).sum()
    plain = -mine[torch.arange(len(mine)), batch["labels"][valid]].sum()
    for share in (0.0, 0.25, 1.0):
        objective = TranslationLoss(student, teacher=teacher, share=share)
        assert torch.allclose(objective.eval()(batch)[0], plain, rtol=1e-5)
        loss, tokens = objective.train()(batch)
        assert torch.allclose(loss, (1 - share) * plain + share * taught, rtol=1e-5)
        assert tokens == valid.sum()
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert not any("teacher" in name for name, _ in objective.named_parameters())


def test_both_stages_distil(work, stage):
    text = ["--data-dir", work / "text", "--epochs", 1, "--dropout", 0, "--lr", 0.01]
    base = ["baseline_finetuning", "-m", work / "pruned.pth", *text]
    composed = ["model-level_finetuning", "-m", work / "origin.pth", "-p", work / "tuned.npy", "-c", work / "conf.json",
                *text]
    for n, (command, teacher) in enumerate(((base, ["--teacher", work / "origin.pth"]), (composed, []))):
        ends = []
        for name, flags in (("plain", []), ("taught", [*teacher, "--distillation", 0.5])):
            output = work / f"{name}{n}.pth"
            done = stage(*command, "-o", output, "--stats", output.with_suffix(".csv"), *flags)
            assert done.code == 0, done.err
            ends.append(output.with_suffix(".csv").read_text().splitlines()[-1].split(",")[1:3])
        assert ends[0] != ends[1]
    origin = models.load(work / "origin.pth").identity
    assert models.load(work / "taught0.pth").provenance["inputs"]["teacher"]["sha256"] == origin


@pytest.mark.parametrize("flags", [["--teacher", "origin.pth"], ["--distillation", 0.5]])
def test_a_teacher_without_its_share_is_refused(work, stage, flags):
    flags = [work / flag if flag == "origin.pth" else flag for flag in flags]
    result = stage("baseline_finetuning", "-m", work / "pruned.pth", "-o", work / "b.pth", *flags)
    assert result.code == 2 and "--teacher and --distillation belong together" in result.err


def test_a_teacher_of_another_vocabulary_is_refused(work, stage):
    other = models.load(work / "origin.pth")
    other.tokenizer_json = other.tokenizer_json.replace('"version":"1.0"', '"version": "1.0"')
    models.save(work / "other.pth", other)
    result = stage("baseline_finetuning", "-m", work / "pruned.pth", "-o", work / "b.pth", "--teacher",
                   work / "other.pth", "--distillation", 0.5, "--data-dir", work / "text")
    assert result.code == 2 and "other.pth: has another vocabulary than" in result.err


def test_the_stage_trains_with_the_dropout_asked_for(work, stage):
    ends = {}
    for name, flags in (("own", ()), ("same", ("--dropout", 0.1)), ("none", ("--dropout", 0))):
        done = stage("baseline_finetuning", "-m", work / "pruned.pth", "-o", work / f"{name}.pth", "--epochs", 1,
                     "--stats", work / f"{name}.csv", "--data-dir", work / "text", *flags)
        assert done.code == 0, done.err
        ends[name] = (work / f"{name}.csv").read_text().splitlines()[-1].split(",")[2]
    assert ends["own"] == ends["same"] != ends["none"]
    assert stage("baseline_finetuning", "--dropout", 1.0).code == 2
    assert stage("baseline_finetuning", "--label-smoothing", -0.1).code == 2
