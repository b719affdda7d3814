#!/usr/bin/env python3
"""Tune every variant of a bank once against the output of the original module (block level).

Reads the original model and a bank. Writes the tuned bank, statistics, and a table of all variants with their
errors. --solver exact needs one pass of the original over some calibration text. adamw trains for epochs against the
original's outputs and also tunes q, k and v. joint takes a bank that is tuned already and trains corrections, which
all variants of a block share, in random compositions, so that variants learn to work together. --resume and the flags
under "training", but for --stats and --batch-tokens, are for the latter two. Errors are relative: E|y - y'|² / E|y|².

    python block-level_finetuning.py -m origin_model.pth -p pruned_modules.npy -o finetuned_modules.npy
"""

import itertools
import sys
import time
from pathlib import Path

from common import cli

VARIANT_COLUMNS = ("block", "rates", "error_before", "error_after", "valid_error_before", "valid_error_after",
                   "seconds", "iterations")

JOINT_DISTILLATION = 0.5


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("-m", "--model", type=Path, default=Path("origin_model.pth"), metavar="MODEL",
                   help="original model file")
    p.add_argument("-p", "--bank", type=Path, default=Path("pruned_modules.npy"), metavar="BANK",
                   help="bank to tune (.npy)")
    cli.add_output(p, "finetuned_modules.npy", "bank to write")
    p.add_argument("--variants", type=Path, metavar="CSV",
                   help="table of variants: rates, errors before and after, seconds (default: STATS.variants.csv); the "
                        "exact solver starts from the original's masked weights, whatever the bank holds")
    p.add_argument("--solver", choices=("exact", "adamw", "joint"), default="exact",
                   help="exact: least squares from the original's activations; adamw: gradient descent; joint: "
                        "gradient descent in composition")
    g = p.add_argument_group("joint tuning")
    g.add_argument("-c", "--configurations", type=Path, metavar="FILE",
                   help="draw these configurations (default: any mixture of the bank's variants)")
    cli.add_distillation(g, JOINT_DISTILLATION)
    g = p.add_argument_group("exact solver")
    cli.add_calibration(g)
    g.add_argument("--attention-steps", type=cli.index, default=0, metavar="N",
                   help="with heads removed, take N steps of descent on q, k, v and o of the kept ones, then solve o "
                        "(200 is a good number)")
    g.add_argument("--attention-error", type=cli.non_negative, default=0.0, metavar="X",
                   help="take them only where the exact solution leaves a relative error above X")
    g.add_argument("--hidden-sentences", type=cli.index, default=0, metavar="N",
                   help="fit wi for the hidden units behind its ReLU, with moments of every unit from N training pairs "
                        "(500 is a good number); its errors are then those of the units")
    cli.add_memory_budget(g)
    cli.add_training(p, epochs=5, lr=1e-3, stats="block_stats.csv")
    cli.add_data(p)
    cli.add_runtime(p)
    return p


def tune_exactly(args, model, opened, writer, device, calibration, valid, few):
    """Write the least-squares solutions; return the statistics' rows, the variants' rows and a summary."""
    from common import attention, hidden, models, reconstruction

    curve, table, solving, last = reconstruction.Curve(), [], 0.0, 0
    began = time.perf_counter()
    network = models.place(model.network, device)
    text, shared = (calibration, valid, device), {"budget": args.memory_budget, "damping": args.damping, "curve": curve}
    by_outputs = hidden.others(opened) if args.hidden_sentences else opened
    reports = reconstruction.tune_exactly(network, by_outputs, *text, **shared)
    if args.attention_steps:
        reports = attention.tune(network, opened, reports, *text, **shared, steps=args.attention_steps,
                                 above=args.attention_error)
    if args.hidden_sentences:
        reports = itertools.chain(reports, hidden.tune(network, opened, few, valid, device, **shared))
    for r in reports:
        writer.add(r.variant)
        rates = " ".join(f"{rate:g}" for rate in r.variant.rates)
        table.append([r.variant.block, rates, r.before, r.after, r.valid_before, r.valid_after, round(r.seconds, 4),
                      r.iterations])
        solving, last = solving + r.seconds, max(last, r.iterations)
        print(f"{len(table):4d}/{len(opened.entries)}  {r.variant.block} at {rates}: error {r.valid_before:.4f} -> "
              f"{r.valid_after:.4f}", file=sys.stderr)
    passes = time.perf_counter() - began - solving - curve.validation
    rows = curve.rows(passes, last)
    if args.attention_steps:
        rows.append([last + args.attention_steps, *(sum(row[i] for row in table) / len(table) for i in (3, 5)),
                     round(solving - sum(row[3] for row in rows[1:]), 4), 0.0])
    return rows, table, (f"{passes:.1f} s of statistics, {solving:.1f} s of solving, {curve.validation:.1f} s of "
                         "validation")


