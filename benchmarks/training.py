#!/usr/bin/env python3
"""Measure how fast a model is trained: this toolkit's loop against transformers' Seq2SeqTrainer and a published loop.

Reads model files and parallel text. Each way of training starts from the model's weights and makes one epoch's steps
on the same pairs in float32, in turns, each time in a fresh process:

  toolkit            what baseline_finetuning.py does: batches of similar length, at most --batch-tokens
  Trainer, grouped   Seq2SeqTrainer, train_sampling_strategy group_by_length, text tokenised once
  Trainer            the same in random order, as by default
  published loop     tokenises every batch anew, the text's order, padded to the longest, AdamW as torch has it

The others take a fixed number of sentences a batch, so many that an epoch has as many steps, and so the same target
tokens a step. All have the same dropout, weight decay and highest learning rate; toolkit and Trainers let it rise and
fall alike, clip the gradient and use the fused AdamW. Of a masked model the toolkit trains what is left; the others
multiply its masks after every step. A round's number is its seed: where steps are few, the validation loss goes by
which lengths come last. Time runs from the strings to the trained
weights, without validations. Prints a table, ratios first; --json writes every round.

    python benchmarks/training.py -m origin_model.pth composed_model.pth --data multi30k --json training.json
"""

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import rounds  # noqa: E402
from benchmarks.rounds import Meter, by_turns, fresh, ratios, spread, table  # noqa: E402
from common import cli  # noqa: E402

OURS, GROUPED, TRAINER, PUBLISHED = "toolkit", "Trainer, grouped", "Trainer", "published loop"
CLIP, WEIGHT_DECAY, WARMUP = 1.0, 0.01, 0.05
BARS = {TRAINER: 1.6, PUBLISHED: 2.5}  # target tokens a second, over the better Trainer and over the published loop


@dataclass(frozen=True)
class Task:
    """What is trained, and how."""

    way: str
    model: Path
    data: Path
    pairs: int
    lr: float
    batch_tokens: int
    dropout: float | None
    allocator: bool
    seed: int = 0


class Counted:
    """A collator that notes of each batch its places, those that hold tokens, and those whose token is predicted."""

    def __init__(self, collate):
        self.collate, self.batches = collate, []

    def __call__(self, *arguments):
        batch = self.collate(*arguments)
        targets = int((batch["labels"] >= 0).sum())
        self.batches.append((batch["input_ids"].numel() + batch["labels"].numel(),
                             int(batch["attention_mask"].sum()) + targets, targets))
        return batch


def train(task: Task) -> dict:
    """Train in this process; return seconds, counts, losses and memory."""
    import torch

    from common import runtime
    from common.t5 import loss, model
    from common.text.batches import Batches, validation_text
    from common.text.corpus import Corpus, read_pairs

    torch.manual_seed(task.seed)
    loaded = model.load(task.model)
    corpus = Corpus(task.data, loaded.source, loaded.target)
    pairs, valid = read_pairs(corpus, "train")[:task.pairs], validation_text(corpus, loaded)
    steps = len(Batches(pairs, loaded, task.batch_tokens).epoch(0))
    if task.way == OURS or task.allocator:
        runtime.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        if task.way == OURS:
            row = toolkit(loaded, pairs, valid, task, Path(folder))
        else:
            network, tokenizer = transformers_model(loaded, Path(folder), task.dropout)
            way = published if task.way == PUBLISHED else trainer
            row = way(network, tokenizer, loaded, pairs, steps, task)
            loaded.network.load_state_dict(network.state_dict(), strict=False)  # judged by our network
            row["valid_loss"] = loss.evaluate(loss.TranslationLoss(loaded.network), valid, "cpu")
    # Trainer's loader is a batch ahead.
    places, tokens, targets = map(sum, zip(*row.pop("batches")[:steps], strict=True))
    return row | {"steps": steps, "targets": targets, "targets_per_second": targets / row["seconds"],
                  "padding": 1 - tokens / places}


