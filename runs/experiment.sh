#!/usr/bin/env bash
# The composability experiment: 16 pruned models, each fine-tuned on its own or composed out of one tuned bank.
#
#     runs/experiment.sh MODEL [DATA_DIR] [OUT] [flags of benchmarks/experiment.py]
#
# MODEL     a hub name or a folder with a Hugging Face T5 that translates already
# DATA_DIR  a folder with train.en, train.de, … (default multi30k: downloaded)
# OUT       where models go (default out/experiment); a stopped run goes on where it was
# Results (JSON, CSV, pictures) replace those in docs/results unless --results FOLDER says otherwise.
set -euo pipefail
model=${1:-t5-small}
[ -d "$model" ] && model=$(cd "$model" && pwd)
data=(--data multi30k)
[ -n "${2:-}" ] && data=(--data "$(realpath -m "$2")")
out=$(realpath -m "${3:-out/experiment}")
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

mkdir -p "$out"
if [ ! -e "$out/origin.pth" ]; then
    "$python" download_model.py -m "$model" -o "$out/origin.pth"
fi
"$python" benchmarks/experiment.py --model "$out/origin.pth" "${data[@]}" --out "$out" "${@:4}"
