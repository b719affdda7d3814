"""Predict a composed model's loss from its variants' losses one by one, and find the best configurations so.

The validation loss of the original with one variant in place, minus that of the original, is the variant's cost. The
predicted loss of a configuration is the original's plus the costs of all its variants; it is that of the recalibrated
model, for what recalibration leaves is what variants do apart from each other (docs/experiment.md has the figures).
That makes the choice of one variant (or none) for every block a multiple-choice knapsack problem, which is solved for
all sizes at once by merging Pareto fronts block by block (Nemhauser & Ullmann 1969, "Discrete Dynamic Programming and
Capital Allocation"). A size is a number of weights, or the time that `common.pruning.latency` expects.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.files.atomic import write_bytes
from common.files.jsonfile import read_measurement, sealed
from common.pruning.bank import Bank, Key
from common.pruning.configurations import Configuration, required_variants
from common.runtime import progress
from common.t5.loss import TranslationLoss, evaluate, network_inputs, token_loss
from common.t5.model import Model
from common.t5.modules import kind_of, members, parent_of, prunable, weight_names
from common.t5.walk import Sublayer, walk
from common.text.batches import Batches

VERSION = 1
RESOLUTION = 20_000  # sizes that a front tells apart
LARGEST = 1e6  # loss that a file may hold; sums of more could overflow
# At first an epoch of training is expected to bring a composed model whose loss lies by this share of the original's
# above it down to the original's, and to leave so much of what lies beyond. (So it was with Multi30K's T5.)
START, LEFT = 0.07, 0.6
MARGIN = 0.9  # of what a line says can be allowed, or of the least that failed


@dataclass
class Sensitivity:
    """What `measure` found: the original's validation loss, and the loss with each variant alone in its place."""

    dense: float
    losses: dict[Key, float]


@torch.no_grad()
def measure(model: Model, bank: Bank, valid: Batches, device) -> Sensitivity:
    """Evaluate the original with each variant of a bank alone in the place of its block.

    What comes before a sub-layer is computed once for all of its variants.

    Args:
        model: the original, its network on ``device``; as before when this returns.
    """
    network, losses, batches = model.network, {}, list(valid.fixed(device))
    dense = evaluate(TranslationLoss(network), valid, device)
    with progress(what="evaluating variants", total=len(bank.entries)) as bar:
        for sublayer in walk(network, [batches], device):
            for key in (key for key in bank.entries if f"{key[0]}.".startswith(f"{sublayer.name}.")):
                variant = bank.read(key)
                before = {name: network.get_parameter(name).clone() for name in variant.weights}
                try:
                    for name, weight in variant.weights.items():
                        network.get_parameter(name).copy_(weight)
                    losses[key] = _loss_from(network, sublayer, batches)
                finally:
                    for name, weight in before.items():
                        network.get_parameter(name).copy_(weight)
                bar.update()
    return Sensitivity(dense, {key: losses[key] for key in bank.entries})


def _loss_from(network, sublayer: Sublayer, batches: list[dict]) -> float:
    """Return the loss per token of a text that has come as far as a sub-layer."""
    total = count = 0.0
    for stream, batch in zip(sublayer.splits[0], batches, strict=True):
        inputs, tokens = network_inputs(batch, network.config)
        if sublayer.name.startswith("encoder"):
            states = network.encoder.from_layer(sublayer.number, stream.states, stream.mask)
            states = network.decoder(inputs["decoder_input_ids"], None, states, stream.mask)
        else:
            states = network.decoder.from_layer(sublayer.number, stream.states, None, stream.source.states,
                                                stream.source.mask)
        loss, n = token_loss(network.head(states[inputs["where"]]), tokens)
        total, count = total + float(loss), count + n
    return total / count


def write(path: Path, found: Sensitivity, origin: dict[str, str]) -> None:
    """Write a measurement, sealed as a scheme is; ``origin`` says what of, {role: SHA-256}."""
    rows = [{"block": block, "rates": list(rates), "validation_loss": loss}
            for (block, rates), loss in found.losses.items()]
    write_bytes(path, sealed({"format": "composable-pruning sensitivity", "version": VERSION, "of": origin,
                              "dense": found.dense, "variants": rows}))


def read(path: Path, bank: Bank, origin: dict[str, str]) -> Sensitivity:
    """Read a measurement; it must be of this bank, model and text.

    Raises:
        UserError: it is none, is damaged, or is of something else, with both hashes.
    """
    content = read_measurement(path, "sensitivity", VERSION, origin)
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
    """All configurations that no other beats: ``sizes`` (what is kept) falling, ``losses`` (predicted) rising."""

    sizes: np.ndarray
    losses: np.ndarray
    _picks: list[tuple[list, np.ndarray, np.ndarray]]

    def configuration(self, i: int) -> Configuration:
        """Return the ``i``-th configuration."""
        chosen = []
        for options, option, parent in reversed(self._picks):
            chosen = [*options[option[i]], *chosen]
            i = parent[i]
        return {name: rate for key in chosen for name, rate in zip(members(key[0]), key[1], strict=True)
                if rate or name == key[0]}

    def at_sparsity(self, sparsity: float, total: int) -> int | None:
        """Return the place of the best configuration that keeps at most 1 − ``sparsity`` of ``total`` weights."""
        return self.at_size(round((1 - sparsity) * total, 3))  # (1 - 0.9) * 1000 is below 100

    def at_size(self, size: float) -> int | None:
        """Return the place of the best configuration of at most this size."""
        found = np.flatnonzero(self.sizes <= size)
        return int(found[0]) if len(found) else None

    def at_loss(self, target: float) -> int | None:
        """Return the place of the smallest configuration with a predicted loss of at most ``target``."""
        found = np.flatnonzero(self.losses <= target)
        return int(found[-1]) if len(found) else None


