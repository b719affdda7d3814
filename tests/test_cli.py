"""Flags, exit codes, signals, and terminals that are not UTF-8."""

import argparse
import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common import cli
from common.errors import Interrupted, UserError
from tests.small import DATA, ROOT, STAGES, load_stage


def flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return what a parser lists, -h aside."""
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


@pytest.fixture(scope="module")
def parsers():
    return {name: load_stage(name).build_parser() for name in STAGES}


def test_there_are_ten_stages_and_at_most_110_flags(parsers):
    assert {f"{name}.py" for name in STAGES} <= {path.name for path in ROOT.glob("*.py")}
    assert 90 < sum(len(flags(parser)) for parser in parsers.values()) <= 110


@pytest.mark.parametrize("name", STAGES)
def test_a_help_fits_on_one_screen_and_says_each_default(parsers, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "120")
    text = " ".join(parsers[name].format_help().split())
    monkeypatch.setenv("COLUMNS", "80")
    assert len(parsers[name].format_help().splitlines()) <= 50
    for action in flags(parsers[name]):
        assert action.help
        if action.default not in (None, False, []) and action.option_strings:
            shown = action.default if isinstance(action.default, list) else [action.default]
            assert f"(default: {' '.join(map(str, shown))})" in text, action.dest


@pytest.mark.parametrize(("convert", "good", "bad"), [
    (cli.rate, ["0", "0.99"], ["1", "-0.1", "nan", "x"]), (cli.positive, ["1e6"], ["0", "inf", "nan"]),
    (cli.count, ["1"], ["0", "1.5"]), (cli.index, ["0", str(2**63 - 1)], ["-1", str(2**63)]),
    (cli.probability, ["0"], ["1", "x"]), (cli.language, ["pt_BR"], ["", "../x", "a b"])])
def test_values_are_checked_and_named(convert, good, bad):
    for text in good:
        assert str(convert(text)) in (text, str(float(text)) if text[0].isdigit() else text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text!r} is not "):
            convert(text)


def test_next_steps_can_be_pasted(capsys):
    cli.next_step(("a.py", "-m", Path("my models/it's.pth")), ("b.py", "$x"))
    assert [shlex.split(command) for command in capsys.readouterr().out.removeprefix("next: ").split("; ")] == [
        ["python", "a.py", "-m", "my models/it's.pth"], ["python", "b.py", "$x"]]


def run(monkeypatch, main, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["stage.py", *arguments])
    return cli.run(main)


def fail(error):
    raise error


@pytest.mark.parametrize(("error", "code", "message"), [
    (UserError("bad"), 2, "stage.py: error: bad\n"), (Interrupted("stopped", 15), 143, "stage.py: stopped\n"),
    (OSError(28, "No space left on device", "x.pth"), 2, "error: x.pth: No space left on device; free some space and"),
    (MemoryError(), 2, "error: not enough memory; a smaller --batch-tokens"), (BrokenPipeError(), 141, ""),
    (RuntimeError("CUDA out of memory"), 2, "error: not enough memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: not enough memory"),
    (UserError("\x1b[31mred\x07"), 2, r"error: \x1b[31mred\x07")])
def test_what_users_can_mend_is_one_message_and_an_exit_code(monkeypatch, capsys, error, code, message):
    assert run(monkeypatch, lambda: fail(error)) == code
    told = capsys.readouterr().err
    assert message in told and told.count("\n") <= 1 and "\x1b" not in told
    with pytest.raises(KeyError):  # a bug keeps its traceback
        run(monkeypatch, lambda: fail(KeyError("x")))


@pytest.mark.parametrize("argument", ["\udcff.pth", "a\udc80b"])
def test_an_argument_that_is_not_utf8_is_refused_before_the_work(monkeypatch, capsys, argument):
    assert run(monkeypatch, None, "-o", argument) == 2
    assert "an argument that is not valid UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(("signum", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_is_one_message_and_its_exit_code_also_when_another_follows(monkeypatch, signum, word):
    class Stream(io.StringIO):
        def write(self, text):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().write(text)

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    assert run(monkeypatch, lambda: os.kill(os.getpid(), signum) or signal.pause()) == 128 + signum
    assert stream.getvalue() == f"stage.py: {word}; no file is left half written\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_when_all_is_done_changes_nothing(monkeypatch, signum):
    monkeypatch.setattr(cli, "_drop_unread", lambda: os.kill(os.getpid(), signum))
    assert run(monkeypatch, lambda: 0) == 0


def training(folder, *more):
    parser = cli.parser("")
    cli.add_output(parser, str(folder / "out.pth"), "")
    cli.add_training(parser, epochs=1, lr=1.0, stats=str(folder / "s.csv"))
    return parser.parse_args(more)


def test_the_outputs_of_training_are_checked_again_under_the_lock(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def late(*paths):
        (tmp_path / "s.csv").write_text("fresh")
        yield

    monkeypatch.setattr(cli, "locked", late)
    with pytest.raises(UserError, match="s.csv: exists already"), cli.training_outputs(training(tmp_path)):
        raise AssertionError("the work began")
    with cli.training_outputs(training(tmp_path, "--overwrite")):
        pass


CHAIN = """import sys
from tests.small import load_stage
from common import cli
def main():
    for name, *arguments in COMMANDS:
        assert load_stage(name).main(arguments) == 0, name
    return 0
