#!/usr/bin/env python3
"""Kill every stage at random moments, go on, and compare the end with that of a run nobody disturbed.

    python benchmarks/torture.py --json torture.json

Works on a very small T5 in a temporary folder. A run is killed (70 % SIGKILL, 15 % each SIGINT and SIGTERM) after a
random share of its time, every second one at the moment a temporary file appears, when something is being written.
Stages that train (--resume) are resumed and killed again until they finish; then weights, statistics (without
seconds) and best epoch must equal the undisturbed run's, bit for bit. The others start with or without an old output;
after each kill every output must be the old file or the new one, whole, and the stage run again must give the new one.
After SIGINT and SIGTERM the exit code must be 130 and 143. Nothing but hidden temporary files and locks may lie about.
Exit code 1 if anything differs.
"""

import argparse
import contextlib
import csv
import io
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Stages are forked from a process that has imported the libraries but done nothing: a run takes 1 s instead of 4.
FORKS = multiprocessing.get_context("forkserver")
PRELOAD = ["torch", "torchtext.data", "transformers.models.t5.modeling_t5", "tokenizers", "safetensors.torch",
           "huggingface_hub", "sacrebleu", "matplotlib.pyplot", "common.recalibration", "common.distillation",
           "common.metrics", "common.hub"]
SIGNALS = {signal.SIGKILL: 70, signal.SIGINT: 15, signal.SIGTERM: 15}  # percent


@dataclass
class Job:
    """A stage under torture: what it is called with for the new and the old output, and what it writes."""

    name: str
    stage: str
    new: list
    old: list | None  # None: it trains, and is resumed
    outputs: tuple[str, ...]
    overwrite: bool = True
    kills: dict = field(default_factory=lambda: {"SIGKILL": 0, "SIGINT": 0, "SIGTERM": 0})
    runs: int = 0
    finished: int = 0
    problems: list = field(default_factory=list)
    seconds: float = 0.0


def jobs(text: Path, epochs: float) -> list[Job]:
    """Return all stages; ``epochs`` scales how long training takes. File names are relative to the job's folder."""
    data = ["--data-dir", str(text), "--threads", "1"]

    def tuning(n):
        return ["--epochs", str(max(2, round(n * epochs))), "--eval-every", "5", "--batch-tokens", "400", *data]

    whole = ["-o", "out.pth", "--stats", "out.csv"]
    bank = ["-m", "../origin.pth", "-o", "out.npy", "--stats", "out.csv"]
    composed = ["-m", "../origin.pth", "-p", "../tuned.npy", "-c", "../conf.json"]
    tables = "out.npy", "out.csv", "out.variants.csv"
    block = "block-level_finetuning"
    return [
        Job("baseline", "baseline_finetuning", ["-m", "../pruned.pth", *whole, *tuning(14)], None,
            ("out.pth", "out.csv")),
        Job("block level, adamw", block, ["-p", "../pruned.npy", "--solver", "adamw", *bank, *tuning(4)], None, tables),
        Job("block level, joint", block, ["-p", "../tuned.npy", "--solver", "joint", *bank, *tuning(5)], None, tables),
        Job("model level", "model-level_finetuning", [*composed, *whole, *tuning(14)], None, ("out.pth", "out.csv")),
        Job("block level, exact", block, ["-p", "../pruned.npy", *bank, *data],
            ["-p", "../pruned.npy", *bank, *data, "--calibration-sentences", "50"], tables),
        Job("download, folder", "download_model", ["-m", "../hub", "-o", "out.pth"], ["-m", "../hub2", "-o", "out.pth"],
            ("out.pth",)),
        Job("download, tiny", "download_model", ["-m", "tiny", "-o", "out.pth", *data],
            ["-m", "tiny", "-o", "out.pth", "--seed", "1", *data], ("out.pth",)),
        Job("configurations", "config_generator", ["-m", "../origin.pth", "-o", "conf.json", "-n", "9"],
            ["-m", "../origin.pth", "-o", "conf.json", "-n", "2"], ("conf.json",)),
        Job("scheme", "prune_scheme_generator", ["-i", "../many.json", "-o", "scheme.json"],
            ["-i", "../conf.json", "-o", "scheme.json"], ("scheme.json",)),
        Job("prune", "prune", ["-m", "../origin.pth", "-c", "../scheme.json", "-o", "out.npy", "-p", "out.pth"],
            ["-m", "../origin.pth", "-c", "../scheme2.json", "-o", "out.npy", "-p", "out.pth"], ("out.npy", "out.pth")),
        Job("compose", "compose_model", [*composed, "-o", "out.pth"], [*composed, "-n", "1", "-o", "out.pth"],
            ("out.pth",)),
        Job("evaluate", "evaluate", ["-m", "../pruned.pth", "--json", "eval.json", *data],
            ["-m", "../origin.pth", "--json", "eval.json", *data], ("eval.json",)),
        Job("plot", "plot_loss", ["../block.csv", "-o", "loss.png"], ["../block.csv", "-o", "loss.png", "--log"],
            ("loss.png",), overwrite=False),
    ]


