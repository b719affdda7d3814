#!/usr/bin/env python3
"""Measure how fast a test set is translated: evaluate.py against transformers' generate and CTranslate2.

Reads a model file and parallel text. Four programs translate the test set greedily and with a beam of 4, on one thread,
in turns, each time in a fresh process that has loaded its model and warmed up:

  toolkit                  what evaluate.py does: the shrunk network, sentences of similar length together
  transformers             generate on the model's export, batches of 64 in the text's order, as published evaluators do
  transformers, by length  the same, batches of 64 sentences of similar length
  CTranslate2              float32, the fastest of seven sizes of a batch, sorted by length as it does itself

Time runs from the strings to the translated strings. Prints a table, ratios first; --json writes every round.

    python benchmarks/evaluation.py -m origin_model.pth --data multi30k --json evaluation.json
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import rounds, translators  # noqa: E402
from benchmarks.rounds import by_turns, fresh, ratios, spread, table  # noqa: E402
from benchmarks.translators import Job  # noqa: E402
from common import cli  # noqa: E402

BATCH = 64
OURS, PUBLISHED, SORTED, FASTEST = "toolkit", "transformers", "transformers, by length", "CTranslate2"


def measure(args, beams: int, folder: Path, pairs: list, about: dict) -> list[dict]:
    """Return a row for each program: its rounds, BLEU, and how many translations differ from transformers'."""
    def exported(kind, **options) -> Job:
        return Job(kind, folder / f"{kind}-float32", beams=beams, limit=args.max_new_tokens, prefix=about["prefix"],
                   **options)

    fastest = exported("ctranslate2")
    unit, batch = fresh(1, translators.fastest_batch, fastest, pairs)
    jobs = {OURS: Job("shrunk", args.model, beams=beams, limit=args.max_new_tokens),
            PUBLISHED: exported("transformers", batch=BATCH, by_length=False),
            SORTED: exported("transformers", batch=BATCH),
            FASTEST: replace(fastest, unit=unit, batch=batch)}
    done = by_turns(args.rounds, {name: lambda _, job=job: fresh(1, translators.measure, job, pairs)
                                  for name, job in jobs.items()})
    texts = {name: runs[-1]["texts"] for name, runs in done.items()}
    bleu = fresh(1, translators.scores, list(texts.values()), [target for _, target in pairs], about["target"])
    return [{"program": name, "beams": beams, "batch": f"{batch} {unit}" if name == FASTEST else None, "bleu": score,
             "ratios": ratios(runs, done[FASTEST]), "tokens": runs[-1]["tokens"],
             "differ": sum(a != b for a, b in zip(texts[name], texts[PUBLISHED], strict=True)),
             **{key: [run[key] for run in runs] for key in ("seconds", "cpu_seconds", "peak_mb")}}
            for (name, runs), score in zip(done.items(), bleu, strict=True)]


def main(argv=None) -> int:
    p = cli.parser(__doc__)
    cli.add_model(p)
    cli.add_data(p, limit=False)
    p.add_argument("--test-set", default="test_2016_flickr", metavar="NAME", help="text that is translated")
    p.add_argument("--sentences", type=cli.count, metavar="N", help="only its first N sentences (default: all)")
    p.add_argument("--num-beams", type=cli.count, nargs="+", default=[1, 4], metavar="N", help="1 is greedy")
    p.add_argument("--max-new-tokens", type=cli.count, default=100, metavar="N",
                   help="where a translation without an end is cut, the same for all programs")
    rounds.add_measuring(p)
    args = p.parse_args(argv)

    from common.text.corpus import Corpus, read_pairs

    machine = rounds.machine(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        about = fresh(1, translators.export, args.model, folder, [("hf", "float32"), ("ctranslate2", "float32")])
        (folder / "hf-float32").rename(folder / "transformers-float32")
        pairs = read_pairs(Corpus(args.data, about["source"], about["target"]), args.test_set)[:args.sentences]
        rows = [row for beams in args.num_beams for row in measure(args, beams, folder, pairs, about)]
    table(["beams", "program", "time / CTranslate2's", "seconds", "CPU seconds", "tokens/s", "BLEU",
           "differ from transformers", "peak MB"],
          [[str(r["beams"]), r["program"] + (f", {r['batch']}" if r["batch"] else ""),
            *(spread(r[key]) for key in ("ratios", "seconds", "cpu_seconds")),
            f"{r['tokens'] / median(r['seconds']):,.0f}", f"{r['bleu']:.2f}", f"{r['differ']} of {len(pairs)}",
            f"{median(r['peak_mb']):,.0f}"] for r in rows])
    rounds.finish(args, machine=machine, test_set=args.test_set, sentences=len(pairs), rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
