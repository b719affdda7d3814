#!/usr/bin/env bash
# The whole chain offline, in about five minutes on two cores: a small T5 learns the built-in corpus, is pruned in
# three ways, and every pruned model is fine-tuned composed and from scratch. Results: out/quickstart.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

out=${1:-out/quickstart}
mkdir -p "$out"
data=(--data demo)
rates=(--attention 0.25 0.375 0.5 --linear 0.5 0.65 0.8)
train=(--epochs 1 --lr 1e-3 --eval-every 10)
origin=$out/origin.pth

if [ ! -e "$out/untrained.pth" ]; then
    "$python" download_model.py -m tiny -o "$out/untrained.pth" "${data[@]}"
fi
if [ ! -e "$origin" ]; then # BLEU about 90 after some 90 seconds
    "$python" baseline_finetuning.py -m "$out/untrained.pth" -o "$origin" --stats "$out/dense.csv" --resume \
        --epochs 10 --lr 4e-3 --schedule linear --warmup 80 --embedding-lr-factor 6 "${data[@]}"
fi
source runs/chain.sh
