#!/usr/bin/env python3
"""Tables and the picture of benchmarks/exploration.py: configurations tried, hours, speed-up, as Wootz reports them.

Reads exploration.json and time.json. The seconds of a training are counted, not taken from its own clock: steps times
the seconds of a step, validations times theirs, and the start of a process, each measured for several sizes of model
by `exploration.py --time` and laid on a line over the weights kept. So all arms are timed alike.

    python benchmarks/exploration_report.py out/exploration --results docs/results
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import table  # noqa: E402

WORKERS = 16
# Guan et al. (2019), tables 3 and 4: speed-up by size of the space, Flowers102 and CUB200.
WOOTZ = {4: (1.7, 2.1), 16: (7.1, 8.2), 64: (17.4, 23.8), 256: (108.0, 71.0)}


class Clock:
    """Seconds of trainings and of what is paid once."""

    def __init__(self, timed: dict):
        self.once = {name: median(seconds) for name, seconds in timed["once"].items()}
        self._lines = {}
        for arm in {r["arm"] for r in timed["trainings"]}:
            rows = [r for r in timed["trainings"] if r["arm"] == arm]
            x = [r["kept"] for r in rows]
            self._lines[arm] = {key: np.polyfit(x, [r[key] for r in rows], 1)
                                for key in ("step", "validation", "rest", "setup")}

    def training(self, row: dict, limit: float | None = None) -> float:
        """Return the seconds of a training, up to the first validation that meets a limit, if any does."""
        count = len(row["loss"])
        if limit is not None:
            count = next((i + 1 for i, loss in enumerate(row["loss"]) if loss <= limit), count)
        step, validation, rest, setup = (np.polyval(self._lines[row["arm"]][key], row["kept"])
                                         for key in ("step", "validation", "rest", "setup"))
        return float(row["steps"][count - 1] * step + count * validation + rest + setup)


def walk(members: list[int], first: int | None, rows: dict, clock: Clock, like: dict, kept: list[int], limit: float,
         workers: int = 1) -> tuple[int, float]:
    """Return (configurations tried, seconds) of an arm that visits ``members`` from small to large.

    Worker i takes every ``workers``-th. What was not trained counts as a failure with the whole budget.

    Args:
        first: the first place that meets the limit; all before it fail.
        like: a training of this arm, for the budget.
    """
    tried, busy, seconds = 0, [0.0] * workers, []
    for n, place in enumerate(members):
        row = rows.get(place) or like | {"kept": kept[place], "loss": [np.inf] * len(like["loss"])}
        busy[n % workers] += clock.training(row, limit)
        tried += 1
        seconds.append(busy[n % workers])
        if first is not None and place >= first:
            break
    return tried, max(seconds)


def subspace(count: int, total: int) -> list[int]:
    """Return the places of `exploration.Exploration.members`."""
    return [round((i + 0.5) * total / count - 0.5) for i in range(count)] if count < total else list(range(total))


def report(result: dict, clock: Clock, results: Path) -> None:
    once, total = sum(clock.once.values()), result["configurations"]
    print(f"paid once: {once:.0f} s (" + ", ".join(f"{name} {s:.1f}" for name, s in clock.once.items()) + ")")
    lines, spaces, drawn = [], [], {}
    for seed in result["seeds"]:
        by_arm = {arm: {r["place"]: r for r in seed["rows"] if r["arm"] == arm and r["place"] is not None}
                  for arm in ("published", "same")}
        full = {arm: max(rows.values(), key=lambda r: r["steps"][-1]) for arm, rows in by_arm.items()}
        kept = seed["kept"]
        ours_rows = {str(r["configuration"] if r["configuration"] is not None else r["place"]): r
                     for r in seed["rows"] if r["arm"] == "ours"}
        for alpha, found in seed["alphas"].items():
            limit = found["limit"]

            def ours(name: str, workers: int = 1, found=found, limit=limit, ours_rows=ours_rows) -> float:
                runs = [clock.training(ours_rows[r["key"]], limit) for r in found["ours"][name]["runs"]]
                return once + (sum(runs) if workers == 1 else max(runs))

            own = found["ours"][str(total)]
            published = walk(list(range(total)), found["published"], by_arm["published"], clock, full["published"],
                             kept, limit)
            many = walk(list(range(total)), found["published"], by_arm["published"], clock, full["published"], kept,
                        limit, WORKERS)
            same = walk(list(range(total)), found["same"]["found"], by_arm["same"], clock, full["same"], kept, limit)
            clever = sum(clock.training(by_arm["same"][place], limit) for place in found["same"]["visited"])
            sizes = [None if place is None else kept[place] for place in (found["published"], found["same"]["found"])]
            sizes += [found["ours"][name]["found"] and found["ours"][name]["found"]["kept"]
                      for name in (str(total), "None")]
            scores = found["scores"]
            lines.append([
                f"{float(alpha):.0%}", str(seed["seed"]), f"{published[0]} → {len(own['runs'])}",
                f"{published[1] / 3600:.2f} → {ours(str(total)) / 3600:.3f}", f"{published[1] / ours(str(total)):.0f}",
                f"{many[1] / ours(str(total), WORKERS):.0f}", f"{once / ours(str(total)):.0%}",
                f"{same[1] / ours(str(total)):.0f}", f"{clever / ours(str(total)):.1f}",
                *("–" if size is None else f"{size / seed['present']:.1%}" for size in sizes),
                *(f"{scores[name]['bleu']:.1f}" if name in scores else "–"
                  for name in ("published", "same", f"ours {total}", "ours None"))])
            for name in found["ours"]:
                if name.isdigit():
                    members = subspace(int(name), total)
                    base = walk(members, found["published"], by_arm["published"], clock, full["published"], kept, limit)
                    success = found["ours"][name]["found"]
                    spaces.append([f"{float(alpha):.0%}", str(seed["seed"]), name,
                                   f"{base[0]} → {len(found['ours'][name]['runs'])}",
                                   f"{base[1] / ours(name):.1f}",
                                   *(f"{x / seed['present']:.1%}" if x else "–" for x in (
                                       next((kept[p] for p in members if found["published"] is not None
                                             and p >= found["published"]), None), success and success["kept"]))])
                    drawn.setdefault(alpha, {}).setdefault(int(name), []).append(base[1] / ours(name))
    table(["α", "seed", "configurations tried", "hours", "speed-up", f"on {WORKERS} workers", "paid once",
           "against same masks", "against bisection", "size published", "same", "ours", "ours, any", "BLEU published",
           "same", "ours", "ours, any"], lines)
    table(["α", "seed", "space", "configurations tried", "speed-up", "size published", "ours"], spaces)
    draw(results / "exploration.png", {a: s for a, s in drawn.items() if len(s) > 1})


def draw(path: Path, drawn: dict) -> None:
    """Draw the speed-up against the number of configurations, with Wootz's."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4.2))
    for alpha, spaces in drawn.items():
        counts = sorted(spaces)
        axes.plot(counts, [median(spaces[n]) for n in counts], "o-", label=f"this toolkit, α = {float(alpha):.0%}")
    for i, name in enumerate(("Flowers102", "CUB200")):
        axes.plot(list(WOOTZ), [pair[i] for pair in WOOTZ.values()], "s--", label=f"Wootz, {name}")
    axes.set(xscale="log", yscale="log", xlabel="configurations", ylabel="times sooner than training one by one")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, help="folder that exploration.py has filled")
    p.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR", help="where the picture goes")
    args = p.parse_args()
    read = {name: json.loads((args.out / f"{name}.json").read_text(encoding="utf-8")) for name in (
        "exploration", "time")}
    report(read["exploration"], Clock(read["time"]), args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
