"""Two processes against one: torchrun starts them, gloo connects them."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from common import distributed
from common.errors import UserError
from common.files.atomic import check_outputs
from common.files.jsonfile import read_json
from common.pruning import bank
from common.t5 import model as models
from common.t5.network import Dropout
from common.text import batches
from tests.small import DATA, ROOT, load_stage

TRAIN = ["baseline_finetuning", "-m", "pruned.pth", "--epochs", "2", *DATA]


def run(folder, processes: int, *stages, restarts: int = 0):
    """Run stages in so many processes; return the exit code and what was said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
         "--max-restarts", str(restarts), ROOT / "tests" / "ranks.py", json.dumps(stages)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def weights(path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in models.load(path).network.named_parameters()}


def losses(path) -> list[float]:
    return [float(line.split(",")[2]) for line in path.read_text().splitlines()[1:]]


def same_banks(one, two, near: float, attention: bool = True, other: float = 0.0) -> None:
    """Masks are equal but for a share ``other``, weights near; without ``attention`` its weights are not compared."""
    one, two = bank.load(one), bank.load(two)
    assert one.entries.keys() == two.entries.keys()
    for key in one.entries:
        a, b = one.read(key), two.read(key)
        for name in a.weights:
            assert a.masks[name].sum() == b.masks[name].sum()
            same = a.masks[name] == b.masks[name]
            assert (~same).float().mean() <= other, name
            if attention or "Attention" not in name:
                assert torch.allclose(a.weights[name][same], b.weights[name][same], atol=near), name


def errors(path) -> dict[tuple, float]:
    """Return each variant's error on validation text after tuning."""
    return {(row["block"], row["rates"]): float(row["valid_error_after"])
            for row in csv.DictReader(path.read_text().splitlines())}


def test_two_processes_make_what_one_makes(work, monkeypatch):
    """Dropout included. Steps on attentions enlarge rounding: of these the errors are compared, not the weights.

    Of obs a few masked weights may be others: its fits are divided by rows, end at a tolerance, and scores lie close.
    """
    def stages(out):
        passes = ["--epochs", "1", *DATA]
        block = ["block-level_finetuning", "-m", "origin.pth"]
        return [
            ["prune", "-m", "origin.pth", "-c", "scheme.json", "-o", f"{out}obs.npy", "--criterion", "obs", *DATA],
            [*block, "-p", "pruned.npy", "-o", f"{out}exact.npy", "--stats", f"{out}exact.csv", *DATA],
            [*block, "-p", "pruned.npy", "-o", f"{out}adamw.npy", "--stats", f"{out}adamw.csv", "--solver", "adamw",
             *passes],
            [*block, "-p", "tuned.npy", "-o", f"{out}joint.npy", "--stats", f"{out}joint.csv", "--solver", "joint",
             *passes],
            ["model-level_finetuning", "-m", "origin.pth", "-c", "conf.json", "-p", "tuned.npy", "-o",
             f"{out}model.pth", "--stats", f"{out}model.csv", "--distillation", *passes, "--epochs", "2"],
            ["baseline_finetuning", "-m", "pruned.pth", "-o", f"{out}trained.pth", "--stats", f"{out}trained.csv",
             *passes],
            ["evaluate", "-m", "pruned.pth", "--json", f"{out}scores.json", *DATA]]

    monkeypatch.chdir(work)
    for name, *arguments in stages(""):
        assert load_stage(name).main(arguments) == 0
    code, said = run(work, 2, *stages("two/"))
    assert code == 0, said
    assert said.count("two/trained.pth: validation loss") == 1  # one process speaks
    for name, near, other in (("obs", 0, 0.02), ("exact", 1e-4, 0), ("adamw", 1e-5, 0), ("joint", 1e-5, 0)):
        same_banks(work / f"{name}.npy", work / "two" / f"{name}.npy", near, name != "exact", other)
    assert errors(work / "exact.variants.csv") == pytest.approx(errors(work / "two/exact.variants.csv"), rel=0.01)
    for name, near in (("trained", 1e-5), ("model", 1e-3), ("adamw", 1e-6), ("joint", 1e-5)):
        assert losses(work / f"{name}.csv") == pytest.approx(losses(work / "two" / f"{name}.csv"), abs=near), name
    one, two = read_json(work / "scores.json")[0], read_json(work / "two" / "scores.json")[0]
    timed = ("seconds", "tokens_per_second")
    assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in two.items() if k not in timed}


