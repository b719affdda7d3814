#!/usr/bin/env python3
"""Print the table that ends a chain of stages: what each configuration scores, and what each way cost.

Reads scores.json, block.csv and the training statistics in the folder that runs/chain.sh filled.

    python runs/summary.py out/quickstart
"""

import csv
import json
import sys
from pathlib import Path


def training_seconds(path: Path) -> float:
    """Return the training time in a statistics CSV, validation not counted."""
    with open(path, newline="") as file:
        return sum(float(row["train_seconds"]) for row in csv.DictReader(file))


def describe(configuration: dict[str, float]) -> str:
    """Return a configuration's rates in a few words."""
    words = []
    for kind, chosen in (("heads", True), ("linear", False)):
        rates = {r for name, r in configuration.items() if name.endswith("Attention") == chosen}
        words.append(f"{kind} " + ("mixed" if len(rates) > 1 else f"{next(iter(rates), 0):.0%}"))
    return ", ".join(words)


def main(folder: Path) -> None:
    scores = {Path(row["model"]).stem: row for row in json.loads((folder / "scores.json").read_text())}
    configurations = json.loads((folder / "conf.json").read_text())
    dense = scores["origin"]
    block = training_seconds(folder / "block.csv")
    print(f"\nBLEU on the test set; dense model {dense['bleu']:.1f} (validation loss {dense['validation_loss']:.3f})")
    print("configuration           zeros | pruned  composed  fine-tuned  baseline | fine-tuning s  baseline s")
    for n, configuration in enumerate(configurations):
        pruned, composed, tuned, baseline = (scores[f"{kind}_{n}"] for kind in (
            "pruned", "composed", "finetuned", "baseline"))
        seconds = [training_seconds(folder / f"{arm}_{n}.csv") for arm in ("finetuned", "baseline")]
        print(f"{describe(configuration):22} {pruned['zeros'] / pruned['parameters']:6.1%} | {pruned['bleu']:6.1f}  "
              f"{composed['bleu']:8.1f}  {tuned['bleu']:10.1f}  {baseline['bleu']:8.1f} | {seconds[0]:13.1f}  "
              f"{seconds[1]:10.1f}")
    print(f"block level, once for all configurations: {block:.1f} s. 'composed' is recalibrated, not trained;\n"
          "the seconds of fine-tuning include its recalibration.")
    print("loss curves: " + "  ".join(str(folder / f"loss_{n}.png") for n in range(len(configurations))))
    print(f"quality against size: {folder / 'quality.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