def toolkit(loaded, pairs, valid, task: Task, folder: Path) -> dict:
    """Train by this toolkit's loop, as `common.training.finetuning` does; return a row, with every batch."""
    import csv

    from common.t5.loss import TranslationLoss
    from common.text.batches import Batches
    from common.training.finetuning import set_dropout
    from common.training.loop import FitOptions, fit
    from common.training.masks import Pruned

    options = FitOptions(epochs=1, lr=task.lr, stats=folder / "stats.csv", checkpoint=folder / "checkpoint",
                         max_grad_norm=CLIP)
    meter = Meter()
    meter.watch(valid)
    text = Batches(pairs, loaded, task.batch_tokens, task.seed)
    text.collate = counted = Counted(text.collate)
    with Pruned(loaded) as network:
        if task.dropout is not None:
            set_dropout(network, task.dropout)
        fit(TranslationLoss(network), text, valid, options, device="cpu", fingerprint={}, log=lambda _: None)
    row = meter.stop()
    with open(options.stats, newline="") as stream:  # the weights are the best ones, which may be those of the start
        last = list(csv.DictReader(stream))[-1]
    return row | {"batches": counted.batches} | {key: float(last[key]) for key in ("train_loss", "valid_loss")}


def transformers_model(loaded, folder: Path, dropout: float | None):
    """Return transformers' network with a model's weights, all heads and units in place, and the tokenizer."""
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration
    from transformers.utils import logging

    from common.export import folder as exported

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    exported.write(folder, loaded, "hf", "float32", "model")  # for its tokenizer; of the network it lacks pruned parts
    config = loaded.network.config.to_dict() | ({} if dropout is None else {"dropout_rate": dropout})
    network = T5ForConditionalGeneration(T5Config(**{k: v for k, v in config.items() if k != "model_type"}))
    network.load_state_dict(loaded.network.state_dict())
    return network, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def prepared(tokenizer, loaded, pairs) -> list[dict]:
    """Return tokenised pairs as transformers' examples have them."""
    made = tokenizer([loaded.prefix + s for s, _ in pairs], text_target=[t for _, t in pairs], truncation=True)
    return [{"input_ids": i, "attention_mask": a, "labels": t}
            for i, a, t in zip(made["input_ids"], made["attention_mask"], made["labels"], strict=True)]


def mask(network, masks: dict) -> None:
    """Set a network's removed weights to 0."""
    import torch

    with torch.no_grad():
        for name, kept in masks.items():
            network.get_parameter(name).mul_(kept)


def trainer(network, tokenizer, loaded, pairs, steps: int, task: Task) -> dict:
    """Train with Seq2SeqTrainer; return a row, with every batch."""
    import transformers as hf

    class Mask(hf.TrainerCallback):
        def on_step_end(self, *_, **__):
            mask(network, loaded.masks)

    with tempfile.TemporaryDirectory() as folder:
        arguments = hf.Seq2SeqTrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=round(len(pairs) / steps),
            learning_rate=task.lr, lr_scheduler_type="linear", warmup_steps=WARMUP, weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP, optim="adamw_torch_fused", use_cpu=True, dataloader_pin_memory=False, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=task.seed,
            train_sampling_strategy="group_by_length" if task.way == GROUPED else "random")
        meter, counted = Meter(), Counted(hf.DataCollatorForSeq2Seq(tokenizer, model=network))
        made = hf.Seq2SeqTrainer(
            model=network, args=arguments, train_dataset=prepared(tokenizer, loaded, pairs), data_collator=counted,
            processing_class=tokenizer, callbacks=[Mask()] if loaded.masks else None)
        made.remove_callback(hf.PrinterCallback)
        train_loss = made.train().training_loss
        return meter.stop() | {"batches": counted.batches, "train_loss": train_loss}


