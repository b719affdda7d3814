#!/usr/bin/env bash
# Lint and tests, offline, one process a core: two to four minutes on two cores.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$python" -m ruff check .
OMP_NUM_THREADS=1 "$python" -m pytest -n auto "$@"
