import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from common import masking
from common.files import UserError

ALL = torch.ones(20, dtype=torch.bool)  # no input is missing


@pytest.mark.parametrize(("rate", "count", "removed"), [
    (0.0, 10, 0), (0.5, 10, 5), (0.25, 10, 3), (0.5, 5, 3), (0.145, 1000, 145), (0.35, 10, 4), (0.99, 10, 10),
    (0.1, 4, 0), (0.125, 4, 1),
])
def test_removed_count_rounds_half_up_in_decimal(rate, count, removed):
    assert masking.removed_count(rate, count) == removed


def test_magnitude_mask_by_hand():
    weight = torch.tensor([[3.0, -1.0], [0.5, -4.0]])
    assert masking.magnitude_mask(weight, 0.5).tolist() == [[True, False], [False, True]]


def test_ties_fall_to_the_first_entries():
    assert masking.magnitude_mask(torch.ones(1, 4), 0.5).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.8, 0.95])
def test_magnitude_mask_equals_torch_l1_unstructured(rate):
    torch.manual_seed(1)
    linear = nn.Linear(20, 30, bias=False)
    mine = masking.magnitude_mask(linear.weight.detach(), rate)
    prune.l1_unstructured(linear, "weight", amount=rate)
    assert torch.equal(mine, linear.weight_mask.bool())


def test_head_scores_add_q_k_and_v_rows_by_hand():
    q = torch.tensor([[1.0, -1.0], [0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    k, v = torch.zeros(4, 2), torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 0.0], [0.0, -1.0]])
    assert masking.head_scores(q, k, v, heads=2).tolist() == [4.0, 7.0]


def test_head_mask_removes_the_lowest_scores():
    assert masking.head_mask(torch.tensor([4.0, 7.0, 1.0, 9.0]), 0.5).tolist() == [False, True, False, True]


def test_a_rate_that_removes_all_heads_is_refused():
    with pytest.raises(UserError, match=r"pruning rate 0\.9 removes all 4 heads; .* below 0\.875"):
        masking.head_mask(torch.arange(4.0), 0.9)


def test_attention_masks_by_hand():
    masks = masking.attention_masks(torch.tensor([True, False]), torch.zeros(4, 3),
                                    torch.tensor([[True, False, True, True]]))
    assert masks["q"].tolist() == masks["k"].tolist() == masks["v"].tolist() == [[True] * 3] * 2 + [[False] * 3] * 2
    assert masks["o"].tolist() == [[True, False, False, False]]


def masked_layer(mask):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 6, bias=False))
    with torch.no_grad():
        layer[0].weight[~mask] = 0
    masking.enforce(layer, {"0.weight": mask})
    return layer


def test_masked_weights_survive_optimizer_weight_decay_and_clipping():
    mask = torch.rand(6, 6, generator=torch.Generator().manual_seed(3)) > 0.5
    layer = masked_layer(mask)
    before = layer[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(5):
        layer(torch.randn(8, 6)).square().sum().backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    masking.release(layer)
    after = layer[0].weight.detach()
    assert torch.equal(after[~mask], torch.zeros_like(after[~mask])) and (after != before)[mask].all()


def test_release_leaves_a_plain_parameter():
    layer = masked_layer(torch.ones(6, 6, dtype=torch.bool))
    masking.release(layer)
    assert list(layer.state_dict()) == ["0.weight"] and isinstance(layer[0].weight, nn.Parameter)


def test_sparsity_counts_a_shared_tensor_once():
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    assert masking.sparsity(model) == (4, 2)


def test_wanda_weighs_magnitude_with_the_inputs_root_mean_square():
    weight = torch.tensor([[3.0, 1.0], [2.0, -4.0]])
    gram = torch.diag(torch.tensor([1.0, 100.0])).double()  # scores 3, 10; 2, 40
    both = torch.tensor([True, True])
    assert masking.wanda_mask(weight, 0.5, gram, both).tolist() == [[False, True], [False, True]]


def test_weights_of_removed_heads_are_the_first_that_the_out_projections_rate_removes():
    weight = torch.tensor([[1.0, 3.0, 8.0, 9.0], [2.0, 4.0, 8.0, 9.0]])
    gram, there = torch.eye(4).double(), torch.tensor([True, True, False, False])
    for rate, kept in ((0.0, [[1, 1], [1, 1]]), (0.25, [[1, 1], [1, 1]]), (0.625, [[0, 1], [1, 1]]),
                       (0.75, [[0, 1], [0, 1]])):
        expected = [[bool(k) for k in row] + [False] * 2 for row in kept]
        assert masking.wanda_mask(weight, rate, gram, there).tolist() == expected
        assert masking.obs_masks(weight, [rate], gram, there)[0].tolist() == expected


def test_obs_refits_the_remaining_heads_before_it_chooses():
    """The second input is the first one's double: alone, the first takes over what the second did."""
    x, _, _ = obs_example(1, 3)
    x = torch.stack([x[:, 0], 2 * x[:, 0] + 1e-3 * x[:, 2], x[:, 1]], dim=1)
    weight, there = torch.tensor([[0.1, 5.0, 2.0]]).double(), torch.tensor([True, False, True])
    mask = masking.obs_masks(weight, [2 / 3], x.T @ x / 100, there, damping=1e-9)[0]
    assert mask.tolist() == [[True, False, False]]


def obs_example(rows, inputs):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, inputs, generator=g, dtype=torch.float64) @ torch.randn(
        inputs, inputs, generator=g, dtype=torch.float64)
    return x, torch.randn(rows, inputs, generator=g, dtype=torch.float64), x.T @ x / 100


