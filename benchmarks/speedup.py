#!/usr/bin/env python3
"""Measure what asking for a speed gives: for each speed-up asked for, the one predicted and the one measured.

Reads a model, a tuned bank, and BANK.latency.json beside it, which config_generator.py --speedup makes; searches as
that does, composes and recalibrates. Measured is the translation of the test set, word for word as the original
translates it, by the shrunk and the original network in turns of a few steps; the median of some rounds. BLEU and
own tokens are of the model's own translations. --json writes the rows.

    python config_generator.py -m origin_model.pth -p finetuned_modules.npy -o fast.json --speedup 1.5 2 3
    python benchmarks/speedup.py -m origin_model.pth -p finetuned_modules.npy --speedup 1.5 2 3 --json speedup.json
"""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli  # noqa: E402

TEST_SET = "test_2016_flickr"


def run(args) -> list[dict]:
    from common import runtime
    from common.pruning import bank, composition, latency, search, timing
    from common.pruning.configurations import required_variants
    from common.t5 import loss, network
    from common.t5 import model as models
    from common.t5.shrink import shrink
    from common.text.batches import VALIDATION_SENTENCES, calibration_text, source_text, validation_text
    from common.text.corpus import read_pairs
    from common.text.translation import score, translate
    from common.tuning.recalibration import recalibrate_composed

    device = runtime.setup("cpu")
    model, opened = models.load(args.model), bank.load(args.bank)
    corpus = cli.corpus(args, model)
    valid = validation_text(corpus, model, sentences=VALIDATION_SENTENCES)
    timed = latency.text_of(corpus, model)
    times = latency.read(args.bank.with_suffix(".latency.json"), {"model": model.identity,
                                                                  "validation text": timed.sha256})
    print(f"measured on: {times.measured_on}")
    found = search.read(args.bank.with_suffix(".sensitivity.json"), opened,
                        {"model": model.identity, "bank": opened.sha256, "validation text": valid.sha256})
    saved, whole = latency.saved(times, model, opened)
    front = search.front(found, saved, whole)
    pairs = read_pairs(corpus, TEST_SET)
    text, calibration = source_text(pairs, model), calibration_text(corpus, model)
    known = timing.translations(model, text, device)
    dense = shrink(model)

    def quality(shrunk) -> dict:
        made = translate(replace(model, network=shrunk), text, device)
        return {"validation_loss": loss.evaluate(loss.TranslationLoss(shrunk), valid, device),
                "bleu": score(made.texts, [target for _, target in pairs], model.target).bleu,
                "tokens": made.tokens, "parameters": network.sparsity(shrunk)[0]}

    rows = [{"asked": 1.0, "predicted": 1.0, "measured": 1.0, "rounds": [], "expected_loss": found.dense}
            | quality(shrink(model))]
    for asked in args.speedup:
        place = front.at_size(whole / asked)
        if place is None:
            print(f"{asked:g}: the bank reaches {whole / front.sizes[-1]:.2f} at most")
            continue
        composed = models.load(args.model)
        configuration = front.configuration(place)
        for key in required_variants(configuration).items():
            composition.install(composed, opened.read(key))
        recalibrate_composed(models.load(args.model), composed, opened, calibration, device)
        small = shrink(composed)
        made = quality(shrink(composed))
        rounds = [sum(d) / sum(s) for s, d in (timing.side_by_side((small, dense), known, model, text, device)
                                               for _ in range(args.rounds))]
        rows.append({"asked": asked, "predicted": float(whole / front.sizes[place]),
                     "measured": statistics.median(rounds), "rounds": rounds,
                     "expected_loss": float(front.losses[place])} | made | {"configuration": configuration})
        print(f"{asked:g}: {rows[-1]['predicted']:.2f}, measured {', '.join(f'{r:.3f}' for r in rounds)}", flush=True)
    return rows


def main(argv=None) -> int:
    p = cli.parser(__doc__)
    cli.add_model(p)
    p.add_argument("-p", "--bank", type=Path, default=Path("finetuned_modules.npy"), metavar="BANK", help="tuned bank")
    p.add_argument("--speedup", type=cli.factor, nargs="+", default=[1.5, 2.0, 3.0], metavar="S", help="asked for")
    p.add_argument("--rounds", type=cli.count, default=5, metavar="N", help="translations of the test set by each")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    cli.add_data(p, limit=False)
    args = p.parse_args(argv)
    rows = run(args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print("\n| asked | predicted | measured | off | expected loss | loss | BLEU | weights | own tokens |\n" + 9 * "|---"
          + "|")
    for r in rows:
        off = r["measured"] / r["asked"] - 1
        print(f"| {r['asked']:g} | {r['predicted']:.2f} | {r['measured']:.2f} | {off:+.0%} | {r['expected_loss']:.3f} "
              f"| {r['validation_loss']:.3f} | {r['bleu']:.1f} | {r['parameters'] / 1e6:.2f} M "
              f"| {r['tokens']:,} |")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
