#!/usr/bin/env python3
"""Measure how every stage's CPU seconds and peak memory grow: with the model, the rates, configurations, processes.

Makes T5s with random weights, of four sizes up to t5-small's 60 million (all widths grow alike), and runs every stage
on them, each in a process of its own with one thread: 126 variants, 2,000 sentences. CPU seconds are those of the
process and of those that it starts, so that what else runs disturbs little. An exponent is the slope between the two
largest sizes: seconds ~ weights^exponent. At the largest, peak memory stands beside a calculation from shapes alone,
that of --plan (`common.plan`) where a stage has it; its terms were read off the code, and completed where this
measurement showed more. What grows with d_ff² is small here and large in T5-3B and T5-11B: these columns are estimates.

    python benchmarks/scaling.py --data demo --out docs/results
"""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import rounds  # noqa: E402
from common import cli  # noqa: E402
from common.files.jsonfile import write_json  # noqa: E402

HEADS, LINEAR = (0.25, 0.5, 0.75), (0.5, 0.7, 0.8)  # rates: three variants of every block
MIB = 1 << 20
WIDTHS = (64, 128, 256, 512)
Shape = namedtuple("Shape", "d_model d_ff heads width layers vocabulary")
LARGE = {"T5-3B": Shape(1024, 16_384, 32, 128, 24, 32_128), "T5-11B": Shape(1024, 65_536, 128, 128, 24, 32_128)}
DATA = ["--data", "."]
PASS = ["--epochs", 1, "--max-train-sentences", 500, *DATA]
STAGES = {  # in the order in which they make what the next ones read
    "download": ["download_model", "-m", "t5"],
    "configurations": ["config_generator", "--attention", *HEADS, "--linear", *LINEAR],
    "scheme": ["prune_scheme_generator"],
    "prune, l1": ["prune"],
    "prune, obs": ["prune", "-o", "obs.npy", "--criterion", "obs", *DATA],
    "block level": ["block-level_finetuning", *DATA],
    "compose": ["compose_model", "-p", "finetuned_modules.npy", "-n", 1, "--no-recalibration"],
    "compose, recalibrate": ["compose_model", "-p", "finetuned_modules.npy", "-n", 1, "-o", "recalibrated.pth", *DATA],
    "baseline training": ["baseline_finetuning", "-m", "recalibrated.pth", *PASS],
    "model-level training": ["model-level_finetuning", "-n", 1, "--distillation", *PASS],
    "evaluate": ["evaluate", "-m", "recalibrated.pth", *DATA]}


