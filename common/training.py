"""The one training loop: batches, AdamW, validation, early stop, checkpoints, resume. The loss is passed in."""

import contextlib
import csv
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from torch import nn

from common import checkpoints, masking, models, runtime
from common.checkpoints import COLUMNS, State
from common.cli import CHECKPOINT, checkpoint_folder
from common.data import Batches, load_batches, text_input
from common.files import Interrupted, UserError, locked, write_bytes
from common.provenance import provenance

# A checkpoint is written at every validation, and in between so often that writing takes about 5 % of the time.
_CHECKPOINT_SHARE = 0.05
_CHECKPOINT_SECONDS = 15.0


@dataclass(frozen=True)
class FitOptions:
    """What the training flags say; see `common.cli.add_training` for units and meaning."""

    epochs: int
    lr: float
    checkpoint_dir: Path
    schedule: str = "constant"
    warmup: int = 0
    embedding_lr_factor: float = 1.0
    weight_decay: float = 0.01
    early_stop: float | None = None
    target_loss: float | None = None
    eval_every: int | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    max_grad_norm: float | None = 1.0

    @classmethod
    def from_args(cls, args, **changes) -> "FitOptions":
        values = {k: getattr(args, k) for k in (
            "epochs", "lr", "schedule", "warmup", "embedding_lr_factor", "weight_decay", "early_stop",
            "target_loss", "eval_every", "checkpoint_every", "resume")}
        return cls(**(values | {"checkpoint_dir": checkpoint_folder(args)} | changes))


@dataclass
class FitResult:
    """What a finished run reports: best validation loss and its epoch, steps, training seconds, why it ended."""

    best_loss: float
    best_epoch: float
    steps: int
    seconds: float
    reason: str


class TranslationLoss(nn.Module):
    """Cross-entropy of a T5 on a batch: ``forward`` returns (sum over target tokens, number of tokens).

    Two things are for training mode alone; what is evaluated is always the plain cross-entropy. Label smoothing
    (Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", section 7). Distillation (Hinton
    et al. 2015, "Distilling the Knowledge in a Neural Network", section 2, at temperature 1): with a share α, a token's
    target is not the reference's token alone, but 1 − α of that and α of the teacher's distribution, given the tokens
    before it. So what the teacher learned with label smoothing, dropout or more text is not forgotten.
    """

    def __init__(self, network, label_smoothing: float = 0.0, teacher=None, share: float = 0.0):
        super().__init__()
        self.label_smoothing, self.share = label_smoothing, share
        self.network = network
        self.teacher = [teacher]  # in a list: not a submodule, not trained, not saved
        self.training = network.training  # else `evaluate` would leave a network that was evaluated in training mode

    def forward(self, batch):
        inputs = network_inputs(batch, self.network.config)
        logits = self.network(**inputs).logits
        if not self.training:
            return token_loss(logits, batch["labels"])
        aims = predict(self.teacher[0], inputs) if self.share else None
        return token_loss(logits, batch["labels"], self.label_smoothing, aims, self.share)


def token_loss(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0,
               aims: torch.Tensor | None = None, share: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss, summed over target tokens, number of them); see `TranslationLoss`.

    Args:
        logits: (batch, tgt_len, vocabulary).
        labels: (batch, tgt_len), -100 where they do not count.
        aims: the teacher's logits, shaped as ``logits``.
        share: of the teacher's distribution in the targets.
    """
    valid = labels >= 0
    if aims is None:
        found, targets = logits.flatten(0, 1), labels.flatten()
    else:
        found, tokens = logits[valid], labels[valid][:, None]
        targets = aims[valid].softmax(dim=-1).mul_(share)
        targets.scatter_add_(1, tokens, targets.new_full(tokens.shape, 1 - share))
    return nn.functional.cross_entropy(found, targets, reduction="sum", label_smoothing=label_smoothing), valid.sum()


@torch.no_grad()
def predict(network, inputs: dict) -> torch.Tensor:
    """Return a network's logits for what `network_inputs` names."""
    return network(**inputs).logits


