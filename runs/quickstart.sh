#!/usr/bin/env bash
# The whole chain offline, in two to three minutes on two cores: a small trained T5 is pruned in two ways, and every
# pruned model is fine-tuned composed and the usual way. Results: out/quickstart.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

out=${1:-out/quickstart}
mkdir -p "$out"
data=(--data demo)
train=(--epochs 1 --lr 1e-3 --eval-every 20 --max-train-sentences 4000)
ATTENTION=${ATTENTION:-0.25 0.5} LINEAR=${LINEAR:-0.5 0.8}
origin=$out/origin.pth
if [ ! -e "$origin" ]; then
    "$python" download_model.py -m demo -o "$origin"
fi
source runs/chain.sh
if [ ! -e "$out/export" ]; then
    "$python" export_model.py -m "$out/finetuned_1.pth" -o "$out/export" --format hf
fi
echo "Load it anywhere, with transformers alone:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    model = AutoModelForSeq2SeqLM.from_pretrained('$out/export')
    tokenizer = AutoTokenizer.from_pretrained('$out/export')"