def growing(d: int) -> Shape:
    """Return the shape of width ``d`` that has t5-small's proportions."""
    return Shape(d, 4 * d, 8, d // 8, 6, 251 * d // 4)


def configuration(s: Shape) -> dict:
    """Return a T5's configuration."""
    return {"vocab_size": s.vocabulary, "d_model": s.d_model, "d_kv": s.width, "d_ff": s.d_ff, "num_layers": s.layers,
            "num_heads": s.heads, "decoder_start_token_id": 0, "model_type": "t5"}


def calculated(s: Shape, text: dict) -> dict[str, int]:
    """Return every stage's bytes; ``text`` is of `sizes`. A term says what is held at once."""
    from common.plan import LIBRARIES

    d, f, inner = s.d_model, s.d_ff, s.heads * s.width
    prunable = s.layers * d * (12 * inner + 4 * f)
    w, largest = 4 * (prunable + s.vocabulary * d), s.vocabulary * d
    m, n = max(f, inner), d * max(f, inner)  # width and weights of the widest block
    sweep = 8 * d * sum(text["calibration"]) + 4 * max(text["calibration"]) * (2 * m + d)  # two models' states
    return plans(s) | {
        "download": LIBRARIES + w,
        "compose, recalibrate": LIBRARIES + 2 * w + prunable + sweep + 20 * m * m + 90 * n
        + 8 * 2048 * m,  # masks; the solver's copies of a Gram matrix; a batch's inner activations
        # With what glibc keeps of the check that weights are finite, 7 bytes a weight; logits, their logarithms.
        "evaluate": LIBRARIES + w + 7 * largest + prunable + 2 * 4 * text["evaluation"] * s.vocabulary}


def plans(s: Shape) -> dict[str, int]:
    """Return what --plan says of a dense model's pruning, tuning and training."""
    import torch

    from common import plan
    from common.pruning.scheme import make_scheme
    from common.t5.header import Header
    from common.t5.modules import prunable
    from common.t5.network import build_network

    with torch.device("meta"):
        network = build_network(configuration(s))
    kinds, c = prunable(network), network.config
    header = Header(c, kinds, {name: c.num_heads if kind == "attention" else c.d_ff for name, kind in kinds.items()
                               if kind != "linear"}, {n: (p.numel(),) * 2 for n, p in network.named_parameters()}, "")
    every = [{name: heads if kinds[name] == "attention" else rate for name in kinds if kinds[name] != "feed-forward"}
             for heads, rate in zip(HEADS, LINEAR, strict=True)]
    keys = plan.variants_of(make_scheme(every))
    made = {"prune, l1": plan.prune(header, keys, False), "prune, obs": plan.prune(header, keys, True),
            "block level": plan.block_level(header, keys, "exact", 1, None),
            "baseline training": plan.training(header, every[1], 1024, 1, None),
            "model-level training": plan.training(header, every[1], 1024, 1, None, header, composes=True)}
    return {stage: planned["memory"] for stage, planned in made.items()}


def sizes(model: Path, data: Path) -> dict:
    """Return the model's weights, and tokens: of the text for recalibration (source, target), of evaluation's batch."""
    from common.t5.model import load
    from common.text.batches import calibration_text, validation_text
    from common.text.corpus import Corpus

    loaded, corpus = load(model), Corpus(data, "en", "de")
    calibration = [(b["input_ids"].numel(), b["labels"].numel()) for b in calibration_text(corpus, loaded).fixed()]
    return {"weights": sum(p.numel() for p in loaded.network.parameters()),
            "calibration": [sum(pair[i] for pair in calibration) for i in (0, 1)],
            "evaluation": max(b["labels"].numel() for b in validation_text(corpus, loaded, 8192).fixed())}


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


def measure(stage: str, *arguments, processes: int = 0) -> dict:
    """Run a stage in the present folder, with ``processes`` under torchrun; return seconds and bytes at its peak."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes else []
    command = [sys.executable, *launcher, ROOT / f"{stage}.py", *arguments, *["--overwrite"] * (stage != "evaluate")]
    began = time.perf_counter()
    child = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                             env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"})
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))}\n{said.decode()}")
    return {"cpu": usage.ru_utime + usage.ru_stime, "wall": time.perf_counter() - began,
            "peak": usage.ru_maxrss * 1024}  # Linux counts KiB


def exponent(small: float, large: float, growth: float) -> float:
    """Return e of large / small = growth^e."""
    return math.log(large / small) / math.log(growth)


def models(pool, data: Path) -> list[dict]:
    """Measure every stage on each size of model."""
    result = []
    for d in WIDTHS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            pool.submit(make, Path(folder), growing(d), data).result()
            stages = {}
            for name, (stage, *arguments) in STAGES.items():
                stages[name] = measure(stage, *arguments)
                print(f"width {d}: {name}: {stages[name]['cpu']:.1f} s CPU, {stages[name]['peak'] / MIB:,.0f} MiB",
                      flush=True)
            size = pool.submit(sizes, Path(folder, "origin_model.pth"), Path(folder)).result()
            result.append(size | {"stages": stages})
            os.chdir(ROOT)
    return result


def others(pool, data: Path) -> dict:
    """Measure what grows with rates and configurations at width 128, and with processes at width 256."""
    result = {"rates": {}, "configurations": {}, "processes": {}}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        pool.submit(make, Path(folder), growing(128), data).result()
        measure("download_model", "-m", "t5")
        for n in (1, 2, 4):
            heads, linear = [(i + 1) / 8 for i in range(n)], [0.9 * (i + 1) / n for i in range(n)]
            measure("config_generator", "--attention", *heads, "--linear", *linear)
            result["rates"][n] = {stage: measure(stage, *more) for stage, more in (
                ("prune_scheme_generator", []), ("prune", ["--criterion", "obs", *DATA]),
                ("block-level_finetuning", DATA))}
        uniform, draw = json.loads(Path("conf.json").read_text()), random.Random(0)
        for n in (1, 10, 100, 1000):
            mixed = [{module: draw.choice(uniform)[module] for module in uniform[0]} for _ in range(n)]
            Path("conf.json").write_text(json.dumps(mixed))
            result["configurations"][n] = {stage: measure(stage, *more) for stage, more in (
                ("prune_scheme_generator", []), ("prune", []), ("compose_model", ["-n", n - 1]))}
        os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        pool.submit(make, Path(folder), growing(256), data).result()
        for name in ("download", "configurations", "scheme", "prune, l1", "block level", "compose"):
            stage, *arguments = STAGES[name]
            measure(stage, *arguments)
        for n in (1, 2):
            result["processes"][n] = {stage: measure(stage, *more, processes=n) for stage, more in (
                ("prune", ["-o", "obs.npy", "--criterion", "obs", *DATA]), ("block-level_finetuning", DATA),
                ("baseline_finetuning", ["-m", "composed_model.pth", *PASS]))}
        os.chdir(ROOT)
    return result


def show(found: dict) -> bool:
    """Print the tables; tell whether all calculated peaks are within 25 % of the measured ones."""
    by_size, fine = found["models"], True
    growth = by_size[-1]["weights"] / by_size[-2]["weights"]
    weights = [f"{size['weights'] / 1e6:.1f} M" for size in by_size]
    seconds, memory = [], []
    for name, last in by_size[-1]["stages"].items():
        rows = [size["stages"][name] for size in by_size]
        slopes = [f"{exponent(rows[-2][key], rows[-1][key], growth):.2f}" for key in ("cpu", "peak")]
        seconds.append([name, *(f"{row['cpu']:.1f}" for row in rows), slopes[0]])
        if last["peak"] < 100 * MIB:  # torch is not even imported
            continue
        paper = [found["calculated"][shape].get(name) for shape in ("largest", *LARGE)]
        ratio = last["peak"] / paper[0] if paper[0] else None
        fine &= ratio is None or 0.8 <= ratio <= 1.25
        memory.append([name, *(f"{row['peak'] / MIB:,.0f}" for row in rows), slopes[1],
                       *([f"{paper[0] / MIB:,.0f}", f"{ratio:.2f}", *(f"{p / MIB / 1024:.0f}" for p in paper[1:])]
                         if ratio else [""] * 4)])
    print("\nCPU seconds")
    rounds.table(["stage", *weights, "exponent"], seconds)
    print("\nMiB at the peak; for the largest as calculated, and measured / calculated; GiB of larger ones, calculated")
    rounds.table(["stage", *weights, "exponent", "calculated", "ratio", *LARGE], memory)
    for what, key in (("rates", "cpu"), ("configurations", "cpu"), ("processes", "wall")):
        rows = found["others"][what]
        print(f"\n{'Wall' if key == 'wall' else 'CPU'} seconds by the number of {what}")
        rounds.table(["stage", *map(str, rows)], [[stage, *(f"{row[stage][key]:.1f}" for row in rows.values())]
                                                  for stage in next(iter(rows.values()))])
    return fine


def main(argv=None) -> int:
    p = cli.parser(__doc__)
    cli.add_data(p, limit=False)
    p.add_argument("--out", type=Path, default=Path("docs/results"), metavar="DIR", help="where scaling.json goes")
    args = p.parse_args(argv)
    data, out = args.data.resolve(), args.out.resolve()
    # What imports torch has a process of its own: a child's peak begins at the size of the one that starts it.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = {"models": models(pool, data), "others": others(pool, data)}
        found["calculated"] = {name: pool.submit(calculated, s, found["models"][-1]).result()
                               for name, s in {"largest": growing(WIDTHS[-1]), **LARGE}.items()}
    write_json(out / "scaling.json", found)
    return 0 if show(found) else 1


if __name__ == "__main__":
    sys.exit(cli.run(main))
