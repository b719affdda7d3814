"""Exact block-level fine-tuning: the statistics of the original's activations, and the least-squares solver.

For a linear map with weight W (out, in), mask M and inputs x, the weights Ŵ (zero outside M) that minimise
E‖(W − Ŵ)x‖² depend on the inputs only through the Gram matrix G = E[x xᵀ]: the objective is the quadratic
tr((W − Ŵ) G (W − Ŵ)ᵀ). One pass of the original model over the text therefore serves every variant of every
block. Reconstruction of layer outputs by least squares is the idea of He et al. (2017, "Channel Pruning for
Accelerating Very Deep Neural Networks") and Frantar & Alistarh (2023, "SparseGPT"); here every row is solved to
convergence (`common.solver`).
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from common import training
from common.bank import Bank, Variant
from common.data import Batches
from common.files import UserError
from common.modules import HEAD_PARTS, kind_of
from common.solver import LOGGED, solve

PANEL = 128  # columns of a Gram matrix computed at a time, from the diagonal on: half of 512 x 512 is never computed


@dataclass
class Gram:
    """Second moments of one module's input: ``matrix`` = E[x xᵀ] (in, in), float64, over ``tokens`` valid tokens."""

    matrix: torch.Tensor
    tokens: int = 0


def run_stacks(network, batch) -> torch.Tensor:
    """Run encoder and decoder on a batch without computing ``lm_head``; return the decoder's states."""
    encoded = network.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    decoder_input = training.shift_right(batch["labels"], network.config)
    return network.decoder(input_ids=decoder_input, encoder_hidden_states=encoded,
                           encoder_attention_mask=batch["attention_mask"], use_cache=False)[0]


def side_of(name: str) -> str:
    """Return which tokens a module is applied to: ``source`` in the encoder and k, v of cross-attention, or target."""
    crossed = name.endswith((".EncDecAttention.k", ".EncDecAttention.v"))
    return "source" if crossed or name.startswith("encoder.") else "target"


def valid_tokens(name: str, batch) -> torch.Tensor:
    """Return the mask (batch, length) of tokens that count for a module: those it is applied to, without padding."""
    return batch["attention_mask"].bool() if side_of(name) == "source" else batch["labels"] >= 0


def add_products(matrix: torch.Tensor, x: torch.Tensor) -> None:
    """Add xᵀx, of rows x (tokens, in), to ``matrix`` (in, in); the part left of the diagonal is left to `mirror`."""
    for i in range(0, x.shape[1], PANEL):
        matrix[i:i + PANEL, i:] += x[:, i:i + PANEL].T @ x[:, i:]


def mirror(matrix: torch.Tensor) -> None:
    """Make a matrix that `add_products` filled symmetric. Mutates it."""
    for i in range(PANEL, len(matrix), PANEL):
        matrix[i:, i - PANEL:i] = matrix[i - PANEL:i, i:].T


def input_site(block: str) -> str:
    """Return the linear module whose input's statistics decide a block's solution; gated feed-forwards share one."""
    if kind_of(block) == "attention":
        return f"{block}.o"
    return f"{block[:-1]}0" if block.endswith(".wi_1") else block


@torch.no_grad()
def gather(network, batches: Batches, sites: list[str], device) -> dict[str, Gram]:
    """Return the Gram matrix of every site's input, from one pass of the network in evaluation mode.

    Padding never counts. Products are float32 (TF32 is off by default), sums float64.

    Raises:
        UserError: an activation is not finite, names the module.
    """
    network.eval()
    grams: dict[str, Gram] = {}
    places = {}

    def add(site, x):
        x = x.flatten(0, 1).index_select(0, places[side_of(site)]).float()
        gram = grams.setdefault(site, Gram(torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=device)))
        gram.tokens += x.shape[0]
        add_products(gram.matrix, x)

    def watch(site):
        return network.get_submodule(site).register_forward_pre_hook(lambda _, inputs: add(site, inputs[0]))

    hooks = [watch(site) for site in sites]
    try:
        for batch in batches.fixed(device):
            places = {side_of(side): valid_tokens(side, batch).flatten().nonzero()[:, 0]
                      for side in ("encoder.", "decoder.")}
            run_stacks(network, batch)
    finally:
        for handle in hooks:
            handle.remove()
    for site, gram in grams.items():
        mirror(gram.matrix)
        gram.matrix /= gram.tokens
        if not torch.isfinite(gram.matrix).all():
            raise UserError(f"{site}: its input is not finite for some sentence; the model overflows there")
    return grams


