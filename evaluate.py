#!/usr/bin/env python3
"""Translate the test set and report BLEU, chrF, validation loss, size and sparsity, for one or several models.

Reads model files. Prints a table and some translations; with --json also writes the figures.

    python evaluate.py -m finetuned_model.pth --json scores.json
"""

import sys
import time
from pathlib import Path

from common import cli


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("-m", "--model", type=Path, nargs="+", default=[Path("finetuned_model.pth")], metavar="MODEL",
                   help="model files")
    p.add_argument("--num-beams", type=cli.count, default=1, metavar="N", help="beam search; 1 is greedy")
    p.add_argument("--lowercase", action="store_true",
                   help="score lower-cased, as much of the literature on Multi30K does")
    p.add_argument("--examples", type=cli.index, default=3, metavar="N", help="translations to show")
    p.add_argument("--ancestry", action="store_true",
                   help="print how each file (model, bank, scheme) was made, back to the download, and do nothing else")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to FILE")
    p.add_argument("--batch-tokens", type=cli.count, default=8192, metavar="N",
                   help="tokens a batch, padding included")
    cli.add_overwrite(p)
    cli.add_data(p)
    cli.add_runtime(p)
    return p


def evaluate(path: Path, args, device) -> dict:
    """Return one model's figures."""
    from common import masking, metrics, models, training
    from common.data import Batches, DataOptions, read_pairs

    model = models.load(path)
    options = DataOptions.from_args(args)
    pairs = read_pairs(options, args.test_set)
    models.place(model.network, device)
    test, valid = (Batches(p, model, args.batch_tokens, prefix=args.source_prefix)
                   for p in (pairs, read_pairs(options, "val")))
    loss = training.evaluate(training.TranslationLoss(model.network), valid, device)
    began = time.perf_counter()
    hypotheses = metrics.translate(model, test, device, args.num_beams)
    scores = metrics.score(hypotheses, [target for _, target in pairs], time.perf_counter() - began, args.lowercase)
    parameters, zeros = masking.sparsity(model.network)
    return {"model": str(path), "identity": model.identity, "validation_loss": loss, **vars(scores),
            "parameters": parameters, "zeros": zeros, "bytes": path.stat().st_size,
            "examples": [{"source": s, "reference": t, "translation": h}
                         for (s, t), h in zip(pairs[:args.examples], hypotheses, strict=False)]}


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    cli.check_inputs(*args.model)
    if args.json:
        cli.check_outputs(args.overwrite, args.json)
    from common import files, runtime
    from common.provenance import tell

    if args.ancestry:
        return tell(*args.model)
    device = runtime.setup(args.device, args.seed, args.threads)
    width = max(len(str(path)) for path in args.model)
    print(f"{'model':{width}}  {'BLEU':>5}  {'chrF':>5}  {'val. loss':>9}  {'parameters':>11}  {'zeros':>6}  "
          f"{'MB':>6}  {'seconds':>7}")
    rows = []
    for path in args.model:
        r = evaluate(path, args, device)
        rows.append(r)
        print(f"{r['model']:{width}}  {r['bleu']:5.1f}  {r['chrf']:5.1f}  {r['validation_loss']:9.4f}  "
              f"{r['parameters']:11,}  {r['zeros'] / r['parameters']:6.1%}  {r['bytes'] / 1e6:6.1f}  "
              f"{r['seconds']:7.1f}", flush=True)
    print(f"BLEU: {rows[0]['bleu_signature']}\nchrF: {rows[0]['chrf_signature']}")
    for i, example in enumerate(rows[0]["examples"]):
        print(f"\n{args.source}   {example['source']}\n{args.target}   {example['reference']}")
        for r in rows:
            print(f"  -> {r['examples'][i]['translation']:.120}" + (f"   [{r['model']}]" if len(rows) > 1 else ""))
    if args.json:
        with files.locked(args.json):
            files.write_json(args.json, rows)
        print(f"\n{args.json}: written")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