sys.exit(cli.run(main))
"""


@pytest.mark.parametrize(("terminal", "stages"), [
    ({"PYTHONIOENCODING": "ascii"}, 2), ({"LC_ALL": "C", "PYTHONUTF8": "0"}, 5)])
def test_a_terminal_that_is_not_utf8_ends_nothing(work, terminal, stages):
    """With umlauts in the names of files that torch, NumPy and the stages open, in a prefix and in every message."""
    (work / "hub").rename(work / "hüb")
    commands = [["download_model", "-m", "hüb", "-o", "ö.pth", "--source-prefix", "ü: "],
                ["config_generator", "-m", "ö.pth", "-o", "cö.json", "-n", "1"],
                ["prune_scheme_generator", "-i", "cö.json", "-o", "sö.json"],
                ["prune", "-m", "ö.pth", "-c", "sö.json", "-o", "pö.npy", "-p", "tö.pth"],
                ["model-level_finetuning", "-m", "ö.pth", "-p", "pö.npy", "-c", "cö.json", "-o", "mö.pth", "--stats",
                 "mö.csv", "--epochs", "1", *DATA]][:stages]
    script = work / "chäin.py"
    script.write_text(CHAIN.replace("COMMANDS", repr(commands)), encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "ignore", script, "ä"], cwd=work, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)} | terminal)
    assert done.returncode == 0, done.stderr.decode()
    assert rb"prefix '\xfc: '" in done.stdout and rb"'c\xf6.json'" in done.stdout
    assert ({"cö.json"} if stages == 2 else {"tö.pth", "mö.pth", "mö.csv"}) <= {p.name for p in work.iterdir()}


@pytest.mark.parametrize(("name", "more"), [("block-level_finetuning", ["--help"]), ("prune", ["-c", "nicht da ß"])])
def test_help_and_errors_reach_an_ascii_terminal(name, more):
    done = subprocess.run([sys.executable, ROOT / f"{name}.py", *more], capture_output=True, text=True,
                          env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"})
    assert (r"E|y|\xb2" in done.stdout) if "--help" in more else (r"nicht da \xdf: no such file" in done.stderr)
    assert done.returncode == (0 if "--help" in more else 2) and "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("to", "code"), [("> /dev/full", 2), (">&-", 0)])
def test_output_that_cannot_be_written_is_no_traceback(made, tmp_path, to, code):
    done = subprocess.run(f"{sys.executable} {ROOT}/prune_scheme_generator.py -i {made}/conf.json -o {tmp_path}/s.json "
                          + to, shell=True, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr and (tmp_path / "s.json").exists()
