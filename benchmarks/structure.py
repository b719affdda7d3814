#!/usr/bin/env python3
"""Measure what structured pruning costs: hidden units, whole sub-layers, and mixtures with heads and single weights.

Reads a model file and parallel text. Every row is a composed model without any training, judged by validation loss and
BLEU: masked only, tuned at block level (the recipe), and recalibrated by the sweep. Three tables: hidden units by l1
and by obs; each sub-layer left out alone; mixtures, some of them without the sub-layers that were cheapest alone.
Writes structure.json (raw, a finished row is not measured again) into --out and prints the tables as Markdown.

    python benchmarks/structure.py -m origin_model.pth --data multi30k --out docs/results
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.recovery import Bench  # noqa: E402
from common import cli  # noqa: E402

UNITS = (0.25, 0.5, 0.75)
# (heads, linear, hidden units), how many of the cheapest sub-layers are skipped
MIXTURES = (((0, 0, 0), 2), ((0, 0, 0), 4), ((0, 0.5, 0.5), 0), ((0, 0.75, 0.5), 0), ((0.5, 0, 0.5), 0),
            ((0.5, 0, 0.75), 0), ((0.5, 0, 0.75), 2))
CRITERIA = ("l1", "obs")
STEPS = ("masked", "tuned", "swept")
KINDS = {"encoder.0": "encoder self-attention", "encoder.1": "encoder feed-forward", "decoder.0":
         "decoder self-attention", "decoder.1": "cross-attention", "decoder.2": "decoder feed-forward"}


def short(sublayer: str) -> tuple[str, int]:
    """Return the kind of a sub-layer, as in `KINDS`, and its block's number from 1."""
    stack, _, block, _, layer, _ = sublayer.split(".")
    return KINDS[f"{stack}.{layer}"], int(block) + 1


def named(rates, skipped: int) -> str:
    """Return a mixture's name."""
    parts = [f"{what} {rate:.0%}" for what, rate in zip(("heads", "weights", "units"), rates, strict=True) if rate]
    return ", ".join(parts + [f"{skipped} sub-layers"] * bool(skipped))


def measure(b: Bench, table: str, name: str, configuration: dict[str, float], criterion: str = "obs") -> None:
    """Measure a configuration masked, tuned and swept; where only sub-layers are skipped there is nothing to tune."""
    from common.tuning.exact import ATTENTION_STEPS

    only_skips = not any(0 < rate < 1 for rate in configuration.values())
    made: dict[str, tuple] = {}  # what the next step starts from; made for the first row that needs it

    def masked():
        if "masked" not in made:
            made["masked"] = (*b.prune(configuration, "l1" if only_skips else criterion), None)  # l1 needs no pass
        return made["masked"]

    def tuned():
        if only_skips:
            return masked()
        if "tuned" not in made:
            variants, seconds, error = b.tune(masked()[0], b.text(), ATTENTION_STEPS)
            made["tuned"] = variants, seconds, error
        return made["tuned"]

    def composed(step):
        variants, *rest = step()
        return b.compose(variants), *rest

    def swept():
        model = b.compose(tuned()[0])
        return model, b.sweep(model), None

    for step, make in zip(STEPS, (lambda: composed(masked), lambda: composed(tuned), swept), strict=True):
        if step != "tuned" or not only_skips:
            b.measure(table, f"{name}, {step}", make)


def cell(row: dict | None) -> str:
    return f"{row['valid_loss']:.3f} / {row['bleu']:.1f}" if row else "–"


def markdown(head: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    print()
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |".replace("%", " %"))


def show(b: Bench, sublayers: list[str]) -> None:
    """Print the three tables: validation loss / BLEU."""
    dense = b.rows["dense"]["original"]
    print(f"\ndense: {cell(dense)}, {dense['weights']:,} weights")

    def cells(table: str, name: str, steps=STEPS) -> list[str]:
        return [cell(b.rows[table].get(f"{name}, {step}")) for step in steps]

    def left(name: str) -> str:
        rows = [row for c in CRITERIA if (row := b.rows["mixtures"].get(f"{name}, {c}, masked"))]
        kept = ", ".join(f"{(row['weights'] - row['zeros']) / dense['weights']:.0%}" for row in rows)
        return f"{rows[-1]['weights'] / dense['weights']:.0%}" + f" (not zero: {kept})" * any(r["zeros"] for r in rows)

    markdown(["hidden units removed", *(f"{c}, {s}" for c in CRITERIA for s in STEPS)],
             [[f"{rate:.0%}", *(x for c in CRITERIA for x in cells("units", f"{rate:.0%}, {c}"))] for rate in UNITS])
    blocks = sorted({short(name)[1] for name in sublayers})
    rows = []
    for kind in KINDS.values():
        names = [next((name for name in sublayers if short(name) == (kind, n)), None) for n in blocks]
        rows.append([kind, *(" → ".join(cells("skipped", n, STEPS[::2])) if n else "–" for n in names)])
    markdown(["skipped: masked → swept", *(f"block {n}" for n in blocks)], rows)
    markdown(["removed", "weights left", *(f"{c}, {s}" for c in CRITERIA for s in STEPS)],
             [[name, left(name), *(x for c in CRITERIA for x in cells("mixtures", f"{name}, {c}"))]
              for name in (named(*mixture) for mixture in MIXTURES)])


def main(argv=None) -> int:
    p = cli.parser(__doc__)
    cli.add_model(p)
    cli.add_data(p, limit=False)
    p.add_argument("--out", type=Path, default=Path("docs/results"), metavar="DIR", help="where results go")
    for name, what in (("calibration", "2,000, as the stages take"), ("validation", "all"), ("test", "all")):
        p.add_argument(f"--{name}-sentences", type=cli.count, metavar="N", help=f"to make it short (default: {what})")
    args = p.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    b = Bench(args, "structure.json")
    b.measure("dense", "original", lambda: (b.original, 0.0, None))
    for rate in UNITS:
        for criterion in CRITERIA:
            measure(b, "units", f"{rate:.0%}, {criterion}", b.uniform((0, 0, rate)), criterion)
    sublayers = [name for name, kind in b.kinds.items() if kind != "linear"]
    for name in sublayers:
        measure(b, "skipped", name, {name: 1.0})
    cheapest = sorted(sublayers, key=lambda name: b.rows["skipped"][f"{name}, swept"]["valid_loss"])
    for criterion in reversed(CRITERIA):
        for rates, skipped in MIXTURES:
            if any(rates) or criterion == "obs":  # what is skipped is the same by either
                measure(b, "mixtures", f"{named(rates, skipped)}, {criterion}",
                        b.uniform(rates) | dict.fromkeys(cheapest[:skipped], 1.0), criterion)
    show(b, sublayers)
    print(f"\nthe cheapest sub-layers, in order: {', '.join(cheapest[:max(n for _, n in MIXTURES)])}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
