#!/usr/bin/env python3
"""Print the predicted loss that runs/smallest.sh asks for next, out of what its trainings gave so far.

Reads scores.json (of the original), tuned.sensitivity.json, and of each training so far conf_N.json and model_N.csv.
Prints nothing when the last one met the limit; ends with exit code 2 when nothing larger is left to try.

    python runs/aim.py out/smallest-0.02 0.02
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.files.jsonfile import read_json  # noqa: E402
from common.pruning import bank, search  # noqa: E402
from common.pruning.configurations import read_configurations  # noqa: E402

LEAST = 0.002  # above the original's loss: almost the original itself


def main(folder: Path, alpha: float) -> int:
    dense = read_json(folder / "scores.json")[0]["validation_loss"]
    opened = bank.load(folder / "tuned.npy")
    measured = read_json(folder / "tuned.sensitivity.json")
    found = search.read(folder / "tuned.sensitivity.json", opened, measured["of"] | {"bank": opened.sha256})
    limit, failed = dense * (1 + alpha), []
    for n in range(sum(1 for _ in folder.glob("model_*.pth"))):
        with open(folder / f"model_{n}.csv", newline="") as file:
            loss = min(float(row["valid_loss"]) for row in csv.DictReader(file))
        if loss <= limit:
            return 0
        configuration = read_configurations(folder / f"conf_{n}.json")[0]
        failed.append((search.predict(found, configuration) - found.dense, loss))
    if failed and failed[-1][0] <= LEAST:
        raise UserError(f"no combination is expected to reach a loss of {limit:.4f}; the largest reached {loss:.4f}")
    print(f"{found.dense + max(search.aim(limit, dense, failed), LEAST):.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(lambda: main(Path(sys.argv[1]), float(sys.argv[2]))))
