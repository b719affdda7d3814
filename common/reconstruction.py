"""Exact block-level fine-tuning: the statistics of the original's activations, and the least-squares solver.

For a linear map with weight W (out, in), mask M and inputs x, the weights Ŵ (zero outside M) that minimise
E‖(W − Ŵ)x‖² depend on the inputs only through the Gram matrix G = E[x xᵀ]: the objective is the quadratic
tr((W − Ŵ) G (W − Ŵ)ᵀ). One pass of the original model over the text therefore serves every variant of every
block. Reconstruction of layer outputs by least squares is the idea of He et al. (2017, "Channel Pruning for
Accelerating Very Deep Neural Networks") and Frantar & Alistarh (2023, "SparseGPT"); the rows are solved here to
convergence by preconditioned conjugate gradient (Saad 2003, "Iterative Methods for Sparse Linear Systems", 9.2).
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from common.bank import Bank, Variant
from common.data import Batches
from common.files import UserError
from common.modules import kind_of
from common.training import shift_right

DAMPING = 1e-4
TOLERANCE = 1e-4  # of the residual's norm, row by row; below it the error does not change in five digits
MAX_ITERATIONS = 500
# Iterations whose errors the statistics list: dense where the error falls, sparse where it settles.
LOGGED = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, MAX_ITERATIONS)


@dataclass
class Gram:
    """Second moments of one module's input: ``matrix`` = E[x xᵀ] (in, in), float64, over ``tokens`` valid tokens."""

    matrix: torch.Tensor
    tokens: int = 0


def run_stacks(network, batch) -> torch.Tensor:
    """Run encoder and decoder on a batch without computing ``lm_head``; return the decoder's states."""
    encoded = network.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    decoder_input = shift_right(batch["labels"], network.config)
    return network.decoder(input_ids=decoder_input, encoder_hidden_states=encoded,
                           encoder_attention_mask=batch["attention_mask"], use_cache=False)[0]


def valid_tokens(name: str, batch) -> torch.Tensor:
    """Return the mask (batch, length) of tokens that count for a module: its stack's, without padding."""
    return batch["attention_mask"].bool() if name.startswith("encoder.") else batch["labels"] >= 0


def input_site(block: str) -> str:
    """Return the module whose input decides a block's solution; gated feed-forwards share one."""
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
    batch = {}

    def watch(site):
        def hook(module, inputs):
            x = inputs[0][valid_tokens(site, batch)].float()
            gram = grams.setdefault(site, Gram(torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=device)))
            gram.matrix += x.T @ x
            gram.tokens += x.shape[0]
        return hook

    hooks = [network.get_submodule(site).register_forward_pre_hook(watch(site)) for site in sites]
    try:
        for batch in batches.fixed(device):
            run_stacks(network, batch)
    finally:
        for handle in hooks:
            handle.remove()
    for site, gram in grams.items():
        gram.matrix /= gram.tokens
        if not torch.isfinite(gram.matrix).all():
            raise UserError(f"{site}: its input is not finite for some sentence; the model overflows there")
    return grams


