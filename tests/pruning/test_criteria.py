import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from common.errors import UserError
from common.pruning import criteria


def there(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def obs(weight, rates, gram, inputs=None, present=None, **more):
    present = there(*weight.shape) if present is None else present
    return criteria.obs_masks(weight, rates, gram, present, there(len(gram)) if inputs is None else inputs, **more)


@pytest.mark.parametrize(("rate", "count", "removed"), [
    (0.0, 10, 0), (0.5, 10, 5), (0.25, 10, 3), (0.5, 5, 3), (0.145, 1000, 145), (0.35, 10, 4), (0.99, 10, 10),
    (0.1, 4, 0), (0.125, 4, 1),
])
def test_removed_count_rounds_half_up_in_decimal(rate, count, removed):
    assert criteria.removed_count(rate, count) == removed


def test_magnitude_mask_by_hand():
    weight = torch.tensor([[3.0, -1.0], [0.5, -4.0]])
    assert criteria.magnitude_mask(weight, 0.5).tolist() == [[True, False], [False, True]]


def test_what_is_not_there_stays_removed_and_is_not_counted():
    weight, present = torch.tensor([[3.0, 0.0, 1.0, 0.0, 2.0, 0.0]]), torch.tensor([[True, False, True, True, True,
                                                                                    False]])
    assert criteria.magnitude_mask(weight, 0.0, present).tolist() == present.tolist()
    # The one that is there and zero goes before those of magnitude 1 and 2, after those that are gone.
    assert criteria.magnitude_mask(weight, 0.25, present).tolist() == [[True, False, True, False, True, False]]
    assert criteria.magnitude_mask(weight, 0.5, present).tolist() == [[True, False, False, False, True, False]]


def test_ties_fall_to_the_first_entries():
    assert criteria.magnitude_mask(torch.ones(1, 4), 0.5).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.8, 0.95])
def test_magnitude_mask_equals_torch_l1_unstructured_also_in_a_second_round(rate):
    torch.manual_seed(1)
    linear = nn.Linear(20, 30, bias=False)
    weight = linear.weight.detach().clone()
    prune.l1_unstructured(linear, "weight", amount=rate)
    first = criteria.magnitude_mask(weight, rate)
    assert torch.equal(first, linear.weight_mask.bool())
    prune.l1_unstructured(linear, "weight", amount=0.5)
    assert torch.equal(criteria.magnitude_mask(weight * first, 0.5, first), linear.weight_mask.bool())


def test_head_scores_add_q_k_and_v_rows_by_hand():
    q = torch.tensor([[1.0, -1.0], [0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    k, v = torch.zeros(4, 2), torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 0.0], [0.0, -1.0]])
    assert criteria.head_scores(q, k, v, heads=2).tolist() == [4.0, 7.0]


def test_a_structure_mask_removes_the_lowest_scores():
    assert criteria.structure_mask(torch.tensor([4.0, 7.0, 1.0, 9.0]), 0.5, there(4), "heads").tolist() == [
        False, True, False, True]


def test_a_structure_mask_counts_the_heads_that_are_left():
    """8 heads, 4 gone, rate 0.5: 2 left, the best of those that were there."""
    scores = torch.tensor([0.0, 5.0, 0.0, 6.0, 0.0, 7.0, 0.0, 8.0])
    kept = criteria.structure_mask(scores, 0.5, scores > 0, "heads")
    assert kept.nonzero()[:, 0].tolist() == [5, 7]


def test_a_rate_that_removes_all_heads_is_refused():
    with pytest.raises(UserError, match=r"pruning rate 0\.9 removes all 4 heads; .* below 0\.875"):
        criteria.structure_mask(torch.arange(4.0), 0.9, there(4), "heads")
    with pytest.raises(UserError, match=r"pruning rate 0\.5 removes all 1 heads"):
        criteria.structure_mask(torch.arange(4.0), 0.5, torch.arange(4) == 2, "heads")


def test_attention_masks_by_hand():
    masks = criteria.attention_masks(torch.tensor([True, False]), torch.zeros(4, 3),
                                     torch.tensor([[True, False, True, True]]))
    assert masks["q"].tolist() == masks["k"].tolist() == masks["v"].tolist() == [[True] * 3] * 2 + [[False] * 3] * 2
    assert masks["o"].tolist() == [[True, False, False, False]]


def test_weights_of_removed_heads_are_the_first_that_the_out_projections_rate_removes():
    weight = torch.tensor([[1.0, 3.0, 8.0, 9.0], [2.0, 4.0, 8.0, 9.0]])
    gram, inputs = torch.eye(4).double(), torch.tensor([True, True, False, False])
    for rate, kept in ((0.0, [[1, 1], [1, 1]]), (0.25, [[1, 1], [1, 1]]), (0.625, [[0, 1], [1, 1]]),
                       (0.75, [[0, 1], [0, 1]])):
        expected = [[bool(k) for k in row] + [False] * 2 for row in kept]
        assert obs(weight, [rate], gram, inputs)[0].tolist() == expected


def example(rows, inputs):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, inputs, generator=g, dtype=torch.float64) @ torch.randn(
        inputs, inputs, generator=g, dtype=torch.float64)
    return x, torch.randn(rows, inputs, generator=g, dtype=torch.float64), x.T @ x / 100


