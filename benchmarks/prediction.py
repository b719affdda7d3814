#!/usr/bin/env python3
"""Measure how well a composed model's loss is predicted by adding up what its variants cost one by one.

Reads a model, a tuned bank and its table of variants, and Multi30K. Draws random configurations, mild to harsh, out
of the bank, composes and evaluates each as it is and recalibrated, and compares with two predictions: the original's
loss plus each variant's cost alone (`common.search`), and the sum of the variants' block errors. Then searches the
smallest configurations for some target losses, and those of least loss at the sparsities of uniform ones, and composes
what it found. Writes prediction.json and prediction.png.

    python benchmarks/prediction.py --model origin_model.pth --bank finetuned_modules.npy \\
        --variants block_stats.variants.csv --data-dir data/multi30k
"""

import argparse
import csv
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import bank, composition, configs, data, models, recalibration, runtime, search, training

TARGETS = (0.02, 0.05, 0.10)  # above the original's loss, as a fraction
SMALLEST = 3  # configurations that are composed for each target


def draw_configurations(opened, number: int, seed: int) -> list[list]:
    """Return lists of variants: each pruned to another extent, within a range of severity of its own."""
    blocks, rng, drawn = {}, random.Random(seed), []
    for key in opened.entries:
        blocks.setdefault(key[0], []).append(key)
    for keys in blocks.values():
        keys.sort(key=lambda key: key[1])
    while len(drawn) < number:
        low = rng.random()
        high, share = rng.uniform(low, 1), rng.choice([0.3, 0.6, 1.0])
        chosen = [keys[min(int(rng.uniform(low, high) * len(keys)), len(keys) - 1)] for keys in blocks.values()
                  if rng.random() < share]
        if chosen:
            drawn.append(chosen)
    return drawn


def quality(losses, predicted) -> dict:
    """Return Spearman's rank correlation, and absolute error and bias."""
    ranks = [np.argsort(np.argsort(x)) for x in (losses, predicted)]
    difference = np.asarray(losses) - np.asarray(predicted)
    return {"rank_correlation": float(np.corrcoef(*ranks)[0, 1]), "absolute_error": float(np.abs(difference).mean()),
            "largest_error": float(np.abs(difference).max()), "bias": float(difference.mean())}


def run(args) -> dict:
    runtime.setup("cpu", 0, args.threads)
    model, opened = models.load(args.model), bank.load(args.bank)
    opened.check_origin(model.identity, args.model)
    models.place(model.network, "cpu")
    options = data.DataOptions("multi30k", args.data_dir, "en", "de", "test_2016_flickr")
    valid = data.Batches(data.sample(data.read_pairs(options, "val"), args.validation_sentences, 0), model, 8192)
    text = data.Batches(data.sample(data.read_pairs(options, "train"), 500, 0), model, 2048)
    with open(args.variants, newline="") as file:
        errors = {(r["block"], tuple(map(float, r["rates"].split()))): float(r["valid_error_after"])
                  for r in csv.DictReader(file)}
    began = time.perf_counter()
    found = search.measure(model, opened, valid, "cpu")
    measured = time.perf_counter() - began

    def losses(keys) -> tuple[float, float]:
        composed = models.load(args.model)
        for key in keys:
            composition.install(composed, opened.read(key))
        objective = training.TranslationLoss(models.place(composed.network, "cpu"))
        plain = training.evaluate(objective, valid, "cpu")
        recalibration.recalibrate(model.network, composed, text, "cpu", 1e-4, keep_hidden=opened.keeps_hidden,
                                  log=lambda _: None)
        return plain, training.evaluate(objective, valid, "cpu")

    rows = []
    for keys in draw_configurations(opened, args.configurations, 1):
        plain, recalibrated = losses(keys)
        rows.append({"composed": plain, "recalibrated": recalibrated, "blocks": len(keys),
                     "predicted": found.dense + sum(found.losses[k] - found.dense for k in keys),
                     "block_errors": sum(errors[k] for k in keys)})
        print(f"{len(rows)}/{args.configurations}", file=sys.stderr)
    columns = {k: [row[k] for row in rows] for k in rows[0]}
    began = time.perf_counter()
    sizes, total = search.kept_weights(model.network, opened)
    front = search.front(found, sizes)
    searching, best = time.perf_counter() - began, []

    def at(place) -> dict:
        plain, recalibrated = losses(list(configs.required_variants(front.configuration(place)).items()))
        return {"predicted": float(front.losses[place]), "sparsity": float(1 - front.sizes[place] / total),
                "composed": plain, "recalibrated": recalibrated}

    for target in TARGETS:
        best += [{"target": found.dense * (1 + target)} | at(place)
                 for place in front.at_loss(found.dense * (1 + target), SMALLEST)]
    blocks, uniform = {}, []
    for key in opened.entries:
        blocks.setdefault(key[0], []).append(key)
    for n in range(min(map(len, blocks.values()))):
        keys = [sorted(variants, key=lambda key: key[1])[n] for variants in blocks.values()]
        sparsity = 1 - sum(sizes[key] for key in keys) / total
        place = front.at_sparsity(sparsity, total)[0]
        uniform.append({"sparsity": float(sparsity), "uniform": losses(keys)[1], "searched": at(place)})
    return {"dense": found.dense, "variants": len(found.losses), "measuring_seconds": round(measured, 1),
            "searching_seconds": round(searching, 2), "front": len(front.sizes),
            "quality": {f"{p} against {y}": quality(columns[y], columns[p]) for y in ("composed", "recalibrated")
                        for p in ("predicted", "block_errors")}, "found": best, "uniform": uniform, "rows": rows}


