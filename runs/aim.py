#!/usr/bin/env python3
"""Print the predicted loss that runs/smallest.sh asks for next, out of what its trainings gave so far, and the limit.

Reads scores.json (of the original), tuned.sensitivity.json, and of each training so far conf_N.json and model_N.csv.
Prints nothing when the last one met the limit, or when nothing larger is left to try.

    python runs/aim.py out/smallest 0.02
"""

import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.pruning import bank, search  # noqa: E402
from common.pruning.configurations import read_configurations  # noqa: E402

LEAST = 0.002  # above the original's loss: almost the original itself


def main(folder: Path, alpha: float) -> None:
    dense = json.loads((folder / "scores.json").read_text(encoding="utf-8"))[0]["validation_loss"]
    opened = bank.load(folder / "tuned.npy")
    measured = json.loads((folder / "tuned.sensitivity.json").read_text(encoding="utf-8"))
    found = search.read(folder / "tuned.sensitivity.json", opened, measured["of"])
    limit, failed = dense * (1 + alpha), []
    for n in range(sum(1 for _ in folder.glob("model_*.pth"))):
        with open(folder / f"model_{n}.csv", newline="") as file:
            loss = min(float(row["valid_loss"]) for row in csv.DictReader(file))
        if loss <= limit:
            return
        configuration = read_configurations(folder / f"conf_{n}.json")[0]
        failed.append((search.predict(found, configuration) - found.dense, loss))
    if failed and failed[-1][0] <= LEAST:
        print(f"no combination is expected to have a loss of {limit:.4f}", file=sys.stderr)
        return
    print(f"{found.dense + max(search.aim(limit, dense, failed), LEAST):.6f} {limit:.6f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
