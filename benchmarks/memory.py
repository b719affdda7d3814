#!/usr/bin/env python3
"""Measure the peak memory of every stage on a T5 of t5-small's shape, beside a calculation from shapes alone.

Makes a T5 with random weights (60 million) and runs every stage on it in a process of its own. The calculation needs
shapes and the memory of the imported libraries. Its terms were read off the code, and completed once where this
measurement showed more. What grows with d_ff² is small here and large in T5-3B, so look at that column as an estimate.
To save time only the last layer of each stack is pruned, two variants a block: peaks do not add up over layers.

    python benchmarks/memory.py --data demo --out docs/results
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import cli  # noqa: E402
from common.files.jsonfile import write_json  # noqa: E402

HEADS = 0.25, 0.5  # rates: two variants of every block
MIB = 1 << 20
# pruned: the share of layers that lose weights, and so have masks, a byte a weight.
Shape = namedtuple("Shape", "d_model d_ff heads width layers vocabulary pruned")
SMALL, T5_3B = Shape(512, 2048, 8, 64, 6, 32_128, 1 / 6), Shape(1024, 16_384, 32, 128, 24, 32_128, 1)
STAGES = {  # in the order in which they make what the next ones read
    "download": ["download_model", "-m", "t5"],
    "configurations": ["config_generator", "--attention", *HEADS, "--linear", 0.1, 0.2],
    "scheme": ["prune_scheme_generator"],
    "prune, l1": ["prune", "-o", "l1.npy"],
    "prune, obs": ["prune", "--criterion", "obs", "--data", "."],
    "block level": ["block-level_finetuning", "--data", "."],
    "compose, recalibrate": ["compose_model", "-p", "finetuned_modules.npy", "-n", 1, "--data", "."],
    "baseline training": ["baseline_finetuning", "--epochs", 1, "--max-train-sentences", 500, "--data", "."],
    "evaluate": ["evaluate", "-m", "composed_model.pth", "--data", "."]}


def predicted(s: Shape, text: dict) -> dict[str, int]:
    """Return every stage's bytes beside the libraries'; ``text`` is of `sizes`. A term says what is held at once."""
    d, f, inner, scores = s.d_model, s.d_ff, s.heads * s.width, s.heads * text["length"]
    prunable = s.layers * d * (12 * inner + 4 * f)
    w, masks = 4 * (prunable + s.vocabulary * d), int(s.pruned * prunable)
    largest = s.vocabulary * d
    loaded = w + 7 * largest  # with what glibc keeps of the check that weights are finite, 7 bytes a weight
    m, n = max(f, inner), d * max(f, inner)  # width and weights of the widest block
    gram, solver = 8 * m * m, 12 * m * m  # the solver's two copies of a Gram matrix
    working = 8 * text["batch_tokens"] * m  # of one batch: inner activations before and after ReLU

    def streams(*splits):  # the encoder's states stay for cross-attention; of the present stack outputs, too
        source, target = (sum(text[split][i] for split in splits) for i in (0, 1))
        return 4 * d * max(2 * source, source + 2 * target)

    obs = max(5 * gram, 2 * gram + solver + 120 * n)  # ridge, factor, inverse; or solving, and sorting scores
    exact = 2 * gram + solver + 75 * min(2 * n, text["solved_at_once"]) + 30 * n  # of two texts, of two variants
    kept = sum(round((1 - rate) * inner) for rate in HEADS)  # of both variants, side by side
    tokens = max(text["calibration"][i] + text["validation"][i] for i in (0, 1))
    steps = 4 * tokens * (3 * d + inner + scores) + 9 * 4 * 4 * kept * d
    sweep = 8 * d * sum(text["calibration"]) + 4 * max(text["calibration"]) * (2 * m + d)  # two models' states
    encoder = 10.5 * d + 4 * inner + 3.25 * f + 3.25 * scores  # numbers a token that backward needs
    decoder = 15.75 * d + 8 * inner + 3.25 * f + 6.5 * scores
    source, target = text["train"]
    stored = 4 * int(s.layers * (source * encoder + target * decoder)) + 3 * 4 * target * s.vocabulary
    return {
        "download": loaded + 9 * largest,  # zeros are counted in int64
        "configurations": w,
        "prune, l1": w + 40 * n,  # the sort's values and places, the variant, what is written of it
        "prune, obs": loaded + streams("calibration") + max(working, obs),
        "block level": loaded + streams("calibration", "validation") + max(working, exact, steps),
        "compose, recalibrate": w + loaded + masks + sweep + gram + solver + 90 * n + working,
        "baseline training": 3 * w + loaded + masks + max(w, stored),  # two moments, the best weights; gradients
        "evaluate": loaded + masks + 2 * 4 * text["evaluation"] * s.vocabulary}  # logits and their logarithms


def sizes(model: Path, data: Path) -> dict:
    """Return what the calculation takes of the text: tokens (source, target) with padding, as the stages batch it."""
    from common.least_squares import SOLVED_AT_ONCE
    from common.t5.model import load
    from common.text.batches import BATCH_TOKENS, calibration_text, training_text, validation_text
    from common.text.corpus import Corpus

    loaded, corpus = load(model), Corpus(data, "en", "de")
    calibration, train, valid, large = ([(b["input_ids"].shape, b["labels"].shape) for b in batches.fixed()] for batches
                                        in (calibration_text(corpus, loaded), training_text(corpus, loaded),
                                            validation_text(corpus, loaded), validation_text(corpus, loaded, 8192)))
    totals = {name: [sum(pair[i].numel() for pair in pairs) for i in (0, 1)] for name, pairs in (
        ("calibration", calibration), ("validation", valid))}
    return totals | {"train": max(([x.numel() for x in pair] for pair in train), key=sum), "batch_tokens": BATCH_TOKENS,
                     "evaluation": max(pair[1].numel() for pair in large), "solved_at_once": SOLVED_AT_ONCE,
                     "length": max(shape[1] for pair in calibration for shape in pair)}


def make(folder: Path, s: Shape, data: Path) -> None:
    """Write a random T5 as a Hugging Face folder, with the demo model's tokenizer, and the beginning of a text."""
    from transformers import T5Config, T5ForConditionalGeneration

    from common.text.corpus import Corpus, read_pairs

    shutil.copytree(ROOT / "data/demo/model", folder / "t5")  # for its tokenizer
    T5ForConditionalGeneration(T5Config(
        vocab_size=s.vocabulary, d_model=s.d_model, d_kv=s.width, d_ff=s.d_ff, num_layers=s.layers, num_heads=s.heads,
        decoder_start_token_id=0)).save_pretrained(folder / "t5")
    for split, number in (("train", 1000), ("val", 250), ("test_2016_flickr", 250)):
        pairs = read_pairs(Corpus(data, "en", "de"), split)[:number]
        for language, lines in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")


