"""A shrunk network computes what the masked one does, whatever of it is empty."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from common.t5.decoding import decode
from common.t5.model import Model
from common.t5.modules import prunable
from common.t5.network import T5
from common.t5.shrink import shrink, used
from tests.small import logits_of, small_network

FAMILY = {"t5": ("t5", {}), "gated": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
          "mt5": ("mt5", {})}
DEPTH = {"num_layers": 2, "num_decoder_layers": 3}
EXAMPLES = settings(max_examples=8, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
KEEP = ("all", "none", "one", "some")
SUBLAYERS = 13  # five self-attentions and feed-forwards, three cross-attentions


def network_of(name: str, **changes):
    """Return a small network whose position biases matter; the gated one has its own output embedding."""
    kind, own = FAMILY[name]
    network = small_network(kind, **DEPTH | own | changes)
    with torch.no_grad():
        for stack in (network.encoder, network.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_(std=2)
    if name == "gated":
        network.lm_head.weight = torch.nn.Parameter(torch.randn_like(network.lm_head.weight))
    return network


@torch.no_grad()
def empty(network, name: str, gone: torch.Tensor, how: str) -> None:
    """Set heads of an attention or units of a feed-forward to zero: ``in``, what makes them; ``out``, what reads."""
    module = network.get_submodule(name)
    is_attention = name.endswith("Attention")
    rows = gone.repeat_interleave(module.key_value_proj_dim) if is_attention else gone
    if how != "in":
        (module.o if is_attention else module.wo).weight[:, rows] = 0
    if how != "out":
        parts = ("v",) if is_attention and how == "in" else ("q", "k", "v") if is_attention else ("wi", "wi_0", "wi_1")
        for part in parts:
            if hasattr(module, part):
                getattr(module, part).weight[rows] = 0


def empty_some(network, keep: list[str], seed: int) -> dict[str, torch.Tensor]:
    """Empty every sub-layer as ``keep`` says, return what is left of each."""
    g, left = torch.Generator().manual_seed(seed), {}
    for (name, mask), what in zip(used(network).items(), keep, strict=True):
        left[name] = mask.clone()
        if what != "all":
            count = {"none": 0, "one": 1, "some": len(mask) // 2}[what]
            left[name][torch.randperm(len(mask), generator=g)[count:]] = False
            how = ("in", "out", "both")[int(torch.randint(3, (1,), generator=g))]
            empty(network, name, ~left[name], how)
    return left


patterns = st.tuples(st.lists(st.sampled_from(KEEP), min_size=SUBLAYERS, max_size=SUBLAYERS), st.integers(0, 99))


def batch() -> dict:
    g = torch.Generator().manual_seed(3)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(2, 50, (3, 9), generator=g), "attention_mask": mask}


def logits(network) -> torch.Tensor:
    ids = torch.randint(2, 50, (3, 7), generator=torch.Generator().manual_seed(4))
    return logits_of(network, batch()["input_ids"], ids, batch()["attention_mask"])


def generated(network, beams: int) -> list[list[int]]:
    """Return the ids of translations by our search, or by that of transformers' network."""
    if isinstance(network, T5):
        return decode(network, **batch(), limit=6, beams=beams)
    rows = network.generate(**batch(), num_beams=beams, do_sample=False, max_new_tokens=6, pad_token_id=0,
                            eos_token_id=1, decoder_start_token_id=0).tolist()
    return [row[1:row.index(1) + 1] if 1 in row else row[1:] for row in rows]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())


def check(network) -> torch.nn.Module:
    """Shrink a network and compare."""
    small = shrink(Model(network, ""))
    assert same(logits(network), logits(small))
    for beams in (1, 3):
        assert generated(network, beams) == generated(small, beams)
    return small


def size(network) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", FAMILY)
@EXAMPLES
@given(pattern=patterns)
def test_logits_and_translations_are_the_masked_models(name, pattern):
    network = network_of(name)
    left = empty_some(network, *pattern)
    assert all(torch.equal(mask, left[n]) for n, mask in used(network).items())
    check(network)


