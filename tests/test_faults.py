"""Faults of the machine around a run: disk, memory, folders, signals, readers that leave, a second run."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from common import bank, checkpoints, cli, configs, data, files, models, training
from common.files import Interrupted, UserError
from tests.test_errors import INPUTS, OUTPUTS, TEXT, check

ARGUMENTS = {name: [a.format(**roles) for a in arguments] for name, (arguments, roles) in INPUTS.items()} | {
    "download_model": ["-m", "hub"]}
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


def fail_second(monkeypatch, module, name: str, limit: int) -> None:
    """Fill the disk during the second call of ``module.name``."""
    write, calls = getattr(module, name), []

    def limited(*arguments):
        calls.append(1)
        with full_disk(limit) if len(calls) == 2 else contextlib.nullcontext():
            write(*arguments)

    monkeypatch.setattr(module, name, limited)


@pytest.fixture
def here(work, monkeypatch):
    monkeypatch.chdir(work)
    return work


def test_a_disk_that_fills_during_a_checkpoint_leaves_the_one_before(here, stage, monkeypatch):
    fail_second(monkeypatch, checkpoints, "save_sealed", 20_000)
    check(stage("baseline_finetuning", *TRAIN), "out.pth.checkpoint/checkpoint.pth: File too large")
    folder = here / "out.pth.checkpoint"
    assert models.load_sealed(folder / "checkpoint.pth", "a checkpoint")["state"]["step"] == 0
    assert os.listdir(folder) == ["checkpoint.pth"] and not (here / "out.pth").exists()


def test_a_disk_that_fills_during_the_statistics_leaves_the_ones_before(here, stage, monkeypatch):
    fail_second(monkeypatch, training, "write_bytes", 60)
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
          "deep/out.pth.checkpoint/checkpoint.pth: No such file or directory")


def test_an_output_folder_that_vanishes_during_the_work_is_named(here, stage, monkeypatch):
    save = models.save

    def vanish(*arguments):
        shutil.rmtree(here / "deep")
        save(*arguments)

    monkeypatch.setattr(models, "save", vanish)
    check(stage("compose_model", *ARGUMENTS["compose_model"], "-o", "deep/out.pth"),
          "deep/out.pth: No such file or directory")


@pytest.fixture
def nobody():
    """For root no folder is read-only: be nobody for a while. Relative paths need no way there from /."""
    if os.getuid() == 0:
        os.setresuid(65534, 65534, 0)
        yield
        os.setresuid(0, 0, 0)
    else:
        yield


@pytest.fixture
def read_only(here):
    here.chmod(0o755)
    (here / "deep").mkdir()
    (here / "deep").chmod(0o555)
    return here / "deep"


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_read_only_folder(read_only, nobody, stage, name):
    check(stage(name, *ARGUMENTS[name], "-o", f"deep/{OUTPUTS[name]}"), "deep: nothing can be written there")


@pytest.mark.parametrize(("flag", "name"), [("--stats", "deep/s.csv"), ("--checkpoint-dir", "deep/cp")])
def test_a_read_only_folder_for_what_training_leaves(read_only, here, stage, flag, name, request):
    here.chmod(0o777)
    request.getfixturevalue("nobody")
    check(stage("baseline_finetuning", *ARGUMENTS["baseline_finetuning"], "--stats", "s.csv", "-o", "o.pth", flag,
                name), "deep")


@pytest.mark.parametrize(("name", "flag", "output"), [
    *[(name, "-o", output) for name, output in OUTPUTS.items()], ("download_model", "-o", "out.pth"),
    ("evaluate", "--json", "out.json"), ("prune", "-p", "test.pth"), ("baseline_finetuning", "--stats", "s.csv"),
    ("model-level_finetuning", "--stats", "s.csv"), ("block-level_finetuning", "--stats", "s.csv"),
    ("block-level_finetuning", "--variants", "v.csv"), ("plot_loss", "-o", "loss.png")])
def test_two_runs_cannot_write_one_output(here, stage, name, flag, output):
    with files.locked(here / output):
        check(stage(name, *ARGUMENTS[name], flag, output),
              f"{output}: another run is writing it; wait for that one or choose another output")
    assert not (here / output).exists()


@pytest.mark.parametrize("name", ["baseline_finetuning", "model-level_finetuning", "block-level_finetuning"])
def test_two_runs_cannot_share_a_checkpoint_folder(here, stage, name):
    (here / "cp").mkdir()
    more = ["--solver", "adamw"] if name.startswith("block") else []
    with files.locked(here / "cp"):
        check(stage(name, *ARGUMENTS[name], *more, "-o", "out.x", "--checkpoint-dir", "cp"),
              "cp: another run is writing it")
    assert not list((here / "cp").iterdir()) and not (here / "out.x").exists()


@pytest.mark.parametrize("name", [*OUTPUTS, "evaluate", "plot_loss", "download_model"])
def test_nothing_gets_its_name_but_by_a_rename(here, stage, monkeypatch, name):
    def fail(old, new):
        raise OSError(28, "No space left on device", str(new))

    before = sorted(os.listdir(here))
    monkeypatch.setattr(os, "replace", fail)
    more = {"evaluate": ["--json", "out.json"]}.get(name) or ["-o", OUTPUTS.get(name) or "out.png"]
    check(stage(name, *ARGUMENTS[name], *more), "No space left on device; free some space and run again")
    assert [n for n in sorted(os.listdir(here)) if not n.endswith(".checkpoint")] == before


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []

    def note(name):
        original = getattr(os, name)

        def noted(*arguments):
            if name == "fsync":
                calls.append(("fsync", os.readlink(f"/proc/self/fd/{arguments[0]}")))
            else:
                calls.append((name, *map(str, arguments)))
            return original(*arguments)
        monkeypatch.setattr(os, name, noted)

    note("fsync")
    note("replace")
    files.write_bytes(tmp_path / "a.json", b"x")
    temporary = calls[0][1]
    assert calls == [("fsync", temporary), ("replace", temporary, str(tmp_path / "a.json")), ("fsync", str(tmp_path))]
    assert os.path.dirname(temporary) == str(tmp_path)


@pytest.mark.parametrize("name", ["scheme.json", "pruned.npy", "origin.pth", "checkpoint.pth"])
def test_every_flipped_bit_is_noticed_with_the_files_name(here, stage, monkeypatch, name):
    path = here / name
    if name == "checkpoint.pth":
        monkeypatch.setattr(training, "finish", lambda options: None)
        assert stage("baseline_finetuning", *TRAIN, "--epochs", "1").code == 0
        path = here / "out.pth.checkpoint" / name

    def read():
        if name.endswith(".npy"):
            opened = bank.load(path)
            return [opened.read(key) for key in opened.entries]
        return configs.read_scheme(path) if name.endswith(".json") else models.load_sealed(path, "a file")

    good, rng = path.read_bytes(), random.Random(name)
    read()
    for place in [0, len(good) // 2, len(good) - 1, *(rng.randrange(len(good)) for _ in range(150))]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << rng.randrange(8)]) + good[place + 1:])
        with pytest.raises(UserError, match=name):
            read()


@pytest.mark.parametrize(("name", "module", "number"), [
    ("scheme.json", configs, "VERSION"), ("pruned.npy", bank, "VERSION"), ("origin.pth", models, "VERSION"),
    ("checkpoint.pth", checkpoints, "CHECKPOINT_VERSION")])
def test_a_file_of_another_version_is_refused_with_both(here, stage, monkeypatch, name, module, number):
    """Files are written by a toolkit that is one version ahead."""
    own = getattr(module, number)
    remake = {"scheme.json": ["prune_scheme_generator", *ARGUMENTS["prune_scheme_generator"], "-o", "scheme.json"],
              "pruned.npy": ["prune", *ARGUMENTS["prune"], "-o", "pruned.npy"],
              "origin.pth": ["download_model", "-m", "hub", "-o", "origin.pth"],
              "checkpoint.pth": ["baseline_finetuning", *TRAIN]}[name]
    read = {"pruned.npy": ["block-level_finetuning", *ARGUMENTS["block-level_finetuning"]],
            "checkpoint.pth": [*remake, "--resume"]}.get(name, ["prune", *ARGUMENTS["prune"]])
    with monkeypatch.context() as ahead:
        ahead.setattr(module, number, own + 1)
        ahead.setattr(training, "finish", lambda options: None)
        assert stage(*remake, "--overwrite").code == 0
    check(stage(*read, "--overwrite"), f"version {own + 1}, this toolkit reads {own}", name)


def bank_with(path, **changes) -> None:
    """Give the first variant of a bank's index other sizes, with fitting checksums."""
    data = path.read_bytes()
    length = int.from_bytes(data[-40:-32], "little")
    index = json.loads(data[-40 - length:-40])
    next(iter(index["variants"][0]["tensors"].values())).update(changes)
    text = json.dumps(index).encode()
    tail = text + len(text).to_bytes(8, "little")
    whole = data[128:-40 - length] + tail + hashlib.sha256(tail).digest()
    path.write_bytes(bank._header(len(whole)) + whole)


