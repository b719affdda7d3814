#!/usr/bin/env python3
"""Measure how fast and how well block-level fine-tuning methods reconstruct all prunable blocks of a model.

    python benchmarks/block_level.py --model origin_model.pth --data-dir data/multi30k [--out docs/results]

A  exact      common.reconstruction.tune_exactly at several calibration sizes; at the largest also followed by steps
              on the attentions that lost heads (common.attention)
B  gradient   common.distillation.BlockReconstruction, AdamW, on the largest of these calibration texts
C  published  every pruned module beside its original in one pass: one AdamW over all, sum of MSE losses, 256
              sentences a batch, 20 epochs over the whole training text; a part is measured, the rest extrapolated
D  SparseGPT  the weight update of Frantar & Alistarh (2023), Algorithm 1, with the masks and statistics of A

All tune the same variants, three rates of every block, on the CPU. One ruler measures them: the mean over all
variants of E|y - y'|² / E|y|², y the block's output on validation text, padding left out. Seconds are those of
tuning: not of loading, tokenising, validating or sweeping learning rates. What a peer leaves open is decided in its
favour and said in the output. Each part has a process, and so a peak memory, of its own. Run it on an idle machine.
Writes block_level.json and block_level.png (block_level_report.py).
"""

import itertools
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import block_level_report as report  # noqa: E402
from benchmarks.block_level_report import EXACT, GRADIENT, PUBLISHED, STEPPED, lowest  # noqa: E402
from common import cli  # noqa: E402

# (head rate, rate of linear weights); every part tunes the first three, growth is measured on the first 1, 3 and 6.
RATES = ((0.25, 0.5), (0.5, 0.7), (0.5, 0.8), (0.125, 0.3), (0.25, 0.6), (0.375, 0.75))
TUNED, GROWTH = 3, (1, 3, 6)
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
PUBLISHED_EPOCHS, PUBLISHED_BATCH = 20, 256
ATTENTION_STEPS = (100, 400)
SPARSEGPT_DAMPING = (1e-2, 1e-4)  # the paper's, and ours


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("-m", "--model", type=Path, default=Path("origin_model.pth"), metavar="MODEL",
                   help="original model file")
    p.add_argument("--out", type=Path, default=Path("docs/results"), metavar="DIR", help="folder to write to")
    p.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    p.add_argument("--sentences", nargs="+", type=cli.count, default=[500, 2000, 4000], metavar="N",
                   help="calibration sizes of A and D, training pairs; B trains on the largest")
    p.add_argument("--gradient-seconds", type=cli.positive, default=180, metavar="S", help="training time of B's run")
    p.add_argument("--published-seconds", type=cli.positive, default=180, metavar="S", help="training time of C's run")
    p.add_argument("--sweep-seconds", type=cli.positive, default=10, metavar="S",
                   help="training time that B and C spend on each learning rate before that")
    p.add_argument("--batch-tokens", type=cli.count, default=2048, metavar="N", help="tokens a step, except in C")
    p.add_argument("--seed", type=cli.index, default=0, metavar="INT", help="which pairs and in which order")
    p.add_argument("--threads", type=cli.count, metavar="N", help="CPU threads (default: all cores)")
    cli.add_data(p)
    return p


class Setting:
    """What every part starts from: model, text, banks of variants."""

    def __init__(self, args, folder: str):
        import torch

        from common import data, models, runtime

        self.args, self.folder, self.device = args, Path(folder), runtime.setup("cpu", args.seed, args.threads)
        self.model = models.load(args.model)
        self.network = models.place(self.model.network, self.device).requires_grad_(False)
        options = data.DataOptions.from_args(args)
        self.pairs, valid = (data.read_pairs(options, split) for split in ("train", "val"))
        self.valid = self.batches(valid)
        self.facts = {"threads": torch.get_num_threads(), "loaded_mib": peak(), "model": self.model.identity}

    def batches(self, pairs):
        from common.data import Batches

        return Batches(pairs, self.model, self.args.batch_tokens, self.args.seed, self.args.source_prefix)

    def calibration(self, sentences: int):
        from common.data import sample

        return self.batches(sample(self.pairs, sentences, self.args.seed))

    def bank(self, rates: int):
        """Return a bank with the first ``rates`` rates of every block, masked only."""
        from common import bank, composition, configs
        from common.modules import prunable

        path = self.folder / f"{rates}.npy"
        if not path.exists():
            scheme = configs.make_scheme([configs.uniform(prunable(self.network), *r) for r in RATES[:rates]])
            with bank.create(path, self.model.identity, configs.scheme_digest(scheme), None, {}) as writer:
                for variant in composition.prune_scheme(self.network, scheme):
                    writer.add(variant)
        return bank.load(path)


