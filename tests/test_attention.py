import copy
import weakref

import pytest
import torch
from torch.func import functional_call

from common import attention, bank, models, reconstruction
from common.files import UserError


def tune(made, text, budget=1 << 30, steps=30, above=0.0, exact=None):
    """Return the network, the reports on attentions that lost heads, and what was logged; fill ``exact`` by key."""
    network, opened, logged = models.load(made / "origin.pth").network, bank.load(made / "pruned.npy"), []
    common = {"budget": budget, "damping": 1e-4, "curve": reconstruction.Curve(), "log": logged.append}
    reports = list(reconstruction.tune_exactly(network, opened, *text, "cpu", **common | {"budget": 1 << 30}))
    if exact is not None:
        exact.update({r.variant.key: copy.deepcopy(r) for r in reports})
    reports = list(attention.tune(network, opened, iter(reports), *text, "cpu", steps=steps, above=above, **common))
    assert {r.variant.key for r in reports} == set(opened.entries)
    return network, [r for r in reports if r.variant.block.endswith("Attention") and r.variant.rates[0]], logged


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
    pruned, exact = bank.load(made / "pruned.npy"), {}
    for report in tune(made, text, exact=exact)[1]:
        assert report.after < 0.98 * exact[report.variant.key].after, report.variant.key
        before = pruned.read(report.variant.key)
        assert report.variant.weights.keys() == before.weights.keys()
        for name, weight in report.variant.weights.items():
            assert torch.equal(before.masks[name], report.variant.masks[name])
            assert not weight[~report.variant.masks[name]].any()


def test_without_steps_o_is_the_exact_solvers(made, text, monkeypatch):
    monkeypatch.setattr(attention, "STEP", 0.0)
    exact = {}
    for report in tune(made, text, steps=2, exact=exact)[1]:
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


def test_what_the_exact_solver_fits_well_enough_takes_no_steps(made, text):
    exact = {}
    tune(made, text, steps=0, exact=exact)
    errors = sorted(r.after for r in exact.values() if r.variant.block.endswith("Attention") and r.variant.rates[0])
    above = errors[len(errors) // 2]
    changed = {}
    for report in tune(made, text, above=above)[1]:
        name = f"{report.variant.block}.q.weight"
        before = exact[report.variant.key]
        changed[before.after > above] = not torch.equal(report.variant.weights[name], before.variant.weights[name])
    assert changed == {True: True, False: False}


def test_less_memory_means_more_passes_and_the_same_weights(made, text):
    _, one, few = tune(made, text, steps=3)
    _, many, passes = tune(made, text, steps=3, budget=10 << 20)
    assert len(few) < len(passes)
    for a, b in zip(one, many, strict=True):
        assert a.variant.key == b.variant.key
        assert all(torch.equal(a.variant.weights[n], b.variant.weights[n]) for n in a.variant.weights)


def test_of_what_is_cached_no_group_meets_the_next(made, text, monkeypatch):
    real, refs, met = attention._cache, [], []

    def watched(network, batches, blocks, device):
        if batches is text[0]:  # a group's first
            met.append(sum(ref() is not None for ref in refs))
        taken = real(network, batches, blocks, device)
        refs.extend(weakref.ref(tensor) for items in taken.values() for item in items for tensor in (item[0], item[4]))
        return taken

    monkeypatch.setattr(attention, "_cache", watched)
    tune(made, text, steps=1, budget=10 << 20)
    assert len(met) > 1 and not any(met)


def test_too_little_memory_is_told_before_the_work(made, text):
    network, opened = models.load(made / "origin.pth").network, bank.load(made / "pruned.npy")
    reports = attention.tune(network, opened, map(pytest.fail, ["the work began"]), *text, "cpu", steps=1, budget=1000,
                             damping=1e-4, curve=reconstruction.Curve())
    with pytest.raises(UserError, match="give --memory-budget at least that"):
        next(reports)


def test_white_inputs_have_unit_covariance_over_valid_tokens_alone(made, text, monkeypatch):
    network = models.load(made / "origin.pth").network.eval()
    network.set_attn_implementation("eager")
    block = "decoder.block.0.layer.1.EncDecAttention"
    batches = [text[1].dataset.examples[:9], text[1].dataset.examples[9:10] * 2]  # the second needs no mask
    monkeypatch.setattr(text[1], "epoch", lambda _: batches)
    items = attention._cache(network, text[1], [block], "cpu")[block]
    seen = torch.cat([attention._visible(*item[1:3]).flatten() for item in items])
    valid = torch.cat([batch["attention_mask"].bool().flatten() for batch in text[1].fixed()])
    assert torch.equal(seen, valid) and not valid.all() and len(items[1][2]) == 1
    x = torch.cat([item[1].flatten(0, 1) for item in items])[seen]
    white = x @ attention._whitener([x])
    values = torch.linalg.eigvalsh(white.T @ white / len(x))
    assert float(values.max() / values[values > values.max() / 2].min()) < 1.05


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