def test_obs_equals_the_error_of_removing_each_weight_alone():
    x, weight, gram = obs_example(2, 4)
    errors = torch.empty(2, 4)
    for i in range(2):
        for j in range(4):
            kept = [c for c in range(4) if c != j]
            y = x @ weight[i]
            fit = torch.linalg.lstsq(x[:, kept], y[:, None]).solution[:, 0]
            errors[i, j] = (y - x[:, kept] @ fit).square().mean()
    expected = masking.smallest_removed(errors, 2)  # what the first step leaves
    assert torch.equal(masking.obs_masks(weight, [0.25], gram, ALL[:4], damping=1e-12)[0], expected)


def test_obs_refits_between_its_steps():
    x, weight, gram = obs_example(3, 10)
    inverse = torch.linalg.inv(gram).diagonal()
    mask, fitted = torch.ones(3, 10, dtype=torch.bool), weight.clone()
    for kept in (25, 21, 17, 15):  # 30 × 0.85, and so on, then half
        mask = masking.smallest_removed(torch.where(mask, fitted.square() / inverse, -1.0), 30 - kept)
        for i in range(3):
            fitted[i] = 0
            fitted[i, mask[i]] = torch.linalg.lstsq(x[:, mask[i]], x @ weight[i, :, None]).solution[:, 0]
    assert torch.equal(masking.obs_masks(weight, [0.5], gram, ALL[:10], damping=1e-12)[0], mask)


def test_an_obs_mask_does_not_depend_on_the_other_rates():
    _, weight, gram = obs_example(6, 20)
    together = masking.obs_masks(weight, [0.8, 0.1, 0.5, 0.99], gram, ALL)
    for rate, mask in zip([0.8, 0.1, 0.5, 0.99], together, strict=True):
        assert torch.equal(mask, masking.obs_masks(weight, [rate], gram, ALL)[0])
        assert int((~mask).sum()) == masking.removed_count(rate, 120)


def test_heads_by_output_remove_what_the_output_misses_least():
    """Against all subsets of two heads of four; greedy need not be best, but is here."""
    import itertools

    g = torch.Generator().manual_seed(2)
    x = torch.randn(50, 8, generator=g, dtype=torch.float64) * torch.tensor([1, 1, 3, 3, 0.5, 0.5, 2, 2.0])
    o = torch.randn(5, 8, generator=g, dtype=torch.float64)

    def lost(removed):
        columns = [2 * h + i for h in removed for i in range(2)]
        return float((x[:, columns] @ o[:, columns].T).square().sum())

    best = min(itertools.combinations(range(4), 2), key=lost)
    kept = masking.head_mask_by_output(o, x.T @ x / 50, 4, 0.5)
    assert [h for h in range(4) if not kept[h]] == list(best)


def test_heads_by_output_refuse_to_remove_all():
    with pytest.raises(UserError, match="removes all 2 heads"):
        masking.head_mask_by_output(torch.ones(3, 4), torch.eye(4).double(), 2, 0.9)
