#!/usr/bin/env python3
"""Measure what block level and recalibration recover before any model-level fine-tuning.

Reads a model file and Multi30K. Four tables, each judged by the composed model's validation loss and BLEU: how much
calibration text is enough; attention (choice of heads, what is fitted); linear modules (criterion); recalibration.
Writes recovery.json (raw, a finished row is not measured again) and calibration.png into --out.

    python benchmarks/recovery.py --model origin_model.pth --data-dir data/multi30k --out out/recovery
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from common import attention as attention_descent
from common import bank, composition, configs, data, files, metrics, models, modules, recalibration, runtime, training
from common import hidden as hidden_units
from common import reconstruction as rec

SIZES = (64, 125, 250, 500, 1000, 2000, 4000, 8000, 29000)
CRITERIA = ("l1", "wanda", "obs")
HIDDEN = 500  # sentences for the hidden units' moments


class Bench:
    """The original model, the text, and the rows measured so far."""

    def __init__(self, args):
        runtime.setup("cpu", 0, args.threads)
        self.path, self.out = args.model, args.out
        self.results = args.out / "recovery.json"
        self.rows = json.loads(self.results.read_text()) if self.results.exists() else {}
        self.original = models.load(args.model)
        if self.rows.setdefault("model", self.original.identity) != self.original.identity:
            raise SystemExit(f"{self.results}: holds rows of another model; give another --out")
        self.network = models.place(self.original.network, "cpu")
        options = data.DataOptions("multi30k", args.data_dir, "en", "de", "test_2016_flickr")
        self.train, self.test = (data.read_pairs(options, split) for split in ("train", "test_2016_flickr"))
        self.valid = data.Batches(data.read_pairs(options, "val"), self.original, 8192)
        self.test_batches = data.Batches(self.test, self.original, 8192)
        self.kinds = modules.prunable(self.network)

    def text(self, size: int) -> data.Batches:
        return data.Batches(data.sample(self.train, size, 0), self.original, 2048)

    def variants(self, configuration, criterion="l1", calibration=None) -> tuple[list, float]:
        """Return a configuration's pruned variants and the seconds they took."""
        began = time.perf_counter()
        scheme = configs.make_scheme([configuration])
        made = composition.prune_scheme(self.network, scheme) if criterion == "l1" else \
            composition.prune_scheme_by_activations(self.network, scheme, criterion, calibration, "cpu", 4 << 30)
        return list(made), time.perf_counter() - began

    def tune(self, variants, calibration, steps=0, units=False) -> tuple[list, float, float]:
        """Return the exactly tuned variants, the seconds, and their mean relative error on validation text.

        Args:
            steps: on attentions.
            units: fit wi for the hidden units.
        """
        path = self.out / "recovery.tmp.npy"
        with bank.create(path, "", "", None, {}) as writer:
            for variant in variants:
                writer.add(variant)
        began = time.perf_counter()
        opened = bank.load(path)
        text, options = (calibration, self.valid, "cpu"), {"budget": 4 << 30, "damping": 1e-4, "curve": rec.Curve(),
                                                          "log": lambda text: None}
        reports = rec.tune_exactly(self.network, hidden_units.others(opened) if units else opened, *text, **options)
        if steps:
            reports = attention_descent.tune(self.network, opened, reports, *text, **options, steps=steps)
        reports = list(reports)
        if units:
            reports += hidden_units.tune(self.network, opened, self.text(HIDDEN), *text[1:], **options)
        path.unlink()
        error = sum(r.valid_after for r in reports) / len(reports)
        return [r.variant for r in reports], time.perf_counter() - began, error

    def gradient(self, variants, calibration, epochs) -> tuple[list, float, float]:
        """Return the variants after AdamW on q, k, v and o against the attention's output, from where they are."""
        from common.distillation import BlockReconstruction

        path = self.out / "recovery.tmp.npy"
        with bank.create(path, "", "", None, {}) as writer:
            for variant in variants:
                writer.add(variant)
        objective = BlockReconstruction(self.network, bank.load(path), self.valid, "cpu")
        path.unlink()
        folder = self.out / "recovery.checkpoint"
        options = training.FitOptions(epochs, 1e-3, folder, schedule="linear", max_grad_norm=None)
        result = training.fit(objective, calibration, self.valid, options, device="cpu",
                              stats=self.out / "recovery.tmp.csv", fingerprint={}, log=lambda text: None)
        training.finish(options)
        (self.out / "recovery.tmp.csv").unlink()
        return list(objective.tuned()), result.seconds, result.best_loss

    def compose(self, variants) -> models.Model:
        model = models.load(self.path)
        models.place(model.network, "cpu")
        for variant in variants:
            composition.install(model, variant)
        return model

    def measure(self, table: str, name: str, make) -> None:
        """Measure a row unless it is there; ``make()`` returns (model, seconds, error or None)."""
        rows = self.rows.setdefault(table, {})
        if name not in rows:
            model, seconds, error = make()
            loss = training.evaluate(training.TranslationLoss(model.network), self.valid, "cpu")
            hypotheses = metrics.translate(model, self.test_batches, "cpu", progress=False)
            bleu = metrics.score(hypotheses, [t for _, t in self.test], 0.0).bleu
            rows[name] = {"valid_loss": loss, "bleu": bleu, "seconds": seconds, "block_error": error}
            files.write_json(self.results, self.rows)
        row = rows[name]
        error = "" if row["block_error"] is None else f"{row['block_error']:.4f}"
        print(f"{table:12} {name:44} {row['valid_loss']:8.4f} {row['bleu']:6.1f} {row['seconds']:8.1f} s {error:>8}",
              flush=True)


