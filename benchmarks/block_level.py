#!/usr/bin/env python3
"""Measure how fast and how well block-level fine-tuning methods reconstruct all prunable blocks of a model.

    python benchmarks/block_level.py -m origin_model.pth --data multi30k --out docs/results

A  exact      common.tuning.exact at several calibration sizes, least squares alone; at the largest also the recipe,
              with steps on the attentions that lost heads (common.tuning.attention_steps)
B  gradient   common.tuning.gradient, AdamW, on the largest of these calibration texts
C  published  every pruned module beside its original in one pass: one AdamW over all, sum of MSE losses, 256
              sentences a batch, 20 epochs over the whole training text; a part is measured, the rest extrapolated
D  SparseGPT  the weight update of Frantar & Alistarh (2023), Algorithm 1, with the masks and statistics of A

All tune the same variants, three rates of every block, on the CPU. One ruler measures them, a forward pass: the mean
over all variants of E|y - y'|² / E|y|², y the block's output on validation text, padding left out. Seconds are those of
tuning: not of loading, tokenising, validating or sweeping learning rates. What a peer leaves open is decided in its
favour and said in the output. Each part has a process, and so a peak memory, of its own. Run it on an idle machine.
Writes block_level.json and block_level.png (block_level_report.py).
"""

import itertools
import math
import os
import platform
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import block_level_report as report  # noqa: E402
from benchmarks.block_level_report import EXACT, GRADIENT, PUBLISHED, RECIPE, lowest  # noqa: E402
from benchmarks.blocks import from_variant, in_parallel, judge, sparse_gpt  # noqa: E402
from common import cli  # noqa: E402

# (head rate, rate of linear weights); every part tunes the first three, growth is measured on the first 1, 3 and 6.
RATES = ((0.25, 0.5), (0.5, 0.7), (0.5, 0.8), (0.125, 0.3), (0.25, 0.6), (0.375, 0.75))
TUNED, GROWTH = 3, (1, 3, 6)
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
PUBLISHED_EPOCHS, PUBLISHED_BATCH = 20, 256
SPARSEGPT_DAMPING = (1e-2, 1e-4)  # the paper's, and ours


def build_parser():
    p = cli.parser(__doc__)
    cli.add_model(p)
    p.add_argument("--out", type=Path, default=Path("docs/results"), metavar="DIR", help="folder to write to")
    p.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    p.add_argument("--sentences", nargs="+", type=cli.count, default=[500, 2000, 4000], metavar="N",
                   help="calibration sizes of A and D; B trains on the largest")
    p.add_argument("--seconds", type=cli.positive, default=180, metavar="S", help="training time of B's and of C's run")
    p.add_argument("--sweep-seconds", type=cli.positive, default=10, metavar="S",
                   help="training time that B and C spend on each learning rate before that")
    cli.add_seed(p)
    cli.add_data(p)
    return p


class Setting:
    """What every part starts from: model, text, banks of variants."""

    def __init__(self, args, folder: str):
        import torch

        from common import runtime
        from common.t5 import model
        from common.text import batches, corpus

        self.args, self.folder, self.device = args, Path(folder), runtime.setup("cpu", args.seed)
        self.model = model.load(args.model)
        self.network = self.model.network.to(self.device).requires_grad_(False)
        self.corpus = cli.corpus(args, self.model)
        self.pairs = corpus.read_pairs(self.corpus, "train")
        self.valid = batches.validation_text(self.corpus, self.model)
        self.one = batches.Batches(self.pairs[:1], self.model)  # where a stage wants validation text, and we judge
        self.facts = {"threads": torch.get_num_threads(), "loaded_mib": peak(), "model": self.model.identity}

    def calibration(self, sentences: int):
        from common.text.batches import calibration_text

        return calibration_text(self.corpus, self.model, self.args.seed, sentences)

    def bank(self, rates: int):
        """Return a bank with the first ``rates`` rates of every block, masked only."""
        from common.pruning import bank, scheme, variants
        from common.pruning.configurations import uniform
        from common.t5.modules import prunable

        path = self.folder / f"{rates}.npy"
        if not path.exists():
            made = scheme.make_scheme([uniform(prunable(self.network), *r) for r in RATES[:rates]])
            with bank.create(path, self.model.identity, scheme.scheme_digest(made), None, {}) as writer:
                for variant in variants.prune_scheme(self.model, made):
                    writer.add(variant)
        return bank.load(path)