def test_killed_processes_are_restarted_from_the_checkpoint_and_end_bit_for_bit(work):
    """Restarts make the first stage's file anew: it is this run's, so that nothing is lost."""
    code, said = run(work, 2, [*TRAIN, "-o", "whole.pth", "--stats", "whole.csv"], ["kill", 0, 0, 3],
                     ["kill", 1, 1, 6], [*TRAIN, "-o", "killed.pth", "--stats", "killed.csv"], restarts=2)
    assert code == 0, said
    assert "resuming after step 3" in said and "resuming after step 6" in said
    killed, whole = weights(work / "killed.pth"), weights(work / "whole.pth")
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    assert losses(work / "killed.csv") == losses(work / "whole.csv")
    assert not (work / "killed.pth.checkpoint").exists()


def test_a_refusal_of_the_first_process_ends_all_with_one_message(work):
    (work / "precious.pth").write_text("a night's work")
    code, said = run(work, 2, [*TRAIN, "-o", "precious.pth", "--stats", "new.csv"])
    assert code and said.count("error: ") == 1 and "error: precious.pth: exists already" in said
    assert "exitcode  : 2" in said and "SIGKILL" not in said  # nobody hangs until torchrun has lost patience


def test_after_a_restart_a_run_replaces_its_own_files_and_no_others(monkeypatch, tmp_path):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(distributed, "_store", lambda: store)
    for name, value in {"RUN_ID": "x", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "file").write_text("a night's work")
    with pytest.raises(UserError, match="exists already"):  # the first start was refused, or ended before its checks
        check_outputs(False, tmp_path / "file")
    distributed.start(torch.device("cpu"))  # the first start had passed its checks, so the file came after them
    check_outputs(False, tmp_path / "file")


def test_nodes_that_read_different_files_are_refused(second_of_two, monkeypatch):
    others = [("process 0 on a", {"model": "1f", "text": "2a"}), ("process 1 on b", {"model": "1f", "text": "3b"})]
    monkeypatch.setattr(distributed, "gather", lambda mine: others)
    with pytest.raises(UserError) as refusal:
        distributed.check_same({})
    assert str(refusal.value) == (
        "the processes do not read the same; give every node the same files and arguments:\n"
        "  text: '2a' for process 0 on a, '3b' for process 1 on b")


@pytest.fixture
def second_of_two(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)


def test_shares_make_the_whole_again(second_of_two):
    assert list(distributed.share("abcde")) == ["b", "d"]
    assert distributed.interleave([["a", "c", "e"], ["b", "d"]]) == list("abcde")


def test_a_process_without_a_sentence_takes_one_in_which_no_token_counts(second_of_two, text):
    examples = text[0].epoch(0)[0]
    two = text[0].collate(examples[:2])
    part, own = batches.rows(two, 1, 2)
    assert all(torch.equal(part[key], two[key][1:]) for key in two) and own == slice(1, None, 2)
    part, own = batches.rows(text[0].collate(examples[:1]), 1, 2)
    assert len(part["labels"]) == 1 and own == slice(0, 1)
    assert (part["labels"] < 0).all() and not part["attention_mask"].any()


def test_dropout_of_shares_is_that_of_the_whole(monkeypatch):
    dropout, x = Dropout(0.3), torch.randn(5, 4, 7)
    torch.manual_seed(1)
    whole = dropout(x)
    for own in (slice(0, None, 2), slice(1, None, 2)):
        monkeypatch.setattr(Dropout, "rows", (5, own))
        torch.manual_seed(1)
        assert torch.equal(dropout(x[own]), whole[own])


def test_other_processes_write_nothing(second_of_two, tmp_path):
    from common.files.atomic import outputs, write_bytes

    with outputs(False, tmp_path / "a" / "file"):
        write_bytes(tmp_path / "file", b"content")
    assert not list(tmp_path.iterdir())
