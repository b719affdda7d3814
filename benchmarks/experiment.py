#!/usr/bin/env python3
"""Measure what composing saves: N pruned models, each fine-tuned on its own, or composed out of one tuned bank.

Drives the stages as a user would. Baseline arm: masked model -> baseline_finetuning.py. Composed arm: block level
once -> model-level_finetuning.py --recalibrate. Joint arm: as composed, with joint tuning of the bank between the two.
Same masks, optimizer, data order, validation text and interval; the learning rate is chosen for baseline and composed
arm out of one grid on a configuration that is not among the N (the joint arm has the composed one's). Every run ends
when the validation loss is within --target of the dense model's, or after one epoch; baseline and joint arm of the
first seed's uniform configurations are also trained and scored for the whole epoch. Resumable: what is there is not
made again. Writes experiment.json (every run's loss curve), experiment.csv (a row for each configuration and arm) and
the figures into --results.

    python benchmarks/experiment.py --model origin_model.pth --data-dir data/multi30k --out out/experiment
"""

import argparse
import csv
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TARGETS = (0.10, 0.05, 0.03, 0.01)  # validation loss above the dense model's, as a fraction
GRID = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)
ARMS = ("baseline", "composed", "joint")
LONG_ARMS = ("baseline", "joint")  # those that are also trained for the whole epoch
SETTINGS = ("jobs", "threads", "criterion", "attention_steps", "calibration_sentences", "eval_every",
            "max_train_sentences", "configurations", "target", "dropout", "label_smoothing", "distillation",
            "joint_sentences", "joint_configurations")


