"""Variants out of an original model: every block pruned at every rate of a scheme."""

from collections.abc import Iterator
from itertools import groupby

import torch

from common.errors import UserError
from common.pruning import criteria
from common.pruning.bank import Variant
from common.pruning.configurations import check_removed
from common.pruning.scheme import Scheme
from common.t5.model import Model, present
from common.t5.modules import HEAD_PARTS, UNIT_PARTS, kind_of, members
from common.t5.walk import walk
from common.text.batches import Batches, share


def heads_present(model: Model, attention: str) -> torch.Tensor:
    """Return which heads of an attention are there, (heads,) bool."""
    return present(model, f"{attention}.q.weight").reshape(model.network.config.num_heads, -1).any(dim=1)


def unit_parts(model: Model, feed_forward: str) -> list[str]:
    """Return the names of the weights whose rows are a feed-forward's hidden units, wi or wi_0 and wi_1."""
    module = model.network.get_submodule(feed_forward)
    return [f"{feed_forward}.{part}.weight" for part in UNIT_PARTS if hasattr(module, part)]


def units_present(model: Model, feed_forward: str) -> torch.Tensor:
    """Return which hidden units of a feed-forward are there, (units,) bool: those that wo reads and wi makes."""
    made = [present(model, name).any(dim=1) for name in unit_parts(model, feed_forward)]
    return torch.stack([*made, present(model, f"{feed_forward}.wo.weight").any(dim=0)]).all(dim=0)


@torch.no_grad()
def prune_block(model: Model, block: str, variants: list[tuple[float, ...]], gram: torch.Tensor | None = None,
                stream_gram: torch.Tensor | None = None, order: list[int] | None = None) -> Iterator[Variant]:
    """Yield a block's variants at the given rates; the model is not changed.

    A rate is the fraction removed of what is there: what an earlier round of pruning removed (``model.masks``) is gone
    in every variant. A block whose head rate is 0 has only its out-projection in the variant.

    Args:
        variants: for each variant the rates of the block's members.
        gram: E[x xᵀ] of a linear block's input, of an attention's ``o``'s, of a feed-forward's ``wo``'s; chooses by
            ``obs``, see `common.pruning.criteria`. Without it by l1.
        stream_gram: of a feed-forward's own input.
        order: in which an attention loses its heads, with ``gram`` (default: the best for this one).

    Raises:
        UserError: a rate below 1 would remove every head or unit, or the statistics defeat the criterion.
    """
    prune = {"linear": _prune_linear, "attention": _prune_attention, "feed-forward": _prune_feed_forward}
    try:
        for rates, masks in prune[kind_of(block)](model, block, variants, gram, stream_gram, order):
            weights = {n: torch.where(mask, model.network.get_parameter(n), 0.0) for n, mask in masks.items()}
            yield Variant(block, rates, weights, masks)
    except (UserError, ArithmeticError) as error:
        raise UserError(f"{block}: {error}") from None


def _weight_masks(model: Model, name: str, rates, gram, inputs=None, outputs=None) -> dict[float, torch.Tensor]:
    """Return {rate: mask} of single weights; see `common.pruning.criteria.obs_masks`."""
    w, there = model.network.get_parameter(name).detach(), present(model, name)
    masks = [criteria.magnitude_mask(w, rate, there) for rate in rates] if gram is None else \
        criteria.obs_masks(w, rates, gram, there, inputs, outputs)
    return dict(zip(rates, masks, strict=True))


def _prune_linear(model, block, variants, gram, *_):
    masks = _weight_masks(model, f"{block}.weight", [rates[0] for rates in variants], gram)
    for rates in variants:
        yield rates, {f"{block}.weight": masks[rates[0]]}


