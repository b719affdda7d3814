"""Block level for the inputs of feed-forwards: wi re-fitted for the tokens on which each hidden unit passes on.

Least squares on wi's own outputs (`common.reconstruction`) spends weights on values that the ReLU sets to zero.
What counts is the hidden unit h = act(y), to first order h's change is ∂h/∂y times
y's, and so every unit has least squares of its own: minimise E[a (w − ŵ)ᵀx xᵀ(w − ŵ)] with a = (∂h/∂y)², for a ReLU
the tokens on which the original's unit is active. (The Gauss-Newton approximation: Nocedal & Wright 2006, "Numerical
Optimization", section 10.3; one row of wi at a time.) Other tokens keep a small weight, so that a unit stays off where
it is off. For gated units h = act(y₀)·y₁ the same holds for either input, with the other the original's.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator

import torch

from common.bank import Bank, Variant
from common.data import Batches
from common.files import UserError
from common.modules import kind_of
from common.reconstruction import Curve, Report, cached, check_budget, run_stacks, side_of, valid_tokens
from common.solver import solve_rows

FLOOR = 0.5  # every token's least weight, in means of the unit's weights


def is_input(block: str) -> bool:
    """Tell whether a block feeds a feed-forward's hidden units: wi, wi_0 or wi_1."""
    return kind_of(block) == "linear" and not block.endswith(".wo")


def others(bank: Bank) -> Bank:
    """Return a bank with the variants that `tune` leaves out."""
    return dataclasses.replace(bank, entries={k: e for k, e in bank.entries.items() if not is_input(k[0])})


