#!/usr/bin/env python3
"""Train a complete model on the translation loss: the usual way, without composing.

Reads any model file: a pruned or composed one (what was removed stays removed), or a dense one. Writes the model with
the best validation loss, and the training statistics.

    python baseline_finetuning.py -m composed_model.pth -o baseline_model.pth --stats baseline_stats.csv
"""

import sys
from pathlib import Path

from common import cli
from common.files.atomic import check_inputs


def build_parser():
    p = cli.parser(__doc__)
    cli.add_model(p, "composed_model.pth", "model file to train")
    cli.add_output(p, "baseline_model.pth", "model file to write")
    cli.add_training(p, epochs=3, lr=1e-3, stats="baseline_stats.csv")
    p.add_argument("--teacher", type=Path, metavar="MODEL",
                   help="the original: half of each target follows its distribution, for up to 1.5 "
                        "times the time")
    cli.add_data(p)
    cli.add_seed(p)
    cli.add_device(p)
    cli.add_plan(p)
    return p


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    check_inputs(args.model, args.teacher)
    if args.plan:
        from common import plan
        from common.t5.header import read_header

        return plan.show(plan.training(read_header(args.model), {}, args.batch_tokens, args.epochs,
                                       args.max_train_sentences, args.teacher and read_header(args.teacher)),
                         args.output)
    with cli.training_outputs(args):
        from common import runtime
        from common.t5 import model
        from common.text.batches import training_text, validation_text
        from common.training.finetuning import finetune

        device = runtime.setup(args.device, args.seed)
        trained, teacher = model.load(args.model), args.teacher and model.load(args.teacher)
        inputs = {"model": (args.model, trained.identity, trained.provenance)}
        if teacher:
            inputs["teacher"] = args.teacher, teacher.identity, teacher.provenance
        corpus = cli.corpus(args, trained)
        result = finetune(
            "baseline_finetuning.py", vars(args), trained, inputs,
            training_text(corpus, trained, args.batch_tokens, args.seed), validation_text(corpus, trained),
            cli.fit_options(args), args.output, device, teacher)
    print(f"{args.output}: {result}; {model.mask_report(trained)}")
    cli.next_step(("evaluate.py", "-m", args.output), ("plot_loss.py", args.stats))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
