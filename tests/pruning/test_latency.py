import itertools

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.pruning import latency, search
from common.pruning.latency import KINDS, Latency
from common.pruning.scheme import make_scheme
from common.pruning.variants import prune_scheme
from common.t5.model import Model
from common.t5.modules import prunable
from tests.small import scheme_of, small_network, write_bank

ATTENTION, FF = "encoder.block.0.layer.0.SelfAttention", "decoder.block.1.layer.2.DenseReluDense"
CROSS = "decoder.block.0.layer.1.EncDecAttention"
ORIGIN = {"model": "1" * 64, "validation text": "2" * 64}


def example() -> Latency:
    """Of 4 heads, 48 units; the small network has two sub-layers of each kind: 1 s + 2 × (6 + 4 + 6 + 6 + 4) s."""
    heads, units = {0: 0.0, 1: 3.0, 2: 4.0, 4: 6.0}, {0: 0.0, 1: 1.0, 48: 4.0}
    return Latency(1.0, {name: units if "feed" in name else heads for name in KINDS.values()}, {})


def pruned(tmp_path, configurations):
    model = Model(small_network(), "")
    return model, write_bank(tmp_path / "b.npy", prune_scheme(model, make_scheme(configurations)))


def test_every_sublayer_has_its_kind():
    names = [name for name, kind in prunable(small_network()).items() if kind != "linear"]
    assert [latency.kind(name) for name in names[:2] + names[4:7]] == list(KINDS.values())
    with pytest.raises(KeyError):
        latency.kind(f"{FF}.wi")


def test_times_between_those_measured_lie_on_a_line():
    assert [example().of(ATTENTION, n) for n in range(5)] == [0.0, 3.0, 4.0, 5.0, 6.0]
    assert example().of(FF, 24) == pytest.approx(1 + 3 * 23 / 47)


def test_what_variants_save_by_hand(tmp_path):
    model, opened = pruned(tmp_path, [{ATTENTION: 0.25, FF: 0.5}, {ATTENTION: 1.0, FF: 1.0},
                                      {f"{ATTENTION}.o": 0.5, f"{FF}.wi": 0.5}])
    saved, whole = latency.saved(example(), model, opened)
    assert whole == 53_000_000_000
    assert {key: s / 1e9 for key, s in saved.items()} == pytest.approx({
        (ATTENTION, (0.25, 0.0)): 1.0, (ATTENTION, (1.0, 0.0)): 6.0, (ATTENTION, (0.0, 0.5)): 0.0,
        (FF, (0.5, 0.0, 0.0, 0.0, 0.0)): 3 - 3 * 23 / 47, (FF, (1.0, 0.0, 0.0, 0.0, 0.0)): 4.0,
        (f"{FF}.wi", (0.5,)): 0.0})


def test_an_original_that_was_pruned_before_takes_less(tmp_path):
    model, opened = pruned(tmp_path, [{ATTENTION: 0.5}])
    model.network.get_parameter(f"{ATTENTION}.v.weight").data[:16] = 0.0  # two heads of width 8
    saved, whole = latency.saved(example(), model, opened)
    assert whole == 51_000_000_000
    assert saved == {(ATTENTION, (0.5, 0.0)): 1_000_000_000}  # half of what is left


def test_a_bank_that_saves_no_time_is_refused(tmp_path):
    model = Model(small_network(), "")
    opened = write_bank(tmp_path / "b.npy", prune_scheme(model, scheme_of(model.network, (0.0, 0.5))))
    with pytest.raises(UserError, match="(?s)b.npy: its variants leave out single weights, which.*--attention 0.25 "):
        latency.check_bank(opened)