def tune_by_gradient(args, model, opened, writer, device, train, valid, inputs, configurations):
    """Write the variants after gradient descent; `fit` writes the statistics.

    Returns:
        The variants' rows, a summary, and the options, with which the checkpoint is removed.
    """
    from common import distillation, models, training

    network = models.place(model.network, device)
    judge = distillation.BlockReconstruction(network, opened, valid, device)
    before = judge.errors(valid, device)
    if args.solver == "joint":
        objective = distillation.JointTranslation(network, opened, device, configurations, args.seed,
                                                  args.distillation)
    else:
        objective = judge
    options = training.FitOptions.from_args(args, max_grad_norm=1.0 if args.solver == "joint" else None)
    hashes = {role: sha for role, (_, sha, _) in inputs.items()}
    result = training.fit(objective, train, valid, options, device=device, stats=args.stats,
                          fingerprint=training.fingerprint(args, **hashes))
    judge.masked = objective.masked
    after = judge.errors(valid, device)
    table = []
    for variant, b, a in zip(objective.tuned(), before, after, strict=True):
        writer.add(variant)
        rates = " ".join(f"{rate:g}" for rate in variant.rates)
        table.append([variant.block, rates, None, None, b, a, round(result.seconds / len(before), 4), result.steps])
    return table, f"{result.steps} steps in {result.seconds:.1f} s; {result.reason}", options


def check_solver(args) -> None:
    """Refuse flags that the solver would ignore, and check the outputs."""
    if args.attention_error and not args.attention_steps:
        raise cli.UserError("--attention-error says where to take --attention-steps; give their number")
    if args.solver != "joint" and (args.configurations or args.distillation != JOINT_DISTILLATION):
        raise cli.UserError("-c and --distillation say how --solver joint trains; the other solvers tune each variant "
                            "apart")
    if args.solver == "exact":
        if args.resume:
            raise cli.UserError("--resume goes on with a training; the exact solver keeps no checkpoint, leave it out")
        cli.check_outputs(args.overwrite, args.output, args.stats, args.variants)
    else:
        if args.attention_steps or args.hidden_sentences:
            raise cli.UserError(f"--attention-steps and --hidden-sentences belong to --solver exact, not {args.solver}")
        cli.check_training(args, args.variants)


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    cli.check_outputs(True, args.output, args.stats)
    args.variants = args.variants or args.stats.with_suffix(".variants.csv")
    cli.check_inputs(args.model, args.bank)
    check_solver(args)
    if args.configurations:
        cli.check_inputs(args.configurations)
    from common import bank, configs, data, files, models, runtime, training
    from common.provenance import provenance

    device = runtime.setup(args.device, args.seed, args.threads)
    opened, model = bank.load(args.bank), models.load(args.model)
    opened.check_origin(model.identity, args.model)
    inputs = {"model": (args.model, model.identity, model.provenance),
              "bank": (args.bank, opened.sha256, opened.provenance)}
    configurations = options = None
    if args.configurations:
        configurations = configs.read_configurations(args.configurations)
        for configuration in configurations:
            opened.check_serves(configuration)
        inputs["configurations"] = (args.configurations, files.digest(args.configurations.read_bytes()), {})
    with files.locked(args.output, args.stats, args.variants):
        train, valid = data.load_batches(args, model, args.calibration_sentences if args.solver == "exact" else None)
        inputs |= {"training text": data.text_input(args, train), "validation text": data.text_input(args, valid)}
        few = data.load_train(args, model, args.hidden_sentences) if args.hidden_sentences else None
        if few:
            inputs["hidden units' text"] = data.text_input(args, few)
        origin = provenance("block-level_finetuning.py", args, inputs)
        tuned = bank.HIDDEN_UNITS if args.solver == "exact" and args.hidden_sentences else args.solver
        with bank.create(args.output, model.identity, opened.scheme, tuned, origin) as writer:
            if args.solver == "exact":
                rows, table, summary = tune_exactly(args, model, opened, writer, device, train, valid,
                                                    few)
                files.write_bytes(args.stats, training.statistics_csv(rows, training.COLUMNS[:5]))
            else:
                table, summary, options = tune_by_gradient(args, model, opened, writer, device, train,
                                                           valid, inputs, configurations)
            files.write_bytes(args.variants, training.statistics_csv(table, VARIANT_COLUMNS))
        if options:
            training.finish(options)
    before, after = (sum(row[i] for row in table) / len(table) for i in (4, 5))
    print(f"{args.output}: {len(table)} variants; mean relative error on validation text {before:.4f} -> "
          f"{after:.4f}; {summary}")
    print(f"{args.variants}: every variant's errors")
    print(f"next: python model-level_finetuning.py -m {args.model} -p {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
