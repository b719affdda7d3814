#!/usr/bin/env python3
"""Measure the peak memory of every stage on a T5 of t5-small's shape, beside a calculation from shapes alone.

Makes a T5 with random weights (60 million) and runs the stages on it, each as a process of its own whose largest
resident memory is what the kernel says. The calculation has nothing of the measurement in it but the libraries' own
memory; what it says of T5-3B is therefore worth as much as its agreement here. To keep the time short only the last
layer of each stack is pruned, two variants a block, the widest one included; peaks do not add up over layers. Writes
memory.json.

    python benchmarks/memory.py --data demo --out docs/results
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import cli  # noqa: E402

HEADS, LINEAR = (0.25, 0.5), (0.1, 0.2)  # rates: two variants of every block
TRAINED = 500  # sentence pairs
IMPORTS = "import torch, transformers.models.t5.modeling_t5, tokenizers, torchtext.data, sacrebleu.metrics"
MIB = 1 << 20


@dataclass
class Shape:
    """A T5's sizes: d_model, d_ff, heads and their width, layers of each stack, vocabulary."""

    d: int
    f: int
    heads: int
    width: int
    layers: int
    vocabulary: int

    @property
    def inner(self) -> int:
        return self.heads * self.width

    @property
    def prunable(self) -> int:
        return self.layers * self.d * (3 * 4 * self.inner + 2 * 2 * self.f)

    @property
    def weights(self) -> int:
        return self.prunable + self.vocabulary * self.d


SMALL = Shape(512, 2048, 8, 64, 6, 32_128)
LAST = f".block.{SMALL.layers - 1}."  # of both stacks: the only layers that are pruned
T5_3B = Shape(1024, 16_384, 32, 128, 24, 32_128)


def predicted(s: Shape, text: dict, pruned: float = 1.0) -> dict[str, int]:
    """Return every stage's bytes beside the libraries'; each line is what is held at once.

    Args:
        text: of `sizes`.
        pruned: share of the layers that lose weights, and so have masks, a byte a weight.
    """
    w, n, m = 4 * s.weights, s.d * max(s.f, s.inner), max(s.f, s.inner)  # n, m: of the widest block
    read = 7 * s.vocabulary * s.d  # is the largest weight finite? |w| and three truth values of it
    gram, block, tokens = 8 * m * m, 2 * text["batch_tokens"], text["calibration"]
    solved = min(2 * n, text["solved_at_once"])

    def streams(*splits):  # the encoder's states are kept for cross-attention; of the present stack, outputs too
        source, target = (sum(text[split][i] for split in splits) for i in (0, 1))
        return 4 * s.d * max(2 * source, source + 2 * target)

    masks = int(pruned * s.prunable)
    working = 4 * block * m  # inputs, inner activations before and after ReLU, one float32 each
    obs = max(5 * gram, 2 * gram + 12 * m * m + 95 * n)  # ridge, its factor, inverse | a solver's copies and vectors
    exact = 2 * gram + 12 * m * m + 70 * solved + 20 * 2 * n  # of both texts | the solver's copies | the variants
    both = [sum(text[split][i] for split in ("calibration", "validation")) for i in (0, 1)]
    kept = sum(round((1 - rate) * s.heads) for rate in HEADS) * s.width  # of both variants, side by side
    steps = 4 * max(both) * (3 * s.d + s.inner + s.heads * text["length"]) + 9 * 4 * 4 * kept * s.d
    sweep = 2 * 4 * s.d * sum(tokens) + 4 * max(tokens) * (2 * m + s.d) + gram + 12 * m * m + 85 * n
    encoder = 4 * (10.5 * s.d + 4 * s.inner + 3.25 * s.f + 3.25 * s.heads * text["length"])
    decoder = 4 * (15.75 * s.d + 8 * s.inner + 3.25 * s.f + 6.5 * s.heads * text["length"])
    stored = s.layers * (text["train"][0] * encoder + text["train"][1] * decoder)
    logits = 4 * s.vocabulary
    return {
        "download": w + read,
        "configurations": w,
        "prune, l1": w + 40 * n,  # the sort's values and places, the variant, what is written of it
        "prune, obs": w + streams("calibration") + max(read, working, obs),
        "block level": w + max(read, streams("calibration", "validation") + max(working, exact, steps)),
        "compose, recalibrate": 2 * w + masks + max(read, sweep + working),
        "baseline training": 4 * w + masks + int(max(w, stored + 3 * text["train"][1] * logits)),
        "evaluate": w + masks + max(read, 2 * text["evaluation"] * logits),  # logits, their logarithms
    }


def sizes(model: Path, data: Path) -> dict:
    """Return what the calculation takes of the text: tokens (source, target) with padding, as the stages batch it."""
    from common.least_squares import SOLVED_AT_ONCE
    from common.t5 import model as models
    from common.text.batches import BATCH_TOKENS, calibration_text, training_text, validation_text
    from common.text.corpus import Corpus

    loaded, corpus = models.load(model), Corpus(data, "en", "de", TRAINED)

    def padded(batches) -> list[tuple[int, int]]:
        return [(b["input_ids"].numel(), b["labels"].numel()) for b in batches.fixed()]

    def total(batches) -> list[int]:
        return [sum(column) for column in zip(*padded(batches), strict=True)]

    calibration, valid = calibration_text(Corpus(data, "en", "de"), loaded), validation_text(corpus, loaded)
    return {"calibration": total(calibration), "validation": total(valid), "batch_tokens": BATCH_TOKENS,
            "train": max(padded(training_text(corpus, loaded)), key=sum),
            "evaluation": max(target for _, target in padded(validation_text(corpus, loaded, 8192))),
            "length": max(b["input_ids"].shape[1] for b in calibration.fixed()), "solved_at_once": SOLVED_AT_ONCE}


