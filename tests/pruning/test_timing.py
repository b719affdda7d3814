"""Networks that replay translations, in turns."""

import gc

import pytest
import torch

from common.pruning import timing
from common.t5 import decoding
from common.t5.decoding import decode
from common.t5.modules import prunable
from tests.small import small_network

CROSS, FF = "decoder.block.0.layer.1.EncDecAttention", "decoder.block.1.layer.2.DenseReluDense"


@pytest.mark.parametrize("encoded", [2, 64])
def test_a_network_that_replays_makes_the_known_translations(origin, text, monkeypatch, encoded):
    monkeypatch.setattr(decoding, "_ENCODED", encoded)  # sentences at once; a batch holds more than two
    known, whole = timing.translations(origin, text[1], "cpu"), small_network(vocab_size=300)
    network = timing.thinned(whole, {CROSS: 1})
    seconds = timing.side_by_side((network, timing.thinned(whole, {})), known, origin, text[1], "cpu")
    assert min(map(min, seconds)) > 0 and len({len(turns) for turns in seconds}) == 1
    replay = timing._Replay(network, known)
    replay.batches = iter(known)
    for batch, ids in zip(text[1].fixed(), known, strict=True):
        for made, row in zip(decode(network, batch["input_ids"], batch["attention_mask"], ids.shape[1]), ids.tolist(),
                             strict=True):
            assert made == row[:len(made)] and set(row[len(made):]) <= {1}


@pytest.mark.parametrize("before", [True, False])
def test_garbage_is_collected_in_no_networks_time(origin, text, monkeypatch, before):
    known, whole, seen = timing.translations(origin, text[1], "cpu"), small_network(vocab_size=300), []
    networks = timing.thinned(whole, {}), timing.thinned(whole, {})
    translate = timing.translate
    monkeypatch.setattr(timing, "translate", lambda *arguments: (seen.append(gc.isenabled()), translate(*arguments)))
    try:
        if not before:
            gc.disable()
        timing.side_by_side(networks, known, origin, text[1], "cpu")
        assert seen == [False, False] and gc.isenabled() is before
    finally:
        gc.enable()


def test_a_failure_in_either_ends_both(origin, text, monkeypatch):
    known, whole = timing.translations(origin, text[1], "cpu"), small_network(vocab_size=300)
    networks = timing.thinned(whole, {}), timing.thinned(whole, {})
    for bad in networks:
        with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
            m.setattr(bad.decoder, "layers", lambda: 1 / 0)
            timing.side_by_side(networks, known, origin, text[1], "cpu")
        assert gc.isenabled()


def test_thinned_sublayers_differ_in_their_heads_and_share_what_is_not_cut():
    whole = small_network()
    sizes = {name: timing.full(whole.config, name) for name, kind in prunable(whole).items() if kind != "linear"}
    names = [name for name in sizes if name.startswith("decoder") and name.endswith("SelfAttention")]
    before = {name: w.clone() for name, w in whole.state_dict().items()}
    network = timing.thinned(whole, sizes | dict.fromkeys(names, 3))
    assert all(torch.equal(w, before[name]) for name, w in whole.state_dict().items())
    assert [len(network.get_submodule(name).heads) for name in names] == [3, 3]
    assert not torch.equal(*(network.get_submodule(name).heads for name in names))
    assert network.get_parameter(f"{FF}.wo.weight").data_ptr() == whole.get_parameter(f"{FF}.wo.weight").data_ptr()
    assert not list(timing.thinned(whole, {}).decoder.layers())
