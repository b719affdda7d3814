#!/usr/bin/env python3
"""Write configurations: which fraction of each module is removed, for each pruned model wanted.

Reads a model file. Three ways: every attention at one rate and every linear module at another (--attention,
--linear); mixtures of such configurations, block by block (--mixed); with a tuned bank, the configurations expected
to be best at a total --sparsity, or the smallest expected to meet a --target-loss, whatever the rates. The latter
needs one short evaluation for each variant of the bank, once, and then weighs all combinations in seconds.

    python config_generator.py -m origin_model.pth -o conf.json --attention 0.25 0.5 --linear 0.5 0.8
    python config_generator.py -m origin_model.pth -p finetuned_modules.npy -o best.json --sparsity 0.4 0.5 --verify
"""

import random
import sys
from pathlib import Path

from common import cli

# Where the configurations go from and to when no rates are given.
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
                   help="number of configurations (default: as many as rates are given, else 3); in a search, for each "
                        "value of --sparsity and --target-loss (default: 1)")
    p.add_argument("--mixed", type=cli.index, default=0, metavar="N",
                   help="add N configurations in which each block takes its rates from one of the others, drawn by "
                        "--seed; they need no further variants")
    g = p.add_argument_group("search in a tuned bank")
    g.add_argument("-p", "--bank", type=Path, metavar="BANK", help="tuned bank (.npy) whose variants are combined")
    g.add_argument("--sparsity", type=cli.rate, nargs="+", default=[], metavar="S",
                   help="fraction of all prunable weights removed; for each the configurations of least expected loss")
    g.add_argument("--target-loss", type=cli.positive, nargs="+", default=[], metavar="X",
                   help="loss on the --validation-sentences; for each the smallest configurations expected to meet it "
                        "after recalibration")
    g.add_argument("--sensitivity", type=Path, metavar="FILE",
                   help="validation loss with each variant alone in the model; measured if it is not there (default: "
                        "BANK.sensitivity.json)")
    g.add_argument("--validation-sentences", type=cli.count, default=400, metavar="N",
                   help="validation pairs that losses are measured on, drawn by --seed")
    g.add_argument("--verify", action="store_true",
                   help="compose and recalibrate what was found and print its validation losses, too")
    cli.add_calibration(g)
    cli.add_batch_tokens(g)
    cli.add_data(p)
    cli.add_runtime(p)
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


def uniform(args, network) -> list[dict]:
    """Return the uniform configurations that the flags name, and mixtures of them."""
    from common import configs, modules

    number = args.number or len(args.attention or args.linear or [None] * 3)
    pairs = list(zip(rates(args, "attention", number), rates(args, "linear", number), strict=True))
    kinds = modules.prunable(network)
    configurations = [configs.uniform(kinds, *pair) for pair in pairs]
    for n, configuration in enumerate(configurations):
        configs.check_head_rates(configuration, network.config.num_heads, f"configuration {n}")
        print(f"configuration {n}: attention {pairs[n][0]:g}, linear {pairs[n][1]:g} removed")
    draw = random.Random(f"mixed/{args.seed}")
    blocks = dict.fromkeys(map(modules.block_of, kinds))
    for n in range(number, number + args.mixed):
        chosen = {block: draw.choice(configurations[:number]) for block in blocks}
        configurations.append({name: chosen[modules.block_of(name)][name] for name in kinds})
        print(f"configuration {n}: a mixture")
    return configurations


def searched(args, model) -> list[dict]:
    """Return the configurations that the search finds for every --sparsity and --target-loss."""
    from common import bank, composition, data, files, models, recalibration, runtime, search, training

    device = runtime.setup(args.device, args.seed, args.threads)
    opened = bank.load(args.bank)
    opened.check_origin(model.identity, args.model)
    pairs = data.sample(data.read_pairs(data.DataOptions.from_args(args), "val"), args.validation_sentences, args.seed)
    valid = data.Batches(pairs, model, args.batch_tokens, args.seed, args.source_prefix)
    models.place(model.network, device)
    path = args.sensitivity
    origin = {"model": model.identity, "bank": opened.sha256, "validation text": valid.sha256}
    if path.exists():
        found = search.read(path, opened, origin)
    else:
        with files.locked(path):
            found = search.measure(model, opened, valid, device)
            search.write(path, found, origin)
        print(f"{path}: losses of {len(found.losses)} variants, one by one")
    sizes, total = search.kept_weights(model.network, opened)
    front = search.front(found, sizes)
    number = args.number or 1
    wanted = [(f"sparsity {s:g}", front.at_sparsity(s, total, number)) for s in args.sparsity]
    wanted += [(f"loss {x:g}", front.at_loss(x, number)) for x in args.target_loss]
    for name, places in wanted:
        if not places:
            raise cli.UserError(f"{args.bank}: no combination of its variants has {name}; they reach from sparsity "
                                f"{1 - front.sizes[0] / total:.3f} at an expected loss of {front.losses[0]:.4f} to "
                                f"{1 - front.sizes[-1] / total:.3f} at {front.losses[-1]:.4f}")
    print(f"{len(front.sizes):,} best configurations out of all combinations; the original's loss {found.dense:.4f}")
    text = data.load_train(args, model, args.calibration_sentences) if args.verify else None
    configurations = []
    for n, (name, place) in enumerate((name, place) for name, places in wanted for place in places):
        configurations.append(front.configuration(place))
        line = (f"configuration {n}: for {name}: sparsity {1 - front.sizes[place] / total:.3f}, expected loss "
                f"{front.losses[place]:.4f}")
        if args.verify:
            composed = models.load(args.model)
            composition.compose(composed, opened, configurations[-1])
            objective = training.TranslationLoss(models.place(composed.network, device))
            line += f"; composed {training.evaluate(objective, valid, device):.4f}"
            recalibration.recalibrate(model.network, composed, text, device, args.damping,
                                      keep_hidden=opened.keeps_hidden)
            line += f", recalibrated {training.evaluate(objective, valid, device):.4f}"
        print(line, flush=True)
    return configurations


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    search = bool(args.sparsity or args.target_loss)
    if search != bool(args.bank):
        raise cli.UserError("a search needs a bank (-p) and --sparsity or --target-loss")
    if search and (args.attention or args.linear or args.mixed):
        raise cli.UserError("--attention, --linear and --mixed name rates; a search finds them")
    if not search and (args.verify or args.sensitivity):
        raise cli.UserError("--verify and --sensitivity belong to a search; name a bank (-p) and a target")
    cli.check_inputs(args.model, *([args.bank] if search else []))
    cli.check_outputs(args.overwrite, args.output)
    if search:
        args.sensitivity = args.sensitivity or args.bank.with_suffix(".sensitivity.json")
        if not args.sensitivity.exists():
            cli.check_outputs(False, args.output, args.sensitivity)
    from common import files, models

    model = models.load(args.model)
    with files.locked(args.output):
        configurations = searched(args, model) if search else uniform(args, model.network)
        files.write_json(args.output, configurations)
    print(f"{args.output}: {len(configurations)} configurations")
    print(f"next: python compose_model.py -m {args.model} -p {args.bank} -c {args.output}" if search else
          f"next: python prune_scheme_generator.py -i {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
