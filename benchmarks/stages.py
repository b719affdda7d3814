"""Call stages as a user does, each once: what is there is not made again, so that a stopped benchmark goes on."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(output: Path, threads: int, name: str, *arguments, resume: bool = False) -> None:
    """Run a stage unless its output is there; what it said is kept beside the output.

    Raises:
        SystemExit: the stage failed; with its command and message.
    """
    log = output.with_suffix(output.suffix + ".log")
    if not output.exists() or not log.exists():
        output.unlink(missing_ok=True)
        command = [sys.executable, ROOT / f"{name}.py", *arguments, *["--resume", "--overwrite"] * resume]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr}")
        log.write_text(done.stderr + done.stdout, encoding="utf-8")


def curve(stats: Path) -> list[dict[str, float]]:
    """Return the rows of a statistics file as numbers, without what a row leaves out."""
    with open(stats, newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
