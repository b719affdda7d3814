"""Runs stages one after the other in each of the processes that torchrun starts.

    python -m torch.distributed.run --nproc-per-node 2 tests/ranks.py '[["prune", "-m", "origin.pth"], …]'
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import distributed  # noqa: E402
from tests.small import load_stage  # noqa: E402


def main() -> int:
    with distributed.silence():
        for name, *arguments in json.loads(sys.argv[1]):
            if name == "environment":
                os.environ.update(arguments[int(os.environ["RANK"])])
            elif load_stage(name).main(arguments):
                return 1
    distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
