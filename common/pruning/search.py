"""Predict a composed model's loss from its variants' losses one by one, and find the best configurations so.

The validation loss of the original with one variant in place, minus that of the original, is the variant's cost. The
predicted loss of a configuration is the original's plus the costs of all its variants; it is that of the recalibrated
model, for what recalibration leaves is what variants do apart from each other (docs/experiment.md has the figures).
That makes the choice of one variant (or none) for every block a multiple-choice knapsack problem, which is solved for
all sizes at once by merging Pareto fronts block by block (Nemhauser & Ullmann 1969, "Discrete Dynamic Programming and
Capital Allocation").
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, brief
from common.files.atomic import write_bytes
from common.files.jsonfile import is_sealed, read_json, sealed
from common.pruning.bank import Bank, Key
from common.pruning.configurations import Configuration
from common.runtime import progress
from common.t5.loss import TranslationLoss, evaluate
from common.t5.model import Model
from common.t5.modules import block_of, members, prunable
from common.text.batches import Batches

VALIDATION_SENTENCES = 400  # that losses are measured on
FORMAT = "composable-pruning sensitivity"
VERSION = 1
RESOLUTION = 20_000  # sizes that a front tells apart
LARGEST = 1e6  # loss that a file may hold; sums of more could overflow


@dataclass
class Sensitivity:
    """What `measure` found: the original's validation loss, and the loss with each variant alone in its place."""

    dense: float
    losses: dict[Key, float]


@torch.no_grad()
def measure(model: Model, bank: Bank, valid: Batches, device) -> Sensitivity:
    """Evaluate the original with each variant of a bank alone in the place of its block.

    Args:
        model: the original, its network on ``device``; as before when this returns.
    """
    network, objective = model.network, TranslationLoss(model.network)
    dense, losses = evaluate(objective, valid, device), {}
    for key in progress(bank.entries, "evaluating variants", len(bank.entries)):
        variant = bank.read(key)
        before = {name: network.get_parameter(name).clone() for name in variant.weights}
        try:
            for name, weight in variant.weights.items():
                network.get_parameter(name).copy_(weight)
            losses[key] = evaluate(objective, valid, device)
        finally:
            for name, weight in before.items():
                network.get_parameter(name).copy_(weight)
    return Sensitivity(dense, losses)


def write(path: Path, found: Sensitivity, origin: dict[str, str]) -> None:
    """Write a measurement, sealed as a scheme is; ``origin`` says what of, {role: SHA-256}."""
    rows = [{"block": block, "rates": list(rates), "validation_loss": loss}
            for (block, rates), loss in found.losses.items()]
    write_bytes(path, sealed({"format": FORMAT, "version": VERSION, "of": origin, "dense": found.dense,
                                    "variants": rows}))


