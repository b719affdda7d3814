"""From a masked T5 to a physically smaller one for inference: without the heads, units and sub-layers that do nothing.

All of it shows in the weights, so no configuration and no mask is asked.
"""

import copy
from collections import Counter

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


class _SelfAttention(nn.Module):
    """A self-attention with its own heads. Blocks hand on the position bias of all heads of the stack."""

    def __init__(self, attention, columns: torch.Tensor | None):
        super().__init__()
        self.attention = attention
        self.register_buffer("columns", columns, persistent=False)  # of the bias; None: all of them, in order

    def forward(self, hidden_states, position_bias=None, past_key_values=None, **more):
        if position_bias is None:  # the first one that is left; it owns the bias, as block 0 does in T5
            seen = past_key_values.get_seq_length(self.attention.layer_idx) if past_key_values is not None else 0
            length = hidden_states.shape[1]
            position_bias = self.attention.compute_bias(length, seen + length, hidden_states.device, seen)
        own = position_bias if self.columns is None else position_bias[:, self.columns]
        output, _, weights = self.attention(hidden_states, position_bias=own, past_key_values=past_key_values, **more)
        return output, position_bias, weights


class _CrossAttention(nn.Module):
    """A cross-attention with its own heads. Blocks would hand on zeros for the heads of the first one."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.register_buffer("none", torch.zeros(1, 1, 1, 1), persistent=False)

    def forward(self, hidden_states, position_bias=None, **more):
        output, _, weights = self.attention(hidden_states, position_bias=self.none, **more)
        return output, None, weights


class _Skipped(nn.Module):
    """An attention that is left out of its block; it adds nothing, caches nothing and hands the position bias on."""

    def forward(self, hidden_states, position_bias=None, **_):
        return hidden_states, position_bias, None


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
    tables = {side: getattr(network, side).block[0].layer[0].SelfAttention.relative_attention_bias
              for side in ("encoder", "decoder")}
    place = Counter()  # caches are numbered without gaps, self- and cross-attentions each
    for name, mask in left.items():
        layer, _, part = name.rpartition(".")
        module = network.get_submodule(name)
        if not mask.any():
            network.set_submodule(layer, nn.Identity() if part == "DenseReluDense" else _Skipped())
        elif part == "DenseReluDense":
            for reader in UNIT_PARTS:
                if hasattr(module, reader):
                    _cut(getattr(module, reader), mask, 0)
            _cut(module.wo, mask, 1)
        else:
            inner = mask.repeat_interleave(module.key_value_proj_dim)
            for reader in HEAD_PARTS:
                _cut(getattr(module, reader), inner, 0)
            _cut(module.o, inner, 1)
            side = name.partition(".")[0]
            module.n_heads, module.inner_dim = int(mask.sum()), int(inner.sum())
            module.layer_idx = place[side, part]
            if part == "SelfAttention":
                heads = heads_of(left, side)
                if module.layer_idx == 0:
                    module.relative_attention_bias = nn.Embedding.from_pretrained(tables[side].weight[:, heads])
                    module.has_relative_attention_bias = True
                columns = mask[heads]
                module = _SelfAttention(module, None if columns.all() else columns.nonzero()[:, 0])
            else:
                module = _CrossAttention(module)
            network.set_submodule(name, module)
            place[side, part] += 1
    for side in ("encoder", "decoder"):
        stack = getattr(network, side)
        stack.block = nn.ModuleList(stack.block[i] for i in blocks_left(left, side))
    # transformers 5.23 makes room for num_layers in the decoder's cache, which is the encoder's depth.
    depths = len(network.encoder.block), len(network.decoder.block)
    network.config.num_layers, network.config.num_decoder_layers = max(depths), depths[1]
    return network