def peak() -> int:
    """Return this process's largest resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


@dataclass
class Candidate:
    """A block's weights by their name in the block, zero outside ``masks``; ``heads`` (kept,) if physically fewer."""

    block: str
    weights: dict
    masks: dict
    heads: object = None


def from_variant(variant, heads: int | None = None) -> Candidate:
    """Return a variant as a candidate; with ``heads``, the original's number, removed ones physically gone."""
    weights, masks = ({name.removeprefix(f"{variant.block}."): tensor for name, tensor in tensors.items()}
                      for tensors in (variant.weights, variant.masks))
    if heads is None or "q.weight" not in weights:
        return Candidate(variant.block, weights, masks)
    rows = masks["q.weight"].any(dim=1)
    weights = {name: w[:, rows] if name == "o.weight" else w[rows] for name, w in weights.items()}
    return Candidate(variant.block, weights, {"o.weight": masks["o.weight"][:, rows]},
                     rows.view(heads, -1).any(dim=1).nonzero().flatten())


def in_parallel(network, candidates, batch):
    """Run the original, then each candidate on its block's input; yield (candidate, its output, the original's)."""
    import torch
    from torch.func import functional_call

    from common.reconstruction import run_stacks

    seen = {}

    def watch(block):
        def hook(module, args, kwargs, output):
            seen[block] = args, kwargs, output
        return network.get_submodule(block).register_forward_hook(hook, with_kwargs=True)

    hooks = [watch(block) for block in {c.block for c in candidates}]
    with torch.no_grad():
        run_stacks(network, batch)
    for handle in hooks:
        handle.remove()
    for c in candidates:
        args, kwargs, target = seen[c.block]
        if c.heads is not None:  # fewer heads need their slice of the position bias that the layers share
            kwargs = kwargs | {"position_bias": target[1][:, c.heads]}
        weights = {n: torch.where(c.masks[n], w, 0.0) if n in c.masks else w for n, w in c.weights.items()}
        output = functional_call(network.get_submodule(c.block), weights, args, kwargs)
        yield c, *(y[0] if isinstance(y, tuple) else y for y in (output, target))


def summary(blocks, errors) -> dict:
    """Return the mean error over all variants, and over those of either kind; they belong to ``blocks``."""
    from common.modules import kind_of

    def mean(*kinds):
        chosen = [e for block, e in zip(blocks, errors, strict=True) if kind_of(block) in kinds]
        value = sum(chosen) / len(chosen)
        return value if math.isfinite(value) else 1e9  # it diverged; JSON has no infinity

    return {"error": mean("attention", "linear"), "attention_error": mean("attention"), "linear_error": mean("linear")}


def judge(network, candidates, valid) -> dict:
    """Return the `summary` of E|y - y'|² / E|y|² on the validation text."""
    import torch

    from common.reconstruction import valid_tokens

    sums = torch.zeros(2, len(candidates), dtype=torch.float64)
    with torch.no_grad():
        for batch in valid.fixed():
            for i, (c, output, target) in enumerate(in_parallel(network, candidates, batch)):
                at = valid_tokens(c.block, batch)
                sums[:, i] += torch.stack([(output - target)[at].square().sum(), target[at].square().sum()])
    return summary([c.block for c in candidates], (sums[0] / sums[1]).tolist())


class Timed:
    """Batches that add up the seconds from a pass's first batch to its end, whoever makes it."""

    def __init__(self, batches):
        self.batches, self.seconds = batches, 0.0

    def epoch(self, number):
        return self.batches.epoch(number)

    def fixed(self, device):
        began = time.perf_counter()
        yield from self.batches.fixed(device)
        self.seconds += time.perf_counter() - began


def note(series: list, **point) -> None:
    """Append a point with the peak memory so far and show it."""
    series.append(point | {"peak_mib": peak()})
    print("    " + ", ".join(f"{k} {v:.5g}" for k, v in series[-1].items()), file=sys.stderr)


