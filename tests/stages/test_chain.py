"""The ten stages one after the other."""

import csv
import json
import os
import subprocess
import sys

import pytest

from common.t5 import model as models
from tests.small import ROOT, STAGES, load_stage, save_folder, write_corpus

MORE = [["prune", "--criterion", "obs", "-o", "obs.npy"],
        ["block-level_finetuning", "-p", "finetuned_modules.npy", "--solver", "joint", "--epochs", "1", "-o",
         "joint.npy", "--stats", "joint.csv"],
        ["config_generator", "-p", "finetuned_modules.npy", "--sparsity", "0.3", "-o", "best.json"],
        ["evaluate", "--json", "scores.json"]]


@pytest.fixture(params=["t5", "mt5"])
def kind(request, tmp_path, monkeypatch):
    """In a folder where `t5-small` is a local model, and the text lies where it would be downloaded to."""
    monkeypatch.chdir(tmp_path)
    save_folder(tmp_path / "t5-small", request.param, untie=request.param == "mt5", num_layers=1,
                num_decoder_layers=1)
    write_corpus(tmp_path / "data" / "multi30k", (40, 20, 10))
    return request.param


def content(path):
    """Return what a file holds, without seconds."""
    if path.suffix == ".csv":
        rows = csv.DictReader(path.read_text().splitlines())
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
    if path.name == "scores.json":
        return json.loads(path.read_text(), object_pairs_hook=lambda p: {k: v for k, v in p if "second" not in k})
    return path.read_bytes()


def test_all_ten_run_without_any_argument_and_another_process_makes_the_same_bytes(kind, tmp_path):
    """What one process makes of a set's order, the next one, with another seed of its hashes, may not."""
    commands = [[name] for name in STAGES] + (MORE if kind == "t5" else [])
    for name, *arguments in commands:
        assert load_stage(name).main(arguments) == 0, name
    left = [p for p in tmp_path.iterdir() if p.name.startswith(".") or "checkpoint" in p.name]
    assert all(p.name.endswith(".lock") and not p.stat().st_size for p in left)
    origin, final = (models.load(tmp_path / f"{n}_model.pth") for n in ("origin", "finetuned"))
    assert set(final.masks) and not origin.masks
    for weight, mask in final.masks.items():
        assert not final.network.get_parameter(weight)[~mask].any()
    assert (origin.network.lm_head.weight is origin.network.shared.weight) == (kind == "t5")
    made = {p.name: content(p) for p in tmp_path.glob("[!.]*.*")}
    assert len(made) == 13 + (7 if kind == "t5" else 0), made.keys()
    if kind == "t5":
        for path in set(tmp_path.glob("*")) - {tmp_path / "t5-small", tmp_path / "data"}:
            path.unlink()
        code = ("import json, sys; from tests.small import load_stage\n"
                "for name, *arguments in json.loads(sys.argv[1]): assert load_stage(name).main(arguments) == 0, name")
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, json.dumps(commands)], capture_output=True,
                              env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}, text=True)
        assert done.returncode == 0, done.stderr
        again = {p.name: content(p) for p in tmp_path.glob("[!.]*.*")}
        assert again.keys() == made.keys()
        assert not [name for name in made if made[name] != again[name]]