class Experiment:
    """Where things lie, and how stages are called."""

    def __init__(self, args):
        self.args, self.out = args, args.out
        self.text = ["--data-dir", str(args.data_dir), "--threads", str(args.threads)]
        self.block = ["--attention-steps", str(args.attention_steps), "--attention-error", "0.15",
                      "--hidden-sentences", "500"]
        self.sweep = ["--recalibrate", "--metric", "loss", "--calibration-sentences", str(args.calibration_sentences)]
        self.out.mkdir(parents=True, exist_ok=True)

    def stage(self, output: Path, name: str, *arguments, resume: bool = False) -> str:
        """Run a stage unless its output is there; return what it said, which is kept beside the output."""
        log = output.with_suffix(output.suffix + ".log")
        if not output.exists() or not log.exists():
            output.unlink(missing_ok=True)
            command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, arguments)]
            command += ["--resume", "--overwrite"] * resume
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
            log.write_text(done.stderr + done.stdout, encoding="utf-8")
        return log.read_text(encoding="utf-8")

    def seed(self, folder: Path) -> list[str]:
        """Return the flags of a folder's seed; that of the learning rates has 0."""
        return ["--seed", folder.name.removeprefix("seed") if folder.name != "lr" else "0"]

    def prune(self, folder: Path, *configurations) -> Path:
        """Make configurations, scheme and pruned bank in a folder; return the folder."""
        folder.mkdir(exist_ok=True)
        model, conf, scheme, pruned = self.args.model, *(folder / n for n in ("conf.json", "scheme.json", "pruned.npy"))
        seed = self.seed(folder)
        self.stage(conf, "config_generator", "-m", model, "-o", conf, *seed, *configurations)
        self.stage(scheme, "prune_scheme_generator", "-i", conf, "-o", scheme)
        self.stage(pruned, "prune", "-m", model, "-c", scheme, "-o", pruned, "--criterion", self.args.criterion,
                   *seed, *self.text)
        return folder

    def tune(self, folder: Path) -> None:
        """Tune a folder's bank at block level."""
        output = folder / "tuned.npy"
        self.stage(output, "block-level_finetuning", "-m", self.args.model, "-p", folder / "pruned.npy", "-o", output,
                   "--stats", folder / "block.csv", *self.seed(folder), *self.text, *self.block)

    def tune_jointly(self, folder: Path) -> None:
        """Tune a folder's bank at block level, then in compositions of its harshest uniform configurations."""
        self.tune(folder)
        harsh, uniform = folder / "harsh.json", (self.args.configurations + 1) // 2
        if not harsh.exists():
            every = json.loads((folder / "conf.json").read_text(encoding="utf-8"))
            harsh.write_text(json.dumps(every[:uniform][-self.args.joint_configurations:]), encoding="utf-8")
        output = folder / "joint.npy"
        self.stage(output, "block-level_finetuning", "-m", self.args.model, "-p", folder / "tuned.npy", "-o", output,
                   "--stats", folder / "joint.csv", "--solver", "joint", "-c", harsh, "--epochs", 1, "--schedule",
                   "linear", "--max-train-sentences", self.args.joint_sentences, *self.seed(folder), *self.text,
                   resume=True)

    def train(self, folder: Path, arm: str, n: int, lr: float, target: float | None, tag: str = "") -> dict:
        """Train one configuration in one arm; return its curve and what it cost before the first step."""
        output = folder / f"{arm}_{n}{tag}.pth"
        stats = output.with_suffix(".csv")
        flags = ["-o", output, "--stats", stats, "--lr", lr, "--epochs", 1, "--eval-every", self.args.eval_every,
                 "--max-train-sentences", self.args.max_train_sentences, "--dropout", self.args.dropout,
                 "--label-smoothing", self.args.label_smoothing, "--distillation", self.args.distillation,
                 *self.seed(folder), *self.text]
        flags += ["--target-loss", target] if target else []
        chosen = ["-m", self.args.model, "-c", folder / "conf.json", "-n", n]
        if arm == "baseline":
            masked = folder / f"masked_{n}.pth"
            self.stage(masked, "compose_model", *chosen, "-p", folder / "pruned.npy", "-o", masked)
            flags += ["--teacher", self.args.model] if self.args.distillation else []
            said = self.stage(output, "baseline_finetuning", "-m", masked, *flags, resume=True)
        else:
            bank = folder / ("tuned.npy" if arm == "composed" else "joint.npy")
            said = self.stage(output, "model-level_finetuning", *chosen, "-p", bank, *self.sweep, *flags, resume=True)
        found = re.search(r"recalibrated on .* in ([\d.]+) s", said)
        with open(stats, newline="") as file:
            rows = [{k: float(row[k]) for k in ("step", "valid_loss", "train_seconds", "valid_seconds")}
                    for row in csv.DictReader(file)]
        return {"arm": arm, "configuration": n, "lr": lr, "setup_seconds": float(found[1]) if found else 0.0,
                "steps": [int(r["step"]) for r in rows], "loss": [r["valid_loss"] for r in rows],
                "seconds": [round(sum(r["train_seconds"] for r in rows[:i + 1]), 3) for i in range(len(rows))],
                "validation_seconds": round(sum(r["valid_seconds"] for r in rows), 2)}

    def evaluate(self, scores: Path, models: list[Path]) -> dict[str, dict]:
        """Write scores, return them by file name."""
        self.stage(scores, "evaluate", "-m", *models, "--json", scores, "--examples", 1, "--overwrite", *self.text)
        keys = ("bleu", "chrf", "validation_loss", "parameters", "zeros")
        return {Path(row["model"]).stem: {k: row[k] for k in keys}
                for row in json.loads(scores.read_text(encoding="utf-8"))}


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
            """Tune a bank beside the baseline's trainings, so that both are timed alike; then train the others."""
            bank = pool.submit(tune, folder)
            runs = pool.map(train, [job for job in jobs if job[0] == "baseline"])
            bank.result()
            return [*runs, *pool.map(train, [job for job in jobs if job[0] != "baseline"])]

        grid = beside(e.tune, lr_folder, [(arm, lr) for lr in GRID for arm in ARMS[:2]],
                      lambda job: e.train(lr_folder, job[0], 0, job[1], None, f"_{job[1]:g}"))
        # The mean over the curve, for sooner is what counts; the start is the same for all.
        lrs = {arm: min((sum(r["loss"]) / len(r["loss"]), r["lr"]) for r in grid if r["arm"] == arm)[1]
               for arm in ARMS[:2]}
        lrs["joint"] = lrs["composed"]
        print("learning rates: " + ", ".join(f"{arm} {lr:g}" for arm, lr in lrs.items()), flush=True)
        result = {"dense": dense, "targets": TARGETS, "grid": grid, "lr": lrs, "seeds": [],
                  "settings": settings}
        uniform = (args.configurations + 1) // 2
        for seed in range(args.seeds):
            folder = e.prune(e.out / f"seed{seed}", "-n", uniform, "--mixed", args.configurations - uniform)
            runs = beside(e.tune_jointly, folder, [(arm, n) for n in range(args.configurations) for arm in ARMS],
                          lambda job, f=folder: e.train(f, job[0], job[1], lrs[job[0]], limit))
            for scores in pool.map(lambda arm, f=folder: e.evaluate(
                    f / f"scores_{arm}.json", [f / f"{arm}_{n}.pth" for n in range(args.configurations)]), ARMS):
                for r in runs:
                    r |= scores.get(f"{r['arm']}_{r['configuration']}", {})
            seconds = {}
            for name in ("block", "joint"):
                with open(folder / f"{name}.csv", newline="") as file:
                    spent = sum(float(row["train_seconds"]) for row in csv.DictReader(file))
                seconds[f"{name}_seconds"] = round(spent, 2)
            configurations = json.loads((folder / "conf.json").read_text(encoding="utf-8"))
            result["seeds"].append({"seed": seed} | seconds | {"runs": runs, "rates": [
                [round(sum(v for k, v in c.items() if k.endswith("Attention") == heads) / max(1, sum(
                    k.endswith("Attention") == heads for k in c)), 3) for heads in (True, False)]
                for c in configurations]})
            print(f"seed {seed}: {len(runs)} runs", flush=True)
        def whole(job) -> dict:
            """Return a run over the whole epoch: that of the first seed, if it did not end before."""
            arm, n = job
            done = next(r for r in result["seeds"][0]["runs"] if (r["arm"], r["configuration"]) == job)
            return done if min(done["loss"]) > limit else e.train(e.out / "seed0", arm, n, lrs[arm], None, "_long")

        curves = [] if args.targets_only else list(pool.map(whole, [
            (arm, n) for n in range(uniform) for arm in LONG_ARMS]))
        trained = {arm: [e.out / "seed0" / f"{arm}_{r['configuration']}_long.pth" for r in curves
                         if r["arm"] == arm and "bleu" not in r] for arm in LONG_ARMS}
        for scores in pool.map(lambda item: e.evaluate(e.out / "seed0" / f"scores_{item[0]}_long.json", item[1]),
                               [item for item in trained.items() if item[1]]):
            for r in curves:
                r |= scores.get(f"{r['arm']}_{r['configuration']}_long", {})
        result["curves"] = curves
    return result


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, default=Path("origin_model.pth"), metavar="MODEL", help="dense model file")
    p.add_argument("--data-dir", type=Path, default=Path("data/multi30k"), metavar="DIR")
    p.add_argument("--out", type=Path, default=Path("out/experiment"), metavar="DIR", help="where models go")
    p.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR", help="where results go")
    p.add_argument("--configurations", type=int, default=16, metavar="N", help="half uniform, half mixed (default: 16)")
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="repetitions, at least 1: calibration text, "
                   "mixtures, data order (default: 3)")
    p.add_argument("--criterion", default="obs", help="masks of both arms (default: obs)")
    p.add_argument("--target", type=float, default=0.10, metavar="X", help="validation loss above the dense model's at "
                   "which a run ends, as a fraction (default: 0.1)")
    p.add_argument("--attention-steps", type=int, default=200, metavar="N", help="of block level (default: 200)")
    p.add_argument("--calibration-sentences", type=int, default=1000, metavar="N", help="of the recalibration "
                   "(default: 1000)")
    p.add_argument("--max-train-sentences", type=int, default=16000, metavar="N", help="one epoch over so many pairs "
                   "is the longest training (default: 16000)")
    p.add_argument("--dropout", type=float, default=0.0, metavar="P", help="of both arms; the model's own, 0.1, makes "
                   "their last steps slow (default: 0)")
    p.add_argument("--label-smoothing", type=float, default=0.0, metavar="P", help="of both arms (default: 0)")
    p.add_argument("--distillation", type=float, default=0.5, metavar="SHARE", help="of all arms' training losses "
                   "(default: 0.5)")
    p.add_argument("--joint-sentences", type=int, default=8000, metavar="N", help="pairs that joint tuning sees once "
                   "(default: 8000)")
    p.add_argument("--joint-configurations", type=int, default=2, metavar="N", help="joint tuning draws the N harshest "
                   "uniform ones (default: 2)")
    p.add_argument("--targets-only", action="store_true", help="leave out the runs over the whole epoch")
    p.add_argument("--eval-every", type=int, default=10, metavar="STEPS")
    p.add_argument("--jobs", type=int, default=2, metavar="N", help="trainings at once (default: 2)")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of each (default: 1)")
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
    sys.exit(main())
