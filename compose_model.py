#!/usr/bin/env python3
"""Compose a complete model: the original with the blocks of one configuration replaced by a bank's variants.

Reads the original model, a bank (tuned or merely pruned) and conf.json. Writes a model file. With --recalibrate
also reads training text and repairs, in one sweep, what the pruned modules do to each other's inputs.

    python compose_model.py -m origin_model.pth -p finetuned_modules.npy -c conf.json -n 0 -o composed_model.pth
"""

import sys

from common import cli


def build_parser():
    p = cli.parser(__doc__)
    cli.add_composition(p, "pruned_modules.npy")
    cli.add_output(p, "composed_model.pth", "model file to write")
    cli.add_batch_tokens(p)
    cli.add_data(p)
    cli.add_runtime(p)
    return p


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    cli.check_composition(args)
    from common import composition, files, models, recalibration, runtime
    from common.provenance import provenance, tell

    if args.ancestry:
        return tell(args.model, args.bank, args.configurations)
    cli.check_outputs(args.overwrite, args.output)

    with files.locked(args.output):
        model, origin = composition.from_files(args.model, args.bank, args.configurations, args.number)
        if args.recalibrate:
            recalibration.from_args(args, model, runtime.setup(args.device, args.seed, args.threads), origin)
        if args.source_prefix is not None:
            model.prefix = args.source_prefix
        model.provenance = provenance("compose_model.py", args, origin)
        models.save(args.output, model)
    print(f"{args.output}: configuration {args.number}; {models.mask_report(model)}")
    print(f"next: python evaluate.py -m {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
