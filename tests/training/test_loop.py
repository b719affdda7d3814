import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import Interrupted, UserError
from common.files.archive import load_sealed
from common.files.atomic import locked
from common.t5 import model as models
from common.t5.loss import TranslationLoss, evaluate
from common.training import checkpoint, loop
from common.training.loop import FitOptions, fit
from common.training.masks import Pruned
from tests.mutants import Toy, train_toy


def run(made, text, folder: Path, log=lambda text: None, **changes):
    """Train the small pruned model for two epochs; return (weights, result, statistics rows without times)."""
    torch.manual_seed(0)
    model = models.load(made / "pruned.pth")
    options = replace(FitOptions(epochs=2, lr=1e-2, stats=folder / "s.csv", checkpoint=folder / "cp"), **changes)
    with Pruned(model) as network:
        result = fit(TranslationLoss(network), *text, options, device="cpu", fingerprint={"a": 1}, log=log)
    rows = [row.split(",") for row in (folder / "s.csv").read_text().splitlines()]
    return ({n: p.detach().clone() for n, p in model.network.named_parameters()}, result,
            [row[:3] + row[5:] for row in rows])


def after_step(monkeypatch, number: int, action):
    """Call ``action`` once, after a training step."""
    step = loop._Run._step

    def acting(self, *arguments):
        step(self, *arguments)
        if self.state.step == number:
            monkeypatch.setattr(loop._Run, "_step", step)
            action()

    monkeypatch.setattr(loop._Run, "_step", acting)


def test_training_lowers_the_loss_and_leaves_the_best_weights(made, text, tmp_path):
    model = models.load(made / "pruned.pth")
    before = evaluate(TranslationLoss(model.network), text[1], "cpu")
    weights, result, rows = run(made, text, tmp_path)
    assert result.best_loss < before and float(rows[1][2]) == before
    model.network.load_state_dict(weights, strict=False)
    assert evaluate(TranslationLoss(model.network), text[1], "cpu") == result.best_loss
    assert all(not model.network.get_parameter(name)[~mask].any() for name, mask in model.masks.items())


def rows_of(folder: Path) -> list[list[str]]:
    """Return the statistics of `train_toy` without times."""
    return [row.split(",")[:3] + row.split(",")[5:] for row in (folder / "s.csv").read_text().splitlines()[1:]]


def test_the_best_epoch_is_kept_even_if_it_is_the_start(tmp_path):
    toy = Toy()
    result = train_toy(tmp_path, toy, lr=30.0)
    assert result.best_epoch == 0 and result.best_loss == float(rows_of(tmp_path)[0][2])
    assert torch.equal(toy.weight, Toy().weight)


def test_the_best_weights_are_held_on_the_cpu(monkeypatch):
    """A GPU has enough to hold: weights, gradients, moments."""
    class Parameter:
        def detach(self):
            return self

        def to(self, *where, **how):
            return where, how

    run = SimpleNamespace(state=checkpoint.State(), trained={"w": Parameter()}, optimizer=None, clock=0.0, valid=None,
                          objective=None, device="cuda", log=lambda text: None, _save=lambda: None,
                          _write_statistics=lambda: None)
    monkeypatch.setattr(loop, "evaluate", lambda *arguments: 1.0)
    loop._Run._validate(run, 0.0)
    assert run.best == {"w": (("cpu",), {"copy": True})}


def test_eval_every_counts_steps_and_an_epoch_ends_with_a_validation(tmp_path):
    train_toy(tmp_path, epochs=4, eval_every=3)
    assert [int(row[3]) for row in rows_of(tmp_path)] == [0, 2, 3, 4, 6, 8]


def test_the_learning_rate_warms_up_and_falls(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "WARMUP", 0.4)
    train_toy(tmp_path, epochs=5, eval_every=1, lr=1e-3)
    rates = [float(row[4]) for row in rows_of(tmp_path)[1:]]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 7e-4, 6e-4, 5e-4, 4e-4, 3e-4, 2e-4, 1e-4], rel=1e-9)


