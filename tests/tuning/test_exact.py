import pytest
import torch

from common.errors import UserError
from common.pruning.variants import prune_block, prune_scheme
from common.t5.model import Model
from common.tuning import exact
from tests.small import Text, scheme_of, seen_by_hooks, small_network, write_bank

SELF = "encoder.block.0.layer.0.SelfAttention"
WI, WO = (f"encoder.block.1.layer.1.DenseReluDense.{part}" for part in ("wi", "wo"))
TEXTS = Text(0), Text(1, pairs=10)


def bank_of(network, folder, *rates):
    return write_bank(folder / "pruned.npy", prune_scheme(Model(network, ""), scheme_of(network, *rates)))


def tune(network, bank, steps=0, texts=TEXTS):
    return {report.variant.key: report for report in exact.tune(network, bank, *texts, "cpu", steps=steps)}


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_it_lowers_every_variants_error_and_keeps_the_masks(tmp_path, kind):
    network = small_network(kind)
    bank = bank_of(network, tmp_path, (0.25, 0.5), (0.5, 0.8), (0.0, 0.5))
    found = tune(network, bank)
    assert found.keys() == bank.entries.keys()
    for key, report in found.items():
        assert report.after < report.before and report.valid_after < report.valid_before * 1.2, key
        before = bank.read(key)
        for name, weight in report.variant.weights.items():
            assert torch.equal(before.masks[name], report.variant.masks[name])
            assert not weight[~report.variant.masks[name]].any()
            assert name.endswith((".o.weight", "wi.weight", "wi_0.weight", "wi_1.weight", "wo.weight")) or torch.equal(
                weight, before.weights[name])


@pytest.mark.parametrize("name", [f"{SELF}.o", WI, WO, "decoder.block.1.layer.1.EncDecAttention.o"])
def test_weights_and_errors_are_those_of_plain_least_squares(tmp_path, name):
    network = small_network()
    block = name.removesuffix(".o")
    rates = (0.5,) if block == name else (0.25, 0.5)
    bank = write_bank(tmp_path / "b.npy", prune_block(Model(network, ""), block, [rates]))
    report, = tune(network, bank).values()
    found, mask = report.variant.weights[f"{name}.weight"].double(), report.variant.masks[f"{name}.weight"]
    (x, y), (check, other) = ([t.double() for t in seen_by_hooks(network, text, [name])[name]] for text in TEXTS)
    for row in range(0, len(found), 7):
        best = torch.linalg.lstsq(x[:, mask[row]], y[:, row, None], driver="gelsd").solution[:, 0]
        left = [float((y[:, row] - x[:, mask[row]] @ w).square().sum()) for w in (found[row, mask[row]], best)]
        assert left[0] == pytest.approx(left[1], rel=2e-3, abs=1e-4)
    pruned = bank.read(report.variant.key).weights[f"{name}.weight"].double()
    for mine, inputs, outputs, w in ((report.before, x, y, pruned), (report.after, x, y, found),
                                     (report.valid_before, check, other, pruned),
                                     (report.valid_after, check, other, found)):
        assert mine == pytest.approx(float((outputs - inputs @ w.T).square().sum() / outputs.square().sum()), rel=1e-3)


def test_variants_solved_one_by_one_are_the_same(tmp_path, monkeypatch):
    network = small_network()
    bank = bank_of(network, tmp_path, (0.25, 0.5), (0.5, 0.8), (0.5, 0.3))
    together = tune(network, bank)
    sizes, real = [], exact.solve_together
    monkeypatch.setattr(exact, "solve_together", lambda *a: (sizes.append(len(a[1])), real(*a))[1])
    monkeypatch.setattr(exact, "SOLVED_AT_ONCE", 48 * 32)
    alone = tune(network, bank)
    assert set(sizes) == {32, 48} and len(sizes) == len(bank.entries)
    for key, report in alone.items():
        assert report.after == pytest.approx(together[key].after, rel=1e-3)
        for name, weight in report.variant.weights.items():
            assert torch.allclose(weight, together[key].variant.weights[name], atol=0.02)


