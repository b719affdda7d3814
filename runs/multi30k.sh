#!/usr/bin/env bash
# The whole chain on real Multi30K with a model that translates already.
#
#     runs/multi30k.sh MODEL [DATA_DIR] [OUT]
#
# MODEL     a hub name or a folder with a Hugging Face T5 (default t5-small)
# DATA_DIR  a folder with train.en, train.de, … (default data/multi30k: downloaded if it is not there)
# OUT       where results go (default out/multi30k)
# EPOCHS, LR, ATTENTION, LINEAR: training of both arms and the rates of the configurations.
# CRITERION=obs RECALIBRATE=1 BLOCK="--attention-steps 200 --hidden-sentences 500": better masks for both arms, better
# variants, recalibrated models (default: l1, exact, not).
set -euo pipefail
model=${1:-t5-small}
[ -d "$model" ] && model=$(cd "$model" && pwd)
data_dir=$(realpath -m "${2:-data/multi30k}")
out=$(realpath -m "${3:-out/multi30k}")
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

mkdir -p "$out"
data=(--data-dir "$data_dir")
rates=(--attention ${ATTENTION:-0.25 0.375 0.5} --linear ${LINEAR:-0.5 0.65 0.8})
train=(--epochs "${EPOCHS:-2}" --lr "${LR:-1e-3}" --eval-every 40)
origin=$out/origin.pth
if [ ! -e "$origin" ]; then
    "$python" download_model.py -m "$model" -o "$origin" "${data[@]}"
fi
source runs/chain.sh
