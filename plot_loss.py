#!/usr/bin/env python3
"""Draw training and validation loss from statistics CSVs, one or several in one picture.

Reads the CSVs of the fine-tuning stages. Writes loss.png: solid lines are validation, dashed ones training loss.
Against seconds, every step's training time counts and validation does not.

    python plot_loss.py model_stats.csv baseline_stats.csv -x seconds -o loss.png
"""

import csv
import math
import sys
from itertools import accumulate
from pathlib import Path

from common import cli

LARGEST = 1e30  # matplotlib cannot divide an axis that reaches to the end of what a float holds
NEEDED = ("epoch", "train_loss", "valid_loss", "train_seconds", "valid_seconds")


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("stats", type=Path, nargs="*", default=[Path("model_stats.csv")], metavar="STATS_CSV",
                   help="statistics to draw (default: model_stats.csv)")
    p.add_argument("-x", choices=("epochs", "seconds"), default="epochs", help="what the loss is drawn against")
    p.add_argument("--label", nargs="+", metavar="TEXT", help="names for the legend (default: the file names)")
    p.add_argument("--log", action="store_true", help="logarithmic loss axis")
    p.add_argument("--title", default="", metavar="TEXT", help="title of the picture")
    p.add_argument("-o", "--output", type=Path, default=Path("loss.png"), metavar="FILE",
                   help="picture to write; .png, .pdf and .svg; an existing one is replaced")
    return p


def read(path: Path) -> dict[str, list[float]]:
    """Return the columns of a statistics CSV; an empty training loss (before the first step) is NaN.

    Raises:
        UserError: the file is no statistics CSV; names the line.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if tuple(header[:5]) != NEEDED:
                raise cli.UserError(f"{path}: is not a statistics file; its first columns must be {','.join(NEEDED)}")
            rows = [[float(x) if x else math.nan for x in row[:5]] for row in reader]
    except (ValueError, csv.Error) as error:
        raise cli.UserError(f"{path}: is not a statistics file: {str(error):.150}") from None
    if not rows or any(len(row) < 5 for row in rows):
        raise cli.UserError(f"{path}: holds no complete row of statistics")
    bad = [i for i, row in enumerate(rows) if not all(abs(x) < LARGEST for x in (row[0], row[2], row[3]))]
    if bad:
        raise cli.UserError(f"{path}: line {bad[0] + 2}: epoch, valid_loss and train_seconds must be finite numbers")
    for row in rows:
        row[1] = row[1] if abs(row[1]) < LARGEST else math.nan
    return dict(zip(NEEDED, zip(*rows, strict=True), strict=True))


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    labels = [label.replace("$", r"\$") for label in args.label or [path.stem for path in args.stats]]
    if len(labels) != len(args.stats):
        raise cli.UserError(f"--label names {len(labels)} of {len(args.stats)} files")
    if args.output.suffix not in (".png", ".pdf", ".svg"):
        raise cli.UserError(f"{args.output}: the picture's name must end in .png, .pdf or .svg")
    cli.check_inputs(*args.stats)
    cli.check_outputs(True, args.output)
    curves = [read(path) for path in args.stats]

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from common import files

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, curve in zip(labels, curves, strict=True):
        x = curve["epoch"] if args.x == "epochs" else tuple(accumulate(curve["train_seconds"]))
        mark = "o" if len(x) < 40 else None
        line, = axes.plot(x, curve["valid_loss"], marker=mark, markersize=3, label=f"{label}, validation")
        if not all(map(math.isnan, curve["train_loss"])):
            axes.plot(x, curve["train_loss"], marker=mark, markersize=3, linestyle="--", alpha=0.6,
                      color=line.get_color(), label=f"{label}, training")
    axes.set_xlabel({"epochs": "epoch (exact solver: iteration)", "seconds": "seconds of training"}[args.x])
    axes.set_ylabel("loss")
    axes.set_title(args.title.replace("$", r"\$"))  # no formula
    if args.log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    with files.locked(args.output), files.atomic_write(args.output) as file:
        figure.savefig(file, format=args.output.suffix[1:], dpi=150)
    plt.close(figure)
    print(f"{args.output}: {len(curves)} runs drawn against {args.x}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
