"""Runs stages one after the other in each of the processes that torchrun starts.

    python -m torch.distributed.run --nproc-per-node 2 tests/ranks.py '[["prune", "-m", "origin.pth"], …]'

An argument "a|b" is a for the first process and b for the second. ["kill", restarts, rank, step] kills a process at the
start of a training step, if it was restarted so often; checkpoints are then written after every step.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import cli, distributed  # noqa: E402
from tests.small import load_stage  # noqa: E402


def kill(restarts: int, rank: int, step: int) -> None:
    from common.training import loop

    loop._CHECKPOINT_SECONDS, loop._CHECKPOINT_SHARE, real = 0, 1e9, loop._Run._step

    def step_or_die(run, *arguments):
        here = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), distributed.rank(), run.state.step
        if here == (restarts, rank, step):
            os.kill(os.getpid(), signal.SIGKILL)
        real(run, *arguments)

    loop._Run._step = step_or_die


def main() -> int:
    for name, *arguments in json.loads(sys.argv[1]):
        if name == "kill":
            kill(*arguments)
        else:
            load_stage(name).main([a.split("|")[distributed.rank() % len(a.split("|"))] for a in arguments])
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
