#!/usr/bin/env python3
"""Write configurations: which fraction of each module is removed, for each pruned model wanted.

Reads a model file. Either all modules of a kind are pruned at one rate (--attention, --feed-forward, --linear). Or,
with a tuned bank, the configurations are found that are expected to be best at a total --sparsity or --speedup, or
smallest for a --target-loss, whatever the rates. That needs one short evaluation for each variant of the bank, once
(kept in BANK.sensitivity.json), for --speedup also minutes of timing this machine (BANK.latency.json), and then
weighs all combinations in seconds.

    python config_generator.py -m origin_model.pth -o conf.json --attention 0.25 0.5 --linear 0.5 0.8
    python config_generator.py -m origin_model.pth -p finetuned_modules.npy -o best.json --sparsity 0.4 0.5
"""

import sys
from pathlib import Path

from common import cli
from common.errors import UserError
from common.files.atomic import check_inputs, check_outputs, outputs

# Where the configurations go from and to when no rates are given.
MILD, HARSH = {"attention": 0.25, "linear": 0.5}, {"attention": 0.5, "linear": 0.8}


def build_parser():
    p = cli.parser(__doc__)
    cli.add_model(p, what="model file whose modules are listed")
    cli.add_output(p, "conf.json", "configuration file to write")
    p.add_argument("--attention", type=cli.rate_or_all, nargs="+", metavar="R",
                   help="fraction of heads removed, one for each configuration; 1 skips the sub-layers (default: "
                        "evenly from 0.25 to 0.5, with --feed-forward 0)")
    p.add_argument("--feed-forward", type=cli.rate_or_all, nargs="+", metavar="R",
                   help="fraction of hidden units removed, likewise (default: 0)")
    p.add_argument("--linear", type=cli.rate, nargs="+", metavar="R",
                   help="fraction of single weights removed (default: evenly from 0.5 to 0.8, with --feed-forward 0)")
    p.add_argument("-n", "--number", type=cli.count, metavar="N",
                   help="number of configurations (default: as many as rates are given, else 3)")
    g = p.add_argument_group("search in a tuned bank")
    g.add_argument("-p", "--bank", type=Path, metavar="BANK", help="tuned bank (.npy) whose variants are combined")
    g.add_argument("--sparsity", type=cli.rate, nargs="+", default=[], metavar="S",
                   help="fraction of all prunable weights removed; for each the configuration of least expected loss")
    g.add_argument("--target-loss", type=cli.positive, nargs="+", default=[], metavar="X",
                   help="loss on 400 validation sentences, after recalibration; for each the smallest configuration "
                        "expected to meet it")
    g.add_argument("--speedup", type=cli.factor, nargs="+", default=[], metavar="S",
                   help="how many times as fast as the original it translates here; for each the one of least expected "
                        "loss")
    cli.add_data(p, limit=False)
    cli.add_device(p)
    return p


def rates(args, kind: str, number: int) -> list[float]:
    """Return the rates of one kind of module for each configuration."""
    given = getattr(args, kind)
    if given is None and (kind == "feed_forward" or args.feed_forward):
        return [0.0] * number
    if given is None:
        mild, harsh = MILD[kind], HARSH[kind]
        return [round(mild + (harsh - mild) * n / max(number - 1, 1), 4) for n in range(number)]
    if len(given) != number:
        raise UserError(f"--{kind.replace('_', '-')} lists {len(given)} rates for {number} configurations; give one "
                        "for each")
    return given


def uniform(args) -> list[dict]:
    """Return the configurations that the flags name. Without torch, so it takes a fifth of a second."""
    from common.pruning.configurations import check_rates, uniform
    from common.t5.header import read_header

    number = args.number or len(args.attention or args.feed_forward or args.linear or [None] * 3)
    chosen = zip(*(rates(args, kind, number) for kind in ("attention", "linear", "feed_forward")), strict=True)
    header, configurations = read_header(args.model), []
    for n, (attention, linear, feed_forward) in enumerate(chosen):
        configurations.append(uniform(header.kinds, attention, linear, feed_forward))
        check_rates(configurations[n], header.present, f"configuration {n}")
        print(f"configuration {n}: attention {attention:g}, feed-forward {feed_forward:g}, linear {linear:g} removed")
    return configurations


