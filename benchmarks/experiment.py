#!/usr/bin/env python3
"""Measure what composing saves: N pruned models, each fine-tuned on its own, or composed out of one tuned bank.

Drives the stages as a user would. Published arm: l1 masks -> baseline_finetuning.py on the text, as is common. Baseline
arm, a rival that has all but composing: obs masks -> baseline_finetuning.py, distilling from the dense model. Composed
arm: block level once -> model-level_finetuning.py, which recalibrates. Joint arm: as composed, with joint tuning of the
bank between the two. Optimizer, data order, validation text and interval are the same; the learning rate is chosen for
each arm out of one grid on a configuration that is not among the N (the joint arm has the composed one's). Every run
ends when the validation loss is within --target of the dense model's, or after one epoch; baseline and joint arm of the
first seed's uniform configurations are also trained and scored for the whole epoch. Resumable: what is there is not
made again. Writes experiment.json (every run's loss curve), experiment.csv (a row for each configuration and arm) and
the pictures into --results.

    python benchmarks/experiment.py -m origin_model.pth --data multi30k --out out/experiment
"""

import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import stages  # noqa: E402
from common import cli  # noqa: E402

TARGETS = (0.10, 0.05, 0.03, 0.01)  # validation loss above the dense model's, as a fraction
GRID = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)
ARMS = ("published", "baseline", "composed", "joint")
RIVALS = ARMS[:2]
LONG_ARMS = ("baseline", "joint")  # those that are also trained for the whole epoch
JOINT_CONFIGURATIONS = 2  # joint tuning draws so many, the harshest uniform ones
DROPOUT = 0.0  # of all arms; the model's own, 0.1, makes their last steps slow
SETTINGS = ("jobs", "threads", "criterion", "eval_every", "max_train_sentences", "configurations", "target", "lr_grid",
            "joint_sentences")


class Experiment:
    """Where things lie, and how stages are called."""

    def __init__(self, args):
        self.args, self.out = args, args.out
        self.text = ["--data", args.data]
        self.out.mkdir(parents=True, exist_ok=True)

    def stage(self, output: Path, name: str, *arguments, resume: bool = False) -> None:
        """Run a stage unless its output is there."""
        stages.run(output, self.args.threads, name, *arguments, resume=resume)

    def seed(self, folder: Path) -> list[str]:
        """Return the flags of a folder's seed; that of the learning rates has 0."""
        return ["--seed", folder.name.removeprefix("seed") if folder.name != "lr" else "0"]

    def prune(self, folder: Path, *configurations, mixed: int = 0) -> Path:
        """Make configurations, ``mixed`` mixtures of them, scheme and pruned bank in a folder; return the folder."""
        folder.mkdir(exist_ok=True)
        model, uniform, conf, scheme, pruned, l1 = self.args.model, *(
            folder / name for name in ("uniform.json", "conf.json", "scheme.json", "pruned.npy", "l1.npy"))
        self.stage(uniform, "config_generator", "-m", model, "-o", uniform, *configurations)
        every = json.loads(uniform.read_text(encoding="utf-8"))
        draw, few = random.Random(f"mixed/{self.seed(folder)[1]}"), list(every)
        for _ in range(mixed):  # each block takes its rates from one of the uniform ones, an attention's o with it
            chosen = {block: draw.choice(few) for block in dict.fromkeys(name.removesuffix(".o") for name in few[0])}
            every.append({name: chosen[name.removesuffix(".o")][name] for name in few[0]})
        conf.write_text(json.dumps(every), encoding="utf-8")
        self.stage(scheme, "prune_scheme_generator", "-i", conf, "-o", scheme)
        self.stage(pruned, "prune", "-m", model, "-c", scheme, "-o", pruned, "--criterion", self.args.criterion,
                   *self.text)
        self.stage(l1, "prune", "-m", model, "-c", scheme, "-o", l1)
        return folder

    def tune(self, folder: Path) -> None:
        """Tune a folder's bank at block level."""
        output = folder / "tuned.npy"
        self.stage(output, "block-level_finetuning", "-m", self.args.model, "-p", folder / "pruned.npy", "-o", output,
                   "--stats", folder / "block.csv", *self.seed(folder), *self.text)

    def tune_jointly(self, folder: Path) -> None:
        """Tune a folder's bank at block level, then in compositions of its harshest uniform configurations."""
        self.tune(folder)
        harsh, output = folder / "harsh.json", folder / "joint.npy"
        every = json.loads((folder / "uniform.json").read_text(encoding="utf-8"))
        harsh.write_text(json.dumps(every[-JOINT_CONFIGURATIONS:]), encoding="utf-8")
        self.stage(output, "block-level_finetuning", "-m", self.args.model, "-p", folder / "tuned.npy", "-o", output,
                   "--stats", folder / "joint.csv", "--solver", "joint", "-c", harsh, "--epochs", 1,
                   "--max-train-sentences", self.args.joint_sentences, *self.seed(folder), *self.text, resume=True)

    def train(self, folder: Path, arm: str, n: int, lr: float, target: float | None, tag: str = "") -> dict:
        """Train one configuration in one arm; return its curve and what it cost before the first step."""
        output = folder / f"{arm}_{n}{tag}.pth"
        stats, model = output.with_suffix(".csv"), self.args.model
        flags = ["-o", output, "--stats", stats, "--lr", lr, "--epochs", 1, "--eval-every", self.args.eval_every,
                 "--max-train-sentences", self.args.max_train_sentences, "--dropout", DROPOUT, *self.seed(folder),
                 *self.text, *(["--target-loss", target] if target else [])]
        chosen = ["-m", model, "-c", folder / "conf.json", "-n", n]
        if arm in RIVALS:
            name, teacher = ("l1", []) if arm == "published" else ("pruned", ["--teacher", model])
            pruned = folder / f"{name}_{n}.pth"
            self.stage(pruned, "compose_model", *chosen, "-p", folder / f"{name}.npy", "-o", pruned)
            self.stage(output, "baseline_finetuning", "-m", pruned, *teacher, *flags, resume=True)
        else:
            bank = folder / ("tuned.npy" if arm == "composed" else "joint.npy")
            self.stage(output, "model-level_finetuning", *chosen, "-p", bank, "--distillation", *flags, resume=True)
        rows = stages.curve(stats)
        seconds = [sum(r["train_seconds"] for r in rows[1:i + 1]) for i in range(len(rows))]
        return {"arm": arm, "configuration": n, "lr": lr, "setup_seconds": rows[0]["train_seconds"],  # of the sweep
                "steps": [int(r["step"]) for r in rows], "loss": [r["valid_loss"] for r in rows],
                "seconds": [round(s, 3) for s in seconds],
                "validation_seconds": round(sum(r["valid_seconds"] for r in rows), 2)}

    def evaluate(self, scores: Path, models: list[Path]) -> dict[str, dict]:
        """Write scores, return them by file name."""
        self.stage(scores, "evaluate", "-m", *models, "--json", scores, "--overwrite", *self.text)
        keys = ("bleu", "chrf", "validation_loss", "parameters", "zeros")
        return {Path(row["model"]).stem: {k: row[k] for k in keys}
                for row in json.loads(scores.read_text(encoding="utf-8"))}


