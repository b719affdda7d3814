"""Tables and figures of the composability experiment, from what benchmarks/experiment.py measured."""

import csv
import math
from pathlib import Path

ARMS = ("published", "baseline", "composed", "joint")
RIVALS = ARMS[:2]
COLORS = {"composed": "tab:blue", "joint": "tab:orange"}
NUMBERS = (1, 2, 4, 8, 16, 32, 64, 100)  # of models, for which the speed-up is told


def reached(run: dict, limit: float) -> tuple[int, float] | None:
    """Return (steps, seconds with what came before the first step) until a loss, or None if it was not reached."""
    for step, seconds, loss in zip(run["steps"], run["seconds"], run["loss"], strict=True):
        if loss <= limit:
            return step, round(seconds + run["setup_seconds"], 2)
    return None


def spent(run: dict, limit: float) -> float:
    """Return the seconds until a loss, or all of the run's if it never got there."""
    found = reached(run, limit)
    return found[1] if found else run["seconds"][-1] + run["setup_seconds"]


def by_arm(runs: list[dict]) -> dict[str, list[dict]]:
    """Return runs by arm, in the order of the configurations."""
    return {arm: sorted((r for r in runs if r["arm"] == arm), key=lambda r: r["configuration"])
            for arm in ARMS if any(r["arm"] == arm for r in runs)}


def pairs(runs: list[dict], arm: str, rival: str = "baseline") -> list[tuple[dict, dict]]:
    """Return (``rival``, ``arm``) for each configuration."""
    found = by_arm(runs)
    return list(zip(found[rival], found[arm], strict=True))


def once(seed: dict, arm: str) -> float:
    """Return the seconds that an arm takes whatever the number of configurations."""
    return {"composed": seed["block_seconds"], "joint": seed["block_seconds"] + seed.get("joint_seconds", 0.0)}[arm]


def total(seed: dict, limit: float, arm: str, rival: str = "baseline") -> dict:
    """Return what the rival and ``arm`` took for all configurations of a seed together, seconds."""
    both, fixed = pairs(seed["runs"], arm, rival), once(seed, arm)
    baseline, variable = (sum(spent(pair[i], limit) for pair in both) for i in (0, 1))
    n = len(both)
    saved = (baseline - variable) / n
    return {"n": n, "baseline": baseline, "arm": variable + fixed, "once": fixed,
            "speedup": baseline / (variable + fixed),
            "reached": ", ".join(str(sum(reached(pair[i], limit) is not None for pair in both)) for i in (0, 1)),
            "untrained": sum((reached(r, limit) or (1,))[0] == 0 for _, r in both),
            "slower": sum(spent(r, limit) > spent(b, limit) for b, r in both if reached(b, limit)),
            "scores": [", ".join(f"{sum(pair[i].get(score, math.nan) for pair in both) / n:.1f}" for i in (0, 1))
                       for score in ("bleu", "chrf")],
            "at": {k: k * baseline / (k * variable + n * fixed) for k in NUMBERS},
            "break_even": fixed / saved if saved > 0 else None}


def table(result: dict, path: Path) -> None:
    """Write a row for each configuration and arm; with seed "long" those that were trained for the whole epoch."""
    dense = result["dense"]["validation_loss"]
    ends = dense * (1 + result["settings"]["target"])
    limits = {f"{t:.0%}": dense * (1 + t) for t in result["targets"]}
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "configuration", "mean_head_rate", "mean_linear_rate", "sparsity", "arm", "start_loss",
                         "best_loss", "end_loss", "loss_after_baseline_time", "bleu", "chrf", "setup_seconds",
                         "train_seconds", "steps",
                         *(f"{what}_to_{name}" for name in limits for what in ("steps", "seconds"))])
        sets = [(s["seed"], s["runs"]) for s in result["seeds"]] + [("long", result["curves"])]
        rates = {s["seed"]: s["rates"] for s in result["seeds"]} | {"long": result["seeds"][0]["rates"]}
        for seed, runs in sets:
            for arm in by_arm(runs):
                for b, r in pairs(runs, arm):
                    times = []
                    for limit in limits.values():
                        missing = "not trained so far" if min(r["loss"]) <= ends and seed != "long" else "not reached"
                        times += reached(r, limit) or [missing] * 2
                    losses = [r["loss"][0], min(r["loss"]), r["loss"][-1], equal_time(b, r)[1]]
                    writer.writerow([seed, r["configuration"], *rates[seed][r["configuration"]],
                                     round(r["zeros"] / r["parameters"], 4), arm, *(round(x, 4) for x in losses),
                                     round(r["bleu"], 2), round(r["chrf"], 2), r["setup_seconds"], r["seconds"][-1],
                                     r["steps"][-1], *times])