def part_a(setting: Setting) -> dict:
    """Exact solver: points; growth with the rates of statistics and solving, and of the whole stage script."""
    from common import attention, reconstruction, solver

    args, most = setting.args, max(setting.args.sentences)

    def tune(series, rates, sentences, steps=0):
        text, bank = Timed(setting.calibration(sentences)), setting.bank(rates)
        options = {"budget": 4 << 30, "damping": solver.DAMPING, "curve": reconstruction.Curve(),
                   "log": lambda text: None}
        place = text, setting.valid, setting.device
        reports = reconstruction.tune_exactly(setting.network, bank, *place, **options)
        reports = list(attention.tune(setting.network, bank, reports, *place, **options, steps=steps)
                       if steps else reports)
        solving = sum(r.seconds for r in reports)
        masked, tuned = (summary([r.variant.block for r in reports], [getattr(r, when) for r in reports])
                         for when in ("valid_before", "valid_after"))
        note(series, sentences=len(text.batches), seconds=text.seconds + solving, statistics_seconds=text.seconds,
             solve_seconds=solving, **tuned, masked_error=masked["error"])
        return [r.variant for r in reports]

    series, forward = {EXACT: [], STEPPED: []}, {}
    tune([], 1, min(args.sentences))  # warm up
    for sentences in sorted(args.sentences):
        variants = tune(series[EXACT], TUNED, sentences)
    forward[EXACT] = judge(setting.network, list(map(from_variant, variants)), setting.valid)["error"]
    for steps in ATTENTION_STEPS:
        variants = tune(series[STEPPED], TUNED, most, steps)
        series[STEPPED][-1]["attention_steps"] = steps
    forward[STEPPED] = judge(setting.network, list(map(from_variant, variants)), setting.valid)["error"]
    inner, stage, top = {}, {}, peak()
    for rates, _ in itertools.product(GROWTH, range(2)):
        tune(runs := [], rates, most)
        inner[rates] = min(runs[0]["seconds"], inner.get(rates, math.inf))
    output = setting.folder / "tuned.npy"
    command = [sys.executable, ROOT / "block-level_finetuning.py", "-m", args.model, "-o", output, "--overwrite",
               "--stats", output.with_suffix(".csv"), "--calibration-sentences", most]
    for name in ("data", "data_dir", "source", "target", "source_prefix", "max_train_sentences", "batch_tokens", "seed",
                 "threads"):
        if getattr(args, name) is not None:
            command += [f"--{name.replace('_', '-')}", getattr(args, name)]
    for rates in 2 * (TUNED, 2 * TUNED):  # by turns, and the quicker counts: other load on the machine only adds
        began = time.perf_counter()
        subprocess.run([*map(str, command), "-p", setting.bank(rates).path], check=True, stderr=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL)
        stage[rates] = min(time.perf_counter() - began, stage.get(rates, math.inf))
    return {"series": series, "error_by_forward_pass": forward, "peak_mib": top,
            "growth": {f"{EXACT}: statistics and solving": inner, f"{EXACT}: the whole stage script": stage}}


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