def calibration_size(b: Bench) -> None:
    for rates in ((0.0, 0.8), (0.5, 0.5)):
        configuration = configs.uniform(b.kinds, *rates)
        for size in SIZES:
            def make(size=size, configuration=configuration):
                variants, seconds, error = b.tune(b.variants(configuration)[0], b.text(size))
                return b.compose(variants), seconds, error
            b.measure("text", f"heads {rates[0]:.0%}, linear {rates[1]:.0%}, {size} sentences", make)
    configuration = configs.uniform(b.kinds, 0.5, 0.8)
    for size in SIZES[2:-1]:
        def recalibrated(size=size, configuration=configuration):
            tuned = b.tune(b.variants(configuration)[0], b.text(2000))[0]
            model = b.compose(tuned)
            seconds = recalibration.recalibrate(b.network, model, b.text(size), "cpu", 1e-4, log=lambda text: None)
            return model, seconds, None
        b.measure("text", f"heads 50%, linear 80%, recalibrated, {size} sentences", recalibrated)


def attention(b: Bench) -> None:
    text = b.text(2000)
    for rate in (0.25, 0.5):
        configuration = {name: rate for name, kind in b.kinds.items() if kind == "attention"}
        for heads in ("l1", "output"):
            def pruned(heads=heads, configuration=configuration):
                return b.variants(configuration, "l1" if heads == "l1" else "wanda", text)

            def masked(pruned=pruned):
                variants, seconds = pruned()
                return b.compose(variants), seconds, None

            def fitted(pruned=pruned, **options):
                variants, seconds = pruned()
                tuned, more, error = b.tune(variants, text, **options)
                return b.compose(tuned), seconds + more, error

            def gradient(pruned=pruned):
                variants, seconds = pruned()
                tuned, more, _ = b.tune(variants, text)
                tuned, most, error = b.gradient(tuned, text, epochs=4)
                return b.compose(tuned), seconds + more + most, error

            at = f"{rate:.0%} of heads by {heads}: "
            b.measure("attention", at + "masked", masked)
            b.measure("attention", at + "o", fitted)
            for steps in (200, 400):
                b.measure("attention", at + f"o, {steps} steps on q k v o",
                          lambda fitted=fitted, steps=steps: fitted(steps=steps))
            b.measure("attention", at + "o, then q k v o by gradient", gradient)


def linear(b: Bench) -> None:
    text = b.text(2000)
    for rate in (0.5, 0.7, 0.8, 0.9):
        configuration = configs.uniform(b.kinds, 0.0, rate)
        for criterion in CRITERIA:
            for how in ("masked", "tuned", "hidden units"):
                def make(how=how, configuration=configuration, criterion=criterion):
                    variants, seconds = b.variants(configuration, criterion, text)
                    if how == "masked":
                        return b.compose(variants), seconds, None
                    variants, more, error = b.tune(variants, text, units=how == "hidden units")
                    return b.compose(variants), seconds + more, error
                b.measure("linear", f"{rate:.0%} by {criterion}: {how}", make)


