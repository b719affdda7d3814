#!/usr/bin/env python3
"""Compose one configuration out of a tuned bank and train it briefly on the translation loss.

Reads the original model, a bank and conf.json; handles exactly one configuration a run (-n, from 0). Writes the
model with the best validation loss (the composed one itself, if training does not better it), and statistics.
--recalibrate repairs the composed model in one sweep before it is trained.

    python model-level_finetuning.py -m origin_model.pth -p finetuned_modules.npy -c conf.json -n 0 \\
        -o finetuned_model.pth --stats model_stats.csv
"""

import sys

from common import cli


def build_parser():
    p = cli.parser(__doc__)
    cli.add_composition(p, "finetuned_modules.npy")
    cli.add_output(p, "finetuned_model.pth", "model file to write")
    cli.add_training(p, epochs=3, lr=1e-3, stats="model_stats.csv")
    cli.add_regularization(p)
    cli.add_distillation(p, 0.0)
    cli.add_data(p)
    cli.add_runtime(p)
    return p


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    cli.check_composition(args)
    from common import composition, models, recalibration, runtime, training
    from common.provenance import tell

    if args.ancestry:
        return tell(args.model, args.bank, args.configurations)
    cli.check_training(args)

    model, inputs = composition.from_files(args.model, args.bank, args.configurations, args.number)
    if args.recalibrate:
        recalibration.from_args(args, model, runtime.setup(args.device, args.seed, args.threads), inputs)
    teacher = models.load(args.model) if args.distillation else None
    return training.finetune_model("model-level_finetuning.py", args, model, inputs, teacher)


if __name__ == "__main__":
    sys.exit(cli.run(main))