def sweep_and_run(setting, label: str, start_with, batches, budget: float, linear: bool) -> dict:
    """Try each learning rate for equally many steps, run the best for about ``budget`` seconds, measure growth.

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
        candidates = descend(start, batches(), lr, tries, linear=linear)[2]
        note(sweep, lr=lr, steps=tries, **measure(candidates))
    best = lowest(sweep)["lr"]
    steps = max(4, round(budget / pace))
    seconds, series, _ = descend(start, batches(), best, steps, measure, linear)
    result = {"series": {label: series}, "sweep": sweep, "lr": best, "steps": steps,
              "seconds_per_step": seconds / steps, "peak_mib": peak()}
    batch = next(batches())
    result["growth"] = {f"{label}: a step": {
        rates: min(descend(lambda n=rates: start_with(setting.bank(n)), itertools.repeat(batch), 1e-3, 1)[0]
                   for _ in range(4)) for rates in GROWTH}}
    return result


def part_b(setting: Setting) -> dict:
    """Gradient mode: bucketed batches, relative errors, the learning rate falls linearly to 0."""
    from common.distillation import BlockReconstruction

    text = setting.calibration(max(setting.args.sentences))

    def start_with(bank):
        objective = BlockReconstruction(setting.network, bank, setting.valid, setting.device)

        def backward(batch):
            loss, tokens = objective(batch)
            (loss / tokens).backward()
        return list(objective.parameters()), backward, lambda: list(map(from_variant, objective.tuned()))

    def batches():
        return (text.collate(e) for number in itertools.count() for e in text.epoch(number))

    run = sweep_and_run(setting, GRADIENT, start_with, batches, setting.args.gradient_seconds, linear=True)
    return run | {"epochs": run["steps"] / len(text.epoch(0))}


def part_c(setting: Setting) -> dict:
    """Published protocol: batches in data order, padding counts in the loss, a constant learning rate."""
    from torch.nn.functional import mse_loss

    text = setting.batches(setting.pairs)
    examples = text.dataset.examples
    begins = range(0, len(examples), PUBLISHED_BATCH)

    def start_with(bank):
        candidates = [from_variant(bank.read(key), setting.network.config.num_heads) for key in bank.entries]

        def backward(batch):
            # The gradient of the sum, one summand after the other: the same time, two thirds of the memory.
            for _, output, target in in_parallel(setting.network, candidates, batch):
                mse_loss(output, target).backward()
        return [w.requires_grad_() for c in candidates for w in c.weights.values()], backward, lambda: candidates

    def batches():
        return (text.collate(examples[at:at + PUBLISHED_BATCH]) for _ in itertools.count() for at in begins)

    run = sweep_and_run(setting, PUBLISHED, start_with, batches, setting.args.published_seconds, linear=False)
    steps = PUBLISHED_EPOCHS * len(begins)
    return run | {"epochs": run["steps"] / len(begins), "pairs": len(examples), "full_epochs": PUBLISHED_EPOCHS,
                  "full_steps": steps, "full_seconds": steps * run["seconds_per_step"]}


def sparse_gpt(gram, target, mask, damping: float, block: int = 128):
    """Return the weights (rows, in) that SparseGPT's update leaves, zero outside the mask.

    Frantar & Alistarh (2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot"), Algorithm 1
    with a given mask: columns from left to right; removing a weight moves those to its right by the optimal brain
    surgeon's update, with H = 2(G + λI) and H⁻¹ = UᵀU from one Cholesky factor; later blocks of columns at once.
    """
    import torch

    h = 2 * (gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype))
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w, kept = target.double().T.contiguous(), mask.T.contiguous()  # (in, rows): a column is contiguous
    for begin in range(0, len(w), block):
        end = min(begin + block, len(w))
        errors = torch.zeros_like(w[begin:end])
        for j in range(begin, end):
            errors[j - begin] = torch.where(kept[j], 0.0, w[j]) / u[j, j]
            w[j:end] -= torch.outer(u[j, j:end], errors[j - begin])
        w[end:] -= u[begin:end, end:].T @ errors
    return torch.where(kept, w, 0.0).T


def part_d(setting: Setting) -> dict:
    """SparseGPT's update on A's statistics: all rates of a block at once, as in A."""
    import torch

    from common import reconstruction as r
    from common.modules import kind_of

    bank = setting.bank(TUNED)
    blocks = list(dict.fromkeys(block for block, _ in bank.entries))
    sites = list(dict.fromkeys(map(r.input_site, blocks)))
    checks = r.gather(setting.network, setting.valid, sites, setting.device)
    series = {f"D SparseGPT, damping {damping:g}": [] for damping in SPARSEGPT_DAMPING}
    for sentences in sorted(setting.args.sentences):
        text = Timed(setting.calibration(sentences))
        grams = r.gather(setting.network, text, sites, setting.device)
        for damping, points in zip(SPARSEGPT_DAMPING, series.values(), strict=True):
            seconds, errors = 0.0, []
            for block in blocks:
                name = f"{block}.o.weight" if kind_of(block) == "attention" else f"{block}.weight"
                target, site = setting.network.get_parameter(name).detach(), r.input_site(block)
                masks = [bank.read(key).masks[name] for key in bank.entries if key[0] == block]
                began = time.perf_counter()
                weight = sparse_gpt(grams[site].matrix, target.repeat(len(masks), 1), torch.cat(masks), damping)
                seconds += time.perf_counter() - began
                scale = r.power(checks[site].matrix, target)
                errors += [(block, r.error(checks[site].matrix, target, w) / scale) for w in weight.split(len(target))]
            note(points, sentences=len(text.batches), seconds=text.seconds + seconds, statistics_seconds=text.seconds,
                 solve_seconds=seconds, **summary(*zip(*errors, strict=True)))
    return {"series": series, "peak_mib": peak()}


PARTS = {"A": part_a, "B": part_b, "C": part_c, "D": part_d}


def run_part(args, name: str) -> dict:
    """Run one part; called in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(args, folder)
        began = time.perf_counter()
        result = PARTS[name](setting)
        return result | setting.facts | {"wall_seconds": time.perf_counter() - began}


def cpu_name() -> str:
    """Return the processor's name where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    written, picture = args.out / "block_level.json", args.out / "block_level.png"
    cli.check_inputs(args.model)
    cli.check_outputs(True, written, picture)
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from common import files
    from common.provenance import provenance

    hardware = {"cpu": cpu_name(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    results, failed = {}, {}
    for name in args.part:
        print(f"part {name} …", file=sys.stderr)
        # A pool for each part: a fresh process, and one that is killed (memory) fails its own part alone.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                results[name] = pool.submit(run_part, args, name).result()
            except Exception as error:
                if isinstance(error, files.UserError) and not results:
                    raise  # a wrong file or flag fails every part alike
                failed[name] = f"{type(error).__name__}: {error}"
                traceback.print_exception(error)
    if results:
        hardware["threads"] = next(iter(results.values()))["threads"]
        report.show(results)
        report.draw(picture, results)
        files.write_json(written, {
            "rates": RATES[:TUNED], "hardware": hardware, "bars": report.bars(results), "results": results,
            "failed": failed, "provenance": provenance("benchmarks/block_level.py", args, {
                "model": (args.model, next(iter(results.values()))["model"], {})})})
        print(f"\n{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads, load before "
              f"{hardware['load_before']:.1f}; written: {written}, {picture}")
    for name, problem in failed.items():
        print(f"part {name} FAILED: {problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