def make(folder: Path, s: Shape, data: Path, text: Path, sentences: int) -> None:
    """Write a random T5 as a Hugging Face folder, with the demo model's tokenizer, and the beginning of a text."""
    from transformers import T5Config, T5ForConditionalGeneration

    from common.text.corpus import Corpus, read_pairs

    text.mkdir(exist_ok=True)
    for split, share in (("train", 1), ("val", 4), ("test_2016_flickr", 4)):
        pairs = read_pairs(Corpus(data, "en", "de"), split)[:sentences // share]
        for language, lines in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
            (text / f"{split}.{language}").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    T5ForConditionalGeneration(T5Config(
        vocab_size=s.vocabulary, d_model=s.d, d_kv=s.width, d_ff=s.f, num_layers=s.layers, num_heads=s.heads,
        decoder_start_token_id=0)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "data/demo/model" / name, folder)


def in_child(*command) -> int:
    """Run a command; return the largest resident memory of its process, bytes."""
    child = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE)
    said = child.stderr.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))}\n{said}")
    return usage.ru_maxrss * 1024  # Linux counts KiB


def stages(at: Path, data: Path) -> dict[str, list]:
    """Return every stage's command, in the order in which they make what the next ones read."""
    m, c, text = ["-m", at / "origin.pth"], ["-c", at / "scheme.json"], ["--data", data]
    return {
        "download": ["download_model.py", "-m", at / "t5", "-o", at / "origin.pth"],
        "configurations": ["config_generator.py", *m, "-o", at / "conf.json", "--attention", *HEADS, "--linear",
                           *LINEAR],
        "scheme": ["prune_scheme_generator.py", "-i", at / "conf.json", "-o", at / "scheme.json"],
        "prune, l1": ["prune.py", *m, *c, "-o", at / "l1.npy"],
        "prune, obs": ["prune.py", *m, *c, "-o", at / "obs.npy", "--criterion", "obs", *text],
        "block level": ["block-level_finetuning.py", *m, "-p", at / "obs.npy", "-o", at / "tuned.npy", "--stats",
                        at / "block.csv", *text],
        "compose, recalibrate": ["compose_model.py", *m, "-p", at / "tuned.npy", "-c", at / "conf.json", "-n", 1,
                                 "-o", at / "composed.pth", *text],
        "baseline training": ["baseline_finetuning.py", "-m", at / "composed.pth", "-o", at / "trained.pth", "--stats",
                              at / "trained.csv", "--epochs", 1, "--max-train-sentences", TRAINED, *text],
        "evaluate": ["evaluate.py", "-m", at / "composed.pth", *text],
    }


def main(argv=None) -> int:
    p = cli.parser(__doc__)
    cli.add_data(p, limit=False)
    p.add_argument("--out", type=Path, default=Path("docs/results"), metavar="DIR", help="where memory.json goes")
    p.add_argument("--sentences", type=cli.count, default=1000, metavar="N", help="training pairs, at most 2,000; a "
                   "quarter of them for validation and test")
    p.add_argument("--work", type=Path, metavar="DIR", help="keep models here (default: a temporary folder)")
    args = p.parse_args(argv)
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with tempfile.TemporaryDirectory() as folder:
        at, data, rows = (args.work or Path(folder)).resolve(), (args.work or Path(folder)).resolve() / "text", {}
        at.mkdir(parents=True, exist_ok=True)
        imports = in_child("-c", IMPORTS)
        # What imports torch has a process of its own: a child's peak begins at the size of the one that starts it.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(make, at / "t5", SMALL, args.data.resolve(), data, args.sentences).result()
            for name, command in stages(at, data).items():
                measured = in_child(*command)
                if name == "configurations":
                    conf = json.loads((at / "conf.json").read_text())
                    (at / "conf.json").write_text(json.dumps([{n: r for n, r in c.items() if LAST in n} for c in conf]))
                if name == "download":
                    text = pool.submit(sizes, at / "origin.pth", data).result()
                    calculated, large = predicted(SMALL, text, 1 / SMALL.layers), predicted(T5_3B, text)
                if name in calculated:
                    rows[name] = {"measured": measured, "calculated": imports + calculated[name],
                                  "t5-3b": imports + large[name]}
                    print(f"{name:22}" + "".join(f"{v / MIB:10,.0f}" for v in rows[name].values()), flush=True)
    print(f"\nlibraries {imports / MIB:.0f} MiB; {text}\n\n| stage | measured MiB | calculated MiB | ratio | T5-3B, "
          "calculated, GiB |\n|---|---|---|---|---|")
    for name, row in rows.items():
        measured, calculated, large = row.values()
        print(f"| {name} | {measured / MIB:,.0f} | {calculated / MIB:,.0f} | {measured / calculated:.2f} | "
              f"{large / MIB / 1024:.1f} |")
    (args.out / "memory.json").write_text(json.dumps(
        {"libraries": imports, "text": text, "stages": rows}, indent=2) + "\n", encoding="utf-8")
    return 0 if all(0.8 <= r["measured"] / r["calculated"] <= 1.25 for r in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(cli.run(main))