def published(network, tokenizer, loaded, pairs, steps: int, task: Task) -> dict:
    """Train with a loop as published scripts have it; return a row, with every batch."""
    import torch
    from transformers import DataCollatorForSeq2Seq

    meter, counted, losses = Meter(), Counted(DataCollatorForSeq2Seq(tokenizer, model=network)), []
    optimizer = torch.optim.AdamW(network.parameters(), lr=task.lr, weight_decay=WEIGHT_DECAY)
    size = round(len(pairs) / steps)
    starts = [*range(0, len(pairs), size)]
    network.train()
    for start in (starts * 2)[:steps]:  # rounding may leave a step for a second epoch
        loss = network(**counted(prepared(tokenizer, loaded, pairs[start:start + size]))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mask(network, loaded.masks)
        losses.append(loss.item())
    return meter.stop() | {"batches": counted.batches, "train_loss": sum(losses) / steps}


def main(argv=None) -> int:
    p = cli.parser(__doc__)
    p.add_argument("-m", "--model", type=Path, nargs="+", default=[Path("origin_model.pth")], metavar="MODEL",
                   help="model files, dense or masked")
    cli.add_data(p, limit=False)
    p.add_argument("--pairs", type=cli.count, default=4000, metavar="N", help="training pairs, the text's first")
    p.add_argument("--batch-tokens", type=cli.count, default=2048, metavar="N", help="of the toolkit's batches")
    p.add_argument("--lr", type=cli.positive, default=1e-3, metavar="X", help="learning rate")
    p.add_argument("--dropout", type=cli.probability, metavar="P", help="default: the model's own")
    p.add_argument("--threads", type=cli.count, default=1, metavar="N", help="of every program")
    p.add_argument("--allocator", action="store_true",
                   help="give the others, too, the toolkit's setting that freed memory is kept; a script has it not")
    rounds.add_measuring(p)
    args = p.parse_args(argv)

    machine, rows, met = rounds.machine(args.threads), [], []
    for path in args.model:
        done = by_turns(args.rounds, {
            way: lambda seed, task=Task(way, path, args.data, args.pairs, args.lr, args.batch_tokens, args.dropout,
                                        args.allocator): fresh(args.threads, train, replace(task, seed=seed))
            for way in (OURS, GROUPED, TRAINER, PUBLISHED)})
        speed = {way: median(r["targets_per_second"] for r in runs) for way, runs in done.items()}
        for way, bar in ((max((GROUPED, TRAINER), key=speed.get), BARS[TRAINER]), (PUBLISHED, BARS[PUBLISHED])):
            found = ratios(done[OURS], done[way], "targets_per_second")
            met.append(f"{path.name}: {spread(found)} times the target tokens/s of {way}; {bar} wanted: "
                       + ("met" if median(found) >= bar else "not met"))
        rows += [{"model": path.name, "way": way, "rounds": runs,
                  "ratios": ratios(done[OURS], runs, "targets_per_second")} for way, runs in done.items()]
    shown = {"seconds": 2, "cpu_seconds": 2, "targets_per_second": 0, "train_loss": 3, "valid_loss": 4}  # digits
    table(["model", "way", "toolkit's speed / its", "seconds", "CPU seconds", "target tokens/s",
           "training loss", "validation loss", "steps", "tokens a step", "padding", "peak MB", "of it before"],
          [[r["model"], r["way"], spread(r["ratios"]),
            *(spread([x[key] for x in r["rounds"]], digits) for key, digits in shown.items()), str(first["steps"]),
            f"{first['targets'] / first['steps']:,.0f}", f"{first['padding']:.1%}",
            *(f"{median(x[key] for x in r['rounds']):,.0f}" for key in ("peak_mb", "start_mb"))]
           for r in rows for first in r["rounds"][:1]])
    print("\n" + "\n".join(met))
    rounds.finish(args, machine=machine, pairs=args.pairs, lr=args.lr, allocator=args.allocator, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
