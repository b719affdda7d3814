#!/usr/bin/env python3
"""Measure what block level and recalibration recover without any training, step by step of the recipe.

Reads a model file and parallel text. Every row is a composed model, judged by validation loss and BLEU. Two tables:
how much calibration text is enough; and criterion (l1, obs) x block level (none: masked; exact: least squares alone;
recipe: with steps on attentions) x recalibration, at several rates. Writes recovery.json (raw, a finished row is not
measured again) and calibration.png into --out.

    python benchmarks/recovery.py -m origin_model.pth --data multi30k --out out/recovery
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli  # noqa: E402

RATES = ((0.25, 0.0), (0.5, 0.0), (0.0, 0.5), (0.0, 0.8), (0.25, 0.5), (0.5, 0.5), (0.5, 0.8))  # (heads, linear)
SIZES = (64, 125, 250, 500, 1000, 2000, 4000, 8000)
SIZES_AT = (0.5, 0.8)
TEST_SET = "test_2016_flickr"
FASTEST_OF = 3


class Bench:
    """The original model, the text, and the rows measured so far."""

    def __init__(self, args, results: str = "recovery.json"):
        from common import runtime
        from common.t5 import model, modules
        from common.text import batches, corpus

        self.device = runtime.setup("cpu")
        self.path, self.out, self.results = args.model, args.out, args.out / results
        self.rows = json.loads(self.results.read_text()) if self.results.exists() else {}
        self.original = model.load(args.model)
        if self.rows.setdefault("model", self.original.identity) != self.original.identity:
            raise SystemExit(f"{self.results}: holds rows of another model; give another --out")
        self.network = self.original.network.to(self.device)
        self.corpus = cli.corpus(args, self.original)
        self.test = corpus.read_pairs(self.corpus, TEST_SET)[:args.test_sentences]
        self.test_batches = batches.source_text(self.test, self.original)
        self.valid = batches.validation_text(self.corpus, self.original, sentences=args.validation_sentences)
        self.sentences = args.calibration_sentences
        self.kinds = modules.prunable(self.network)

    def text(self, size: int | None = None):
        """Return calibration text, by default as much as the stages take."""
        from common.text.batches import CALIBRATION_SENTENCES, calibration_text

        return calibration_text(self.corpus, self.original, 0, size or self.sentences or CALIBRATION_SENTENCES)

    def uniform(self, rates) -> dict[str, float]:
        """Return the configuration of all modules at (heads, linear) or (heads, linear, hidden units)."""
        from common.pruning.configurations import uniform

        return uniform(self.kinds, *rates)

    def prune(self, configuration: dict[str, float], criterion: str) -> tuple[list, float]:
        """Return a configuration's pruned variants and the seconds they took."""
        from common.pruning import scheme, variants

        made = scheme.make_scheme([configuration])
        text, began = self.text(), time.perf_counter()
        found = list(variants.prune_scheme(self.original, made) if criterion == "l1" else
                     variants.prune_scheme_by_obs(self.original, made, text, self.device))
        return found, time.perf_counter() - began

    def tune(self, variants: list, text, steps: int) -> tuple[list, float, float]:
        """Return the exactly tuned variants, the seconds, and their mean relative error on validation text."""
        from common.pruning import bank
        from common.tuning import exact

        path = self.results.with_suffix(".tmp.npy")
        with bank.create(path, "", "", None, {}) as writer:
            for variant in variants:
                writer.add(variant)
        began = time.perf_counter()
        reports = list(exact.tune(self.network, bank.load(path), text, self.valid, self.device, steps))
        path.unlink()
        return [r.variant for r in reports], time.perf_counter() - began, sum(r.valid_after for r in reports) / len(
            reports)

    def compose(self, variants: list):
        from common.pruning.composition import install
        from common.t5 import model

        composed = model.load(self.path)
        composed.network.to(self.device)
        for variant in variants:
            install(composed, variant)
        return composed

    def sweep(self, composed, text=None) -> float:
        from common.tuning.recalibration import recalibrate

        return recalibrate(self.network, composed, text or self.text(), self.device)

    def measure(self, table: str, name: str, make) -> None:
        """Measure a row unless it is there; ``make()`` returns (model, seconds, error or None)."""
        from common.files.jsonfile import write_json
        from common.t5.loss import TranslationLoss, evaluate
        from common.t5.network import sparsity
        from common.t5.shrink import shrink
        from common.text.translation import score, translate

        rows = self.rows.setdefault(table, {})
        if name not in rows:
            model, seconds, error = make()
            small = replace(model, network=shrink(model))  # faster, and gives the same
            loss = evaluate(TranslationLoss(small.network), self.valid, self.device)
            texts = translate(small, self.test_batches, self.device).texts
            bleu = score(texts, [target for _, target in self.test], model.target).bleu
            weights, zeros = sparsity(small.network)
            rows[name] = {"valid_loss": loss, "bleu": bleu, "seconds": seconds, "block_error": error,
                          "weights": weights, "zeros": zeros}
            write_json(self.results, self.rows)
        row = rows[name]
        error = "" if row["block_error"] is None else f"{row['block_error']:.4f}"
        print(f"{table:12} {name:48} {row['valid_loss']:8.4f} {row['bleu']:6.1f} {row['seconds']:8.1f} s {error:>8}",
              flush=True)