def read(path: Path, bank: Bank, origin: dict[str, str]) -> Sensitivity:
    """Read a measurement; it must be of this bank, model and text.

    Raises:
        UserError: it is none, is damaged, or is of something else, with both hashes.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        raise UserError(f"{path}: is not a sensitivity file of this toolkit; remove it, it is measured anew")
    if not is_sealed(path):
        raise UserError(f"{path}: was edited after it was made, or is damaged; remove it, it is measured anew")
    of = content.get("of") if isinstance(content.get("of"), dict) else {}
    other = [f"{role}: {brief(of.get(role))}, now {sha!r}" for role, sha in origin.items() if of.get(role) != sha]
    if other:
        raise UserError(f"{path}: was measured on something else; remove it and it is measured anew:\n  "
                        + "\n  ".join(other))
    try:
        losses = {(row["block"], tuple(float(r) for r in row["rates"])): float(row["validation_loss"])
                  for row in content["variants"]}
        found = Sensitivity(float(content["dense"]), losses)
    except (LookupError, TypeError, ValueError, OverflowError):
        found = Sensitivity(0.0, {})
    if found.losses.keys() != bank.entries.keys() or not all(
            0 <= loss < LARGEST for loss in (found.dense, *found.losses.values())):
        raise UserError(f"{path}: does not list every variant of the bank once; remove it, it is measured anew")
    return found


@dataclass
class Front:
    """All configurations that no other beats: ``sizes`` (weights kept) falling, ``losses`` (predicted) rising."""

    sizes: np.ndarray
    losses: np.ndarray
    _picks: list[tuple[list, np.ndarray, np.ndarray]]

    def configuration(self, i: int) -> Configuration:
        """Return the ``i``-th configuration."""
        chosen = []
        for options, option, parent in reversed(self._picks):
            chosen.append(options[option[i]])
            i = parent[i]
        return {name: rate for key in reversed(chosen) if key
                for name, rate in zip(members(key[0]), key[1], strict=True)}

    def at_sparsity(self, sparsity: float, total: int) -> int | None:
        """Return the place of the best configuration that keeps at most 1 − ``sparsity`` of ``total`` weights."""
        found = np.flatnonzero(self.sizes <= round((1 - sparsity) * total, 3))  # (1 - 0.9) * 1000 is below 100
        return int(found[0]) if len(found) else None

    def at_loss(self, target: float) -> int | None:
        """Return the place of the smallest configuration with a predicted loss of at most ``target``."""
        found = np.flatnonzero(self.losses <= target)
        return int(found[-1]) if len(found) else None


def kept_weights(model: Model, bank: Bank) -> tuple[dict[Key | str, int], int]:
    """Return how many prunable weights each variant keeps, and each block unchanged (by its name); and their total.

    Of an attention, q, k, v and o count; a variant that leaves q, k and v as they are has only its o in the bank. What
    an earlier round of pruning removed is not kept.
    """
    kept = {name: int(mask.sum()) for name, mask in model.masks.items()}
    sizes, total = {}, 0
    for block in dict.fromkeys(map(block_of, prunable(model.network))):
        parameters = {f"{block}.{n}": p for n, p in model.network.get_submodule(block).named_parameters()
                      if not n.startswith("relative")}
        sizes[block] = sum(kept.get(n, p.numel()) for n, p in parameters.items())
        total += sum(p.numel() for p in parameters.values())
        for key, entry in bank.entries.items():
            if key[0] == block:
                own = {n: t["kept"] for n, t in entry["tensors"].items()}
                sizes[key] = sum(own.get(n, kept.get(n, p.numel())) for n, p in parameters.items())
    return sizes, total


def front(found: Sensitivity, sizes: dict) -> Front:
    """Return every configuration out of a bank's variants that is best for its size, by predicted loss.

    Exact up to `RESOLUTION` sizes; among configurations whose sizes agree so far, the best is kept.

    Args:
        sizes: of `kept_weights`.
    """
    blocks: dict[str, list] = {}
    for key in found.losses:
        blocks.setdefault(key[0], [None]).append(key)
    unchanged = sum(size for block, size in sizes.items() if isinstance(block, str) and block not in blocks)
    total = sum(size for block, size in sizes.items() if isinstance(block, str))
    grain = max(total / RESOLUTION, 1.0)
    at, losses, picks = np.array([float(unchanged)]), np.array([found.dense]), []
    for block, options in blocks.items():
        size = np.array([sizes[block] if key is None else sizes[key] for key in options], dtype=float)
        cost = np.array([0.0 if key is None else found.losses[key] - found.dense for key in options])
        new_size, new_loss = (at[:, None] + size).ravel(), (losses[:, None] + cost).ravel()
        order = np.lexsort((new_size, new_loss))  # from the lowest loss on, keep what is smaller than all before
        smallest = np.minimum.accumulate(np.floor(new_size[order] / grain))
        keep = order[np.r_[True, smallest[1:] < smallest[:-1]]]
        at, losses = new_size[keep], new_loss[keep]
        picks.append((options, keep % len(options), keep // len(options)))
    return Front(at, losses, picks)
