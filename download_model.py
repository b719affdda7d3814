#!/usr/bin/env python3
"""Get the original model and write it as one file that all later stages read.

Reads a T5-family model (T5, T5 v1.1, Flan-T5, mT5) from the Hugging Face hub or a local folder, or makes a
small untrained one ("tiny") with a tokenizer trained on the training text, for work without a network.
Writes one .pth with tokenizer, configuration, prefix and weights.

    python download_model.py -m t5-small -o origin_model.pth
"""

import sys

from common import cli


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("-m", "--model", default="t5-small", metavar="NAME",
                   help="hub repository, local folder, or 'tiny'")
    cli.add_output(p, "origin_model.pth", "model file to write")
    cli.add_data(p)
    cli.add_runtime(p)
    return p


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    cli.check_outputs(args.overwrite, args.output)
    from common import files, hub, models, runtime
    from common.data import DataOptions
    from common.provenance import provenance

    runtime.setup("cpu", args.seed, args.threads)
    with files.locked(args.output):
        if args.model == "tiny":
            model = hub.make_tiny(DataOptions.from_args(args))
        else:
            model = hub.load_folder(hub.fetch(args.model), args.source, args.target)
        if args.source_prefix is not None:
            model.prefix = args.source_prefix
        model.provenance = provenance("download_model.py", args, {})
        models.save(args.output, model)
    print(f"{args.output}: {models.mask_report(model)}; prefix {model.prefix!r}")
    print(f"next: python config_generator.py -m {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