def named(rates) -> str:
    return f"heads {rates[0]:.0%}, linear {rates[1]:.0%}"


def recipe(b: Bench, every_rates) -> None:
    """Measure criterion x block level x sweep. A sweep's seconds are its own: every configuration pays them anew."""
    from common.tuning.exact import ATTENTION_STEPS

    for rates in every_rates:
        for criterion in ("l1", "obs"):
            pruned = []  # made for the first row that needs it

            def variants(rates=rates, criterion=criterion, pruned=pruned):
                if not pruned:
                    pruned.extend(b.prune(b.uniform(rates), criterion))
                return pruned

            for how, steps in (("masked", None), ("exact", 0), ("recipe", ATTENTION_STEPS)):
                if how == "recipe" and not rates[0]:
                    continue  # no attention lost a head: as exact
                tuned = []

                def block_level(steps=steps, variants=variants, tuned=tuned):
                    if not tuned:
                        made, seconds = variants()
                        again, more, error = (made, 0.0, None) if steps is None else b.tune(made, b.text(), steps)
                        tuned.extend((again, seconds + more, error))
                    return b.compose(tuned[0]), tuned[1], tuned[2]

                def swept(block_level=block_level):
                    composed = block_level()[0]
                    return composed, b.sweep(composed), None

                at = f"{named(rates)}, {criterion}, {how}"
                b.measure("recipe", at, block_level)
                b.measure("recipe", at + " + sweep", swept)


def calibration_size(b: Bench, sizes) -> None:
    """Measure block level, and the sweep after it, with more and more text."""
    for size in sizes:
        def fitted(size=size):
            variants, _ = b.prune(b.uniform(SIZES_AT), "l1")
            variants, seconds, error = b.tune(variants, b.text(size), 0)
            return b.compose(variants), seconds, error

        def swept(size=size):
            variants, _ = b.prune(b.uniform(SIZES_AT), "l1")
            composed = b.compose(b.tune(variants, b.text(), 0)[0])
            return composed, b.sweep(composed, b.text(size)), None

        b.measure("text", f"{named(SIZES_AT)}, exact, {size} sentences", fitted)
        b.measure("text", f"{named(SIZES_AT)}, sweep, {size} sentences", swept)


def cost(b: Bench) -> None:
    """Time a sweep and a forward pass of the original over the same text, by turns, the fastest of three each."""
    import torch

    from common.files.jsonfile import write_json
    from common.t5.loss import TranslationLoss

    if "cost" not in b.rows:
        text, times, pruned = b.text(), {"forward pass": [], "sweep": []}, b.prune(b.uniform(SIZES_AT), "l1")[0]
        for _ in range(FASTEST_OF):
            began = time.perf_counter()
            with torch.no_grad():
                for batch in text.fixed(b.device):
                    TranslationLoss(b.network)(batch)
            times["forward pass"].append(time.perf_counter() - began)
            times["sweep"].append(b.sweep(b.compose(pruned), text))
        b.rows["cost"] = {name: min(seconds) for name, seconds in times.items()} | {"sentences": len(text)}
        write_json(b.results, b.rows)
    print("cost: " + ", ".join(f"{name} {value:.2f}" for name, value in b.rows["cost"].items()))


def draw(b: Bench) -> None:
    """Draw validation loss against the calibration sentences."""
    from common.plots import picture

    series: dict[str, list] = {}
    for name, row in b.rows.get("text", {}).items():
        label, size = name.removesuffix(" sentences").rsplit(", ", 1)
        series.setdefault(label, []).append((int(size), row["valid_loss"]))
    if series:
        with picture(b.out / "calibration.png") as axes:
            for label, points in series.items():
                axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
            axes.set(xscale="log", xlabel="calibration sentences", ylabel="validation loss of the composed model")
            axes.grid(alpha=0.3)
            axes.legend()


def main(argv=None) -> int:
    p = cli.parser(__doc__)
    cli.add_model(p)
    cli.add_data(p, limit=False)
    p.add_argument("--out", type=Path, default=Path("docs/results"), metavar="DIR", help="where results go")
    p.add_argument("--rates", type=cli.rate, nargs=2, action="append", metavar=("HEADS", "LINEAR"),
                   help="instead of the usual rates; may stand several times")
    p.add_argument("--sizes", type=cli.count, nargs="*", default=list(SIZES), metavar="N", help="calibration sizes")
    for name, what in (("calibration", "2,000, as the stages take"), ("validation", "all"), ("test", "all")):
        p.add_argument(f"--{name}-sentences", type=cli.count, metavar="N", help=f"to make it short (default: {what})")
    args = p.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    b = Bench(args)
    print(f"{'table':12} {'row':48} {'val.loss':>8} {'BLEU':>6} {'time':>10} {'error':>8}")
    b.measure("dense", "original", lambda: (b.original, 0.0, None))
    cost(b)
    recipe(b, args.rates or RATES)
    calibration_size(b, args.sizes)
    draw(b)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
