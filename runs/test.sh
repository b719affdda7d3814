#!/usr/bin/env bash
# Lint and tests, offline, one process a core: two to four minutes on two cores. Ends with the ten slowest tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$python" -m ruff check .
OMP_NUM_THREADS=1 "$python" -m pytest -n auto --durations=10 "$@"
