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
from common.errors import UserError
from common.files.atomic import check_inputs, outputs
from common.plots import check_picture, legend, picture, shown

LARGEST = 1e30  # matplotlib cannot divide an axis that reaches to the end of what a float holds
NEEDED = ("epoch", "train_loss", "valid_loss", "train_seconds", "valid_seconds")


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("stats", type=Path, nargs="*", default=[Path("model_stats.csv")], metavar="STATS_CSV",
                   help="statistics to draw (default: model_stats.csv)")
    p.add_argument("-x", choices=("epochs", "seconds"), default="epochs", help="what the loss is drawn against")
    p.add_argument("--label", nargs="+", metavar="TEXT", help="names for the legend (default: the file names)")
    p.add_argument("--log", action="store_true", help="logarithmic loss axis")
    p.add_argument("-o", "--output", type=Path, default=Path("loss.png"), metavar="FILE",
                   help="picture to write; .png, .pdf and .svg; an existing one is replaced")
    return p


def read(path: Path) -> dict[str, list[float]]:
    """Return the columns of a statistics CSV; an empty training loss (before the first step) is NaN.

    Empty lines, lines of commas alone and a byte order mark, which spreadsheets write, do not count.

    Raises:
        UserError: the file is no statistics CSV; names the line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
            if not lines or tuple(lines[0][1][:5]) != NEEDED:
                raise UserError(f"{path}: is not a statistics file; its first columns must be {','.join(NEEDED)}")
            rows = [[float(x) if x.strip() else math.nan for x in row[:5]] for _, row in lines[1:]]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: is not a statistics file: {str(error):.150}") from None
    if not rows or any(len(row) < 5 for row in rows):
        raise UserError(f"{path}: holds no complete row of statistics")
    for (number, _), row in zip(lines[1:], rows, strict=True):
        if not all(abs(x) < LARGEST for x in (row[0], row[2], row[3])):
            raise UserError(f"{path}: line {number}: epoch, valid_loss and train_seconds must be finite numbers")
        row[1] = row[1] if abs(row[1]) < LARGEST else math.nan
    return dict(zip(NEEDED, zip(*rows, strict=True), strict=True))


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    labels = args.label or [path.stem for path in args.stats]
    if len(labels) != len(args.stats):
        raise UserError(f"--label names {len(labels)} of {len(args.stats)} files")
    check_picture(args.output)
    check_inputs(*args.stats)
    with outputs(True, args.output):
        curves = [read(path) for path in args.stats]
        for path, curve in zip(args.stats, curves, strict=True):
            if args.log and not any(loss > 0 for loss in curve["valid_loss"]):
                raise UserError(f"{path}: has no validation loss above 0, which --log needs")
        with picture(args.output) as axes:
            lines, names = [], []
            for label, curve in zip(map(shown, labels), curves, strict=True):
                x = curve["epoch"] if args.x == "epochs" else tuple(accumulate(curve["train_seconds"]))
                mark = "o" if len(x) < 40 else None
                lines += axes.plot(x, curve["valid_loss"], marker=mark, markersize=3)
                names.append(f"{label}, validation")
                if not all(map(math.isnan, curve["train_loss"])):
                    lines += axes.plot(x, curve["train_loss"], marker=mark, markersize=3, linestyle="--", alpha=0.6,
                                       color=lines[-1].get_color())
                    names.append(f"{label}, training")
            axes.set_xlabel({"epochs": "epoch (exact solver: 0 before, 1 after)",
                             "seconds": "seconds of training"}[args.x])
            axes.set_ylabel("loss")
            if args.log:
                from matplotlib.ticker import LogFormatter

                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(LogFormatter())  # 2 and 3 instead of 2 x 10^0 and 3 x 10^0
                axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
            axes.grid(alpha=0.3, which="both")
            legend(axes, lines, names)
    print(f"{args.output}: {len(curves)} runs drawn against {args.x}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
