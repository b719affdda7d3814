"""Exact block-level fine-tuning: the statistics of the original's activations decide the best weights.

For a linear map with weight W (out, in), mask M and inputs x, the weights Ŵ (zero outside M) that minimise
E‖(W − Ŵ)x‖² depend on the inputs only through the Gram matrix G = E[x xᵀ]: the objective is the quadratic
tr((W − Ŵ) G (W − Ŵ)ᵀ). One walk of the original over the text therefore serves every variant of every block.
Reconstruction of layer outputs by least squares is the idea of He et al. (2017, "Channel Pruning for Accelerating Very
Deep Neural Networks") and Frantar & Alistarh (2023, "SparseGPT"); here every row is solved to convergence
(`common.least_squares`). Attentions that lost heads go on from there: `common.tuning.attention_steps`.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from common import distributed
from common.errors import UserError
from common.least_squares import SOLVED_AT_ONCE, Moments, error, solve_together
from common.pruning.bank import Bank, Key, Variant
from common.runtime import say
from common.t5.modules import kind_of
from common.t5.walk import Sublayer, walk
from common.text.batches import Batches, share
from common.tuning import attention_steps

ATTENTION_STEPS = 200
# Steps are for attentions that the exact ``o`` leaves a larger relative error. After the sweep, obs, heads 50 %, linear
# 50 and 80 %: validation loss 2.013 and 2.113 with 0.15, 2.006 and 2.111 with 0.1 as with 0.05.
ATTENTION_ERROR = 0.1


@dataclass
class Report:
    """One tuned variant: errors are E‖y − ŷ‖² / E‖y‖² of the block's output, on calibration and validation text."""

    variant: Variant
    before: float
    after: float
    valid_before: float
    valid_after: float
    seconds: float


@torch.no_grad()
def tune(network, bank: Bank, calibration: Batches, valid: Batches, device,
         steps: int = ATTENTION_STEPS) -> Iterator[Report]:
    """Yield every variant of a bank, re-fitted to the original's outputs, in execution order.

    A linear block's weights, and the out-projection of an attention with its kept heads or of a feed-forward with its
    kept units, become the least-squares solution on the calibration text. Variants of a block share its statistics, and
    are solved together where memory allows (`SOLVED_AT_ONCE`). Attentions that lost heads and are left an error above
    `ATTENTION_ERROR` then take ``steps`` on q, k, v and o. A block whose output is zero on all of the text keeps its
    masked weights, and a sub-layer that is skipped has nothing to tune.

    Args:
        network: the original model, on ``device``.

    Raises:
        UserError: an error by name, or an attention whose q, k or v were tuned before.
    """
    keys: dict[str, list[Key]] = {}
    for key in bank.entries:
        keys.setdefault(key[0], []).append(key)
    waiting = []  # attentions that take steps, as many as there are processes at a time
    for sublayer in walk(network, [share(calibration), share(valid)], device, "block level"):
        blocks = sublayer.blocks(keys)
        moments = [sublayer.moments(split, blocks) for split in (0, 1)]
        for block in blocks:
            try:
                mixed = [key for key in keys[block] if kind_of(block) == "feed-forward" and any(key[1][1:-1])]
                shared = [key for key in keys[block] if key not in mixed]
                if shared:
                    hard = yield from _tune_block(network, bank, block, shared, *(m[block].gram() for m in moments),
                                                  sublayer, device, steps)
                    for group in hard:
                        texts = attention_steps.texts(sublayer, len(waiting), device)
                        waiting.append(partial(_take_steps, bank, group, texts, sublayer, device, steps))
                        if len(waiting) == distributed.size():
                            for done in distributed.divide(waiting):
                                yield from done
                            waiting = []
                for key in mixed:
                    yield _tune_feed_forward(network, bank.read(key), moments[0][sublayer.readers[0][0]].gram(),
                                             sublayer, device)
            except ArithmeticError as problem:
                raise UserError(f"{block}: {problem}") from None
    for done in distributed.divide(waiting) if waiting else ():
        yield from done


def _take_steps(bank: Bank, group: list[Report], texts, sublayer: Sublayer, device, steps: int) -> list[Report]:
    try:
        return list(attention_steps.tune(bank, group, texts, sublayer.module.key_value_proj_dim, device, steps))
    except ArithmeticError as problem:
        raise UserError(f"{sublayer.name}: {problem}") from None


