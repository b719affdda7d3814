#!/usr/bin/env bash
# Wootz's task: out of 500 pruned models find the smallest that is good enough. See docs/exploration.md.
#
#     runs/exploration.sh MODEL [DATA_DIR] [OUT] [flags of benchmarks/exploration.py]
#
# MODEL     a hub name or a folder with a Hugging Face T5 that translates already
# DATA_DIR  a folder with train.en, train.de, … (default multi30k: downloaded)
# OUT       where models go (default out/exploration); a stopped run goes on where it was
# Several hours on two cores; then a quarter of an hour of timing, in which the machine should do nothing else.
set -euo pipefail
model=${1:-t5-small}
[ -d "$model" ] && model=$(cd "$model" && pwd)
data=(--data multi30k)
[ -n "${2:-}" ] && data=(--data "$(realpath -m "$2")")
out=$(realpath -m "${3:-out/exploration}")
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

mkdir -p "$out"
make "$out/origin.pth" download_model.py -m "$model" -o "$out/origin.pth"
explore=(benchmarks/exploration.py --model "$out/origin.pth" "${data[@]}" --out "$out" --results "$out" "${@:4}")
"$python" "${explore[@]}" # what is there is not made again; the file is written part by part
make "$out/exploration_time.json" "${explore[@]}" --time
"$python" benchmarks/exploration_report.py "$out"
