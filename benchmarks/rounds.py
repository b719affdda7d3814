"""How programs are measured side by side: in turns, each run in a fresh process, told with median and spread.

Nobody imports torch here: a process that did so would leave its size in the peak memory of those that it starts.
"""

import os
import platform
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path

from common import cli
from common.files.jsonfile import write_json


def fresh(threads: int, function, *arguments):
    """Return what a function returns in a new process that computes with so many threads."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true",
                   "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class Clock:
    """Counts seconds, and those in which a CPU worked for this process: what else runs disturbs them less."""

    def __init__(self):
        self.began = time.perf_counter(), time.process_time()

    def passed(self) -> dict:
        return {"seconds": time.perf_counter() - self.began[0], "cpu_seconds": time.process_time() - self.began[1]}


def peak() -> float:
    """Return the largest resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


class Meter:
    """Time and memory of a training, without its validations."""

    def __init__(self):
        self.start_mb, self.clock, self.apart = peak(), Clock(), []

    def watch(self, valid) -> None:
        """Take from now on the validations on a text (`Batches`) out of the time. Mutates it."""
        fixed = valid.fixed

        def timed(device):
            clock = Clock()
            yield from fixed(device)
            self.apart.append(clock.passed())

        valid.fixed = timed

    def stop(self) -> dict:
        passed = {key: x - sum(one[key] for one in self.apart) for key, x in self.clock.passed().items()}
        return passed | {"start_mb": self.start_mb, "peak_mb": peak()}


def by_turns(rounds: int, tasks: dict) -> dict[str, list[dict]]:
    """Call every task with every round's number, every other round backwards; return what each returned, by round."""
    done = {name: [] for name in tasks}
    for number in range(rounds):
        for name in list(tasks)[::-1 if number % 2 else 1]:
            done[name].append(tasks[name](number))
            print(f"round {number + 1}: {name}: {done[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    return done


def spread(values, digits: int = 2) -> str:
    """Return the median and, in brackets, the least and the largest of some values."""
    low, middle, high = (f"{x:,.{digits}f}" for x in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}–{high})"


def ratios(above: list[dict], below: list[dict], key: str = "seconds") -> list[float]:
    """Return the ratio of two programs in each round."""
    return [a[key] / b[key] for a, b in zip(above, below, strict=True)]


def machine(threads) -> dict:
    """Return and print what Python sees of the machine; also return the versions that matter."""
    found = {}
    for name in ("torch", "transformers", "accelerate", "ctranslate2"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{usable} of {os.cpu_count()} CPUs usable; threads: {threads}")
    return {"cpus": os.cpu_count(), "usable_cpus": usable, "architecture": platform.machine(),
            "system": platform.system(), "python": platform.python_version(), "threads": threads, **found}


def add_measuring(p) -> None:
    """Add --rounds and --json."""
    p.add_argument("--rounds", type=cli.count, default=5, metavar="N", help="times that every program runs")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write every round's figures to FILE")


def finish(args, **content) -> None:
    """Say what the figures are, and write them as JSON if that is wanted."""
    print(f"\nmedian (least–largest), rounds: {args.rounds}")
    if args.json:
        write_json(args.json, content)
        print(f"{args.json}: written")


def table(head: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print()
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
