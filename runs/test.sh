#!/usr/bin/env bash
# Lint and tests, offline, in three to four minutes on two cores.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$python" -m ruff check .
"$python" -m pytest "$@"