def content(path: Path):
    """Return what a file holds, comparable between runs: no seconds, no arguments. Raises if it is not whole."""
    from common import bank, configs, models

    if path.suffix == ".pth":
        loaded = models.load_sealed(path, "a model file")
        assert models.load(path).identity == models._identity(loaded)
        return loaded["identity"]
    if path.suffix == ".npy":
        opened = bank.load(path)
        return [(key, opened.read(key).key, opened.entries[key]["sha256"]) for key in opened.entries]
    if path.suffix == ".csv":
        rows = list(csv.DictReader(path.read_text().splitlines()))
        assert rows and all(None not in row and None not in row.values() for row in rows)
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
    if path.name == "scheme.json":
        return configs.read_scheme(path)[0]
    if path.suffix == ".json":
        return json.loads(path.read_text(), object_pairs_hook=lambda p: {k: v for k, v in p if "seconds" not in k})
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")
    return data


def results(job: Job, folder: Path) -> dict:
    """Return the contents of all outputs, and the best epoch of those that trained."""
    found = {name: content(folder / name) for name in job.outputs}
    if job.old is None:
        found["best epoch"] = min((float(r["valid_loss"]), float(r["epoch"])) for r in found["out.csv"])[1]
    return found


def run_stage(stage: str, arguments: list, folder: Path) -> None:
    """Run a stage as its command line does, in a process of its own."""
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    for stream, target in ((1, os.devnull), (2, ".stderr")):
        os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = [f"{stage}.py", *arguments]
    runpy.run_path(str(ROOT / f"{stage}.py"), run_name="__main__")


def start(job: Job, folder: Path, arguments: list):
    job.runs += 1
    process = FORKS.Process(target=run_stage, args=(job.stage, arguments, folder))
    process.start()
    return process


def ended(process) -> int:
    """Wait for a process; return its exit code, or minus the signal that ended it."""
    process.join(3600)
    return process.exitcode


def writing(folder: Path) -> set[Path]:
    """Return the temporary files of what is being written."""
    return set(folder.rglob(".*.tmp"))


