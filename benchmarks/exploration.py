#!/usr/bin/env python3
"""Find the smallest of 500 pruned models that is good enough: Wootz's task (Guan et al., PLDI 2019), on a T5.

The space: configurations in which every attention loses no, a quarter, half or three quarters of its heads, and every
feed-forward of its hidden units, drawn so that sizes are spread evenly. The objective: the smallest whose validation
loss is at most (1 + alpha) times the dense model's. Trainings of all arms are an epoch on the text (distillation leaves
a loss 0.008 higher for 1.5 times the time). Arms:

  published  l1 masks; from the smallest configuration on, each is trained on the text until one meets the objective
  same       obs masks, and a clever searcher: bisecting the list
  ours       a bank tuned once, the loss of each variant alone, and trainings of what the search proposes (`propose`)

Not every configuration of the published arm is trained, but every --every-th, and then all that may succeed and are
smaller than the first success: whose expected loss, by a line through what was trained, lies less than two residual
deviations above the limit. The others count as failures, with a whole epoch. Here only losses are measured, which a
busy machine does not change; --time measures seconds, of all arms by turns, on a machine that does nothing else.
Resumable: what is there is not made again. Afterwards exploration_report.py makes tables and the picture out of
exploration.json.

    python benchmarks/exploration.py -m origin_model.pth --data multi30k --out out/exploration
    python benchmarks/exploration.py -m origin_model.pth --data multi30k --out out/exploration --time
"""

import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Lock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import stages  # noqa: E402
from common import cli  # noqa: E402

RATES = (0.0, 0.25, 0.5, 0.75)
ALPHAS = (-0.01, -0.02, -0.03, 0.05, 0.0, -0.06)
HEADLINES = ALPHAS[:2]  # in every space; the others in the first alone, where these are bisected and in subspaces, too
SUBSPACES = (4, 16, 64, 256)
GRID = {"published": ((2e-3, 0.0), (4e-3, 0.0), (2e-3, None)),  # learning rate, dropout (None: 0.1)
        "same": ((4e-3, 0.0),), "ours": ((2e-3, 0.0),)}
EVERY = 80  # steps between validations
TIMED = (50, 250, 450)  # places in the list of configurations that --time trains, published and ours
TIMED_PAIRS, ROUNDS = 2000, 3


@dataclass
class Candidates:
    """Configurations from small to large: weights kept, predicted loss, and how to get one."""

    sizes: np.ndarray
    predicted: np.ndarray
    configuration: callable


