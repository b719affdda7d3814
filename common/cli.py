"""Command-line pieces every stage shares: flags, value checks, and the one place errors become exit codes."""

import argparse
import contextlib
import errno
import math
import os
import shutil
import signal
import sys
from pathlib import Path

from common.files import Interrupted, UserError

CHECKPOINT = "checkpoint.pth"
SPLIT_HELP = "a folder with train.en, train.de, val.* and the test set, plain or .gz"


def run(main) -> int:
    """Call ``main()`` and turn what users can mend into one message and an exit code.

    0 success; 2 bad input, a full disk, too little memory; 130 and 143 after SIGINT and SIGTERM. Anything
    else is a bug and keeps its traceback.
    """
    prog = Path(sys.argv[0]).name

    def fail(message: str, code: int) -> int:
        # Names out of a foreign file may hold control characters that a terminal obeys.
        shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
        with contextlib.suppress(OSError):  # nobody reads our complaints any more
            print(f"{prog}: {shown}", file=sys.stderr)
        return code

    ending = False  # the first signal, or the end of the work, is told; one that comes then changes nothing

    def stop(signum, frame):
        nonlocal ending
        if not ending:
            ending = True
            word = "interrupted" if signum == signal.SIGINT else "terminated"
            raise Interrupted(f"{word}; no file is left half written", signum)

    before = {}
    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) != signal.SIG_IGN:  # a shell lets its background jobs ignore Ctrl-C
                before[signum] = signal.signal(signum, stop)
        # Arguments go into the provenance, which is UTF-8: notice a bad one before the work, not after it.
        for argument in sys.argv[1:]:
            if not _utf8(argument):
                raise UserError(f"{ascii(argument)}: an argument that is not valid UTF-8")
        code = main()
        with contextlib.suppress(BrokenPipeError):
            if sys.stdout:
                sys.stdout.flush()  # a full disk behind `> file` is found here
        return code
    except UserError as error:
        return fail(f"error: {error}", 2)
    except Interrupted as error:
        ending = True
        return fail(str(error), 128 + error.signum)
    except BrokenPipeError:
        return 141  # the reader of our output left (`… | head`): nobody is there to complain to
    except (MemoryError, RuntimeError) as error:
        # torch's own errors: "can't allocate memory" on the CPU, "CUDA out of memory".
        if isinstance(error, RuntimeError) and not any(s in str(error) for s in ("allocate memory", "out of memory")):
            raise
        return fail("error: not enough memory; a smaller --batch-tokens or --memory-budget needs less", 2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        hint = "; free some space and run again" if error.errno == errno.ENOSPC else ""
        return fail(f"error: {where}{error.strerror or error}{hint}", 2)
    finally:
        ending = True
        _drop_unread()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _drop_unread() -> None:
    """Let text that nobody reads or that finds no space go nowhere, or Python's flush would change the exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's line breaks and appends each flag's default, so that it is written once."""

    def _get_help_string(self, action):
        text = action.help or ""
        hidden = action.default is None or isinstance(action.default, bool) or action.default == argparse.SUPPRESS
        if not hidden and action.option_strings and "default" not in text:
            if isinstance(action.default, (list, tuple)):
                text += " (default: " + " ".join(map(str, action.default)) + ")"
            else:
                text += " (default: %(default)s)"
        return text


def parser(doc: str) -> argparse.ArgumentParser:
    """Return an argument parser whose description is the script's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter)


def _number(text: str, kind: str, convert, good) -> float:
    try:
        value = convert(text)
    except ValueError:
        value = math.nan
    if not good(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {kind}")
    return value


def rate(text: str) -> float:
    """Parse a pruning rate: the fraction removed, in [0, 1)."""
    return _number(text, "a pruning rate in [0, 1)", float, lambda x: 0 <= x < 1)


def positive(text: str) -> float:
    """Parse a finite number above 0."""
    return _number(text, "a number above 0", float, lambda x: 0 < x < math.inf)


def non_negative(text: str) -> float:
    """Parse a finite number of at least 0."""
    return _number(text, "a number of at least 0", float, lambda x: 0 <= x < math.inf)


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _number(text, "a whole number of at least 1", int, lambda x: x >= 1)


def index(text: str) -> int:
    """Parse a whole number of at least 0."""
    return _number(text, "a whole number of at least 0", int, lambda x: 0 <= x < 2**63)


def memory(text: str) -> int:
    """Parse a size of memory such as 512M or 4G into bytes."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    factor = units.get(text[-1:].upper(), 1)
    number = text[:-1] if factor > 1 else text
    size = _number(number, "a size such as 512M or 4G", float, lambda x: 0 < x < 1e18)
    return int(size * factor)


def add_output(p: argparse.ArgumentParser, default: str, what: str, flag: str = "--output") -> None:
    """Add -o and --overwrite."""
    p.add_argument("-o", flag, dest="output", type=Path, default=Path(default), metavar="FILE", help=what)
    add_overwrite(p)


def add_overwrite(p: argparse.ArgumentParser) -> None:
    """Add --overwrite; without it no stage replaces a file."""
    p.add_argument("--overwrite", action="store_true", help="replace outputs that exist (else an error)")


def add_runtime(p: argparse.ArgumentParser) -> None:
    """Add --seed, --device and --threads."""
    p.add_argument("--seed", type=index, default=0, metavar="INT", help="seed of everything that is random")
    p.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N; auto takes "
                   "a GPU if there is one")
    p.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: all cores)")


