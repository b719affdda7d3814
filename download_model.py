#!/usr/bin/env python3
"""Get the original model and write it as one file that all later stages read.

Reads a T5-family model (T5, T5 v1.1, Flan-T5, mT5, ByT5) from the Hugging Face hub or a local folder. "demo" is a small
trained model in this repository; "tiny" makes a small untrained one, its tokenizer trained on the training text.
Writes one .pth with tokenizer, configuration, languages, prefix and weights.

    python download_model.py -m t5-small -o origin_model.pth
"""

import sys

from common import cli
from common.files.atomic import outputs


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("-m", "--model", default="t5-small", metavar="NAME",
                   help="hub repository, local folder, 'demo' or 'tiny'")
    cli.add_output(p, "origin_model.pth", "model file to write")
    p.add_argument("--source", type=cli.language, default="en", metavar="LANG", help="language translated from")
    p.add_argument("--target", type=cli.language, default="de", metavar="LANG",
                   help="language translated to; later stages read train.LANG, val.LANG, … of both")
    p.add_argument("--source-prefix", metavar="TEXT",
                   help="put before each source sentence (default: what the model's configuration has for the "
                        "languages, for T5 e.g. 'translate English to German: ')")
    p.add_argument("--vocabulary", choices=["all", "text"], default="all",
                   help="tokens that stay: all, or those of the training text, special ones, single characters and "
                        "bytes; the model gets smaller and all stages faster, and the training text keeps its tokens")
    cli.add_data(p, limit=False)
    return p


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    with outputs(args.overwrite, args.output):
        from common import runtime
        from common.files.provenance import provenance
        from common.t5 import folder, model, vocabulary
        from common.text.corpus import Corpus

        runtime.setup("cpu")
        commit, inputs = None, {}
        if args.model == "tiny":
            made = folder.make_tiny(Corpus(args.data, args.source, args.target))
        else:
            path, commit = folder.fetch(args.model)
            made = folder.load_folder(path, args.source, args.target)
        if args.source_prefix is not None:
            made.prefix = args.source_prefix
        if args.vocabulary == "text":
            made, inputs["training text"] = vocabulary.cut(made, Corpus(args.data, made.source, made.target))
        made.provenance = provenance("download_model.py", vars(args) | {"hub_commit": commit}, inputs)
        model.save(args.output, made)
    print(f"{args.output}: {model.mask_report(made)}; {made.source} to {made.target}, prefix {made.prefix!r}")
    cli.next_step(("config_generator.py", "-m", args.output))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