@pytest.mark.parametrize("seed", range(5))
def test_a_search_by_time_finds_the_least_loss_of_all_combinations(tmp_path, seed):
    model, opened = pruned(tmp_path, [{name: rate for name in (ATTENTION, CROSS, FF)} for rate in (0.25, 0.5, 1.0)])
    saved, whole = latency.saved(example(), model, opened)
    g = np.random.default_rng(seed)
    losses = {key: 2.0 + float(g.exponential()) for key in opened.entries}
    front = search.front(search.Sensitivity(2.0, losses), saved, whole)
    blocks = [[None, *(key for key in losses if key[0] == block)] for block in (ATTENTION, CROSS, FF)]
    every = [(whole - sum(saved[key] for key in keys if key), 2.0 + sum(losses[key] - 2.0 for key in keys if key))
             for keys in itertools.product(*blocks)]
    for speedup in (1.0, 1.05, 1.1, 1.2, 1.3):
        best = min(loss for took, loss in every if took * speedup <= whole)
        assert front.losses[front.at_size(whole / speedup)] == pytest.approx(best)
    assert front.at_size(whole / 2) is None  # at best 53 s / 37 s


def test_a_measurement_reads_back_for_the_same_model_only(tmp_path):
    latency.write(tmp_path / "l.json", example(), ORIGIN)
    assert latency.read(tmp_path / "l.json", ORIGIN) == example()
    with pytest.raises(UserError, match="(?s)measured on something else; remove it.*model: '1+.*', now '3+'"):
        latency.read(tmp_path / "l.json", ORIGIN | {"model": "3" * 64})
    (tmp_path / "l.json").write_text((tmp_path / "l.json").read_text().replace('"fixed": ', '"fixed": 1'))
    with pytest.raises(UserError, match="l.json: was edited after it was made, or is damaged"):
        latency.read(tmp_path / "l.json", ORIGIN)


@pytest.mark.parametrize("change", [{"fixed": -1.0}, {"fixed": 1e7}, {"seconds": {}},
                                    {"seconds": dict.fromkeys(KINDS.values(), {})}])
def test_a_measurement_must_have_times_of_every_kind(tmp_path, change):
    latency.write(tmp_path / "l.json", Latency(**vars(example()) | change), ORIGIN)
    with pytest.raises(UserError, match="l.json: does not list a time for every kind of sub-layer"):
        latency.read(tmp_path / "l.json", ORIGIN)


def test_other_threads_are_a_difference():
    found = Latency(1.0, {}, latency.conditions("cpu"))
    assert found.differences("cpu") == ""
    found.measured_on["threads"] += 1
    threads = torch.get_num_threads()
    assert found.differences("cpu") == f"threads {threads + 1}, now {threads}"


def test_measuring_times_every_kind_and_leaves_the_model_as_it_was(origin, text, monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(latency, "SECONDS", 0)
    before = {name: p.clone() for name, p in origin.network.named_parameters()}
    found = latency.measure(origin, text[1], "cpu")
    assert all(torch.equal(p, before[name]) for name, p in origin.network.named_parameters())
    assert list(found.seconds) == list(KINDS.values())
    for name, table in found.seconds.items():
        assert list(table) == ([0, 1, 48] if "feed" in name else [0, 1, 4])
        assert table[0] == 0 and list(table.values()) == sorted(table.values())
    assert found.measured_on["sentences"] == len(text[1]) and not found.differences("cpu")


def test_of_each_turn_the_least_counts(origin, text, monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", 2)
    monkeypatch.setattr(latency, "SECONDS", 0)
    rounds = iter([([2.0, 9.0], [1.0, 8.0])] * 16 + [([9.0, 2.0], [8.0, 1.0])] * 16)
    monkeypatch.setattr(latency, "side_by_side", lambda *arguments: next(rounds))
    found = latency.measure(origin, text[1], "cpu")
    assert found.fixed == 2.0 and next(rounds, None) is None
    assert sum(2 * max(table.values()) for table in found.seconds.values()) == pytest.approx(4.0 - 2.0)


def test_a_line_through_what_was_measured():
    assert latency._line({1: 2.0, 2: 4.0, 3: 3.0}) == pytest.approx({0: 0.0, 1: 2.5, 3: 3.5})
    assert latency._line({1: 2.0}) == {0: 0.0, 1: 2.0}
    falling = latency._line({1: 3.0, 4: 2.0})  # noise: what keeps more is not faster
    assert falling[4] == falling[1] == pytest.approx(3.0)