def network_inputs(batch, config) -> dict[str, torch.Tensor]:
    """Return what a T5 is called with, by name, for its logits at every target token of a batch."""
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"],
            "decoder_input_ids": shift_right(batch["labels"], config)}


def shift_right(labels: torch.Tensor, config) -> torch.Tensor:
    """Return the decoder's input for ``labels`` (batch, tgt_len): start token first, label padding as pad."""
    start = labels.new_full((labels.shape[0], 1), config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1]], dim=1).masked_fill_(
        torch.cat([torch.zeros_like(start), labels[:, :-1]], dim=1) < 0, config.pad_token_id)


@torch.no_grad()
def evaluate(objective: nn.Module, batches: Batches, device) -> float:
    """Return the objective's loss per token over a split, in evaluation mode (no dropout)."""
    was_training = objective.training
    objective.eval()
    total = count = 0.0
    for batch in batches.fixed(device):
        loss, n = objective(batch)
        total, count = total + float(loss), count + float(n)
    objective.train(was_training)
    return total / count


def statistics_csv(rows: list, columns=COLUMNS) -> bytes:
    """Return rows as CSV text with a header; floats in their shortest exact form."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if x is None else x for x in row] for row in rows)
    return text.getvalue().encode()


def _optimizer(objective: nn.Module, options: FitOptions) -> torch.optim.Optimizer:
    embeddings = {id(m.weight) for m in objective.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in objective.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if id(p) not in embeddings], "factor": 1.0},
              {"params": [p for p in trained if id(p) in embeddings], "factor": options.embedding_lr_factor}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=options.lr, weight_decay=options.weight_decay,
                             fused=True)


def say(text: str) -> None:
    """Print progress to stderr. If its reader has left (Ctrl-C ends ``… 2>&1 | tee`` first), go on without."""
    with contextlib.suppress(OSError, RuntimeError):  # the latter in a signal that met us within a write
        print(text, file=sys.stderr)


def available_memory() -> int | None:
    """Return how many bytes of memory new work may take, None where the system does not tell (not Linux)."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return None


def check_memory(objective: nn.Module, device) -> None:
    """Raise `UserError` if what training keeps for every weight does not fit into memory.

    Five numbers a weight: itself, its gradient, AdamW's two moments and the best state so far. Activations come on
    top; they depend on --batch-tokens and cannot be foreseen so surely.
    """
    weights = sum(p.numel() * p.element_size() for p in objective.parameters() if p.requires_grad)
    there = available_memory() if torch.device(device).type == "cpu" else None
    if there is not None and 5 * weights > there:
        raise UserError(f"training {weights / 1e9:.2f} GB of weights takes at least {5 * weights / 1e9:.2f} GB of "
                        f"memory (gradients, AdamW's state and the best weights included), {there / 1e9:.2f} GB are "
                        "available; free some memory, or train a smaller model")


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


def fit(objective: nn.Module, train: Batches, valid: Batches, options: FitOptions, *, device, stats: Path,
        fingerprint: dict, log: Callable[[str], None] = say) -> FitResult:
    """Train ``objective`` and leave the weights with the best validation loss in it.

    The first row of the statistics is the validation before any step (epoch 0, no training loss), so a start
    that is already good enough is kept and counted. An interrupted and resumed run equals an uninterrupted
    one: data order depends on seed and epoch alone; weights, optimizer, random state, counters and rows are
    in the checkpoint.

    Args:
        objective: ``objective(batch)`` returns (loss sum, count); its trainable parameters are trained. Mutated.
        stats: the CSV to write, one row an evaluation.
        fingerprint: what must be equal for a checkpoint to be resumed, {name: value}.

    Raises:
        UserError: the loss or a gradient is not finite, the checkpoint is of another run or in use, or memory is
            too small.
        Interrupted: after SIGINT or SIGTERM, with a checkpoint written.
    """
    check_memory(objective, device)
    folder = options.checkpoint_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created: {error.strerror}") from None
    with locked(folder), _Signals() as signals:
        result = _Run(objective, train, valid, options, device, stats, fingerprint, log, signals).run()
    return result