def equal_time(b: dict, c: dict) -> list[float]:
    """Return both arms' losses after the same seconds: the shorter run's. Until a run has begun it is at its start."""
    end = min(x["seconds"][-1] + x["setup_seconds"] for x in (b, c))
    return [min([loss for s, loss in zip(x["seconds"], x["loss"], strict=True) if s + x["setup_seconds"] <= end],
                default=x["loss"][0]) for x in (b, c)]


def report(result: dict, folder: Path) -> None:
    """Print the tables and write experiment.csv and the figures."""
    dense, target = result["dense"]["validation_loss"], result["settings"]["target"]
    table(result, folder / "experiment.csv")
    print(f"dense: validation loss {dense:.4f}, BLEU {result['dense']['bleu']:.1f}; learning rates {result['lr']}; "
          f"until {target:.0%} above the dense loss:")
    print("\n| seed | rival | arm | reached: rival, arm | rival s | arm s (paid once) | speed-up | for 100 | "
          "break-even N | no training | slower | mean BLEU then | mean chrF then |\n" + "|---" * 13 + "|")
    for seed, rival, arm in [(s, rival, arm) for s in result["seeds"] for rival in RIVALS for arm in ARMS[2:]
                             if {rival, arm} <= by_arm(s["runs"]).keys()]:
        x = total(seed, dense * (1 + target), arm, rival)
        even = "never" if x["break_even"] is None else f"{x['break_even']:.1f}"
        print(f"| {seed['seed']} | {rival} | {arm} | {x['reached']} of {x['n']} | {x['baseline']:.0f} | {x['arm']:.0f} "
              f"({x['once']:.0f}) | {x['speedup']:.2f} | {x['at'][100]:.2f} | {even} | {x['untrained']} | "
              f"{x['slower']} | {' | '.join(x['scores'])} |")
    first = result["seeds"][0]
    found = by_arm(first["runs"])
    names = ", ".join(found)
    print(f"\n| configuration | heads, linear | zeros | start: {names} | seconds | steps | BLEU then |\n" + "|---" * 7
          + "|")
    for runs in zip(*found.values(), strict=True):
        there = [reached(r, dense * (1 + target)) for r in runs]
        steps, seconds = (", ".join(format(x[i], f".{i}f") if x else "–" for x in there) for i in (0, 1))
        r = runs[0]
        heads, linear = first["rates"][r["configuration"]]
        starts, bleu = ", ".join(f"{r['loss'][0]:.3f}" for r in runs), ", ".join(f"{r['bleu']:.1f}" for r in runs)
        print(f"| {r['configuration']} | {heads:.2f}, {linear:.2f} | {r['zeros'] / r['parameters']:.1%} | {starts} | "
              f"{seconds} | {steps} | {bleu} |")
    draw_speedup(result, folder / "experiment_speedup.png")
    if result["curves"]:
        report_curves(result)
        draw_curves(result, folder / "experiment_loss.png")