def row_grams(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of a x xᵀ for each unit, a = its weights plus `FLOOR` of their mean.

    Args:
        x: (tokens, in).
        weights: (tokens, units), not negative.

    Returns:
        (units, in, in).
    """
    everywhere, grams = x.T @ x, x.new_empty(weights.shape[1], x.shape[1], x.shape[1])
    for gram, a in zip(grams, weights.T, strict=True):
        on = a.nonzero()[:, 0]
        some = x[on] * a[on, None].sqrt()
        torch.addmm(everywhere, some.T, some, beta=FLOOR * float(a.mean()), out=gram)
    return grams.div_(len(x))


@torch.no_grad()
def _inputs(network, batches: Batches, blocks: list[str], device) -> dict[str, torch.Tensor]:
    """Return what each block receives on a text: (valid tokens, d_model)."""
    seen = {block: [] for block in blocks}

    def watch(block):
        return network.get_submodule(block).register_forward_pre_hook(
            lambda _, inputs: seen[block].append(inputs[0][valid_tokens(block, batch)]))

    hooks = [watch(block) for block in blocks]
    try:
        for batch in batches.fixed(device):
            run_stacks(network, batch)
    finally:
        for handle in hooks:
            handle.remove()
    for block, x in seen.items():
        seen[block] = torch.cat(x)
        if not torch.isfinite(seen[block]).all():
            raise UserError(f"{block}: its input is not finite for some sentence; the model overflows there")
    return seen


class _Units:
    """The hidden units of one feed-forward behind one of its inputs, some rows of it at a time."""

    def __init__(self, network, block: str):
        feed_forward, _, self.part = block.rpartition(".")
        self.dense, self.weight = network.get_submodule(feed_forward), network.get_parameter(f"{block}.weight").detach()

    def hidden(self, x: torch.Tensor, y: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return the units (tokens, rows) for inputs x (tokens, d_model) and this part's outputs y."""
        if self.part == "wi":
            return self.dense.act(y)
        if self.part == "wi_0":
            return self.dense.act(y) * (x @ self.dense.wi_1.weight[rows].T)
        return self.dense.act(x @ self.dense.wi_0.weight[rows].T) * y

    def weights(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return (∂h/∂y)² (tokens, rows); where it is 0 for all tokens, 1 for all."""
        with torch.enable_grad():
            y = (x @ self.weight[rows].T).requires_grad_()
            a = torch.autograd.grad(self.hidden(x, y, rows).sum(), y)[0].square()
        return torch.where(a.any(dim=0), a, 1.0)

    def errors(self, x: torch.Tensor, weights: list[torch.Tensor], chunks: list[slice]) -> list[float]:
        """Return E‖h − ĥ‖² / E‖h‖² for each of the weights (rows, d_model)."""
        power, sums = 1e-300, [0.0] * len(weights)
        for rows in chunks:
            h = self.hidden(x, x @ self.weight[rows].T, rows)
            power += float(h.square().sum(dtype=torch.float64))
            for i, w in enumerate(weights):
                sums[i] += float((self.hidden(x, x @ w[rows].T, rows) - h).square().sum(dtype=torch.float64))
        return [s / power for s in sums]


def tune(network, bank: Bank, text: Batches, valid: Batches, device, *, budget: int, damping: float, curve: Curve,
         log=lambda line: print(line, file=sys.stderr)) -> Iterator[Report]:
    """Return the variants of a bank that feed hidden units (`is_input`), re-fitted for these; errors are theirs.

    What can be refused is refused at once; the work is done when the reports are asked for.

    Args:
        network: the original model, on ``device``.
        text: what weights and moments of the units are taken from.
        budget: bytes, half for cached inputs, half for moments; less means more passes, the same result.
        curve: the errors before and after are added to it, and the seconds that measuring them takes. Mutated.

    Raises:
        UserError: one block alone does not fit into ``budget``, or an error by name.
    """
    keys: dict[str, list] = {}
    for key in bank.entries:
        if is_input(key[0]):
            keys.setdefault(key[0], []).append(key)
    tokens = {side: sum(len(getattr(e, side)) for split in (text, valid) for e in split.dataset.examples)
              for side in ("source", "target")}
    need, unit = {}, {}
    for block in keys:
        inputs, count = network.get_parameter(f"{block}.weight").shape[1], tokens[side_of(block)]
        need[block], unit[block] = 4 * count * inputs, 16 * inputs ** 2 + 32 * count + 64 * inputs * len(keys[block])
    check_budget({block: 2 * max(need[block], unit[block]) for block in keys}, budget, "hidden units",
                 ", or fewer --hidden-sentences")

    @torch.no_grad()
    def reports():
        network.eval().requires_grad_(False)
        for block, texts in cached(need, budget // 2, [text, valid],
                                   lambda batches, blocks: _inputs(network, batches, blocks, device), "feed-forwards",
                                   curve, log):
            rows = len(network.get_parameter(f"{block}.weight"))
            step = min(rows, budget // 2 // unit[block])
            chunks = [slice(at, at + step) for at in range(0, rows, step)]
            try:
                yield from _tune_one(network, block, [bank.read(key) for key in keys[block]], *texts, chunks, damping,
                                     curve)
            except ArithmeticError as problem:
                raise UserError(f"{block}: {problem}; a larger --damping helps with nearly dependent "
                                "inputs") from None

    return reports()


def _tune_one(network, block, variants: list[Variant], x, check, chunks, damping, curve) -> Iterator[Report]:
    began, name, units, iterations = time.perf_counter(), f"{block}.weight", _Units(network, block), 0
    masks = torch.stack([v.masks[name] for v in variants]).to(x.device)
    masked = torch.where(masks, units.weight, 0.0)
    tuned = masked.clone()
    for rows in chunks:
        grams, target = row_grams(x, units.weights(x, rows)), units.weight[rows]
        cross = torch.bmm(grams, target[:, :, None])[:, :, 0]
        solution = solve_rows(grams, cross, target, masks[:, rows], damping)
        tuned[:, rows], iterations = solution.weight.float(), max(iterations, solution.iterations)
    seconds, began = time.perf_counter() - began, time.perf_counter()
    before, after = (units.errors(x, list(w), chunks) for w in (masked, tuned))
    valid_before, valid_after = (units.errors(check, list(w), chunks) for w in (masked, tuned))
    curve.validation += time.perf_counter() - began
    curve.add([(0, 0.0, before, valid_before), (iterations, seconds, after, valid_after)])
    for variant, weight, *errors in zip(variants, tuned.cpu(), before, after, valid_before, valid_after, strict=True):
        variant.weights[name] = weight
        yield Report(variant, *errors, seconds / len(variants), iterations)
