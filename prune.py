#!/usr/bin/env python3
"""Prune every block of the scheme at every rate, once, and write the variants as a bank.

Reads the original model and conf_prune.json. Writes a bank (.npy) of pruned, not yet tuned variants: whole
attention heads of lowest joint l1 norm, single weights of lowest magnitude. --criterion wanda or obs also reads
training text and chooses by what the original's outputs lose. With -p also a complete test model composed of
every block's first variant.

    python prune.py -m origin_model.pth -c conf_prune.json -o pruned_modules.npy -p pruned_model.pth
"""

import sys
from pathlib import Path

from common import cli


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("-m", "--model", type=Path, default=Path("origin_model.pth"), metavar="MODEL",
                   help="original model file")
    p.add_argument("-c", "--scheme", type=Path, default=Path("conf_prune.json"), metavar="SCHEME", help="scheme file")
    cli.add_output(p, "pruned_modules.npy", "bank to write")
    p.add_argument("-p", "--pruned-model", type=Path, metavar="FILE",
                   help="also write a test model made of every block's first variant")
    p.add_argument("--criterion", choices=("l1", "wanda", "obs"), default="l1",
                   help="what is removed: l1: least magnitude; wanda: least |w|*|x|; obs: least error after the other "
                        "weights are re-fitted; wanda and obs choose heads by the attention's output")
    g = p.add_argument_group("wanda and obs")
    g.add_argument("--calibration-sentences", type=cli.count, default=2000, metavar="N",
                   help="training pairs the activations are taken from, drawn by --seed")
    cli.add_memory_budget(g)
    cli.add_batch_tokens(g)
    cli.add_data(p)
    cli.add_runtime(p)
    return p


def variants(args, model, scheme):
    """Return an iterator over the scheme's variants by the chosen criterion."""
    from common import composition, data, models, runtime

    device = runtime.setup(args.device, args.seed, args.threads)
    if args.criterion == "l1":
        return composition.prune_scheme(model.network, scheme)
    calibration = data.load_train(args, model, args.calibration_sentences)
    return composition.prune_scheme_by_activations(
        models.place(model.network, device), scheme, args.criterion, calibration, device, args.memory_budget)


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    cli.check_inputs(args.model, args.scheme)
    cli.check_outputs(args.overwrite, args.output, args.pruned_model)
    from common import bank, composition, configs, files, models, modules
    from common.provenance import provenance

    scheme, scheme_origin = configs.read_scheme(args.scheme)
    model = models.load(args.model)
    kinds = modules.prunable(model.network)
    configs.check_modules([m for block in scheme for m in modules.members(block)], kinds, args.scheme)
    scheme_digest = configs.scheme_digest(scheme)
    origin = provenance("prune.py", args, {"model": (args.model, model.identity, model.provenance),
                                           "scheme": (args.scheme, scheme_digest, scheme_origin)})
    with files.locked(args.output, args.pruned_model):
        kept = weights = 0
        with bank.create(args.output, model.identity, scheme_digest, None, origin) as writer:
            for variant in variants(args, model, scheme):
                writer.add(variant)
                kept += sum(int(m.sum()) for m in variant.masks.values())
                weights += sum(m.numel() for m in variant.masks.values())
        number = sum(map(len, scheme.values()))
        print(f"{args.output}: {number} variants of {len(scheme)} blocks, {1 - kept / weights:.1%} of their weights "
              f"removed, {args.output.stat().st_size / 1e6:.1f} MB")
        if args.pruned_model:
            made = bank.load(args.output)
            first = {block: rates[0] for block, rates in scheme.items()}
            for key in first.items():
                composition.install(model, made.read(key))
            model.provenance = origin
            models.save(args.pruned_model, model)
            print(f"{args.pruned_model}: every block's first variant; {models.mask_report(model)}")
    print(f"next: python block-level_finetuning.py -m {args.model} -p {args.output}, or compose_model.py -p "
          f"{args.output} for the untuned model")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
