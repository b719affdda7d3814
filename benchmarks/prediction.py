#!/usr/bin/env python3
"""Measure how well a composed model's loss is predicted by adding up what its variants cost one by one.

Reads a model, a tuned bank and its table of variants, and text. Draws random configurations, mild to harsh, out of the
bank, composes and evaluates each as it is and recalibrated, and compares with two predictions: the original's loss plus
each variant's cost alone (common.pruning.search), and the sum of the variants' block errors. Then searches the smallest
configuration for some target losses, and those of least loss at the sparsities of uniform ones, and composes what it
found. Writes prediction.json and prediction.png.

    python benchmarks/prediction.py -m origin_model.pth --bank finetuned_modules.npy \\
        --variants block_stats.variants.csv --data multi30k
"""

import csv
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli  # noqa: E402

TARGETS = (0.02, 0.05, 0.10)  # above the original's loss, as a fraction
SENTENCES = 500  # of calibration text, for each recalibration


def by_block(opened) -> dict[str, list]:
    """Return a bank's variants by block, mild to harsh."""
    blocks = {}
    for key in sorted(opened.entries, key=lambda key: key[1]):
        blocks.setdefault(key[0], []).append(key)
    return blocks


def draw_configurations(opened, number: int, seed: int) -> list[list]:
    """Return lists of variants: each pruned to another extent, within a range of severity of its own."""
    blocks, rng, drawn = by_block(opened), random.Random(seed), []
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
    import numpy as np

    ranks = [np.argsort(np.argsort(x)) for x in (losses, predicted)]
    difference = np.asarray(losses) - np.asarray(predicted)
    return {"rank_correlation": float(np.corrcoef(*ranks)[0, 1]), "absolute_error": float(np.abs(difference).mean()),
            "largest_error": float(np.abs(difference).max()), "bias": float(difference.mean())}


def run(args) -> dict:
    from common import runtime
    from common.pruning import bank, composition, configurations, search
    from common.t5 import loss
    from common.t5 import model as models
    from common.text.batches import calibration_text, validation_text
    from common.tuning.recalibration import recalibrate

    device = runtime.setup("cpu")
    model, opened = models.load(args.model), bank.load(args.bank)
    opened.check_origin(model.identity, args.model)
    model.network.to(device)
    corpus = cli.corpus(args, model)
    valid = validation_text(corpus, model, sentences=args.validation_sentences)
    text = calibration_text(corpus, model, sentences=SENTENCES)
    with open(args.variants, newline="") as file:
        errors = {(r["block"], tuple(map(float, r["rates"].split()))): float(r["valid_error_after"])
                  for r in csv.DictReader(file)}
    began = time.perf_counter()
    found = search.measure(model, opened, valid, device)
    measured = time.perf_counter() - began

    def losses(keys) -> tuple[float, float]:
        composed = models.load(args.model)
        for key in keys:
            composition.install(composed, opened.read(key))
        objective = loss.TranslationLoss(composed.network.to(device))
        plain = loss.evaluate(objective, valid, device)
        recalibrate(model.network, composed, text, device, opened.keeps_hidden)
        return plain, loss.evaluate(objective, valid, device)

    rows = []
    for keys in draw_configurations(opened, args.number, 1):
        plain, recalibrated = losses(keys)
        rows.append({"composed": plain, "recalibrated": recalibrated, "blocks": len(keys),
                     "predicted": found.dense + sum(found.losses[k] - found.dense for k in keys),
                     "block_errors": sum(errors[k] for k in keys)})
        print(f"{len(rows)}/{args.number}", file=sys.stderr)
    columns = {k: [row[k] for row in rows] for k in rows[0]}
    began = time.perf_counter()
    removed, present, total = search.removed_weights(model, opened)
    front = search.front(found, removed, present)
    searching = time.perf_counter() - began

    def at(place) -> dict:
        plain, recalibrated = losses(list(configurations.required_variants(front.configuration(place)).items()))
        return {"predicted": float(front.losses[place]), "sparsity": float(1 - front.sizes[place] / total),
                "composed": plain, "recalibrated": recalibrated}

    best = [{"target": target} | at(place) for target in (found.dense * (1 + t) for t in TARGETS)
            if (place := front.at_loss(target)) is not None]
    blocks, uniform = by_block(opened), []
    for n in range(min(map(len, blocks.values()))):
        keys = [variants[n] for variants in blocks.values()]
        sparsity = sum(removed[key] for key in keys) / total
        uniform.append({"sparsity": sparsity, "uniform": losses(keys)[1],
                        "searched": at(front.at_sparsity(sparsity, total))})
    return {"dense": found.dense, "variants": len(found.losses), "measuring_seconds": round(measured, 1),
            "searching_seconds": round(searching, 2), "front": len(front.sizes),
            "quality": {f"{p} against {y}": quality(columns[y], columns[p]) for y in ("composed", "recalibrated")
                        for p in ("predicted", "block_errors")}, "found": best, "uniform": uniform, "rows": rows}


def report(result: dict, folder: Path) -> None:
    """Print the tables and draw the picture."""
    from common.plots import picture

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
    with picture(folder / "prediction.png") as axes:
        for name, color in (("composed", "tab:orange"), ("recalibrated", "tab:blue")):
            axes.scatter([r["predicted"] for r in result["rows"]], [r[name] for r in result["rows"]], s=16, color=color,
                         label=name)
        axes.axline((result["dense"], result["dense"]), slope=1, color="black", linewidth=0.8)
        axes.set(xlabel="predicted validation loss", ylabel="validation loss")
        axes.grid(alpha=0.3)
        axes.legend()


def main(argv=None) -> int:
    p = cli.parser(__doc__)
    cli.add_model(p)
    p.add_argument("--bank", type=Path, default=Path("finetuned_modules.npy"), metavar="BANK", help="tuned bank")
    p.add_argument("--variants", type=Path, default=Path("block_stats.variants.csv"), metavar="CSV",
                   help="block level's table of variants")
    cli.add_data(p, limit=False)
    p.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR", help="where results go")
    p.add_argument("-n", "--number", type=cli.count, default=60, metavar="N", help="random configurations")
    p.add_argument("--validation-sentences", type=cli.count, default=400, metavar="N",
                   help="validation pairs that losses are measured on")
    p.add_argument("--report", action="store_true", help="only draw and print what prediction.json holds")
    args = p.parse_args(argv)
    path = args.results / "prediction.json"
    if not args.report:
        args.results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run(args)) + "\n", encoding="utf-8")
    report(json.loads(path.read_text(encoding="utf-8")), args.results)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
