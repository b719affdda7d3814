import itertools

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.pruning import composition, search
from common.pruning.configurations import required_variants, uniform
from common.pruning.variants import prune_scheme
from common.t5.loss import TranslationLoss, evaluate
from common.t5.model import Model
from common.t5.modules import members, prunable
from tests.small import Text, scheme_of, small_network, write_bank

FF = "encoder.block.0.layer.1.DenseReluDense"
ATTENTION, WI, WO = "encoder.block.0.layer.0.SelfAttention", f"{FF}.wi", f"{FF}.wo"
ORIGIN = {"model": "1" * 64, "bank": "2" * 64}
PRESENT = 300


def example(seed=0, blocks=(ATTENTION, WI, WO)):
    """Blocks with two variants each: (sensitivity, weights removed, all configurations as (size, loss, keys)).

    A feed-forward and its linear modules cannot both be pruned.
    """
    g = np.random.default_rng(seed)
    options = {block: [None, *((block, (rate,) * len(members(block))) for rate in (0.25, 0.5))] for block in blocks}
    keys = [key for _, *keys in options.values() for key in keys]
    removed, losses = ({key: draw() for key in keys} for draw in (lambda: int(g.integers(1, 60)),
                                                                  lambda: 2.0 + float(g.normal())))
    every = []
    for chosen in itertools.product(*options.values()):
        chosen = tuple(key for key in chosen if key)
        if not (any(key[0] == FF for key in chosen) and any(key[0] in (WI, WO) for key in chosen)):
            every.append((PRESENT - sum(removed[key] for key in chosen),
                          2.0 + sum(losses[key] - 2.0 for key in chosen), chosen))
    return search.Sensitivity(2.0, losses), removed, every


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("blocks", [(ATTENTION, WI, WO), (WI, FF, ATTENTION, WO), (FF,)])
def test_the_front_is_what_no_configuration_beats(seed, blocks):
    found, removed, every = example(seed, blocks)
    best = [(s, x) for s, x, _ in every if not any((a <= s and b < x) or (a < s and b <= x) for a, b, _ in every)]
    front = search.front(found, removed, PRESENT)
    assert np.array(sorted(zip(front.sizes, front.losses, strict=True))) == pytest.approx(np.array(sorted(best)))


@pytest.mark.parametrize("blocks", [(ATTENTION, WI, WO), (WI, FF, ATTENTION, WO)])
def test_a_place_on_the_front_gives_its_configuration(blocks):
    found, removed, _ = example(0, blocks)
    front = search.front(found, removed, PRESENT)
    for i in range(len(front.sizes)):
        keys = required_variants(front.configuration(i)).items()
        assert PRESENT - sum(removed[key] for key in keys) == front.sizes[i]
        assert 2.0 + sum(found.losses[key] - 2.0 for key in keys) == pytest.approx(front.losses[i])


def test_the_best_for_a_sparsity_and_the_smallest_for_a_loss():
    found, removed, every = example()
    front = search.front(found, removed, PRESENT)
    best = min(x for s, x, _ in every if s <= 0.8 * PRESENT)
    assert front.losses[front.at_sparsity(0.2, PRESENT)] == pytest.approx(best)
    assert front.sizes[front.at_loss(2.3)] == min(s for s, x, _ in every if x <= 2.3)
    assert front.at_sparsity(0.999, PRESENT) is None and front.at_loss(-9.0) is None


def test_a_configuration_of_just_the_sparsity_asked_for_is_found():
    """(1 - 0.9) × 1000 is a little less than 100."""
    for percent in range(1, 100):
        front = search.front(search.Sensitivity(2.0, {(WI, (0.9,)): 3.0}), {(WI, (0.9,)): 10 * percent}, 1000)
        assert front.at_sparsity(percent / 100, 1000) == 1, percent


def test_a_coarse_front_is_short_and_of_real_configurations(monkeypatch):
    exact = [len(search.front(*example(seed)[:2], PRESENT).sizes) for seed in range(5)]
    monkeypatch.setattr(search, "RESOLUTION", 3)
    assert max(exact) > 3 + 1
    for seed in range(5):
        found, removed, every = example(seed)
        front = search.front(found, removed, PRESENT)
        assert len(front.sizes) <= min(3 + 1, exact[seed])
        for size, loss in zip(front.sizes, front.losses, strict=True):
            assert any(s == size and x == pytest.approx(loss) for s, x, _ in every)


def pruned(tmp_path, network=None, masks=None):
    model = Model(network or small_network(), "", masks=masks or {})
    return model, write_bank(tmp_path / "b.npy", prune_scheme(model, scheme_of(model.network, (0.25, 0.5), (0.0, 0.5))))


