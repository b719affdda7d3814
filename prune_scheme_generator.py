#!/usr/bin/env python3
"""Collect what has to be pruned and tuned, each thing once, so that every configuration can be composed.

Reads conf.json. Writes conf_prune.json, the scheme: for each block the rates that occur. An attention and its
out-projection are one block, listed in the pairs of rates that occur. Do not edit the scheme; change the
configurations and make it anew.

    python prune_scheme_generator.py -i conf.json -o conf_prune.json
"""

import sys
from pathlib import Path

from common import cli
from common.errors import UserError
from common.files.atomic import check_inputs, outputs


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("-i", "--input", type=Path, default=Path("conf.json"), metavar="FILE", help="configuration file")
    cli.add_output(p, "conf_prune.json", "scheme file to write")
    return p


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    check_inputs(args.input)
    with outputs(args.overwrite, args.output):
        from common.files.atomic import digest
        from common.files.provenance import provenance
        from common.pruning.configurations import read_configurations, required_variants
        from common.pruning.scheme import make_scheme, write_scheme

        configurations = read_configurations(args.input)
        scheme = make_scheme(configurations)
        if not scheme:
            raise UserError(f"{args.input}: every rate is 0, there is nothing to prune")
        write_scheme(args.output, scheme, provenance("prune_scheme_generator.py", vars(args), {
            "configurations": (args.input, digest(args.input.read_bytes()), {})}))
    variants = sum(map(len, scheme.values()))
    naive = sum(len(required_variants(c)) for c in configurations)
    print(f"{args.output}: {variants} variants of {len(scheme)} blocks serve {len(configurations)} configurations "
          f"({naive} without sharing)")
    cli.next_step(("prune.py", "-c", args.output))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