def spent(path: Path) -> float:
    """Return the training seconds in a statistics file."""
    return round(sum(row["train_seconds"] for row in stages.curve(path)), 2)


def mean_rates(configuration: dict) -> list[float]:
    """Return a configuration's mean rate of attentions and of linear modules."""
    kinds = [[r for name, r in configuration.items() if name.endswith("Attention") == heads] for heads in (True, False)]
    return [round(sum(rates) / max(1, len(rates)), 3) for rates in kinds]


def run(args) -> dict:
    """Run what is not there yet; return everything measured."""
    e = Experiment(args)
    settings, path = {k: getattr(args, k) for k in SETTINGS}, e.out / "settings.json"
    if path.exists() and (other := json.loads(path.read_text(encoding="utf-8"))) != settings:
        raise SystemExit(f"{e.out}: holds runs with {other}; give another --out, or the same flags")
    path.write_text(json.dumps(settings), encoding="utf-8")
    dense = e.evaluate(e.out / "scores.json", [args.model])[args.model.stem]
    limit = dense["validation_loss"] * (1 + args.target)
    lr_folder = e.prune(e.out / "lr", "--attention", 0.375, "--linear", 0.65)
    with ThreadPoolExecutor(args.jobs) as pool:

        def beside(tune, folder, jobs, train) -> list:
            """Tune a bank beside the rivals' trainings, so that both are timed alike; then train the others."""
            bank = pool.submit(tune, folder)
            runs = pool.map(train, [job for job in jobs if job[0] in RIVALS])
            bank.result()
            return [*runs, *pool.map(train, [job for job in jobs if job[0] not in RIVALS])]

        def scored(runs: list[dict], folder: Path, tag: str = "") -> list[dict]:
            """Add each run's scores, those of one arm evaluated together."""
            by_arm = {arm: [folder / f"{arm}_{r['configuration']}{tag}.pth" for r in runs if r["arm"] == arm]
                      for arm in ARMS}
            found = pool.map(lambda item: e.evaluate(folder / f"scores_{item[0]}{tag}.json", item[1]),
                             [item for item in by_arm.items() if item[1]])
            every = {name: row for scores in found for name, row in scores.items()}
            return [r | every[f"{r['arm']}_{r['configuration']}{tag}"] for r in runs]

        grid = beside(e.tune, lr_folder, [(arm, lr) for lr in args.lr_grid for arm in ARMS[:3]],
                      lambda job: e.train(lr_folder, job[0], 0, job[1], None, f"_{job[1]:g}"))
        # The mean over the curve, because sooner is what counts; the start is the same for all.
        lrs = {arm: min((sum(r["loss"]) / len(r["loss"]), r["lr"]) for r in grid if r["arm"] == arm)[1]
               for arm in ARMS[:3]}
        lrs["joint"] = lrs["composed"]
        print("learning rates: " + ", ".join(f"{arm} {lr:g}" for arm, lr in lrs.items()), flush=True)
        result = {"dense": dense, "targets": TARGETS, "grid": grid, "lr": lrs, "seeds": [], "settings": settings}
        uniform = (args.configurations + 1) // 2
        for seed in range(args.seeds):
            folder = e.prune(e.out / f"seed{seed}", "-n", uniform, mixed=args.configurations - uniform)
            runs = scored(beside(e.tune_jointly, folder, [(arm, n) for n in range(args.configurations) for arm in ARMS],
                                 lambda job, f=folder: e.train(f, job[0], job[1], lrs[job[0]], limit)), folder)
            configurations = json.loads((folder / "conf.json").read_text(encoding="utf-8"))
            result["seeds"].append({
                "seed": seed, "runs": runs, "rates": [mean_rates(c) for c in configurations],
                "block_seconds": spent(folder / "block.csv"), "joint_seconds": spent(folder / "joint.csv")})
            print(f"seed {seed}: {len(runs)} runs", flush=True)

        def whole(job) -> dict:
            """Return a run over the whole epoch: that of the first seed, if it did not end before."""
            done = next(r for r in result["seeds"][0]["runs"] if (r["arm"], r["configuration"]) == job)
            return done if min(done["loss"]) > limit else e.train(e.out / "seed0", *job, lrs[job[0]], None, "_long")

        curves = [] if args.targets_only else list(pool.map(whole, [
            (arm, n) for n in range(uniform) for arm in LONG_ARMS]))
        result["curves"] = [r for r in curves if "bleu" in r] + scored([r for r in curves if "bleu" not in r],
                                                                       e.out / "seed0", "_long")
    return result


