"""A small T5, a small text and every artifact made from them, once a session; stages run in-process."""

import os
import shutil
import signal
from types import SimpleNamespace

import pytest

# How many threads really work depends on what else runs, and with it the order of sums: bits would differ.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import cli  # noqa: E402
from tests.small import load_stage, save_folder, write_corpus  # noqa: E402

# A shell that runs the tests in the background has them ignore Ctrl-C; the stages' handling of it is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def stage(capsys, monkeypatch):
    """Run a stage in-process: ``stage("prune", "-m", path)`` returns its exit code, stdout and stderr."""
    def run(name, *arguments):
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        try:
            code = cli.run(load_stage(name).main)
        except SystemExit as stopped:
            code = stopped.code
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)
    return run


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with everything the stages make, built by the stages themselves; read-only for the tests."""
    folder = tmp_path_factory.mktemp("made")
    write_corpus(folder / "text")
    save_folder(folder / "hub")
    data = ["--data", folder / "text"]

    def run(name, *arguments):
        assert load_stage(name).main([str(a) for a in arguments]) == 0, name

    run("download_model", "-m", folder / "hub", "-o", folder / "origin.pth")
    run("config_generator", "-m", folder / "origin.pth", "-o", folder / "conf.json",
        "--attention", 0.25, 0.5, "--linear", 0.5, 0.8)
    run("prune_scheme_generator", "-i", folder / "conf.json", "-o", folder / "scheme.json")
    run("prune", "-m", folder / "origin.pth", "-c", folder / "scheme.json", "-o", folder / "pruned.npy",
        "-p", folder / "pruned.pth")
    run("block-level_finetuning", "-m", folder / "origin.pth", "-p", folder / "pruned.npy", "-o",
        folder / "tuned.npy", "--stats", folder / "block.csv", *data)
    return folder


@pytest.fixture
def work(made, tmp_path):
    """A private copy of `made`."""
    shutil.copytree(made, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(scope="session")
def origin(made):
    """The small original model, loaded anew (session-wide, do not change it)."""
    from common.t5 import model

    return model.load(made / "origin.pth")


@pytest.fixture(scope="session")
def text(made, origin):
    """The small corpus, tokenised: (training, validation) batches."""
    from common.text.batches import Batches
    from common.text.corpus import Corpus, read_pairs

    corpus = Corpus(made / "text", "en", "de")
    return tuple(Batches(read_pairs(corpus, split), origin, 400) for split in ("train", "val"))