def ready(pid: int) -> bool:
    """Tell whether a stage catches SIGTERM, that is, has begun; its first tenths of a second are Python's own."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught = int(next(line for line in lines if line.startswith("SigCgt")).split()[1], 16)
        return bool(caught >> signal.SIGTERM - 1 & 1)
    return True


def kill(job: Job, folder: Path, arguments: list, times: tuple[float, float], rng) -> bool:
    """Run a stage and kill it at a random moment; tell whether it had finished before."""
    signum = rng.choices(*zip(*SIGNALS.items(), strict=True))[0]
    began, delay, aimed = time.perf_counter(), rng.uniform(*times), rng.randrange(2)
    seen = writing(folder)
    process = start(job, folder, arguments)
    while process.is_alive() and (time.perf_counter() < began + delay or not ready(process.pid)):
        time.sleep(0.005)
    if job.old is None:  # a bank's file is open all the while: wait for the next checkpoint's
        seen |= writing(folder)
    while aimed and process.is_alive() and not (now := writing(folder)) - seen:
        seen = now if job.old is None else seen
        time.sleep(0.0005)
    if aimed:
        time.sleep(rng.uniform(0, 0.01))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signum)
    code = ended(process)
    if code == 0:
        return True
    job.kills[signum.name] += 1
    said = (folder / ".stderr").read_text()
    if code not in (-signum, 128 + signum) or "Traceback" in said:  # a shell shows the first as the second
        job.problems.append(f"exit code {code} after {signum.name}: {said[-300:]}")
    if "--resume" in "".join(said.splitlines()[-1:]) and not list(folder.rglob("checkpoint.pth")):
        job.problems.append(f"{signum.name} promised a checkpoint and left none")
    return False


def finish(job: Job, folder: Path, arguments: list, expected: dict) -> None:
    """Run a stage to its end and compare."""
    code = ended(start(job, folder, arguments))
    if code:
        job.problems.append(f"exit code {code} of a run nobody killed: {(folder / '.stderr').read_text()[-300:]}")
    compare(job, folder, expected)


def compare(job: Job, folder: Path, expected: dict) -> None:
    job.finished += 1
    try:
        found = results(job, folder)
        job.problems += [f"{key} differs" for key in expected if found[key] != expected[key]]
    except Exception as error:
        job.problems.append(f"not whole in the end: {error!r:.300}")


def inspect(job: Job, folder: Path, allowed: list[dict]) -> None:
    """After a kill, look at every file that is not hidden."""
    from common import models

    for path in [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]:
        try:
            if path.name == "checkpoint.pth":
                models.load_sealed(path, "a checkpoint")
                continue
            if path.name not in job.outputs:
                job.problems.append(f"{path.name} was left behind")
                continue
            found, good = content(path), [a[path.name] for a in allowed]
            if job.old is None and path.suffix == ".csv":  # statistics grow with the run
                good = [rows[:len(found)] for rows in good]
            if found not in good:
                job.problems.append(f"{path.name} is neither old nor new after a kill")
        except Exception as error:
            job.problems.append(f"{path.name} is damaged after a kill: {error!r:.300}")


def torture(job: Job, base: Path, kills: int, seed: int) -> Job:
    """Kill a stage until there were ``kills`` kills; fills the job's counts and problems."""
    rng, began = random.Random(f"{job.name}/{seed}"), time.perf_counter()
    folder = base / job.name.replace(" ", "_").replace(",", "")
    reference = {}
    for kind in ("old", "new") if job.old else ("new",):
        folder.mkdir()
        clock = time.perf_counter()
        process = start(job, folder, getattr(job, kind))
        while process.is_alive() and not writing(folder):
            time.sleep(0.005)
        first = time.perf_counter() - clock
        if ended(process):
            raise RuntimeError(f"{job.name}: {(folder / '.stderr').read_text()}")
        full = time.perf_counter() - clock
        reference[kind] = results(job, folder)
        shutil.rmtree(base / f"{folder.name}_{kind}", ignore_errors=True)
        folder.rename(base / f"{folder.name}_{kind}")
    if job.old and reference["old"] == reference["new"]:
        job.problems.append("old and new output cannot be told apart")
    early = 0.0 if job.old else 0.5 * first / full  # most of what a training run does before is to load
    while sum(job.kills.values()) < kills:
        with_old = bool(job.old) and rng.randrange(2)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base / f"{folder.name}_old", folder) if with_old else folder.mkdir()
        arguments = job.new + ["--overwrite"] * (with_old and job.overwrite)
        clock = time.perf_counter()
        over = kill(job, folder, arguments, (early * full, full), rng)
        if over:  # a machine that was busy is not any more: or no kill would ever come in time
            full = min(full, time.perf_counter() - clock)
        while job.old is None and not over and not (folder / job.outputs[0]).exists():
            inspect(job, folder, [reference["new"]])
            over = kill(job, folder, [*job.new, "--resume"], (early * full, full), rng)
        inspect(job, folder, [reference.get("old")] * with_old + [reference["new"]])
        if job.old and not over:
            finish(job, folder, job.new + ["--overwrite"] * job.overwrite, reference["new"])
        else:
            compare(job, folder, reference["new"])
    job.seconds = time.perf_counter() - began
    print(f"{job.name}: an undisturbed run {full:.1f} s, {sum(job.kills.values())} kills in {job.seconds:.0f} s",
          *job.problems, sep="\n  ", flush=True)
    return job


