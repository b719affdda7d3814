import pytest
import torch
from torch.func import functional_call

from common import attention, bank, models, reconstruction
from common.files import UserError


def tune(made, text, budget=1 << 30, steps=30, name="pruned.npy"):
    network, opened, logged = models.load(made / "origin.pth").network, bank.load(made / name), []
    reports = list(attention.tune(network, opened, attention.lost_heads(opened), *text, "cpu", steps=steps,
                                  budget=budget, damping=1e-4, curve=reconstruction.Curve(), log=logged.append))
    return network, reports, logged


@torch.no_grad()
def plain_error(network, batches, variant) -> float:
    """Return a variant's relative error: the module itself, one sentence at a time, without padding."""
    module, sums = network.get_submodule(variant.block), torch.zeros(2, dtype=torch.float64)
    weights = {name.removeprefix(f"{variant.block}."): w for name, w in variant.weights.items()}

    def hook(_, args, kwargs, output):
        handle.remove()
        mine = functional_call(module, weights, args, kwargs)[0]
        sums.add_(torch.stack([(mine - output[0]).double().square().sum(), output[0].double().square().sum()]))

    for example in batches.dataset.examples:
        handle = module.register_forward_hook(hook, with_kwargs=True)
        network(input_ids=torch.tensor([example.source]), use_cache=False,
                decoder_input_ids=torch.tensor([[0, *example.target[:-1]]]))
    return float(sums[0] / sums[1])


def test_the_errors_told_are_those_of_the_module_itself_with_the_new_weights(made, text):
    network, reports, _ = tune(made, text)
    pruned = bank.load(made / "pruned.npy")
    assert len(reports) == 12
    for report in (r for r in reports if r.variant.rates[0] == 0.5):
        assert report.valid_after == pytest.approx(plain_error(network, text[1], report.variant), rel=1e-3)
        before = pruned.read(report.variant.key)
        assert report.valid_before == pytest.approx(plain_error(network, text[1], before), rel=1e-3)


def test_steps_lower_the_error_below_that_of_an_exact_o_and_keep_the_masks(made, text):
    model, pruned = models.load(made / "origin.pth"), bank.load(made / "pruned.npy")
    exact = {r.variant.key: r for r in reconstruction.tune_exactly(
        model.network, pruned, *text, "cpu", budget=1 << 30, damping=1e-4, curve=reconstruction.Curve(),
        log=lambda t: None)}
    for report in tune(made, text)[1]:
        assert report.after < 0.98 * exact[report.variant.key].after, report.variant.key
        before = pruned.read(report.variant.key)
        assert report.variant.weights.keys() == before.weights.keys()
        for name, weight in report.variant.weights.items():
            assert torch.equal(before.masks[name], report.variant.masks[name])
            assert not weight[~report.variant.masks[name]].any()


def test_without_steps_o_is_the_exact_solvers(made, text, monkeypatch):
    monkeypatch.setattr(attention, "STEP", 0.0)
    model, pruned = models.load(made / "origin.pth"), bank.load(made / "pruned.npy")
    exact = {r.variant.key: r for r in reconstruction.tune_exactly(
        model.network, pruned, *text, "cpu", budget=1 << 30, damping=1e-4, curve=reconstruction.Curve(),
        log=lambda t: None)}
    for report in tune(made, text, steps=2)[1]:
        other = exact[report.variant.key]
        assert report.after == pytest.approx(other.after, rel=1e-3)
        assert report.valid_after == pytest.approx(other.valid_after, rel=1e-2)
        name = f"{report.variant.block}.q.weight"
        assert torch.equal(report.variant.weights[name], other.variant.weights[name])


def test_steps_that_only_do_harm_are_taken_back(made, text, monkeypatch):
    monkeypatch.setattr(attention, "STEP", 1e4)
    for report in tune(made, text, steps=2)[1]:
        assert report.after < report.before
        name = f"{report.variant.block}.q.weight"
        original = bank.load(made / "pruned.npy").read(report.variant.key)
        assert torch.equal(report.variant.weights[name], original.weights[name])


def test_less_memory_means_more_passes_and_the_same_weights(made, text):
    _, one, few = tune(made, text, steps=3)
    _, many, passes = tune(made, text, steps=3, budget=10 << 20)
    assert len(few) == 1 < len(passes)
    for a, b in zip(one, many, strict=True):
        assert a.variant.key == b.variant.key
        assert all(torch.equal(a.variant.weights[n], b.variant.weights[n]) for n in a.variant.weights)


def test_too_little_memory_and_a_tuned_bank_are_told_before_the_work(made, text):
    with pytest.raises(UserError, match="give --memory-budget at least that"):
        tune(made, text, budget=1000)


def test_updates_are_nearly_orthogonal():
    values = torch.linalg.svdvals(attention._orthogonal(torch.randn(5, 8, 32, generator=torch.Generator())))
    assert 0.6 < float(values.min()) and float(values.max()) < 1.3


def test_the_stage_tunes_every_variant_once_and_refuses_what_it_tuned(work, stage):
    data = ("--data-dir", work / "text", "--stats", work / "steps.csv")
    done = stage("block-level_finetuning", "-m", work / "origin.pth", "-p", work / "pruned.npy", "-o",
                 work / "steps.npy", "--attention-steps", 5, *data)
    assert done.code == 0, done.err
    assert set(bank.load(work / "steps.npy").entries) == set(bank.load(work / "pruned.npy").entries)
    again = stage("block-level_finetuning", "-m", work / "origin.pth", "-p", work / "steps.npy", "-o",
                  work / "again.npy", "--attention-steps", 5, *data, "--overwrite")
    assert again.code == 2 and "was tuned already" in again.err
