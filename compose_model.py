#!/usr/bin/env python3
"""Compose a complete model: the original with the blocks of one configuration replaced by a bank's variants.

Reads the original model, a bank and conf.json. Out of a merely pruned bank (the default) comes what the baseline
trains. Out of a tuned bank comes a model that is recalibrated: one sweep over some training text, without gradients,
re-fits its modules to the inputs that they receive in it. Writes a model file.

    python compose_model.py -m origin_model.pth -p finetuned_modules.npy -c conf.json -n 0 -o composed_model.pth
"""

import sys

from common import cli, distributed
from common.files.atomic import check_inputs, outputs


def build_parser():
    p = cli.parser(__doc__)
    cli.add_composition(p, "pruned_modules.npy")
    cli.add_output(p, "composed_model.pth", "model file to write")
    cli.add_data(p, limit=False)
    cli.add_device(p)
    return p


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    check_inputs(args.model, args.bank, args.configurations)
    with outputs(args.overwrite, args.output):
        from common import runtime
        from common.files.provenance import hashes, provenance
        from common.pruning import composition
        from common.t5 import model
        from common.text.batches import calibration_text
        from common.tuning.recalibration import recalibrate_composed

        composed, bank, inputs = composition.from_files(args.model, args.bank, args.configurations, args.number)
        how = "merely pruned" if bank.tuned is None else f"tuned ({bank.tuned}), not recalibrated"
        if bank.tuned and not args.no_recalibration:
            device = runtime.setup(args.device)
            text = calibration_text(cli.corpus(args, composed), composed)
            inputs["calibration text"] = text.as_input()
            distributed.check_same(hashes(inputs))
            recalibrate_composed(model.load(args.model), composed, bank, text, device)
            how = f"tuned ({bank.tuned}), recalibrated"
        composed.provenance = provenance("compose_model.py", vars(args), inputs)
        model.save(args.output, composed)
    print(f"{args.output}: configuration {args.number} out of {args.bank}: {how}; {model.mask_report(composed)}")
    cli.next_step(("evaluate.py", "-m", args.output))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