def report_curves(result: dict) -> None:
    """Print the tables of the runs over the whole epoch."""
    dense, first = result["dense"]["validation_loss"], result["seeds"][0]
    arm = next(arm for arm in by_arm(result["curves"]) if arm != "baseline")
    print(f"\nTrained for the whole epoch, seed 0; seconds (baseline, {arm}):\n\n| configuration | "
          + " | ".join(f"to {t:.0%}" for t in result["targets"])
          + " | loss after equal time | best loss | BLEU of the best |\n"
          + "|---" * (len(result["targets"]) + 4) + "|")
    both = pairs(result["curves"], arm)
    for b, c in both:
        times = [", ".join(f"{x[1]:.1f}" if (x := reached(r, dense * (1 + t))) else "–" for r in (b, c))
                 for t in result["targets"]]
        after = equal_time(b, c)
        print(f"| {b['configuration']} | {' | '.join(times)} | {after[0]:.3f}, {after[1]:.3f} | {min(b['loss']):.3f}, "
              f"{min(c['loss']):.3f} | {b['bleu']:.1f}, {c['bleu']:.1f} |")
    print(f"\nTogether, those that the {arm} arm got there; in brackets for all:\n\n| target | reached: baseline, "
          f"{arm} | baseline s | {arm} s, all that is paid once included | speed-up |\n|---|---|---|---|---|")
    for t in result["targets"]:
        limit = dense * (1 + t)
        every = total(first | {"runs": result["curves"]}, limit, arm)
        there = [r for pair in both if reached(pair[1], limit) for r in pair]
        some = total(first | {"runs": there}, limit, arm) if there else None
        cells = [(f"{some[k]:.{d}f}" if some else "–") + f" ({every[k]:.{d}f})"
                 for k, d in (("baseline", 0), ("arm", 0), ("speedup", 2))]
        print(f"| {t:.0%} | {every['reached']} of {every['n']} | {' | '.join(cells)} |")


def draw_curves(result: dict, path: Path) -> None:
    """Draw loss curves of a mild, a middle and a harsh configuration; the baseline's are dashed."""
    from common.plots import legend, picture

    dense, first = result["dense"]["validation_loss"], result["seeds"][0]
    uniform = (result["settings"]["configurations"] + 1) // 2
    arm = next(arm for arm in by_arm(result["curves"]) if arm != "baseline")
    lines, names = [], []
    with picture(path) as axes:
        for color, n in enumerate(sorted({0, uniform // 2, uniform - 1})):
            for r in pairs(result["curves"], arm)[n]:
                lines += axes.plot([s + r["setup_seconds"] for s in r["seconds"]], r["loss"], color=f"C{color}",
                                   linestyle="--" if r["arm"] == "baseline" else "-", marker="o", markevery=[0])
                names.append(f"{r['arm']}, heads {first['rates'][n][0]:.0%}, linear {first['rates'][n][1]:.0%} removed")
        for t in (0.05, 0.1):
            axes.axhline(dense * (1 + t), color="black", linewidth=0.8, linestyle=":")
            axes.text(1, dense * (1 + t), f"dense + {t:.0%}", fontsize=8, va="bottom", ha="right",
                      transform=axes.get_yaxis_transform())
        axes.set(xlabel="seconds, recalibration included", ylabel="validation loss")
        axes.grid(alpha=0.3)
        legend(axes, lines, names)


def draw_speedup(result: dict, path: Path) -> None:
    """Draw every seed's speed-up against the number of models."""
    from common.plots import picture

    limit = result["dense"]["validation_loss"] * (1 + result["settings"]["target"])
    with picture(path) as axes:
        for seed in result["seeds"]:
            for arm in by_arm(seed["runs"]):
                if arm not in RIVALS:
                    axes.plot(*zip(*total(seed, limit, arm)["at"].items(), strict=True), marker="o", markersize=3,
                              color=COLORS[arm], label=arm if seed is result["seeds"][0] else None)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="pruned models N (mean cost of a configuration)",
                 ylabel=f"speed-up (each seed) to {result['settings']['target']:.0%} above dense")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
