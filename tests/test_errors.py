"""Bad input of every stage: exit code 2, one message on stderr, no traceback, nothing lost, nothing run."""

import ast
import gzip
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT

# Every stage with all its file inputs: {stage: (arguments with {placeholders}, {placeholder: good file})}.
TEXT = ["--data-dir", "text"]
INPUTS = {
    "config_generator": (["-m", "{model}", "-o", "out.json"], {"model": "origin.pth"}),
    "prune_scheme_generator": (["-i", "{conf}", "-o", "out.json"], {"conf": "conf.json"}),
    "prune": (["-m", "{model}", "-c", "{scheme}"], {"model": "origin.pth", "scheme": "scheme.json"}),
    "compose_model": (["-m", "{model}", "-p", "{bank}", "-c", "{conf}"],
                      {"model": "origin.pth", "bank": "tuned.npy", "conf": "conf.json"}),
    "baseline_finetuning": (["-m", "{model}", "--epochs", "1", *TEXT], {"model": "pruned.pth"}),
    "block-level_finetuning": (["-m", "{model}", "-p", "{bank}", *TEXT],
                               {"model": "origin.pth", "bank": "pruned.npy"}),
    "model-level_finetuning": (["-m", "{model}", "-p", "{bank}", "-c", "{conf}", "--epochs", "1", *TEXT],
                               {"model": "origin.pth", "bank": "tuned.npy", "conf": "conf.json"}),
    "evaluate": (["-m", "{model}", *TEXT], {"model": "pruned.pth"}),
    "plot_loss": (["{stats}"], {"stats": "block.csv"}),
}
CASES = [(name, role) for name, (_, roles) in INPUTS.items() for role in roles]


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def hostile(path, proof):
    """Write a pickle that would create ``proof``, in the shape that ``path``'s extension suggests."""
    if path.suffix == ".npy":
        np.save(path, np.array([Hostile(proof)], dtype=object), allow_pickle=True)
    elif path.suffix == ".pth":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Hostile(proof)))
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
    else:
        path.write_bytes(pickle.dumps(Hostile(proof)))


def break_file(path, how, made):
    good = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(good[:len(good) * 2 // 3] if path.suffix != ".csv" else good[:20])
    elif how == "foreign":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" * 99)
    elif how == "swapped":
        other = {".pth": "tuned.npy", ".npy": "origin.pth", ".json": "origin.pth", ".csv": "conf.json"}[path.suffix]
        shutil.copy(made / other, path)
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "hostile":
        hostile(path, path.parent / "hacked")
    elif how == "raw hostile":
        path.write_bytes(pickle.dumps(Hostile(path.parent / "hacked"), 2))
    elif how == "sealed hostile":
        from common import models

        hostile(path, path.parent / "hacked")
        with open(path, "r+b") as file:
            models._seal_file(file)


def check(result, *parts):
    assert result.code == 2, (result.code, result.out, result.err)
    assert "Traceback" not in result.err and "error: " in result.err
    for part in parts:
        assert part in result.err


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "foreign", "swapped", "folder", "hostile"])
@pytest.mark.parametrize(("name", "role"), CASES)
def test_bad_files(work, made, stage, monkeypatch, name, role, how):
    monkeypatch.chdir(work)
    arguments, roles = INPUTS[name]
    break_file(work / roles[role], how, made)
    before = sorted(p.name for p in work.iterdir())
    check(stage(name, *[a.format(**roles) for a in arguments]), roles[role])
    assert sorted(p.name for p in work.iterdir()) == before  # nothing ran, nothing was left behind


@pytest.mark.parametrize(("name", "role"), [c for c in CASES if c[1] == "model"])
def test_a_hostile_pickle_with_a_valid_checksum_does_not_run(work, made, stage, monkeypatch, name, role):
    monkeypatch.chdir(work)
    arguments, roles = INPUTS[name]
    break_file(work / roles[role], "sealed hostile", made)
    check(stage(name, *[a.format(**roles) for a in arguments]), roles[role], "nothing in it was run")
    assert not (work / "hacked").exists()


