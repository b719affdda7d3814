#!/usr/bin/env python3
"""Hundreds of configurations: two workers against one, with kills, and a simulation of more.

    python benchmarks/workers.py MODEL BANK CONF DATA OUT [--make]

CONF holds the configurations (--make writes 60 random mixtures of the bank's variants to it first). Each arm works in
the same folder name, so that its files can be compared byte by byte. Writes docs/results/workers.json.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
TIMED = ("seconds", "tokens_per_second")


def mixtures(bank_path: Path, number: int) -> list[dict[str, float]]:
    """Return configurations that take each block's variant at random."""
    from common.pruning import bank
    from common.t5.modules import members

    blocks, draw = {}, random.Random(0)
    for block, rates in bank.load(bank_path).entries:
        blocks.setdefault(block, []).append(rates)
    return [{name: rate for block, rates in blocks.items()
             for name, rate in zip(members(block), draw.choice(rates), strict=True) if rate} for _ in range(number)]


def content(folder: Path) -> dict[str, str]:
    """Return each file's SHA-256, of scores without what is timed."""
    found = {}
    for path in sorted(folder.glob("*.*")):
        data = path.read_bytes()
        if path.suffix == ".json":
            data = json.dumps([{k: v for k, v in row.items() if k not in TIMED} for row in json.loads(data)]).encode()
        if not path.name.startswith("."):
            found[path.name] = hashlib.sha256(data).hexdigest()
    return found


def arm(out: Path, arguments: list[str], workers: int, kills: int = 0) -> dict:
    """Let so many workers work, of which one is killed every now and then and started again."""
    folder = out / "done"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, str(ROOT / "runs" / "worker.py"), *arguments, str(folder)]
    draw, began, lost, before = random.Random(1), time.perf_counter(), 0, os.times()
    alive = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(workers)]
    killed_at = time.perf_counter()
    while any(worker.poll() is None for worker in alive):
        time.sleep(0.05)
        if lost < kills and time.perf_counter() - killed_at > draw.uniform(4, 12):
            victim = draw.randrange(workers)
            alive[victim].kill()
            alive[victim].wait()
            alive[victim] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            lost, killed_at = lost + 1, time.perf_counter()
    seconds, after = time.perf_counter() - began, os.times()
    if any(worker.returncode for worker in alive):
        raise SystemExit("a worker failed")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    ends = sorted(path.stat().st_mtime for path in folder.glob("scores_*.json"))
    print(f"{workers} workers, {lost} kills: {seconds:.1f} s, {cpu:.1f} s of CPU, {len(ends)} done", flush=True)
    return {"workers": workers, "kills": lost, "seconds": seconds, "cpu_seconds": cpu, "content": content(folder),
            "gaps": [b - a for a, b in zip(ends, ends[1:], strict=False)]}


def simulate(each: list[float], start: float, workers: int, configurations: int) -> float:
    """Return the efficiency of workers that take the next configuration whenever they are free."""
    draw = random.Random(0)
    times, free = [draw.choice(each) for _ in range(configurations)], [start] * workers
    for seconds in times:
        i = free.index(min(free))
        free[i] += seconds
    return (start + sum(times)) / (workers * max(free))


def main() -> int:
    arguments, number = [a for a in sys.argv[1:] if a != "--make"], 60
    model, bank, conf, data, out = arguments[:5]
    if "--make" in sys.argv:
        Path(conf).write_text(json.dumps(mixtures(Path(bank), number)))
    files = [model, bank, conf, data]
    one, two, killed = arm(Path(out), files, 1), arm(Path(out), files, 2), arm(Path(out), files, 2, kills=8)
    same = one["content"] == two["content"] == killed["content"]
    each = one["gaps"]
    start = one["seconds"] - sum(each) - sum(each) / len(each)
    result = {
        "byte_identical": same, "files": len(one["content"]), "start_seconds": start,
        "seconds_each": [min(each), sum(each) / len(each), max(each)],
        "efficiency_2": one["seconds"] / (2 * two["seconds"]),
        "efficiency_2_cpu": one["cpu_seconds"] / two["cpu_seconds"],  # other processes do not count in it
        "cpu_seconds_a_kill": (killed["cpu_seconds"] - two["cpu_seconds"]) / killed["kills"],
        "simulated": {f"{workers} workers, {n} configurations": simulate(each, start, workers, n)
                      for workers in (16, 64) for n in (60, 240, 960)}}
    result |= {name: {k: v for k, v in a.items() if k not in ("content", "gaps")}
               for name, a in (("one", one), ("two", two), ("killed", killed))}
    (ROOT / "docs" / "results" / "workers.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
