# Sourced by quickstart.sh and multi30k.sh: the stages one after the other, from a dense model to the table.
# Expects: python, out (folder), origin (dense .pth), data and train (arrays of flags). A file that is there is not made
# again, so a run that was stopped goes on where it was. ATTENTION and LINEAR are the rates of the configurations.

make "$out/conf.json" config_generator.py -m "$origin" -o "$out/conf.json" \
    --attention ${ATTENTION:-0.25 0.375 0.5} --linear ${LINEAR:-0.5 0.65 0.8}
make "$out/conf_prune.json" prune_scheme_generator.py -i "$out/conf.json" -o "$out/conf_prune.json"
make "$out/pruned_modules.npy" prune.py -m "$origin" -c "$out/conf_prune.json" -o "$out/pruned_modules.npy" \
    --criterion obs "${data[@]}"
make "$out/finetuned_modules.npy" block-level_finetuning.py -m "$origin" -p "$out/pruned_modules.npy" \
    -o "$out/finetuned_modules.npy" --stats "$out/block.csv" --overwrite "${data[@]}"

configurations=$("$python" -c 'import json, sys; print(len(json.load(open(sys.argv[1]))))' "$out/conf.json")
one() { # one N: everything for configuration N
    local n=$1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    local compose=(-m "$origin" -c "$out/conf.json" -n "$n")
    make "$out/pruned_$n.pth" compose_model.py "${compose[@]}" -p "$out/pruned_modules.npy" -o "$out/pruned_$n.pth"
    make "$out/composed_$n.pth" compose_model.py "${compose[@]}" -p "$out/finetuned_modules.npy" \
        -o "$out/composed_$n.pth" "${data[@]}"
    make "$out/finetuned_$n.pth" model-level_finetuning.py "${compose[@]}" -p "$out/finetuned_modules.npy" \
        -o "$out/finetuned_$n.pth" --stats "$out/finetuned_$n.csv" --resume --overwrite "${data[@]}" "${train[@]}"
    make "$out/baseline_$n.pth" baseline_finetuning.py -m "$out/pruned_$n.pth" \
        -o "$out/baseline_$n.pth" --stats "$out/baseline_$n.csv" --resume --overwrite "${data[@]}" "${train[@]}"
    make "$out/loss_$n.png" plot_loss.py "$out/finetuned_$n.csv" "$out/baseline_$n.csv" -x seconds \
        --label composed baseline -o "$out/loss_$n.png"
}

# Two configurations at a time, one thread each: faster than one with two threads, and alike for all arms.
models=("$origin")
for ((n = 0; n < configurations; n += 2)); do
    (one "$n") &
    first=$!
    if ((n + 1 < configurations)); then
        (one "$((n + 1))")
    fi
    wait "$first"
done
for ((n = 0; n < configurations; n++)); do
    models+=("$out/pruned_$n.pth" "$out/composed_$n.pth" "$out/finetuned_$n.pth" "$out/baseline_$n.pth")
done
make "$out/scores.json" evaluate.py -m "${models[@]}" --json "$out/scores.json" --plot "$out/quality.png" \
    --overwrite "${data[@]}"
"$python" runs/summary.py "$out"