def tried(result, work):
    """Check that a file was refused or, where it may be harmless text or is not needed, passed over."""
    assert result.code in (0, 2) and "Traceback" not in result.err, result.err
    assert not (work / "hacked").exists()


READERS = {**{name: arguments for name, (arguments, _) in INPUTS.items() if "--data-dir" in arguments},
           "prune": ["-m", "{model}", "-c", "scheme.json", "--criterion", "wanda", *TEXT],
           "compose_model": [*INPUTS["compose_model"][0], "--recalibrate", *TEXT],
           "download_model": ["-m", "tiny", "-o", "tiny.pth", *TEXT]}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", READERS)
def test_a_hostile_pickle_in_place_of_the_text_does_not_run(work, stage, monkeypatch, name, packed):
    monkeypatch.chdir(work)
    raw = pickle.dumps(Hostile(work / "hacked"), 0)  # the protocol that is text
    for path in list((work / "text").iterdir()):
        path.unlink()
        path.with_name(path.name + ".gz" * packed).write_bytes(gzip.compress(raw) if packed else raw)
    tried(stage(name, *[a.format(**INPUTS.get(name, ([], {}))[1]) for a in READERS[name]]), work)


@pytest.mark.parametrize("how", ["hostile", "sealed hostile", "raw hostile"])
@pytest.mark.parametrize(("name", "more"), [
    ("baseline_finetuning", []), ("model-level_finetuning", []), ("block-level_finetuning", ["--solver", "adamw"]),
    ("block-level_finetuning", ["--solver", "joint"])])
def test_a_hostile_pickle_in_place_of_a_checkpoint_does_not_run(work, made, stage, monkeypatch, name, more, how):
    monkeypatch.chdir(work)
    arguments, roles = INPUTS[name]
    (work / "cp").mkdir()
    (work / "cp" / "checkpoint.pth").touch()
    break_file(work / "cp" / "checkpoint.pth", how, made)
    check(stage(name, *[a.format(**roles) for a in arguments], *more, "-o", "out", "--checkpoint-dir", "cp",
                "--resume"),
          "checkpoint.pth: is not a checkpoint of this toolkit")
    assert not (work / "hacked").exists() and not (work / "cp" / "hacked").exists()


@pytest.mark.parametrize("how", ["hostile", "raw hostile"])
@pytest.mark.parametrize("name", [
    "config.json", "generation_config.json", "tokenizer.json", "spiece.model", "tokenizer_config.json",
    "special_tokens_map.json", "model.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00001.bin",
    "model.safetensors.index.json"])
def test_a_hostile_pickle_in_a_hugging_face_folder_does_not_run(work, made, stage, name, how):
    hub = work / "hub"
    if name == "spiece.model":
        (hub / "tokenizer.json").unlink()
    elif name.endswith((".bin", ".index.json")):
        (hub / "model.safetensors").unlink()
        if "-of-" in name:
            (hub / "pytorch_model.bin.index.json").write_text(json.dumps(
                {"metadata": {}, "weight_map": {"shared.weight": name}}))
    (hub / "x.pth").touch()
    break_file(hub / "x.pth", how, made)
    padding = bytes(200_000)  # as much as the weights need, so that reading is tried
    if how == "hostile":
        with zipfile.ZipFile(hub / "x.pth", "a") as archive:
            archive.writestr("archive/data/0", padding)
    else:
        (hub / "x.pth").write_bytes((hub / "x.pth").read_bytes() + padding)
    (hub / "x.pth").rename(hub / name)
    tried(stage("download_model", "-m", hub, "-o", work / "new.pth"), work)
    assert not (hub / "hacked").exists()


@pytest.mark.parametrize("name", ["tuned.npy", "scheme.json", "conf.json", "origin.pth"])
def test_a_hostile_pickle_whose_ancestry_is_asked_for_does_not_run(work, made, stage, name):
    break_file(work / name, "hostile", made)
    check(stage("evaluate", "-m", work / name, "--ancestry"), name)
    assert not (work / "hacked").exists()


