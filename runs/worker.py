#!/usr/bin/env python3
"""Compose, recalibrate and evaluate every configuration that no other worker has or had: one of any number of workers.

    python runs/worker.py MODEL BANK CONF DATA FOLDER

Start as many as there are cores or GPUs (runs/array.sbatch, `xargs -P`), and again whenever one has died: each takes
what is neither finished (FOLDER/scores_N.json is there) nor claimed. A claim is a lock on FOLDER/.claim_N.lock that the
kernel drops when its process ends, killed or not. Model and bank are mapped into memory, which workers share. A worker
ends when nothing is left that it could take, with exit code 2 if configurations were refused.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers use the cores, threads would fight for them
sys.path.insert(0, str(Path(__file__).parent.parent))
from common import cli  # noqa: E402
from common.errors import UserError, refuse  # noqa: E402
from common.files.atomic import check_inputs, locked  # noqa: E402
from common.files.jsonfile import read_json, write_json  # noqa: E402


def stage(name: str):
    """Return a stage's ``main``, without what it prints; one process for all saves seconds of imports each time."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def main(*arguments):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            module.main([*map(str, arguments), "--overwrite"])  # what is left of a killed worker

    return main


def check_folder(folder: Path, inputs: dict[str, Path]) -> None:
    """Raise `UserError` if what is finished in a folder was made from other files; they are noted in ``.inputs``."""
    now, note = {}, folder / ".inputs"
    for role, path in inputs.items():
        with open(path, "rb") as file:
            now[role] = hashlib.file_digest(file, "sha256").hexdigest()
    if not note.exists():
        write_json(note, now)
    before = read_json(note)
    other = [role for role in now if not isinstance(before, dict) or before.get(role) != now[role]]
    if other:
        raise UserError(f"{folder}: holds results of other inputs ({', '.join(other)}); name another folder")


@contextlib.contextmanager
def claimed(folder: Path, n: int):
    """Yield whether configuration ``n`` is to be done here; it is this process's alone while the block runs."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / f"claim_{n}"))
        except UserError:
            yield False
        else:
            for left in folder.glob(f".*_{n}.*.tmp"):  # by a worker that was killed while it wrote
                left.unlink()
            yield not (folder / f"scores_{n}.json").exists()


def main() -> int:
    if len(sys.argv) != 6:
        raise UserError("give MODEL BANK CONF DATA FOLDER")
    from common.pruning.configurations import read_configurations

    model, bank, configurations, data, folder = map(Path, sys.argv[1:])
    check_inputs(model, bank, configurations)
    folder.mkdir(parents=True, exist_ok=True)
    check_folder(folder, {"model": model, "bank": bank, "configurations": configurations})
    compose, evaluate, refused = stage("compose_model"), stage("evaluate"), []
    for n in range(len(read_configurations(configurations))):
        composed, scores = folder / f"composed_{n}.pth", folder / f"scores_{n}.json"
        if scores.exists():
            continue
        with claimed(folder, n) as mine:
            if not mine:
                continue
            try:
                compose("-m", model, "-p", bank, "-c", configurations, "-n", n, "-o", composed, "--data", data)
                evaluate("-m", composed, "--json", scores, "--data", data)
            except UserError as error:
                refused.append(f"configuration {n}: {error}")
                continue
            r = json.loads(scores.read_text())[0]
            print(f"{composed}: BLEU {r['bleu']:.1f}, validation loss {r['validation_loss']:.4f}, "
                  f"{r['zeros'] / r['parameters']:.1%} zeros", flush=True)
    refuse(folder, refused)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