def error(gram: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> float:
    """Return E‖(W − Ŵ)x‖² summed over outputs, for W = ``target`` and Ŵ = ``weight``, both (out, in)."""
    difference = (target.double() - weight.double()).to(gram.dtype)
    return float(((difference @ gram) * difference).sum())


def power(gram: torch.Tensor, target: torch.Tensor) -> float:
    """Return E‖Wx‖², by which relative errors are divided."""
    return max(error(gram, target, torch.zeros_like(target)), torch.finfo(torch.float64).tiny)


@dataclass
class Report:
    """One tuned variant's line in the table of variants: errors are relative to the output's power."""

    variant: Variant
    before: float
    after: float
    valid_before: float
    valid_after: float
    seconds: float
    iterations: int


@dataclass
class Curve:
    """Mean relative error of all variants after each logged solver iteration, on calibration and validation text.

    ``validation``: seconds spent on validation text, and on errors that are only shown.
    """

    train: dict[int, float] = field(default_factory=dict)
    valid: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    variants: int = 0
    validation: float = 0.0

    def add(self, history: list[tuple[int, float, list[float], list[float]]]) -> None:
        """Add one solve: (iteration, seconds, train errors, validation errors of its variants) rows."""
        self.variants += len(history[0][2])
        for logged in (*LOGGED, math.inf):
            # A solve that ended earlier stays at its last error.
            _, seconds, train, valid = [row for row in history if row[0] <= logged][-1]
            self.train[logged] = self.train.get(logged, 0.0) + sum(train)
            self.valid[logged] = self.valid.get(logged, 0.0) + sum(valid)
            self.seconds[logged] = self.seconds.get(logged, 0.0) + seconds

    def rows(self, gather_seconds: float, last: int) -> list[list]:
        """Return rows for the statistics CSV, epoch = solver iteration; the last, at ``last``, has the final errors.

        The first holds the seconds of gathering statistics, and those of validation.
        """
        result, before = [], 0.0
        for i in [0, *(n for n in LOGGED if 0 < n < last), *([math.inf] if last else ())]:
            seconds = gather_seconds if i == 0 else self.seconds[i] - before
            before = self.seconds[i]
            result.append([min(i, last), self.train[i] / self.variants, self.valid[i] / self.variants,
                           round(seconds, 4), round(0.0 if i else self.validation, 4)])
        return result


def check_budget(need: dict[str, int], budget: int, what: str, more: str = "") -> None:
    """Raise `UserError` if the largest of the bytes that blocks ``need``, each by itself, is above ``budget``."""
    block = max(need, key=need.get, default=None)
    if block and need[block] > budget:
        raise UserError(f"{block}: its {what} need {math.ceil(need[block] / 2**20)} MiB; give --memory-budget at least "
                        f"that{more}")


def grouped(network, sites: list[str], splits: list[Batches], device, budget: int, curve: Curve | None = None,
            log=lambda text: print(text, file=sys.stderr)) -> Iterator[tuple]:
    """Yield (site, its Gram on each split) in the order of ``sites``, with as few passes as memory allows.

    A site needs a float64 Gram matrix for each split, and the work on it three more of its size. The list of Grams is
    emptied when the next site is asked for.

    Args:
        curve: the seconds of the passes over all splits but the first are added to its ``validation``. Mutated.

    Raises:
        UserError: one site alone does not fit into ``budget`` bytes, or a group not into memory; before any pass.
    """
    def size(site):
        return 8 * network.get_submodule(site).in_features ** 2

    check_budget({site: (len(splits) + 3) * size(site) for site in sites}, budget, "statistics")
    groups: list[list[str]] = [[]] if sites else []
    for site in sites:
        if groups[-1] and len(splits) * sum(map(size, groups[-1])) + (len(splits) + 3) * size(site) > budget:
            groups.append([])
        groups[-1].append(site)
    needed = max((len(splits) * sum(map(size, group)) + 3 * max(map(size, group)) for group in groups), default=0)
    there = training.available_memory() if torch.device(device).type == "cpu" else None
    if there is not None and needed > there:
        raise UserError(f"the statistics take {needed / 2**20:.1f} MiB of memory, {there / 2**20:.1f} are available; "
                        "give a smaller --memory-budget")
    for n, group in enumerate(groups):
        grams, seconds = [], []
        for split in splits:
            began = time.perf_counter()
            grams.append(gather(network, split, group, device))
            seconds.append(time.perf_counter() - began)
        if curve:
            curve.validation += sum(seconds[1:])
        log(f"statistics {n + 1}/{len(groups)}: {len(group)} inputs, {grams[0][group[0]].tokens:,} tokens, "
            f"{sum(seconds):.1f} s")
        for site in group:
            tokens, inputs = grams[0][site].tokens, len(grams[0][site].matrix)
            if tokens < inputs:
                log(f"{site}: only {tokens} tokens for {inputs} inputs; damping decides the rest, more calibration "
                    "sentences would be better")
            matrices = [split.pop(site).matrix for split in grams]
            yield site, matrices
            matrices.clear()  # or the next pass would find them beside its own


def cached(need: dict[str, int], budget: int, splits: list[Batches], take, what: str, curve: Curve,
           log) -> Iterator[tuple[str, list]]:
    """Yield (block, what ``take(split, blocks)`` holds for it on each split), with as few passes as memory allows.

    The list is emptied when the next block is asked for.

    Args:
        need: bytes that each block's part takes, none more than ``budget``.
        what: the blocks' name for the log.
        curve: the seconds of the passes over all splits but the first are added to its ``validation``. Mutated.
    """
    groups, used = [], budget
    for block, size in need.items():
        if used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(block)
        used += size
    for n, group in enumerate(groups):
        taken, seconds = [], []
        for split in splits:
            began = time.perf_counter()
            taken.append(take(split, group))
            seconds.append(time.perf_counter() - began)
        curve.validation += sum(seconds[1:])
        log(f"activations {n + 1}/{len(groups)}: {len(group)} {what}, {sum(seconds):.1f} s")
        for block in group:
            parts = [held.pop(block) for held in taken]
            yield block, parts
            parts.clear()  # or the next pass would find them beside its own


def tune_exactly(network, bank: Bank, calibration: Batches, valid: Batches, device, *, budget: int, damping: float,
                 curve: Curve, log=lambda text: print(text, file=sys.stderr)) -> Iterator[Report]:
    """Yield every variant of a bank, re-fitted exactly to the original's outputs.

    A linear block's weights, and the out-projection of an attention with its kept heads, become the least-squares
    solution on the calibration text. q, k and v of kept heads stay. All variants of a block share its statistics and
    are solved together.

    Args:
        network: the original model, on ``device``.
        budget: bytes that statistics may take at a time; less memory means more passes, the same result.
        curve: filled with the errors over solver iterations. Mutated.

    Raises:
        UserError: an error by name, or an attention whose q, k or v were tuned before.
    """
    blocks: dict[str, list] = {}
    for key in bank.entries:
        blocks.setdefault(key[0], []).append(key)
    by_site: dict[str, list[str]] = {}
    for block in blocks:
        by_site.setdefault(input_site(block), []).append(block)
    for site, moments in grouped(network, list(by_site), [calibration, valid], device, budget, curve, log):
        for block in by_site[site]:
            variants = [bank.read(key) for key in blocks[block]]
            try:
                yield from _fit(network, block, variants, *moments, device, damping, curve)
            except ArithmeticError as problem:
                raise UserError(f"{block}: {problem}; a larger --damping helps with nearly dependent "
                                "inputs") from None


class _History:
    """Errors and seconds of one solve while it runs; the clock stands still while errors are computed."""

    def __init__(self, block, target, gram, check):
        self.target, self.moments = target, (gram, check)
        self.scales = [power(m, target) for m in self.moments]
        self.rough = [(m / scale).float() for m, scale in zip(self.moments, self.scales, strict=True)]
        if not self.scales[0] > 1e-30:
            raise UserError(f"{block}: its output is zero on all the calibration text; nothing can be fitted to it")
        self.rows, self.spent, self.measuring, self.began = [], 0.0, 0.0, time.perf_counter()

    def stop(self):
        self.stopped = time.perf_counter()
        self.spent += self.stopped - self.began

    def note(self, iteration, weights: list[torch.Tensor], rough=False):
        """Add a row (iteration, seconds, errors of the variants, their errors on validation text)."""
        moments = [(m, 1.0) for m in self.rough] if rough else zip(self.moments, self.scales, strict=True)
        errors = [[error(m, self.target, w) / scale for w in weights] for m, scale in moments]
        self.rows.append((iteration, self.spent, *errors))

    def start(self):
        self.began = time.perf_counter()
        self.measuring += self.began - self.stopped

    def reports(self, variants, curve: Curve) -> Iterator[Report]:
        """Yield the variants' reports and add the errors over iterations to the curve."""
        curve.add(self.rows)
        curve.validation += self.measuring
        (_, _, *before), (iterations, _, *after) = self.rows[0], self.rows[-1]
        for i, variant in enumerate(variants):
            yield Report(variant, before[0][i], after[0][i], before[1][i], after[1][i], self.spent / len(variants),
                         iterations)


def check_original(network, variant: Variant) -> None:
    """Raise `UserError` unless q, k and v are still the original's, on whose outputs ``o`` is fitted."""
    for part in HEAD_PARTS:
        name = f"{variant.block}.{part}.weight"
        if name in variant.weights and not torch.equal(
                variant.weights[name], torch.where(variant.masks[name], network.get_parameter(name).cpu(), 0.0)):
            raise UserError(f"{variant.block}: its {part} was tuned already, and the exact solver fits o to the "
                            "original's; give the bank that prune.py wrote, or --solver adamw")


def _fit(network, block, variants, gram, check, device, damping, curve) -> Iterator[Report]:
    name = f"{block}.o.weight" if kind_of(block) == "attention" else f"{block}.weight"
    for variant in variants:
        check_original(network, variant)
    target = network.get_parameter(name).detach()
    stacked = target.repeat(len(variants), 1)
    mask = torch.cat([v.masks[name] for v in variants]).to(device)
    history = _History(block, target, gram, check)

    def watch(iteration, weight):
        history.stop()
        history.note(iteration, weight.split(target.shape[0]), rough=iteration > 0)
        history.start()

    solution = solve(gram, (target.double() @ gram).repeat(len(variants), 1), stacked, mask, damping, watch=watch)
    history.stop()
    parts = solution.weight.float().split(target.shape[0])
    history.note(solution.iterations, parts)
    history.start()
    for variant, part in zip(variants, parts, strict=True):
        variant.weights[name] = part.cpu()
    yield from history.reports(variants, curve)