def test_obs_refits_the_remaining_heads_before_it_chooses():
    """The second input is the first one's double: alone, the first takes over what the second did."""
    x, _, _ = example(1, 3)
    x = torch.stack([x[:, 0], 2 * x[:, 0] + 1e-3 * x[:, 2], x[:, 1]], dim=1)
    weight, inputs = torch.tensor([[0.1, 5.0, 2.0]]).double(), torch.tensor([True, False, True])
    assert obs(weight, [2 / 3], x.T @ x / 100, inputs, damping=1e-9)[0].tolist() == [[True, False, False]]


def test_obs_equals_the_error_of_removing_each_weight_alone():
    x, weight, gram = example(2, 4)
    errors = torch.empty(2, 4)
    for i, j in itertools.product(range(2), range(4)):
        kept = [c for c in range(4) if c != j]
        y = x @ weight[i]
        fit = torch.linalg.lstsq(x[:, kept], y[:, None]).solution[:, 0]
        errors[i, j] = (y - x[:, kept] @ fit).square().mean()
    expected = criteria.smallest_removed(errors, 2)  # what the first step leaves
    assert torch.equal(obs(weight, [0.25], gram, damping=1e-12)[0], expected)


@pytest.mark.parametrize("gone", [0, 10])
def test_obs_refits_between_its_steps(gone):
    """Also where weights are gone already: they are never chosen, and the rate is of the others."""
    x, weight, gram = example(4, 10)
    mask = torch.arange(40).view(4, 10) >= gone  # the whole first row
    present, left = mask, 40 - gone
    fitted, inverse = weight * mask, torch.linalg.inv(gram).diagonal()
    kept, steps = left, []
    while kept > left / 2:
        kept = int(kept * criteria.OBS_KEPT)
        steps.append(max(kept, left // 2))
    for kept in steps:
        mask = criteria.smallest_removed(torch.where(mask, fitted.square() / inverse, -1.0), 40 - kept)
        for i in range(4):
            fitted[i] = 0
            fitted[i, mask[i]] = torch.linalg.lstsq(x[:, mask[i]], x @ weight[i, :, None]).solution[:, 0]
    found = obs(weight * present, [0.5], gram, present=present, damping=1e-12)[0]
    assert torch.equal(found, mask) and int(found.sum()) == left // 2


def test_an_obs_mask_does_not_depend_on_the_other_rates():
    _, weight, gram = example(6, 20)
    together = obs(weight, [0.8, 0.1, 0.5, 0.99, 0.1], gram)
    for rate, mask in zip([0.8, 0.1, 0.5, 0.99, 0.1], together, strict=True):
        assert torch.equal(mask, obs(weight, [rate], gram)[0])
        assert int((~mask).sum()) == criteria.removed_count(rate, 120)


@pytest.mark.parametrize("inputs", [1, 6])
def test_obs_without_any_input_still_removes_what_the_rate_says(inputs):
    """All hidden units are off on the text: magnitude decides."""
    weight = torch.arange(1.0, 1 + 4 * inputs).view(4, inputs)
    for rate, mask in zip((0.25, 0.5), obs(weight, [0.25, 0.5], torch.zeros(inputs, inputs).double()), strict=True):
        assert torch.equal(mask, criteria.magnitude_mask(weight, rate))


def test_obs_of_duplicate_inputs_removes_one_of_each():
    x, _, _ = example(1, 2)
    x = x[:, [0, 0, 1, 1]]
    mask = obs(torch.tensor([[1.0, 0.9, 0.5, 0.6]]).double(), [0.5], x.T @ x / 100)[0]
    assert mask[0, :2].sum() == mask[0, 2:].sum() == 1


def heads_example():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(50, 8, generator=g, dtype=torch.float64) * torch.tensor([1, 1, 3, 3, 0.5, 0.5, 2, 2.0])
    return x, torch.randn(5, 8, generator=g, dtype=torch.float64)


def test_heads_go_in_the_order_in_which_the_output_misses_them_least():
    """Against all subsets; greedy need not be best, but is here."""
    x, o = heads_example()

    def lost(removed):
        columns = [2 * h + i for h in removed for i in range(2)]
        return float((x[:, columns] @ o[:, columns].T).square().sum())

    pairs = criteria.head_pairs(o, x.T @ x / 50, 4)
    order = criteria.head_order(pairs)
    for n in range(1, 5):
        assert set(order[:n]) == set(min(itertools.combinations(range(4), n), key=lost))
        assert float(pairs[order[:n]][:, order[:n]].sum()) == pytest.approx(lost(order[:n]) / lost(range(4)))


def test_a_head_that_another_cancels_goes_with_it():
    """Alone the second costs 1.44 and the third 1.21, but without the first the second is not wanted any more."""
    gram = torch.block_diag(torch.ones(2, 2), torch.eye(2)).double()
    assert criteria.head_order(criteria.head_pairs(torch.tensor([[1.0, -1.2, 1.1, 3.0]]), gram, 4)) == [0, 1, 2, 3]


def test_the_heads_of_an_attention_that_gives_nothing_have_an_order():
    assert criteria.head_order(criteria.head_pairs(torch.zeros(3, 4), torch.eye(4).double(), 2)) == [0, 1]
