"""A checkpoint of a training run: everything that makes the resumed run end as the uninterrupted one."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common.errors import UserError, brief, reason
from common.files.archive import all_plain, load_sealed, save_sealed
from common.text.batches import Batches

COLUMNS = ("epoch", "train_loss", "valid_loss", "train_seconds", "valid_seconds", "step", "learning_rate")
FORMAT = "composable-pruning checkpoint"
CHECKPOINT_VERSION = 2  # 2: of the shrunk network


@dataclass
class State:
    """Everything that a resumed run needs beside weights, optimizer and random state; ``rows`` have `COLUMNS`."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    loss_count: float = 0.0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_epoch: float = 0.0
    rows: list = field(default_factory=list)


def save(path: Path, fingerprint: dict, state: State, trained: dict, best: dict, optimizer, device) -> None:
    """Write a checkpoint, random state included.

    Args:
        fingerprint: what must be equal for it to be resumed, {name: value}.
        trained: the trained parameters by name; ``best`` those of the best validation loss so far, on the CPU.
    """
    rng = {"cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    save_sealed(path, {
        "format": FORMAT, "version": CHECKPOINT_VERSION, "fingerprint": fingerprint, "state": vars(state),
        "weights": {n: p.detach().cpu() for n, p in trained.items()}, "best": best,
        "optimizer": optimizer.state_dict(), "rng": rng})


def load(path: Path, fingerprint: dict, trained: dict, optimizer, train: Batches, device) -> tuple[State, dict]:
    """Take over a checkpoint; return state and best weights. Mutates ``trained``, ``optimizer`` and the random state.

    Raises:
        UserError: it is damaged, of another version or of another run (names what differs, with both values).
    """
    content = load_sealed(path, "a checkpoint")
    saved = content.get("fingerprint")
    if content.get("format") != FORMAT or not isinstance(saved, dict) or not all(
            isinstance(key, str) and isinstance(value, (str, int)) for key, value in saved.items()):
        raise UserError(f"{path}: is not a checkpoint of this toolkit")
    version = content.get("version")
    if type(version) is not int or version != CHECKPOINT_VERSION:
        raise UserError(f"{path}: checkpoint version {brief(version)}, this toolkit reads {CHECKPOINT_VERSION}; start "
                        "anew without --resume")
    other = [f"{key}: checkpoint {brief(saved.get(key))}, now {brief(fingerprint.get(key))}"
             for key in sorted(saved.keys() | fingerprint.keys()) if saved.get(key) != fingerprint.get(key)]
    if other:
        raise UserError(f"{path}: is of another run; repeat its arguments, or start anew without --resume:\n  "
                        + "\n  ".join(other[:20]))
    try:
        return _restore(content, trained, optimizer, train, device)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else reason(error, 150)
        raise UserError(f"{path}: does not fit this run: {why}") from None


def _same_shapes(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)


def _good_rows(rows) -> bool:
    """Tell whether statistics rows out of a checkpoint are such as a run writes."""
    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == len(COLUMNS) and all(type(x) in (int, float) or (
            x is None and i in (1, 6)) for i, x in enumerate(row)) for row in rows)


def _restore(content: dict, trained: dict, optimizer, train: Batches, device) -> tuple[State, dict]:
    """As `load`; raise `ValueError` or the like where a foreign checkpoint would derail the run later."""
    state, moments, rng = content["state"], content["optimizer"], content["rng"]
    for name, default in vars(State()).items():
        value = state[name]
        good = _good_rows(value) if name == "rows" else type(value) is type(default) and value >= 0
        if not good:
            raise ValueError(f"its {name} is {brief(value)}")
    if len(state) > len(vars(State())) or not state["rows"]:
        raise ValueError("its counters are not complete")
    if state["batch"] and state["batch"] >= len(train.epoch(state["epoch"])):
        raise ValueError(f"its epoch {state['epoch']} has no batch {state['batch']}")
    for role in ("weights", "best"):
        if not all_plain(content[role], torch.float32) or not _same_shapes(content[role], trained):
            raise ValueError(f"its {role} are not this model's")
    # Of the optimizer only the numbers are taken over, what kind it is the arguments say.
    own = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, tensors in moments["state"].items():
        expected = {"step": torch.zeros(()), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]}
        if i < 0 or not all_plain(tensors, torch.float32) or not _same_shapes(tensors, expected):
            raise ValueError("its optimizer is not this model's")
    if not all_plain(rng, torch.uint8):
        raise ValueError("its random state is none")
    torch.set_rng_state(rng["cpu"])
    if torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"], device)
    optimizer.load_state_dict(own | {"state": moments["state"]})
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(content["weights"][name])
    return State(**state), content["best"]