def _prune_attention(model, block, variants, gram, _, order):
    there = heads_present(model, block)
    q, k, v, o = (model.network.get_parameter(f"{block}.{part}.weight").detach() for part in (*HEAD_PARTS, "o"))
    if gram is not None:
        order = [h for h in order or criteria.head_order(criteria.head_pairs(o, gram, len(there))) if there[h]]
    for head_rate in dict.fromkeys(rates[0] for rates in variants):
        if gram is None:
            heads = criteria.structure_mask(criteria.head_scores(q, k, v, len(there)), head_rate, there, "heads")
        else:
            heads = there.clone()
            heads[order[:check_removed(head_rate, len(order))]] = False
        inner = heads.repeat_interleave(len(q) // len(heads))
        single = [rates[1] for rates in variants if rates[0] == head_rate]
        found = _weight_masks(model, f"{block}.o.weight", single, gram if heads.any() else None, inputs=inner)
        for rate, o_mask in found.items():
            parts = criteria.attention_masks(heads, q, o_mask) if head_rate else {"o": o_mask}
            yield (head_rate, rate), {f"{block}.{part}.weight": mask for part, mask in parts.items()}


def _prune_feed_forward(model, block, variants, gram, stream_gram, _):
    there, wo = units_present(model, block), f"{block}.wo.weight"
    readers, at = unit_parts(model, block), members(block).index
    counts = {rate: check_removed(rate, int(there.sum()), "units") for rate in {r[0] for r in variants}}
    if gram is None:
        scores = criteria.unit_scores([*(model.network.get_parameter(n).detach() for n in readers),
                                       model.network.get_parameter(wo).detach().T])
    else:
        order = criteria.unit_order(model.network.get_parameter(wo).detach(), gram, there, max(counts.values()))
    for rates in variants:
        if gram is None:
            units = criteria.structure_mask(scores, rates[0], there, "units")
        else:
            units = there.clone()
            units[order[:counts[rates[0]]]] = False
        # What else a reader's rate removes are weights of units that stay; obs is undefined where none does.
        chosen = {name: _weight_masks(model, name, [rate], stream_gram if units.any() and rate else None,
                                      outputs=units)[rate]
                  for name in readers for rate in (rates[at(name.removesuffix(".weight"))],)}
        rate = rates[at(f"{block}.wo")]
        chosen[wo] = _weight_masks(model, wo, [rate], gram if units.any() and rate else None, inputs=units)[rate]
        yield rates, {name: mask & (units if name == wo else units[:, None]) for name, mask in chosen.items()}


def prune_scheme(model: Model, scheme: Scheme) -> Iterator[Variant]:
    """Yield every variant of a scheme by l1 norm, one at a time."""
    for block, variants in scheme.items():
        yield from prune_block(model, block, variants)


@torch.no_grad()
def prune_scheme_by_obs(model: Model, scheme: Scheme, calibration: Batches, device) -> Iterator[Variant]:
    """Yield every variant of a scheme by the obs criterion; the network is on ``device``.

    The self-attentions of a stack lose their heads in one order, that by which they lose least together. They share
    their position bias, so with the same heads everywhere a T5 of fewer heads is a T5, which other programs hold
    without filling. Their variants come at the stack's end, the others in execution order.
    """
    for _, stack in groupby(walk(model.network, [share(calibration)], device, "obs"), lambda s: s.name.split(".")[0]):
        waiting = {}
        for sublayer in stack:
            blocks = sublayer.blocks(scheme)
            seen = sublayer.moments(0, blocks)
            for block in blocks:
                own = sublayer.readers[0][0] if kind_of(block) == "feed-forward" else None
                try:
                    grams = [seen[name].gram() for name in (block, own) if name]
                except ArithmeticError as error:
                    raise UserError(f"{block}: {error}") from None
                if block.endswith("SelfAttention"):
                    waiting[block] = grams[0]
                else:
                    yield from prune_block(model, block, scheme[block], *grams)
        pairs = [criteria.head_pairs(model.network.get_parameter(f"{block}.o.weight").detach(), gram,
                                     model.network.config.num_heads)
                 for block, gram in waiting.items() if any(rates[0] for rates in scheme[block])]
        order = criteria.head_order(sum(pairs)) if pairs else None
        for block, gram in waiting.items():
            yield from prune_block(model, block, scheme[block], gram, order=order)
