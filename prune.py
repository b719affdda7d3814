#!/usr/bin/env python3
"""Prune every block of the scheme at every rate, once, and write the variants as a bank.

Reads the original model and conf_prune.json. Writes a bank (.npy) of pruned, not yet tuned variants: whole
attention heads of lowest joint l1 norm, single weights of lowest magnitude. --criterion obs also reads 2,000 training
pairs, and chooses by what the original's outputs lose, the same heads in all self-attentions of a stack. With -p also
a complete test model composed of every block's first variant. A model that was pruned before loses more: rates count
what it still has.

    python prune.py -m origin_model.pth -c conf_prune.json -o pruned_modules.npy --criterion obs
"""

import sys
from pathlib import Path

from common import cli, distributed
from common.files.atomic import check_inputs, outputs


def build_parser():
    p = cli.parser(__doc__)
    cli.add_model(p)
    p.add_argument("-c", "--scheme", type=Path, default=Path("conf_prune.json"), metavar="SCHEME", help="scheme file")
    cli.add_output(p, "pruned_modules.npy", "bank to write")
    p.add_argument("-p", "--pruned-model", type=Path, metavar="FILE",
                   help="also write a test model made of every block's first variant")
    p.add_argument("--criterion", choices=("l1", "obs"), default="l1",
                   help="what is removed: l1: least magnitude, needs no text; obs: least error after the others are "
                        "re-fitted, much better for heads, and for weights at 80 %% and beyond")
    cli.add_data(p, limit=False)
    cli.add_device(p)
    cli.add_plan(p)
    return p


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    check_inputs(args.model, args.scheme)
    if args.plan:
        from common import plan
        from common.pruning.configurations import check_modules
        from common.pruning.scheme import modules_of, read_scheme
        from common.t5.header import read_header

        header, scheme = read_header(args.model), read_scheme(args.scheme)[0]
        check_modules(modules_of(scheme), header.kinds, args.scheme)
        return plan.show(plan.prune(header, plan.variants_of(scheme), args.criterion == "obs"), args.output)
    with outputs(args.overwrite, args.output, args.pruned_model):
        from common import runtime
        from common.files.provenance import hashes, provenance
        from common.pruning import bank, composition, variants
        from common.pruning.configurations import check_modules
        from common.pruning.scheme import modules_of, read_scheme, scheme_digest
        from common.t5 import model
        from common.t5.modules import prunable
        from common.text.batches import calibration_text

        device = runtime.setup(args.device)
        scheme, scheme_origin = read_scheme(args.scheme)
        origin = model.load(args.model)
        check_modules(modules_of(scheme), prunable(origin.network), args.scheme)
        digest = scheme_digest(scheme)
        inputs = {"model": (args.model, origin.identity, origin.provenance),
                  "scheme": (args.scheme, digest, scheme_origin)}
        if args.criterion == "obs":
            text = calibration_text(cli.corpus(args, origin), origin)
            inputs["calibration text"] = text.as_input()
            origin.network.to(device)
            made = variants.prune_scheme_by_obs(origin, scheme, text, device)
        else:
            made = variants.prune_scheme(origin, scheme)
        distributed.check_same(hashes(inputs))
        told = provenance("prune.py", vars(args), inputs)
        kept = weights = 0
        with bank.create(args.output, origin.identity, digest, None, told) as writer:
            for variant in made:
                writer.add(variant)
                kept += sum(int(m.sum()) for m in variant.masks.values())
                weights += sum(m.numel() for m in variant.masks.values())
        distributed.gather(None)  # the first process has written it
        print(f"{args.output}: {sum(map(len, scheme.values()))} variants of {len(scheme)} blocks, "
              f"{1 - kept / weights:.1%} of their weights removed, {args.output.stat().st_size / 1e6:.1f} MB")
        if args.pruned_model:
            opened = bank.load(args.output)
            for block, rates in scheme.items():
                composition.install(origin, opened.read((block, rates[0])))
            origin.provenance = told
            model.save(args.pruned_model, origin)
            print(f"{args.pruned_model}: every block's first variant; {model.mask_report(origin)}")
    cli.next_step(("block-level_finetuning.py", "-m", args.model, "-p", args.output),
                  ("compose_model.py", "-m", args.model, "-p", args.output))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
