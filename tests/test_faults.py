"""Faults of the machine around a run: disk, memory, folders, signals, readers that leave, a second run."""

import contextlib
import gzip
import os
import resource
import shutil
import signal
import sys

import pytest
import torch

from common import data, files, models, training
from common.files import Interrupted, UserError
from tests.test_errors import INPUTS, OUTPUTS, TEXT, check

TRAIN = ["-m", "pruned.pth", "-o", "out.pth", "--stats", "out.csv", "--epochs", "2", "--eval-every", "2", *TEXT]


@contextlib.contextmanager
def full_disk(limit: int):
    """A file-size limit stands for the full disk: a write fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail_second(monkeypatch, name: str, limit: int) -> None:
    """Fill the disk during the second call of ``training.name``."""
    write, calls = getattr(training, name), []

    def limited(*arguments):
        calls.append(1)
        with full_disk(limit) if len(calls) == 2 else contextlib.nullcontext():
            write(*arguments)

    monkeypatch.setattr(training, name, limited)


@pytest.fixture
def here(work, monkeypatch):
    monkeypatch.chdir(work)
    return work


def test_a_disk_that_fills_during_a_checkpoint_leaves_the_one_before(here, stage, monkeypatch):
    fail_second(monkeypatch, "save_sealed", 20_000)
    check(stage("baseline_finetuning", *TRAIN), "out.pth.checkpoint/checkpoint.pth: File too large")
    folder = here / "out.pth.checkpoint"
    assert models.load_sealed(folder / "checkpoint.pth", "a checkpoint")["state"]["step"] == 0
    assert os.listdir(folder) == ["checkpoint.pth"] and not (here / "out.pth").exists()


def test_a_disk_that_fills_during_the_statistics_leaves_the_ones_before(here, stage, monkeypatch):
    fail_second(monkeypatch, "write_bytes", 60)
    check(stage("baseline_finetuning", *TRAIN), "out.csv: File too large")
    assert len((here / "out.csv").read_text().splitlines()) == 2 and not list(here.glob(".*"))


@pytest.mark.parametrize("name", ["prune", "block-level_finetuning"])
def test_a_disk_that_fills_during_a_bank_leaves_the_old_one(here, stage, name):
    arguments, roles = INPUTS[name]
    (here / "out.npy").write_text("precious")
    with full_disk(20_000):
        check(stage(name, *[a.format(**roles) for a in arguments], "-o", "out.npy", "--overwrite"),
              "out.npy: File too large")
    assert (here / "out.npy").read_text() == "precious" and not list(here.glob(".*"))


def test_an_output_folder_that_vanishes_is_named(here, stage, monkeypatch):
    step = training._Run._step

    def vanish(self, *arguments):
        shutil.rmtree(here / "deep", ignore_errors=True)
        return step(self, *arguments)

    monkeypatch.setattr(training._Run, "_step", vanish)
    check(stage("baseline_finetuning", *TRAIN, "-o", "deep/out.pth", "--stats", "deep/out.csv"),
          "deep/out.csv: No such file or directory")


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_read_only_folder(here, stage, monkeypatch, name):
    """Root may write anywhere, so the question is answered for it."""
    arguments, roles = INPUTS[name]
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    check(stage(name, *[a.format(**roles) for a in arguments], "-o", f"deep/{OUTPUTS[name]}"),
          "deep: nothing can be written there")


@pytest.mark.parametrize("name", OUTPUTS)
def test_two_runs_cannot_write_one_output(here, stage, name):
    arguments, roles = INPUTS[name]
    with files.locked(here / OUTPUTS[name]):
        check(stage(name, *[a.format(**roles) for a in arguments], "-o", OUTPUTS[name]),
              f"{OUTPUTS[name]}: another run is writing it; wait for that one or choose another output")
    assert not (here / OUTPUTS[name]).exists()


def test_too_little_memory_is_said_before_the_first_step(here, stage, monkeypatch):
    monkeypatch.setattr(training, "available_memory", lambda: 500_000)
    check(stage("baseline_finetuning", *TRAIN), "GB of memory (gradients, AdamW's state and the best weights included)"
          ", 0.00 GB are available")
    assert not (here / "out.csv").exists() and not (here / "out.pth.checkpoint").exists()


def test_training_takes_five_numbers_a_weight(monkeypatch):
    monkeypatch.setattr(training, "available_memory", lambda: 5 * 4 * 100)
    training.check_memory(torch.nn.Linear(10, 10, bias=False), "cpu")
    with pytest.raises(UserError, match="takes at least"):
        training.check_memory(torch.nn.Linear(101, 1, bias=False), "cpu")


def test_weights_that_are_not_trained_take_no_training_memory(monkeypatch):
    monkeypatch.setattr(training, "available_memory", lambda: 0)
    training.check_memory(torch.nn.Linear(10, 10).requires_grad_(False), "cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_available_memory_is_part_of_the_machines():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0.001 * total < training.available_memory() <= total


def test_memory_that_runs_out_later_is_no_traceback(stage, here, monkeypatch):
    """torch's own error of its CPU allocator, which is a RuntimeError."""
    monkeypatch.setattr(training, "load_batches", lambda *a: torch.empty(1 << 50))
    check(stage("baseline_finetuning", *TRAIN), "error: not enough memory; a smaller --batch-tokens")


