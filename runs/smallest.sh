#!/usr/bin/env bash
# The smallest pruned model whose validation loss is at most (1 + ALPHA) times the original's.
#
#     runs/smallest.sh MODEL DATA_DIR ALPHA [OUT]
#
# MODEL     a hub name, a folder with a Hugging Face T5 that translates already, or demo
# DATA_DIR  a folder with train.en, train.de, …; multi30k: downloaded; demo
# ALPHA     e.g. 0.02: 2 % above
# OUT       where results go (default out/smallest-ALPHA); a stopped run goes on where it was
# PAIRS     pairs of each training (default: all of the text, once); TRAIN: its other flags.
set -euo pipefail
model=${1:?MODEL DATA_DIR ALPHA [OUT]} alpha=${3:?MODEL DATA_DIR ALPHA [OUT]}
[[ $alpha =~ ^-?[0-9]*\.?[0-9]+$ ]] || { echo "error: ALPHA is a number such as 0.02, not '$alpha'" >&2; exit 2; }
[ -d "$model" ] && model=$(realpath "$model")
[ -d "$2" ] && data=(--data "$(realpath "$2")") || data=(--data "$2")
out=$(realpath -m "${4:-out/smallest-$alpha}")
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
mkdir -p "$out"
train=(--epochs 1 ${PAIRS:+--max-train-sentences "$PAIRS"} ${TRAIN:---dropout 0 --lr 2e-3 --eval-every 80})

make "$out/origin.pth" download_model.py -m "$model" -o "$out/origin.pth"
make "$out/scores.json" evaluate.py -m "$out/origin.pth" --json "$out/scores.json" "${data[@]}"
make "$out/conf.json" config_generator.py -m "$out/origin.pth" -o "$out/conf.json" \
    --attention 0.25 0.5 0.75 1 1 --feed-forward 0.25 0.5 0.75 0.9 1
make "$out/scheme.json" prune_scheme_generator.py -i "$out/conf.json" -o "$out/scheme.json"
make "$out/pruned.npy" prune.py -m "$out/origin.pth" -c "$out/scheme.json" -o "$out/pruned.npy" --criterion obs \
    "${data[@]}"
make "$out/tuned.npy" block-level_finetuning.py -m "$out/origin.pth" -p "$out/pruned.npy" -o "$out/tuned.npy" \
    --stats "$out/block.csv" --overwrite "${data[@]}"
make "$out/small.json" config_generator.py -m "$out/origin.pth" -p "$out/tuned.npy" -o "$out/small.json" \
    --sparsity 0.1 "${data[@]}"
for ((n = 0; ; n++)); do
    aim=$("$python" runs/aim.py "$out" "$alpha") # fails, and ends this, if nothing meets the limit
    [ -z "$aim" ] && break
    make "$out/conf_$n.json" config_generator.py -m "$out/origin.pth" -p "$out/tuned.npy" -o "$out/conf_$n.json" \
        --target-loss "$aim" "${data[@]}"
    make "$out/model_$n.pth" model-level_finetuning.py -m "$out/origin.pth" -p "$out/tuned.npy" -c "$out/conf_$n.json" \
        -o "$out/model_$n.pth" --stats "$out/model_$n.csv" --resume --overwrite \
        "${data[@]}" "${train[@]}"
done
"$python" evaluate.py -m "$out/origin.pth" "$out"/model_*.pth --json "$out/all.json" --plot "$out/quality.png" \
    --overwrite "${data[@]}"