@pytest.mark.parametrize("loss", [0.9, 1.1])
def test_an_untrained_models_embeddings_learn_faster(origin, tmp_path, monkeypatch, loss):
    """Untrained is a model that starts no better than guessing; a loss is in units of that here."""
    def stop(*arguments):
        raise KeyboardInterrupt

    class Idle:
        sha256 = ""

        def collate(self, *arguments):
            stop()

    run = loop._Run(origin.network.requires_grad_(True), Idle(), Idle(), FitOptions(1, 1.0, tmp_path, tmp_path), "cpu",
                    {}, 0.0, None, None, math.inf)
    run.state.rows.append([0.0, None, loss * math.log(origin.network.config.vocab_size)])
    with pytest.raises(KeyboardInterrupt):
        run._step([None] * 40, 40)
    others, embeddings = run.optimizer.param_groups
    assert embeddings["lr"] == others["lr"] * (loop.EMBEDDING_FACTOR if loss > 1 else 1)
    assert any(p is origin.network.shared.weight for p in embeddings["params"])


SCHEDULE = {"eval_every": 3}


@pytest.fixture(scope="module")
def whole(made, text, tmp_path_factory):
    """An undisturbed run with all that there is: dropout, masks, warm-up."""
    return run(made, text, tmp_path_factory.mktemp("whole"), **SCHEDULE)