def finish(options: FitOptions) -> None:
    """Remove a finished run's checkpoint, once its result is safe on disk."""
    with contextlib.suppress(OSError):
        (options.checkpoint_dir / CHECKPOINT).unlink()
        options.checkpoint_dir.rmdir()


class _Run:
    """One call of `fit`; the methods share its state."""

    def __init__(self, objective, train, valid, options, device, stats, fingerprint, log, signals):
        self.objective, self.train, self.valid, self.options = objective, train, valid, options
        self.device, self.stats, self.log, self.signals = device, stats, log, signals
        self.fingerprint = fingerprint | {"training text": train.sha256, "validation text": valid.sha256}
        self.optimizer = _optimizer(objective, options)
        self.trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        self.state, self.best = State(), {}
        self.path = options.checkpoint_dir / CHECKPOINT
        self.clock = self.saved_at = time.perf_counter()
        self.save_seconds = 0.0

    def run(self) -> FitResult:
        self._start()
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
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(self.best[name])
        return FitResult(state.best_loss, state.best_epoch, state.step, state.seconds,
                         reason or f"{epochs} epochs done")

    def _start(self):
        for left in self.path.parent.glob(f".{CHECKPOINT}.*.tmp"):  # by a run that was killed while it wrote
            left.unlink()
        if self.path.exists() and not self.options.resume:
            # The stage has checked --overwrite; a stale checkpoint belongs to the run that is replaced.
            self.path.unlink()
        if self.options.resume and self.path.exists():
            self.state, self.best = checkpoints.load(self.path, self.fingerprint, self.trained, self.optimizer,
                                                     self.train, self.device)
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
        if options.early_stop and state.rows[-1][0] - state.best_epoch >= options.early_stop - 1e-9:
            return f"no better validation loss for {options.early_stop:g} epochs"
        return None

    def _learning_rate(self, total_batches: int) -> float:
        state, options = self.state, self.options
        rate = options.lr * min(1.0, (state.step + 1) / options.warmup) if options.warmup else options.lr
        if options.schedule == "linear":
            rate *= 1 - (state.epoch + state.batch / total_batches) / options.epochs
        return rate

    def _step(self, batches, total: int):
        state = self.state
        rate = self._learning_rate(total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        batch = self.train.collate(batches[state.batch], self.device)
        loss, count = self.objective(batch)
        (loss / count).backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])
        if not torch.isfinite(norm) or not torch.isfinite(loss):
            what = "loss" if not torch.isfinite(loss) else "gradient"
            raise UserError(f"the {what} is not finite at step {state.step + 1}; try a lower --lr"
                            + self._keep_best())
        if self.options.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.trained.values(), self.options.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.loss_sum += float(loss.detach())
        state.loss_count += float(count)
        state.step, state.batch = state.step + 1, state.batch + 1
        self._tick()

    def _tick(self) -> float:
        now = time.perf_counter()
        passed, self.clock = now - self.clock, now
        self.state.seconds += passed
        return passed

    def _validate(self, epoch: float):
        state = self.state
        self.clock = time.perf_counter()
        loss = evaluate(self.objective, self.valid, self.device)
        valid_seconds = time.perf_counter() - self.clock
        before = sum(row[3] for row in state.rows)
        train_loss = state.loss_sum / state.loss_count if state.loss_count else None
        rate = self.optimizer.param_groups[0]["lr"] if state.step else None
        state.rows.append([epoch, train_loss, loss, round(state.seconds - before, 4), round(valid_seconds, 4),
                           state.step, rate])
        state.loss_sum = state.loss_count = 0.0
        if loss < state.best_loss:
            state.best_loss, state.best_epoch = loss, epoch
            self.best = {name: p.detach().clone() for name, p in self.trained.items()}
        shown = "start    " if train_loss is None else f"train {train_loss:.4f}"
        self.log(f"epoch {epoch:6.2f}  step {state.step:6d}  {shown}  valid {loss:.4f}  "
                 f"{state.seconds:7.1f} s" + ("  *" if state.best_epoch == epoch else ""))
        if not math.isfinite(loss):
            raise UserError(f"the validation loss is {loss} after step {state.step}; try a lower --lr"
                            + self._keep_best())
        self._save()  # first: statistics without a checkpoint are those of another run
        self._write_statistics()
        self.clock = time.perf_counter()

    def _write_statistics(self):
        write_bytes(self.stats, statistics_csv(self.state.rows))

    def _keep_best(self) -> str:
        if not self.path.exists():
            return ""
        return (f"; {self.path} holds the best weights so far, the same command with --resume --target-loss 1e6 "
                "writes them")

    def _checkpoint_due(self) -> bool:
        if self.options.checkpoint_every:
            return self.state.step % self.options.checkpoint_every == 0
        return time.perf_counter() - self.saved_at > max(_CHECKPOINT_SECONDS, self.save_seconds / _CHECKPOINT_SHARE)

    def _save(self):
        began = time.perf_counter()
        checkpoints.save(self.path, self.fingerprint, self.state, self.trained, self.best, self.optimizer, self.device)
        self.saved_at = self.clock = time.perf_counter()
        self.save_seconds = self.saved_at - began

    def _yield_to_signal(self):
        if self.signals.caught:
            self._save()
            raise Interrupted(f"interrupted after step {self.state.step}; to go on, run the same command with "
                              f"--resume (checkpoint: {self.path})", self.signals.caught)


