"""Other programs' networks compute what the pruned T5 does, whatever its layers kept."""

import pytest
import torch
from hypothesis import given

from common.export.layout import for_ctranslate2, for_transformers
from common.t5.model import Model
from common.t5.shrink import shrink, used
from tests.small import small_network
from tests.t5.test_shrink import EXAMPLES, FAMILY, empty_some, generated, logits, network_of, patterns, same, size


def check(network):
    """Export a network and compare."""
    made = for_transformers(network)
    assert same(logits(network), logits(made))
    for beams in (1, 3):
        assert generated(network, beams) == generated(made, beams)
    return made


@pytest.mark.parametrize("name", FAMILY)
@EXAMPLES
@given(pattern=patterns)
def test_logits_and_translations_are_the_masked_models(name, pattern):
    network = network_of(name)
    empty_some(network, *pattern)
    check(network)


@pytest.mark.parametrize(("act", "gated"), [("relu", False), ("gelu", False), ("gelu_new", False), ("relu", True),
                                            ("gelu", True), ("gelu_new", True), ("silu", True), ("sigmoid", False)])
def test_every_activation_survives_in_umt5(act, gated):
    network = network_of("t5", dense_act_fn=act, is_gated_act=gated)
    empty_some(network, ["some"] * len(used(network)), 0)
    assert check(network).config.model_type == "umt5"


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_output_is_scaled_as_before(scaled, tied):
    network = network_of("t5" if tied else "gated", scale_decoder_outputs=scaled)
    empty_some(network, ["some"] * len(used(network)), 0)
    made = check(network)
    assert (made.lm_head.weight is made.shared.weight) == tied and made.config.model_type == "umt5"


def keep_heads(network, heads: dict) -> None:
    """Leave these heads of the attentions whose names end so, half of the units of all feed-forwards."""
    with torch.no_grad():
        for name, mask in used(network).items():
            if name.endswith("DenseReluDense"):
                network.get_parameter(f"{name}.wo.weight")[:, ::2] = 0
                continue
            kept = next((h for end, h in heads.items() if name.endswith(end)), range(len(mask)))
            gone = torch.tensor([i not in kept for i in range(len(mask))]).repeat_interleave(8)
            network.get_parameter(f"{name}.o.weight")[:, gone] = 0


@pytest.mark.parametrize(("heads", "kind", "count"), [
    ({}, "t5", 4), ({"Attention": (1, 3)}, "t5", 2), ({"SelfAttention": (0, 2), "EncDecAttention": (1, 3)}, "t5", 2),
    ({"block.0.layer.0.SelfAttention": (0, 2), "Attention": (1, 3)}, "umt5", 2),
    ({"block.0.layer.0.SelfAttention": (0, 2)}, "t5", 4),  # other layers have all four
    ({"block.0.layer.0.SelfAttention": (2,), "SelfAttention": (1, 2), "EncDecAttention": (0, 3)}, "t5", 2)])
def test_it_is_a_t5_where_that_is_as_small(heads, kind, count):
    network = network_of("t5")
    keep_heads(network, heads)
    made = check(network)
    assert (made.config.model_type, made.config.num_heads, made.config.d_ff) == (kind, count, 24)


def test_layers_that_agree_need_no_filling():
    network = small_network()
    keep_heads(network, {"Attention": (1, 3)})
    assert size(check(network)) == size(shrink(Model(network, "")))


def test_mt5_stays_mt5():
    network = network_of("mt5")
    keep_heads(network, {"Attention": (1, 3)})
    assert check(network).config.model_type == "mt5"


def test_nothing_is_shared_with_the_model():
    network = network_of("gated")
    before = {name: p.clone() for name, p in network.state_dict().items()}
    for made in (for_transformers(network), for_ctranslate2(network)[0]):
        with torch.no_grad():
            for p in made.parameters():
                p.zero_()
    assert all(torch.equal(p, before[name]) for name, p in network.state_dict().items())


def test_ctranslate2s_stacks_have_their_own_head_counts_and_layers_their_own_widths():
    network = network_of("t5")
    with torch.no_grad():
        network.encoder.block[0].layer[1].DenseReluDense.wi.weight[5:] = 0
        for block in network.encoder.block:
            block.layer[0].SelfAttention.o.weight[:, 8:] = 0
    made, heads = for_ctranslate2(network)
    assert heads == {"encoder": 1, "decoder": 4}
    assert [b.layer[1].DenseReluDense.wi.weight.shape[0] for b in made.encoder.block] == [5, 48]
    assert made.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.shape == (32, 1)
