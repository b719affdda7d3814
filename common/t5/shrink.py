"""From a masked T5 to a physically smaller one for inference: without the heads, units and sub-layers that do nothing.

All of it shows in the weights, so no configuration and no mask is asked.
"""

import copy

import torch
from torch import nn

from common.t5.modules import HEAD_PARTS, UNIT_PARTS, prunable


def used(network) -> dict[str, torch.Tensor]:
    """Return which heads of each attention, and hidden units of each feed-forward, add anything; bool, by module name.

    A head without values (v) or without columns of ``o`` adds nothing, whatever its q and k; with v and ``o`` but no q
    or k it averages, and counts. A unit adds nothing if ``wo`` does not read it, or if what it gives is always 0: no
    row of ``wi`` and act(0) = 0; gated, no row of ``wi_1``, or none of ``wi_0`` and act(0) = 0.
    """
    found = {}
    for name, kind in prunable(network).items():
        module = network.get_submodule(name)
        if kind == "attention":
            width = module.key_value_proj_dim
            found[name] = ((module.v.weight != 0).unflatten(0, (-1, width)).any(dim=2).any(dim=1)
                           & (module.o.weight != 0).unflatten(1, (-1, width)).any(dim=2).any(dim=0))
        elif kind == "feed-forward":
            made = [(getattr(module, part).weight != 0).any(dim=1) for part in UNIT_PARTS if hasattr(module, part)]
            made[0] = made[0] | bool(module.act(torch.zeros(1)) != 0)
            found[name] = torch.stack([*made, (module.wo.weight != 0).any(dim=0)]).all(dim=0)
    return found


def blocks_left(left: dict[str, torch.Tensor], side: str) -> list[int]:
    """Return the blocks of ``encoder`` or ``decoder`` that have anything of `used` left; at least one."""
    return sorted({int(n.split(".")[2]) for n, mask in left.items() if n.startswith(side) and mask.any()}) or [0]


def heads_of(left: dict[str, torch.Tensor], side: str) -> torch.Tensor:
    """Return the heads that any self-attention of a stack has left, numbers in order."""
    masks = [mask for name, mask in left.items() if name.startswith(side) and name.endswith("SelfAttention")]
    return torch.stack(masks).any(dim=0).nonzero()[:, 0]


def _cut(linear: nn.Linear, mask: torch.Tensor, dim: int) -> None:
    if not mask.all():
        kept = linear.weight.index_select(dim, mask.nonzero()[:, 0])
        linear.weight = nn.Parameter(kept, requires_grad=False)
        linear.out_features, linear.in_features = kept.shape


def shrink(model):
    """Return a model's network without what is not `used`, for inference; its logits are the same up to rounding.

    The model is not changed. What is not cut shares its memory, so the result must not be trained.

    Args:
        model: a `common.t5.model.Model` whose network is on the CPU.
    """
    whole = model.network
    left = used(whole)
    memory = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in whole.parameters()}
    network = copy.deepcopy(whole, memory).eval()
    for side in ("encoder", "decoder"):
        stack, heads = getattr(network, side), heads_of(left, side)
        stack.cut_positions = nn.Embedding.from_pretrained(stack.positions.weight[:, heads])
        del stack.block[0].layer[0].SelfAttention.relative_attention_bias
        for i, block in enumerate(stack.block):
            for j, layer in enumerate(block.layer):
                mask, module = left[f"{side}.block.{i}.layer.{j}.{layer.kind}"], layer.module
                if layer.kind == "DenseReluDense":
                    inner, readers, writer = mask, UNIT_PARTS, module.wo
                else:
                    inner, readers, writer = mask.repeat_interleave(module.key_value_proj_dim), HEAD_PARTS, module.o
                for reader in readers:
                    if hasattr(module, reader):
                        _cut(getattr(module, reader), inner, 0)
                _cut(writer, inner, 1)
                if layer.kind == "SelfAttention" and not mask[heads].all():
                    module.heads = mask[heads].nonzero()[:, 0]
            block.layer = nn.ModuleList(layer for j, layer in enumerate(block.layer)
                                        if left[f"{side}.block.{i}.layer.{j}.{layer.kind}"].any())
        stack.block = nn.ModuleList(block for block in stack.block if len(block.layer))
    return network
