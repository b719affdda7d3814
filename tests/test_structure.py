"""Hidden units and skipped sub-layers, through all stages."""

import itertools
import json

import pytest
import torch

from common.pruning import bank, composition, criteria, scheme, search, variants
from common.pruning.configurations import read_configurations, required_variants
from common.pruning.search import Sensitivity
from common.t5 import model
from common.t5.loss import TranslationLoss, evaluate
from common.t5.shrink import used
from common.tuning import exact
from tests.small import load_stage, save_folder, write_corpus

WI, WO = "encoder.block.0.layer.1.DenseReluDense", "decoder.block.1.layer.2.DenseReluDense"


def run(name, *arguments):
    assert load_stage(name).main([str(a) for a in arguments]) == 0, name


@pytest.fixture(scope="module", params=["relu", "gated-gelu"])
def units(request, tmp_path_factory):
    """Banks by obs, pruned and tuned, of a plain and of a gated model whose feed-forwards lose units."""
    folder = tmp_path_factory.mktemp("units")
    write_corpus(folder / "text")
    save_folder(folder / "hub", feed_forward_proj=request.param)
    run("download_model", "-m", folder / "hub", "-o", folder / "origin.pth")
    parts = ("wi",) if request.param == "relu" else ("wi_0", "wi_1")
    configurations = [
        {WI: 0.5, WO: 0.25},
        {WI: 0.5, f"{WI}.wo": 0.6, WO: 0.75, **{f"{WO}.{part}": 0.9 for part in parts}},
        {WI: 1, "decoder.block.0.layer.0.SelfAttention": 1, "decoder.block.0.layer.0.SelfAttention.o": 0.3,
         f"{WO}.wo": 0.5}]
    (folder / "conf.json").write_text(json.dumps(configurations))
    run("prune_scheme_generator", "-i", folder / "conf.json", "-o", folder / "scheme.json")
    for criterion in ("l1", "obs"):
        run("prune", "-m", folder / "origin.pth", "-c", folder / "scheme.json", "-o", folder / f"{criterion}.npy",
            "--criterion", criterion, "--data", folder / "text")
    run("block-level_finetuning", "-m", folder / "origin.pth", "-p", folder / "obs.npy", "-o", folder / "tuned.npy",
        "--stats", folder / "b.csv", "--data", folder / "text")
    return folder


def test_with_units_removed_the_whole_feed_forward_is_one_block_and_without_its_modules_are_their_own():
    assert required_variants({WI: 0.5, f"{WI}.wi": 0.3}) == {WI: (0.5, 0.3, 0.0, 0.0, 0.0)}
    assert required_variants({WI: 0.0, f"{WI}.wi": 0.3, f"{WI}.wo": 0.2}) == {f"{WI}.wi": (0.3,), f"{WI}.wo": (0.2,)}


def test_of_a_skipped_sub_layer_no_other_rate_counts():
    attention = "encoder.block.0.layer.0.SelfAttention"
    assert required_variants({attention: 1, f"{attention}.o": 0.5}) == {attention: (1.0, 0.0)}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_each_unit_that_obs_removes_costs_least_once_wo_is_fitted_again(number):
    g = torch.Generator().manual_seed(number)
    h, wo = torch.randn(60, 5, generator=g).double(), torch.randn(3, 5, generator=g).double()
    h[:, 4] = h[:, 0] + 0.05 * h[:, 4]  # nearly a copy: the first to go, or what it copies
    order = criteria.unit_order(wo, h.T @ h / 60, torch.ones(5, dtype=torch.bool), number, damping=1e-9)

    def cost(kept):
        x = h[:, kept]
        return float((h @ wo.T - x @ torch.linalg.lstsq(x, h @ wo.T).solution).square().sum())

    left = list(range(5))
    for unit in order:
        assert unit == min(left, key=lambda j: cost([k for k in left if k != j]))
        left.remove(unit)


def test_by_l1_the_units_of_least_joint_norm_go():
    wi, wo = torch.tensor([[1.0, 1.0], [0.1, 0.1], [2.0, 0.0]]), torch.tensor([[1.0, 9.0, 0.5]])
    scores = criteria.unit_scores([wi, wo.T])
    assert scores.tolist() == pytest.approx([3.0, 9.2, 2.5])
    there = torch.ones(3, dtype=torch.bool)
    assert criteria.structure_mask(scores, 1 / 3, there, "units").tolist() == [True, True, False]
    assert criteria.structure_mask(scores, 1.0, there, "units").tolist() == [False, False, False]


