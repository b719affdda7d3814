#!/usr/bin/env python3
"""Measure what pruning gives at inference: speed, size and memory of one model, dense and pruned, in every runtime.

The runtimes: this toolkit with the dense network, with the masked one as it is, and with the shrunk one (what
evaluate.py does); transformers' generate, and CTranslate2 in float32 and int8, on the exports of both models. All get
the same sentences in batches of the same size, each of similar source length, and the same limit of new tokens; every
row and round has a fresh process. Two modes:

  -m DENSE PRUNED   two model files translate a test set; BLEU, too
  --shape NAME      random weights of that shape, pruned here at uniform rates, or as a configuration of another model
                    says, stretched to this depth; of as many heads attentions lose the same; every sentence and every
                    translation has 15 tokens

Time runs from the strings to the translated strings, greedily. Prints a table, ratios first; --json writes every round.

    python benchmarks/inference.py -m origin_model.pth composed_model.pth --data multi30k --json inference.json
    python benchmarks/inference.py --shape t5-small --heads 0.5 --units 0.5 --skip-decoder 0.5 --vocabulary 8000
    python benchmarks/inference.py --shape t5-small -c conf.json -n 2 --vocabulary 8000
"""

import random
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import rounds, translators  # noqa: E402
from benchmarks.rounds import by_turns, fresh, ratios, spread, table  # noqa: E402
from benchmarks.translators import Job  # noqa: E402
from common import cli  # noqa: E402

SHAPES = {"t5-small": {"d_model": 512, "d_ff": 2048, "num_heads": 8, "num_layers": 6},
          "t5-base": {"d_model": 768, "d_ff": 3072, "num_heads": 12, "num_layers": 12}}
LENGTH = 15  # tokens of a sentence and of its translation with --shape
VOCABULARY = 32128  # T5's
EXPORTS = ("hf", "float32"), ("ctranslate2", "float32"), ("ctranslate2", "int8")
PROGRAMS = {"dense": ("whole", "dense"), "masked": ("whole", "pruned"), "shrunk": ("shrunk", "pruned")} | {
    f"{name}, {model}": (f"{kind}-{dtype}", model) for name, (kind, dtype) in zip(
        ("transformers", "CTranslate2", "CTranslate2 int8"), EXPORTS, strict=True) for model in ("dense", "pruned")}


def uniform(kinds: dict[str, str], depth: int, heads: float, units: float, skip: float) -> dict[str, float]:
    """Return a configuration with these rates that skips a fraction of the decoder's blocks, spread evenly."""
    from common.pruning import configurations

    skipped = [i for i in range(depth) if int((i + 1) * skip) > int(i * skip)]
    return configurations.uniform(kinds, heads, 0.0, units) | {
        name: 1.0 for name, kind in kinds.items() if kind != "linear" and name.startswith("decoder")
        and int(name.split(".")[2]) in skipped}


