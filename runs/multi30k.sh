#!/usr/bin/env bash
# The whole chain on real Multi30K with a model that translates already.
#
#     runs/multi30k.sh MODEL [DATA_DIR] [OUT]
#
# MODEL     a hub name or a folder with a Hugging Face T5 (default t5-small)
# DATA_DIR  a folder with train.en, train.de, … (default multi30k: downloaded)
# OUT       where results go (default out/multi30k)
# ATTENTION and LINEAR: the rates of the configurations, e.g. ATTENTION="0.25 0.5" LINEAR="0.5 0.8".
set -euo pipefail
model=${1:-t5-small}
[ -d "$model" ] && model=$(cd "$model" && pwd)
data=(--data multi30k)
[ -n "${2:-}" ] && data=(--data "$(realpath -m "$2")")
out=$(realpath -m "${3:-out/multi30k}")
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

mkdir -p "$out"
train=(--epochs 1 --lr 1e-3 --eval-every 40)
origin=$out/origin.pth
if [ ! -e "$origin" ]; then
    "$python" download_model.py -m "$model" -o "$origin"
fi
source runs/chain.sh