@pytest.mark.parametrize("name", ["l1.npy", "obs.npy", "tuned.npy"])
def test_a_unit_goes_with_its_rows_and_its_column(units, name):
    opened = bank.load(units / name)
    for key in opened.entries:
        if not key[0].endswith("DenseReluDense"):
            continue
        masks = opened.read(key).masks
        rows = [m.any(dim=1) for n, m in masks.items() if ".wi" in n]
        column = next(m for n, m in masks.items() if n.endswith("wo.weight")).any(dim=0)
        # Single weights may take all that is left of a unit; what is removed as a unit is gone everywhere.
        kept = rows[0].clone() if not any(key[1][1:]) else None
        if kept is not None:
            assert int(kept.sum()) == 48 - criteria.removed_count(key[1][0], 48)
            assert all(torch.equal(r, kept) for r in rows) and torch.equal(column, kept)
        assert int(column.sum()) <= 48 - criteria.removed_count(key[1][0], 48)


def test_tuning_lowers_each_feed_forwards_error_which_is_that_of_its_output(units):
    origin, text = model.load(units / "origin.pth"), None
    from common.text.batches import calibration_text, validation_text
    from common.text.corpus import Corpus

    corpus = Corpus(units / "text", "en", "de")
    text, valid = calibration_text(corpus, origin), validation_text(corpus, origin)
    pruned, seen = bank.load(units / "obs.npy"), {}
    for batch in valid.fixed():
        handles = [origin.network.get_submodule(block).register_forward_hook(
            lambda m, i, o, b=block, v=side: seen.setdefault(b, []).append((i[0][v], o[v])))
            for block, side in ((WI, batch["attention_mask"].bool()), (WO, batch["labels"] >= 0))]
        TranslationLoss(origin.network)(batch)
        for handle in handles:
            handle.remove()
    for report in exact.tune(origin.network, pruned, text, valid, "cpu"):
        block, rates = report.variant.key
        if block in seen and block.endswith("DenseReluDense") and rates[0] < 1:
            assert report.after < report.before and report.valid_after < report.valid_before, report.variant.key
            x, y = (torch.cat(part).detach() for part in zip(*seen[block], strict=True))
            weights = {n.removeprefix(f"{block}."): w for n, w in report.variant.weights.items()}
            mine = torch.func.functional_call(origin.network.get_submodule(block), weights, (x,))
            expected = float((mine - y).square().sum() / y.square().sum())
            assert report.valid_after == pytest.approx(expected, rel=1e-3)


def test_a_skipped_sub_layer_passes_the_stream_by(units):
    composed = model.load(units / "origin.pth")
    composition.compose(composed, bank.load(units / "tuned.npy"), read_configurations(units / "conf.json")[2])
    plain = model.load(units / "origin.pth").network
    attention = "decoder.block.0.layer.0.SelfAttention"
    for name in (f"{attention}.o", f"{WI}.wo"):
        plain.get_submodule(name).weight.data.zero_()
    plain.get_submodule(f"{WO}.wo").weight.data.copy_(composed.network.get_submodule(f"{WO}.wo").weight)
    ids, target = torch.arange(3, 9)[None], torch.arange(3, 8)[None]
    with torch.no_grad():
        logits = [n(input_ids=ids, decoder_input_ids=target) for n in (plain.eval(), composed.network.eval())]
    assert torch.allclose(*logits, atol=1e-6)
    assert not composed.masks[f"{attention}.q.weight"].any()


def test_composed_models_are_recalibrated_and_better_than_masked(units, tmp_path):
    from common.text.batches import validation_text
    from common.text.corpus import Corpus

    losses = []
    for name in ("obs.npy", "tuned.npy"):
        run("compose_model", "-m", units / "origin.pth", "-p", units / name, "-c", units / "conf.json", "-n", 1, "-o",
            tmp_path / f"{name}.pth", "--data", units / "text")
        loaded = model.load(tmp_path / f"{name}.pth")
        original = model.load(units / "origin.pth").network
        states = []
        for batch in validation_text(Corpus(units / "text", "en", "de"), loaded).fixed():
            with torch.no_grad():
                a, b = (n(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                          decoder_input_ids=batch["labels"].clamp_min(0)) for n in (original, loaded.network))
            states.append(float((a - b)[batch["labels"] >= 0].square().mean()))
        losses.append(sum(states))
    assert losses[1] < losses[0]


