import itertools

import numpy as np
import pytest

from common import bank, composition, models, search, training
from common.configs import required_variants

BLOCKS = ("encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense.wi",
          "encoder.block.0.layer.1.DenseReluDense.wo")


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


def test_the_best_for_a_sparsity_and_the_smallest_for_a_loss():
    found, sizes, every = example()
    front, total = search.front(found, sizes), sum(sizes[b] for b in BLOCKS)
    best = min(x for s, x, _ in every if s <= 0.6 * total)
    assert front.losses[front.at_sparsity(0.4, total)[0]] == pytest.approx(best)
    assert front.sizes[front.at_loss(2.3)[0]] == min(s for s, x, _ in every if x <= 2.3)
    assert front.at_sparsity(0.999, total) == front.at_loss(-9.0) == []
    smallest = front.at_loss(2.3, 3)
    assert len(smallest) == 3 and (np.diff(front.sizes[smallest]) > 0).all() and (front.losses[smallest] <= 2.3).all()
    best = front.at_sparsity(0.4, total, 3)
    assert len(best) == 3 and (np.diff(front.losses[best]) > 0).all() and (front.sizes[best] <= 0.6 * total).all()


def test_kept_weights_by_hand(made):
    """d_model 32, d_ff 48, 4 heads of 8: an attention has 4 × 32 × 32 weights, wi 48 × 32."""
    opened, network = bank.load(made / "pruned.npy"), models.load(made / "origin.pth").network
    sizes, total = search.kept_weights(network, opened)
    assert total == 6 * 4096 + 8 * 1536
    assert sizes[BLOCKS[1]] == 1536 and sizes[BLOCKS[1], (0.5,)] == 768
    variant = opened.read((BLOCKS[0], (0.25, 0.5)))
    assert sizes[BLOCKS[0], (0.25, 0.5)] == sum(int(m.sum()) for m in variant.masks.values())


def test_measuring_is_composing_one_variant_and_leaves_the_model_as_it_was(made, text):
    opened, model = bank.load(made / "tuned.npy"), models.load(made / "origin.pth")
    before = {n: p.detach().clone() for n, p in model.network.named_parameters()}
    found = search.measure(model, opened, text[1], "cpu", log=lambda _: None)
    assert all((p == before[n]).all() for n, p in model.network.named_parameters())
    key = list(opened.entries)[3]
    alone = models.load(made / "origin.pth")
    composition.install(alone, opened.read(key))
    assert found.losses[key] == training.evaluate(training.TranslationLoss(alone.network), text[1], "cpu")
    assert found.dense == training.evaluate(training.TranslationLoss(model.network), text[1], "cpu")


def searching(made, tmp_path, stage, *more):
    return stage("config_generator", "-m", made / "origin.pth", "-p", made / "tuned.npy", "--data-dir", made / "text",
                 "--sensitivity", tmp_path / "s.json", "-o", tmp_path / "best.json", *more)


def test_the_stage_searches_verifies_and_measures_only_once(made, tmp_path, stage):
    first = searching(made, tmp_path, stage, "--sparsity", 0.3, 0.5, "--verify")
    assert first.code == 0 and "28/28 variants evaluated" in first.err and first.out.count(", recalibrated ") == 2
    again = searching(made, tmp_path, stage, "--target-loss", 100, "-n", 3, "--overwrite")
    assert again.code == 0 and "evaluated" not in again.err and "best.json: 3 configurations" in again.out
    assert stage("compose_model", "-m", made / "origin.pth", "-p", made / "tuned.npy", "-c", tmp_path / "best.json",
                 "-o", tmp_path / "m.pth").code == 0


@pytest.mark.parametrize(("more", "message"), [
    (("--sparsity", 0.99), "no combination of its variants has sparsity 0.99; they reach from sparsity 0."),
    (("--target-loss", 0.01), "no combination of its variants has loss 0.01"),
    (("--sparsity", 0.5, "--mixed", 2), "name rates; a search finds them"),
    ((), "a search needs a bank"),
])
def test_a_search_that_cannot_be_is_refused(made, tmp_path, stage, more, message):
    result = searching(made, tmp_path, stage, *more)
    assert result.code == 2 and message in result.err and not (tmp_path / "best.json").exists()


def test_sensitivities_of_another_bank_are_refused(made, tmp_path, stage):
    searching(made, tmp_path, stage, "--sparsity", 0.3)
    result = stage("config_generator", "-m", made / "origin.pth", "-p", made / "pruned.npy", "--data-dir",
                   made / "text", "--sensitivity", tmp_path / "s.json", "-o", tmp_path / "b.json", "--sparsity", 0.3)
    assert result.code == 2 and "was measured on something else" in result.err and "bank: " in result.err


def test_sensitivities_that_were_edited_are_refused(made, tmp_path, stage):
    searching(made, tmp_path, stage, "--sparsity", 0.3)
    path = tmp_path / "s.json"
    path.write_text(path.read_text().replace('"dense": ', '"dense": 1'))
    result = searching(made, tmp_path, stage, "--sparsity", 0.3, "--overwrite")
    assert result.code == 2 and "s.json: was edited after it was made, or is damaged" in result.err


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": "composable-pruning sensitivity", "version": 1}'])
def test_a_file_that_holds_no_sensitivities_is_refused(made, tmp_path, stage, content):
    (tmp_path / "s.json").write_text(content)
    result = searching(made, tmp_path, stage, "--sparsity", 0.3)
    assert result.code == 2 and "s.json: " in result.err


def test_mixtures_take_each_blocks_rates_from_one_of_the_others(made, tmp_path, stage):
    from common.configs import make_scheme, read_configurations

    for name in ("a", "b"):
        assert stage("config_generator", "-m", made / "origin.pth", "-n", 3, "--mixed", 4, "--seed", 5, "-o",
                     tmp_path / f"{name}.json").code == 0
    made_of = read_configurations(tmp_path / "a.json")
    assert len(made_of) == 7 and made_of[3] not in made_of[:3] + made_of[4:]
    assert make_scheme(made_of) == make_scheme(made_of[:3])  # no further variants
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