def test_a_hostile_configuration_of_joint_tuning_does_not_run(work, made, stage, monkeypatch):
    monkeypatch.chdir(work)
    break_file(work / "conf.json", "hostile", made)
    check(stage("block-level_finetuning", "-m", "origin.pth", "-p", "tuned.npy", "--solver", "joint", "-c",
                "conf.json", *TEXT), "conf.json")
    assert not (work / "hacked").exists()


def test_no_line_of_the_toolkit_unpickles_unpacks_or_evaluates():
    """The calls that could run code out of a file, or write beside the folder they were given."""
    seen = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not {"pickle", "dill", "joblib", "shelve", "marshal", "tarfile", "subprocess"} & set(names)
            if isinstance(node, ast.Call):
                call, words = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert call not in ("eval", "exec", "compile", "__import__", "os.system", "shutil.unpack_archive")
                assert not call.endswith((".extract", ".extractall", ".unpack_archive")), call
                assert "trust_remote_code" not in words and "allow_pickle" not in words
                assert call != "torch.load" or words["weights_only"] == "True"
                seen.append(call)
    assert "torch.load" in seen and "np.load" in seen  # these are the ones there are


def test_the_hostile_pickle_of_these_tests_is_hostile(tmp_path):
    hostile(tmp_path / "x.csv", tmp_path / "hacked")
    pickle.loads((tmp_path / "x.csv").read_bytes()).close()
    assert (tmp_path / "hacked").exists()


@pytest.mark.parametrize("how", ["no config", "broken config", "other model", "no weights", "truncated weights",
                                 "hostile weights", "no tokenizer", "broken tokenizer"])
def test_bad_hugging_face_folders(work, stage, how):
    hub = work / "hub"
    config, weights, tokenizer = hub / "config.json", hub / "model.safetensors", hub / "tokenizer.json"
    if how == "no config":
        config.unlink()
    elif how == "broken config":
        config.write_text("{")
    elif how == "other model":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "bert"}))
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "hostile weights":
        weights.unlink()
        hostile(hub / "x.pth", work / "hacked")
        (hub / "x.pth").rename(hub / "pytorch_model.bin")
    elif how == "no tokenizer":
        tokenizer.unlink()
    else:
        tokenizer.write_text("{}")
    check(stage("download_model", "-m", hub, "-o", work / "new.pth"), "hub")
    assert not (work / "new.pth").exists() and not (work / "hacked").exists()


def test_no_network(stage, tmp_path, monkeypatch):
    import huggingface_hub

    def fail(self, name):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    check(stage("download_model", "-m", "google/flan-t5-small", "-o", tmp_path / "m.pth"),
          "google/flan-t5-small: is no folder here and cannot be downloaded from the hub (OSError); give a local "
          "folder, or -m tiny")


def test_a_missing_model_folder(stage, tmp_path):
    check(stage("download_model", "-m", tmp_path / "none", "-o", tmp_path / "m.pth"), "none: no such folder")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--attention", "0.5", "--linear", "0.5", "0.8"], "--linear lists 2 rates for 1 configurations"),
    (["--attention", "0.5", "-n", "2"], "--attention lists 1 rates for 2 configurations"),
    (["--linear", "1.3"], "'1.3' is not a pruning rate in [0, 1)"),
    (["--linear", "1"], "'1' is not a pruning rate in [0, 1)"),
    (["--linear", "-0.1"], "'-0.1' is not a pruning rate in [0, 1)"),
    (["--linear", "nan"], "'nan' is not a pruning rate in [0, 1)"),
    (["--linear", "half"], "'half' is not a pruning rate in [0, 1)"),
    (["--attention", "0.9", "--linear", "0.5"], "pruning rate 0.9 removes all 4 heads"),
    (["-n", "0"], "'0' is not a whole number of at least 1"),
])
def test_bad_rates(work, stage, arguments, message):
    check(stage("config_generator", "-m", work / "origin.pth", "-o", work / "new.json", *arguments), message)
    assert not (work / "new.json").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"encoder.block.9.layer.0.SelfAttention": 0.5}, "encoder.block.9.layer.0.SelfAttention: the model has no such"),
    ({"encoder.block.0.layer.0.SelfAttention": 0.9}, "removes all 4 heads"),
])
def test_a_scheme_that_does_not_fit_the_model(work, stage, change, message):
    (work / "conf.json").write_text(json.dumps([change]))
    assert stage("prune_scheme_generator", "-i", work / "conf.json", "-o", work / "new.json").code == 0
    check(stage("prune", "-m", work / "origin.pth", "-c", work / "new.json", "-o", work / "new.npy"), message)
    assert not (work / "new.npy").exists()


