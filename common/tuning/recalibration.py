"""Recalibrate a composed model: re-fit its weights, in execution order, to the inputs they really receive.

Every variant was tuned on the original's activations, but in a composed model it receives those of pruned
predecessors. One sweep without gradients repairs much of it. With x̂ the input that the composed model delivers
and t the target, the weights of least E‖t − Ŵx̂‖² inside the mask follow from E[x̂ x̂ᵀ] and E[t x̂ᵀ]. q, k and v aim at
what they would give for the original's inputs; wi at the original's outputs, after joint tuning as q, k and v do. o and
wo write into the residual stream, and their target is the original's output plus the difference of the two streams
before the layer, so that the stream is right again after it. (Asymmetric reconstruction: He et al. 2017, "Channel
Pruning for Accelerating Very Deep Neural Networks", section 3.3.) Two walks advance side by side, one through the
original, one through the composed model (`common.t5.walk`).
"""

import time

import torch

from common.errors import UserError
from common.least_squares import Moments, solve_together
from common.pruning.bank import Bank
from common.runtime import say
from common.t5.loss import TranslationLoss, evaluate
from common.t5.model import Model, present
from common.t5.walk import walk
from common.text.batches import Batches, share


@torch.no_grad()
def recalibrate(original, model: Model, calibration: Batches, device, keep_hidden: bool = False) -> float:
    """Re-fit a composed model to the activations it really has, in one sweep; masks stay. Mutates ``model``.

    All linear weights are re-fitted, also those that the configuration does not prune, since their inputs have
    shifted too.

    Args:
        original: the original network, on ``device``.
        model: the composed model, its network on ``device``.
        calibration: the text; both models' residual streams of it are held.
        keep_hidden: wi aims at what it gives for the original's inputs, not at the original's outputs: joint tuning
            has made it something else than an approximation of these.

    Returns:
        The seconds it took.

    Raises:
        UserError: a fit failed, by name.
    """
    began = time.perf_counter()
    text = [share(calibration)]
    for there, here in zip(walk(original, text, device, "recalibration"), walk(model.network, text, device),
                           strict=True):
        pairs = list(zip(there.splits[0], here.splits[0], strict=True))
        # q, k and v that were tuned, or lost heads, are no approximation of the original's; neither is a tuned wi.
        own = here if here.is_attention or keep_hidden else there
        live = present(model, f"{here.out}.weight").any(dim=0)  # what comes from removed heads and units is zero
        if not live.any():
            continue
        for group, names in enumerate(here.readers):
            fit = Moments()
            for before, now in pairs:
                (aim, _), (x, valid) = there.inputs(before)[group], here.inputs(now)[group]
                fit.add(x[valid], aim[valid])
            # The target is linear in the aim a, so that its own products need not be summed: E[Wa x̂ᵀ] = W E[a x̂ᵀ].
            _fit(model, names, fit, torch.cat([own.network.get_parameter(f"{name}.weight") for name in names]))
        fit = Moments()
        for before, now in pairs:
            target = before.states + there.output(before) - now.states
            fit.add(here.inner(now, hold=True)[now.valid][:, live], target[now.valid])
        _fit(model, (here.out,), fit, live=live)
    seconds = time.perf_counter() - began
    say(f"recalibrated on {len(calibration):,} sentence pairs in {seconds:.1f} s")
    return seconds


def recalibrate_composed(original: Model, composed: Model, bank: Bank, calibration: Batches, device,
                         valid: Batches | None = None, target_loss: float | None = None) -> float:
    """Recalibrate what was composed out of a tuned bank. Mutates both: their networks move to ``device``.

    A model whose loss on ``valid`` meets ``target_loss`` is left alone. Returns the seconds of the sweep.
    """
    composed.network.to(device)
    if target_loss and (loss := evaluate(TranslationLoss(composed.network), valid, device)) <= target_loss:
        say(f"not recalibrated: the composed model's validation loss {loss:.4f} meets the target")
        return 0.0
    return recalibrate(original.network.to(device), composed, calibration, device, bank.keeps_hidden)


def _fit(model: Model, names: tuple[str, ...], fit: Moments, aims: torch.Tensor | None = None,
         live=slice(None)) -> None:
    """Replace the modules' weights of ``live`` inputs by the best ones inside their masks. Mutates the model.

    Args:
        aims: weights that make the targets of what the moments have as such.
    """
    fit.add_up()
    weights = [model.network.get_parameter(f"{name}.weight") for name in names]
    masks = torch.cat([present(model, f"{name}.weight") for name in names])
    try:
        gram, cross = fit.gram(), fit.cross()
        solution = solve_together(gram, cross if aims is None else aims.to(cross.dtype) @ cross,
                                  torch.cat(weights)[:, live], masks[:, live])
    except ArithmeticError as problem:
        raise UserError(f"{names[0]}: {problem}") from None
    for weight, part in zip(weights, solution.split([len(w) for w in weights]), strict=True):
        weight[:, live] = part.to(weight.dtype)
