#!/usr/bin/env python3
"""Compose one configuration out of a tuned bank, recalibrate it, and train it briefly on the translation loss.

Reads the original model, a bank and conf.json; handles exactly one configuration a run (-n, from 0). Writes the
model with the best validation loss (the composed one itself, if training does not better it), and statistics.

    python model-level_finetuning.py -m origin_model.pth -p finetuned_modules.npy -c conf.json -n 0 \\
        -o finetuned_model.pth --stats model_stats.csv
"""

import sys

from common import cli, distributed
from common.files.atomic import check_inputs


def build_parser():
    p = cli.parser(__doc__)
    cli.add_composition(p, "finetuned_modules.npy")
    cli.add_output(p, "finetuned_model.pth", "model file to write")
    cli.add_training(p, epochs=3, lr=1e-3, stats="model_stats.csv")
    p.add_argument("--distillation", action="store_true",
                   help="half of each target follows the original's distribution, for up to 1.5 "
                        "times the time")
    cli.add_data(p)
    cli.add_seed(p)
    cli.add_device(p)
    cli.add_plan(p)
    return p


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    check_inputs(args.model, args.bank, args.configurations)
    if args.plan:
        from common import plan
        from common.pruning import bank
        from common.pruning.configurations import nth, read_configurations
        from common.t5.header import read_header

        header, opened = read_header(args.model), bank.load(args.bank)
        opened.check_origin(header.identity, args.model)
        chosen = nth(read_configurations(args.configurations), args.number, args.configurations)
        opened.check_serves(chosen)
        return plan.show(plan.training(header, chosen, args.batch_tokens, args.epochs, args.max_train_sentences,
                                       header if args.distillation else None, composes=True), args.output)
    with cli.training_outputs(args):
        from common import runtime
        from common.files.provenance import hashes
        from common.pruning import composition
        from common.t5 import model
        from common.text.batches import calibration_text, training_text, validation_text
        from common.training.finetuning import finetune
        from common.training.loop import can_resume
        from common.tuning.recalibration import recalibrate_composed

        device = runtime.setup(args.device, args.seed)
        composed, bank, inputs = composition.from_files(args.model, args.bank, args.configurations, args.number)
        corpus, options = cli.corpus(args, composed), cli.fit_options(args)
        valid = validation_text(corpus, composed)
        train = training_text(corpus, composed, args.batch_tokens, args.seed)
        distributed.check_same(hashes(inputs | {"training text": train.as_input()}))
        original, spent = model.load(args.model), 0.0
        if not args.no_recalibration and not can_resume(options):  # a checkpoint holds what the sweep has made
            spent = recalibrate_composed(original, composed, bank, calibration_text(corpus, composed, args.seed),
                                         device, valid, args.target_loss)
        result = finetune(
            "model-level_finetuning.py", vars(args), composed, inputs,
            train, valid, options, args.output, device, original if args.distillation else None, spent)
    print(f"{args.output}: {result}; {model.mask_report(composed)}")
    cli.next_step(("evaluate.py", "-m", args.output), ("plot_loss.py", args.stats))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