class Exploration:
    """One seed's space and everything that is trained in it."""

    def __init__(self, args, seed: int, pool: ThreadPoolExecutor):
        self.args, self.seed, self.pool = args, seed, pool
        self.folder = args.out / f"seed{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.text, self.model = ["--data", args.data], args.model
        self.rows: dict[tuple, dict] = {}
        self._jobs, self._lock = {}, Lock()
        self.best_of: dict[str, tuple] = {}  # learning rate and dropout of an arm
        self._banks()
        self.configurations = self._draw()

    def stage(self, output: Path, name: str, *arguments, resume: bool = False) -> Path:
        stages.run(output, self.args.threads, name, *arguments, resume=resume)
        return output

    def _banks(self) -> None:
        """Make the banks that do not depend on the seed's draw."""
        conf, scheme = self.folder / "uniform.json", self.folder / "scheme.json"
        rates = [rate for rate in RATES if rate]
        self.stage(conf, "config_generator", "-m", self.model, "-o", conf, "--attention", *rates,
                   "--feed-forward", *rates)
        self.stage(scheme, "prune_scheme_generator", "-i", conf, "-o", scheme)
        self.banks = {name: self.folder / f"{name}.npy" for name in ("l1", "obs", "tuned")}
        for name in ("l1", "obs"):
            self.stage(self.banks[name], "prune", "-m", self.model, "-c", scheme, "-o", self.banks[name],
                       "--criterion", name, *self.text)
        self.stage(self.banks["tuned"], "block-level_finetuning", "-m", self.model, "-p", self.banks["obs"], "-o",
                   self.banks["tuned"], "--stats", self.folder / "block.csv", "--seed", self.seed, *self.text)
        aim = self.folder / "first.json"  # measures the variants' losses, too
        self.stage(aim, "config_generator", "-m", self.model, "-p", self.banks["tuned"], "-o", aim, "--sparsity", 0.3,
                   *self.text)

        from common.files.jsonfile import read_json
        from common.pruning import bank, search
        from common.t5 import model

        opened = bank.load(self.banks["tuned"])
        measured = self.banks["tuned"].with_suffix(".sensitivity.json")
        self.removed, self.present, _ = search.removed_weights(model.load(self.model), opened)
        self.found = search.read(measured, opened, read_json(measured)["of"])

    def _draw(self) -> list[dict]:
        """Return the seed's configurations from small to large, and write them."""
        draw, blocks = random.Random(f"exploration/{self.seed}"), list(dict.fromkeys(key[0] for key in self.removed))
        every, steps = [], len(RATES) - 1
        for _ in range(self.args.configurations):
            share = draw.random()  # how much of this one is removed, on average; else all had nearly the same size
            rates = [RATES[sum(draw.random() < share for _ in range(steps))] for _ in blocks]
            every.append({block: rate for block, rate in zip(blocks, rates, strict=True) if rate} or
                         {blocks[0]: RATES[1]})
        every.sort(key=lambda c: self.kept(c))
        (self.folder / "conf.json").write_text(json.dumps(every), encoding="utf-8")
        return every

    def kept(self, configuration: dict) -> int:
        """Return how many prunable weights a configuration keeps."""
        from common.pruning.configurations import required_variants

        return self.present - sum(self.removed[key] for key in required_variants(configuration).items())

    def predict(self, configuration: dict) -> float:
        """Return the loss that the search predicts for a composed and recalibrated model."""
        from common.pruning import search

        return search.predict(self.found, configuration)

    def train(self, arm: str, configuration: dict | int, **changes) -> dict:
        """Train a configuration, by its place in the list or itself, in an arm; return its curve."""
        place = configuration if isinstance(configuration, int) else None
        chosen = self.configurations[place] if place is not None else configuration
        lr, dropout = self.best_of.get(arm, GRID[arm][0])
        options = {"lr": lr, "dropout": dropout, "epochs": 1} | changes
        tag = f"{arm}_{place}" if place is not None else f"{arm}_{name_of(chosen)}"
        tag += "".join(f"_{key}{value}" for key, value in changes.items())
        output, conf = self.folder / f"{tag}.pth", self.folder / f"{tag}.json"
        conf.write_text(json.dumps([chosen]), encoding="utf-8")
        stats = output.with_suffix(".csv")
        flags = ["-o", output, "--stats", stats, "--lr", options["lr"], "--epochs", options["epochs"], "--eval-every",
                 EVERY, "--seed", self.seed, *self.text]
        if options["dropout"] is not None:
            flags += ["--dropout", options["dropout"]]
        if "pairs" in options:
            flags += ["--max-train-sentences", options["pairs"]]
        if arm == "ours":
            self.stage(output, "model-level_finetuning", "-m", self.model, "-p", self.banks["tuned"], "-c", conf,
                       *flags, resume=True)
        else:
            start = self.folder / f"{tag}_start.pth"
            self.stage(start, "compose_model", "-m", self.model, "-p",
                       self.banks["l1" if arm == "published" else "obs"], "-c", conf, "-o", start)
            self.stage(output, "baseline_finetuning", "-m", start, *flags, resume=True)
        rows = stages.curve(stats)
        return {"arm": arm, "place": place, "kept": self.kept(chosen), "predicted": self.predict(chosen),
                "file": output.name, **options, "steps": [int(r["step"]) for r in rows],
                "loss": [r["valid_loss"] for r in rows],
                "configuration": chosen if place is None else None}

    def known(self, arm: str, places) -> None:
        """Train what is not trained yet: every (arm, place) once, also where several threads want it; wait for all."""
        places = list(places)
        with self._lock:
            for place in places:
                if (arm, place) not in self._jobs:
                    self._jobs[arm, place] = self.pool.submit(self.train, arm, place)
        for place in places:
            self.rows[arm, place] = self._jobs[arm, place].result()

    def best(self, arm: str, place: int) -> float:
        return min(self.rows[arm, place]["loss"])

    def first(self, arm: str, limit: float) -> int | None:
        """Return the first place, from small to large, that is known to meet a limit."""
        return min((place for a, place in list(self.rows) if a == arm and self.best(arm, place) <= limit), default=None)

    def trained(self) -> list[tuple[list[float], float]]:
        """Return (features, loss) of what was trained in the published arm."""
        return [(self.features(place), self.best(arm, place)) for arm, place in list(self.rows) if arm == "published"]

    def features(self, place: int) -> list[float]:
        above = self.predict(self.configurations[place]) - self.found.dense
        return [1.0, above, above ** 2, self.kept(self.configurations[place]) / self.present]

    def hopeful(self, limit: float) -> list[int]:
        """Return the places, from small to large, that the published arm may bring to a limit: see the module."""
        known = self.prior + self.trained()
        x, y = np.array([row[0] for row in known]), np.array([row[1] for row in known])
        line, *_ = np.linalg.lstsq(x, y, rcond=None)
        spread = np.sqrt(((x @ line - y) ** 2).sum() / max(len(y) - x.shape[1], 1))
        expected = np.array([self.features(place) for place in range(len(self.configurations))]) @ line
        return [int(place) for place in np.flatnonzero(expected - 2 * spread <= limit)]

    def walk(self, limit: float) -> dict:
        """Train what may meet a limit and is smaller than the first that does; return its place, and what is left.

        The middle one goes first, since its success saves the trainings of all that are larger. Left is something
        only if --most trainings of the arm are there.
        """
        while True:
            first = self.first("published", limit)
            left = [place for place in self.hopeful(limit) if (first is None or place < first)
                    and ("published", place) not in self.rows]
            if not left or len(self.trained()) >= self.args.most:
                return {"found": first, "left": left}
            self.known("published", left[len(left) // 2:][:self.args.jobs])

    def bisect(self, arm: str, limit: float) -> dict:
        """Find by bisection a configuration that meets a limit while its neighbour does not; return what it visited."""
        low, high, visited = -1, len(self.configurations), []
        while high - low > 1:
            middle = (low + high) // 2
            self.known(arm, [middle])
            visited.append(middle)
            low, high = (low, middle) if self.best(arm, middle) <= limit else (middle, high)
        return {"visited": visited, "found": high if high < len(self.configurations) else None}

    def candidates(self, count: int | None) -> Candidates:
        """Return a subspace's configurations, or with None all combinations of the bank's variants that are best."""
        if count is None:
            from common.pruning import search

            front = search.front(self.found, self.removed, self.present)
            order = np.arange(len(front.sizes))[::-1]
            return Candidates(front.sizes[order], front.losses[order], lambda i: front.configuration(int(order[i])))
        places = members(count, len(self.configurations))
        return Candidates(np.array([self.kept(self.configurations[p]) for p in places]),
                          np.array([self.predict(self.configurations[p]) for p in places]), lambda i: places[i])

    def propose(self, candidates: Candidates, limit: float) -> dict:
        """Run ours: train what is expected to meet the limit, learn from failures (`search.aim`); return all trainings.

        If the candidate with the lowest predicted loss fails, none is expected to do better.
        """
        from common.pruning import search

        runs, dense = [], self.found.dense
        while True:
            most = search.aim(limit, self.dense_loss, [(r["predicted"] - dense, min(r["loss"])) for r in runs])
            good = np.flatnonzero(candidates.predicted <= dense + most)
            i = min(good, key=lambda i: candidates.sizes[i]) if len(good) else int(candidates.predicted.argmin())
            chosen = candidates.configuration(int(i))
            if any(r["chosen"] == chosen for r in runs):
                return {"runs": runs, "found": None}
            runs.append(self.pool.submit(self.train, "ours", chosen).result()
                        | {"chosen": chosen, "aim": most})
            print(f"seed {self.seed}, ours of {len(candidates.sizes)}: limit {limit:.4f}, {runs[-1]}", flush=True)
            if min(runs[-1]["loss"]) <= limit:
                return {"runs": runs, "found": runs[-1]}


def members(count: int, total: int) -> list[int]:
    """Return the places of a subspace of ``count`` of ``total`` configurations, evenly spread."""
    return [round((i + 0.5) * total / count - 0.5) for i in range(count)] if count < total else list(range(total))


def name_of(configuration: dict) -> str:
    """Return a short name of a configuration."""
    from common.files.atomic import digest

    return digest(json.dumps(configuration, sort_keys=True).encode())[:12]


def settings(e: Exploration) -> tuple[list[dict], dict]:
    """Train the middle configuration with every setting of an arm that has several; return that, and the best ones."""
    middle = len(e.configurations) // 2
    jobs = [(arm, *job) for arm, jobs in GRID.items() for job in jobs if len(jobs) > 1]
    rows = list(e.pool.map(lambda job: e.train(job[0], middle, lr=job[1], dropout=job[2]), jobs))
    return rows, {arm: jobs[0] for arm, jobs in GRID.items()} | {
        r["arm"]: (r["lr"], r["dropout"]) for r in sorted(rows, key=lambda r: -min(r["loss"]))}


def find(e: Exploration, alpha: float, found: dict, part: str) -> None:
    """Add what an arm finds for a limit."""
    if part == "published":
        found[part] = e.walk(found["limit"])
    elif part == "ours":
        found[part] = {str(count): e.propose(e.candidates(count), found["limit"])
                       for count in (e.args.configurations, None)}
    elif alpha in HEADLINES and part == "same":
        found[part] = e.bisect(part, found["limit"])
    elif alpha in HEADLINES:
        found["ours"] |= {str(count): e.propose(e.candidates(count), found["limit"]) for count in SUBSPACES}
    found["scores"] = scored(e, found)


def explore(args, path: Path) -> None:
    """Train what is needed and not there yet; write every curve and what each arm found, part by part."""
    dense = stages_scores(args, args.out / "dense.json", [args.model])[0]
    result = {"dense": dense, "alphas": ALPHAS, "seeds": [], "configurations": args.configurations}
    prior = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in range(args.seeds):
            e = Exploration(args, seed, pool)
            e.dense_loss, e.prior = dense["validation_loss"], prior
            if not seed:
                result["grid"], best = settings(e)
                print(f"learning rates and dropout: {best}", flush=True)
            e.best_of = best
            wanted = HEADLINES if seed else ALPHAS
            if not seed:
                e.known("published", range(args.every // 2, args.configurations, args.every))
            e.known("published", [place for place in range(args.configurations)  # by a run that was stopped
                                  if (e.folder / f"published_{place}.pth.log").exists()
                                  and (e.folder / f"published_{place}.pth").exists()])
            alphas = {alpha: {"limit": dense["validation_loss"] * (1 + alpha)} for alpha in wanted}
            result["seeds"].append({"seed": seed, "kept": [e.kept(c) for c in e.configurations], "present": e.present})
            for part in ("ours", "published", *("subspaces", "same") * (not seed)):
                with ThreadPoolExecutor(1 if part == "published" else len(wanted)) as side:
                    list(side.map(lambda item, e=e, part=part: find(e, *item, part), alphas.items()))
                result["seeds"][-1] |= {"alphas": {str(alpha): found for alpha, found in alphas.items()},
                                        "rows": list(e.rows.values())}
                path.write_text(json.dumps(result) + "\n", encoding="utf-8")
                print(f"seed {seed}: {part} done, {path} written", flush=True)
            prior = prior + e.trained()


def stages_scores(args, output: Path, models: list[Path]) -> list[dict]:
    """Return the scores of models on the test set."""
    stages.run(output, args.threads, "evaluate", "-m", *models, "--json", output, "--overwrite", "--data", args.data)
    keys = ("bleu", "chrf", "validation_loss", "shrunk_parameters", "hit_limit")
    return [{key: row[key] for key in keys} for row in json.loads(output.read_text(encoding="utf-8"))]


def scored(e: Exploration, found: dict) -> dict:
    """Return the scores of what each arm found, trained to the end of the epoch."""
    chosen = {f"ours {name}": found["ours"][name]["found"] for name in (str(e.args.configurations), "None")}
    for arm in ("published", "same"):
        place = found.get(arm, {}).get("found")
        chosen[arm] = e.rows[arm, place] if place is not None else None
    result = {}
    for name, row in chosen.items():
        if row is not None:
            path = e.folder / row["file"]
            result[name] = stages_scores(e.args, path.with_suffix(".scores.json"), [path])[0] | {"kept": row["kept"]}
    return result


def timed(args) -> dict:
    """Measure the seconds of what is paid once, and of a step, a validation and the rest of a training, by turns."""
    with ThreadPoolExecutor(1) as pool:
        e = Exploration(args, 0, pool)
    folder, once, trainings = args.out / "time", {}, []
    folder.mkdir(exist_ok=True)
    for old in (*folder.glob("*.*"), *e.folder.glob("*_turn*.*")):  # what is there would take no time
        if old.is_file():
            old.unlink()
    scheme, model = e.folder / "scheme.json", args.model
    for turn in range(ROUNDS):
        pruned, tuned, aim = (folder / f"{turn}_{name}" for name in ("obs.npy", "tuned.npy", "aim.json"))
        for name, output, arguments in (
                ("prune", pruned, ("-m", model, "-c", scheme, "-o", pruned, "--criterion", "obs", *e.text)),
                ("block-level_finetuning", tuned, ("-m", model, "-p", pruned, "-o", tuned, "--stats",
                                                   folder / f"{turn}.csv", *e.text)),
                ("config_generator", aim, ("-m", model, "-p", tuned, "-o", aim, "--target-loss", 2.0, *e.text))):
            began = time.perf_counter()
            e.stage(output, name, *arguments)
            once.setdefault(name, []).append(time.perf_counter() - began)
        for place in TIMED:
            for arm in ("published", "ours"):
                began = time.perf_counter()
                row = e.train(arm, place, pairs=TIMED_PAIRS, turn=turn)
                wall = time.perf_counter() - began
                rows = stages.curve(e.folder / row["file"].replace(".pth", ".csv"))
                trainings.append({
                    "arm": arm, "kept": row["kept"], "setup": rows[0].get("train_seconds", 0.0),
                    "step": sum(r["train_seconds"] for r in rows[1:]) / rows[-1]["step"],
                    "validation": median(r["valid_seconds"] for r in rows),
                    "rest": wall - sum(r["train_seconds"] + r["valid_seconds"] for r in rows)})
            print(f"round {turn}: place {place}", flush=True)
    return {"once": once, "trainings": trainings, "threads": args.threads}


def main(argv=None) -> int:
    p = cli.parser(__doc__)
    cli.add_model(p)
    cli.add_data(p, limit=False)
    p.add_argument("--out", type=Path, default=Path("out/exploration"), metavar="DIR", help="where models go")
    p.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR", help="where JSON goes")
    p.add_argument("--configurations", type=cli.count, default=500, metavar="N", help="size of the space")
    p.add_argument("--seeds", type=cli.count, default=3, metavar="N",
                   help="spaces; all but the first for fewer alphas and without the arm that bisects")
    p.add_argument("--every", type=cli.count, default=25, metavar="N", help="train every n-th of the published arm")
    p.add_argument("--most", type=cli.count, default=100, metavar="N", help="trainings of the published arm of a space")
    p.add_argument("--jobs", type=cli.count, default=2, metavar="N", help="trainings at once")
    p.add_argument("--threads", type=cli.count, default=1, metavar="N", help="CPU threads of each")
    p.add_argument("--time", action="store_true", help="measure seconds instead")
    args = p.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.results / ("exploration_time.json" if args.time else "exploration.json")
    if args.time:
        path.write_text(json.dumps(timed(args)) + "\n", encoding="utf-8")
    else:
        explore(args, path)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
