#!/usr/bin/env python3
"""Make a family of fast models out of one bank, and measure what each translates like after one epoch.

Members are searched for the speed of a larger T5, whose shape decides what heads, units and words cost: as time count
the multiply-adds for a source and a target token at that shape, the smaller vocabulary included. Each is composed,
recalibrated and trained for one epoch with distillation, and scored. Its speed at that shape is measured by
benchmarks/inference.py -c OUT/conf.json -n N; --speeds draws quality against what that wrote. Resumable.

    python benchmarks/family.py -m origin_model.pth -p finetuned_modules.npy --data multi30k --out out/family
"""

import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import stages  # noqa: E402
from benchmarks.inference import SHAPES, VOCABULARY  # noqa: E402
from benchmarks.rounds import spread, table  # noqa: E402
from common import cli  # noqa: E402
from common.errors import UserError  # noqa: E402

BATCH_TOKENS = 512  # of a training step


def configurations(args) -> list[dict[str, float]]:
    """Return the best configuration for each of --speedup, by multiply-adds at the shape.

    All attentions of a stack lose as many heads: other programs want them so, and fill up layers that lost more.
    """
    from common.files.jsonfile import read_json
    from common.pruning import bank, search
    from common.pruning.configurations import removed_count, required_variants
    from common.t5 import model
    from common.t5.shrink import used

    opened, measured = bank.load(args.bank), args.bank.with_suffix(".sensitivity.json")
    found = search.read(measured, opened, read_json(measured)["of"])
    counts = {name: len(mask) for name, mask in used(model.load(args.model).network).items()}
    shape = SHAPES[args.shape]
    d, deeper = shape["d_model"], shape["num_layers"] / (1 + max(int(name.split(".")[2]) for name in counts))
    cost = {name: round(deeper * (2 if name.endswith("DenseReluDense") else 4) * d
                        * (shape["d_ff"] if name.endswith("DenseReluDense") else 64 * shape["num_heads"]))
            for name in counts}
    saved = {key: round(cost[key[0]] * removed_count(key[1][0], counts[key[0]]) / counts[key[0]])
             if key[0] in counts else 0 for key in opened.entries}
    dense = sum(cost.values()) + VOCABULARY * d
    heads = [key for key in found.losses if key[0].endswith("Attention")]
    best = {}
    for rates in itertools.product(sorted({0.0, *(key[1][0] for key in heads)} - {1.0}), repeat=2):
        chosen = {key[0]: key[1][0] for key in heads if key[1] == (rates[key[0].startswith("decoder")], 0.0)}
        loss = search.predict(found, chosen)
        others = search.Sensitivity(loss, {k: own - found.dense + loss for k, own in found.losses.items()
                                           if k not in heads})
        gone = sum(saved[key] for key in required_variants(chosen).items())
        front = search.front(others, saved, sum(cost.values()) + args.vocabulary * d - gone)
        for speed in args.speedup:
            if (place := front.at_size(dense / speed)) is not None:
                made = float(front.losses[place]), chosen | front.configuration(place)
                best[speed] = min(best.get(speed, made), made, key=lambda one: one[0])
    if missing := [speed for speed in args.speedup if speed not in best]:
        raise UserError(f"no configuration of {args.bank} has {missing[0]:g} times fewer multiply-adds")
    for speed in args.speedup:
        print(f"{speed:g} times fewer multiply-adds: expected loss {best[speed][0]:.4f}")
    return [best[speed][1] for speed in args.speedup]


def train(args, n: int, seed: int) -> dict:
    """Train a member with a seed; return its scores."""
    output = args.out / f"member{n}_seed{seed}.pth"
    scores, text = output.with_suffix(".json"), ["--data", args.data]
    stages.run(output, 1, "model-level_finetuning", "-m", args.model, "-p", args.bank, "-c", args.out / "conf.json",
               "-n", n, "-o", output, "--stats", output.with_suffix(".csv"), "--distillation", "--epochs", 1,
               "--dropout", 0, "--lr", args.lr, "--batch-tokens", BATCH_TOKENS, "--seed", seed, *text, resume=True)
    stages.run(scores, 1, "evaluate", "-m", output, "--json", scores, "--overwrite", *text)
    keys = ("bleu", "chrf", "validation_loss", "shrunk_parameters", "parameters", "hit_limit", "bytes")
    row = json.loads(scores.read_text(encoding="utf-8"))[0]
    return {"member": n, "seed": seed, "start": stages.curve(output.with_suffix(".csv"))[0]["valid_loss"],
            **{key: row[key] for key in keys}}


