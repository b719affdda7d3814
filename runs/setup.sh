# Sourced by the other scripts: goes to the repository's root and makes sure that .venv has what is required; `make`.
# PYTHON chooses the interpreter (3.11 or newer). For a CPU-only PyTorch on Linux, tell pip where it is first, see
# the README.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=requirements-dev.txt
if ! cmp -s <(cat requirements.txt $requirements) .venv/installed.txt; then
    echo "installing into .venv (a few minutes the first time)"
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r $requirements
    cat requirements.txt $requirements > .venv/installed.txt
fi
python=$PWD/.venv/bin/python

make() { # make FILE COMMAND…: run the command unless its output is there
    local file=$1
    shift
    if [ ! -e "$file" ]; then
        echo "== $*"
        "$python" "$@"
    fi
}
