#!/usr/bin/env python3
"""Train a complete model on the translation loss: the usual way, without composing.

Reads any model file: a pruned or composed one (its masks stay in force), or a dense one (so it also trains
"tiny" from scratch). Writes the model with the best validation loss, and the training statistics.

    python baseline_finetuning.py -m composed_model.pth -o baseline_model.pth --stats baseline_stats.csv
"""

import sys
from pathlib import Path

from common import cli


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("-m", "--model", type=Path, default=Path("composed_model.pth"), metavar="MODEL",
                   help="model file to train")
    cli.add_output(p, "baseline_model.pth", "model file to write")
    cli.add_training(p, epochs=3, lr=1e-3, stats="baseline_stats.csv")
    cli.add_regularization(p)
    p.add_argument("--teacher", type=Path, metavar="MODEL",
                   help="the original, to distil from; needs --distillation")
    cli.add_distillation(p, 0.0)
    cli.add_data(p)
    cli.add_runtime(p)
    return p


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    cli.check_inputs(args.model, *([args.teacher] if args.teacher else []))
    if bool(args.teacher) != bool(args.distillation):
        raise cli.UserError("--teacher and --distillation belong together: the model to distil from, and its share of "
                            "the loss, e.g. 0.5")
    cli.check_training(args)
    from common import models, training

    model = models.load(args.model)
    inputs = {"model": (args.model, model.identity, model.provenance)}
    teacher = models.load(args.teacher) if args.teacher else None
    if teacher:
        inputs["teacher"] = args.teacher, teacher.identity, teacher.provenance
        if (teacher.tokenizer_json, teacher.network.config.vocab_size) != (
                model.tokenizer_json, model.network.config.vocab_size):
            raise cli.UserError(f"{args.teacher}: has another vocabulary than {args.model}; distilling needs the same")
    return training.finetune_model("baseline_finetuning.py", args, model, inputs, teacher)


if __name__ == "__main__":
    sys.exit(cli.run(main))
