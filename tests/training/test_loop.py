import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common import runtime
from common.errors import Interrupted, UserError
from common.files.archive import load_sealed
from common.files.atomic import locked
from common.t5 import model as models
from common.t5.loss import TranslationLoss, evaluate
from common.training import checkpoint, loop
from common.training.loop import FitOptions, fit
from common.training.masks import Masks
from tests.mutants import Toy, train_toy


def run(made, text, folder: Path, objective=None, log=lambda text: None, **changes):
    """Train the small pruned model for two epochs; return (weights, result, statistics rows without times)."""
    torch.manual_seed(0)
    model = models.load(made / "pruned.pth")
    objective = objective(model.network) if objective else TranslationLoss(model.network)
    folder.mkdir(exist_ok=True)
    options = replace(FitOptions(epochs=2, lr=1e-2, stats=folder / "s.csv", checkpoint=folder / "cp"), **changes)
    with Masks(model.network, model.masks):
        result = fit(objective, *text, options, device="cpu", fingerprint={"a": 1}, log=log)
    rows = [row.split(",") for row in (folder / "s.csv").read_text().splitlines()]
    return ({n: p.detach().clone() for n, p in objective.named_parameters()}, result,
            [row[:3] + row[5:] for row in rows])


def always(monkeypatch):
    """Make a checkpoint due after every step."""
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(loop, "_CHECKPOINT_SHARE", math.inf)


def after_step(monkeypatch, number: int, action):
    """Call ``action`` once, after a training step."""
    step = loop._Run._step

    def acting(self, *arguments):
        step(self, *arguments)
        if self.state.step == number:
            monkeypatch.setattr(loop._Run, "_step", step)
            action()

    monkeypatch.setattr(loop._Run, "_step", acting)


def die():
    raise MemoryError  # as good as a kill: nothing is written after it


def test_training_lowers_the_loss_and_leaves_the_best_weights(made, text, tmp_path):
    model = models.load(made / "pruned.pth")
    before = evaluate(TranslationLoss(model.network), text[1], "cpu")
    weights, result, rows = run(made, text, tmp_path)
    assert result.best_loss < before and float(rows[1][2]) == before
    model.network.load_state_dict({n.removeprefix("network."): w for n, w in weights.items()}, strict=False)
    assert evaluate(TranslationLoss(model.network), text[1], "cpu") == result.best_loss
    assert all(not model.network.get_parameter(name)[~mask].any() for name, mask in model.masks.items())


def test_the_best_epoch_is_kept_even_if_it_is_the_start(made, text, tmp_path):
    weights, result, rows = run(made, text, tmp_path, lr=30.0)
    start = dict(models.load(made / "pruned.pth").network.named_parameters())
    assert result.best_epoch == 0 and result.best_loss == float(rows[1][2])
    assert torch.equal(weights["network.shared.weight"], start["shared.weight"])


def test_the_best_weights_are_a_copy_on_the_cpu(made, text, tmp_path, monkeypatch):
    """A GPU holds weights, gradients and moments already. A meta device stands for it."""
    seen = []
    monkeypatch.setattr(checkpoint, "save_sealed", lambda path, content: seen.append(content["best"]))
    toy = Toy()
    train_toy(tmp_path, toy, epochs=1)
    assert all(t.device.type == "cpu" and t.data_ptr() != toy.get_parameter(n).data_ptr() for n, t in seen[0].items())

    class Far(torch.Tensor):
        asked = []

        def detach(self):
            return self

        def to(self, *where, **how):
            Far.asked.append((where, how))

    toy_run = SimpleNamespace(state=checkpoint.State(), trained={"w": torch.zeros(2).as_subclass(Far)}, valid=None,
                              objective=None, device="cpu", optimizer=None, log=lambda text: None, clock=0.0,
                              _save=lambda: None, _write_statistics=lambda: None)
    monkeypatch.setattr(loop, "evaluate", lambda *arguments: 1.0)
    loop._Run._validate(toy_run, 0.0)
    assert Far.asked == [(("cpu",), {"copy": True})]


def test_target_loss_stops_at_once(made, text, tmp_path):
    _, result, rows = run(made, text, tmp_path, target_loss=100.0)
    assert result.steps == 0 and len(rows) == 2 and "target loss 100 reached" in result.reason


def test_early_stop(made, text, tmp_path):
    _, result, rows = run(made, text, tmp_path, lr=30.0, epochs=50, early_stop=2.0)
    assert result.reason == "no better validation loss for 2 epochs" and float(rows[-1][0]) == 2.0


@pytest.mark.parametrize(("epochs", "better", "patience"), [((0.0, 1.3, 2.3), 1.3, 1.0), ((0.0, 0.2, 0.3), 0.2, 0.1)])
def test_early_stop_counts_parts_of_an_epoch(tmp_path, epochs, better, patience):
    state = checkpoint.State(best_epoch=better)
    for epoch in epochs:
        state.rows.append([epoch, None, 2.0])
        options = FitOptions(9, 1e-3, tmp_path, tmp_path, early_stop=patience)
        reason = loop._Run._stop_reason(SimpleNamespace(state=state, options=options))
        assert (reason is not None) == (epoch == epochs[-1])


def test_early_stop_counts_on_after_a_resume(made, text, tmp_path, monkeypatch):
    changes = {"lr": 30.0, "epochs": 50, "early_stop": 2.0}
    whole = run(made, text, tmp_path / "one", **changes)
    after_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        run(made, text, tmp_path / "two", **changes)
    resumed = run(made, text, tmp_path / "two", resume=True, **changes)
    assert resumed[1].reason == whole[1].reason == "no better validation loss for 2 epochs"
    assert resumed[2] == whole[2] and float(resumed[2][-1][0]) == 2.0


