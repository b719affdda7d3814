"""Where a search aims so that a model is good enough once it is trained."""

import pytest

from common.pruning.search import LEFT, START, aim, predict


def reached(limit: float, after, least: float = 0.0) -> list[tuple[float, float]]:
    """Train what is aimed at, as ``after`` (excess) says, until the limit is met; return all trainings."""
    tried = []
    while len(tried) < 20 and (not tried or tried[-1][1] > limit):
        above = max(aim(limit, 2.0, tried), least)
        if tried and above == tried[-1][0]:
            break
        tried.append((above, after(above)))
    return tried


def test_what_is_guessed_at_first_needs_one_training():
    assert aim(2.05, 2.0, []) == pytest.approx(0.9 * (2.0 * START + 0.05 / LEFT))
    assert aim(1.85, 2.0, []) < 0
    assert len(reached(2.05, lambda above: 2.0 + LEFT * (above - 2.0 * START))) == 1


@pytest.mark.parametrize("share", [0.6, 0.75, 0.9])
def test_after_two_failures_the_line_is_known(share):
    tried = reached(2.05, lambda above: 2.0 + share * above)
    assert len(tried) == 3 and tried[2][0] == pytest.approx(0.9 * 0.05 / share)


def test_a_limit_below_the_originals_loss_is_met_if_training_lowers_that():
    tried = reached(1.85, lambda above: 1.8 + 0.4 * above + 0.3 * above ** 2, least=0.001)
    assert tried[0][0] == 0.001 and tried[-1][1] <= 1.85


def test_a_limit_that_nothing_meets_ends_at_the_original():
    tried = reached(1.8, lambda above: 1.9 + 0.4 * above, least=0.001)
    assert [above for above, _ in tried] == [0.001]


def test_every_aim_is_below_all_that_failed():
    """Whatever was measured, noise included, the next is a larger model."""
    failed = [(0.2, 2.09), (0.15, 2.10), (0.12, 2.07)]
    for n in range(1, 4):
        assert aim(2.06, 2.0, failed[:n]) < min(above for above, _ in failed[:n])


def test_costs_are_added_up():
    from common.pruning.search import Sensitivity

    name, other = "encoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.2.DenseReluDense"
    found = Sensitivity(2.0, {(name, (0.5, 0.0)): 2.1, (other, (1.0, 0.0, 0.0, 0.0, 0.0)): 1.9})
    assert predict(found, {name: 0.5, other: 1.0}) == pytest.approx(2.0)
    with pytest.raises(KeyError):
        predict(found, {name: 0.25})
