"""Command-line pieces every stage shares: flags, value checks, and the one place errors become exit codes.

Only stage scripts import this; what lies below gets values and small dataclasses, never a namespace.
"""

import argparse
import contextlib
import dataclasses
import errno
import math
import os
import shlex
import signal
import sys
from pathlib import Path

from common import distributed, runtime  # noqa: F401 - its import sets OpenMP's waiting, before torch is imported
from common.errors import Interrupted, UserError
from common.files.atomic import check_outputs, locked


def run(main) -> int:
    """Call ``main()`` and turn what users can mend into one message and an exit code.

    0 success; 2 bad input, a full disk, too little memory; 130 and 143 after SIGINT and SIGTERM. Anything
    else is a bug and keeps its traceback. Of several processes one speaks.
    """
    _utf8_mode()
    prog = Path(sys.argv[0]).name

    def fail(message: str, code: int) -> int:
        # Names out of a foreign file may hold control characters that a terminal obeys.
        nonlocal ending
        ending = True
        message = distributed.tell_once(message)
        if message is not None:
            shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
            with contextlib.suppress(OSError):  # nobody reads our complaints any more
                print(f"{prog}: {shown}", file=sys.stderr)
        return code

    ending = False  # the first signal, or the end of the work, is reported; one that comes then changes nothing

    def stop(signum, frame):
        nonlocal ending
        if not ending:
            ending = True
            word = "interrupted" if signum == signal.SIGINT else "terminated"
            raise Interrupted(f"{word}; no file is left half written", signum)

    before = {}
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if hasattr(stream, "reconfigure"):  # a character that the terminal lacks must not end the work
            stream.reconfigure(errors="backslashreplace")
    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) != signal.SIG_IGN:  # a shell lets its background jobs ignore Ctrl-C
                before[signum] = signal.signal(signum, stop)
        # Arguments go into the provenance, which is UTF-8: notice a bad one before the work, not after it.
        for argument in sys.argv[1:]:
            if not _utf8(argument):
                raise UserError(f"{ascii(argument)}: an argument that is not valid UTF-8")
        if distributed.finished():
            return 0
        with distributed.silence():
            code = main()
        distributed.finish()
        distributed.stop()
        with contextlib.suppress(BrokenPipeError):
            if sys.stdout:
                sys.stdout.flush()  # a full disk behind `> file` is found here
        return code
    except UserError as error:
        return fail(f"error: {error}", 2)
    except Interrupted as error:
        return fail(str(error), 128 + error.signum)
    except BrokenPipeError:
        return 141  # the reader of our output left (`… | head`): nobody is there to complain to
    except (MemoryError, RuntimeError) as error:
        # torch's own errors: "can't allocate memory" on the CPU, "CUDA out of memory".
        if isinstance(error, RuntimeError) and not any(s in str(error) for s in ("allocate memory", "out of memory")):
            raise
        return fail("error: not enough memory; a smaller --batch-tokens, fewer --max-train-sentences or a smaller "
                    "--num-beams need less, where the stage has them", 2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        hint = "; free some space and run again" if error.errno == errno.ENOSPC else ""
        return fail(f"error: {where}{error.strerror or error}{hint}", 2)
    finally:
        ending = True
        _drop_unread()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _utf8_mode() -> None:
    """Start this process anew in Python's UTF-8 mode where names are decoded otherwise; the terminal's encoding stays.

    In an ASCII or Latin-1 locale the name "ü.pth" becomes a text that torch and safetensors, which know UTF-8 alone,
    look for in vain, and that no file can hold.
    """
    if sys.getfilesystemencoding() != "utf-8" and "utf8" not in sys._xoptions:
        encoding = os.environ.get("PYTHONIOENCODING") or getattr(sys.stdout, "encoding", None) or "ascii"
        os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]],
                  os.environ | {"PYTHONIOENCODING": encoding})


def _utf8(argument: str) -> bool:
    """Tell whether an argument's bytes are UTF-8, whatever the terminal's encoding."""
    try:
        os.fsencode(argument).decode()
    except UnicodeError:
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

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30)

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
    return argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, usage="%(prog)s [options]")


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


def rate_or_all(text: str) -> float:
    """Parse a pruning rate of whole heads or units: the fraction removed, in [0, 1]; 1 skips the sub-layer."""
    return _number(text, "a pruning rate in [0, 1]", float, lambda x: 0 <= x <= 1)


def positive(text: str) -> float:
    """Parse a finite number above 0."""
    return _number(text, "a number above 0", float, lambda x: 0 < x < math.inf)


def factor(text: str) -> float:
    """Parse a finite number of at least 1."""
    return _number(text, "a number of at least 1", float, lambda x: 1 <= x < math.inf)


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _number(text, "a whole number of at least 1", int, lambda x: x >= 1)


def index(text: str) -> int:
    """Parse a whole number of at least 0."""
    return _number(text, "a whole number of at least 0", int, lambda x: 0 <= x < 2**63)


def probability(text: str) -> float:
    """Parse a probability in [0, 1)."""
    return _number(text, "a probability in [0, 1)", float, lambda x: 0 <= x < 1)


def language(text: str) -> str:
    """Parse a language: a part of the names of text files."""
    from common.text.corpus import LANGUAGE

    if not LANGUAGE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a language such as en")
    return text


def corpus_folder(text: str) -> Path:
    """Parse --data: a name that stands for a folder, or a folder."""
    from common.text import corpus

    return {"multi30k": corpus.MULTI30K, "demo": corpus.DEMO}.get(text) or Path(text)