def predict(found: Sensitivity, configuration: Configuration) -> float:
    """Return the loss expected of a configuration, composed and recalibrated: the variants' costs added up.

    Raises:
        KeyError: a variant has not been measured.
    """
    return found.dense + sum(found.losses[key] - found.dense for key in required_variants(configuration).items())


def aim(limit: float, dense: float, failed: list[tuple[float, float]]) -> float:
    """Return what a composed model's predicted loss may lie above the original's, to be at most ``limit`` once trained.

    The loss after training is expected on a line over the predicted loss. At first that is a guess (`START`, `LEFT`);
    then it goes through what trainings gave that failed. `MARGIN` is left. Below 0: none.

    Args:
        dense: the original's validation loss, of the text that ``limit`` is of.
        failed: of each training so far, what was predicted above the original's, and the loss that it ended with.
    """
    guess = dense * (1 - LEFT * START)
    floor, slope = guess, LEFT
    for i, (above, loss) in enumerate(failed):
        before, other = failed[i - 1] if i else (0.0, guess)
        if abs(above - before) > 1e-3 and (loss - other) / (above - before) > 0.01:
            slope = (loss - other) / (above - before)
        floor = loss - slope * above
    return MARGIN * min([(limit - floor) / slope, *(above for above, _ in failed)])


def removed_weights(model: Model, bank: Bank) -> tuple[dict[Key, int], int, int]:
    """Return how many weights each variant removes of those that are there; how many prunable ones are, of how many.

    Fewer are there than there are where an earlier round of pruning removed some (``model.masks``).
    """
    present, total = {}, 0
    for name in {name for module in prunable(model.network) for name in weight_names(module)}:
        if (mask := model.masks.get(name)) is not None:
            present[name], total = int(mask.sum()), total + mask.numel()
        elif (parameter := model.network.state_dict(keep_vars=True).get(name)) is not None:
            present[name], total = parameter.numel(), total + parameter.numel()
    removed = {key: sum(present[n] - t["kept"] for n, t in entry["tensors"].items())
               for key, entry in bank.entries.items()}
    return removed, sum(present.values()), total


def _alternatives(keys) -> list[list[tuple[Key, ...]]]:
    """Return, for every part of the model that is chosen apart, what it can be: sets of variants, the empty one first.

    A feed-forward that can lose hidden units is one part: either one of its variants, or any of its linear modules'.
    """
    blocks: dict[str, list[Key]] = {}
    for key in keys:
        blocks.setdefault(key[0], []).append(key)
    whole = [block for block in blocks if kind_of(block) == "feed-forward"]
    parts = {block: [block] for block in blocks if parent_of(block) not in whole}
    for block in blocks:
        if parent_of(block) in whole:
            parts[parent_of(block)].append(block)
    result = []
    for block, inside in parts.items():
        apart = [[(), *((key,) for key in blocks[b])] for b in (inside[1:] if block in whole else inside)]
        options = [sum(choice, ()) for choice in itertools.product(*apart)]
        result.append(options + ([(key,) for key in blocks[block]] if block in whole else []))
    return result


def front(found: Sensitivity, removed: dict[Key, int], present: int) -> Front:
    """Return every configuration out of a bank's variants that is best for its size, by predicted loss.

    Exact up to `RESOLUTION` sizes; among configurations whose sizes agree so far, the best is kept.

    Args:
        removed, present: what each variant takes away of the whole, in whole weights (`removed_weights`) or
            nanoseconds (`common.pruning.latency.saved`).
    """
    grain = max(present / RESOLUTION, 1.0)
    at, losses, picks = np.array([float(present)]), np.array([found.dense]), []
    for options in _alternatives(found.losses):
        size = np.array([-sum(removed[key] for key in keys) for keys in options], dtype=float)
        cost = np.array([sum(found.losses[key] - found.dense for key in keys) for keys in options], dtype=float)
        new_size, new_loss = (at[:, None] + size).ravel(), (losses[:, None] + cost).ravel()
        order = np.lexsort((new_size, new_loss))  # from the lowest loss on, keep what is smaller than all before
        smallest = np.minimum.accumulate(np.floor(new_size[order] / grain))
        keep = order[np.r_[True, smallest[1:] < smallest[:-1]]]
        at, losses = new_size[keep], new_loss[keep]
        picks.append((options, keep % len(options), keep // len(options)))
    return Front(at, losses, picks)
