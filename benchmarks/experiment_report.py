"""Tables and figures of the composability experiment, from what benchmarks/experiment.py measured."""

import csv
import math
from pathlib import Path

ARMS = ("baseline", "composed")
COLORS = {"baseline": "tab:gray", "composed": "tab:blue"}
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


def by_arm(seed: dict) -> dict[str, list[dict]]:
    """Return a seed's runs by arm, in the order of the configurations."""
    return {arm: sorted((r for r in seed["runs"] if r["arm"] == arm), key=lambda r: r["configuration"])
            for arm in ARMS}


def pairs(runs: list[dict]) -> list[tuple[dict, dict]]:
    """Return (baseline, composed) for each configuration."""
    return list(zip(*by_arm({"runs": runs}).values(), strict=True))


def total(seed: dict, limit: float) -> dict:
    """Return what both arms took for all configurations of a seed together, seconds."""
    runs = by_arm(seed)
    baseline, composed = (sum(spent(r, limit) for r in runs[arm]) for arm in ARMS)
    n = len(runs["baseline"])
    saved = (baseline - composed) / n
    return {"n": n, "baseline": baseline, "composed": composed + seed["block_seconds"],
            "speedup": baseline / (composed + seed["block_seconds"]),
            "reached": {arm: sum(reached(r, limit) is not None for r in runs[arm]) for arm in ARMS},
            "untrained": sum((reached(r, limit) or (1,))[0] == 0 for r in runs["composed"]),
            "slower": sum(spent(c, limit) > spent(b, limit) for b, c in zip(runs["baseline"], runs["composed"],
                                                                            strict=True) if reached(b, limit)),
            "bleu": ", ".join(f"{sum(r.get('bleu', math.nan) for r in runs[arm]) / n:.1f}" for arm in ARMS),
            "at": {k: k * baseline / (k * composed + n * seed["block_seconds"]) for k in NUMBERS},
            "break_even": seed["block_seconds"] / saved if saved > 0 else None}