def peak() -> int:
    """Return this process's largest resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def note(series: list, **point) -> None:
    """Append a point with the peak memory so far and show it."""
    series.append(point | {"peak_mib": peak()})
    print("    " + ", ".join(f"{k} {v:.5g}" for k, v in series[-1].items()), file=sys.stderr)


def part_a(setting: Setting) -> dict:
    """Exact solver and recipe: points; the exact solver's seconds by the number of rates."""
    from common.tuning import exact

    most, series = max(setting.args.sentences), {EXACT: [], RECIPE: []}

    def tune(rates, sentences, steps=0) -> tuple[float, list]:
        text, bank = setting.calibration(sentences), setting.bank(rates)
        began = time.perf_counter()
        reports = list(exact.tune(setting.network, bank, text, setting.one, setting.device, steps))
        return time.perf_counter() - began, [from_variant(r.variant) for r in reports]

    def point(label, sentences, **steps):
        seconds, candidates = tune(TUNED, sentences, **steps)
        note(series[label], sentences=sentences, seconds=seconds,
             **judge(setting.network, candidates, setting.valid), **steps)

    opened = setting.bank(TUNED)
    masked = judge(setting.network, [from_variant(opened.read(key)) for key in opened.entries], setting.valid)["error"]
    tune(1, min(setting.args.sentences))  # warm up
    for sentences in sorted(setting.args.sentences):
        point(EXACT, sentences)
    point(RECIPE, most, steps=exact.ATTENTION_STEPS)
    top, growth = peak(), {}
    for rates, _ in itertools.product(GROWTH, range(2)):  # by turns: other load on the machine only adds
        growth[rates] = min(tune(rates, most)[0], growth.get(rates, math.inf))
    return {"series": series, "masked_error": masked, "peak_mib": top, "growth": growth}


def descend(start, batches, lr: float, steps: int, measure=None, linear=False) -> tuple[float, list, object]:
    """Take AdamW steps from a fresh ``start()`` = (parameters, backward(batch), candidates()).

    Returns:
        Training seconds, with ``measure`` points at ever longer distances, candidates().
    """
    import torch

    parameters, backward, candidates = start()
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    seconds, series, due = 0.0, [], 4
    for step in range(1, steps + 1):
        began = time.perf_counter()
        optimizer.param_groups[0]["lr"] = lr * (1 - (step - 1) / steps) if linear else lr
        backward(next(batches))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - began
        if measure and (step >= due or step == steps):
            due = step * 1.5
            note(series, step=step, seconds=seconds, **measure(candidates()))
    return seconds, series, candidates()


def sweep_and_run(setting, label: str, start_with, batches, linear: bool) -> dict:
    """Try each learning rate for equally many steps, run the best for about --seconds.

    Args:
        start_with: what `descend` starts from, for a bank.
        batches: returns the endless batches.
    """
    def start():
        return start_with(setting.bank(TUNED))

    def measure(candidates):
        return judge(setting.network, candidates, setting.valid)

    descend(start, batches(), 1e-3, 1)  # warm up
    pace, sweep = descend(start, batches(), 1e-3, 3)[0] / 3, []
    for lr in LEARNING_RATES:
        tries = max(3, round(setting.args.sweep_seconds / pace))
        note(sweep, lr=lr, steps=tries, **measure(descend(start, batches(), lr, tries, linear=linear)[2]))
    best, steps = lowest(sweep)["lr"], max(4, round(setting.args.seconds / pace))
    seconds, points, _ = descend(start, batches(), best, steps, measure, linear)
    return {"series": {label: points}, "sweep": sweep, "lr": best, "steps": steps, "seconds_per_step": seconds / steps}


