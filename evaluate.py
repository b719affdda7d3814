#!/usr/bin/env python3
"""Translate the test set and report BLEU, chrF, validation loss, size and speed, for one or several models.

Reads model files. What runs is the network without the heads, units and sub-layers that pruning left empty. Prints a
table and three translations; --json writes the figures, --plot draws BLEU against size.

    python evaluate.py -m finetuned_model.pth --json scores.json
"""

import os
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from common import cli, distributed, plots
from common.files.atomic import check_inputs, digest, outputs

BATCH_TOKENS = 8192  # of the validation text
EXAMPLES = 3


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("-m", "--model", type=Path, nargs="+", default=[Path("finetuned_model.pth")], metavar="MODEL",
                   help="model files; with --ancestry also banks, schemes and configurations")
    p.add_argument("--test-set", default="test_2016_flickr", metavar="NAME",
                   help="text that is translated: the files NAME.en and NAME.de, or the model's other languages")
    p.add_argument("--num-beams", type=cli.count, default=1, metavar="N", help="beam search; 1 is greedy")
    p.add_argument("--lowercase", action="store_true",
                   help="score lower-cased, as much of the literature on Multi30K does")
    p.add_argument("--ancestry", action="store_true",
                   help="print how each file was made, back to the download, and do nothing else")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to FILE")
    p.add_argument("--plot", type=Path, metavar="FILE",
                   help="draw BLEU against the number of weights (.png, .pdf or .svg); models whose file names differ "
                        "only in a number are joined by a line")
    p.add_argument("--overwrite", action="store_true", help="replace outputs that exist (else an error)")
    cli.add_data(p, limit=False)
    cli.add_device(p)
    return p


def tell(path: Path) -> None:
    """Print the ancestry of a model file, a bank, a scheme or configurations.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    from common.files.jsonfile import read_json
    from common.files.provenance import ancestry
    from common.pruning import bank, configurations, scheme
    from common.t5 import model

    if path.suffix == ".json" and isinstance(read_json(path), list):
        count = len(configurations.read_configurations(path))
        sha, lines = digest(path.read_bytes()), f"  {count} configurations, free to be edited"
    else:
        if path.suffix == ".json":
            read, origin = scheme.read_scheme(path)
            sha = scheme.scheme_digest(read)
        elif path.suffix == ".npy":
            opened = bank.load(path)
            sha, origin = opened.sha256, opened.provenance
        else:
            opened = model.load(path)
            sha, origin = opened.identity, opened.provenance
        lines = ancestry(origin, "  ")
    print(f"{path} (sha256 {sha})\n{lines}")


def evaluate(path: Path, args, device) -> dict:
    """Return one model's figures."""
    from common.t5 import loss, model, network
    from common.t5.shrink import shrink
    from common.text.batches import source_text, validation_text
    from common.text.corpus import read_pairs
    from common.text.translation import LIMIT_RULE, score, translate

    loaded = model.load(path)
    corpus = cli.corpus(args, loaded)
    pairs = read_pairs(corpus, args.test_set)
    small = shrink(loaded).to(device)
    checked = validation_text(corpus, loaded, BATCH_TOKENS)
    text = source_text(pairs, loaded, args.num_beams)
    distributed.check_same({"model": loaded.identity, "validation text": checked.sha256,
                            "test set": digest("\n".join(map("\t".join, pairs)))})
    valid = loss.evaluate(loss.TranslationLoss(small), checked, device)
    made = translate(replace(loaded, network=small), text, device, args.num_beams)
    scores = score(made.texts, [target for _, target in pairs], loaded.target, args.lowercase)
    parameters, zeros = network.sparsity(loaded.network)
    name = os.fsencode(path).decode(errors="replace")  # Python decodes arguments as the terminal's encoding says
    return {"model": name, "identity": loaded.identity, "source": loaded.source, "target": loaded.target,
            "test_set": args.test_set, "num_beams": args.num_beams,
            "max_new_tokens": LIMIT_RULE, "hit_limit": made.hit_limit,
            "validation_loss": valid, **vars(scores), "seconds": made.seconds,
            "tokens_per_second": made.tokens / made.seconds, "parameters": parameters, "zeros": zeros,
            "shrunk_parameters": network.sparsity(small)[0], "masked": bool(loaded.masks),
            "bytes": path.stat().st_size,
            "examples": [{"source": s, "reference": t, "translation": h}
                         for (s, t), h in zip(pairs[:EXAMPLES], made.texts, strict=False)]}


