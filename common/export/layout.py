"""What pruning left of a model, laid out so that other programs' networks hold it.

They have layers of one shape: what a layer lacks is filled up with zeros, each head and hidden unit in a slot.

- T5: the relative position bias serves all layers of a stack, so a slot is the same head in every self-attention. There
  are slots for the heads that any of them kept.
- umT5: each self-attention has a bias of its own, here the columns of the heads that it kept.
- CTranslate2: as T5, but its stacks may differ in heads, and their layers in hidden units.
"""

import copy

import torch
from torch.nn.functional import pad

from common.t5.modules import HEAD_PARTS, UNIT_PARTS
from common.t5.shrink import blocks_left, heads_of, used

SIDES = {"encoder": "num_layers", "decoder": "num_decoder_layers"}
_TABLE = "layer.0.SelfAttention.relative_attention_bias.weight"


def _slots(left: dict, own_bias: bool) -> dict[str, torch.Tensor]:
    """Return the heads or units in each module's slots, -1 where there is none."""
    slots = {name: mask.nonzero()[:, 0] for name, mask in left.items()}
    for name, mask in left.items():
        if name.endswith("SelfAttention") and not own_bias:
            heads = heads_of(left, name.partition(".")[0])
            slots[name] = torch.where(mask[heads], heads, -1)
    return slots


def _widest(slots: dict, kind: str, side: str = "") -> int:
    """Return how many slots the widest module has whose name ends in ``kind``; at least one, no program takes none."""
    return max(1, *(len(s) for name, s in slots.items() if name.startswith(side) and name.endswith(kind)))


def for_transformers(network):
    """Return a network out of transformers that computes what a pruned T5 does: a T5 if that is as small, else a umT5.

    Args:
        network: a T5 or mT5; not changed.
    """
    left = used(network)
    slots, own = _slots(left, False), _slots(left, True)
    own_bias = _widest(own, "Attention") < _widest(slots, "Attention")
    slots = own if own_bias else slots
    sizes = {kind: _widest(slots, kind) for kind in ("Attention", "DenseReluDense")}
    slots = {name: _fill(s, sizes[next(kind for kind in sizes if name.endswith(kind))]) for name, s in slots.items()}
    config = _config(network, left) | {"num_heads": sizes["Attention"], "d_ff": sizes["DenseReluDense"]}
    # transformers 5.23 cannot translate with a decoder deeper than the encoder: the cache has num_layers places.
    config["num_layers"] = max(config["num_layers"], config["num_decoder_layers"])
    if not own_bias:
        return _build(network, _t5(config), left, slots, False)
    target = _build(network, _umt5(config), left, slots, True)
    if not scales_output(network.config):  # which umT5 does always
        norm = target.decoder.final_layer_norm
        norm.weight = torch.nn.Parameter(norm.weight.detach() * config["d_model"] ** 0.5)
    return target


def for_ctranslate2(network):
    """Return a T5 whose weights CTranslate2's converter reads, and the number of heads of encoder and decoder.

    The shapes of its weights differ from layer to layer, and from its configuration; it computes nothing itself.
    """
    left = used(network)
    slots = _slots(left, False)
    heads = {side: _widest(slots, "Attention", side) for side in SIDES}
    slots = {name: _fill(s, heads[name.partition(".")[0]] if name.endswith("Attention") else max(1, len(s)))
             for name, s in slots.items()}
    return _build(network, _t5(_config(network, left)), left, slots, False), heads


def scales_output(config) -> bool:
    """Tell whether a network multiplies what its decoder gives by 1 / √d_model before ``lm_head``; no mT5 does."""
    return config.model_type == "t5" and config.scale_decoder_outputs


def _config(network, left: dict) -> dict:
    return network.config.to_dict() | {key: len(blocks_left(left, side)) for side, key in SIDES.items()}


def _t5(config: dict):
    """Return transformers' T5 or mT5 of a configuration on the meta device."""
    from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

    kept = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        if config["model_type"] == "mt5":
            return MT5ForConditionalGeneration(MT5Config(**kept))
        return T5ForConditionalGeneration(T5Config(**kept))


def _umt5(config: dict):
    """Return a umT5 of a T5's configuration on the meta device."""
    from transformers import UMT5Config, UMT5ForConditionalGeneration

    act, gated = config["dense_act_fn"], config["is_gated_act"]
    # umT5 reads the activation out of this one key, and takes gated-gelu for gelu_new.
    act = {"gelu": "gelu_python", "gelu_new": "gelu"}.get(act, act) if gated else act
    kept = {key: value for key, value in config.items() if key not in (
        "model_type", "dense_act_fn", "is_gated_act", "scale_decoder_outputs", "tie_word_embeddings")}
    with torch.device("meta"):
        return UMT5ForConditionalGeneration(UMT5Config(**kept | {"feed_forward_proj": "gated-" * gated + act}))


def _fill(slots: torch.Tensor, count: int) -> torch.Tensor:
    return pad(slots, (0, count - len(slots)), value=-1)


def _take(weight: torch.Tensor, slots: torch.Tensor, dim: int, width: int = 1) -> torch.nn.Parameter:
    """Return the rows (dim 0) or columns (dim 1) of a weight, ``width`` for each slot; zeros where a slot is empty."""
    places = (slots.clamp(min=0)[:, None] * width + torch.arange(width)).flatten()
    empty = (slots < 0).repeat_interleave(width).nonzero()[:, 0]
    return torch.nn.Parameter(weight.detach().index_select(dim, places).index_fill_(dim, empty, 0.0))


def _build(network, target, left: dict, slots: dict, own_bias: bool):
    """Give ``target``, on the meta device, the weights of ``network`` by slots; return it in evaluation mode."""
    # Copies, because converters round in place; tied weights are one parameter, and stay one.
    state = copy.deepcopy(dict(network.state_dict(keep_vars=True)))
    for name, s in slots.items():
        module, is_attention = network.get_submodule(name), name.endswith("Attention")
        width = module.key_value_proj_dim if is_attention else 1
        for part in (*HEAD_PARTS, "o") if is_attention else (*UNIT_PARTS, "wo"):
            if hasattr(module, part):
                state[f"{name}.{part}.weight"] = _take(getattr(module, part).weight, s, int(part in ("o", "wo")), width)
    final = {name: p for name, p in state.items() if ".block." not in name}
    for side in SIDES:
        table = state.pop(f"{side}.block.0.{_TABLE}")
        for new, old in enumerate(blocks_left(left, side)):
            s = slots[f"{side}.block.{old}.layer.0.SelfAttention"]
            if own_bias or new == 0:  # a shared one serves heads too that this layer lacks
                heads = s if own_bias else _fill(heads_of(left, side), len(s))
                state[f"{side}.block.{old}.{_TABLE}"] = _take(table, heads, 1)
            before, after = (f"{side}.block.{i}." for i in (old, new))
            final |= {after + n.removeprefix(before): p for n, p in state.items() if n.startswith(before)}
    for name, empty in target.state_dict().items():
        if name not in final:
            assert name.startswith("encoder.block."), f"{name} is not among the weights"
            final[name] = torch.nn.Parameter(torch.zeros(empty.shape))  # of a block that fills the encoder up
    for name, p in final.items():
        module, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(module), leaf, p)
    return target.eval()