def peak(*command) -> int:
    """Run a command in the present folder; return the largest resident memory of its process, bytes."""
    child = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed")
    return usage.ru_maxrss * 1024  # Linux counts KiB


def main(argv=None) -> int:
    p = cli.parser(__doc__)
    cli.add_data(p, limit=False)
    p.add_argument("--out", type=Path, default=Path("docs/results"), metavar="DIR", help="where memory.json goes")
    args = p.parse_args(argv)
    data, out, rows = args.data.resolve(), args.out.resolve(), {}
    libraries = peak("-c", "import torch, torchtext.data, sacrebleu.metrics")
    # What imports torch has a process of its own: a child's peak begins at the size of the one that starts it.
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        os.chdir(folder)
        pool.submit(make, Path(folder), SMALL, data).result()
        for name, (stage, *arguments) in STAGES.items():
            rows[name] = {"measured": peak(ROOT / f"{stage}.py", *arguments)}
            print(f"{name}: {rows[name]['measured'] / MIB:,.0f} MiB", flush=True)
            if name == "configurations":
                every, last = json.loads(Path("conf.json").read_text()), f".block.{SMALL.layers - 1}."
                Path("conf.json").write_text(json.dumps([{m: r for m, r in c.items() if last in m} for c in every]))
        text = pool.submit(sizes, Path(folder, "origin_model.pth"), Path(folder)).result()
        os.chdir(ROOT)
    del rows["scheme"]  # reads neither model nor text
    for name, row in rows.items():
        row |= {key: libraries + predicted(s, text)[name] for key, s in (("calculated", SMALL), ("t5_3b", T5_3B))}
        row["ratio"] = round(row["measured"] / row["calculated"], 3)
    write_json(out / "memory.json", {"libraries": libraries, "text": text, "stages": rows})
    print("\n| stage | measured MiB | calculated MiB | ratio | T5-3B, calculated, GiB |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['measured'] / MIB:,.0f} | {row['calculated'] / MIB:,.0f} | {row['ratio']:.2f} | "
              f"{row['t5_3b'] / MIB / 1024:.1f} |")
    return 0 if all(0.8 <= row["ratio"] <= 1.25 for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(cli.run(main))
