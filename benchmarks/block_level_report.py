"""Tables and picture of benchmarks/block_level.py, from its results: {part: {"series": {label: points}, …}}."""

from pathlib import Path

EXACT, RECIPE, GRADIENT, PUBLISHED = "A exact", "A recipe", "B gradient", "C published"


def all_series(results: dict) -> dict[str, list[dict]]:
    """Return the points of every part's methods by label."""
    return {label: points for r in results.values() for label, points in r["series"].items()}


def lowest(points) -> dict:
    """Return the point of least error."""
    return min(points, key=lambda p: p["error"])


def optimistic(series: dict) -> float:
    """Return the lowest error of any gradient run."""
    return lowest(p for label in (GRADIENT, PUBLISHED) for p in series.get(label, ()))["error"]


def table(title: str, header: list, rows: list[list]) -> None:
    """Print a table; the first column is text, the others are figures."""
    rows = [[str(x) for x in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}")
    for first, *rest in rows:
        print("  " + "  ".join([first.ljust(widths[0]), *(x.rjust(w) for x, w in zip(rest, widths[1:], strict=True))]))


def show(results: dict) -> None:
    """Print the tables and what was assumed."""
    series, rows = all_series(results), []
    for part in results.values():
        for label, points in part["series"].items():
            for p in points if "sentences" in points[0] else [lowest(points)]:
                what = f"{p['sentences']:,} sentences" if "sentences" in p else \
                    f"{p['step']:,} steps = {part['epochs'] * p['step'] / part['steps']:.2f} epochs"
                rows.append([f"{label}, {what}", f"{p['seconds']:.2f}", f"{p['error']:.5f}",
                             f"{p['attention_error']:.5f}", f"{p['linear_error']:.5f}", p["peak_mib"]])
    table("Seconds of tuning and relative error, mean over all variants / attentions / feed-forward",
          ["", "seconds", "error", "attention", "linear", "peak MiB"], rows)
    print("  of the peak, libraries, model and text: "
          + ", ".join(f"{name} {r['loaded_mib']} MiB" for name, r in results.items()))
    if a := results.get("A"):
        print(f"  masked only: error {a['masked_error']:.5f}; A exact by the number of rates: "
              + ", ".join(f"{n}: {seconds:.2f} s" for n, seconds in a["growth"].items()))
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
    print("  B and C tune q, k, v and o of an attention; A exact and D o alone, A's recipe also q, k, v of those that "
          "lost heads.")


def draw(path: Path, results: dict) -> None:
    """Draw error against seconds, both logarithmic."""
    from common.plots import picture

    series = all_series(results)
    with picture(path) as axes:
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
