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
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch

from common import training
from common.bank import Bank, Variant
from common.data import Batches
from common.files import UserError
from common.modules import HEAD_PARTS, kind_of
from common.solver import LOGGED, solve, solve_values, spread

VALUE_ROUNDS = 2  # of v between fits of o; a third lowers the error by less than 2 %
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


def of_source(name: str) -> bool:
    """Tell whether a module is applied to source tokens: the encoder's, and k and v of cross-attention."""
    return name.startswith("encoder.") or name.endswith((".EncDecAttention.k", ".EncDecAttention.v"))


def valid_tokens(name: str, batch) -> torch.Tensor:
    """Return the mask (batch, length) of tokens that count for a module: those it is applied to, without padding."""
    return batch["attention_mask"].bool() if of_source(name) else batch["labels"] >= 0


def mixed_inputs(probabilities: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Return what each head's v is applied to: the states mixed by its attention weights.

    Args:
        probabilities: (batch, heads, tgt_len, src_len).
        states: (batch, src_len, d_model).

    Returns:
        (batch, tgt_len, heads × d_model).
    """
    return torch.einsum("bhts,bsd->bthd", probabilities, states).flatten(2)


def input_site(block: str, values: bool = False) -> str:
    """Return the site whose statistics decide a block's solution; gated feed-forwards share one.

    An attention's is the input of its ``o``, or with ``values`` the attention itself: its mixed inputs.
    """
    if kind_of(block) == "attention":
        return block if values else f"{block}.o"
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
        x = x.flatten(0, 1).index_select(0, places[of_source(site)]).float()
        gram = grams.setdefault(site, Gram(torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=device)))
        gram.tokens += x.shape[0]
        for i in range(0, x.shape[1], PANEL):
            gram.matrix[i:i + PANEL, i:] += x[:, i:i + PANEL].T @ x[:, i:]

    def watch(site):
        module = network.get_submodule(site)
        if kind_of(site) != "attention":
            return module.register_forward_pre_hook(lambda _, inputs: add(site, inputs[0]))

        def mix(_, args, kwargs, output):
            states = kwargs.get("key_value_states")
            add(site, mixed_inputs(output[2], args[0] if states is None else states))
        return module.register_forward_hook(mix, with_kwargs=True)

    hooks = [watch(site) for site in sites]
    try:
        for batch in batches.fixed(device):
            places = {of_source(side): valid_tokens(side, batch).flatten().nonzero()[:, 0]
                      for side in ("encoder.", "decoder.")}
            run_stacks(network, batch)
    finally:
        for handle in hooks:
            handle.remove()
    for site, gram in grams.items():
        for i in range(PANEL, len(gram.matrix), PANEL):
            gram.matrix[i:, i - PANEL:i] = gram.matrix[i - PANEL:i, i:].T
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
    """Mean relative error of all variants after each logged solver iteration, on calibration and validation text."""

    train: dict[int, float] = field(default_factory=dict)
    valid: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    variants: int = 0

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
        """Return rows for the statistics CSV, epoch = solver iteration; the first holds the passes' seconds.

        The last row, at iteration ``last``, holds the final errors.
        """
        result, before = [], 0.0
        for i in [0, *(n for n in LOGGED if 0 < n < last), *([math.inf] if last else ())]:
            seconds = gather_seconds if i == 0 else self.seconds[i] - before
            before = self.seconds[i]
            result.append([min(i, last), self.train[i] / self.variants, self.valid[i] / self.variants,
                           round(seconds, 4), 0.0])
        return result


def grouped(network, sites: list[str], splits: list[Batches], device, budget: int,
            log=lambda text: print(text, file=sys.stderr)) -> Iterator[tuple]:
    """Yield (site, its Gram on each split) in the order of ``sites``, with as few passes as memory allows.

    A site needs a float64 Gram matrix for each split, and the work on it three more of its size.

    Raises:
        UserError: one site alone does not fit into ``budget`` bytes, or a group not into memory; before any pass.
    """
    def size(site):
        module = network.get_submodule(site)
        return 8 * (module.n_heads * module.d_model if kind_of(site) == "attention" else module.in_features) ** 2

    groups: list[list[str]] = [[]] if sites else []
    for site in sites:
        if (len(splits) + 3) * size(site) > budget:
            raise UserError(f"{site}: its statistics need {(len(splits) + 3) * size(site) / 2**20:.1f} MiB; give "
                            "--memory-budget at least that")
        if groups[-1] and len(splits) * sum(map(size, groups[-1])) + (len(splits) + 3) * size(site) > budget:
            groups.append([])
        groups[-1].append(site)
    needed = max((len(splits) * sum(map(size, group)) + 3 * max(map(size, group)) for group in groups), default=0)
    there = training.available_memory() if torch.device(device).type == "cpu" else None
    if there is not None and needed > there:
        raise UserError(f"the statistics take {needed / 2**20:.1f} MiB of memory, {there / 2**20:.1f} are available; "
                        "give a smaller --memory-budget")
    for n, group in enumerate(groups):
        began = time.perf_counter()
        grams = [gather(network, split, group, device) for split in splits]
        log(f"statistics {n + 1}/{len(groups)}: {len(group)} inputs, {grams[0][group[0]].tokens:,} tokens, "
            f"{time.perf_counter() - began:.1f} s")
        for site in group:
            gram = grams[0][site]
            if gram.tokens < gram.matrix.shape[0]:
                log(f"{site}: only {gram.tokens} tokens for {gram.matrix.shape[0]} inputs; damping decides the rest, "
                    "more calibration sentences would be better")
            yield site, [split.pop(site).matrix for split in grams]


def tune_exactly(network, bank: Bank, calibration: Batches, valid: Batches, device, *, budget: int, damping: float,
                 curve: Curve, values: bool = False, skip: Collection = (),
                 log=lambda text: print(text, file=sys.stderr)) -> Iterator[Report]:
    """Yield every variant of a bank, re-fitted exactly to the original's outputs.

    A linear block's weights, and the out-projection of an attention with its kept heads, become the least-squares
    solution on the calibration text. q and k of kept heads stay, and v unless ``values``. All variants of a block
    share its statistics; those of a linear map are solved together.

    Args:
        network: the original model, on ``device``.
        budget: bytes that statistics may take at a time; less memory means more passes, the same result.
        curve: filled with the errors over solver iterations. Mutated.
        values: fit v of the kept heads too, in turn with ``o``.
        skip: keys of variants that are left out.
    """
    blocks: dict[str, list] = {}
    for block, rates in bank.entries:
        if (block, rates) not in skip:
            blocks.setdefault(block, []).append((block, rates))
    by_site: dict[str, list[str]] = {}
    for block, keys in blocks.items():
        mixed = values and kind_of(block) == "attention" and any(rates[0] for _, rates in keys)
        by_site.setdefault(input_site(block, mixed), []).append(block)
    if values:
        network.set_attn_implementation("eager")  # the one that returns the attention's weights
    for site, (gram, check) in grouped(network, list(by_site), [calibration, valid], device, budget, log):
        for block in by_site[site]:
            fit = _fit_attention if site == block and kind_of(block) == "attention" else _fit_rows
            variants = [bank.read(key) for key in blocks[block]]
            try:
                yield from fit(network, block, variants, gram, check, device, damping, curve)
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
        self.rows, self.spent, self.began = [], 0.0, time.perf_counter()

    def stop(self):
        self.spent += time.perf_counter() - self.began

    def note(self, iteration, weights: list[torch.Tensor], rough=False):
        """Add a row (iteration, seconds, errors of the variants, their errors on validation text)."""
        moments = [(m, 1.0) for m in self.rough] if rough else zip(self.moments, self.scales, strict=True)
        errors = [[error(m, self.target, w) / scale for w in weights] for m, scale in moments]
        self.rows.append((iteration, self.spent, *errors))

    def start(self):
        self.began = time.perf_counter()

    def reports(self, variants, curve: Curve) -> Iterator[Report]:
        """Yield the variants' reports and add the errors over iterations to the curve."""
        curve.add(self.rows)
        (_, _, *before), (iterations, _, *after) = self.rows[0], self.rows[-1]
        for i, variant in enumerate(variants):
            yield Report(variant, before[0][i], after[0][i], before[1][i], after[1][i], self.spent / len(variants),
                         iterations)


def check_original(network, variant: Variant, parts: tuple[str, ...]) -> None:
    """Raise `UserError` unless these projections are still the original's, on whose outputs ``o`` is fitted."""
    for part in parts:
        name = f"{variant.block}.{part}.weight"
        if name in variant.weights and not torch.equal(
                variant.weights[name], torch.where(variant.masks[name], network.get_parameter(name).cpu(), 0.0)):
            raise UserError(f"{variant.block}: its {part} was tuned already, and the exact solver fits o to the "
                            "original's; give the bank that prune.py wrote, or --solver adamw")


def _fit_rows(network, block, variants, gram, check, device, damping, curve) -> Iterator[Report]:
    name = f"{block}.o.weight" if kind_of(block) == "attention" else f"{block}.weight"
    for variant in variants:
        check_original(network, variant, HEAD_PARTS)
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
    for variant, part in zip(variants, parts, strict=True):
        variant.weights[name] = part.cpu()
    yield from history.reports(variants, curve)


def _fit_attention(network, block, variants, gram, check, device, damping, curve) -> Iterator[Report]:
    """Fit ``o`` and v of the kept heads in turn; the errors over iterations count both solvers' iterations."""
    attention = network.get_submodule(block)
    heads = attention.n_heads
    o, v = (getattr(attention, part).weight.detach().double() for part in ("o", "v"))
    target = o @ spread(v, heads)
    cross = target @ gram
    for variant in variants:
        check_original(network, variant, ("q", "k"))
        history = _History(block, target, gram, check)
        mask = variant.masks[f"{block}.o.weight"].to(device)
        rows = variant.masks.get(f"{block}.v.weight")
        kept = torch.ones(heads, dtype=torch.bool) if rows is None else rows[:: rows.shape[0] // heads, 0]
        kept = kept.to(device)
        new_o, new_v, iterations = torch.where(mask, o, 0.0), v, 0
        history.note(0, [new_o @ spread(new_v, heads)])
        history.start()
        for turn in range(2 * VALUE_ROUNDS + 1 if rows is not None else 1):
            if turn % 2 == 0:
                mixing = spread(new_v, heads)
                solution = solve(mixing @ gram @ mixing.T, cross @ mixing.T, new_o, mask, damping)
                new_o = solution.weight
            else:
                solution = solve_values(gram, cross, new_o, new_v, kept, damping)
                new_v = solution.weight
            iterations += solution.iterations
            history.stop()
            history.note(iterations, [new_o @ spread(new_v, heads)])
            history.start()
        variant.weights[f"{block}.o.weight"] = new_o.float().cpu()
        if rows is not None:
            variant.weights[f"{block}.v.weight"] = torch.where(rows.to(device), new_v, 0.0).float().cpu()
        yield from history.reports([variant], curve)
