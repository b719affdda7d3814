"""From a masked T5 to a physically smaller one: without the heads, hidden units and sub-layers that do nothing.

For inference all of it shows in the weights, so no configuration and no mask is asked. For training masks decide.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from common.t5.modules import HEAD_PARTS, UNIT_PARTS, prunable


def used(network, masks: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return which heads of each attention, and hidden units of each feed-forward, add anything; bool, by module name.

    A head without values (v) or without columns of ``o`` adds nothing, whatever its q and k; with v and ``o`` but no q
    or k it averages, and counts. A unit adds nothing if ``wo`` does not read it, or if what it gives is always 0: no
    row of ``wi`` and act(0) = 0; gated, no row of ``wi_1``, or none of ``wi_0`` and act(0) = 0.

    Args:
        masks: by weight name, True where a weight may be other than 0; None: ask the weights.
    """
    def filled(part: str) -> torch.Tensor:
        weight = network.get_parameter(f"{part}.weight")
        if masks is None:
            return weight != 0
        mask = masks.get(f"{part}.weight")
        return torch.ones((), dtype=torch.bool).expand_as(weight) if mask is None else mask

    found = {}
    for name, kind in prunable(network).items():
        module = network.get_submodule(name)
        if kind == "attention":
            width = module.key_value_proj_dim
            found[name] = (filled(f"{name}.v").unflatten(0, (-1, width)).any(dim=2).any(dim=1)
                           & filled(f"{name}.o").unflatten(1, (-1, width)).any(dim=2).any(dim=0))
        elif kind == "feed-forward":
            made = [filled(f"{name}.{part}").any(dim=1) for part in UNIT_PARTS if hasattr(module, part)]
            made[0] = made[0] | bool(module.act(torch.zeros(1)) != 0)
            found[name] = torch.stack([*made, filled(f"{name}.wo").any(dim=0)]).all(dim=0)
    return found


def blocks_left(left: dict[str, torch.Tensor], side: str) -> list[int]:
    """Return the blocks of ``encoder`` or ``decoder`` that have anything of `used` left; at least one."""
    return sorted({int(n.split(".")[2]) for n, mask in left.items() if n.startswith(side) and mask.any()}) or [0]


def heads_of(left: dict[str, torch.Tensor], side: str) -> torch.Tensor:
    """Return the heads that any self-attention of a stack has left, numbers in order."""
    masks = [mask for name, mask in left.items() if name.startswith(side) and name.endswith("SelfAttention")]
    return torch.stack(masks).any(dim=0).nonzero()[:, 0]


@dataclass
class Origin:
    """Where a weight of a shrunk network comes from: a weight's name, and which of its rows (dim 0) or columns (1)."""

    name: str
    dim: int = 0
    places: torch.Tensor | None = None  # None: all of it

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this part of a tensor shaped as the whole weight."""
        return whole if self.places is None else whole.index_select(self.dim, self.places)

    def write(self, part: torch.Tensor, network) -> None:
        """Put this part into the weight of a network."""
        whole = network.get_parameter(self.name)
        if self.places is not None:
            whole.index_copy_(self.dim, self.places, part)
        elif whole.data_ptr() != part.data_ptr():
            whole.copy_(part)


def shrink(model):
    """Return a model's network without what is not `used`, for inference; its logits are the same up to rounding.

    The model is not changed. What is not cut shares its memory, so the result must not be trained.

    Args:
        model: a `common.t5.model.Model` whose network is on the CPU.
    """
    return shrunk(model.network, used(model.network))[0]


def shrunk(whole, left: dict[str, torch.Tensor]):
    """Return a network on the CPU without what is not ``left`` (see `used`), and each of its weights' `Origin`."""
    memory, origins = {}, {}

    def cut(name: str, parameter: nn.Parameter, dim: int = 0, mask: torch.Tensor | None = None) -> nn.Parameter:
        origin = Origin(name) if mask is None or mask.all() else Origin(name, dim, mask.nonzero()[:, 0])
        made = nn.Parameter(origin.of(parameter.detach()), requires_grad=False)
        origins[id(made)] = origin
        return made

    for name, parameter in whole.named_parameters():
        memory[id(parameter)] = cut(name, parameter)
    network = copy.deepcopy(whole, memory).eval()
    for side in ("encoder", "decoder"):
        stack, heads = getattr(network, side), heads_of(left, side)
        first = f"{side}.block.0.layer.0.SelfAttention"
        some = torch.zeros_like(left[first]).index_fill(0, heads, True)
        stack.cut_positions = stack.positions
        stack.positions.weight = cut(f"{first}.relative_attention_bias.weight", stack.positions.weight, 1, some)
        del stack.block[0].layer[0].SelfAttention.relative_attention_bias
        for i, block in enumerate(stack.block):
            for j, layer in enumerate(block.layer):
                name = f"{side}.block.{i}.layer.{j}.{layer.kind}"
                mask, module = left[name], layer.module
                if layer.kind == "DenseReluDense":
                    inner, readers, writer = mask, UNIT_PARTS, "wo"
                else:
                    inner, readers, writer = mask.repeat_interleave(module.key_value_proj_dim), HEAD_PARTS, "o"
                for part, dim in [*((reader, 0) for reader in readers if hasattr(module, reader)), (writer, 1)]:
                    linear = getattr(module, part)
                    linear.weight = cut(f"{name}.{part}.weight", linear.weight, dim, inner)
                    linear.out_features, linear.in_features = linear.weight.shape
                if layer.kind == "SelfAttention" and not mask[heads].all():
                    module.heads = mask[heads].nonzero()[:, 0]
            block.layer = nn.ModuleList(layer for j, layer in enumerate(block.layer)
                                        if left[f"{side}.block.{i}.layer.{j}.{layer.kind}"].any())
        stack.block = nn.ModuleList(block for block in stack.block if len(block.layer))
    return network, {name: origins[id(p)] for name, p in network.named_parameters()}