@pytest.mark.parametrize(("step", "signum"), [(1, signal.SIGINT), (6, signal.SIGTERM)])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(made, text, tmp_path, monkeypatch, whole, step,
                                                                    signum):
    """Weights bit for bit, statistics, best epoch; data order, dropout, optimizer and learning rate included."""
    after_step(monkeypatch, step, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(Interrupted, match=f"interrupted after step {step}; .* --resume") as caught:
        run(made, text, tmp_path, **SCHEDULE)
    assert caught.value.signum == signum
    torch.manual_seed(99)
    resumed = run(made, text, tmp_path, resume=True, **SCHEDULE)
    assert resumed[2] == whole[2] and resumed[1].best_epoch == whole[1].best_epoch
    assert all(torch.equal(whole[0][name], resumed[0][name]) for name in whole[0])


def test_checkpoints_are_written_at_the_start_and_then_so_that_writing_takes_5_percent(tmp_path, monkeypatch):
    """By a clock that goes on by 1 s a step and 2 s a checkpoint: one every 41 steps, whatever the validations."""
    clock, saved = [0.0], []

    def save(path, fingerprint, state, *others):
        clock[0] += 2.0
        saved.append(state.step)

    step = loop._Run._step
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(loop._Run, "_step", lambda self, *a: clock.__setitem__(0, clock[0] + 1.0) or step(self, *a))
    train_toy(tmp_path, epochs=100, eval_every=1)
    assert saved == [0, 41, 82, 123, 164]


class Exploding(Toy):
    """Its loss is not a number in the third training step, nor in any later one."""

    calls = 0

    def forward(self, batch):
        loss, count = super().forward(batch)
        self.calls += self.training
        return loss * (math.nan if self.training and self.calls >= 3 else 1), count


def test_after_a_loss_that_is_not_finite_the_advice_writes_the_best_weights(tmp_path):
    with pytest.raises(UserError, match="the loss is not finite at step 3; try a lower --lr; .*checkpoint.pth holds "
                                        r"the best weights so far .* --resume --target-loss 1e6 writes them"):
        train_toy(tmp_path, Exploding(), eval_every=1)
    best = load_sealed(tmp_path / "cp" / "checkpoint.pth", "a checkpoint")["best"]
    toy = Exploding()
    result = train_toy(tmp_path, toy, eval_every=1, resume=True, target_loss=1e6)
    assert result.steps == 2 and result.reason == "target loss 1e+06 reached"
    assert all(torch.equal(getattr(toy, name), best[name]) for name in best)
    assert result.best_loss == min(float(row[2]) for row in rows_of(tmp_path)) and result.best_epoch == 1


def test_a_gradient_that_is_not_finite_names_the_step_and_keeps_finite_weights(tmp_path):
    class Steep(Toy):
        calls = 0

        def forward(self, batch):
            loss, count = super().forward(batch)
            self.calls += self.training
            if self.training and self.calls == 3:
                loss = loss + (self.weight - self.weight.detach()).abs().sum().sqrt()  # 0, of infinite slope
            return loss, count

    with pytest.raises(UserError, match="the gradient is not finite at step 3; .* holds the best weights"):
        train_toy(tmp_path, Steep())
    state = load_sealed(tmp_path / "cp" / "checkpoint.pth", "a checkpoint")
    assert state["state"]["step"] == 2 and all(torch.isfinite(w).all() for w in state["weights"].values())


def test_a_validation_loss_that_is_not_finite_stops_and_keeps_the_best_weights(tmp_path):
    class Late(Toy):
        calls = 0

        def forward(self, batch):
            self.calls += self.training
            loss, count = super().forward(batch)
            return loss * (math.inf if self.calls and not self.training else 1), count

    with pytest.raises(UserError, match=r"the validation loss is inf after step 2; .* holds the best weights so far"):
        train_toy(tmp_path, Late())
    best = load_sealed(tmp_path / "cp" / "checkpoint.pth", "a checkpoint")["best"]
    assert all(torch.equal(best[name], p) for name, p in Toy().named_parameters())


def test_a_shells_background_job_is_not_stopped_by_ctrl_c(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        after_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert train_toy(tmp_path).reason == "2 epochs done"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    after_step(monkeypatch, 1, twice)
    with pytest.raises(Interrupted, match="stopped without a new checkpoint") as caught:
        train_toy(tmp_path)
    assert caught.value.signum == signal.SIGTERM


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / "cp").mkdir()
    (tmp_path / "cp" / ".checkpoint.pth.123.tmp").write_text("half")
    train_toy(tmp_path, resume=True)
    assert [p.name for p in (tmp_path / "cp").iterdir()] == ["checkpoint.pth"]


def test_a_finished_runs_checkpoint_is_removed(tmp_path):
    train_toy(tmp_path)
    loop.finish(FitOptions(1, 1.0, tmp_path / "s.csv", tmp_path / "cp"))
    assert not (tmp_path / "cp").exists()


def test_two_runs_cannot_share_a_checkpoint_folder(tmp_path):
    with locked(tmp_path / "cp"), pytest.raises(UserError, match="cp: another run is writing it"):
        train_toy(tmp_path)


def test_memory_is_asked_of_the_device_that_trains(monkeypatch):
    """Five numbers a weight on the CPU. A GPU holds the weights already, and not the best ones: three."""
    for device, numbers in (("cpu", 5), ("cuda:1", 3)):
        asked = []
        monkeypatch.setattr(loop, "available_memory", lambda d, n=numbers, asked=asked: asked.append(d) or n * 4 * 100)
        loop.check_memory(torch.nn.Linear(10, 10, bias=False), device)
        with pytest.raises(UserError, match="of weights takes at least .* GB of memory"):
            loop.check_memory(torch.nn.Linear(101, 1, bias=False), device)
        loop.check_memory(torch.nn.Linear(999, 99).requires_grad_(False), device)
        assert asked == [device] * 3


def test_too_little_memory_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "available_memory", lambda device: 10)
    with pytest.raises(UserError, match="0.00 GB are available"):
        train_toy(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_validation_that_takes_more_than_its_share_is_told(made, text, tmp_path, monkeypatch, share):
    said = []
    monkeypatch.setattr(loop, "VALIDATION_SHARE", share)
    run(made, text, tmp_path, log=said.append, epochs=1, eval_every=1)
    assert sum("a larger --eval-every takes less" in line for line in said) == (share == 0.0)