def recalibrated(b: Bench) -> None:
    text = b.text(2000)
    for rates in ((0.25, 0.5), (0.5, 0.5), (0.0, 0.8), (0.5, 0.8)):
        configuration = configs.uniform(b.kinds, *rates)
        for criterion, steps, units in (("l1", 0, False), ("wanda", 0, False), ("obs", 0, False), ("obs", 200, False),
                                        ("obs", 0, True), ("obs", 200, True)):
            tuned = {}  # made for the first row that needs it

            def make(sweeps, gradients=None, configuration=configuration, criterion=criterion, steps=steps,
                     units=units, tuned=tuned):
                if not tuned:
                    variants, seconds = b.variants(configuration, criterion, text)
                    tuned["variants"], more, _ = b.tune(variants, text, steps, units)
                    tuned["seconds"] = seconds + more
                model, seconds = b.compose(tuned["variants"]), tuned["seconds"]
                if sweeps:  # only the sweeps' time, which every configuration pays anew
                    seconds = sum(recalibration.recalibrate(b.network, model, text, "cpu", 1e-4, gradients, units,
                                                            log=lambda text: None) for _ in range(sweeps))
                return model, seconds, None
            if steps and not rates[0]:
                continue
            at = f"heads {rates[0]:.0%}, linear {rates[1]:.0%}, {criterion}{', steps' * bool(steps)}"
            at += ", hidden units: " if units else ": "
            b.measure("sweep", at + "block level", lambda make=make: make(0))
            b.measure("sweep", at + "+ sweep", lambda make=make: make(1))
            if criterion == "l1":
                b.measure("sweep", at + "+ two sweeps", lambda make=make: make(2))
            if criterion == "obs":
                b.measure("sweep", at + "+ sweep by loss",
                          lambda make=make: make(1, b.text(recalibration.METRIC_SENTENCES)))


def cost(b: Bench) -> None:
    """Time a sweep and a forward pass of the original over the same text, by turns, the fastest of three each."""
    if "cost" in b.rows:
        return
    text, times = b.text(2000), {"forward pass": [], "sweep": [], "sweep by loss": []}
    variants, _ = b.variants(configs.uniform(b.kinds, 0.5, 0.8))
    for _ in range(3):
        began = time.perf_counter()
        with torch.no_grad():
            for batch in text.fixed():
                training.TranslationLoss(b.network)(batch)
        times["forward pass"].append(time.perf_counter() - began)
        for name, few in (("sweep", None), ("sweep by loss", b.text(recalibration.METRIC_SENTENCES))):
            times[name].append(recalibration.recalibrate(b.network, b.compose(variants), text, "cpu", 1e-4, few,
                                                         log=lambda text: None))
    b.rows["cost"] = {name: min(seconds) for name, seconds in times.items()}
    files.write_json(b.results, b.rows)


def draw(b: Bench) -> None:
    """Draw validation error, loss and BLEU against the calibration sentences."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
    series: dict[str, list] = {}
    for name, row in b.rows["text"].items():
        label, size = name.removesuffix(" sentences").rsplit(", ", 1)
        series.setdefault(label, []).append((int(size), row))
    for panel, (key, label) in zip(panels, (("block_error", "mean relative output error (validation)"),
                                            ("valid_loss", "validation loss, composed"), ("bleu", "BLEU, composed")),
                                   strict=True):
        for name, points in series.items():
            if points[0][1][key] is not None:
                panel.plot(*zip(*((n, row[key]) for n, row in points), strict=True), marker="o", markersize=3,
                           label=name)
        panel.set_xscale("log")
        panel.set_xlabel("calibration sentences")
        panel.set_title(label, fontsize=10)
        panel.grid(alpha=0.3)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    with files.atomic_write(b.out / "calibration.png") as file:
        figure.savefig(file, format="png", dpi=130)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, metavar="MODEL", help="original model file (.pth)")
    p.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="folder with Multi30K")
    p.add_argument("--out", type=Path, default=Path("docs/results"), metavar="DIR", help="where results go")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    b = Bench(args)
    print(f"{'table':12} {'row':44} {'val.loss':>8} {'BLEU':>6} {'time':>10} {'error':>8}")
    b.measure("dense", "original", lambda: (b.original, 0.0, None))
    for section in (cost, calibration_size, attention, linear, recalibrated):
        section(b)
    print("seconds over 2,000 sentences: " + ", ".join(f"{k} {v:.2f}" for k, v in b.rows["cost"].items()))
    draw(b)
    return 0


if __name__ == "__main__":
    sys.exit(main())