def test_an_edited_scheme(work, stage):
    path = work / "scheme.json"
    path.write_text(path.read_text().replace("0.8", "0.7"))
    check(stage("prune", "-m", work / "origin.pth", "-c", path, "-o", work / "new.npy"), "was edited after it was made")


def test_nothing_to_prune(work, stage):
    (work / "conf.json").write_text('[{"encoder.block.0.layer.1.DenseReluDense.wi": 0.0}]')
    check(stage("prune_scheme_generator", "-i", work / "conf.json", "-o", work / "n.json"), "there is nothing to prune")


@pytest.mark.parametrize("name", ["compose_model", "model-level_finetuning"])
def test_n_out_of_range(work, stage, monkeypatch, name):
    monkeypatch.chdir(work)
    arguments, roles = INPUTS[name]
    check(stage(name, *[a.format(**roles) for a in arguments], "-n", 7),
          "there is no configuration 7; it holds 2, numbered from 0 to 1")


@pytest.mark.parametrize("name", ["compose_model", "block-level_finetuning", "model-level_finetuning"])
def test_a_bank_of_another_model(work, stage, monkeypatch, name):
    monkeypatch.chdir(work)
    arguments, roles = INPUTS[name]
    roles = roles | {"model": "pruned.pth"}
    check(stage(name, *[a.format(**roles) for a in arguments]), "made from another model than")


@pytest.mark.parametrize("name", ["compose_model", "model-level_finetuning"])
def test_a_bank_that_lacks_variants_names_them(work, stage, monkeypatch, name):
    monkeypatch.chdir(work)
    (work / "conf.json").write_text('[{"encoder.block.0.layer.1.DenseReluDense.wi": 0.33}]')
    arguments, roles = INPUTS[name]
    check(stage(name, *[a.format(**roles) for a in arguments]), "encoder.block.0.layer.1.DenseReluDense.wi at 0.33")


OUTPUTS = {**{name: "out.pth" for name in ("compose_model", "baseline_finetuning", "model-level_finetuning")},
           "config_generator": "out.json", "prune_scheme_generator": "out.json", "prune": "out.npy",
           "block-level_finetuning": "out.npy"}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_existing_output_is_not_replaced(work, stage, monkeypatch, name):
    monkeypatch.chdir(work)
    arguments, roles = INPUTS[name]
    (work / OUTPUTS[name]).write_text("precious")
    arguments = [a for a in arguments if a not in ("-o", "out.json")]
    check(stage(name, *[a.format(**roles) for a in arguments], "-o", OUTPUTS[name]), "exists already", "--overwrite")
    assert (work / OUTPUTS[name]).read_text() == "precious"


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_folder_that_cannot_be_written(work, stage, monkeypatch, name):
    """Root may write everywhere, so the folder is one in which nobody may: below a file, and in /proc."""
    monkeypatch.chdir(work)
    arguments, roles = INPUTS[name]
    for folder in ("conf.json/below", "/proc/none"):
        check(stage(name, *[a.format(**roles) for a in arguments], "-o", f"{folder}/{OUTPUTS[name]}"), folder)


@pytest.mark.parametrize("name", [n for n, (arguments, _) in INPUTS.items() if "--data-dir" in arguments])
def test_text_that_is_not_there(work, stage, monkeypatch, name):
    import requests

    def get(url, timeout):
        raise requests.ConnectionError

    monkeypatch.setattr(requests, "get", get)
    monkeypatch.chdir(work)
    (work / "text" / "val.de").unlink()
    arguments, roles = INPUTS[name]
    check(stage(name, *[a.format(**roles) for a in arguments]), "val.de.gz: is not there and cannot be downloaded")