def part_b(setting: Setting) -> dict:
    """Gradient mode: bucketed batches, relative errors, the learning rate falls linearly to 0."""
    from common.tuning.gradient import BlockReconstruction

    text = setting.calibration(max(setting.args.sentences))

    def start_with(bank):
        objective = BlockReconstruction(setting.network, bank, setting.valid, setting.device)

        def backward(batch):
            loss, tokens = objective(batch)
            (loss / tokens).backward()
        return list(objective.parameters()), backward, lambda: list(map(from_variant, objective.tuned()))

    def batches():
        return (text.collate(e) for number in itertools.count() for e in text.epoch(number))

    run = sweep_and_run(setting, GRADIENT, start_with, batches, linear=True)
    return run | {"epochs": run["steps"] / len(text.epoch(0))}


def part_c(setting: Setting) -> dict:
    """Published protocol: batches in data order, padding counts in the loss, a constant learning rate."""
    from torch.nn.functional import mse_loss

    from common.text.batches import Batches

    text = Batches(setting.pairs, setting.model)
    examples = text.dataset.examples
    begins = range(0, len(examples), PUBLISHED_BATCH)

    def start_with(bank):
        candidates = [from_variant(bank.read(key), setting.network.config.num_heads) for key in bank.entries]

        def backward(batch):
            # The gradient of the sum, one summand after the other: the same time, two thirds of the memory.
            for _, output, target, _ in in_parallel(setting.network, candidates, batch):
                mse_loss(output, target).backward()
        return [w.requires_grad_() for c in candidates for w in c.weights.values()], backward, lambda: candidates

    def batches():
        return (text.collate(examples[at:at + PUBLISHED_BATCH]) for _ in itertools.count() for at in begins)

    run = sweep_and_run(setting, PUBLISHED, start_with, batches, linear=False)
    steps = PUBLISHED_EPOCHS * len(begins)
    return run | {"epochs": run["steps"] / len(begins), "pairs": len(examples), "full_epochs": PUBLISHED_EPOCHS,
                  "full_steps": steps, "full_seconds": steps * run["seconds_per_step"]}


def part_d(setting: Setting) -> dict:
    """SparseGPT's update on A's statistics: all rates of a block at once, as in A."""
    import torch

    from common.t5.modules import kind_of
    from common.t5.walk import walk

    bank, series = setting.bank(TUNED), {}
    for sentences, damping in itertools.product(sorted(setting.args.sentences), SPARSEGPT_DAMPING):
        text, candidates, began = setting.calibration(sentences), [], time.perf_counter()
        for sublayer in walk(setting.network, [list(text.fixed())], setting.device):
            for block, seen in sublayer.moments(0, sublayer.blocks({block for block, _ in bank.entries})).items():
                name = f"{block}.o.weight" if kind_of(block) == "attention" else f"{block}.weight"
                target, variants = setting.network.get_parameter(name), [
                    bank.read(key) for key in bank.entries if key[0] == block]
                tuned = sparse_gpt(seen.gram(), target.repeat(len(variants), 1),
                                   torch.cat([v.masks[name] for v in variants]), damping).float()
                for variant, weight in zip(variants, tuned.split(len(target)), strict=True):
                    variant.weights[name] = weight
                candidates += map(from_variant, variants)
        note(series.setdefault(f"D SparseGPT, damping {damping:g}", []), sentences=sentences,
             seconds=time.perf_counter() - began, **judge(setting.network, candidates, setting.valid))
    return {"series": series, "peak_mib": peak()}


PARTS = {"A": part_a, "B": part_b, "C": part_c, "D": part_d}


def run_part(args, name: str) -> dict:
    """Run one part; called in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(args, folder)
        return PARTS[name](setting) | setting.facts


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from common.files.atomic import check_inputs
    from common.files.jsonfile import write_json
    from common.files.provenance import provenance

    check_inputs(args.model)
    names, results = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()), {}
    hardware = {"cpu": (names or [platform.machine()])[0], "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    for name in args.part:
        print(f"part {name} …", file=sys.stderr)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # a process, and so a peak, of its own
            results[name] = pool.submit(run_part, args, name).result()
    hardware["threads"], identity = (next(iter(results.values()))[key] for key in ("threads", "model"))
    report.show(results)
    report.draw(args.out / "block_level.png", results)
    write_json(args.out / "block_level.json", {
        "rates": RATES[:TUNED], "hardware": hardware, "results": results, "provenance": provenance(
            "benchmarks/block_level.py", vars(args), {"model": (args.model, identity, {})})})
    print(f"\n{hardware}; written: block_level.json and block_level.png in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
