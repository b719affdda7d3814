#!/usr/bin/env python3
"""Tune every variant of a bank once against the output of the original module (block level).

Reads the original model and a bank. Writes the tuned bank, statistics, and beside these (STATS.variants.csv) a table of
all variants with their errors, E|y - y'|² / E|y|². --solver exact, the default, takes the least-squares solution from
one pass of the original over 2,000 training pairs, and steps on q, k, v and o where heads were removed. adamw is
gradient descent on the same objective. joint takes a bank that is tuned already and trains it in random compositions,
so that variants learn to work together. The flags under "training" are for the latter two.

    python block-level_finetuning.py -m origin_model.pth -p pruned_modules.npy -o finetuned_modules.npy
"""

import sys
from pathlib import Path

from common import cli, distributed
from common.errors import UserError
from common.files.atomic import check_inputs, check_outputs, outputs

VARIANT_COLUMNS = ("block", "rates", "error_before", "error_after", "valid_error_before", "valid_error_after",
                   "seconds")


def build_parser():
    p = cli.parser(__doc__)
    cli.add_model(p)
    p.add_argument("-p", "--bank", type=Path, default=Path("pruned_modules.npy"), metavar="BANK",
                   help="bank to tune (.npy)")
    cli.add_output(p, "finetuned_modules.npy", "bank to write")
    p.add_argument("--solver", choices=("exact", "adamw", "joint"), default="exact",
                   help="exact: least squares, seconds; adamw: gradients, the published way; joint: in composition, "
                        "worth it for 40 models and more")
    p.add_argument("-c", "--configurations", type=Path, metavar="FILE",
                   help="joint: draw these configurations (default: any mixture of the bank's variants)")
    cli.add_passes(p, epochs=5, lr=1e-3, stats="block_stats.csv")
    cli.add_data(p)
    cli.add_seed(p)
    cli.add_device(p)
    cli.add_plan(p)
    return p


def tune_exactly(args, network, bank, writer, calibration, valid, device) -> tuple[list, str]:
    """Write the least-squares solutions and the statistics; return the table of variants and a summary."""
    import time

    from common.files.atomic import write_bytes
    from common.training.checkpoint import COLUMNS
    from common.training.loop import statistics_csv
    from common.tuning import exact

    began, table = time.perf_counter(), []
    for r in exact.tune(network, bank, calibration, valid, device):
        writer.add(r.variant)
        table.append([r.variant.block, r.variant.shown_rates, r.before, r.after, r.valid_before, r.valid_after,
                      round(r.seconds, 4)])
    seconds = time.perf_counter() - began
    before, after, valid_before, valid_after = (sum(row[i] for row in table) / len(table) for i in (2, 3, 4, 5))
    write_bytes(args.stats, statistics_csv([[0, before, valid_before, 0.0, 0.0],
                                            [1, after, valid_after, round(seconds, 4), 0.0]], COLUMNS[:5]))
    return table, f"{seconds:.1f} s"


def tune_by_gradient(args, network, bank, writer, configurations, inputs, train, valid, device) -> tuple[list, str]:
    """Write the variants after gradient descent; return the table of variants and a summary."""
    from common.training.finetuning import fingerprint
    from common.training.loop import fit
    from common.tuning.gradient import BlockReconstruction
    from common.tuning.joint import JointTranslation

    judge, joint = BlockReconstruction(network, bank, valid, device), args.solver == "joint"
    before, objective = judge.errors(valid, device), judge
    if joint:
        objective = JointTranslation(network, bank, device, configurations, args.seed)
    options = cli.fit_options(args, max_grad_norm=1.0 if joint else None)
    result = fit(objective, train, valid, options, device=device, fingerprint=fingerprint(vars(args), inputs))
    judge.masked = objective.masked
    table, after = [], judge.errors(valid, device)
    for variant, b, a in zip(objective.tuned(), before, after, strict=True):
        writer.add(variant)
        table.append([variant.block, variant.shown_rates, None, None, b, a, round(result.seconds / len(before), 4)])
    return table, f"{result.steps} steps in {result.seconds:.1f} s; {result.reason}"


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    check_inputs(args.model, args.bank, args.configurations)
    if args.plan:
        from common import plan
        from common.pruning import bank
        from common.t5.header import read_header

        header, opened = read_header(args.model), bank.load(args.bank)
        opened.check_origin(header.identity, args.model)
        return plan.show(plan.block_level(header, list(opened.entries), args.solver, args.epochs,
                                          args.max_train_sentences), args.output)
    check_outputs(True, args.stats)  # a folder has no suffix
    variants, by_gradient = args.stats.with_suffix(".variants.csv"), args.solver != "exact"
    if args.configurations and args.solver != "joint":
        raise UserError("-c says what --solver joint draws; the other solvers tune each variant apart")
    if args.resume and not by_gradient:
        raise UserError("--resume goes on with a training; the exact solver keeps no checkpoint, leave it out")
    with cli.training_outputs(args, variants) if by_gradient else outputs(
            args.overwrite, args.output, args.stats, variants):
        from common import runtime
        from common.files.atomic import digest, write_bytes
        from common.files.provenance import hashes, provenance
        from common.pruning import bank
        from common.pruning.configurations import read_configurations
        from common.t5 import model
        from common.text.batches import VALIDATION_SENTENCES, calibration_text, training_text, validation_text
        from common.training.loop import finish, statistics_csv

        device = runtime.setup(args.device, args.seed)
        opened, origin = bank.load(args.bank), model.load(args.model)
        opened.check_origin(origin.identity, args.model)
        inputs = {"model": (args.model, origin.identity, origin.provenance),
                  "bank": (args.bank, opened.sha256, opened.provenance)}
        configurations = None
        if args.configurations:
            configurations = read_configurations(args.configurations)
            for configuration in configurations:
                opened.check_serves(configuration)
            inputs["configurations"] = args.configurations, digest(args.configurations.read_bytes()), {}
        corpus, placed = cli.corpus(args, origin), origin.network.to(device)
        text = (training_text if by_gradient else calibration_text)(corpus, origin, seed=args.seed)
        valid = validation_text(corpus, origin, sentences=VALIDATION_SENTENCES)
        inputs |= {("training" if by_gradient else "calibration") + " text": text.as_input(),
                   "validation text": valid.as_input()}
        distributed.check_same(hashes(inputs))
        with bank.create(args.output, origin.identity, opened.scheme, args.solver,
                         provenance("block-level_finetuning.py", vars(args), inputs)) as writer:
            if by_gradient:
                table, summary = tune_by_gradient(args, placed, opened, writer, configurations, inputs, text, valid,
                                                  device)
            else:
                table, summary = tune_exactly(args, placed, opened, writer, text, valid, device)
            write_bytes(variants, statistics_csv(table, VARIANT_COLUMNS))
        if by_gradient:
            finish(cli.fit_options(args))
    before, after = (sum(row[i] for row in table) / len(table) for i in (4, 5))
    print(f"{args.output}: {len(table)} variants; mean relative error on validation text {before:.4f} -> "
          f"{after:.4f}; {summary}\n{variants}: every variant's errors")
    cli.next_step(("model-level_finetuning.py", "-m", args.model, "-p", args.output))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