@pytest.mark.parametrize("how", ["header", "index", "shape", "kept", "entry", "storage"])
def test_a_size_beyond_the_file_is_refused_before_memory_is_taken(here, how):
    """Each asks for a TiB or more; with 4 GiB of address space left, taking it would be a MemoryError."""
    path = here / ("origin.pth" if how in ("entry", "storage") else "pruned.npy")
    good = path.read_bytes()
    if how == "header":
        path.write_bytes(bank._header(1 << 40) + good[128:])
    elif how == "index":
        path.write_bytes(good[:-40] + (1 << 40).to_bytes(8, "little") + good[-32:])
    elif how in ("shape", "kept"):
        bank_with(path, **({"shape": [1 << 20, 1 << 20]} if how == "shape" else {"kept": 1 << 39}))
    elif how == "entry":  # of the zip directory: the file's size unpacked
        at = good.rindex(b"PK\x01\x02")
        file = io.BytesIO(good[:at + 24] + b"\xfe\xff\xff\xff" + good[at + 28:-models._SEAL_BYTES - 2] + b"\0\0")
        models._seal_file(file)
        path.write_bytes(file.getvalue())
    else:
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(file, "w") as new:
            for entry in old.infolist():
                raw = old.read(entry)
                new.writestr(entry.filename, raw.replace(struct.pack("<H", 300), struct.pack("<H", 65000))
                             if entry.filename.endswith(".pkl") else raw)  # the vocabulary's size, in shapes
        models._seal_file(file)
        path.write_bytes(file.getvalue())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), limits[1]))
    try:
        with pytest.raises(UserError, match=path.name):
            if path.suffix == ".npy":
                opened = bank.load(path)
                [opened.read(key) for key in opened.entries]
            else:
                models.load(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_json_larger_than_the_bound_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 1 << 20)
    (tmp_path / "c.json").write_text("[" + " " * (1 << 20) + "]")
    with pytest.raises(UserError, match="c.json: JSON of more than 1 MiB is not read"):
        files.read_json(tmp_path / "c.json")