def error(gram: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> float:
    """Return E‖(W − Ŵ)x‖² summed over outputs, for W = ``target`` and Ŵ = ``weight``, both (out, in)."""
    difference = target.double() - weight.double()
    return float(((difference @ gram) * difference).sum())


def power(gram: torch.Tensor, target: torch.Tensor) -> float:
    """Return E‖Wx‖², by which relative errors are divided."""
    return max(error(gram, target, torch.zeros_like(target)), torch.finfo(torch.float64).tiny)


@dataclass
class Solution:
    """What `solve` returns: weights (rows, in), the iterations used, the largest relative residual of a row."""

    weight: torch.Tensor
    iterations: int
    residual: float


def solve(gram: torch.Tensor, cross: torch.Tensor, prior: torch.Tensor, mask: torch.Tensor, damping: float = DAMPING,
          tolerance: float = TOLERANCE, max_iterations: int = MAX_ITERATIONS, watch=None) -> Solution:
    """Minimise tr(Ŵ G Ŵᵀ) − 2 tr(Ŵ Cᵀ) + λ‖Ŵ − W₀‖² over Ŵ that are zero outside the mask, all rows at once.

    Preconditioned conjugate gradient on the normal equations (G + λI) Ŵᵀ = Cᵀ + λW₀ᵀ restricted to each row's
    mask, with the diagonal as preconditioner; λ is ``damping`` times the mean of G's diagonal. With C = W G and
    W₀ = W this is the block-level objective; damping keeps weights of inputs that never occur at W₀.

    Args:
        gram: G, (in, in), float64, symmetric positive semi-definite.
        cross: C = E[y xᵀ], (rows, in).
        prior: W₀, (rows, in), where the iteration starts too.
        mask: bool, (rows, in), True where a weight is kept.
        watch: called as ``watch(iteration, weight)`` before the first and after each iteration.

    Raises:
        ArithmeticError: the result is not finite or the residual stays large.
    """
    gram, cross, prior = gram.double(), cross.double(), prior.double()
    ridge = max(damping * float(gram.diagonal().mean()), 1e-30)
    a = gram + ridge * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    b = torch.where(mask, cross + ridge * prior, 0.0)
    x = torch.where(mask, prior, 0.0)
    inverse = 1 / a.diagonal()
    r = torch.where(mask, b - x @ a, 0.0)
    # A row whose right-hand side is all zero is solved by zeros; its scale must not be 0.
    scale = b.norm(dim=1).clamp_min(float(b.norm()) * 1e-12 + 1e-300)
    p = z = r * inverse
    rz = (r * z).sum(dim=1)
    iteration = 0
    if watch:
        watch(0, x)
    while iteration < max_iterations and float((r.norm(dim=1) / scale).max()) > tolerance:
        q = torch.where(mask, p @ a, 0.0)
        pq = (p * q).sum(dim=1)
        alpha = torch.where(pq > 0, rz / pq, 0.0)[:, None]
        x = x + alpha * p
        r = r - alpha * q
        z = r * inverse
        rz, before = (r * z).sum(dim=1), rz
        p = z + torch.where(before > 0, rz / before, 0.0)[:, None] * p
        iteration += 1
        if watch:
            watch(iteration, x)
    # The recursion's residual drifts from the true one: what counts is the true one.
    residual = float((torch.where(mask, b - x @ a, 0.0).norm(dim=1) / scale).max())
    if not torch.isfinite(x).all() or not residual < max(100 * tolerance, 1e-3):
        raise ArithmeticError(f"the solver ended after {iteration} iterations with a relative residual of {residual:g}")
    return Solution(x, iteration, residual)


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
    """Mean relative error of all variants after each logged solver iteration, on calibration and validation text."""

    train: dict[int, float] = field(default_factory=dict)
    valid: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    variants: int = 0

    def add(self, history: list[tuple[int, float, list[float], list[float]]]) -> None:
        """Add one solve: (iteration, seconds, train errors, validation errors of its variants) rows."""
        self.variants += len(history[0][2])
        for logged in LOGGED:
            # A solve that ended earlier stays at its last error.
            _, seconds, train, valid = [row for row in history if row[0] <= logged][-1]
            self.train[logged] = self.train.get(logged, 0.0) + sum(train)
            self.valid[logged] = self.valid.get(logged, 0.0) + sum(valid)
            self.seconds[logged] = self.seconds.get(logged, 0.0) + seconds

    def rows(self, gather_seconds: float, last: int) -> list[list]:
        """Return rows for the statistics CSV, epoch = solver iteration; the first holds the passes' seconds."""
        result, before = [], 0.0
        for i in [n for n in LOGGED if n <= last or n == LOGGED[0]]:
            seconds = gather_seconds if i == 0 else self.seconds[i] - before
            before = self.seconds[i]
            result.append([i, self.train[i] / self.variants, self.valid[i] / self.variants, round(seconds, 4), 0.0])
        return result


def group_sites(network, sites: list[str], budget: int) -> list[list[str]]:
    """Split sites into groups whose statistics fit into ``budget`` bytes; each group costs one pass.

    A site needs two float64 Gram matrices (calibration, validation) and the solver three more of its size.

    Raises:
        UserError: one site alone does not fit.
    """
    groups: list[list[str]] = [[]]
    used = 0
    for site in sites:
        bytes_ = 8 * network.get_submodule(site).in_features ** 2
        if 5 * bytes_ > budget:
            raise UserError(f"{site}: its statistics need {5 * bytes_ / 2**20:.0f} MiB; give --memory-budget at least "
                            "that")
        if used + 2 * bytes_ + 3 * bytes_ > budget and groups[-1]:
            groups.append([])
            used = 0
        groups[-1].append(site)
        used += 2 * bytes_
    return groups


def tune_exactly(network, bank: Bank, calibration: Batches, valid: Batches, device, *, budget: int, damping: float,
                 curve: Curve, log=lambda text: print(text, file=sys.stderr)) -> Iterator[Report]:
    """Yield every variant of a bank, re-fitted exactly to the original's outputs.

    A linear block's weights, and the out-projection of an attention with its kept heads, become the least-squares
    solution on the calibration text. q, k and v of kept heads already reproduce the original's and stay. All
    variants of a block share its statistics and are solved together.

    Args:
        network: the original model, on ``device``.
        budget: bytes that statistics may take at a time; less memory means more passes, the same result.
        curve: filled with the errors over solver iterations. Mutated.
    """
    blocks: dict[str, list] = {}
    for block, rates in bank.entries:
        blocks.setdefault(block, []).append((block, rates))
    by_site: dict[str, list[str]] = {}
    for block in blocks:
        by_site.setdefault(input_site(block), []).append(block)
    groups = group_sites(network, list(by_site), budget)
    for n, sites in enumerate(groups):
        began = time.perf_counter()
        grams = gather(network, calibration, sites, device)
        checks = gather(network, valid, sites, device)
        log(f"statistics {n + 1}/{len(groups)}: {len(sites)} inputs, {grams[sites[0]].tokens:,} source or target "
            f"tokens, {time.perf_counter() - began:.1f} s")
        for site in sites:
            gram, check = grams.pop(site), checks.pop(site)
            if gram.tokens < gram.matrix.shape[0]:
                log(f"{site}: only {gram.tokens} tokens for {gram.matrix.shape[0]} inputs; damping decides the rest, "
                    "more calibration sentences would be better")
            for block in by_site[site]:
                yield from _tune_block(network, block, [bank.read(key) for key in blocks[block]], gram.matrix,
                                       check.matrix, device, damping, curve)


def _tune_block(network, block, variants, gram, check, device, damping, curve) -> Iterator[Report]:
    name = f"{block}.o.weight" if kind_of(block) == "attention" else f"{block}.weight"
    target = network.get_parameter(name).detach()
    rows = target.shape[0]
    stacked = target.repeat(len(variants), 1)
    mask = torch.cat([v.masks[name] for v in variants]).to(device)
    scales = power(gram, target), power(check, target)
    if not scales[0] > 1e-30:
        raise UserError(f"{block}: its output is zero on all the calibration text; nothing can be fitted to it")
    history = []
    began = time.perf_counter()
    spent = 0.0

    def errors(weight, moments, scale):
        return [error(moments, target, part) / scale for part in weight.split(rows)]

    def watch(iteration, weight):
        nonlocal began, spent
        spent += time.perf_counter() - began
        if iteration in LOGGED:
            history.append((iteration, spent, errors(weight, gram, scales[0]), errors(weight, check, scales[1])))
        began = time.perf_counter()

    try:
        solution = solve(gram, stacked.double() @ gram, stacked, mask, damping, watch=watch)
    except ArithmeticError as problem:
        raise UserError(f"{block}: {problem}; a larger --damping helps with nearly dependent inputs") from None
    spent += time.perf_counter() - began
    weight = solution.weight.float()
    history.append((solution.iterations, spent, errors(weight, gram, scales[0]), errors(weight, check, scales[1])))
    history.sort(key=lambda row: row[0])
    curve.add(history)
    (_, _, before, valid_before), (_, _, after, valid_after) = history[0], history[-1]
    for i, (variant, part) in enumerate(zip(variants, weight.split(rows), strict=True)):
        variant.weights[name] = part.cpu()
        yield Report(variant, before[i], after[i], valid_before[i], valid_after[i], spent / len(variants),
                     solution.iterations)