def report(result: dict, folder: Path) -> None:
    """Print the tables and draw the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    print(f"{result['variants']} variants measured in {result['measuring_seconds']} s; {result['front']:,} best "
          f"configurations found in {result['searching_seconds']} s")
    print("| prediction | rank correlation | mean absolute error | largest |\n|---|---|---|---|")
    for name, q in result["quality"].items():
        shown = [f"{q[k]:.4f}" if "block_errors" not in name else "–" for k in ("absolute_error", "largest_error")]
        print(f"| {name} | {q['rank_correlation']:.4f} | {shown[0]} | {shown[1]} |")
    print("\n| target loss | weights removed | predicted | composed | recalibrated |\n|---|---|---|---|---|")
    for row in result["found"]:
        print(f"| {row['target']:.3f} | {row['sparsity']:.1%} | {row['predicted']:.3f} | {row['composed']:.3f} | "
              f"{row['recalibrated']:.3f} |")
    print("\n| weights removed | uniform rates | searched | predicted |\n|---|---|---|---|")
    for row in result["uniform"]:
        print(f"| {row['sparsity']:.1%} | {row['uniform']:.3f} | {row['searched']['recalibrated']:.3f} | "
              f"{row['searched']['predicted']:.3f} |")
    figure, axes = plt.subplots(figsize=(5, 4.5), layout="constrained")
    for name, color in (("composed", "tab:orange"), ("recalibrated", "tab:blue")):
        axes.scatter([r["predicted"] for r in result["rows"]], [r[name] for r in result["rows"]], s=16, color=color,
                     label=name)
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="black", linewidth=0.8)
    axes.set_xlabel("predicted validation loss")
    axes.set_ylabel("validation loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "prediction.png", dpi=130)


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, default=Path("origin_model.pth"), metavar="MODEL")
    p.add_argument("--bank", type=Path, default=Path("finetuned_modules.npy"), metavar="BANK")
    p.add_argument("--variants", type=Path, default=Path("block_stats.variants.csv"), metavar="CSV")
    p.add_argument("--data-dir", type=Path, default=Path("data/multi30k"), metavar="DIR")
    p.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR")
    p.add_argument("--configurations", type=int, default=60, metavar="N", help="random ones (default: 60)")
    p.add_argument("--validation-sentences", type=int, default=400, metavar="N")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    p.add_argument("--report", action="store_true", help="only draw and print what prediction.json holds")
    args = p.parse_args(argv)
    path = args.results / "prediction.json"
    if not args.report:
        path.write_text(json.dumps(run(args)) + "\n", encoding="utf-8")
    report(json.loads(path.read_text(encoding="utf-8")), args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