def test_large_json_beside_a_foreign_model_is_refused(here, stage, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 1 << 20)
    (here / "hub" / "generation_config.json").write_text("{" + " " * (1 << 20) + "}")
    check(stage("download_model", "-m", "hub", "-o", "new.pth"), "generation_config.json: JSON of more than 1 MiB")


def test_too_little_memory_is_said_before_the_first_step(here, stage, monkeypatch):
    monkeypatch.setattr(training, "available_memory", lambda: 500_000)
    check(stage("baseline_finetuning", *TRAIN), "GB of memory (gradients, AdamW's state and the best weights included)"
          ", 0.00 GB are available")
    assert not (here / "out.csv").exists() and not (here / "out.pth.checkpoint").exists()


def test_statistics_that_do_not_fit_are_said_before_the_first_pass(here, stage, monkeypatch):
    monkeypatch.setattr(training, "available_memory", lambda: 50_000)
    result = stage("block-level_finetuning", "-m", "origin.pth", "-p", "pruned.npy", "-o", "t.npy", "--stats", "t.csv",
                   "--data-dir", "text")
    check(result, "the statistics take 0.3 MiB of memory, 0.0 are available; give a smaller --memory-budget")
    assert not (here / "t.npy").exists() and "statistics 1/" not in result.err


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


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_when_all_is_done_changes_nothing(monkeypatch, signum):
    monkeypatch.setattr("sys.argv", ["stage.py"])
    monkeypatch.setattr(cli, "_drop_unread", lambda: os.kill(os.getpid(), signum))
    assert cli.run(lambda: 0) == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_while_the_first_is_told_changes_nothing(monkeypatch, capsys, signum):
    class Stream(io.StringIO):
        def write(self, text):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().write(text)

    stream = Stream()
    monkeypatch.setattr("sys.argv", ["stage.py"])
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.run(lambda: os.kill(os.getpid(), signum) or time.sleep(9)) == 128 + signum
    assert stream.getvalue().endswith("ed; no file is left half written\n")


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