def fingerprint(args, **inputs: str) -> dict:
    """Return what must be equal for a run to be resumed: all arguments that decide the result, and input hashes."""
    ignored = {"resume", "overwrite", "checkpoint_dir", "checkpoint_every", "output", "stats", "device", "early_stop",
               "target_loss"}
    ignored |= {name for name in vars(args) if isinstance(getattr(args, name), Path)}
    return {k: str(v) for k, v in vars(args).items() if k not in ignored} | inputs


def set_dropout(network, probability: float) -> None:
    """Set the dropout of all of a T5's modules, attention weights included; its configuration stays. Mutates it."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(getattr(module, "dropout", None), float):  # of attention weights
            module.dropout = probability


def finetune_model(stage: str, args, model, inputs: dict, teacher=None) -> int:
    """Train a complete model as the flags say and write it; what baseline and model level share.

    Args:
        stage: the script's name, for the provenance.
        model: a `common.models.Model`; its masks stay in force. Mutated.
        teacher: the model to distil from, if the flags say so.
        inputs: what it was made from, for the provenance and for --resume; the text is added. Mutated.
    """
    device = runtime.setup(args.device, args.seed, args.threads)
    with locked(args.output, args.stats):
        train, valid = load_batches(args, model)
        inputs |= {"training text": text_input(args, train), "validation text": text_input(args, valid)}
        options = FitOptions.from_args(args)
        if teacher:
            models.place(teacher.network, device).eval().requires_grad_(False)
        objective = TranslationLoss(models.place(model.network, device), args.label_smoothing,
                                    teacher and teacher.network, args.distillation)
        if args.dropout is not None:
            set_dropout(model.network, args.dropout)
        masking.enforce(model.network, model.masks)
        hashes = {role: sha for role, (_, sha, _) in inputs.items()}
        result = fit(objective, train, valid, options, device=device, stats=args.stats,
                     fingerprint=fingerprint(args, **hashes))
        masking.release(model.network)
        if args.source_prefix is not None:
            model.prefix = args.source_prefix
        model.provenance = provenance(stage, args, inputs)
        models.save(args.output, model)
        finish(options)
    print(f"{args.output}: validation loss {result.best_loss:.4f} (epoch {result.best_epoch:g}), {result.steps} "
          f"steps in {result.seconds:.1f} s; {result.reason}; {models.mask_report(model)}")
    print(f"next: python evaluate.py -m {args.output}; python plot_loss.py {args.stats}")
    return 0
