#!/usr/bin/env python3
"""Measure the peak memory of every stage on a T5 of t5-small's shape, beside a calculation from shapes alone.

Makes a T5 with random weights (60 million) and runs every stage on it in a process of its own. The calculation is that
of --plan (`common.plan`) where a stage has it. Its terms were read off the code, and completed where this measurement
showed more. What grows with d_ff² is small here and large in T5-3B, so look at that column as an estimate.
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
from common.plan import LIBRARIES  # noqa: E402

HEADS, LINEAR = (0.25, 0.5), (0.1, 0.2)  # rates: two variants of every block
MIB = 1 << 20
# pruned: the share of layers that lose weights, and so have masks, a byte a weight.
Shape = namedtuple("Shape", "d_model d_ff heads width layers vocabulary pruned")
SMALL, T5_3B = Shape(512, 2048, 8, 64, 6, 32_128, 1 / 6), Shape(1024, 16_384, 32, 128, 24, 32_128, 1)
STAGES = {  # in the order in which they make what the next ones read
    "download": ["download_model", "-m", "t5"],
    "configurations": ["config_generator", "--attention", *HEADS, "--linear", *LINEAR],
    "scheme": ["prune_scheme_generator"],
    "prune, l1": ["prune", "-o", "l1.npy"],
    "prune, obs": ["prune", "--criterion", "obs", "--data", "."],
    "block level": ["block-level_finetuning", "--data", "."],
    "compose, recalibrate": ["compose_model", "-p", "finetuned_modules.npy", "-n", 1, "--data", "."],
    "baseline training": ["baseline_finetuning", "--epochs", 1, "--max-train-sentences", 500, "--data", "."],
    "model-level training": ["model-level_finetuning", "-n", 1, "--distillation", "--epochs", 1,
                             "--max-train-sentences", 500, "--data", "."],
    "evaluate": ["evaluate", "-m", "composed_model.pth", "--data", "."]}


def predicted(s: Shape, text: dict, planned: dict) -> dict[str, int]:
    """Return every stage's bytes; ``text`` is of `sizes`, ``planned`` of `plans`. A term says what is held at once."""
    d, f, inner = s.d_model, s.d_ff, s.heads * s.width
    prunable = s.layers * d * (12 * inner + 4 * f)
    w, masks = 4 * (prunable + s.vocabulary * d), int(s.pruned * prunable)
    largest = s.vocabulary * d
    loaded = w + 7 * largest  # with what glibc keeps of the check that weights are finite, 7 bytes a weight
    m, n = max(f, inner), d * max(f, inner)  # width and weights of the widest block
    sweep = 8 * d * sum(text["calibration"]) + 4 * max(text["calibration"]) * (2 * m + d)  # two models' states
    return planned | {
        "download": LIBRARIES + w,
        "compose, recalibrate": LIBRARIES + 2 * w + masks + sweep + 20 * m * m + 90 * n
        + 8 * 2048 * m,  # the solver's copies of a Gram matrix; a batch's inner activations
        "evaluate": LIBRARIES + loaded + masks + 2 * 4 * text["evaluation"] * s.vocabulary}  # logits, their logarithms


def plans(s: Shape) -> dict[str, int]:
    """Return what --plan says of a dense model's pruning, tuning and training, with two variants of the last layers."""
    from common import plan
    from common.pruning.scheme import make_scheme
    from common.t5.header import Header
    from common.t5.modules import prunable
    from common.t5.network import build_network

    network = build_network(configuration(s))
    kinds, c = prunable(network), network.config
    header = Header(c, kinds, {name: c.num_heads if kind == "attention" else c.d_ff for name, kind in kinds.items()
                               if kind != "linear"}, {n: (p.numel(),) * 2 for n, p in network.named_parameters()}, "")
    last = f".block.{s.layers - 1}."
    both = [{name: heads if kinds[name] == "attention" else rate for name in kinds
             if last in name and kinds[name] != "feed-forward"} for heads, rate in zip(HEADS, LINEAR, strict=True)]
    keys = plan.variants_of(make_scheme(both))
    made = {"prune, l1": plan.prune(header, keys, False), "prune, obs": plan.prune(header, keys, True),
            "block level": plan.block_level(header, keys, "exact", 1, None),
            "baseline training": plan.training(header, {}, 1024, 1, None),
            "model-level training": plan.training(header, both[1], 1024, 1, None, header, composes=True)}
    return {stage: planned["memory"] for stage, planned in made.items()}


def sizes(model: Path, data: Path) -> dict:
    """Return the tokens (source, target) of the text for recalibration, and the largest target batch of evaluation."""
    from common.t5.model import load
    from common.text.batches import calibration_text, validation_text
    from common.text.corpus import Corpus

    loaded, corpus = load(model), Corpus(data, "en", "de")
    calibration = [(b["input_ids"].numel(), b["labels"].numel()) for b in calibration_text(corpus, loaded).fixed()]
    return {"calibration": [sum(pair[i] for pair in calibration) for i in (0, 1)],
            "evaluation": max(b["labels"].numel() for b in validation_text(corpus, loaded, 8192).fixed())}


def configuration(s: Shape) -> dict:
    """Return a T5's configuration."""
    return {"vocab_size": s.vocabulary, "d_model": s.d_model, "d_kv": s.width, "d_ff": s.d_ff, "num_layers": s.layers,
            "num_heads": s.heads, "decoder_start_token_id": 0, "model_type": "t5"}


def make(folder: Path, s: Shape, data: Path) -> None:
    """Write a random T5 as a Hugging Face folder, with the demo model's tokenizer, and the beginning of a text."""
    from transformers import T5Config, T5ForConditionalGeneration

    from common.text.corpus import Corpus, read_pairs

    shutil.copytree(ROOT / "data/demo/model", folder / "t5")  # for its tokenizer
    T5ForConditionalGeneration(T5Config(**configuration(s))).save_pretrained(folder / "t5")
    for split, number in (("train", 2000), ("val", 1000), ("test_2016_flickr", 250)):
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
        planned = {s: pool.submit(plans, s).result() for s in (SMALL, T5_3B)}
        os.chdir(ROOT)
    del rows["scheme"], rows["configurations"]  # which read no weights
    for name, row in rows.items():
        row |= {key: predicted(s, text, planned[s])[name] for key, s in (("calculated", SMALL), ("t5_3b", T5_3B))}
        row["ratio"] = round(row["measured"] / row["calculated"], 3)
    write_json(out / "memory.json", {"text": text, "stages": rows})
    print("\n| stage | measured MiB | calculated MiB | ratio | T5-3B, calculated, GiB |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['measured'] / MIB:,.0f} | {row['calculated'] / MIB:,.0f} | {row['ratio']:.2f} | "
              f"{row['t5_3b'] / MIB / 1024:.1f} |")
    return 0 if all(0.8 <= row["ratio"] <= 1.25 for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(cli.run(main))
