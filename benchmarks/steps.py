#!/usr/bin/env python3
"""Measure what each choice in a training step gives: the toolkit's steps against steps that differ in one thing.

Reads a model file, best one whose masks cover single weights, the original as its teacher, and parallel text. An epoch
on some pairs (forward and backward pass, AdamW) is made again and again in turns, in one process: as the toolkit makes
it, and with one thing done otherwise. Time is the processor's. Prints a table of quotients; --json writes every round.

    python benchmarks/steps.py -m composed_model.pth --teacher origin_model.pth --data multi30k --json steps.json
"""

import contextlib
import os
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import rounds  # noqa: E402
from benchmarks.rounds import Clock, by_turns, ratios, spread, table  # noqa: E402
from common import cli  # noqa: E402

OURS, TAUGHT = "toolkit", "toolkit, with a teacher that has read the text"
CHUNK = 256  # tokens


class Steps:
    """An epoch's steps in one way; calling it makes them and returns the time."""

    def __init__(self, model: Path, pairs, batch_tokens: int, optimizer: dict | None = None, teacher=None,
                 context=contextlib.nullcontext, loss=None, change=None):
        """
        Args:
            optimizer: keywords of torch's AdamW.
            teacher: what makes one of a network, text and device.
            context: in which steps are made.
            loss: of (objective, batch), the sum over tokens.
            change: what is done to (network, masks) beforehand.
        """
        import torch

        from common.t5 import model as models
        from common.t5.loss import TranslationLoss
        from common.text.batches import Batches
        from common.training.masks import Pruned

        self.context, self.loss = context, loss or (lambda objective, batch: objective(batch)[0])
        loaded = models.load(model)
        with self.context():
            text = Batches(pairs, loaded, batch_tokens)
            self.batches = [text.collate(examples) for examples in text.epoch(0)]
        if change:
            network = loaded.network.requires_grad_(True)
            change(network, loaded.masks)
        else:
            self._pruned = Pruned(loaded)  # its hooks mask gradients
            network = self._pruned.network
        self.objective = TranslationLoss(network, teacher and teacher(text)).train()
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, **optimizer or {"fused": True})

    def __call__(self, number: int) -> dict:
        clock = Clock()
        with self.context():
            for batch in self.batches:
                (self.loss(self.objective, batch) / int((batch["labels"] >= 0).sum())).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
        return clock.passed() | {"steps": len(self.batches)}


