import pytest
import torch

from common.pruning.variants import prune_block, prune_scheme
from common.t5.loss import evaluate
from common.t5.model import Model
from common.tuning.gradient import BlockReconstruction
from tests.small import Text, scheme_of, seen_by_hooks, small_network, write_bank

SELF, CROSS = "encoder.block.0.layer.0.SelfAttention", "decoder.block.1.layer.1.EncDecAttention"
WI, WO = (f"encoder.block.1.layer.1.DenseReluDense.{part}" for part in ("wi", "wo"))


@pytest.fixture
def text():
    """Sources and targets of very different lengths, from batch to batch."""
    text = Text(pairs=12, batch=4)
    text.pairs[:4] = [(s[:1], t) for s, t in text.pairs[:4]]
    text.pairs[4:8] = [(s, t[:1]) for s, t in text.pairs[4:8]]
    return text


def objective_of(network, folder, text, *rates):
    bank = write_bank(folder / "b.npy", prune_scheme(Model(network, ""), scheme_of(network, *rates)))
    return BlockReconstruction(network, bank, text, "cpu"), bank


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_errors_of_linear_blocks_are_those_of_single_sentences(tmp_path, text, kind):
    network = small_network(kind)
    objective, _ = objective_of(network, tmp_path, text, (0.0, 0.8))
    real = seen_by_hooks(network, text, [v.block + ".o" * v.block.endswith("Attention") for v in objective.variants])
    for variant, error in zip(objective.variants, objective.errors(text, "cpu"), strict=True):
        name = variant.block + ".o" * variant.block.endswith("Attention")  # without removed heads, o alone
        x, y = real[name]
        expected = (x @ variant.weights[f"{name}.weight"].T - y).square().sum() / y.square().sum()
        assert error == pytest.approx(float(expected), rel=1e-3), name


@pytest.mark.parametrize("block", [SELF, CROSS])
def test_errors_of_attentions_are_of_their_output_without_the_removed_heads(tmp_path, text, block):
    network = small_network()
    variant = next(prune_block(Model(network, ""), block, [(0.5, 0.0)]))
    objective = BlockReconstruction(network, write_bank(tmp_path / "b.npy", [variant]), text, "cpu")
    x, y = seen_by_hooks(network, text, [f"{block}.o"])[f"{block}.o"]
    expected = (x @ variant.weights[f"{block}.o.weight"].T - y).square().sum() / y.square().sum()
    assert objective.errors(text, "cpu") == [pytest.approx(float(expected), rel=1e-3)]


def test_the_loss_over_a_text_is_the_mean_of_the_errors(tmp_path, text):
    """Blocks of the encoder count source tokens, though the loop counts target tokens."""
    objective, _ = objective_of(small_network(), tmp_path, text, (0.5, 0.5))
    errors = objective.errors(text, "cpu")
    assert evaluate(objective, text, "cpu") == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_descent_lowers_the_errors_and_keeps_masks_and_original(tmp_path):
    network, text = small_network(), Text(pairs=24)
    objective, bank = objective_of(network, tmp_path, text, (0.5, 0.8))
    before, optimizer = objective.errors(text, "cpu"), torch.optim.AdamW(objective.weights, lr=3e-3)
    for _ in range(3):
        for batch in text.fixed():
            loss, tokens = objective.train()(batch)
            (loss / tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    after = objective.errors(text, "cpu")
    assert all(a < b for a, b in zip(after, before, strict=True))
    for variant in objective.tuned():
        old = bank.read(variant.key)
        for name, weight in variant.weights.items():
            assert torch.equal(variant.masks[name], old.masks[name]) and not weight[~old.masks[name]].any()
            assert not torch.equal(weight, old.weights[name])
    for a, b in zip(network.parameters(), small_network().parameters(), strict=True):
        assert torch.equal(a, b) and a.grad is None


def test_all_weights_of_an_attention_that_lost_heads_get_gradients_inside_their_masks(tmp_path):
    network, text = small_network(), Text()
    variant = next(prune_block(Model(network, ""), SELF, [(0.5, 0.5)]))
    objective = BlockReconstruction(network, write_bank(tmp_path / "b.npy", [variant]), text, "cpu")
    objective(next(text.fixed()))[0].backward()
    for name, (slot, mask) in objective.slots[0].items():
        gradient = objective.weights[slot].grad
        assert gradient[mask].abs().min() > 0 or name.endswith("o.weight") and gradient[mask].any(), name
        assert not gradient[~mask].any(), name


def test_a_block_without_any_output_has_no_error_and_leaves_the_others_alone(tmp_path, text):
    network = small_network()
    with torch.no_grad():
        network.get_parameter(f"{WI}.weight").zero_()
        network.get_parameter(f"{SELF}.v.weight").zero_()
    objective, _ = objective_of(network, tmp_path, text, (0.5, 0.5))
    errors = dict(zip([v.block for v in objective.variants], objective.errors(text, "cpu"), strict=True))
    assert errors.pop(WI) == errors.pop(WO) == errors.pop(SELF) == 0.0
    assert all(0 < error < 1 for error in errors.values())
