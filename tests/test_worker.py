"""runs/worker.py: it takes what is left, whatever happened to other workers."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest

from common import cli
from common.files.atomic import locked
from tests.small import ROOT, refused

WORKER = ROOT / "runs" / "worker.py"
GIVEN = ["origin.pth", "tuned.npy", "conf.json", "text"]


@pytest.fixture
def worker(work, monkeypatch, capsys):
    """Run a worker in-process, in a private copy of `made`; return its exit code, stdout and stderr."""
    from types import SimpleNamespace

    monkeypatch.chdir(work)
    spec = importlib.util.spec_from_file_location("worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["worker.py", *arguments])
        code = cli.run(module.main)
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())
    return run


def made_by(folder) -> dict[str, object]:
    """Return the bytes of models, and scores without what is timed."""
    models = {path.name: path.read_bytes() for path in folder.glob("*.pth")}
    return models | {path.name: [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}
                                 for row in json.loads(path.read_text())] for path in folder.glob("*.json")}


def test_a_killed_worker_costs_one_configuration_and_the_end_is_the_same(work, worker):
    assert worker(*GIVEN, "done").code == 0
    whole = made_by(work / "done")
    assert set(whole) == {"composed_0.pth", "composed_1.pth", "scores_0.json", "scores_1.json"}
    os.rename(work / "done", work / "before")

    first, claim = work / "done" / "scores_0.json", work / "done" / ".claim_1.lock"
    started = subprocess.Popen([sys.executable, WORKER, *GIVEN, "done"], cwd=work, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not claim.exists() and started.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    started.kill()
    started.wait()
    assert first.exists() and not (work / "done" / "scores_1.json").exists() and claim.exists()
    written = first.stat().st_mtime_ns
    (work / "done" / ".composed_1.pth.99.tmp").write_text("half a model")
    assert worker(*GIVEN, "done").code == 0
    assert first.stat().st_mtime_ns == written  # what was finished is not done again
    assert made_by(work / "done") == whole and not list((work / "done").glob(".*.tmp"))


def test_what_another_worker_has_claimed_is_left_to_it(work, worker):
    (work / "done").mkdir()
    with locked(work / "done" / "claim_0"):
        assert worker(*GIVEN, "done").code == 0
    assert set(made_by(work / "done")) == {"composed_1.pth", "scores_1.json"}


def test_a_configuration_that_is_refused_does_not_stop_the_others(work, worker):
    configurations = json.loads((work / "conf.json").read_text())
    configurations[0] = dict.fromkeys(configurations[0], 0.125)
    (work / "conf.json").write_text(json.dumps(configurations))
    refused(worker(*GIVEN, "done"), "done: configuration 0: tuned.npy: lacks what the configuration needs")
    assert set(made_by(work / "done")) == {"composed_1.pth", "scores_1.json"}


def test_a_folder_of_other_inputs_is_refused_and_stays(work, worker):
    assert worker(*GIVEN, "done").code == 0
    before = made_by(work / "done")
    configurations = json.loads((work / "conf.json").read_text())
    (work / "conf.json").write_text(json.dumps(configurations[::-1]))
    refused(worker(*GIVEN, "done"), "done: holds results of other inputs (configurations); name another folder")
    assert made_by(work / "done") == before


def test_arguments_are_named(worker):
    refused(worker("origin.pth"), "give MODEL BANK CONF DATA FOLDER")