def add_output(p: argparse.ArgumentParser, default: str, what: str) -> None:
    """Add -o and --overwrite; without the latter no stage replaces a file."""
    p.add_argument("-o", "--output", type=Path, default=Path(default), metavar="FILE", help=what)
    p.add_argument("--overwrite", action="store_true", help="replace outputs that exist (else an error)")


def add_model(p, default: str = "origin_model.pth", what: str = "original model file") -> None:
    """Add -m."""
    p.add_argument("-m", "--model", type=Path, default=Path(default), metavar="MODEL", help=what)


def add_data(p, limit: bool = True) -> None:
    """Add --data, and --max-train-sentences for stages that read all training pairs."""
    p.add_argument("--data", "--data-dir", type=corpus_folder, default="multi30k", metavar="DIR",
                   help="text: multi30k (downloaded once), demo, or a folder with train.en, train.de, val.*, ….gz")
    if limit:
        p.add_argument("--max-train-sentences", type=count, metavar="N",
                       help="read only the first N training pairs (default: all)")


def add_seed(p) -> None:
    """Add --seed."""
    p.add_argument("--seed", type=index, default=0, metavar="INT", help="seed of everything that is random")


def add_device(p) -> None:
    """Add --device."""
    p.add_argument("--device", default="auto", metavar="NAME",
                   help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one")


def add_plan(p) -> None:
    """Add --plan."""
    p.add_argument("--plan", action="store_true",
                   help="print weights, disk, memory and operations that it will take, and end")


def add_composition(p, bank: str) -> None:
    """Add what names one composed model: -m, -p, -c, -n and --no-recalibration."""
    add_model(p)
    p.add_argument("-p", "--bank", type=Path, default=Path(bank), metavar="BANK", help="bank of variants (.npy)")
    p.add_argument("-c", "--configurations", type=Path, default=Path("conf.json"), metavar="FILE",
                   help="configuration file")
    p.add_argument("-n", "--number", type=index, default=0, metavar="NTH",
                   help="which configuration, counted from 0")
    p.add_argument("--no-recalibration", action="store_true",
                   help="leave out the sweep that re-fits a tuned bank's modules to each other")


def add_passes(p: argparse.ArgumentParser, *, epochs: int, lr: float, stats: str):
    """Add what all training needs, --stats, --epochs, --lr and --resume; return the group of the latter three."""
    p.add_argument("--stats", type=Path, default=Path(stats), metavar="CSV",
                   help="statistics, one row an evaluation; plot_loss.py draws them")
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=count, default=epochs, metavar="N", help="passes over the training text")
    g.add_argument("--lr", type=positive, default=lr, metavar="X", help="learning rate, falling to 0")
    g.add_argument("--resume", action="store_true", help="go on from the checkpoint of an interrupted run")
    return g


def add_training(p: argparse.ArgumentParser, *, epochs: int, lr: float, stats: str) -> None:
    """Add the flags of the two stages that train complete models; `fit_options` reads them."""
    g = add_passes(p, epochs=epochs, lr=lr, stats=stats)
    g.add_argument("--batch-tokens", type=count, default=1024, metavar="N",
                   help="tokens a step, padding included, of the longer side")
    g.add_argument("--eval-every", type=count, metavar="STEPS",
                   help="steps between two validations (default: once an epoch)")
    g.add_argument("--target-loss", type=positive, metavar="X",
                   help="stop as soon as the validation loss is at or below X")
    g.add_argument("--dropout", type=probability, metavar="P",
                   help="dropout while training (default: the model's own); 0 makes short trainings shorter")


def fit_options(args, **changes):
    """Return the `common.training.loop.FitOptions` that the flags of `add_training` name."""
    from common.training.loop import FitOptions

    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(FitOptions) if hasattr(args, f.name)}
    return FitOptions(**given | {"resume": resumes(args)}, checkpoint=checkpoint_folder(args), **changes)


def resumes(args) -> bool:
    """Tell whether a training goes on from its checkpoint: if asked to, or after a restart by torchrun."""
    return args.resume or distributed.restarted()


def corpus(args, model):
    """Return the `common.text.corpus.Corpus` that the flags of `add_data` and the model's languages name."""
    from common.text.corpus import Corpus

    return Corpus(args.data, model.source, model.target, getattr(args, "max_train_sentences", None))


def checkpoint_folder(args) -> Path:
    """Return where a fine-tuning stage keeps its checkpoint."""
    return args.output.with_name(args.output.name + ".checkpoint")


@contextlib.contextmanager
def training_outputs(args, *more: Path):
    """As `common.files.atomic.outputs` for a fine-tuning stage; the statistics of an interrupted run may be there.

    Raises:
        UserError: also if there is the checkpoint of an interrupted run, and neither --resume nor --overwrite.
    """
    folder = checkpoint_folder(args)

    def check():
        if not distributed.first():
            return
        started = (folder / "checkpoint.pth").exists()
        check_outputs(args.overwrite, args.output)
        check_outputs(True, args.output, args.stats, *more)
        check_outputs(args.overwrite or (resumes(args) and started), args.stats, *more)
        if started and not (resumes(args) or args.overwrite):
            raise UserError(f"{folder}: holds the checkpoint of an interrupted run; add --resume to go on with it, or "
                            "--overwrite to start anew")

    check()
    with locked(args.output, args.stats, *more):
        check()
        yield


def next_step(*commands: tuple) -> None:
    """Print what to run next: each command is a script and its arguments, quoted where a shell needs it."""
    print("next: " + "; ".join("python " + shlex.join(map(str, command)) for command in commands))
