import pytest
import torch

from common.errors import UserError
from common.files.archive import load_sealed, save_sealed
from common.training import checkpoint
from tests.mutants import train_toy


@pytest.fixture
def folder(tmp_path):
    """A folder with the checkpoint of a toy's first epoch."""
    train_toy(tmp_path, epochs=1)
    return tmp_path


def refused(folder, message: str, **changes):
    """Check that a checkpoint with other content is refused."""
    path = folder / "cp" / "checkpoint.pth"
    save_sealed(path, load_sealed(path, "a checkpoint") | changes)
    with pytest.raises(UserError, match=f"checkpoint.pth: {message}"):
        train_toy(folder, resume=True)


def test_the_checkpoint_of_these_tests_is_resumed(folder):
    assert train_toy(folder, resume=True).steps == 4


def test_a_checkpoint_of_another_run_is_refused_with_both_values(folder):
    refused(folder, r"is of another run; repeat its arguments, .*\n  a: checkpoint 2, now 1\n  seed: checkpoint 3, "
            "now None", fingerprint={"a": 2, "seed": 3, "training text": "0" * 64, "validation text": "0" * 64})


def test_a_checkpoint_of_other_text_is_refused(folder):
    refused(folder, r"is of another run; .*\n  training text: checkpoint '1", fingerprint={
        "a": 1, "training text": "1" * 64, "validation text": "0" * 64})


def test_a_checkpoint_of_another_version_is_refused(folder):
    refused(folder, "checkpoint version 9, this toolkit reads 2; start anew without --resume", version=9)


def test_a_damaged_checkpoint_is_refused(folder):
    path = folder / "cp" / "checkpoint.pth"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="checkpoint.pth: is not a checkpoint of this toolkit, or is truncated"):
        train_toy(folder, resume=True)


@pytest.mark.parametrize(("change", "message"), [
    ({"batch": 2}, "its epoch 0 has no batch 2"), ({"batch": -1}, "its batch is -1"), ({"epoch": "1"}, "its epoch is"),
    ({"rows": [[1]]}, "its rows is"), ({"rows": []}, "its counters are not complete"), ({"more": 1}, "not complete"),
    ({"best_loss": None}, "its best_loss is None")])
def test_odd_counters_are_refused(folder, change, message):
    """One batch too many, and the loop over an epoch's batches would never end."""
    refused(folder, f"does not fit this run: .*{message}", state=vars(checkpoint.State(rows=[[0, None, 1.0] + [0] * 4]))
            | change)


@pytest.mark.parametrize(("change", "message"), [
    ({"weights": {"weight": torch.zeros(1), "bias": torch.zeros(1)}}, "does not fit .* its weights are not"),
    ({"best": {}}, "does not fit .* its best are not"), ({"rng": {}}, "does not fit .* it lacks 'cpu'"),
    ({"optimizer": {"state": {0: {"step": torch.zeros(())}}}}, "does not fit .* its optimizer is not"),
    ({"optimizer": {"state": {9: {}}}}, "does not fit this run"),
    ({"fingerprint": {"a": torch.zeros(2)}}, "is not a checkpoint"), ({"format": "x"}, "is not a checkpoint")])
def test_odd_tensors_are_refused(folder, change, message):
    refused(folder, message, **change)