def test_eval_every_counts_steps(made, text, tmp_path):
    _, _, rows = run(made, text, tmp_path, eval_every=4, epochs=1)
    assert [int(row[3]) for row in rows[1:4]] == [0, 4, 8]


def test_from_scratch_the_learning_rate_warms_up_and_falls(made, text, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "WARMUP", 4)
    _, _, rows = run(made, text, tmp_path, from_scratch=True, eval_every=2, lr=1e-3)
    steps = {int(row[3]): float(row[4]) for row in rows[2:]}
    total = max(steps)
    assert steps[2] == pytest.approx(1e-3 * 2 / 4 * (1 - 1 / total), rel=1e-6)
    assert steps[total] == pytest.approx(1e-3 * 1 / total, rel=1e-6)


def test_from_scratch_embeddings_learn_faster(origin, tmp_path):
    for scratch, factors in ((False, [1.0, 1.0]), (True, [1.0, loop.EMBEDDING_FACTOR])):
        optimizer = loop._optimizer(origin.network, FitOptions(1, 1.0, tmp_path, tmp_path, from_scratch=scratch))
        assert [group["factor"] for group in optimizer.param_groups] == factors
        assert any(p is origin.network.shared.weight for p in optimizer.param_groups[1]["params"])


@pytest.mark.parametrize(("step", "signum"), [(1, signal.SIGINT), (5, signal.SIGTERM), (9, signal.SIGINT)])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(made, text, tmp_path, monkeypatch, step, signum):
    """Weights bit for bit, statistics, best epoch; data order, dropout, optimizer and learning rate included."""
    changes = {"from_scratch": True, "eval_every": 3, "early_stop": 5.0}
    whole = run(made, text, tmp_path / "one", **changes)
    after_step(monkeypatch, step, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(Interrupted, match=f"interrupted after step {step}; .* --resume") as caught:
        run(made, text, tmp_path / "two", **changes)
    assert caught.value.signum == signum
    torch.manual_seed(99)
    resumed = run(made, text, tmp_path / "two", resume=True, **changes)
    assert resumed[2] == whole[2] and resumed[1].best_epoch == whole[1].best_epoch
    assert all(torch.equal(whole[0][name], resumed[0][name]) for name in whole[0])


def test_checkpoints_are_written_at_the_start_and_then_so_that_writing_takes_5_percent(tmp_path, monkeypatch):
    """A clock that goes on by 1 s a step and 2 s a checkpoint: one every 41 steps, and none for the many validations."""
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


def test_cheap_checkpoints_are_written_every_15_seconds(monkeypatch):
    written = SimpleNamespace(saved_at=0.0, save_seconds=0.001)
    for now, due in ((14.9, False), (15.1, True)):
        monkeypatch.setattr(loop.time, "perf_counter", lambda now=now: now)
        assert loop._Run._checkpoint_due(written) is due


def test_a_killed_run_goes_on_from_its_last_checkpoint(made, text, tmp_path, monkeypatch):
    whole = run(made, text, tmp_path / "one")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        always(patch)
        after_step(patch, 6, die)
        run(made, text, tmp_path / "two")
    (tmp_path / "two" / "s.csv").unlink()  # written after the checkpoint: the kill may come between them
    said = []
    resumed = run(made, text, tmp_path / "two", resume=True, log=said.append)
    assert said[0].startswith("resuming after step 5 ") and resumed[2] == whole[2]
    assert all(torch.equal(whole[0][name], resumed[0][name]) for name in whole[0])


class Exploding(TranslationLoss):
    """Its loss is not a number in the third training step, nor in any later one."""

    calls = 0

    def forward(self, batch):
        loss, count = super().forward(batch)
        self.calls += self.training
        return loss * (math.nan if self.training and self.calls >= 3 else 1), count


def test_after_a_loss_that_is_not_finite_the_advice_writes_the_best_weights(made, text, tmp_path):
    with pytest.raises(UserError, match="the loss is not finite at step 3; try a lower --lr; .*checkpoint.pth holds "
                                        r"the best weights so far .* --resume --target-loss 1e6 writes them"):
        run(made, text, tmp_path, Exploding, eval_every=2)
    best = load_sealed(tmp_path / "cp" / "checkpoint.pth", "a checkpoint")["best"]
    weights, result, rows = run(made, text, tmp_path, Exploding, eval_every=2, resume=True, target_loss=1e6)
    assert result.steps == 2 and result.reason == "target loss 1e+06 reached"
    assert all(torch.equal(weights[name], best[name]) for name in weights)
    assert result.best_loss == min(float(row[2]) for row in rows[1:])


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

    with pytest.raises(UserError, match=r"the validation loss is inf after step 2; .* holds the best weights so far, "
                                        "?|the validation loss is inf after step 2; .* holds the best weights so far"):
        train_toy(tmp_path, Late())
    best = load_sealed(tmp_path / "cp" / "checkpoint.pth", "a checkpoint")["best"]
    assert all(torch.equal(best[name], p) for name, p in Toy().named_parameters())


def test_a_start_that_is_not_finite_promises_nothing(tmp_path):
    toy = Toy()
    with torch.no_grad():
        toy.bias.fill_(math.nan)
    with pytest.raises(UserError, match="the validation loss is nan after step 0; try a lower --lr$"):
        train_toy(tmp_path, toy)


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
    monkeypatch.setattr(runtime, "available_memory", None)
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