def table(result: dict, path: Path) -> None:
    """Write a row for each configuration and arm; with seed "long" those that were trained for the whole epoch."""
    dense = result["dense"]["validation_loss"]
    ends = dense * (1 + result["settings"]["target"])
    limits = {f"{t:.0%}": dense * (1 + t) for t in result["targets"]}
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "configuration", "mean_head_rate", "mean_linear_rate", "sparsity", "arm", "start_loss",
                         "best_loss", "end_loss", "loss_after_equal_time", "bleu", "chrf", "setup_seconds",
                         "train_seconds", "steps",
                         *(f"{what}_to_{name}" for name in limits for what in ("steps", "seconds"))])
        sets = [(s["seed"], s["runs"]) for s in result["seeds"]] + [("long", result["curves"])]
        rates = {s["seed"]: s["rates"] for s in result["seeds"]} | {"long": result["seeds"][0]["rates"]}
        for seed, b, c in [(seed, *pair) for seed, runs in sets for pair in pairs(runs)]:
            for r, after in zip((b, c), equal_time(b, c), strict=True):
                times = []
                for limit in limits.values():
                    missing = "not trained so far" if min(r["loss"]) <= ends and seed != "long" else "not reached"
                    times += reached(r, limit) or [missing] * 2
                losses = [r["loss"][0], min(r["loss"]), r["loss"][-1], after]
                writer.writerow([seed, r["configuration"], *rates[seed][r["configuration"]],
                                 round(r["zeros"] / r["parameters"], 4), r["arm"], *(round(x, 4) for x in losses),
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
    print("\n| seed | reached: baseline, composed | baseline s | composed s (block level) | speed-up | for 100 | "
          "break-even N | no training | composed slower | mean BLEU then |\n|---|---|---|---|---|---|---|---|---|---|")
    for seed in result["seeds"]:
        x = total(seed, dense * (1 + target))
        even = "never" if x["break_even"] is None else f"{x['break_even']:.1f}"
        print(f"| {seed['seed']} | {x['reached']['baseline']}, {x['reached']['composed']} of {x['n']} | "
              f"{x['baseline']:.0f} | {x['composed']:.0f} ({seed['block_seconds']:.0f}) | {x['speedup']:.2f} | "
              f"{x['at'][100]:.2f} | {even} | {x['untrained']} | {x['slower']} | {x['bleu']} |")
    first = result["seeds"][0]
    print("\n| configuration | heads, linear | zeros | start: masked, composed | seconds: baseline, composed | "
          "steps | BLEU then |\n|---|---|---|---|---|---|---|")
    for b, c in pairs(first["runs"]):
        found = [reached(r, dense * (1 + target)) for r in (b, c)]
        steps, seconds = (", ".join(format(x[i], f".{i}f") if x else "–" for x in found) for i in (0, 1))
        heads, linear = first["rates"][b["configuration"]]
        print(f"| {b['configuration']} | {heads:.2f}, {linear:.2f} | {b['zeros'] / b['parameters']:.1%} | "
              f"{b['loss'][0]:.3f}, {c['loss'][0]:.3f} | {seconds} | {steps} | {b['bleu']:.1f}, {c['bleu']:.1f} |")
    draw_targets(result, folder)
    if not result["curves"]:
        return
    print("\nTrained for the whole epoch, seed 0; seconds (baseline, composed):\n\n| configuration | "
          + " | ".join(f"to {t:.0%}" for t in result["targets"])
          + " | loss after equal time | best loss | BLEU of the best |\n"
          + "|---" * (len(result["targets"]) + 4) + "|")
    for b, c in pairs(result["curves"]):
        times = [", ".join(f"{x[1]:.1f}" if (x := reached(r, dense * (1 + t))) else "–" for r in (b, c))
                 for t in result["targets"]]
        after = equal_time(b, c)
        print(f"| {b['configuration']} | {' | '.join(times)} | {after[0]:.3f}, {after[1]:.3f} | {min(b['loss']):.3f}, "
              f"{min(c['loss']):.3f} | {b['bleu']:.1f}, {c['bleu']:.1f} |")
    print("\nTogether, those that the composed arm got there; in brackets for all:\n\n| target | reached: baseline, "
          "composed | baseline s | composed s, block level included | speed-up |\n|---|---|---|---|---|")
    for t in result["targets"]:
        every = total({"runs": result["curves"], "block_seconds": first["block_seconds"]}, dense * (1 + t))
        there = [r["configuration"] for r in result["curves"] if r["arm"] == "composed" and reached(r, dense * (1 + t))]
        some = total({"runs": [r for r in result["curves"] if r["configuration"] in there],
                      "block_seconds": first["block_seconds"]}, dense * (1 + t)) if there else None
        cells = [(f"{some[k]:.{d}f}" if some else "–") + f" ({every[k]:.{d}f})"
                 for k, d in (("baseline", 0), ("composed", 0), ("speedup", 2))]
        print(f"| {t:.0%} | {every['reached']['baseline']}, {every['reached']['composed']} of {every['n']} | "
              f"{' | '.join(cells)} |")
    draw_curves(result, folder)


def draw_curves(result: dict, folder: Path) -> None:
    """Draw loss curves of a mild, a middle and a harsh configuration."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dense, first = result["dense"], result["seeds"][0]
    uniform = (result["settings"]["configurations"] + 1) // 2
    drawn = [pairs(result["curves"])[n] for n in sorted({0, uniform // 2, uniform - 1})]
    figure, axes = plt.subplots(1, len(drawn), figsize=(4 * len(drawn), 3.8), layout="constrained", squeeze=False)
    axes = axes[0]
    for axis, pair, name in zip(axes, drawn, ("mild", "middle", "harsh"), strict=False):
        n = pair[0]["configuration"]
        for r in pair:
            arm = r["arm"]
            axis.plot([s + r["setup_seconds"] for s in r["seconds"]], r["loss"], color=COLORS[arm], label=arm)
            axis.plot(r["setup_seconds"], r["loss"][0], "o", color=COLORS[arm], markersize=4)
        for t in (0.05, 0.1):
            axis.axhline(dense["validation_loss"] * (1 + t), color="tab:green", linewidth=0.8, linestyle=":")
            axis.text(axis.get_xlim()[1], dense["validation_loss"] * (1 + t), f"{t:.0%}", fontsize=8, va="bottom",
                      ha="right", color="tab:green")
        axis.set_title(f"{name}: heads {first['rates'][n][0]:.0%}, linear {first['rates'][n][1]:.0%} removed",
                       fontsize=10)
        axis.set_xlabel("seconds, recalibration included")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss")
    axes[0].legend()
    figure.savefig(folder / "experiment_loss.png", dpi=130)


def draw_targets(result: dict, folder: Path) -> None:
    """Draw speed-up against N, and BLEU against sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dense, runs = result["dense"], by_arm(result["seeds"][0])
    limit = dense["validation_loss"] * (1 + result["settings"]["target"])
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for seed in result["seeds"]:
        axes[0].plot(*zip(*total(seed, limit)["at"].items(), strict=True), marker="o", markersize=3,
                     label=f"seed {seed['seed']}")
    axes[0].axhline(1, color="black", linewidth=0.8)
    axes[0].set_xscale("log")
    axes[0].set_xlabel("pruned models N (mean cost of a configuration)")
    axes[0].set_ylabel(f"speed-up to {result['settings']['target']:.0%} above the dense loss")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    for arm in ARMS:
        axes[1].scatter([r["zeros"] / r["parameters"] for r in runs[arm]], [r["bleu"] for r in runs[arm]], s=18,
                        color=COLORS[arm], label=arm)
    axes[1].axhline(dense["bleu"], color="black", linewidth=0.8, linestyle=":", label="dense")
    axes[1].set_xlabel("zeros in the whole model")
    axes[1].set_ylabel("BLEU on test_2016_flickr when it ended")
    axes[1].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(folder / "experiment_speedup.png", dpi=130)
