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
from common.t5.modules import prunable
from tests.small import Text, scheme_of, small_network, write_bank

BLOCKS = ("encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense.wi",
          "encoder.block.0.layer.1.DenseReluDense.wo")
ORIGIN = {"model": "1" * 64, "bank": "2" * 64}


def example(seed=0):
    """Three blocks with two variants each: (sensitivity, sizes, all configurations as (size, loss, keys))."""
    g = np.random.default_rng(seed)
    options = {block: [None, *((block, (rate,) * (2 if "Attention" in block else 1)) for rate in (0.25, 0.5))]
               for block in BLOCKS}
    sizes = {block: int(g.integers(50, 100)) for block in BLOCKS}
    losses = {}
    for block, (_, *keys) in options.items():
        for key in keys:
            sizes[key], losses[key] = int(g.integers(1, sizes[block])), 2.0 + float(g.normal())
    every = [(sum(sizes[k or b] for b, k in zip(BLOCKS, keys, strict=True)),
              2.0 + sum(losses[k] - 2.0 for k in keys if k), keys) for keys in itertools.product(*options.values())]
    return search.Sensitivity(2.0, losses), sizes, every


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_no_configuration_beats(seed):
    found, sizes, every = example(seed)
    best = [(s, x) for s, x, _ in every if not any((a <= s and b < x) or (a < s and b <= x) for a, b, _ in every)]
    front = search.front(found, sizes)
    assert np.array(sorted(zip(front.sizes, front.losses, strict=True))) == pytest.approx(np.array(sorted(best)))


def test_a_place_on_the_front_gives_its_configuration():
    found, sizes, every = example()
    front = search.front(found, sizes)
    for i in range(len(front.sizes)):
        keys = required_variants(front.configuration(i)).items()
        assert sum(sizes[k] for k in keys) + sum(sizes[b] for b in BLOCKS if b not in dict(keys)) == front.sizes[i]
        assert 2.0 + sum(found.losses[k] - 2.0 for k in keys) == pytest.approx(front.losses[i])


def test_blocks_outside_the_bank_keep_their_weights():
    found, sizes, _ = example()
    with_more = search.front(found, sizes | {"decoder.block.0.layer.2.DenseReluDense.wo": 1000})
    assert with_more.sizes == pytest.approx(search.front(found, sizes).sizes + 1000)


def test_the_best_for_a_sparsity_and_the_smallest_for_a_loss():
    found, sizes, every = example()
    front, total = search.front(found, sizes), sum(sizes[b] for b in BLOCKS)
    best = min(x for s, x, _ in every if s <= 0.6 * total)
    assert front.losses[front.at_sparsity(0.4, total)] == pytest.approx(best)
    assert front.sizes[front.at_loss(2.3)] == min(s for s, x, _ in every if x <= 2.3)
    assert front.at_sparsity(0.999, total) is None and front.at_loss(-9.0) is None


@pytest.mark.parametrize("percent", range(1, 100))
def test_a_configuration_of_just_the_sparsity_asked_for_is_found(percent):
    """(1 - 0.9) × 1000 is a little less than 100."""
    key = (BLOCKS[1], (0.9,))
    front = search.front(search.Sensitivity(2.0, {key: 3.0}), {BLOCKS[1]: 1000, key: 1000 - 10 * percent})
    assert front.configuration(front.at_sparsity(percent / 100, 1000)) == {BLOCKS[1]: 0.9}


def test_a_coarse_front_is_short_and_of_real_configurations(monkeypatch):
    monkeypatch.setattr(search, "RESOLUTION", 8)
    for seed in range(5):
        found, sizes, every = example(seed)
        front = search.front(found, sizes)
        assert 1 < len(front.sizes) <= 8 + 1
        for size, loss in zip(front.sizes, front.losses, strict=True):
            assert any(s == size and x == pytest.approx(loss) for s, x, _ in every)


def pruned(tmp_path, network=None, masks=None):
    model = Model(network or small_network(), "", masks=masks or {})
    return model, write_bank(tmp_path / "b.npy", prune_scheme(model, scheme_of(model.network, (0.25, 0.5), (0.0, 0.5))))


def test_kept_weights_by_hand(tmp_path):
    """d_model 32, d_ff 48, 4 heads of 8: an attention has 4 × 32 × 32 weights, wi 48 × 32."""
    model, opened = pruned(tmp_path)
    sizes, total = search.kept_weights(model, opened)
    assert total == 6 * 4096 + 8 * 1536
    assert sizes[BLOCKS[0]] == 4096 and sizes[BLOCKS[1]] == 1536 and sizes[BLOCKS[1], (0.5,)] == 768
    variant = opened.read((BLOCKS[0], (0.25, 0.5)))
    assert sizes[variant.key] == sum(int(m.sum()) for m in variant.masks.values())
    assert sizes[BLOCKS[0], (0.0, 0.5)] == 3 * 1024 + 512  # only its o is in the bank


def test_kept_weights_of_a_second_round_count_what_is_there(tmp_path):
    first, opened = pruned(tmp_path)
    composition.compose(first, opened, uniform(prunable(first.network), 0.25, 0.5))
    model, second = pruned(tmp_path, first.network, first.masks)
    sizes, total = search.kept_weights(model, second)
    assert total == 6 * 4096 + 8 * 1536 and sizes[BLOCKS[1]] == 768 and sizes[BLOCKS[1], (0.5,)] == 384
    o = int(model.masks[f"{BLOCKS[0]}.o.weight"].sum())
    assert sizes[BLOCKS[0]] == 3 * 24 * 32 + o
    assert sizes[BLOCKS[0], (0.0, 0.5)] == pytest.approx(3 * 24 * 32 + o / 2, abs=0.5)
    variant = second.read((BLOCKS[0], (0.25, 0.5)))
    assert sizes[variant.key] == sum(int(m.sum()) for m in variant.masks.values())


def test_measuring_is_composing_one_variant_and_leaves_the_model_as_it_was(tmp_path):
    (model, opened), text = pruned(tmp_path), Text(pairs=8)
    found = search.measure(model, opened, text, "cpu")
    assert list(found.losses) == list(opened.entries)
    for a, b in zip(model.network.parameters(), small_network().parameters(), strict=True):
        assert torch.equal(a, b)
    key = list(opened.entries)[3]
    alone = Model(small_network(), "")
    composition.install(alone, opened.read(key))
    assert found.losses[key] == evaluate(TranslationLoss(alone.network), text, "cpu") != found.dense
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
    search.write(tmp_path / "s.json", search.Sensitivity(2.0, losses if loss is None else losses | {last: loss}), ORIGIN)
    with pytest.raises(UserError, match="s.json: does not list every variant of the bank once"):
        search.read(tmp_path / "s.json", opened, ORIGIN)