def draw(path: Path, result: dict, speeds: list[Path]) -> None:
    """Draw BLEU against the measured speed (median, least to largest), one line a runtime; dotted: the dense model."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = {}
    for n, file in enumerate(speeds):
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            if row["program"] in ("shrunk", "CTranslate2, pruned") and row["batch"] > 1:
                name = f"{'this toolkit' if row['program'] == 'shrunk' else 'CTranslate2'}, {row['threads']} thread" + (
                    "s" * (row["threads"] > 1))
                lines.setdefault(name, []).append((n, row["speed_up_in_runtime"]))
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for name, points in lines.items():
        bleu = [median(r["bleu"] for r in result["rows"] if r["member"] == n) for n, _ in points]
        middle = [median(rounds) for _, rounds in points]
        spans = [[m - min(r) for m, (_, r) in zip(middle, points, strict=True)],
                 [max(r) - m for m, (_, r) in zip(middle, points, strict=True)]]
        axes.errorbar(middle, bleu, xerr=spans, fmt="o-", capsize=3, label=name)
    dense = result["dense"]["bleu"]
    axes.axhline(dense, color="black", linestyle=":", label="dense")
    axes.axhline(0.95 * dense, color="gray", linestyle=":", label="95 %")
    axes.set(xlabel=f"times as fast as dense in the same runtime, {result['shape']}'s shape, batches",
             ylabel="BLEU (test_2016_flickr)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(argv=None) -> int:
    p = cli.parser(__doc__)
    cli.add_model(p)
    p.add_argument("-p", "--bank", type=Path, default=Path("finetuned_modules.npy"), metavar="BANK",
                   help="tuned bank whose variants have been searched (BANK.sensitivity.json)")
    cli.add_data(p, limit=False)
    p.add_argument("--out", type=Path, default=Path("out/family"), metavar="DIR", help="where models go")
    p.add_argument("--shape", choices=list(SHAPES), default="t5-small", help="whose speed counts")
    p.add_argument("--vocabulary", type=cli.count, default=8000, metavar="N", help="tokens of the pruned models there")
    p.add_argument("--speedup", type=cli.positive, nargs="+", default=[2, 3, 3.8, 4.6], metavar="S",
                   help="times fewer multiply-adds there")
    p.add_argument("--lr", type=cli.positive, default=4e-3, metavar="X", help="learning rate")
    p.add_argument("--seeds", type=cli.count, default=1, metavar="N", help="trainings of each member")
    p.add_argument("--jobs", type=cli.count, default=1, metavar="N", help="trainings at once")
    p.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR", help="where results go")
    p.add_argument("--speeds", type=Path, nargs="+", metavar="JSON", help="what inference.py wrote, a member each")
    args = p.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.results / "family.json"
    if args.speeds:
        draw(args.results / "family.png", json.loads(path.read_text(encoding="utf-8")), args.speeds)
        return 0
    conf = args.out / "conf.json"
    if not conf.exists():
        conf.write_text(json.dumps(configurations(args)), encoding="utf-8")
    dense = args.out / "dense.json"
    stages.run(dense, 1, "evaluate", "-m", args.model, "--json", dense, "--overwrite", "--data", args.data)
    members = range(len(json.loads(conf.read_text(encoding="utf-8"))))
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda job: train(args, *job), [(n, s) for s in range(args.seeds) for n in members]))
    first = json.loads(dense.read_text(encoding="utf-8"))[0]
    table(["member", "fewer multiply-adds", "weights left", "loss composed", "loss trained", "BLEU", "of dense BLEU",
           "chrF"],
          [[str(n), f"{args.speedup[n]:g}", f"{own[0]['shrunk_parameters'] / own[0]['parameters']:.0%}",
            *(spread([r[key] for r in own]) for key in ("start", "validation_loss", "bleu")),
            f"{median(r['bleu'] for r in own) / first['bleu']:.1%}", spread([r["chrf"] for r in own])]
           for n in members for own in ([r for r in rows if r["member"] == n],)])
    path.write_text(json.dumps({
        "dense": {key: first[key] for key in ("bleu", "chrf", "validation_loss")}, "shape": args.shape,
        "vocabulary": args.vocabulary, "speedup": args.speedup, "lr": args.lr, "rows": rows,
        "configurations": json.loads(conf.read_text(encoding="utf-8"))}) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
