import pytest
import torch
from torch.func import functional_call

from common.pruning.bank import Variant
from common.pruning.variants import prune_block
from common.t5.loss import shift_right
from common.t5.model import Model
from common.tuning import attention_steps, exact
from tests.small import Text, small_network, write_bank

BLOCKS = ("encoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.0.SelfAttention",
          "decoder.block.1.layer.1.EncDecAttention")
RATES = [(0.5, 0.5), (0.5, 0.0), (0.25, 0.5)]  # the first two keep the same heads
TEXTS = Text(0), Text(1, pairs=10)


@pytest.fixture
def network():
    return small_network(seed=1)  # with 0 one variant's steps are taken back


@pytest.fixture
def bank(network, tmp_path):
    model = Model(network, "")
    return write_bank(tmp_path / "b.npy", [v for block in BLOCKS for v in prune_block(model, block, RATES)])


def tune(network, bank, steps, monkeypatch):
    monkeypatch.setattr(exact, "ATTENTION_ERROR", 0.0)
    return {r.variant.key: r for r in exact.tune(network, bank, *TEXTS, "cpu", steps=steps)}


@torch.no_grad()
def plain_error(network, text, variant: Variant) -> float:
    """Return a variant's relative error: the module itself, one sentence at a time, without padding."""
    module, sums = network.get_submodule(variant.block), torch.zeros(2, dtype=torch.float64)
    weights = {name.removeprefix(f"{variant.block}."): w for name, w in variant.weights.items()}

    def hook(_, args, kwargs, output):
        handle.remove()
        mine = functional_call(module, weights, args, kwargs)
        sums.add_(torch.stack([(mine - output).double().square().sum(), output.double().square().sum()]))

    for source, target in text.pairs:
        handle = module.register_forward_hook(hook, with_kwargs=True)
        network(source[None], shift_right(target[None], network.config))
    return float(sums[0] / sums[1])


def test_the_errors_are_those_of_the_module_itself_with_the_new_weights(network, bank, monkeypatch):
    found = tune(network, bank, 20, monkeypatch)
    for key in ((block, RATES[0]) for block in BLOCKS):
        report, before = found[key], bank.read(key)
        for text, old, new in zip(TEXTS, (report.before, report.valid_before), (report.after, report.valid_after),
                                  strict=True):
            assert new == pytest.approx(plain_error(network, text, report.variant), rel=1e-3), key
            assert old == pytest.approx(plain_error(network, text, before), rel=1e-3), key


def test_steps_lower_the_errors_on_both_texts_or_are_taken_back_and_keep_the_masks(network, bank, monkeypatch):
    solved, found = tune(network, bank, 0, monkeypatch), tune(network, bank, 30, monkeypatch)
    better = [key for key, r in found.items() if r.after < 0.98 * solved[key].after]
    assert len(better) >= len(found) / 2
    for key, report in found.items():
        if key in better:
            assert report.valid_after < solved[key].valid_after, key
        else:
            assert (report.after, report.valid_after) == (solved[key].after, solved[key].valid_after), key
        before = bank.read(key)
        assert report.variant.weights.keys() == before.weights.keys()
        for name, weight in report.variant.weights.items():
            assert torch.equal(before.masks[name], report.variant.masks[name])
            assert not weight[~report.variant.masks[name]].any()


def test_variants_that_keep_the_same_heads_share_q_k_and_v(network, bank, monkeypatch):
    found = tune(network, bank, 5, monkeypatch)
    for block in BLOCKS:
        a, b = (found[block, rates].variant.weights for rates in RATES[:2])
        assert all(torch.equal(a[f"{block}.{part}.weight"], b[f"{block}.{part}.weight"]) for part in "qkv")
        assert not torch.equal(a[f"{block}.o.weight"], b[f"{block}.o.weight"])


def test_steps_of_no_length_leave_the_exact_solvers_o(network, bank, monkeypatch):
    monkeypatch.setattr(attention_steps, "STEP", 0.0)
    solved = tune(network, bank, 0, monkeypatch)
    for key, report in tune(network, bank, 2, monkeypatch).items():
        assert report.after == pytest.approx(solved[key].after, rel=1e-3)
        assert report.valid_after == pytest.approx(solved[key].valid_after, rel=1e-2)
        for part in "qkv":
            name = f"{key[0]}.{part}.weight"
            assert torch.equal(report.variant.weights[name], solved[key].variant.weights[name])


def test_steps_that_only_do_harm_are_taken_back(network, bank, monkeypatch):
    monkeypatch.setattr(attention_steps, "STEP", 1e4)
    for key, report in tune(network, bank, 2, monkeypatch).items():
        assert report.after < report.before
        assert report.valid_after == pytest.approx(plain_error(network, TEXTS[1], report.variant), rel=1e-2)
        assert torch.equal(report.variant.weights[f"{key[0]}.q.weight"], bank.read(key).weights[f"{key[0]}.q.weight"])


def test_no_step_reads_padding(network, bank, monkeypatch):
    """What stands at padded places of a batch changes nothing."""
    one = tune(network, bank, 5, monkeypatch)
    real = attention_steps._item

    def soiled(sublayer, stream):
        item = real(sublayer, stream)
        states = torch.where(item.valid[..., None], item.states, 5.0)
        same = item.source is item.states
        source = states if same else torch.where(item.source_valid[..., None], item.source, 5.0)
        return item._replace(states=states, source=source)

    monkeypatch.setattr(attention_steps, "_item", soiled)
    for key, report in tune(network, bank, 5, monkeypatch).items():
        assert report.after == pytest.approx(one[key].after, rel=1e-3)


def test_updates_are_nearly_orthogonal():
    values = torch.linalg.svdvals(attention_steps._orthogonal(torch.randn(5, 8, 32, generator=torch.Generator())))
    assert 0.6 < float(values.min()) and float(values.max()) < 1.3


def test_o_is_solved_from_each_variants_own_heads_alone(network, bank, monkeypatch):
    """Statistics between heads of different variants would take memory that grows with their number squared."""
    sizes, real = [], attention_steps.solve
    monkeypatch.setattr(attention_steps, "solve", lambda gram, *more: (sizes.append(len(gram)), real(gram, *more))[1])
    tune(network, bank, 1, monkeypatch)
    assert sizes == [16, 16, 24] * 2 * len(BLOCKS)
