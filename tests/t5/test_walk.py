import weakref

import pytest
import torch

from common.t5.modules import kind_of, prunable
from common.t5.walk import walk
from tests.small import Text, seen_by_hooks, small_network, states_of

KINDS = {"t5": {}, "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, "mt5": {"kind": "mt5"}}


@pytest.fixture(params=KINDS)
def network(request):
    return small_network(**KINDS[request.param])


def rows(streams, take) -> torch.Tensor:
    """Return ``take(stream)`` at the tokens that count."""
    return torch.cat([take(stream)[stream.valid] for stream in streams])


def states_after(network, text) -> list[torch.Tensor]:
    """Return the decoder states of every batch at the end of a walk, at the tokens that count."""
    for sublayer in walk(network, [list(text.fixed())], "cpu"):
        streams = sublayer.splits[0]
    return [stream.states[stream.valid] for stream in streams]


@torch.no_grad()
def own_states(network, text) -> list[torch.Tensor]:
    """Return the same by the network itself."""
    return [states_of(network, batch)[batch["labels"] >= 0] for batch in text.fixed()]


def test_the_states_after_the_walk_are_the_networks_own(network):
    text = Text()
    expected = own_states(network, text)
    network.train()  # the walk has no dropout
    for mine, own in zip(states_after(network, text), expected, strict=True):
        assert torch.allclose(mine, own, atol=1e-5)


def test_every_sublayer_gets_and_gives_what_the_modules_do_for_single_sentences(network):
    """Rows of valid tokens in batches equal those without padding; at every module that reads or writes a stream."""
    text, met = Text(pairs=10, batch=4), []
    linear = [name for name, m in network.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    real = seen_by_hooks(network, text, linear)
    for sublayer in walk(network, [list(text.fixed())], "cpu"):
        streams = sublayer.splits[0]
        for group, names in enumerate(sublayer.readers):
            mine = torch.cat([x[valid] for x, valid in (sublayer.inputs(s)[group] for s in streams)])
            for name in names:
                assert torch.allclose(mine, real[name][0], atol=1e-5), name
        assert torch.allclose(rows(streams, sublayer.inner), real[sublayer.out][0], atol=1e-5), sublayer.out
        assert torch.allclose(rows(streams, sublayer.output), real[sublayer.out][1], atol=1e-5), sublayer.out
        met += [name for group in sublayer.readers for name in group] + [sublayer.out]
    assert sorted(met) == sorted(linear)


def test_moments_are_those_of_the_modules_inputs_and_shared_where_equal(network):
    texts = Text(0, pairs=9), Text(1, pairs=5)
    blocks = [n for n in prunable(network) if kind_of(n) != "feed-forward" and not n.endswith(".o")]
    names = [n for n in prunable(network) if kind_of(n) == "linear"]
    real, met = [seen_by_hooks(network, text, names) for text in texts], []
    for sublayer in walk(network, [list(text.fixed()) for text in texts], "cpu"):
        mine = sublayer.blocks(blocks)
        for split in (0, 1):
            moments = sublayer.moments(split, mine)
            for block in mine:
                x = real[split][sublayer.out if sublayer.is_attention else block][0].double()
                assert torch.allclose(moments[block].gram(), x.T @ x / len(x), atol=1e-4), block
            assert len({id(m) for m in moments.values()}) == (1 if sublayer.is_attention else 2)
        met += mine
    assert sorted(met) == sorted(blocks)


def test_two_walks_side_by_side_do_not_meet():
    networks, text = (small_network(seed=0), small_network(seed=1)), Text()
    for sublayers in zip(*(walk(network, [list(text.fixed())], "cpu") for network in networks), strict=True):
        splits = [sublayer.splits[0] for sublayer in sublayers]
        for sublayer in sublayers:
            sublayer.moments(0, [sublayer.out])
    for network, streams in zip(networks, splits, strict=True):
        for stream, expected in zip(streams, own_states(network, text), strict=True):
            assert torch.allclose(stream.states[stream.valid], expected, atol=1e-5)


@torch.no_grad()
def test_weights_changed_on_the_way_count_from_then_on(network):
    """First what reads the stream, then, with the inner tensors held, what writes into it; as recalibration does."""
    text = Text()
    before = own_states(network, text)
    for sublayer in walk(network, [list(text.fixed())], "cpu"):
        for stream in sublayer.splits[0]:
            sublayer.inputs(stream)
        for name in (name for group in sublayer.readers for name in group):
            network.get_submodule(name).weight.mul_(0.5)
        for stream in sublayer.splits[0]:
            sublayer.inner(stream, hold=True)
        network.get_submodule(sublayer.out).weight.mul_(3.0)
    expected = own_states(network, text)
    for stream, own, old in zip(sublayer.splits[0], expected, before, strict=True):
        assert torch.allclose(stream.states[stream.valid], own, atol=1e-5)
        assert not torch.allclose(own, old, atol=0.1)


def test_lm_head_is_not_computed():
    network = small_network()
    network.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("lm_head was computed"))
    assert len(states_after(network, Text())) == 5


@pytest.mark.parametrize("hold", [False, True])
def test_inner_tensors_and_outputs_of_one_sublayer_are_gone_at_the_next(hold):
    text, refs, met = Text(), [], 0
    for sublayer in walk(small_network(), [list(text.fixed())], "cpu"):
        assert not any(ref() is not None for ref in refs), sublayer.name
        refs = [weakref.ref(sublayer.inner(s, hold=hold)) for s in sublayer.splits[0]]
        assert all((ref() is not None) == hold for ref in refs)
        refs += [weakref.ref(sublayer.output(s)) for s in sublayer.splits[0]]
        met += 1
    assert met == 10