def show_examples(rows: list[dict]) -> None:
    """Print the first sentences and what each model makes of them; models of other languages have other sentences."""
    for source, target in dict.fromkeys((r["source"], r["target"]) for r in rows):
        same = [r for r in rows if (r["source"], r["target"]) == (source, target)]
        for i, example in enumerate(same[0]["examples"]):
            print(f"\n{source}   {example['source']}\n{target}   {example['reference']}")
            for r in same:
                print(f"  -> {r['examples'][i]['translation']:.120}" + (f"   [{r['model']}]" if len(rows) > 1 else ""))


def arms(names: list[str]) -> list[str]:
    """Return each file's arm: names that differ only in one number share theirs, the name without that number."""
    names = [str(Path(name).with_suffix("")) for name in names]
    cut = [[f"{name[:m.start()]}\0{name[m.end():]}" for m in re.finditer(r"\d+(\.\d+)?", name)][::-1]
           for name in names]
    count = Counter(key for keys in cut for key in keys)
    found = [max(keys, key=count.get, default=name) for name, keys in zip(names, cut, strict=True)]
    found = [key if count[key] > 1 else name for key, name in zip(found, names, strict=True)]
    clean = {key: re.sub(r"[-_. ]*\0", "", key) or "model" for key in found}
    short = {key: Path(name).name for key, name in clean.items()}
    return [short[k] if list(short.values()).count(short[k]) == 1 else clean[k] for k in found]


def draw(path: Path, rows: list[dict]) -> None:
    """Draw BLEU against the weights that are not zero: one line an arm, a star and a dotted line for what is dense."""
    points = {}
    for arm, r in zip(arms([r["model"] for r in rows]), rows, strict=True):
        dense = not r["masked"] and r["zeros"] < 0.01 * r["parameters"]  # a trained weight may be zero by chance
        points.setdefault((dense, arm), []).append(((r["parameters"] - r["zeros"]) / 1e6, r["bleu"]))
    with plots.picture(path) as axes:
        lines, names = [], []
        for i, ((dense, arm), xy) in enumerate(sorted(points.items(), key=lambda item: not item[0][0])):
            style = {"marker": "*", "markersize": 13} if dense else {"marker": "osD^vPX"[i % 7]}
            joined = "-" if len(xy) > 1 and not dense else ""
            lines += axes.plot(*zip(*sorted(xy), strict=True), linestyle=joined, **style)
            names.append(plots.shown(arm) + (" (dense)" if dense else ""))
            if dense:
                for _, bleu in xy:
                    axes.axhline(bleu, linestyle=":", color=lines[-1].get_color())
        languages = dict.fromkeys(f"{r['source']} to {r['target']}" for r in rows)
        axes.set_title(f"{plots.shown(rows[0]['test_set'])}, {', '.join(languages)}")
        axes.set_xlabel("weights that are not zero (millions)")
        axes.set_ylabel("BLEU")
        axes.grid(alpha=0.3)
        plots.legend(axes, lines, names)


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    check_inputs(*args.model)
    if args.ancestry:
        for path in args.model:
            tell(path)
        return 0
    plots.check_picture(args.plot)
    with outputs(args.overwrite, args.json, args.plot):
        from common import runtime
        from common.files.jsonfile import write_json

        device = runtime.setup(args.device)
        width = max(len(str(path)) for path in args.model)
        print(f"{'model':{width}}  {'BLEU':>5}  {'chrF':>5}  {'val. loss':>9}  {'parameters':>11}  {'zeros':>6}  "
              f"{'shrunk':>11}  {'MB':>6}  {'tokens/s':>8}")
        rows = []
        for path in args.model:
            r = evaluate(path, args, device)
            rows.append(r)
            print(f"{r['model']:{width}}  {r['bleu']:5.1f}  {r['chrf']:5.1f}  {r['validation_loss']:9.4f}  "
                  f"{r['parameters']:11,}  {r['zeros'] / r['parameters']:6.1%}  {r['shrunk_parameters']:11,}  "
                  f"{r['bytes'] / 1e6:6.1f}  {r['tokens_per_second']:8,.0f}"
                  + (f"  {r['hit_limit']:.1%} cut at the limit of new tokens" if r["hit_limit"] else ""), flush=True)
        if args.json:
            write_json(args.json, rows)
        if args.plot:
            draw(args.plot, rows)
    said = [[f"BLEU: {r['bleu_signature']}", f"chrF: {r['chrf_signature']}", *(f"note: {n}" for n in r["notes"])]
            for r in rows]
    print("\n".join(dict.fromkeys(line for lines in said for line in lines)))
    show_examples(rows)
    for path in filter(None, (args.json, args.plot)):
        print(f"\n{path}: written")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