def stretched(configuration: dict[str, float], kinds: dict[str, str], depth: int, blocks: int) -> dict[str, float]:
    """Return a configuration of a model of ``blocks`` blocks a stack for one of ``depth``: each block gives its rates
    to those at the same relative depth."""
    found = {}
    for name in kinds:
        parts = name.split(".")
        parts[2] = str(int(parts[2]) * blocks // depth)
        found[name] = configuration.get(".".join(parts), 0.0)
    return {name: rate for name, rate in found.items() if rate or kinds[name] == "attention"}


def make(folder: Path, shape: dict, rates: tuple, vocabulary: int) -> None:
    """Write dense.pth, a T5 with random weights and words for tokens, and pruned.pth.

    The rows of the end token and of padding are 0, and so are their logits. Out of thousands of others one is always
    higher, so no translation ends before its limit.

    Args:
        rates: fractions of heads, units and decoder blocks removed, or a configuration and its number of blocks.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    from common.pruning import composition, scheme, variants
    from common.t5 import model, modules, network
    from common.t5.vocabulary import cut_network

    def tokenizer(size: int) -> str:
        words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, size))]
        made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return made.to_str()

    torch.manual_seed(0)
    config = shape | {"model_type": "t5", "vocab_size": VOCABULARY, "decoder_start_token_id": 0}
    made = model.Model(network.initialize(network.build_network(config)), tokenizer(VOCABULARY))
    kinds = modules.prunable(made.network)
    with torch.no_grad():
        made.network.shared.weight[:2] = 0
        for name in (name for name, kind in kinds.items() if kind == "attention"):
            weight = made.network.get_submodule(name).v.weight  # l1 keeps the larger ones, the same in all
            weight *= torch.arange(shape["num_heads"], 0, -1).repeat_interleave(64)[:, None]
    model.save(folder / "dense.pth", made)
    if vocabulary < VOCABULARY:
        made = model.Model(cut_network(made.network, list(range(vocabulary))), tokenizer(vocabulary))
    chosen = uniform(kinds, shape["num_layers"], *rates) if len(rates) > 2 else \
        stretched(rates[0], kinds, shape["num_layers"], rates[1])
    for variant in variants.prune_scheme(made, scheme.make_scheme([chosen])):
        composition.install(made, variant)
    model.save(folder / "pruned.pth", made)


def sentences(number: int, vocabulary: int) -> list[tuple[str, str]]:
    """Return sentences of `LENGTH` tokens, their end among them, with no translations."""
    drawn = random.Random(0)
    return [(" ".join(f"w{drawn.randrange(3, vocabulary)}" for _ in range(LENGTH - 1)), "") for _ in range(number)]


def size(path: Path) -> float:
    """Return the MB of a file, or of a folder's files."""
    return sum(f.stat().st_size for f in ([path] if path.is_file() else path.iterdir())) / 1e6


def jobs(args, files: dict, folder: Path, prefix: str) -> dict:
    """Return {(threads, batch): {program: job}}."""
    found = {}
    for threads in args.threads:
        for batch in args.batch:
            row = found[threads, batch] = {}
            for name in args.programs:
                program, model = PROGRAMS[name]
                path = files[model] if program in ("whole", "shrunk") else folder / model / program
                row[name] = Job(program.split("-")[0].replace("hf", "transformers"), path, batch, threads=threads,
                                limit=args.max_new_tokens, prefix=prefix)
    return found


def same_runtime(name: str) -> str:
    """Return the program that runs the dense model in a program's runtime."""
    return name.replace("pruned", "dense") if "," in name else "dense"


def main(argv=None) -> int:
    p = cli.parser(__doc__)
    p.add_argument("-m", "--model", type=Path, nargs=2, metavar=("DENSE", "PRUNED"), help="model files")
    cli.add_data(p, limit=False)
    p.add_argument("--test-set", default="test_2016_flickr", metavar="NAME", help="text that is translated")
    p.add_argument("--shape", choices=list(SHAPES), help="instead of -m: a T5 with random weights")
    p.add_argument("--heads", type=cli.rate, default=0.5, metavar="RATE", help="fraction of heads removed")
    p.add_argument("--units", type=cli.rate, default=0.5, metavar="RATE", help="fraction of hidden units removed")
    p.add_argument("--skip-decoder", type=cli.rate, default=0.0, metavar="RATE",
                   help="fraction of decoder blocks left out")
    p.add_argument("-c", "--configurations", type=Path, metavar="FILE", help="configurations of another model, instead")
    p.add_argument("-n", "--number", type=int, default=0, metavar="NTH", help="which of them, counted from 0")
    p.add_argument("--vocabulary", type=cli.count, default=VOCABULARY, metavar="N",
                   help="tokens of the pruned T5 with --shape; the dense one has T5's own number")
    p.add_argument("--sentences", type=cli.count, metavar="N",
                   help="only the first N sentences (default: all; 64 with --shape)")
    p.add_argument("--max-new-tokens", type=cli.count, default=100, metavar="N",
                   help=f"where a translation without an end is cut; {LENGTH} with --shape")
    p.add_argument("--batch", type=cli.count, nargs="+", default=[1, 32, 64], metavar="N", help="sentences a batch")
    p.add_argument("--threads", type=cli.count, nargs="+", default=[1, 2], metavar="N", help="threads of every program")
    p.add_argument("--programs", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS), metavar="NAME",
                   help="only these rows: " + "; ".join(PROGRAMS))
    rounds.add_measuring(p)
    args = p.parse_args(argv)
    if bool(args.model) == bool(args.shape):
        p.error("give either -m or --shape")

    from common.text.corpus import Corpus, read_pairs

    machine = rounds.machine(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {which: folder / f"{which}.pth" for which in ("dense", "pruned")}
        if args.shape:
            args.max_new_tokens = LENGTH
            rates = args.heads, args.units, args.skip_decoder
            if args.configurations:
                from common.pruning.configurations import read_configurations

                every = read_configurations(args.configurations)
                rates = every[args.number], 1 + max(int(name.split(".")[2]) for c in every for name in c)
            fresh(1, make, folder, SHAPES[args.shape], rates, args.vocabulary)
        else:
            files = dict(zip(files, args.model, strict=True))
        needed = {which: [e for e in EXPORTS if ("-".join(e), which) in map(PROGRAMS.get, args.programs)]
                  for which in files}
        about = {which: fresh(1, translators.export, path, folder / which, needed[which])
                 for which, path in files.items()}
        source, target, prefix = about["dense"].values()
        pairs = sentences(args.sentences or 64, args.vocabulary) if args.shape else read_pairs(
            Corpus(args.data, source, target), args.test_set)[:args.sentences]
        rows, references = [], [reference for _, reference in pairs]
        for (threads, batch), row in jobs(args, files, folder, prefix).items():
            print(f"threads {threads}, batches of {batch}", file=sys.stderr)
            done = by_turns(args.rounds, {name: lambda _, job=job: fresh(job.threads, translators.measure, job, pairs)
                                          for name, job in row.items()})
            last = {name: runs[-1] for name, runs in done.items()}
            if args.shape:
                assert all(r["tokens"] == LENGTH * len(pairs) for r in last.values()), "a translation has ended"
            bleu = [None] * len(row) if args.shape else fresh(
                1, translators.scores, [r["texts"] for r in last.values()], references, target)
            for (name, runs), score in zip(done.items(), bleu, strict=True):
                rows.append({"program": name, "threads": threads, "batch": batch, "mb": size(row[name].path),
                             "bleu": score, "tokens": last[name]["tokens"],
                             **{key: [r[key] for r in runs] for key in ("seconds", "cpu_seconds", "peak_mb")},
                             "speed_up": ratios(done["dense"], runs) if "dense" in done else None,
                             "speed_up_in_runtime": ratios(done[same_runtime(name)], runs)
                             if same_runtime(name) in done else None})
    table(["threads", "batch", "program", "times as fast as dense", "as dense in the same runtime", "seconds",
           "CPU seconds", "tokens/s", "MB on disk", "peak MB", "BLEU"],
          [[str(r["threads"]), str(r["batch"]), r["program"],
            *(spread(r[key]) if r[key] else "–" for key in (
                "speed_up", "speed_up_in_runtime", "seconds", "cpu_seconds")),
            f"{r['tokens'] / median(r['seconds']):,.0f}", f"{r['mb']:.1f}", f"{median(r['peak_mb']):,.0f}",
            "–" if r["bleu"] is None else f"{r['bleu']:.2f}"] for r in rows])
    rounds.finish(args, machine=machine, sentences=len(pairs), shape=args.shape and {
        "shape": args.shape, "rates": rates, "vocabulary": args.vocabulary},
        rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