@pytest.fixture
def unread(monkeypatch):
    """A stderr whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(OSError), open(writer, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        yield


def test_ctrl_c_with_a_pager_that_it_ended_too_still_writes_the_checkpoint(here, stage, monkeypatch, unread):
    step = training._Run._step

    def kill(self, *arguments):
        step(self, *arguments)
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training._Run, "_step", kill)
    assert stage("baseline_finetuning", *TRAIN).code == 130
    path = here / "out.pth.checkpoint" / "checkpoint.pth"
    assert models.load_sealed(path, "a checkpoint")["state"]["step"] == 3


@pytest.mark.parametrize("error", [Interrupted("stop", 15), KeyboardInterrupt(), OSError(28, "full")])
def test_what_stops_torch_in_the_middle_of_a_write_is_told_as_it_is(tmp_path, monkeypatch, error):
    """Left alone, torch.save makes a RuntimeError about its zip file of it."""
    class File:
        calls = 0

        def write(self, data):
            File.calls += 1
            if File.calls == 3:
                raise error
            return len(data)

        def flush(self):
            pass

    monkeypatch.setattr(models, "atomic_write", lambda path: contextlib.nullcontext(File()))
    with pytest.raises(type(error)) as caught:
        models.save_sealed(tmp_path / "a.pth", {"weights": torch.zeros(1000)})
    assert caught.value is error


def test_a_signal_while_a_file_is_read_is_not_taken_for_a_damaged_file(made, monkeypatch):
    def load(*arguments, **options):
        raise Interrupted("stop", 15)

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(Interrupted):
        models.load(made / "origin.pth")


def test_a_run_is_not_resumed_on_other_text(here, stage, monkeypatch):
    monkeypatch.setattr(training, "finish", lambda options: None)
    assert stage("baseline_finetuning", *TRAIN).code == 0
    for language in ("en", "de"):
        path = here / "text" / f"train.{language}"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
    check(stage("baseline_finetuning", *TRAIN, "--resume", "--overwrite"), "is of another run", "training text: check")


@pytest.mark.parametrize("argument", ["\udcff.pth", "a\udc80b"])
def test_an_argument_that_is_not_utf8_is_refused_before_the_work(here, stage, argument):
    check(stage("compose_model", "-o", argument), "an argument that is not valid UTF-8")


def test_control_characters_out_of_a_name_do_not_reach_the_terminal(stage, tmp_path):
    result = stage("evaluate", "-m", tmp_path / "\x1b[31mred\x07.pth")
    check(result, r"\x1b[31mred\x07.pth: no such file")
    assert "\x1b" not in result.err and "\x07" not in result.err


def test_figures_that_are_not_finite_are_not_written_as_json(tmp_path):
    with pytest.raises(UserError, match="s.json: not written, for JSON has no word for a number that is not finite"):
        files.write_json(tmp_path / "s.json", [{"loss": float("nan")}])
    assert not list(tmp_path.iterdir())


def test_a_gzip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_UNPACKED", 1 << 20)
    for language in ("en", "de"):
        (tmp_path / f"train.{language}.gz").write_bytes(gzip.compress(b"\n" * (2 << 20)))
    options = data.DataOptions("multi30k", tmp_path, "en", "de", "test")
    with pytest.raises(UserError, match=r"train.en.gz: more than 1 MiB of text out of 2,\d\d\d packed bytes"):
        data.read_pairs(options, "train")


def test_a_tokenizer_that_fails_on_the_text_is_named(made):
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram

    model = models.load(made / "origin.pth")
    model.tokenizer_json = Tokenizer(Unigram([("a", -1.0)])).to_str()  # no unknown token
    with pytest.raises(UserError, match="the model's tokenizer cannot read the text"):
        data.Batches([("zzz", "a")], model, 100)