def timed(args, model, device):
    """Return the times of this machine: those beside the bank, or measured now."""
    from common.pruning import latency

    path = args.bank.with_suffix(".latency.json")
    text = latency.text_of(cli.corpus(args, model), model)
    origin = {"model": model.identity, "validation text": text.sha256}
    with outputs(True, path):
        found = latency.read(path, origin) if path.exists() else None
        other = found and found.differences(device)
        if other:
            print(f"{path}: was measured otherwise, so it is measured anew: {other}")
        if other or not found:
            found = latency.measure(model, text, device)
            latency.write(path, found, origin)
            print(f"{path}: times of {len(text)} translations by what each kind of sub-layer keeps")
    return found


def searched(args, sensitivity: Path) -> list[dict]:
    """Return the configurations that the search finds for every --sparsity, --target-loss and --speedup."""
    from common import runtime
    from common.pruning import bank, latency, search
    from common.t5 import model as models
    from common.text.batches import VALIDATION_SENTENCES, validation_text

    device = runtime.setup(args.device)
    model, opened = models.load(args.model), bank.load(args.bank)
    opened.check_origin(model.identity, args.model)
    removed, present, total = search.removed_weights(model, opened)
    if args.speedup:
        latency.check_bank(opened)
    valid = validation_text(cli.corpus(args, model), model, sentences=VALIDATION_SENTENCES)
    model.network.to(device)
    times = timed(args, model, device) if args.speedup else None
    saved, whole = latency.saved(times, model, opened) if times else (None, 0)
    origin = {"model": model.identity, "bank": opened.sha256, "validation text": valid.sha256}
    if sensitivity.exists():
        found = search.read(sensitivity, opened, origin)
    else:
        with outputs(False, sensitivity):
            found = search.measure(model, opened, valid, device)
            search.write(sensitivity, found, origin)
        print(f"{sensitivity}: losses of {len(found.losses)} variants, one by one")
    by_size = search.front(found, removed, present)
    wanted = [(f"sparsity {s:g}", by_size, by_size.at_sparsity(s, total)) for s in args.sparsity] + \
        [(f"loss {x:g}", by_size, by_size.at_loss(x)) for x in args.target_loss]
    if times:
        by_time = search.front(found, saved, whole)
        wanted += [(f"speed-up {s:g}", by_time, by_time.at_size(whole / s)) for s in args.speedup]

    def shown(front, place) -> str:
        size = f"sparsity {1 - front.sizes[place] / total:.3f}" if front is by_size else \
            f"predicted {whole / front.sizes[place]:.2f} times as fast"
        return f"{size}, expected loss {front.losses[place]:.4f}"

    print(f"{len(wanted[0][1].sizes):,} best configurations out of all combinations; the original's loss "
          f"{found.dense:.4f}")
    configurations = []
    for name, front, place in wanted:
        if place is None:
            skips = front is by_size or any(rates[0] == 1 for _, rates in opened.entries)
            raise UserError(f"{args.bank}: no combination of its variants has {name}; they reach from "
                            f"{shown(front, 0)}, to {shown(front, -1)}"
                            + ("" if skips else "; variants at rate 1, which skip a sub-layer, would save more"))
        print(f"configuration {len(configurations)}: for {name}: {shown(front, place)}")
        configurations.append(front.configuration(place))
    return configurations


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    search = bool(args.sparsity or args.target_loss or args.speedup)
    if search != bool(args.bank):
        raise UserError("a search needs a bank (-p) and --sparsity, --target-loss or --speedup")
    if search and (args.attention or args.feed_forward or args.linear or args.number):
        raise UserError("--attention, --feed-forward, --linear and -n name configurations; a search finds them")
    check_inputs(args.model, args.bank)
    sensitivity = args.bank and args.bank.with_suffix(".sensitivity.json")
    with outputs(args.overwrite, args.output):
        if search and not sensitivity.exists():
            check_outputs(False, sensitivity)
        from common.files import jsonfile

        configurations = searched(args, sensitivity) if search else uniform(args)
        jsonfile.write_json(args.output, configurations)
    print(f"{args.output}: {len(configurations)} configurations")
    cli.next_step(("compose_model.py", "-m", args.model, "-p", args.bank, "-c", args.output) if search else
                  ("prune_scheme_generator.py", "-i", args.output))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