EDGES = {
    "one head and one unit": {"": "one"}, "the encoder's first self-attention": {"encoder.block.0.layer.0": "none"},
    "the decoder's first self-attention": {"decoder.block.0.layer.0": "none"}, "the first blocks": {"block.0": "none"},
    "a decoder block": {"decoder.block.1": "none"}, "the last block": {"decoder.block.2": "none"},
    "all self-attentions": {"SelfAttention": "none"}, "all cross-attentions": {"EncDecAttention": "none"},
    "all feed-forwards": {"DenseReluDense": "none"}, "the encoder": {"encoder": "none"},
    "the decoder": {"decoder": "none"}, "everything": {"": "none"}}


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge):
    network = network_of("t5")
    (part, what), = EDGES[edge].items()
    empty_some(network, [what if part in name else "some" for name in used(network)], 1)
    check(network)


def test_what_is_left_is_all_that_is_there():
    network = network_of("t5")
    before = size(network)
    keep = ["none" if name.startswith("decoder.block.1") else "all" for name in used(network)]
    keep[0], keep[1] = "one", "one"  # the encoder's first block
    empty_some(network, keep, 0)
    small = check(network)
    a_block = 4 * 2 * 32 * 32 + 2 * 32 * 48 + 3 * 32
    assert (len(small.encoder.block), len(small.decoder.block)) == (2, 2)
    assert size(small) == before - a_block - 4 * 32 * 3 * 8 - 2 * 32 * 47


def test_a_dense_network_stays_whole_and_shares_its_memory():
    network = network_of("gated")
    small = check(network)
    assert size(small) == size(network) and small.lm_head.weight is not small.shared.weight
    assert small.shared.weight.data_ptr() == network.shared.weight.data_ptr()
    assert small.shared.weight is not network.shared.weight and small.encoder.embed_tokens.weight is small.shared.weight


def test_the_model_is_not_changed():
    network = network_of("t5")
    empty_some(network, ["some"] * SUBLAYERS, 0)
    before = {name: (p, p.clone()) for name, p in network.state_dict(keep_vars=True).items()}
    names = list(network._modules)
    small = shrink(Model(network, ""))
    small.encoder.block[0].layer[0].SelfAttention.q.weight.zero_()
    after = network.state_dict(keep_vars=True)
    assert names == list(network._modules) and before.keys() == after.keys()
    assert all(after[name] is p and torch.equal(p, copy) and p.requires_grad for name, (p, copy) in before.items())


def test_a_head_that_attends_evenly_is_used():
    network = network_of("t5")
    name = "encoder.block.1.layer.0.SelfAttention"
    with torch.no_grad():
        for part in "qk":
            network.get_parameter(f"{name}.{part}.weight")[:8] = 0
    assert used(network)[name].all()
    check(network)


@pytest.mark.parametrize(("act", "gated", "part", "used_units"), [
    ("relu", False, "wi", 47), ("gelu", False, "wi", 47), ("sigmoid", False, "wi", 48), ("sigmoid", True, "wi_0", 48),
    ("sigmoid", True, "wi_1", 47), ("gelu_new", True, "wi_0", 47)])
def test_a_unit_whose_activation_is_not_0_at_0_is_used(act, gated, part, used_units):
    network = network_of("t5", dense_act_fn=act, is_gated_act=gated)
    name = "encoder.block.0.layer.1.DenseReluDense"
    with torch.no_grad():
        network.get_parameter(f"{name}.{part}.weight")[5] = 0
    assert int(used(network)[name].sum()) == used_units
    check(network)


def test_every_sublayer_is_looked_at():
    network = network_of("t5")
    assert len(used(network)) == SUBLAYERS
    assert set(used(network)) == {name for name, kind in prunable(network).items() if kind != "linear"}