def add_data(p: argparse.ArgumentParser) -> None:
    """Add the flags that say which text is read; `common.data.DataOptions` takes them from there."""
    g = p.add_argument_group("text")
    g.add_argument("--data", choices=("multi30k", "demo"), default="multi30k",
                   help="multi30k: real captions, downloaded once; demo: the built-in generated corpus")
    g.add_argument("--data-dir", type=Path, default=Path("data/multi30k"), metavar="DIR", help=SPLIT_HELP)
    g.add_argument("--source", default="en", metavar="LANG", help="language translated from")
    g.add_argument("--target", default="de", metavar="LANG", help="language translated to")
    g.add_argument("--test-set", default="test_2016_flickr", metavar="NAME", help="name of the test split")
    g.add_argument("--source-prefix", metavar="TEXT", help="put before each source sentence (default: what "
                   "the model file says, for T5 e.g. 'translate English to German: ')")
    g.add_argument("--max-train-sentences", type=count, metavar="N",
                   help="read only the first N training pairs (default: all)")


def add_composition(p: argparse.ArgumentParser, bank: str) -> None:
    """Add what names one composed model: -m, -p, -c and -n."""
    p.add_argument("-m", "--model", type=Path, default=Path("origin_model.pth"), metavar="MODEL",
                   help="original model file")
    p.add_argument("-p", "--bank", type=Path, default=Path(bank), metavar="BANK", help="bank of variants (.npy)")
    p.add_argument("-c", "--configurations", type=Path, default=Path("conf.json"), metavar="FILE",
                   help="configuration file")
    p.add_argument("-n", "--number", type=index, default=0, metavar="NTH",
                   help="which configuration, counted from 0")
    p.add_argument("--ancestry", action="store_true",
                   help="print how model, bank and configurations were made, and do nothing else")
    g = p.add_argument_group("recalibration")
    g.add_argument("--recalibrate", action="store_true",
                   help="re-fit the composed model's linear weights, layer by layer and without gradients, to the "
                        "inputs they receive in it; masks stay; a model that meets model-level_finetuning.py's "
                        "--target-loss as it is stays as it is")
    g.add_argument("--metric", choices=("output", "loss"), default="output",
                   help="what the fit's errors are weighed with: output: all outputs alike; loss: the gradients of the "
                        "original's loss, better at high pruning rates, for up to a third of the time again")
    add_calibration(g)


def add_calibration(g) -> None:
    """Add the flags of everything that is fitted to the original's activations."""
    g.add_argument("--calibration-sentences", type=count, default=2000, metavar="N",
                   help="training pairs the activations are taken from, drawn by --seed")
    g.add_argument("--damping", type=positive, default=1e-4, metavar="X",
                   help="pull towards the weights before, as a fraction of the inputs' mean square")


def add_memory_budget(g) -> None:
    """Add --memory-budget."""
    g.add_argument("--memory-budget", type=memory, default="4G", metavar="SIZE",
                   help="memory for statistics, e.g. 512M; less memory, more passes, the same result")


def add_batch_tokens(p) -> None:
    """Add --batch-tokens."""
    p.add_argument("--batch-tokens", type=count, default=2048, metavar="N",
                   help="tokens a batch (in training: a step), padding included, of the longer side")


def probability(text: str) -> float:
    """Parse a probability in [0, 1)."""
    return _number(text, "a probability in [0, 1)", float, lambda x: 0 <= x < 1)


def add_regularization(p: argparse.ArgumentParser) -> None:
    """Add --dropout and --label-smoothing."""
    p.add_argument("--dropout", type=probability, metavar="P",
                   help="dropout while training (default: the model's own); 0 makes short trainings shorter")
    p.add_argument("--label-smoothing", type=probability, default=0.0, metavar="P",
                   help="share of each target token's probability that is spread over the vocabulary while training: "
                        "give what the original was trained with; validation losses are without")


def share(text: str) -> float:
    """Parse a share in [0, 1]."""
    return _number(text, "a share in [0, 1]", float, lambda x: 0 <= x <= 1)