def test_units_and_linear_modules_of_one_feed_forward_are_never_chosen_together(units):
    opened, origin = bank.load(units / "tuned.npy"), model.load(units / "origin.pth")
    losses = {key: 1.0 + 0.01 * i for i, key in enumerate(opened.entries)}
    removed, present, _ = search.removed_weights(origin, opened)
    front = search.front(Sensitivity(1.0, losses), removed, present)
    options = {}
    for key in opened.entries:
        options.setdefault(key[0], [None]).append(key)
    best = {}
    for keys in itertools.product(*options.values()):
        chosen = [key for key in keys if key]
        blocks = {key[0] for key in chosen}
        if any(b.rpartition(".")[0] in blocks for b in blocks if not b.endswith("Attention")):
            continue
        size = present - sum(removed[key] for key in chosen)
        best[size] = min(best.get(size, 9.0), 1.0 + sum(losses[key] - 1.0 for key in chosen))
    for i, (size, loss) in enumerate(zip(front.sizes, front.losses, strict=True)):
        assert loss == pytest.approx(min(v for s, v in best.items() if s <= size))
        opened.check_serves(front.configuration(i))


def test_what_an_earlier_round_removed_stays_removed_and_rates_count_what_is_there(units):
    origin = model.load(units / "origin.pth")
    composition.compose(origin, bank.load(units / "l1.npy"), read_configurations(units / "conf.json")[0])
    assert int(variants.units_present(origin, WI).sum()) == 24
    again = next(variants.prune_block(origin, WI, [(0.5, 0.0, 0.0, 0.0, 0.0)]))
    before, after = origin.masks[f"{WI}.wo.weight"].any(dim=0), again.masks[f"{WI}.wo.weight"].any(dim=0)
    assert int(after.sum()) == 12 and not (after & ~before).any()


@pytest.mark.parametrize(("rates", "message"), [
    (["--linear", "1"], "'1' is not a pruning rate in [0, 1)"),
    (["--feed-forward", "0.995"], "removes all 48 units"),
    (["--attention", "1.5"], "'1.5' is not a pruning rate in [0, 1]")])
def test_a_rate_that_means_nothing_is_refused(made, tmp_path, stage, rates, message):
    result = stage("config_generator", "-m", made / "origin.pth", "-o", tmp_path / "c.json", *rates)
    assert result.code == 2 and message in result.err


def test_gradient_mode_and_joint_tuning_know_units(units, tmp_path):
    for solver, source in (("adamw", "obs.npy"), ("joint", "tuned.npy")):
        tuned = tmp_path / f"{solver}.npy"
        run("block-level_finetuning", "-m", units / "origin.pth", "-p", units / source, "-o", tuned, "--stats",
            tmp_path / f"{solver}.csv", "--solver", solver, "--epochs", 1, "--data", units / "text")
        for key in (opened := bank.load(tuned)).entries:
            for name, weight in (variant := opened.read(key)).weights.items():
                assert not weight[~variant.masks[name]].any()


def test_the_loss_of_a_model_with_a_quarter_of_one_layers_units_gone_is_finite(units):
    composed = model.load(units / "origin.pth")
    composition.compose(composed, bank.load(units / "tuned.npy"), {WO: 0.25})
    from common.text.batches import validation_text
    from common.text.corpus import Corpus

    valid = validation_text(Corpus(units / "text", "en", "de"), composed)
    assert evaluate(TranslationLoss(composed.network), valid, "cpu") < 20


def test_a_model_with_skipped_sub_layers_is_pruned_again(units, tmp_path, monkeypatch):
    """Nothing is left of them to remove, at any rate; the others lose their share of what is left."""
    monkeypatch.chdir(tmp_path)
    origin = model.load(units / "origin.pth")
    attention, feed_forward = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    first = {attention: 1.0, feed_forward: 1.0}
    for block, rates in scheme.make_scheme([first]).items():
        for variant in variants.prune_block(origin, block, rates):
            composition.install(origin, variant)
    model.save(tmp_path / "skipped.pth", origin)
    run("config_generator", "-m", "skipped.pth", "-o", "conf.json", "--attention", 0.5, "--feed-forward", 0.5,
        "--linear", 0.2)
    run("prune_scheme_generator", "-i", "conf.json", "-o", "scheme.json")
    for criterion in ("l1", "obs"):
        run("prune", "-m", "skipped.pth", "-c", "scheme.json", "-o", "bank.npy", "--criterion", criterion,
            "--data", units / "text", "--overwrite")
        run("compose_model", "-m", "skipped.pth", "-p", "bank.npy", "-c", "conf.json", "-n", 0, "-o", "again.pth",
            "--overwrite")
        again = model.load(tmp_path / "again.pth")
        for name in (attention, feed_forward):
            assert not used(again.network)[name].any()
        assert int(used(again.network)["decoder.block.0.layer.0.SelfAttention"].sum()) == 2
