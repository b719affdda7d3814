#!/usr/bin/env python3
"""Tables and the picture of benchmarks/exploration.py: configurations tried, hours, speed-up, as Wootz reports them.

Reads exploration.json and exploration_time.json. The seconds of a training are counted, not taken from its own clock:
steps times the seconds of a step, validations times theirs, and the start of a process, each measured for several
sizes of model by `exploration.py --time` and laid on a line over the weights kept. So all arms are timed alike.

    python benchmarks/exploration_report.py docs/results
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.exploration import members  # noqa: E402
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
        lines = self._lines["ours" if row["arm"] == "ours" else "published"]  # the same masks take the same time
        step, validation, rest, setup = (np.polyval(lines[key], row["kept"])
                                         for key in ("step", "validation", "rest", "setup"))
        return float(row["steps"][count - 1] * step + count * validation + rest + setup)


def walk(members: list[int], rows: dict, clock: Clock, kept: list[int], limit: float,
         workers: int = 1) -> tuple[int, float, int | None]:
    """Return (configurations tried, seconds, place found) of an arm that visits ``members`` from small to large.

    Worker i takes every ``workers``-th. What was not trained counts as a failure with a whole epoch if it is smaller
    than the first success that is known, else as a success, in the arm's favour.

    Args:
        rows: the arm's trainings, {place: training}.
    """
    first = min((place for place, row in rows.items() if min(row["loss"]) <= limit), default=len(kept))
    like = max(rows.values(), key=lambda row: row["steps"][-1])
    busy, found = [0.0] * workers, None
    for n, place in enumerate(members):
        row = rows.get(place) or like | {"kept": kept[place], "loss": [np.inf] * len(like["loss"])}
        busy[n % workers] += clock.training(row, limit)
        if min(row["loss"]) <= limit or (place not in rows and place > first):
            found = place
            break
    return n + 1, max(busy), found


def report(result: dict, clock: Clock, results: Path) -> None:
    once, total = sum(clock.once.values()), result["configurations"]
    print(f"paid once: {once:.0f} s (" + ", ".join(f"{name} {s:.1f}" for name, s in clock.once.items()) + ")")
    lines, spaces, drawn = [], [], {}
    for seed in result["seeds"]:
        rows = {arm: {r["place"]: r for r in seed["rows"] if r["arm"] == arm} for arm in ("published", "same")}
        kept, present = seed["kept"], seed["present"]
        print(f"seed {seed['seed']}: trained " + ", ".join(f"{len(rows[arm])} {arm}" for arm in rows))
        for alpha, found in seed["alphas"].items():
            limit, name = found["limit"], f"{float(alpha):.0%}"

            def ours(space: str, workers: int = 1, found=found) -> float:
                runs = [clock.training(row) for row in found["ours"][space]["runs"]]  # to the end of the epoch
                return once + (sum(runs) if workers == 1 else max(runs))

            def base(count: int = total, workers: int = 1, rows=rows, kept=kept, limit=limit) -> tuple:
                return walk(members(count, total), rows["published"], clock, kept, limit, workers)

            def size(weights: int | None, present=present) -> str:
                return "–" if weights is None else f"{weights / present:.1%}"

            def found_by(space: str, found=found) -> int | None:
                return found["ours"][space]["found"] and found["ours"][space]["found"]["kept"]

            tried, seconds, place = base()
            if found["published"]["left"]:
                print(f"α = {name}: {len(found['published']['left'])} smaller ones may succeed and were not trained")
            runs = len(found["ours"][str(total)]["runs"])
            own, same, scores = ours(str(total)), found.get("same"), found["scores"]
            rivals = ["–", "–"]
            if same:
                bisection = sum(clock.training(rows["same"][p], limit) for p in same["visited"])
                rivals = [f"{len(same['visited'])} trainings, {bisection / own:.1f}",
                          size(None if same["found"] is None else kept[same["found"]])]
            lines.append([
                name, str(seed["seed"]), f"{tried} → {runs}", f"{seconds / 3600:.2f} → {own / 3600:.3f}",
                f"{seconds / own:.0f}", f"{tried / runs:.0f} × {seconds / tried * runs / (own - once):.2f} × "
                f"{(own - once) / own:.2f}",
                f"{base(workers=WORKERS)[1] / ours(str(total), WORKERS):.0f}", f"{once / own:.0%}",
                *rivals, size(None if place is None else kept[place]), size(found_by(str(total))),
                size(found_by("None")), *(f"{scores[key]['bleu']:.1f} / {scores[key]['chrf']:.1f}" if key in scores
                                          else "–" for key in ("published", "same", f"ours {total}", "ours None"))])
            for space in found["ours"]:
                if space.isdigit():
                    tried, seconds, place = base(int(space))
                    speedup = seconds / ours(space)
                    spaces.append([name, str(seed["seed"]), space, f"{tried} → {len(found['ours'][space]['runs'])}",
                                   f"{speedup:.1f}", size(None if place is None else kept[place]),
                                   size(found_by(space))])
                    drawn.setdefault(alpha, {}).setdefault(int(space), []).append(speedup)
    table(["α", "seed", "configurations tried", "hours", "speed-up",
           "trainings avoided × each cheaper × share not paid once", f"on {WORKERS} workers", "paid once",
           "against bisection", "size bisected", "size published", "ours", "ours, any",
           "BLEU / chrF published", "bisected", "ours", "ours, any"], lines)
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
    p.add_argument("results", type=Path, help="folder with what exploration.py measured; the picture goes there")
    folder = p.parse_args().results
    measured, timed = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in (
        "exploration", "exploration_time"))
    report(measured, Clock(timed), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