def masked_copies(network, masks: dict) -> None:
    """Multiply every masked weight by its mask in each forward pass."""
    import torch
    from torch.nn.utils import parametrize

    class Masked(torch.nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.mask = mask

        def forward(self, weight):
            return torch.where(self.mask, weight, 0.0)

    for name, mask in masks.items():
        module, _, leaf = name.rpartition(".")
        parametrize.register_parametrization(network.get_submodule(module), leaf, Masked(mask))


def hooks(network, masks: dict) -> None:
    """Mask the gradients of a whole network; of a shrunk one this is what `common.training.masks` does."""
    from common.training.masks import _mask_gradient

    for name, mask in masks.items():
        network.get_parameter(name).register_post_accumulate_grad_hook(partial(_mask_gradient, mask))


def everywhere(objective, batch):
    """Make logits at padding, too."""
    from torch.nn.functional import cross_entropy

    from common.t5.loss import network_inputs

    inputs, _ = network_inputs(batch, objective.network.config)
    logits = objective.network(**inputs | {"where": None})
    return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")


def in_chunks(objective, batch):
    """Make logits of a few tokens at a time, and again on the way back."""
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint

    from common.t5.loss import network_inputs

    def part(states, tokens):
        return cross_entropy(objective.network.head(states), tokens, reduction="sum")

    inputs, tokens = network_inputs(batch, objective.network.config)
    states = objective.network.states(**inputs)
    return sum(checkpoint(part, x, t, use_reentrant=False) for x, t in zip(states.split(CHUNK), tokens.split(CHUNK),
                                                                           strict=True))


def by_target():
    """Return a context in which batches are of similar target length."""
    from torchtext import data

    bucket = data.BucketIterator
    return patch.object(data, "BucketIterator", lambda *arguments, sort_key, **options: bucket(
        *arguments, sort_key=lambda e: (len(e.target), len(e.source)), **options))


def ways(args, pairs) -> dict[str, Steps]:
    """Return every way of making steps: the toolkit's, and those that differ from it in one thing."""
    import torch

    from common.t5 import model as models
    from common.t5 import network as t5
    from common.t5.loss import Teacher

    teacher = models.load(args.teacher).network
    steps = partial(Steps, args.model, pairs, args.batch_tokens)

    def read(text):
        made = Teacher(teacher)
        made.read(text, "cpu")
        return made

    def recompute(network, masks):
        hooks(network, masks)
        network.encoder.recompute = network.decoder.recompute = True

    def compiled(network, masks, kind):
        hooks(network, masks)
        for module in [m for m in network.modules() if isinstance(m, kind)]:
            module.compile(dynamic=True)

    attention = torch.nn.functional.scaled_dot_product_attention
    return {
        OURS: steps(),
        "not shrunk": steps(change=hooks),
        "not shrunk, masked copies of the weights instead of masked gradients": steps(change=masked_copies),
        "logits at padding, too": steps(loss=everywhere),
        f"logits and cross-entropy {CHUNK} tokens at a time": steps(loss=in_chunks),
        "torch's dropout": steps(context=lambda: patch.object(t5.Dropout, "forward", torch.nn.Dropout.forward)),
        "torch's scaled_dot_product_attention": steps(context=lambda: patch.object(
            t5, "attend", lambda q, k, v, bias, dropout: attention(
                q, k, v, bias.expand(*q.shape[:3], k.shape[2]), dropout.p, scale=1.0).transpose(1, 2).flatten(2))),
        "AdamW, foreach": steps({"foreach": True}),
        "AdamW, weight by weight": steps({"foreach": False}),
        "not shrunk, activations computed twice": steps(change=recompute),
        "batches by the target's length": steps(context=by_target),
        "not shrunk, compiled sub-layers": steps(change=partial(compiled, kind=t5.Layer)),
        "not shrunk, compiled network": steps(change=partial(compiled, kind=t5.T5)),
        TAUGHT: steps(teacher=read),
        "with a teacher that is asked every time": steps(teacher=lambda text: Teacher(teacher)),
    }


def main(argv=None) -> int:
    p = cli.parser(__doc__)
    cli.add_model(p)
    p.add_argument("--teacher", type=Path, default=Path("origin_model.pth"), metavar="MODEL", help="the original")
    cli.add_data(p, limit=False)
    p.add_argument("--pairs", type=cli.count, default=1000, metavar="N", help="training pairs, the text's first")
    p.add_argument("--batch-tokens", type=cli.count, default=1024, metavar="N", help="of a batch's longer side")
    rounds.add_measuring(p)
    args = p.parse_args(argv)

    import torch

    from common import runtime
    from common.t5 import model as models
    from common.text.corpus import read_pairs

    runtime.setup("cpu", 0)
    machine = rounds.machine(torch.get_num_threads())
    pairs = read_pairs(cli.corpus(args, models.load(args.model)), "train")[:args.pairs]
    tasks, first = ways(args, pairs), {}
    for name, task in list(tasks.items()):
        try:
            first[name] = task(0)["seconds"]  # compiles, where it does
        except RuntimeError as error:
            print(f"{name}: left out: {str(error).splitlines()[0]}", file=sys.stderr)
            del tasks[name]
    done = by_turns(args.rounds, tasks)
    rows = []
    for name, runs in done.items():
        base = TAUGHT if "teacher" in name else "not shrunk" if name.startswith("not shrunk,") else OURS
        rows.append({"way": name, "against": base, "first_seconds": first[name], "rounds": runs,
                     "ratios": ratios(runs, done[base], "cpu_seconds")})
    table(["way", "against", "processor time / its", "CPU seconds", "steps", "first epoch, s"],
          [[r["way"], r["against"], spread(r["ratios"]), spread([run["cpu_seconds"] for run in r["rounds"]]),
            str(r["rounds"][0]["steps"]), f"{r['first_seconds']:.1f}"] for r in rows])
    rounds.finish(args, machine=machine, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
