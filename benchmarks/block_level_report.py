"""Tables, bars and picture of benchmarks/block_level.py, from its results: {part: {"series": {label: points}, …}}."""

import math
from pathlib import Path

EXACT, STEPPED, GRADIENT, PUBLISHED = "A exact", "A exact, attention steps", "B gradient", "C published"


def all_series(results: dict) -> dict[str, list[dict]]:
    """Return the points of every part's methods by label."""
    return {label: points for r in results.values() for label, points in r["series"].items()}


def lowest(points) -> dict:
    """Return the point of least error."""
    return min(points, key=lambda p: p["error"])


def reached(points, error: float) -> float | None:
    """Return the seconds at which a series is at or below ``error``; between steps of a run it is interpolated."""
    for i, p in enumerate(points):
        if p["error"] <= error:
            if i == 0 or "step" not in p:
                return p["seconds"]
            before, share = points[i - 1], (points[i - 1]["error"] - error) / (points[i - 1]["error"] - p["error"])
            return before["seconds"] * (p["seconds"] / before["seconds"]) ** share
    return None


def bars(results: dict) -> list[dict]:
    """Return what was promised, in words with the figures measured, and whether it holds."""
    lines = []

    def bar(holds, text):
        lines.append({"holds": bool(holds), "text": text})

    series = all_series(results)
    for label in (label for label in (EXACT, STEPPED) if label in series):
        exact = series[label][-1]
        took, error = exact["seconds"], exact["error"]
        if runs := [p for name in (GRADIENT, PUBLISHED) for p in series.get(name, ())]:
            other = lowest(runs)["error"]
            bar(error <= other, f"{label}: error {error:.5f} <= {other:.5f}, the lowest of any gradient run")
            error, other = exact["linear_error"], min(p["linear_error"] for p in runs)
            bar(error <= other, f"{label}: error {error:.5f} <= {other:.5f} on feed-forward variants alone, where all "
                "methods tune the same weights")
        if GRADIENT in series:
            other = lowest(series[GRADIENT])["seconds"]
            bar(took <= other / 100, f"{label}: {took:.2f} s <= 1/100 of the {other:.1f} s that the gradient run on "
                f"the same text took to its lowest error (1/{other / took:.0f})")
        if PUBLISHED in series:
            other = results["C"]["full_seconds"]
            bar(took <= other / 1000, f"{label}: {took:.2f} s <= 1/1000 of the published protocol's {other:,.0f} s, "
                f"extrapolated (1/{other / took:.0f})")
    if "A" in results:
        for label, seconds in results["A"]["growth"].items():
            if label.startswith(f"{EXACT}:"):
                few, many = sorted(seconds)[-2:]
                added = seconds[many] / seconds[few] - 1
                bar(added <= 0.15, f"{label}: {many} rates instead of {few} add {added:.1%} <= 15 %")
    return lines


