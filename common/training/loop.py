"""The one training loop: batches, AdamW, validation, checkpoints, resume. The loss is passed in."""

import contextlib
import csv
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from torch import nn

from common import distributed
from common.errors import Interrupted, UserError
from common.files.atomic import locked, write_bytes
from common.runtime import available_memory, progress, say
from common.t5.loss import evaluate
from common.t5.network import Dropout
from common.text.batches import Batches, rows
from common.training import checkpoint
from common.training.checkpoint import COLUMNS, State
from common.training.parts import Parts, autocast

CHECKPOINT = "checkpoint.pth"
# A checkpoint is written at the start, and then so often that writing takes about 5 % of the time.
_CHECKPOINT_SHARE = 0.05
_CHECKPOINT_SECONDS = 15.0
WEIGHT_DECAY = 0.01
VALIDATION_SHARE = 0.1  # of the time; more is reported
# An untrained T5's embeddings have a standard deviation of 1, so that with the others' learning rate AdamW hardly moves
# them (validation loss after the first epoch 4.86; with six times the rate 4.24).
EMBEDDING_FACTOR = 6.0
WARMUP = 0.05  # of all steps


@dataclass(frozen=True)
class FitOptions:
    """How a run trains; `common.cli.add_training` says units and meaning.

    Attributes:
        stats: the CSV to write, one row an evaluation.
        checkpoint: the folder in which an interrupted run leaves its state.
        dropout: while training; None for the model's own.
        lr: the learning rate, which rises for the first `WARMUP` of all steps and then falls linearly to 0.
        max_grad_norm: None to leave gradients as they are.
    """

    epochs: int
    lr: float
    stats: Path
    checkpoint: Path
    target_loss: float | None = None
    eval_every: int | None = None
    resume: bool = False
    dropout: float | None = None
    max_grad_norm: float | None = 1.0


@dataclass
class FitResult:
    """What a finished run reports: best validation loss and its epoch, steps, training seconds, why it ended."""

    best_loss: float
    best_epoch: float
    steps: int
    seconds: float
    reason: str

    def __str__(self):
        return (f"validation loss {self.best_loss:.4f} (epoch {self.best_epoch:g}), {self.steps} steps in "
                f"{self.seconds:.1f} s; {self.reason}")


def statistics_csv(rows: list, columns=COLUMNS) -> bytes:
    """Return rows as CSV text with a header; floats in their shortest exact form."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if x is None else x for x in row] for row in rows)
    return text.getvalue().encode()


def _optimizer(objective: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return AdamW; the embeddings are a group of their own, the last one."""
    embeddings = {id(m.weight) for m in objective.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in objective.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (id(p) in embeddings) == those], "embeddings": those}
              for those in (False, True)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, weight_decay=WEIGHT_DECAY, fused=True)


def check_memory(objective: nn.Module, device) -> float:
    """Return how many bytes are left for activations beside what training keeps for every weight.

    On the CPU five numbers a weight: itself (mapped from its file so far), its gradient, AdamW's two moments and the
    best state. A GPU holds the weights already and leaves the best state to the CPU.

    Raises:
        UserError: that alone does not fit into the device's memory.
    """
    weights, on_cpu = sum(p.nbytes for p in objective.parameters() if p.requires_grad), torch.device(
        device).type == "cpu"
    needed, there = weights * (5 if on_cpu else 3), available_memory(device)
    if there is not None and on_cpu:
        there //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that share the machine
    if there is not None and needed > there:
        raise UserError(f"training {weights / 1e9:.2f} GB of weights takes at least {needed / 1e9:.2f} GB of memory "
                        f"(gradients and AdamW's state included), {there / 1e9:.2f} GB are available; free some "
                        "memory, or train a smaller model")
    return math.inf if there is None else there - needed


class _Signals:
    """SIGINT and SIGTERM are noted while the block runs; the loop looks between steps. A second one stops at once."""

    def __enter__(self):
        self.caught = None
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)
                     if signal.getsignal(s) != signal.SIG_IGN}
        return self

    def _note(self, signum, frame):
        if self.caught:
            raise Interrupted("stopped without a new checkpoint", signum)
        self.caught = signum
        say("\nstopping after this step …")

    def __exit__(self, *error):
        for s, handler in self._old.items():
            signal.signal(s, handler)


def fit(objective: nn.Module, train: Batches, valid: Batches, options: FitOptions, *, device,
        fingerprint: dict, spent: float = 0.0, log: Callable[[str], None] = say) -> FitResult:
    """Train ``objective`` and leave the weights with the best validation loss in it.

    The first row of the statistics is the validation before any step (epoch 0, no training loss), so a start
    that is already good enough is kept and counted. An interrupted and resumed run equals an uninterrupted
    one: data order depends on seed and epoch alone; weights, optimizer, random state, counters and rows are
    in the checkpoint.

    Args:
        objective: ``objective(batch)`` returns (loss sum, count); its trainable parameters are trained. Mutated.
        fingerprint: what must be equal for a checkpoint to be resumed, {name: value}.
        spent: seconds that the start has cost; they stand in the first row of the statistics and count in the result.

    Raises:
        UserError: the loss or a gradient is not finite, the checkpoint is of another run or in use, or memory is
            too small.
        Interrupted: after SIGINT or SIGTERM, with a checkpoint written.
    """
    room = check_memory(objective, device)
    folder = options.checkpoint
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created: {error.strerror}") from None
    with locked(folder), _Signals() as signals:
        result = _Run(objective, train, valid, options, device, fingerprint, spent, log, signals, room).run()
    return result


