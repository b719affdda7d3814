#!/usr/bin/env python3
"""Write configurations: which module of the model is pruned at which rate.

Reads a model file. Writes conf.json: a list whose n-th entry (from 0) is the n-th configuration,
{module name: pruning rate}. Every attention gets the n-th --attention rate, every linear module (o, wi, wo) the
n-th --linear rate. The file may be edited by hand: rates may differ between modules, a module left out is
not pruned.

    python config_generator.py -m origin_model.pth -o conf.json --attention 0.25 0.5 --linear 0.5 0.8
"""

import sys
from pathlib import Path

from common import cli

MILD, HARSH = {"attention": 0.25, "linear": 0.5}, {"attention": 0.5, "linear": 0.8}


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("-m", "--model", type=Path, default=Path("origin_model.pth"), metavar="MODEL",
                   help="model file whose modules are listed")
    cli.add_output(p, "conf.json", "configuration file to write")
    for kind, unit in (("attention", "heads"), ("linear", "weights")):
        p.add_argument(f"--{kind}", type=cli.rate, nargs="+", metavar="R",
                       help=f"fraction of {unit} removed in [0, 1), one for each configuration (default: evenly from "
                            f"{MILD[kind]} to {HARSH[kind]})")
    p.add_argument("-n", "--number", type=cli.count, metavar="N",
                   help="number of configurations (default: as many as rates are given, else 3)")
    return p


def rates(args, kind: str, number: int) -> list[float]:
    """Return the rates of one kind of module for each configuration."""
    given = getattr(args, kind)
    if given is None:
        mild, harsh = MILD[kind], HARSH[kind]
        steps = max(number - 1, 1)
        return [round(mild + (harsh - mild) * n / steps, 4) for n in range(number)]
    if len(given) != number:
        raise cli.UserError(f"--{kind} lists {len(given)} rates for {number} configurations; give one for each")
    return given


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    number = args.number or len(args.attention or args.linear or [None] * 3)
    attention, linear = rates(args, "attention", number), rates(args, "linear", number)
    cli.check_inputs(args.model)
    cli.check_outputs(args.overwrite, args.output)
    from common import configs, files, models, modules

    network = models.load(args.model).network
    kinds = modules.prunable(network)
    configurations = [configs.uniform(kinds, a, b) for a, b in zip(attention, linear, strict=True)]
    for n, configuration in enumerate(configurations):
        configs.check_head_rates(configuration, network.config.num_heads, f"configuration {n}")
    with files.locked(args.output):
        files.write_json(args.output, configurations)
    for n, (a, b) in enumerate(zip(attention, linear, strict=True)):
        print(f"configuration {n}: attention {a:g}, linear {b:g} removed")
    print(f"{args.output}: {number} configurations of {len(kinds)} modules")
    print(f"next: python prune_scheme_generator.py -i {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