def table(title: str, header: list, rows: list[list]) -> None:
    """Print a table; the first column is text, the others are figures."""
    rows = [[str(x) for x in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}")
    for first, *rest in rows:
        print("  " + "  ".join([first.ljust(widths[0]), *(x.rjust(w) for x, w in zip(rest, widths[1:], strict=True))]))


def show(results: dict) -> None:
    """Print the tables, what was assumed, and the bars."""
    series = all_series(results)
    rows = []
    for part in results.values():
        for label, points in part["series"].items():
            for p in points if "sentences" in points[0] else [lowest(points)]:
                what = f"{p['sentences']:,} sentences" if "sentences" in p else \
                    f"{p['step']:,} steps = {part['epochs'] * p['step'] / part['steps']:.2f} epochs"
                what += f", {p['attention_steps']} steps" if "attention_steps" in p else ""
                rows.append([f"{label}, {what}", f"{p['seconds']:.2f}", f"{p['error']:.5f}",
                             f"{p['attention_error']:.5f}", f"{p['linear_error']:.5f}", p["peak_mib"]])
    table("Seconds of tuning and relative error, mean over all variants / attentions / feed-forward",
          ["", "seconds", "error", "attention", "linear", "peak MiB"], rows)
    print("  of the peak, libraries, model and text: "
          + ", ".join(f"{name} {r['loaded_mib']} MiB" for name, r in results.items()))
    if a := results.get("A"):
        checks = (f"{label} {error:.5f}" for label, error in a["error_by_forward_pass"].items())
        print(f"  masked only: {a['series'][EXACT][0]['masked_error']:.5f}; A measured as B and C are, by a forward "
              f"pass: {', '.join(checks)}")
    for r in (r for r in results.values() if "sweep" in r):
        edge = r["lr"] in (r["sweep"][0]["lr"], r["sweep"][-1]["lr"])
        print(f"  {next(iter(r['series']))}, error after {r['sweep'][0]['steps']} steps with each learning rate: "
              + ", ".join(f"{s['lr']:g} {s['error']:.4f}" for s in r["sweep"])
              + ("; the best is at the grid's edge" if edge else ""))
    if c := results.get("C"):
        print(f"""\
  C in full, {c['full_epochs']} epochs of {c['pairs']:,} pairs = {c['full_steps']:,} steps, takes \
{c['full_seconds']:,.0f} s, extrapolated from {c['seconds_per_step']:.2f} s a step.
  Its error then is not known; the picture shows the lowest of any gradient run here, {optimistic(series):.5f}.
  In C's favour: an attention's o is tuned inside it at its own rate, not a second time alone; removed heads are
  physically gone; lm_head is not computed. As in the published code, padding counts in its loss.""")
    if {GRADIENT, PUBLISHED} & series.keys():
        print("  B and C tune q, k, v and o of an attention; A and D o alone, and A with steps also q, k, v. All "
              "get every variant at once.")
    base = (series.get(EXACT) or [lowest(p for points in series.values() for p in points)])[-1]["error"]
    factors = (1.5, 1.2, 1.1, 1.05, 1.02, 1, 0.95, 0.9)
    steps = sorted({math.ceil(base * f * 1e4) / 1e4 for f in factors}, reverse=True)
    table("Seconds until the error is at most … (B, C: interpolated between measurements)",
          ["", *(f"{e:.4f}" for e in steps), "floor"],
          [[label, *("not reached" if (s := reached(points, e)) is None else f"{s:.2f}" for e in steps),
            f"{lowest(points)['error']:.5f}"] for label, points in series.items()])
    growth = {label: seconds for r in results.values() for label, seconds in r.get("growth", {}).items()}
    if growth:
        rates = sorted({n for seconds in growth.values() for n in seconds})
        table("Seconds by the number of rates", ["", *rates, f"{rates[-1]} / {rates[-2]}"],
              [[label, *(f"{seconds[n]:.2f}" if n in seconds else "" for n in rates),
                f"{seconds[rates[-1]] / seconds[rates[-2]]:.2f}"] for label, seconds in growth.items()])
    print("\nBars")
    for line in bars(results):
        print(f"  {'holds' if line['holds'] else 'FAILS'}  {line['text']}")
    if missing := sorted({"A", "B", "C"} - results.keys()):
        print(f"  not measured: what needs part {', '.join(missing)}")


def optimistic(series: dict) -> float:
    """Return the lowest error of any gradient run."""
    return lowest(p for label in (GRADIENT, PUBLISHED) for p in series.get(label, ()))["error"]


def draw(path: Path, results: dict) -> None:
    """Draw error against seconds, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from common import files

    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    series = all_series(results)
    for label, points in series.items():
        line, = axes.plot(*zip(*((p["seconds"], p["error"]) for p in points), strict=True), "o-", markersize=3.5,
                          label=label)
        if label == PUBLISHED:
            axes.plot(results["C"]["full_seconds"], optimistic(series), "o", markerfacecolor="none",
                      color=line.get_color(), label="C in full: time extrapolated, error a bound in its favour")
    axes.set(xscale="log", yscale="log", xlabel="seconds of tuning all variants",
             ylabel="mean relative squared error of outputs, validation text")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper right", fontsize=8)
    with files.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
    plt.close(figure)