def main(argv=None) -> int:
    p = cli.parser(__doc__)
    cli.add_model(p)
    cli.add_data(p, limit=False)
    p.add_argument("--out", type=Path, default=Path("out/experiment"), metavar="DIR", help="where models go")
    p.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR", help="where results go")
    p.add_argument("--configurations", type=cli.count, default=16, metavar="N", help="half uniform, half mixed")
    p.add_argument("--seeds", type=cli.count, default=3, metavar="N",
                   help="repetitions: calibration text, mixtures, data order")
    p.add_argument("--criterion", default="obs", metavar="NAME", help="masks of all arms but the published one")
    p.add_argument("--target", type=cli.positive, default=0.10, metavar="X",
                   help="validation loss above the dense model's at which a run ends, as a fraction")
    p.add_argument("--lr-grid", type=cli.positive, nargs="+", default=list(GRID), metavar="X", help="learning rates")
    p.add_argument("--max-train-sentences", type=cli.count, default=16000, metavar="N",
                   help="one epoch over so many pairs is the longest training")
    p.add_argument("--joint-sentences", type=cli.count, default=8000, metavar="N",
                   help="pairs that joint tuning sees once")
    p.add_argument("--targets-only", action="store_true", help="leave out the runs over the whole epoch")
    p.add_argument("--eval-every", type=cli.count, default=10, metavar="STEPS", help="steps between validations")
    p.add_argument("--jobs", type=cli.count, default=2, metavar="N", help="trainings at once")
    p.add_argument("--threads", type=cli.count, default=1, metavar="N", help="CPU threads of each")
    p.add_argument("--report", action="store_true", help="only draw and print what experiment.json holds")
    args = p.parse_args(argv)
    from benchmarks import experiment_report

    path = args.results / "experiment.json"
    if not args.report:
        result = run(args)
        args.results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    experiment_report.report(json.loads(path.read_text(encoding="utf-8")), args.results)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