def test_unequal_languages(work, stage, monkeypatch):
    monkeypatch.chdir(work)
    with open(work / "text" / "train.de", "a") as file:
        file.write("Noch eine Zeile.\n")
    arguments, roles = INPUTS["baseline_finetuning"]
    check(stage("baseline_finetuning", *[a.format(**roles) for a in arguments]),
          "train.en has 200 lines and train.de 201")


def test_an_unknown_device(work, stage, monkeypatch):
    monkeypatch.chdir(work)
    check(stage("evaluate", "-m", "origin.pth", *TEXT, "--device", "warp"), "--device warp: cannot be used")


def test_the_checkpoint_of_an_interrupted_run_is_not_thrown_away(work, stage, monkeypatch):
    monkeypatch.chdir(work)
    (work / "out.pth.checkpoint").mkdir()
    (work / "out.pth.checkpoint" / "checkpoint.pth").write_text("hours of work")
    arguments, roles = INPUTS["baseline_finetuning"]
    check(stage("baseline_finetuning", *[a.format(**roles) for a in arguments], "-o", "out.pth"),
          "holds the checkpoint of an interrupted run; add --resume")


def test_a_full_disk_loses_nothing(work, stage, monkeypatch):
    """A file-size limit stands for the full disk: the write fails in the middle."""
    import resource

    monkeypatch.chdir(work)
    (work / "out.pth").write_text("precious")
    arguments, roles = INPUTS["compose_model"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        result = stage("compose_model", *[a.format(**roles) for a in arguments], "-o", "out.pth", "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check(result, "File too large")
    assert (work / "out.pth").read_text() == "precious" and not list(work.glob(".*"))


@pytest.mark.parametrize(("name", "flags", "message"), [
    ("block-level_finetuning", ["--stats", "."], "is a folder, a file name is needed"),
    ("baseline_finetuning", ["--checkpoint-dir", "/"], "must be a folder of its own"),
    ("baseline_finetuning", ["--checkpoint-dir", "out.pth"], "must be a folder of its own"),
    ("model-level_finetuning", ["--device", "meta"], "--device meta: cannot be used"),
    ("prune", ["--device", "warp"], "--device warp: cannot be used"),
])
def test_odd_arguments_are_one_sentence(work, stage, monkeypatch, name, flags, message):
    monkeypatch.chdir(work)
    arguments, roles = INPUTS[name]
    check(stage(name, *[a.format(**roles) for a in arguments], "-o", "out.pth", *flags), message)


def test_a_seed_beyond_64_bits_is_refused(stage):
    assert stage("prune", "--seed", 2**64).code == 2


def test_verifying_belongs_to_a_search(work, stage):
    check(stage("config_generator", "-m", work / "origin.pth", "-o", work / "c.json", "--verify"), "belong to a search")


def test_statistics_of_another_run_are_not_replaced_by_resuming(work, stage, monkeypatch):
    """They have no checkpoint, so there is nothing that --resume could go on with."""
    monkeypatch.chdir(work)
    (work / "kept.csv").write_text("of another run")
    arguments, roles = INPUTS["baseline_finetuning"]
    check(stage("baseline_finetuning", *[a.format(**roles) for a in arguments], "-o", "new.pth", "--stats", "kept.csv",
                "--resume"), "kept.csv: exists already")
    assert (work / "kept.csv").read_text() == "of another run"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("to", "code"), [("> /dev/full", 2), (">&-", 0)])
def test_output_that_cannot_be_written_is_no_traceback(made, tmp_path, to, code):
    done = subprocess.run(f"{sys.executable} {ROOT}/prune_scheme_generator.py -i {made}/conf.json -o {tmp_path}/s.json "
                          + to, shell=True, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr and (tmp_path / "s.json").exists()
