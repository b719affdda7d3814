"""A configuration means what transformers makes of it, and what a stage writes the next one reads."""

import json

import pytest
import torch

from common.errors import UserError
from common.t5 import config as configs
from common.t5 import model
from common.t5 import network as networks
from common.t5.folder import load_folder
from common.t5.network import Dropout, build_network
from tests.small import logits_of, save_folder

BARE = {"model_type": "t5", "d_model": 8, "d_kv": 2, "d_ff": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 9}


def logits(network):
    ids = torch.arange(3, 23).view(2, 10)
    return logits_of(network, ids, ids)


@pytest.mark.parametrize("kind", ["t5", "mt5"])
@pytest.mark.parametrize("changes", [
    {}, {"feed_forward_proj": "gated-gelu"}, {"feed_forward_proj": "relu", "dense_act_fn": "gelu_new"},
    {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, {"feed_forward_proj": "gelu", "is_gated_act": True},
    {"feed_forward_proj": "gated-silu", "is_gated_act": False}, {"tie_word_embeddings": False},
    {"tie_word_embeddings": False, "scale_decoder_outputs": True}, {"scale_decoder_outputs": False},
], ids=str)
def test_a_configuration_computes_what_it_does_in_transformers_also_after_saving(tmp_path, kind, changes):
    from transformers import AutoModelForSeq2SeqLM

    gated = changes.get("is_gated_act", "gated" in changes.get("feed_forward_proj", "relu"))
    save_folder(tmp_path / "hub", kind, feed_forward_proj="gated-relu" if gated else "relu")
    path = tmp_path / "hub" / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in (
        "feed_forward_proj", "dense_act_fn", "is_gated_act", "tie_word_embeddings", "scale_decoder_outputs")}
    path.write_text(json.dumps(config | {"feed_forward_proj": "relu"} | changes))
    expected = logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hub").eval())
    loaded = load_folder(tmp_path / "hub", "en", "de")
    torch.testing.assert_close(logits(loaded.network), expected, rtol=1e-5, atol=1e-5)
    model.save(tmp_path / "m.pth", loaded)
    assert torch.equal(logits(model.load(tmp_path / "m.pth").network), logits(loaded.network))


@pytest.mark.parametrize(("kind", "changes"), [
    ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "untie": True}),
    ("mt5", {"untie": True}),
    ("t5", {"num_decoder_layers": 1, "d_kv": 4}),
])
def test_the_family_survives_saving(tmp_path, kind, changes):
    network = save_folder(tmp_path / "hub", kind, **changes)
    model.save(tmp_path / "m.pth", load_folder(tmp_path / "hub", "en", "de"))
    again = model.load(tmp_path / "m.pth").network
    torch.testing.assert_close(logits(again), logits(network), rtol=1e-5, atol=1e-5)
    assert (again.lm_head.weight is again.shared.weight) == ("untie" not in changes)


@pytest.mark.parametrize(("change", "complaint"), [
    ({"model_type": "umt5"}, "is a 'umt5' model; this toolkit prunes the T5 family"),
    ({"num_layers": 10**9}, "num_layers = 1000000000, allowed is 1 to 256"), ({"num_heads": True}, "num_heads = True"),
    ({"dropout_rate": 2}, "dropout_rate = 2"), ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon = 'x'"),
    ({"eos_token_id": 10**6}, "eos_token_id is not below vocab_size"), ({"eos_token_id": [1]}, r"eos_token_id = \[1\]"),
    ({"relative_attention_max_distance": 3}, "relative_attention_max_distance is not above half"),
    ({"is_gated_act": "yes"}, "is_gated_act = 'yes', allowed is true or false"),
    ({"tie_word_embeddings": 0}, "tie_word_embeddings = 0, allowed is true or false"),
    ({"dense_act_fn": "magic"}, "does not describe a T5: .*magic"), ({"dense_act_fn": ["relu"]}, "does not describe"),
    ({"feed_forward_proj": "a-b"}, "does not describe a T5: feed_forward_proj is 'a-b', not an activation or gated"),
])
def test_a_configuration_that_describes_no_t5_is_refused_with_the_whole_reason(change, complaint):
    with pytest.raises(UserError, match=f"here: .*{complaint}"):
        build_network(BARE | change, "here")


def test_a_network_is_built_without_memory():
    network = build_network(BARE | {"d_model": 1 << 16, "d_ff": 1 << 20, "num_layers": 8})
    assert all(p.device.type == "meta" for p in network.parameters())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_zeroes_the_share_p_at_random_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(301, 1003, requires_grad=True)
    y = Dropout(p)(x)
    dropped = y == 0
    assert float(dropped.double().mean()) == pytest.approx(p, abs=0.003)
    torch.testing.assert_close(y[~dropped], torch.full_like(y[~dropped], 1 / (1 - p)))
    y.sum().backward()
    assert torch.equal(x.grad, y)
    for dim in (0, 1):  # no row or column stands out
        assert float((dropped.double().mean(dim=dim) - p).abs().max()) < 0.15
    assert not torch.equal(Dropout(p)(x), y)


def test_dropout_of_0_and_in_evaluation_changes_nothing():
    x = torch.randn(3, 5)
    assert torch.equal(Dropout(0.0)(x), x) and torch.equal(Dropout(0.5).eval()(x), x)


def test_every_activation_that_a_configuration_may_name_is_there():
    assert tuple(networks.ACTIVATIONS) == configs.ACTIVATIONS