def can_resume(options: FitOptions) -> bool:
    """Tell whether there is a checkpoint that the run will go on from."""
    return options.resume and (options.checkpoint / CHECKPOINT).exists()


def finish(options: FitOptions) -> None:
    """Remove a finished run's checkpoint, once its result is safe on disk."""
    with contextlib.suppress(OSError):
        if not distributed.first():
            return
        (options.checkpoint / CHECKPOINT).unlink()
        options.checkpoint.rmdir()


class _Run:
    """One call of `fit`; the methods share its state."""

    def __init__(self, objective, train, valid, options, device, fingerprint, spent, log, signals, room):
        self.objective, self.train, self.valid, self.options = objective, train, valid, options
        self.device, self.log, self.signals = device, log, signals
        self.fingerprint = fingerprint | {"training text": train.sha256, "validation text": valid.sha256}
        self.optimizer = _optimizer(objective, options.lr)
        self.words = max((m.num_embeddings for m in objective.modules() if isinstance(m, nn.Embedding)), default=0)
        self.trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        self.state, self.best = State(seconds=spent), {}
        self.path = options.checkpoint / CHECKPOINT
        self.clock = self.saved_at = time.perf_counter()
        self.save_seconds = 0.0
        self.parts, self.told = Parts(objective, room), False

    def run(self) -> FitResult:
        distributed.check_same(self.fingerprint | {"checkpoint to go on from": str(can_resume(self.options))})
        self._start()
        if self.options.epochs > 1 and not self.options.target_loss:  # else a part of the text may be all that is asked
            alone = distributed.size() == 1  # several processes have not all as many batches
            self.parts.let_read(self.train, self.device, self._yield_to_signal if alone else lambda: None)
        with progress(what="training", total=self.options.epochs * len(self.train.epoch(0)), initial=self.state.step,
                      unit="step") as self.bar:
            return self._train()

    def _train(self) -> FitResult:
        state, options, epochs = self.state, self.options, self.options.epochs
        reason = self._stop_reason()
        while reason is None and state.epoch < epochs:
            batches = self.train.epoch(state.epoch)
            self.objective.train()
            while state.batch < len(batches):
                self._step(batches, len(batches))
                last = state.batch == len(batches)
                if last or (options.eval_every and state.step % options.eval_every == 0):
                    if last:
                        state.epoch, state.batch = state.epoch + 1, 0
                    self._validate(state.epoch + state.batch / len(batches))
                    reason = self._stop_reason()
                    if reason or last:
                        break
                elif self._checkpoint_due():
                    self._save()
                self._yield_to_signal()
            self._yield_to_signal()
        validation = sum(row[4] for row in state.rows)
        if validation > VALIDATION_SHARE * (state.seconds + validation):
            self.log(f"validation took {validation:.1f} of {state.seconds + validation:.1f} s"
                     + ("; a larger --eval-every takes less" if options.eval_every else ""))
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(self.best[name])
        return FitResult(state.best_loss, state.best_epoch, state.step, state.seconds,
                         reason or f"{epochs} epochs done")

    def _start(self):
        if distributed.first():
            for left in self.path.parent.glob(f".{CHECKPOINT}.*.tmp"):  # by a run that was killed while it wrote
                left.unlink()
            if self.path.exists() and not self.options.resume:
                # The stage has checked --overwrite; a stale checkpoint belongs to the run that is replaced.
                self.path.unlink()
        if can_resume(self.options):
            self.state, self.best = checkpoint.load(self.path, self.fingerprint, self.trained, self.optimizer,
                                                     self.train, self.device)
            distributed.check_same({"checkpoint's step": str(self.state.step)})
            self.log(f"resuming after step {self.state.step} from {self.path}")
            self._write_statistics()
            self.clock = time.perf_counter()
        else:
            if self.options.resume:
                self.log(f"no checkpoint in {self.path.parent}; starting from the beginning")
            self._validate(0.0)

    def _stop_reason(self) -> str | None:
        state, options = self.state, self.options
        if options.target_loss and state.rows[-1][2] <= options.target_loss:
            return f"target loss {options.target_loss:g} reached"
        return None

    def _learning_rate(self, total_batches: int) -> float:
        state, options = self.state, self.options
        done = (state.epoch + state.batch / total_batches) / options.epochs
        return options.lr * min(1 - done, (done + 1 / (total_batches * options.epochs)) / WARMUP)

    def _step(self, batches, total: int):
        state = self.state
        rate = self._learning_rate(total)
        # No better than guessing: untrained, or pruned so that little of what was learned is left.
        untrained = self.words and state.rows[0][2] >= math.log(self.words)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * (EMBEDDING_FACTOR if untrained and group["embeddings"] else 1)
        loss, count = self._forward_and_backward(self.train.collate(batches[state.batch], self.device))
        norm = nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])
        if not torch.isfinite(norm) or not math.isfinite(loss):
            what = "loss" if not math.isfinite(loss) else "gradient"
            self._diverged(f"the {what} is not finite at step {state.step + 1}")
        if self.options.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.trained.values(), self.options.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.loss_sum += loss
        state.loss_count += count
        state.step, state.batch = state.step + 1, state.batch + 1
        self.bar.update()
        self._tick()

    def _forward_and_backward(self, batch) -> tuple[float, float]:
        """Leave the gradient of a batch's mean loss in the parameters; return (loss sum, count) of the batch.

        Each process takes its share of the sentences, in as many parts as its memory asks for. On a CPU dropout is
        that of one process and of one part; a GPU draws its own for each.
        """
        size, own_parts = distributed.size(), self.parts.of(batch)
        if size == own_parts == 1:
            with autocast(self.device):
                loss, count = self.objective(batch)
            (loss / count).backward()
            return float(loss.detach()), float(count)
        if torch.device(self.device).type == "cuda":  # by the step, so that a resumed run draws the same
            torch.cuda.manual_seed((torch.initial_seed() << 32) + self.state.step * size + distributed.rank())
        if own_parts > 1:
            self._tell_once(f"memory is short: batches are added up in parts, the present one in {own_parts}")
        drawn, loss_sum, count = torch.get_rng_state(), 0.0, 0.0
        for i in range(own_parts):
            torch.set_rng_state(drawn)  # each draws for the whole batch, and takes its rows
            part, own = rows(batch, distributed.rank() + i * size, own_parts * size)
            Dropout.rows = len(batch["labels"]), own
            with autocast(self.device):
                loss, tokens = self.objective(part)
            loss.backward()
            loss_sum, count = loss_sum + float(loss.detach()), count + float(tokens)
        Dropout.rows = None
        loss_sum, count = distributed.sums(loss_sum, count)
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        if size > 1:
            together = torch.cat([g.flatten() for g in gradients])
            distributed.add_up(together)
            for g, summed in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
                g.copy_(summed.view_as(g))
        torch._foreach_div_(gradients, count)
        return loss_sum, count

    def _tell_once(self, what: str) -> None:
        if not self.told:
            self.told = True
            self.log(what)

    def _tick(self) -> float:
        now = time.perf_counter()
        passed, self.clock = now - self.clock, now
        self.state.seconds += passed
        return passed

    def _validate(self, epoch: float):
        state = self.state
        self.clock = time.perf_counter()
        with autocast(self.device):
            loss = evaluate(self.objective, self.valid, self.device)
        valid_seconds = time.perf_counter() - self.clock
        if not math.isfinite(loss):
            self._diverged(f"the validation loss is {loss} after step {state.step}")
        before = sum(row[3] for row in state.rows)
        train_loss = state.loss_sum / state.loss_count if state.loss_count else None
        rate = self.optimizer.param_groups[0]["lr"] if state.step else None
        state.rows.append([epoch, train_loss, loss, round(state.seconds - before, 4), round(valid_seconds, 4),
                           state.step, rate])
        state.loss_sum = state.loss_count = 0.0
        if loss < state.best_loss:
            state.best_loss, state.best_epoch = loss, epoch
            self.best = {name: p.detach().to("cpu", copy=True) for name, p in self.trained.items()}
        shown = "start    " if train_loss is None else f"train {train_loss:.4f}"
        self.log(f"epoch {epoch:6.2f}  step {state.step:6d}  {shown}  valid {loss:.4f}  "
                 f"{state.seconds:7.1f} s" + ("  *" if state.best_epoch == epoch else ""))
        if not state.step or self._checkpoint_due():  # at the start: statistics without one are those of another run
            self._save()
        self._write_statistics()
        self.clock = time.perf_counter()

    def _write_statistics(self):
        write_bytes(self.options.stats, statistics_csv(self.state.rows))

    def _diverged(self, what: str):
        """Save the best weights so far, if there are any, and end the run."""
        kept = ""
        if self.best:
            self._save()
            kept = (f"; {self.path} holds the best weights so far (validation loss {self.state.best_loss:.4f}), "
                    "the same command with --resume --target-loss 1e6 writes them")
        raise UserError(f"{what}; try a lower --lr{kept}")

    def _checkpoint_due(self) -> bool:
        return time.perf_counter() - self.saved_at > max(_CHECKPOINT_SECONDS, self.save_seconds / _CHECKPOINT_SHARE)

    def _save(self):
        began = time.perf_counter()
        checkpoint.save(self.path, self.fingerprint, self.state, self.trained, self.best, self.optimizer, self.device)
        self.saved_at = self.clock = time.perf_counter()
        self.save_seconds = self.saved_at - began

    def _yield_to_signal(self):
        caught = distributed.highest(self.signals.caught or 0)  # all stop after the same step
        if caught:
            self._save()
            raise Interrupted(f"interrupted after step {self.state.step}; to go on, run the same command with "
                              f"--resume (checkpoint: {self.path})", caught)
