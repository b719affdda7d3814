"""Predict a composed model's loss from its variants' losses one by one, and find the best configurations so.

The validation loss of the original with one variant in place, minus that of the original, is the variant's cost. The
predicted loss of a configuration is the original's plus the costs of all its variants; it is that of the recalibrated
model, for what recalibration leaves is what variants do apart from each other (docs/experiment.md has the figures).
That makes the choice of one variant (or none) for every block a multiple-choice knapsack problem, which is solved for
all sizes at once by merging Pareto fronts block by block (Nemhauser & Ullmann 1969, "Discrete Dynamic Programming and
Capital Allocation").
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import files
from common.bank import Bank, Key
from common.configs import Configuration, is_sealed, sealed
from common.data import Batches
from common.files import UserError
from common.models import Model
from common.modules import block_of, members, prunable
from common.training import TranslationLoss, evaluate

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
def measure(model: Model, bank: Bank, valid: Batches, device,
            log=lambda text: print(text, file=sys.stderr)) -> Sensitivity:
    """Evaluate the original with each variant of a bank alone in the place of its block.

    Args:
        model: the original, its network on ``device``; as before when this returns.
    """
    network, objective = model.network, TranslationLoss(model.network)
    dense, losses, began = evaluate(objective, valid, device), {}, time.perf_counter()
    for n, key in enumerate(bank.entries):
        variant = bank.read(key)
        before = {name: network.get_parameter(name).clone() for name in variant.weights}
        try:
            for name, weight in variant.weights.items():
                network.get_parameter(name).copy_(weight)
            losses[key] = evaluate(objective, valid, device)
        finally:
            for name, weight in before.items():
                network.get_parameter(name).copy_(weight)
        if n % 10 == 9 or n + 1 == len(bank.entries):
            log(f"{n + 1}/{len(bank.entries)} variants evaluated, {time.perf_counter() - began:.0f} s")
    return Sensitivity(dense, losses)


def write(path: Path, found: Sensitivity, origin: dict[str, str]) -> None:
    """Write a measurement, sealed as a scheme is; ``origin`` says what of, {role: SHA-256}."""
    rows = [{"block": block, "rates": list(rates), "validation_loss": loss}
            for (block, rates), loss in found.losses.items()]
    files.write_bytes(path, sealed({"format": FORMAT, "version": VERSION, "of": origin, "dense": found.dense,
                                    "variants": rows}))


def read(path: Path, bank: Bank, origin: dict[str, str]) -> Sensitivity:
    """Read a measurement; it must be of this bank, model and text.

    Raises:
        UserError: it is none, is damaged, or is of something else, with both hashes.
    """
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        raise UserError(f"{path}: is not a sensitivity file of this toolkit; remove it, it is measured anew")
    if not is_sealed(path):
        raise UserError(f"{path}: was edited after it was made, or is damaged; remove it, it is measured anew")
    of = content.get("of") if isinstance(content.get("of"), dict) else {}
    other = [f"{role}: {files.brief(of.get(role))}, now {sha!r}" for role, sha in origin.items() if of.get(role) != sha]
    if other:
        raise UserError(f"{path}: was measured on something else; name another file, or remove this one and it is "
                        "measured anew:\n  " + "\n  ".join(other))
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

    def at_sparsity(self, sparsity: float, total: int, number: int = 1) -> list[int]:
        """Return the places of the best configurations that keep at most 1 − ``sparsity`` of ``total`` weights."""
        return np.flatnonzero(self.sizes <= (1 - sparsity) * total)[:number].tolist()

    def at_loss(self, target: float, number: int = 1) -> list[int]:
        """Return the places of the smallest configurations with a predicted loss of at most ``target``."""
        return np.flatnonzero(self.losses <= target)[::-1][:number].tolist()


def kept_weights(network, bank: Bank) -> tuple[dict[Key | str, int], int]:
    """Return how many prunable weights each variant keeps, and each block whole (by its name); and their total.

    Of an attention, q, k, v and o count; a variant that leaves q, k and v whole has only its o in the bank.
    """
    blocks = dict.fromkeys(map(block_of, prunable(network)))
    whole = {block: sum(p.numel() for n, p in network.get_submodule(block).named_parameters()
                        if not n.startswith("relative")) for block in blocks}
    sizes: dict = dict(whole)
    for (block, rates), entry in bank.entries.items():
        removed = sum(int(np.prod(t["shape"])) - t["kept"] for t in entry["tensors"].values())
        sizes[block, rates] = whole[block] - removed
    return sizes, sum(whole.values())


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