def add_distillation(p, default: float) -> None:
    """Add --distillation."""
    p.add_argument("--distillation", type=share, default=default, metavar="SHARE",
                   help="share of each target token's probability that follows the original's distribution while "
                        "training, the rest being the text's token; keeps what the original learned with label "
                        "smoothing, for about 1.4 times the time a step; validation losses are without")


def add_training(p: argparse.ArgumentParser, *, epochs: int, lr: float, stats: str) -> None:
    """Add the flags of the one training loop, the same for the three fine-tuning stages."""
    p.add_argument("--stats", type=Path, default=Path(stats), metavar="CSV",
                   help="training statistics, one row an evaluation; plot_loss.py draws them")
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=count, default=epochs, metavar="N", help="passes over the training text")
    g.add_argument("--lr", type=positive, default=lr, metavar="X", help="AdamW's learning rate")
    g.add_argument("--schedule", choices=("constant", "linear"), default="constant",
                   help="learning rate after the warm-up: constant, or falling linearly to 0")
    g.add_argument("--warmup", type=index, default=0, metavar="STEPS",
                   help="steps in which the learning rate rises linearly from 0")
    g.add_argument("--embedding-lr-factor", type=positive, default=1.0, metavar="X",
                   help="times the learning rate for embeddings; about 6 when training from scratch")
    g.add_argument("--weight-decay", type=non_negative, default=0.01, metavar="X", help="AdamW's weight decay")
    add_batch_tokens(g)
    g.add_argument("--early-stop", type=positive, metavar="EPOCHS",
                   help="stop after so many epochs without a better validation loss (default: never)")
    g.add_argument("--target-loss", type=positive, metavar="X",
                   help="stop as soon as the validation loss is at or below X")
    g.add_argument("--eval-every", type=count, metavar="STEPS",
                   help="steps between two validations (default: once an epoch)")
    g.add_argument("--checkpoint-dir", type=Path, metavar="DIR",
                   help="where an interrupted run leaves its state (default: OUTPUT.checkpoint)")
    g.add_argument("--checkpoint-every", type=count, metavar="STEPS",
                   help="steps between two checkpoints; 1: even a killed run loses only the step under way (default: "
                        "so often that writing takes about 5 %% of the time)")
    g.add_argument("--resume", action="store_true", help="go on from the checkpoint of an interrupted run")


def check_inputs(*paths: Path) -> None:
    """Raise `UserError` naming every path that is not a readable, non-empty file."""
    from common.files import file_problem

    problems = [p for p in map(file_problem, paths) if p]
    if problems:
        raise UserError("; ".join(problems))


def check_composition(args) -> None:
    """Check the flags of `add_composition` against each other, and that the files are there."""
    check_inputs(args.model, args.bank, args.configurations)
    if args.metric != "output" and not args.recalibrate:
        raise UserError(f"--metric {args.metric} says how --recalibrate weighs errors; add that")


def checkpoint_folder(args) -> Path:
    """Return where a fine-tuning stage keeps its checkpoint."""
    return args.checkpoint_dir or args.output.with_name(args.output.name + ".checkpoint")


def check_training(args, *more: Path) -> None:
    """Check a fine-tuning stage's outputs; an interrupted run's tables may be there for --resume."""
    check_outputs(args.overwrite, args.output)
    check_outputs(True, args.output, args.stats, *more)
    folder = checkpoint_folder(args)
    started = (folder / CHECKPOINT).exists()
    check_outputs(args.overwrite or (args.resume and started), args.stats, *more)
    if not folder.resolve().name or folder.resolve() in [p.resolve() for p in (args.output, args.stats, *more)]:
        raise UserError(f"--checkpoint-dir {folder}: must be a folder of its own")
    if started and not (args.resume or args.overwrite):
        raise UserError(f"{folder}: holds the checkpoint of an interrupted run; add --resume to go on with it, or "
                        "--overwrite to start anew")


def check_outputs(overwrite: bool, *paths: Path | None) -> None:
    """Raise `UserError` if a path exists and must not, or cannot be written, before any work is done."""
    paths = [p for p in paths if p is not None]
    real = [os.path.realpath(p) for p in paths]
    if len(set(real)) < len(real):
        raise UserError("two outputs have the same name: " + ", ".join(map(str, paths)))
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, a file name is needed")
        if path.exists() and not overwrite:
            raise UserError(f"{path}: exists already; choose another name or add --overwrite")
        folder = path.parent
        if not folder.exists():
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise UserError(f"{folder}: cannot be created: {error.strerror}") from None
        if not folder.is_dir():
            raise UserError(f"{folder}: is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK) or shutil.disk_usage(folder).free == 0:
            raise UserError(f"{folder}: nothing can be written there")