def test_removed_weights_by_hand(tmp_path):
    """d_model 32, d_ff 48, 4 heads of 8: an attention has 4 × 32 × 32 weights, wi 48 × 32."""
    model, opened = pruned(tmp_path)
    removed, present, total = search.removed_weights(model, opened)
    assert present == total == 6 * 4096 + 8 * 1536 and removed.keys() == opened.entries.keys()
    assert removed[WI, (0.5,)] == 768
    variant = opened.read((ATTENTION, (0.25, 0.5)))
    assert removed[variant.key] == sum(int((~m).sum()) for m in variant.masks.values())
    assert removed[ATTENTION, (0.0, 0.5)] == 512  # only its o is in the bank


def test_removed_weights_of_a_second_round_count_what_is_there(tmp_path):
    first, opened = pruned(tmp_path)
    composition.compose(first, opened, uniform(prunable(first.network), 0.25, 0.5))
    model, second = pruned(tmp_path, first.network, first.masks)
    removed, present, total = search.removed_weights(model, second)
    there = {name: int(mask.sum()) for name, mask in model.masks.items()}
    assert total == 6 * 4096 + 8 * 1536 and present == sum(there.values()) < 0.7 * total
    assert removed[WI, (0.5,)] == 384
    assert removed[ATTENTION, (0.0, 0.5)] == pytest.approx(there[f"{ATTENTION}.o.weight"] / 2, abs=0.5)
    variant = second.read((ATTENTION, (0.25, 0.5)))
    assert removed[variant.key] == sum(there[name] - int(m.sum()) for name, m in variant.masks.items())
    composition.install(model, variant)
    composed = sum(int(mask.sum()) for mask in model.masks.values())
    assert search.removed_weights(model, second)[1] == composed == present - removed[variant.key]


def test_measuring_is_composing_one_variant_and_leaves_the_model_as_it_was(tmp_path):
    (model, opened), text = pruned(tmp_path), Text(pairs=8)
    found = search.measure(model, opened, text, "cpu")
    assert list(found.losses) == list(opened.entries)
    for a, b in zip(model.network.parameters(), small_network().parameters(), strict=True):
        assert torch.equal(a, b)
    for key, loss in found.losses.items():
        alone = Model(small_network(), "")
        composition.install(alone, opened.read(key))
        assert loss == pytest.approx(evaluate(TranslationLoss(alone.network), text, "cpu"), rel=1e-6) != found.dense
    assert found.dense == evaluate(TranslationLoss(model.network), text, "cpu")


def test_a_measurement_reads_back_for_the_same_model_and_bank_only(tmp_path):
    _, opened = pruned(tmp_path)
    found = search.Sensitivity(2.0, {key: 2.5 + i for i, key in enumerate(opened.entries)})
    search.write(tmp_path / "s.json", found, ORIGIN)
    assert search.read(tmp_path / "s.json", opened, ORIGIN) == found
    with pytest.raises(UserError, match="(?s)was measured on something else.*bank: '2+.*', now '3+'"):
        search.read(tmp_path / "s.json", opened, ORIGIN | {"bank": "3" * 64})


def test_a_measurement_that_was_edited_is_refused(tmp_path):
    _, opened = pruned(tmp_path)
    search.write(tmp_path / "s.json", search.Sensitivity(2.0, dict.fromkeys(opened.entries, 2.5)), ORIGIN)
    text = (tmp_path / "s.json").read_text()
    (tmp_path / "s.json").write_text(text.replace('"dense": ', '"dense": 1'))
    with pytest.raises(UserError, match="s.json: was edited after it was made, or is damaged"):
        search.read(tmp_path / "s.json", opened, ORIGIN)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": "composable-pruning sensitivity", "version": 2}'])
def test_a_file_that_holds_no_measurement_is_refused(tmp_path, content):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(UserError, match="s.json: is not a sensitivity file of this toolkit"):
        search.read(tmp_path / "s.json", None, ORIGIN)


@pytest.mark.parametrize("loss", [None, 1e7, -0.1])
def test_a_measurement_must_have_a_loss_for_every_variant(tmp_path, loss):
    _, opened = pruned(tmp_path)
    losses = dict.fromkeys(opened.entries, 2.5)
    last = losses.popitem()[0]
    losses |= {} if loss is None else {last: loss}
    search.write(tmp_path / "s.json", search.Sensitivity(2.0, losses), ORIGIN)
    with pytest.raises(UserError, match="s.json: does not list every variant of the bank once"):
        search.read(tmp_path / "s.json", opened, ORIGIN)