def test_steps_are_for_attentions_with_a_large_error_left(tmp_path, monkeypatch):
    network = small_network()
    bank = bank_of(network, tmp_path, (0.25, 0.0), (0.5, 0.0), (0.0, 0.8))
    solved = tune(network, bank)
    lost = {key: report.after for key, report in solved.items() if "Attention" in key[0] and key[1][0]}
    limit = sorted(lost.values())[len(lost) // 2]
    monkeypatch.setattr(exact, "ATTENTION_ERROR", limit)
    stepped = tune(network, bank, steps=20)
    assert stepped.keys() == solved.keys()
    for key, report in stepped.items():
        changed = any(not torch.equal(report.variant.weights[n], w) for n, w in solved[key].variant.weights.items())
        assert changed == (lost.get(key, 0.0) > limit), key


def test_a_feed_forward_whose_units_are_all_off_keeps_its_masked_weights(tmp_path, capsys):
    network = small_network()
    with torch.no_grad():  # the stream's first number is large, and wi reads it negatively
        network.shared.weight[:, 0] = 20.0
        network.get_parameter(f"{WI}.weight").abs_().neg_()[:, 1:] = 0
        network.encoder.block[1].layer[1].layer_norm.weight[0] = 1.0
    bank = bank_of(network, tmp_path, (0.5, 0.5), (0.5, 0.8))
    found = tune(network, bank, steps=5)
    assert found.keys() == bank.entries.keys()
    assert seen_by_hooks(network, TEXTS[0], [WI])[WI][1].max() < 0
    for key, report in found.items():
        if key[0] == WO:
            assert torch.equal(report.variant.weights[f"{WO}.weight"], bank.read(key).weights[f"{WO}.weight"])
            assert (report.before, report.after, report.valid_before, report.valid_after) == (0.0,) * 4
        else:
            assert report.before > report.after > 0 or key[0] == WI, key
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"{WO}: its output is zero on all the calibration text, so its variants keep their masked weights"]


def test_an_attention_whose_v_is_zero_keeps_its_masked_weights(tmp_path, capsys):
    network = small_network()
    with torch.no_grad():
        network.get_parameter(f"{SELF}.v.weight").zero_()
    bank = bank_of(network, tmp_path, (0.5, 0.5))
    found = tune(network, bank, steps=5)
    assert found.keys() == bank.entries.keys()
    report = found[SELF, (0.5, 0.5)]
    for name, weight in bank.read(report.variant.key).weights.items():
        assert torch.equal(report.variant.weights[name], weight)
    assert report.before == report.after == 0.0
    assert capsys.readouterr().err.count("its output is zero on all the calibration text") == 1


@pytest.mark.parametrize("changes", [{}, {"num_heads": 1}, {"d_ff": 1}])
def test_one_token_of_text_one_head_and_one_unit_are_enough(tmp_path, changes):
    network = small_network(**changes)
    bank = bank_of(network, tmp_path, (0.4, 0.4))
    found = tune(network, bank, steps=3, texts=(Text(pairs=1, longest=1),) * 2)
    assert found.keys() == bank.entries.keys()
    for report in found.values():
        assert 0 <= report.after <= report.before + 1e-9 and report.after == pytest.approx(report.valid_after, rel=1e-3)
        assert all(torch.isfinite(w).all() for w in report.variant.weights.values())


def test_an_activation_that_is_not_finite_is_named(tmp_path):
    network = small_network()
    bank = bank_of(network, tmp_path, (0.0, 0.5))
    with torch.no_grad():
        network.encoder.block[1].layer[1].layer_norm.weight[3] = float("inf")
    with pytest.raises(UserError, match=f"{WI}: its input is not finite"):
        tune(network, bank)


def test_heads_that_were_tuned_already_are_refused(tmp_path):
    """The statistics are those of the original's q, k and v; o fitted to them would not fit tuned ones."""
    network = small_network()
    variant = next(prune_block(Model(network, ""), SELF, [(0.5, 0.5)]))
    variant.weights[f"{SELF}.k.weight"] = variant.weights[f"{SELF}.k.weight"] * 1.01
    with pytest.raises(UserError, match=f"{SELF}: its k was tuned already.*--solver adamw"):
        tune(network, write_bank(tmp_path / "b.npy", [variant]))
