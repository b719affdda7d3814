"""Variants out of an original model: every block pruned at every rate of a scheme."""

from collections.abc import Iterator

import torch

from common.errors import UserError
from common.pruning import criteria
from common.pruning.bank import Variant
from common.pruning.configurations import Configuration
from common.pruning.scheme import Scheme
from common.t5.model import Model
from common.t5.modules import HEAD_PARTS, kind_of
from common.t5.walk import walk
from common.text.batches import Batches


def heads_present(model: Model, attention: str) -> torch.Tensor:
    """Return which heads of an attention are there, (heads,) bool; a model that was pruned before has fewer."""
    heads = model.network.config.num_heads
    mask = model.masks.get(f"{attention}.q.weight")
    return torch.ones(heads, dtype=torch.bool) if mask is None else mask.reshape(heads, -1).any(dim=1)


def check_head_rates(configuration: Configuration, model: Model, where: str) -> None:
    """Raise `UserError` if a rate would remove every head of an attention."""
    for name, rate in configuration.items():
        if kind_of(name) == "attention":
            try:
                criteria.check_removed_heads(rate, int(heads_present(model, name).sum()))
            except UserError as error:
                raise UserError(f"{where}: {name}: {error}") from None


@torch.no_grad()
def prune_block(model: Model, block: str, variants: list[tuple[float, ...]],
                gram: torch.Tensor | None = None) -> Iterator[Variant]:
    """Yield a block's variants at the given rates; the model is not changed.

    A rate is the fraction removed of what is there: what an earlier round of pruning removed (``model.masks``) is gone
    in every variant. A block whose head rate is 0 has only its out-projection in the variant.

    Args:
        variants: for each variant the rates of the block's members.
        gram: E[x xᵀ] of the block's input (for an attention, of its ``o``); chooses by ``obs``, see
            `common.pruning.criteria`. Without it by l1.

    Raises:
        UserError: the head rate would remove every head, or the statistics defeat the criterion.
    """
    network, attention = model.network, kind_of(block) == "attention"

    def weight(name):
        return network.get_parameter(name).detach()

    def present(name):
        mask = model.masks.get(name)
        return torch.ones_like(weight(name), dtype=torch.bool) if mask is None else mask.to(weight(name).device)

    name = f"{block}.o.weight" if attention else f"{block}.weight"
    w, heads, masks = weight(name), {}, {}
    try:
        for head_rate in dict.fromkeys(rates[:-1] for rates in variants):  # () for a linear block
            inputs = torch.ones_like(w[0], dtype=torch.bool)
            if attention:
                there = heads_present(model, block).to(w.device)
                qkv = (weight(f"{block}.{part}.weight") for part in HEAD_PARTS)
                heads[head_rate] = there if not head_rate[0] else (
                    criteria.head_mask(criteria.head_scores(*qkv, len(there)), head_rate[0], there) if gram is None
                    else criteria.head_mask_by_output(w, gram, head_rate[0], there))
                inputs = heads[head_rate].repeat_interleave(len(inputs) // len(there))
            single = [rates[-1] for rates in variants if rates[:-1] == head_rate]
            found = [criteria.magnitude_mask(w, rate, present(name)) for rate in single] if gram is None else \
                criteria.obs_masks(w, single, gram, present(name), inputs)
            masks |= {(*head_rate, rate): mask for rate, mask in zip(single, found, strict=True)}
        for rates in variants:
            chosen = {name: masks[rates]}
            if attention and rates[0]:
                parts = criteria.attention_masks(heads[rates[:-1]], weight(f"{block}.q.weight"), masks[rates])
                chosen = {f"{block}.{part}.weight": mask for part, mask in parts.items()}
            weights = {n: torch.where(mask, weight(n), 0.0) for n, mask in chosen.items()}
            yield Variant(block, rates, weights, chosen)
    except (UserError, ArithmeticError) as error:
        raise UserError(f"{block}: {error}") from None


def prune_scheme(model: Model, scheme: Scheme) -> Iterator[Variant]:
    """Yield every variant of a scheme by l1 norm, one at a time."""
    for block, variants in scheme.items():
        yield from prune_block(model, block, variants)


@torch.no_grad()
def prune_scheme_by_obs(model: Model, scheme: Scheme, calibration: Batches, device) -> Iterator[Variant]:
    """Yield every variant of a scheme by the obs criterion, in execution order; the network is on ``device``."""
    for sublayer in walk(model.network, [list(calibration.fixed())], device, "obs"):
        for block, seen in sublayer.moments(0, sublayer.blocks(scheme)).items():
            try:
                gram = seen.gram()
            except ArithmeticError as error:
                raise UserError(f"{block}: {error}") from None
            yield from prune_block(model, block, scheme[block], gram)