def _tune_block(network, bank, block, keys, gram, check, sublayer, device, steps):
    """Yield reports on a block's variants; return those left, for `attention_steps`, in groups that fit into memory."""
    name = f"{block}.weight" if kind_of(block) == "linear" else f"{sublayer.out}.weight"
    target = network.get_parameter(name).detach()
    nothing = torch.zeros_like(target)
    power, valid_power = (error(m, target, nothing) for m in (gram, check))
    if not power > 1e-30:
        say(f"{block}: its output is zero on all the calibration text, so its variants keep their masked weights")
    group, hard = max(SOLVED_AT_ONCE // target.numel(), 1), []
    for at in range(0, len(keys), group):
        began = time.perf_counter()
        variants = [bank.read(key) for key in keys[at:at + group]]
        for variant in variants:
            check_original(network, variant)
        before = [v.weights[name].to(device) for v in variants]
        if power > 1e-30:
            mask = torch.cat([v.masks[name] for v in variants]).to(device)
            parts = solve_together(gram, (target.double() @ gram).repeat(len(variants), 1),
                                   target.repeat(len(variants), 1), mask).float().split(len(target))
        else:
            parts = before
        seconds = (time.perf_counter() - began) / len(variants)
        for variant, old, new in zip(variants, before, parts, strict=True):
            errors = [error(m, target, w) / p if p > 1e-30 else 0.0
                      for m, p in ((gram, power), (check, valid_power)) for w in (old, new)]
            variant.weights[name] = new.cpu()
            report = Report(variant, *errors, seconds)
            lost = kind_of(block) == "attention" and 0 < variant.rates[0] < 1
            if steps and lost and report.after > ATTENTION_ERROR:
                report.variant = variant.key  # read and solved again in its turn: all at once may not fit into memory
                hard.append(report)
            else:
                yield report
    return [hard[at:at + group] for at in range(0, len(hard), group)]


def _tune_feed_forward(network, variant: Variant, gram: torch.Tensor, sublayer: Sublayer, device) -> Report:
    """Fit wi (wi_0, wi_1) to the original's outputs, then wo to the feed-forward's with the units that wi makes."""
    began = time.perf_counter()
    readers, out = [f"{name}.weight" for name in sublayer.readers[0]], f"{sublayer.out}.weight"

    def inner(stream, weights):
        return sublayer.mix(stream, lambda part: weights[f"{sublayer.name}.{part}.weight"])[stream.valid]

    def errors(weights):
        result = []
        for split in sublayer.splits:
            lost = power = 0.0
            for stream in split:
                target = sublayer.output(stream)[stream.valid].double()
                lost += float((inner(stream, weights) @ weights[out].T - target).square().sum())
                power += float(target.square().sum())
            lost, power = distributed.sums(lost, power)
            result.append(lost / power if power > 1e-30 else 0.0)
        return result

    masks = {name: mask.to(device) for name, mask in variant.masks.items()}
    weights = {name: torch.where(mask, network.get_parameter(name), 0.0) for name, mask in masks.items()}
    before = errors(weights)
    for name in readers:
        target = network.get_parameter(name)
        weights[name] = solve_together(gram, target.double() @ gram, target, masks[name]).float()
    seen = Moments()
    for stream in sublayer.splits[0]:
        seen.add(inner(stream, weights), sublayer.output(stream)[stream.valid])
    seen.add_up()
    weights[out] = solve_together(seen.gram(), seen.cross(), weights[out], masks[out]).float()
    after = errors(weights)
    variant.weights = {name: w.cpu() for name, w in weights.items()}
    return Report(variant, before[0], after[0], before[1], after[1], time.perf_counter() - began)


def check_original(network, variant: Variant) -> None:
    """Raise `UserError` unless what makes the inputs of ``o`` or ``wo`` is still the original's."""
    if kind_of(variant.block) == "linear":
        return
    for name, weight in variant.weights.items():
        if not name.endswith((".o.weight", ".wo.weight")) and not torch.equal(
                weight, torch.where(variant.masks[name], network.get_parameter(name).cpu(), 0.0)):
            raise UserError(f"{variant.block}: its {name.split('.')[-2]} was tuned already, and the exact solver fits "
                            "what follows to the original's; give the bank that prune.py wrote, or --solver adamw")