def make(base: Path) -> None:
    """Make what the stages read, by the stages themselves."""
    from tests.conftest import load_stage, save_folder, write_corpus

    write_corpus(base / "text")
    for seed, name in enumerate(("hub", "hub2")):
        if not (base / name).exists():  # its tokenizer is another one every time
            save_folder(base / name, seed=seed)
    data = ["--data-dir", str(base / "text"), "--threads", "1"]
    for command in (
        ["download_model", "-m", "tiny", "-o", "tiny.pth", *data],
        ["download_model", "-m", "hub", "-o", "origin.pth"], ["config_generator", "-m", "origin.pth", "-o", "conf.json",
                                                              "-n", "2"],
        ["config_generator", "-m", "origin.pth", "-o", "many.json", "-n", "5"],
        ["prune_scheme_generator", "-i", "conf.json", "-o", "scheme.json"],
        ["prune_scheme_generator", "-i", "many.json", "-o", "scheme2.json"],
        ["prune", "-m", "origin.pth", "-c", "scheme.json", "-o", "pruned.npy", "-p", "pruned.pth"],
        ["block-level_finetuning", "-m", "origin.pth", "-p", "pruned.npy", "-o", "tuned.npy", "--stats", "block.csv",
         *data],
    ):
        paths = [str(base / a) if a == "hub" or a.endswith((".pth", ".npy", ".json", ".csv")) else a
                 for a in command[1:]]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            load_stage(command[0]).main(paths)


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=50, metavar="N", help="kills of each way of fine-tuning (default: 50)")
    p.add_argument("--other-kills", type=int, default=20, metavar="N", help="kills of each other stage (default: 20)")
    p.add_argument("--stages", nargs="+", metavar="NAME", help="only these rows of the table")
    p.add_argument("--length", type=float, default=1.0, metavar="X", help="times the usual epochs (default: 1)")
    p.add_argument("--jobs", type=int, default=2, metavar="N", help="stages at once (default: 2)")
    p.add_argument("--seed", type=int, default=0, metavar="INT")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    args = p.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
    FORKS.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        make(Path(folder))
        first = FORKS.Process(target=len, args=("",))  # loads the libraries, which shall not count as a stage's time
        first.start()
        ended(first)
        chosen = [j for j in jobs(Path(folder) / "text", args.length) if not args.stages or j.name in args.stages]
        done = list(pool.map(lambda j: torture(j, Path(folder), args.kills if "fine" in j.stage else args.other_kills,
                                               args.seed), chosen))
    print("\n| stage | runs | SIGKILL | SIGINT | SIGTERM | compared | problems |\n|---|---|---|---|---|---|---|")
    for j in done:
        print(f"| {j.name} | {j.runs} | " + " | ".join(map(str, j.kills.values())) + f" | {j.finished} | "
              f"{len(j.problems)} |")
    if args.json:
        rows = [{k: v for k, v in vars(j).items() if k not in ("new", "old", "overwrite")} for j in done]
        args.json.write_text(json.dumps({"seed": args.seed, "length": args.length, "rows": rows}, indent=2) + "\n")
    return 1 if any(j.problems for j in done) else 0


if __name__ == "__main__":
    sys.exit(main())
